"""Steps as CUDA graphs: with settings that allow it, and where there is a GPU, replayed."""

from dataclasses import replace

import pytest
import torch

from posterity_studies import recipes, settings, train
from posterity_studies.graphs import WARM, Replayed

OPTIMIZERS = ("adamw", "sgd", "ivon")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_compiled_recipe_learns_the_same(optimizer, tmp_path, monkeypatch):
    """With lr and counters in tensors, as on a GPU."""
    plain = replace(recipes.recipe("smoke"), train_limit=300, augment=True, ood="")
    whole, compiled = torch.compile, []

    def traced(model, **how):
        compiled.append(model)
        return whole(model, backend="eager", fullgraph=True, **how)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(settings, "capturable", lambda model: True)
    found = train.train(replace(plain, compiled=True), optimizer, 0, tmp_path / "compiled")
    monkeypatch.undo()
    expected = train.train(plain, optimizer, 0, tmp_path / "plain")
    assert len(compiled) == 1
    assert "ood_auroc" not in found["evaluations"]["mean"]
    for name, rows in expected["curve"].items():
        assert found["curve"][name] == pytest.approx(rows, rel=1e-3, abs=1e-3), name
    logs = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("compiled", "plain")]
    rates = [[line.split('"lr": ')[1] for line in log.splitlines() if "lr" in line] for log in logs]
    assert [float(r[:-1]) for r in rates[0]] == pytest.approx([float(r[:-1]) for r in rates[1]])


def test_a_step_off_the_gpu_runs_as_it_is():
    calls = []

    def step(x, scale):
        calls.append(scale)
        return x.sum() * scale

    replayed = Replayed(step)
    for _ in range(WARM + 2):
        assert replayed(torch.ones(3), scale=2.0) == 6
    assert calls == [2.0] * (WARM + 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replayed_steps_are_those_of_the_loop(optimizer):
    """Also after a batch of another size in between, and an lr that a schedule changes."""
    recipe, curves = recipes.recipe("smoke"), []
    torch.backends.cudnn.deterministic = True
    batches = [torch.randn(n, 1, 28, 28, device="cuda") for n in (8, 8, 8, 8, 8, 5, 8, 8, 8)]
    targets = [torch.arange(len(x), device="cuda") for x in batches]
    for wrap in (lambda step: step, Replayed):
        torch.manual_seed(0)
        model = train.NETWORKS[recipe.network](10).cuda()
        opt = recipe.settings(optimizer).build(model, 2000, 100, 0)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, train.warmup_cosine(3, 20))
        step, losses = wrap(train.partial(train._step, model, opt)), []
        for x, y in zip(batches, targets, strict=True):
            losses.append(step(x, y, share=1 / len(x)).item())
            schedule.step()
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert len({round(loss, 6) for loss in curves[1]}) == len(batches)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_begun_on_a_gpu_goes_on_without_one(optimizer, tmp_path, monkeypatch):
    """Its lr and counters are tensors, which the fused passes of a CPU do not read."""

    class Killed(Exception):
        pass

    def killed(step, model, opt):
        if step > 3:
            raise Killed

    recipe = replace(recipes.recipe("smoke"), train_limit=300, ood="")
    with monkeypatch.context() as gpu:
        gpu.setattr(settings, "capturable", lambda model: True)
        with pytest.raises(Killed):
            train.train(recipe, optimizer, 0, tmp_path / "run", watch=killed)
    kinds = []

    def look(step, model, opt):
        group = opt.param_groups[0]
        kinds.append({type(group["lr"]), type(group.get("draws", 0))})
        assert not group.get("capturable", False)

    found = train.train(recipe, optimizer, 0, tmp_path / "run", watch=look)
    expected = train.train(recipe, optimizer, 0, tmp_path / "whole")
    assert kinds == [{float, int}] * 3  # of the second epoch
    for name, rows in expected["curve"].items():
        assert found["curve"][name] == pytest.approx(rows, rel=1e-3, abs=1e-3), name
