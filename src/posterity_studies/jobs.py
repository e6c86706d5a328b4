"""Many runs as independent jobs: here one after another or several at once, or through Slurm."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from posterity_studies import runs
from posterity_studies.data.cache import DataError
from posterity_studies.recipes import Diverged, Recipe, UserError
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
    folder: Path = Path()  # what Slurm's jobs print is in its folder ``slurm``

    @property
    def alone(self) -> bool:
        """Whether all runs in this process."""
        return self.slurm is None and self.at_a_time == 1

    def __post_init__(self):
        if self.at_a_time < 1 or self.minutes < 1:
            raise UserError("needs --jobs of at least 1, and at least a minute")


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
    found = [finished(*job) for job in jobs]
    missing = [job for job, result in zip(jobs, found, strict=True) if result is None]
    made = iter(each(train, missing, progress, "runs", [job[3] for job in missing], bars=True))
    return [next(made) if result is None else result for result in found]


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
        submitted = [future.result for future in _submitted(function, calls, engine)]
        return _gathered(progress(enumerate(submitted), len(calls), label), names, label)
    if engine.alone:
        how = {"progress": progress} if bars else {}
        here = enumerate(partial(function, *call, **how) for call in calls)
        return _gathered(here if bars else progress(here, len(calls), label), names, label)
    threads = max((os.cpu_count() or 1) // engine.at_a_time, 1)
    context, before = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    with (
        _environment(runs.environment(OMP_NUM_THREADS=str(threads))),
        ProcessPoolExecutor(engine.at_a_time, context, _start, (threads,)) as pool,
    ):
        try:
            number = {pool.submit(function, *call): k for k, call in enumerate(calls)}
            done = ((number[future], future.result) for future in as_completed(number))
            return _gathered(progress(done, len(calls), label), names, label)
        except BaseException:  # interrupted, or failed: no call that waits shall begin
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - set(before):
                child.terminate()
            raise


def unless_diverged(function: Callable[..., T], *call: Any, **how: Any) -> T | None:
    """``function(*call)``; None where training diverged, for a trial may."""
    try:
        return function(*call, **how)
    except Diverged:
        return None


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all: the study's counts
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


def _gathered(
    done: Iterable[tuple[int, Callable[[], T]]], names: Sequence[object], label: str
) -> list[T]:
    """All results in order; or what failed, when all have ended."""
    results: dict[int, T] = {}
    failures: list[tuple[object, Exception]] = []
    for k, result in done:
        try:
            results[k] = result()
        except Exception as error:
            failures.append((names[k], error))
    if failures:
        name, error = failures[0]
        plain = isinstance(error, (UserError, DataError))
        told = str(error) if plain else f"{type(error).__name__}: {error}"
        some = f"{len(failures)} of {len(names)} {label} failed. {name}: {told}"
        raise UserError(some) from error
    return [results[k] for k in range(len(names))]


def _submitted(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    engine: Engine,
    cluster: str = "slurm",
) -> list[Any]:
    """Calls submitted to Slurm."""
    try:
        import submitit
    except ImportError:
        raise UserError("Slurm needs submitit: pip install submitit") from None
    executor = submitit.AutoExecutor(folder=engine.folder / "slurm", cluster=cluster)
    told = {"slurm_partition": engine.slurm} if cluster == "slurm" else {}
    executor.update_parameters(timeout_min=engine.minutes, name="posterity", **told)
    return [executor.submit(function, *call) for call in calls]
