"""Many runs as independent jobs: here one after another or several at once, or through Slurm."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from posterity_studies import runs
from posterity_studies.recipes import Recipe, UserError
from posterity_studies.train import Progress, finished, train

T = TypeVar("T")
Job = tuple[Recipe, str, int, Path]  # what `train` takes: recipe, optimizer, seed, folder


@dataclass(frozen=True)
class Engine:
    """Where jobs run.

    ``at_a_time`` processes of this machine share its cores; with one the jobs run in this process.
    ``slurm`` is a partition: all are then submitted at once (submitit, which needs a folder that
    all machines see), and a job that runs out of time goes on when it is submitted again.
    """

    at_a_time: int = 1
    slurm: str | None = None
    minutes: int = 24 * 60  # of a Slurm job

    @property
    def alone(self) -> bool:
        """Whether all runs in this process."""
        return self.slurm is None and self.at_a_time == 1

    def __post_init__(self):
        if self.at_a_time < 1 or self.minutes < 1:
            raise UserError("needs at least one job at a time, and one minute")


HERE = Engine()
ENGINE: ContextVar[Engine] = ContextVar("engine", default=HERE)


@contextmanager
def on(engine: Engine) -> Iterator[None]:
    """A context in which :func:`train_all` and :func:`each` use this engine."""
    token = ENGINE.set(engine)
    try:
        yield
    finally:
        ENGINE.reset(token)


def train_all(jobs: Sequence[Job], progress: Progress) -> list[dict[str, Any]]:
    """The results of all jobs, in their order; what is finished is read, a killed one goes on.

    Raises:
        UserError: a job failed; the others are done, and need not be done again.
    """
    missing = [job for job in jobs if finished(*job) is None]
    each(train, missing, progress, "runs", [job[3] for job in missing], bars=True)
    return [finished(*job) or {} for job in jobs]


def each(
    function: Callable[..., T],
    calls: Sequence[tuple[Any, ...]],
    progress: Progress,
    label: str,
    names: Sequence[object] | None = None,
    bars: bool = False,
) -> list[T]:
    """``function(*call)`` for each call, in their order: here, in processes, or through Slurm.

    Args:
        function: of a module, for processes import it.
        names: of the calls, for messages; by default their numbers.
        bars: where all runs in this process, each call gets ``progress=`` for bars of its own.

    Raises:
        UserError: a call failed; the others have ended.
    """
    engine = ENGINE.get()
    names = names or range(len(calls))
    if engine.slurm is not None:
        folder = Path(f"{names[0]}").parent if calls else Path()
        return _collect(_submitted(function, calls, engine, folder), names, progress, label)
    if engine.alone and bars:
        return [function(*call, progress=progress) for call in calls]
    if engine.alone or len(calls) < 2:
        return [function(*call) for call in progress(calls, len(calls), label)]
    threads = max((os.cpu_count() or 1) // engine.at_a_time, 1)
    context = multiprocessing.get_context("spawn")
    with (
        _environment(runs.environment(OMP_NUM_THREADS=str(threads))),
        ProcessPoolExecutor(engine.at_a_time, context, _start, (threads,)) as pool,
    ):
        return _collect([pool.submit(function, *c) for c in calls], names, progress, label)


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed study leaves no run behind that a second one, started to go on, would meet."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """An environment that processes started here inherit."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _collect(
    futures: Sequence[Any], names: Sequence[object], progress: Progress, label: str
) -> list[Any]:
    """All results in order; or what failed, when all have ended."""
    known = {future: k for k, future in enumerate(futures)}
    results, failures = [None] * len(futures), []
    done = as_completed(futures) if all(isinstance(f, Future) for f in futures) else futures
    for future in progress(done, len(futures), label):
        try:
            results[known[future]] = future.result()
        except Exception as error:
            failures.append(f"{names[known[future]]}: {error}")
    if failures:
        raise UserError(f"{len(failures)} of {len(futures)} {label} failed. {failures[0]}")
    return results


def _submitted(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    engine: Engine,
    folder: Path,
    cluster: str = "slurm",
) -> list[Any]:
    """Calls submitted to Slurm; what they print is in the folder ``slurm`` of this folder."""
    try:
        import submitit
    except ImportError:
        raise UserError("Slurm needs submitit: pip install submitit") from None
    executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=cluster)
    told = {"slurm_partition": engine.slurm} if cluster == "slurm" else {}
    executor.update_parameters(timeout_min=engine.minutes, name="posterity", **told)
    return [executor.submit(function, *call) for call in calls]
