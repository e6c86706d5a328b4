"""Runs as jobs: the same bits wherever they run, and failures that cost the others nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from posterity_studies import jobs, recipes, runs
from posterity_studies.recipes import UserError
from posterity_studies.train import silent, train


@pytest.fixture
def work(folder, environment, monkeypatch, tmp_path):
    """Two runs, for processes that see the small data too."""
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    chosen = recipes.replace(recipes.recipe("smoke"), epochs=1, samples=2)
    return [(chosen, o, 0, tmp_path / "runs" / o) for o in ("sgd", "ivon")]


def weights(job):
    return runs.read_tensors(job[3] / "model.safetensors")


def test_processes_train_as_this_one_does(work, tmp_path):
    bars = []

    def progress(items, total, label):
        bars.append((total, label))
        return items

    with jobs.on(jobs.Engine(2)):
        found = jobs.train_all(work, progress)
    assert bars == [(2, "runs")]
    assert [r["settings"]["optimizer"] for r in found] == ["sgd", "ivon"]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each of two processes has
    for job, result in zip(work, found, strict=True):
        alone = train(*job[:3], tmp_path / "alone" / job[1])
        assert alone["evaluations"] == result["evaluations"]
        mine = weights((*job[:3], tmp_path / "alone" / job[1]))
        assert all(torch.equal(mine[n], w) for n, w in weights(job).items())
    torch.set_num_threads(before)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/*")}
    assert jobs.train_all(work, silent) == found  # and is not done again
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/*")}


def test_a_failure_names_its_run_and_costs_the_others_nothing(work):
    chosen = work[0][0].with_settings("adamw", ["lr=1e30"])
    work = [work[0], (chosen, "adamw", 0, work[0][3].parent / "bad"), work[1]]
    with jobs.on(jobs.Engine(2)), pytest.raises(UserError, match=r"1 of 3 runs failed\. .*bad"):
        jobs.train_all(work, silent)
    assert all((job[3] / "result.json").exists() for job in (work[0], work[2]))
    assert jobs.ENGINE.get() == jobs.Engine()


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_a_killed_study_leaves_no_run_behind(environment, by):
    code = """import signal, time; from posterity_studies import jobs, train
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
with jobs.on(jobs.Engine(2)): jobs.each(time.sleep, [(100,), (100,)], train.silent, "runs")"""
    study = subprocess.Popen([sys.executable, "-c", code], env=environment)

    def runs_of_it():
        found = subprocess.run(["pgrep", "-P", str(study.pid)], capture_output=True, text=True)
        return found.stdout.split()

    def soon(condition):
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.2)
        return condition()

    assert soon(lambda: len(runs_of_it()) == 3)  # two, and what tracks their resources
    started = runs_of_it()
    time.sleep(5)  # until they are at work
    study.send_signal(by)
    study.wait(30)
    assert soon(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


@pytest.mark.slow
def test_jobs_are_submitted(work):
    engine = jobs.Engine(slurm="any", folder=work[0][3].parent)
    futures = jobs._submitted(jobs.train, work, engine, cluster="local")
    found = [future.result() for future in futures]
    assert [r["settings"]["optimizer"] for r in found] == ["sgd", "ivon"]
    assert [r["settings"]["optimizer"] for r in jobs.train_all(work, silent)] == ["sgd", "ivon"]


def test_wrong_engines_say_so(call, tmp_path, monkeypatch):
    done = call("study", "in-domain", "--scale", "smoke", "--jobs", "0", "--out", tmp_path / "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--jobs of at least 1" in done.stderr
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    done = call("study", "in-domain", "--scale", "smoke", "--slurm", "gpu", "--out", tmp_path / "x")
    assert done.stderr == "posterity: error: Slurm needs submitit: pip install submitit\n"
