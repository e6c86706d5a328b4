"""The command line on small data in the real format: whole processes, kills, wrong input."""

import errno
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError, safe_open

from posterity import __version__, predict
from posterity.selective import abstention
from posterity_studies import (
    cli,
    compare,
    data,
    finetune,
    recipes,
    runs,
    studies,
    tasks,
    train,
    tune,
)
from posterity_studies.recipes import UserError
from posterity_studies.train import silent


def command(*arguments):
    return [sys.executable, "-m", "posterity_studies", *map(str, arguments)]


def posterity(environment, *arguments):
    return subprocess.run(
        command(*arguments), env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished IVON run."""
    out = tmp_path_factory.mktemp("runs") / "ivon"
    train.train(recipes.recipe("smoke"), "ivon", 0, out)
    return out


def one_line(done):
    """The error of a wrong call: one line, exit code 2, nothing else."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("posterity: error: ")
    return done.stderr


def test_json_is_all_that_is_printed(call, run, environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(run, tmp_path / "run")
    image = tmp_path / "shoe.png"
    Image.new("L", (28, 28)).save(image)
    smoke = ("smoke", "--out", tmp_path / "new")

    def told(*arguments):
        done = call(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout, parse_constant=pytest.fail)

    def written(path):  # what is not finite is null
        return json.loads(runs.as_json(runs.read_json(path)))

    one = told("train", *smoke)
    assert one == written(tmp_path / "new" / "result.json")
    assert told("train", *smoke) == one  # finished
    (measures, again) = (told("evaluate", run, "--samples", n) for n in (4, 4))
    assert measures == again == runs.read_json(run / "evaluation-4.json")
    assert 0 <= measures["accuracy"] <= 1
    (seen,) = told("predict", run, image)
    assert sum(seen["probs"].values()) == pytest.approx(1, abs=1e-5)
    assert seen["image"] == str(image)
    assert seen.keys() == {"image", "probs", "entropy", "mutual_information"}
    done = posterity(environment, "compare", "smoke", "--out", tmp_path / "three", "--json")
    three = json.loads(done.stdout)
    assert [r["settings"]["optimizer"] for r in three] == ["adamw", "sgd", "ivon"]
    found = told("study", "gap", "--scale", "smoke", "--out", tmp_path / "gap")
    assert found == written(tmp_path / "gap" / "result.json")
    page = Path(told("report", run)["report"])
    assert page == run / "report.html"
    assert page.exists()
    few = told("sensitivity", run, "--first", 11)  # of some classes one image: no error
    assert None in [row["error"] for row in few["classes"]]
    summary = told("sensitivity", run)
    assert len(summary["classes"]) == 10
    assert math.isfinite(summary["left_out"])
    assert all(Path(summary[written]).exists() for written in ("table", "gallery"))
    alone = ("--method", "average", "--out", tmp_path / "merged.safetensors")
    merged = told("merge", run, run, *alone)
    assert merged["settings"]["merged"]["method"] == "average"
    assert all(Path(merged[written]).exists() for written in ("posterior", "card", "page"))
    (tmp_path / "results").mkdir()
    assert told("study", "--list").keys() == studies.STUDIES.keys()
    claims = told("study", "--report")
    assert {c["status"] for c in claims} == {"not yet run"}


def test_every_command_prints_json_on_demand():
    for name, kind in cli.COMMANDS.items():
        assert any(field.name == "as_json" for field in fields(kind)), name


def test_every_option_is_explained_and_every_command_has_an_example(call):
    for name in cli.COMMANDS:
        usage, said = call(name, "--help").stdout.split("\n", 1)
        assert usage.startswith(f"usage: posterity {name} ")
        assert re.search(f"^posterity {name} .*[a-z]", said, re.M), name
        for option in re.split(r"\n\W*(?=--[a-z])", said)[1:]:
            words = re.split(r"\s{2,}|\n", option, maxsplit=1)[1]
            assert re.match("[A-Za-z0-9]", words), option


def test_the_version_and_what_a_shell_completes(call):
    assert call("--version").stdout == f"posterity {__version__}\n"
    script = call("--tyro-print-completion", "bash")
    assert not script.returncode
    assert all(name in script.stdout for name in cli.COMMANDS)


def test_nothing_is_coloured_where_it_is_piped(environment, run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    done = posterity(environment, "evaluate", run, "--samples", 2)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "NLL" in done.stdout


def test_every_artefact_names_the_version(run, tmp_path, call):
    run = shutil.copytree(run, tmp_path / "run")
    assert call("evaluate", run, "--samples", 2).returncode == 0
    files = sorted(run.glob("*.safetensors"))
    assert len(files) == 3
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata()["posterity"].strip('"') == __version__
    assert runs.read_json(run / "evaluation-2.json")["posterity"] == __version__
    assert runs.read_json(run / "result.json")["provenance"]["posterity"] == __version__
    runs.write_checkpoint(tmp_path / "checkpoint.pt", {"step": 1})
    assert runs.read_checkpoint(tmp_path / "checkpoint.pt")["posterity"] == __version__
    runs.kept(tmp_path / "kept.json", {}, dict)
    assert runs.read_json(tmp_path / "kept.json")["posterity"] == __version__


def test_a_full_disk_is_told_and_loses_nothing(environment, tmp_path):
    out, limit = tmp_path / "run", (400 * 1024,) * 2  # less than a checkpoint has

    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    arguments = command("train", "smoke", "--out", out)
    how = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(arguments, preexec_fn=small, **how)
    said = one_line(done)
    assert str(out) in said
    assert "disk full? Free some space" in said
    assert not list(out.glob(".*"))
    assert not (out / "result.json").exists()
    again = subprocess.run(arguments, **how)
    assert again.returncode == 0, again.stderr


def test_a_terminal_gets_one_line_too(environment):
    """tyro draws coloured boxes there."""
    leader, follower = os.openpty()
    arguments, colours = command("train", "smoke", "--epochs", "many"), {"TERM": "xterm-256color"}
    how = {"env": environment | colours, "stdout": follower, "stderr": follower}
    assert subprocess.run(arguments, timeout=60, **how).returncode == 2
    said = os.read(leader, 10_000).decode()
    assert said.strip() == (
        "posterity: error: --epochs takes INT, not 'many'; see posterity train --help"
    )


def test_a_reader_that_has_enough_is_no_error(environment):
    shell = " ".join(command("train", "--help")) + " | true"
    for _ in range(3):
        done = subprocess.run(shell, shell=True, env=environment, capture_output=True, text=True)
        assert done.stderr == ""


def test_other_faults_of_a_writer_are_not_the_disks(tmp_path):
    tied = torch.ones(2)
    with pytest.raises(RuntimeError, match="share memory"):
        runs.write_tensors(tmp_path / "tied.safetensors", {"a": tied, "b": tied})


def test_a_run_leaves_files_that_are_not_its_own(tmp_path):
    (tmp_path / ".env.local").write_text("mine")
    (tmp_path / ".checkpoint.pt.abc.tmp").write_text("half written")
    with runs.occupied(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".env.local"]


@pytest.mark.parametrize(
    ("code", "path", "said"),
    [
        (errno.ENOSPC, None, "no space left on device: free some and run the same command again"),
        (errno.EROFS, "x", "x: read-only file system: choose a place that may be written to"),
        (errno.EACCES, "x", "x: permission denied: choose a place that may be written to"),
    ],
)
def test_what_the_system_refuses_says_what_to_do(call, monkeypatch, code, path, said):
    def refused(*_, **__):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(runs, "write_json", refused)
    assert one_line(call("train", "smoke", "--out", "new")).startswith(f"posterity: error: {said}")


def test_tensors_that_find_a_full_disk_leave_the_old_ones(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    path = tmp_path / "model.safetensors"
    runs.write_tensors(path, {"w": torch.ones(2)})
    monkeypatch.setattr(runs.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"model.safetensors cannot be written.*No space left"):
        runs.write_tensors(path, {"w": torch.zeros(2)})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert runs.read_tensors(path)["w"].tolist() == [1, 1]


def test_run_folder_holds_what_it_should(run):
    assert {p.name for p in run.iterdir()} == {
        *("config.json", "metrics.jsonl", "model.safetensors", "posterior.safetensors"),
        *("predictions.safetensors", "result.json"),
    }
    result = runs.read_json(run / "result.json")
    assert result["provenance"].keys() >= {"seed", "git", "torch", "device", "data", "finished"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "step" in x] == list(range(1, 11))  # 5 batches × 2 epochs
    assert [x["epoch"] for x in lines if "epoch" in x] == [1, 2]
    assert result["curve"]["epoch"] == [1, 2]
    assert result["evaluations"].keys() == {"mean", "samples"}


def test_result_is_that_of_its_predictions(run):
    saved = runs.read_tensors(run / "predictions.safetensors")
    targets = data.load("fashion-mnist").test.targets
    found = runs.read_json(run / "result.json")["evaluations"]["samples"]
    probs = saved["samples.probs"].double()
    assert found["accuracy"] == pytest.approx((probs.argmax(1) == targets).double().mean().item())
    likelihood = probs[torch.arange(len(targets)), targets]
    assert found["nll"] == pytest.approx(-likelihood.log().mean().item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "ivon"])
def test_killed_run_resumes_to_the_same_bits(optimizer, environment, tmp_path):
    arguments = ["--optimizer", optimizer, "--epochs", 6, "--samples", 2, "--quiet"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert posterity(environment, "train", "smoke", *arguments, "--out", whole).returncode == 0
    process = subprocess.Popen(
        command("train", "smoke", *arguments, "--out", killed), env=environment
    )
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "result.json").exists(), "the run ended before it could be killed"
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a line that the kill cut short
    assert posterity(environment, "train", "smoke", *arguments, "--out", killed).returncode == 0
    for name in ("model.safetensors", "metrics.jsonl", "predictions.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def on_two_ranks(*arguments):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*torchrun, "-m", "posterity_studies", *map(str, arguments)]


@pytest.mark.slow
def test_two_ranks_make_the_run_of_one(environment, tmp_path):
    arguments = ["train", "smoke", "--epochs", 1, "--quiet", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert posterity(environment, *arguments, one).returncode == 0
    assert subprocess.run(on_two_ranks(*arguments, two), env=environment).returncode == 0
    for name in ("model.safetensors", "posterior.safetensors", "predictions.safetensors"):
        ours, theirs = (runs.read_tensors(folder / name) for folder in (two, one))
        for key, value in theirs.items():
            bound = 1e-4 * float(value.abs().max())
            torch.testing.assert_close(ours[key], value, rtol=0, atol=bound)
    steps = ([json.loads(x) for x in (f / "metrics.jsonl").open()] for f in (one, two))
    for ours, theirs in zip(*steps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_a_killed_rank_costs_no_bit(environment, tmp_path):
    arguments = ["train", "smoke", "--epochs", 6, "--samples", 2, "--quiet", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert subprocess.run(on_two_ranks(*arguments, whole), env=environment).returncode == 0
    process = subprocess.Popen(on_two_ranks(*arguments, killed), env=environment)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)  # the second rank
    assert process.wait() != 0
    assert not (killed / "result.json").exists(), "the run ended before it could be killed"
    assert subprocess.run(on_two_ranks(*arguments, killed), env=environment).returncode == 0
    for name in ("model.safetensors", "metrics.jsonl", "predictions.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_other_commands_do_not_run_on_several_processes(run, call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "only train, pretrain and finetune" in one_line(call("evaluate", run))


@pytest.mark.parametrize(
    ("arguments", "then"),
    [(("study", "gap"), "goes on from the last checkpoint"), (("report", "x"), "starts")],
)
def test_an_interrupt_does_not_promise_too_much(call, monkeypatch, arguments, then):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.studies, "study", interrupted)
    monkeypatch.setattr(compare, "write_report", interrupted)
    done = call(*arguments)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1].startswith(
        "posterity: interrupted; the same command " + then
    )


def test_an_interrupt_at_the_start_is_no_traceback(environment):
    """While it still imports: SIGINT comes with the first module of the command line."""
    code = (
        "import sys, builtins\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'posterity_studies.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from posterity_studies.__main__ import main\n"
        "main()\n"
    )
    how = {"env": environment, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert (done.returncode, done.stderr) == (130, "\nposterity: interrupted\n")


def test_interrupt_says_how_to_go_on(environment, tmp_path):
    out = tmp_path / "run"
    arguments = command("train", "smoke", "--epochs", 500, "--out", out)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "goes on" in process.communicate(timeout=60)[1]
    assert process.returncode == 130


def test_finished_run_is_not_repeated(run):
    before = {p: p.stat().st_mtime_ns for p in run.iterdir()}
    again = train.train(recipes.recipe("smoke"), "ivon", 0, run)
    assert again == runs.read_json(run / "result.json")
    assert before == {p: p.stat().st_mtime_ns for p in run.iterdir()}


def test_other_settings_do_not_touch_a_run(run):
    before = {p: p.read_bytes() for p in run.iterdir()}
    changed = recipes.recipe("smoke").with_settings("ivon", ["lr=0.1"])
    with pytest.raises(UserError, match="other settings"):
        train.train(changed, "ivon", 0, run)
    assert before == {p: p.read_bytes() for p in run.iterdir()}


def test_two_processes_do_not_share_a_run_folder(folder, tmp_path):
    out = tmp_path / "new/run"
    with runs.occupied(out):
        with pytest.raises(UserError, match="another process is at work"):
            train.train(recipes.recipe("smoke"), "sgd", 0, out)
        (out / ".config.json.x1.tmp").write_text("what a killed process left")
    assert [path.name for path in out.iterdir()] == [".config.json.x1.tmp"]
    assert train.finished(recipes.recipe("smoke"), "sgd", 0, out) is None
    with runs.occupied(out):
        pass
    assert not any(out.iterdir())
    with pytest.raises(ZeroDivisionError), runs.occupied(tmp_path / "other/run"):
        1 / 0  # noqa: B018
    assert not (tmp_path / "other").exists()


def test_what_is_kept_is_of_what_was_asked(tmp_path):
    path, made = tmp_path / "x.json", []

    def make():
        made.append(1)
        return {"a": (1, 2)}

    assert runs.kept(path, {"n": 3, "t": (1,)}, make) == {"a": [1, 2]}
    assert runs.kept(path, {"n": 3, "t": (1,)}, make) == {"a": [1, 2]}
    assert made == [1]
    with pytest.raises(UserError, match=r"x\.json is of other settings"):
        runs.kept(path, {"n": 4, "t": (1,)}, make)


def test_a_run_without_unknown_images_has_a_table_without_them(call, tmp_path):
    out = tmp_path / "run"
    how = ("--optimizer", "sgd", "--epochs", "1", "--validation", "100", "--out", out)
    done = call("train", "smoke", *how)
    assert done.returncode == 0, done.stderr
    assert "NLL" in done.stdout
    assert "AUROC" not in done.stdout


def test_training_says_in_the_end_what_was_wrong_with_it(call, tmp_path):
    out = tmp_path / "run"
    done = call("train", "smoke", "--epochs", "1", "--set", "memory=1e7", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "! h has not moved" in done.stdout
    kept = json.loads((out / "result.json").read_text())["diagnostics"]
    assert {"started", "scatter", "elbo"} <= {verdict["name"] for verdict in kept}


def test_folder_of_something_else_is_refused(tmp_path, folder):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        train.train(recipes.recipe("smoke"), "sgd", 0, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "nosuch"),
        ("train", "smoke", "--optimizer", "nosuch"),
        ("train", "smoke", "--set", "nosuch=1"),
        ("train", "smoke", "--set", "lr=fast"),
        ("train", "smoke", "--epochs", "0"),
        ("train", "smoke", "--set", "hess_init=-1"),
        ("train", "smoke", "--set", "temperature=0"),
        ("train", "smoke", "--set", "temperature=-1"),
        ("train", "smoke", "--set", "memory=0"),
        ("train", "smoke", "--validation", "100000"),
        ("compare", "smoke", "--samples", "-1"),
        ("evaluate", "nosuch"),
        ("predict", "nosuch", "x.png"),
        ("tune", "smoke", "--trials", "0"),
    ],
)
def test_wrong_input_gets_one_line(arguments, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(call(*arguments))
    assert list(tmp_path.rglob("*.json")) == []


@pytest.mark.parametrize("name", ["result.json", "model.safetensors", "posterior.safetensors"])
def test_damaged_run_gets_one_line(name, run, call, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    assert name in one_line(call("evaluate", copy, "--samples", 2))
    (copy / name).unlink()
    if name != "posterior.safetensors":
        assert name in one_line(call("evaluate", copy, "--samples", 2))


def test_checkpoint_with_code_in_it_is_not_run(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": Path}, path)  # a global that weights_only does not allow
    with pytest.raises(UserError, match=r"checkpoint\.pt"):
        runs.read_checkpoint(path)


def test_evaluate_agrees_with_the_run(run, call):
    done = call("evaluate", run, "--samples", 4)
    assert done.returncode == 0, done.stderr
    found = runs.read_json(run / "evaluation-4.json")
    result = runs.read_json(run / "result.json")["evaluations"]["samples"]
    assert found["nll"] == pytest.approx(result["nll"], rel=1e-6)
    (run / "evaluation-4.json").unlink()


def test_predict_abstains_where_the_promised_risk_asks_for_it(run, call, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    task = tasks.load_task(recipes.recipe("smoke"))
    model, posterior = runs.load(run)[1:]
    mine = predict(model, posterior, task.test[0][:1], samples=4).probs[0]
    for top in (float(mine.max()) - 0.01, float(mine.max()) + 0.01):  # as if half were so sure
        probs = torch.full((100, 10), 0.1)
        probs[:50] = (1 - top) / 9
        probs[torch.arange(50), task.test[1][:50]] = top
        runs.write_tensors(copy / "predictions.safetensors", {"samples.probs": probs})
        rule = abstention(probs, task.test[1], risk=0.3)
        Image.fromarray(task.images[0].numpy()).save(tmp_path / "a.png")
        done = call("predict", copy, tmp_path / "a.png", "--samples", 4, "--abstain-at", 0.3)
        assert done.returncode == 0, done.stderr
        assert f"above {rule.threshold:.4f}: 50.0% of the test images, 0 of these 50" in done.stdout
        answered = "abstains" not in done.stdout
        assert answered == (float(mine.max()) > rule.threshold)
        done = call(*done.args, "--json")
        assert (json.loads(done.stdout)[0]["answer"] is not None) == answered
    assert "it takes" in one_line(
        call("predict", copy, tmp_path / "a.png", "--samples", 4, "--abstain-at", 0.001)
    )
    assert "between 0 and 1" in one_line(call("predict", copy, "x.png", "--abstain-at", 1.5))


def test_predict_at_the_mean(run, call, tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    done = call("predict", run, tmp_path / "a.png", "--samples", 0, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["mutual_information"] == 0


def test_every_setting_of_every_optimizer_takes_a_number():
    of_recipes = [recipes.recipe(name).optimizers for name in recipes.RECIPES]
    for settings in [s for each in (*of_recipes, finetune.OPTIMIZERS) for s in each.values()]:
        numbers = [f for f in fields(settings) if f.init and f.name != "task"]
        for field in numbers:
            changed = recipes.overridden(settings, "ivon", [f"{field.name}=20"])
            assert getattr(changed, field.name) == 20
            with pytest.raises(UserError, match="expected"):
                recipes.overridden(settings, "ivon", [f"{field.name}=much"])


def test_one_sure_mistake_leaves_the_nll_finite():
    model = torch.nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[400.0], [0.0]])
    inputs, targets = torch.ones(10, 1), torch.tensor([0] * 9 + [1])
    assert train.evaluate(model, None, (inputs, targets))["nll"] == pytest.approx(40.0)


def test_predict_names_the_class(run, call, tmp_path):
    pixels = data.load("fashion-mnist").test.inputs[0].numpy()
    Image.fromarray(pixels).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done = call("predict", run, tmp_path / "good.png", "--samples", 4)
    assert done.returncode == 0, done.stderr
    assert "good.png" in done.stdout
    assert "entropy" in done.stdout
    assert "bad.png" in one_line(call("predict", run, tmp_path / "good.png", tmp_path / "bad.png"))


def test_compare_prints_a_table_and_writes_a_report(environment, call, tmp_path):
    arguments = ["smoke", "--out", tmp_path / "runs", "--results", tmp_path / "kept"]
    done = posterity(environment, "compare", *arguments)
    assert done.returncode == 0, done.stderr
    for label in ("AdamW", "SGD", "IVON at the mean", "IVON, 4 samples", "OOD AUROC"):
        assert label in done.stdout
    assert "IVON, 4 samples" in (tmp_path / "runs/report.html").read_text()
    names = {p.stem for p in (tmp_path / "kept").iterdir()}
    assert names == {f"{optimizer}-seed0" for optimizer in ("adamw", "sgd", "ivon")}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/*")}
    again = call("compare", *arguments)  # finished runs are not run again
    assert again.stdout == done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/*")}
    results = [runs.read_json(p) for p in (tmp_path / "kept").iterdir()]
    twice = [*results, *({**r, "seed": 1, "seconds_per_epoch": 2e9} for r in results)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(compare.table(twice))
    assert "2 seeds" in (text := console.export_text())
    assert "±" in text
    assert "1000000000" in text  # the mean over seeds


def test_report_is_of_one_run_or_of_several(call, run, tmp_path):
    done = call("report", run)
    assert done.stdout == f"report: {run / 'report.html'}\n", done.stderr
    page = (run / "report.html").read_text()
    assert "IVON on fashion-mnist" in page
    assert "The posterior of IVON, 4 samples, layer by layer" in page
    other = shutil.copytree(run, tmp_path / "other")
    assert call("report", run, other, "--out", tmp_path / "both.html").returncode == 0
    both = (tmp_path / "both.html").read_text()
    assert f"{run.name} · other on fashion-mnist" in both
    assert "other at the mean" in both
    same = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
    assert call("report", run, same, "--out", tmp_path / "same.html").returncode == 0
    assert f"2: {run.name} at the mean" in (tmp_path / "same.html").read_text()
    result = runs.read_json(run / "result.json")
    for changes, words in (
        ({"data": "mnist"}, "on the same images"),
        ({"validation": 9}, "on the same images"),
        ({"data": None}, "is no run of `train`"),
    ):
        kept = {k: v for k, v in (result | changes).items() if v is not None}
        (other / "result.json").write_text(json.dumps(kept))
        assert words in one_line(call("report", run, other))
    (other / "result.json").write_text(json.dumps(result | {"validation": 9}))
    assert "without unknown images" in one_line(call("report", other))
    (run / "report.html").unlink()


def small_search(**changes):
    """The smoke recipe's SGD and AdamW, three epochs, a hundred images held out."""
    smoke, names = recipes.recipe("smoke"), ("sgd", "adamw")
    few = {name: smoke.optimizers[name] for name in names}
    return replace(smoke, epochs=3, validation=100, optimizers=few, **changes)


def test_tune_lets_the_best_third_go_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "FINALISTS", 2)
    found = tune.tune(small_search(), 3, tmp_path, silent)
    results = {p: runs.read_json(p) for p in tmp_path.glob("*/result.json")}
    assert all(r["validation"] == 100 for r in results.values())
    budgets = []
    for o in ("sgd", "adamw"):
        losses = {
            (r["settings"]["lr"], r["epochs"], r["seed"]): r["evaluations"]["mean"]["nll"]
            for r in results.values()
            if r["settings"]["optimizer"] == o
        }
        budgets.append(sorted(key[1:] for key in losses))
        first = sorted((nll, key[0]) for key, nll in losses.items() if key[1:] == (1, 0))
        one, other, last = found[o]["trials"]
        assert {t["settings"]["lr"] for t in (one, other)} == {lr for _, lr in first[:2]}
        assert last["settings"]["lr"] == first[2][1]
        assert last["validation"]["nll"] == first[2][0]
        assert [(t["epochs"], t["seeds"]) for t in found[o]["trials"]] == [(3, 3), (3, 3), (1, 1)]
        seeds = [losses[one["settings"]["lr"], 3, seed] for seed in (0, 1, 2)]
        assert one["validation"]["nll"] == pytest.approx(sum(seeds) / 3)
        assert one["validation"]["nll"] <= other["validation"]["nll"]
        assert found[o]["best"] == one["settings"]
    assert budgets == [[(1, 0)] * 3 + [(3, 0), (3, 0), (3, 1), (3, 1), (3, 2), (3, 2)]] * 2
    tune.draw(tmp_path / "tune.png", found)
    assert Image.open(tmp_path / "tune.png").size > (400, 400)

    times = {p: p.stat().st_mtime_ns for p in results}
    again = tune.tune(small_search(), 3, tmp_path, silent)
    assert {**again, "provenance": 0} == {**found, "provenance": 0}
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/result.json")} == times


def test_a_trial_may_diverge_but_not_all(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "FINALISTS", 1)
    monkeypatch.setattr(tune, "SEEDS", (0,))
    far = {"lr": (1e20, 1e21)}
    with pytest.raises(UserError, match="all finalists of sgd diverged"):
        tune.tune(small_search(search={"sgd": far}), 1, tmp_path, silent)
    wide = small_search(search={"sgd": {"lr": (1e-3, 1e21)}})
    found = tune.tune(wide, 4, tmp_path, silent)["sgd"]
    assert found["trials"][-1]["validation"]["nll"] == math.inf
    assert found["best"]["lr"] < 1e10
    with pytest.raises(UserError, match="no search space"):
        tune.tune(small_search(search={"ivon": far}), 1, tmp_path, silent)


def test_rounds_of_a_search():
    assert tune.rounds(18, 2) == [18]
    assert tune.rounds(18, 3) == [6, 18]
    assert tune.rounds(18, 26) == [2, 6, 18]
    assert tune.rounds(18, 27) == [1, 3, 9, 18]
    assert tune.rounds(8, 10) == [1, 3, 8]
    assert tune.rounds(1, 100) == [1]
    assert tune.rounds(20, 10, first=5) == [5, 15, 20]


def test_trials_fill_the_search_space():
    chosen = recipes.recipe("fashion-mnist")
    for space in chosen.search.values():
        found = tune.trials(space, 16)
        assert found[:4] == tune.trials(space, 4)
        for key, (low, high) in space.items():
            inside = [t[key] for t in found]
            assert all(low <= v <= high for v in inside)
            middle = (low * high) ** 0.5
            assert sum(v < middle for v in inside) == 8  # a Sobol sequence is balanced


def test_tune_says_what_is_best(call, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "VALIDATION", 100)
    monkeypatch.setattr(tune, "SEEDS", (0,))
    done = call("tune", "smoke", "--trials", "1", "--jobs", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = runs.read_json(tmp_path / "tune.json")
    for o in ("adamw", "sgd", "ivon"):
        assert f"{o}: {found[o]['best']}" in done.stdout
    again = call("tune", "smoke", "--trials", "1", "--jobs", "1", "--out", tmp_path, "--json")
    assert json.loads(again.stdout)["ivon"]["best"] == found["ivon"]["best"]


def test_recipe_settings_are_those_that_tune_found():
    found = json.loads((Path(__file__).parents[2] / "results/fashion-mnist/tune.json").read_text())
    chosen = recipes.recipe("fashion-mnist")
    assert found["epochs"] == chosen.epochs
    budgets = {len(found[optimizer]["trials"]) for optimizer in chosen.optimizers}
    assert len(budgets) == 1, "not the same budget for every optimizer"
    assert found["provenance"]["data"]
    for optimizer, settings in chosen.optimizers.items():
        best = found[optimizer]["best"]
        assert {key: getattr(settings, key) for key in best} == best


def test_order_of_an_epoch_is_a_permutation():
    order = tasks.batches(1000, 128, seed=3, epoch=1)
    assert torch.equal(torch.cat(order).sort().values, torch.arange(1000))
    assert not torch.equal(order[0], tasks.batches(1000, 128, seed=3, epoch=2)[0])
    assert torch.equal(order[0], tasks.batches(1000, 128, seed=3, epoch=1)[0])


def test_committed_results_are_whole():
    folder = Path(__file__).parents[2] / "results/fashion-mnist"
    results = [json.loads(p.read_text()) for p in sorted(folder.glob("*-seed*.json"))]
    assert len(results) == 9
    assert {r["settings"]["optimizer"] for r in results} == {"adamw", "sgd", "ivon"}
    for result in results:
        chosen = recipes.recipe("fashion-mnist")
        config = train.configuration(chosen, result["settings"]["optimizer"], result["seed"])
        assert {key: result[key] for key in config} == config
    assert compare.table(results).row_count == 4


def test_shifted_images_are_cuts_of_padded_ones():
    images = torch.rand(5, 3, 6, 7)
    corners = torch.tensor([[4, 4], [0, 0], [8, 8], [4, 4], [2, 7]])
    mirrored = torch.tensor([False, False, False, True, True])
    found = tasks.shifted(images, corners, mirrored)
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[1][:, 4:, 4:], images[1][:, :2, :3])
    assert torch.equal(found[2][:, :2, :3], images[2][:, 4:, 4:])
    assert not found[2][:, 2:].any()
    assert torch.equal(found[3], images[3].flip(-1))
    padded = torch.nn.functional.pad(images[4], (4, 4, 4, 4))
    assert torch.equal(found[4], padded[:, 2:8, 7:14].flip(-1))


def test_augmented_runs_resume_and_differ_from_plain_ones(folder, tmp_path, monkeypatch):
    plain = replace(recipes.recipe("smoke"), samples=0)
    chosen = replace(plain, augment=True)
    assert "augment" not in train.configuration(plain, "sgd", 0)
    whole = train.train(chosen, "sgd", 0, tmp_path / "whole")
    assert whole["augment"]
    assert runs.recipe_of(whole).augment
    other = train.train(plain, "sgd", 0, tmp_path / "plain")
    assert other["curve"]["train_loss"] != whole["curve"]["train_loss"]
    epoch, calls = train._epoch, []

    def killed(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return epoch(*arguments)

    monkeypatch.setattr(train, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(chosen, "sgd", 0, tmp_path / "killed")
    train.train(chosen, "sgd", 0, tmp_path / "killed")
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "ivon"])
def test_published_recipes_take_their_first_steps(optimizer, tmp_path, monkeypatch):
    """The paper's settings on a few pictures of the right form: CIFAR-100, a deep network."""
    chosen = recipes.recipe("cifar100-resnet20-frn")
    settings = chosen.settings("ivon")
    assert (settings.lr, settings.hess_init, settings.weight_decay) == (0.2, 0.5, 2e-4)
    assert (chosen.epochs, chosen.batch_size, settings.temperature) == (200, 50, 1.0)
    generator = torch.Generator().manual_seed(0)

    def load(name):
        n = 60
        images = torch.randint(256, (n, 32, 32, 3), generator=generator, dtype=torch.uint8)
        split = data.Split(images, torch.arange(n))
        moments = {"mean": (0.5,) * 3, "std": (0.3,) * 3, "digest": "made for a test"}
        told = {
            "name": name,
            "licence": "",
            "sources": (),
            "class_names": tuple(map(str, range(100))),
        }
        listing = data.Listing(**told, **moments)
        return data.DataSet(**vars(listing), train=split, test=split, source="here")

    monkeypatch.setattr(data, "load", load)
    result = train.train(replace(chosen, epochs=1, samples=2), optimizer, 0, tmp_path)
    assert len(result["curve"]["train_loss"]) == 1
    assert result["evaluations"]["mean"]["nll"] < 20
    assert result["parameters"] == 276_260
