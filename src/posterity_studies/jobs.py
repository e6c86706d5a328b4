"""Many runs as independent jobs: here one after another or several at once, or through Slurm."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posterity_studies import runs
from posterity_studies.recipes import Recipe, UserError
from posterity_studies.train import Progress, finished, train

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

    def __post_init__(self):
        if self.at_a_time < 1 or self.minutes < 1:
            raise UserError("needs at least one job at a time, and one minute")


HERE = Engine()
ENGINE: ContextVar[Engine] = ContextVar("engine", default=HERE)


@contextmanager
def on(engine: Engine) -> Iterator[None]:
    """A context in which :func:`train_all` uses this engine."""
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
    engine = ENGINE.get()
    if engine.slurm is not None:
        _collect(_submitted(missing, engine), progress)
    elif engine.at_a_time == 1 or len(missing) < 2:
        for job in missing:
            train(*job, progress)
    else:
        threads = max((os.cpu_count() or 1) // engine.at_a_time, 1)
        context = multiprocessing.get_context("spawn")
        with (
            _environment(runs.environment(OMP_NUM_THREADS=str(threads))),
            ProcessPoolExecutor(engine.at_a_time, context, _start, (threads,)) as pool,
        ):
            _collect({pool.submit(train, *job): job for job in missing}, progress)
    return [finished(*job) or {} for job in jobs]


def _start(threads: int) -> None:
    torch.set_num_threads(threads)


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


def _collect(futures: dict[Any, Job], progress: Progress) -> None:
    """Wait for all; then raise for the first that failed."""
    failures = []
    done = as_completed(futures) if all(isinstance(f, Future) for f in futures) else futures
    for future in progress(done, len(futures), "runs"):
        try:
            future.result()
        except Exception as error:
            failures.append(f"{futures[future][3]}: {error}")
    if failures:
        raise UserError(f"{len(failures)} of {len(futures)} runs failed. {failures[0]}")


def _submitted(jobs: Sequence[Job], engine: Engine, cluster: str = "slurm") -> dict[Any, Job]:
    """Jobs submitted to Slurm; what they print is in the folder ``slurm`` beside the runs."""
    try:
        import submitit
    except ImportError:
        raise UserError("Slurm needs submitit: pip install submitit") from None
    if not jobs:
        return {}
    executor = submitit.AutoExecutor(folder=jobs[0][3].parent / "slurm", cluster=cluster)
    told = {"slurm_partition": engine.slurm} if cluster == "slurm" else {}
    executor.update_parameters(timeout_min=engine.minutes, name="posterity", **told)
    return {executor.submit(train, *job): job for job in jobs}
