"""Steps as CUDA graphs: what is captured and replayed, and where there is a GPU, that it is so."""

import shutil
from dataclasses import replace

import pytest
import torch

from posterity_studies import graphs, recipes, runs, train
from posterity_studies.graphs import Replayed
from posterity_studies.models import NETWORKS

OPTIMIZERS = ("adamw", "sgd", "ivon")
RECIPE = replace(recipes.recipe("smoke"), train_limit=900, augment=True, ood="")  # 8 × 128, less


class Fake(Replayed):
    """Replays by computing again, from the same inputs and with the same constants."""

    captured = 0

    def _beside(self, *inputs, **constants):
        return self._step(*inputs, **constants)

    def _captured(self, *inputs, **constants):
        self.captured += 1
        self._inputs = tuple(x.clone() for x in inputs)

        class Graph:
            def replay(_):
                self._output = self._step(*self._inputs, **constants)

        return Graph()


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, on which graphs can be captured."""

    def steps(step):
        made.append(Fake(step))
        return made[-1]

    made = []
    monkeypatch.setattr(graphs, "replayable", lambda opt: type(opt) in graphs.CAPTURABLE)
    monkeypatch.setattr(graphs, "Replayed", steps)
    return made


def traced(monkeypatch):
    """What is compiled, by a compiler that only traces."""
    whole, compiled = torch.compile, []

    def trace(model, **how):
        compiled.append(model)
        return whole(model, backend="eager", fullgraph=True, **how)

    monkeypatch.setattr(torch, "compile", trace)
    return compiled


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_compiled_recipe_whose_steps_are_replayed_learns_the_same(
    optimizer, gpu, tmp_path, monkeypatch
):
    """And by the same rates as one that is not; its rounding is another, which kinks magnify."""
    compiled, recipe = traced(monkeypatch), replace(RECIPE, compiled=True)
    found = train.train(recipe, optimizer, 0, tmp_path / "compiled")
    assert len(compiled) == len(gpu) == gpu[0].captured == 1
    assert "ood_auroc" not in found["evaluations"]["mean"]
    monkeypatch.setattr(graphs, "Replayed", lambda step: step)
    assert train.train(recipe, optimizer, 0, tmp_path / "beside")["curve"] == found["curve"]
    monkeypatch.undo()
    train.train(RECIPE, optimizer, 0, tmp_path / "plain")
    logs = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("compiled", "plain")]
    rates = [[line.split('"lr": ')[1] for line in log.splitlines() if "lr" in line] for log in logs]
    assert [float(r[:-1]) for r in rates[0]] == pytest.approx([float(r[:-1]) for r in rates[1]])


def test_methods_that_count_on_the_host_are_not_replayed(gpu, tmp_path, monkeypatch):
    traced(monkeypatch)
    swag = recipes.recipe("baselines").optimizers["swag"]
    recipe = replace(RECIPE, compiled=True, optimizers={"swag": swag})
    train.train(recipe, "swag", 0, tmp_path)
    assert gpu == []


def test_a_shape_is_captured_that_has_been_warmed():
    """Not the shorter batch that comes as the fourth call; and each call gets its own result."""
    step = Fake(lambda x, scale: x.sum() * scale)
    sizes = (8, 8, 5, 8, 5, 8, 8, 5)
    results = [step(torch.full((n,), float(i)), scale=2.0) for i, n in enumerate(sizes)]
    assert step.captured == 1
    assert step._key == (((8,),), (("scale", 2.0),))
    assert [r.item() for r in results] == [2.0 * n * i for i, n in enumerate(sizes)]
    assert step(torch.ones(8), scale=3.0) == 24  # another constant


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replayed_steps_are_those_of_the_loop(optimizer, compiled):
    """Also after a batch of another size in between, and an lr that a schedule changes."""
    curves = []
    torch.backends.cudnn.deterministic = True
    batches = [torch.randn(n, 1, 28, 28, device="cuda") for n in (8, 8, 8, 8, 8, 5, 8, 8, 8)]
    targets = [torch.arange(len(x), device="cuda") for x in batches]
    for replay in (False, True):
        torch.manual_seed(0)
        model = NETWORKS[RECIPE.network](10).cuda()
        opt = RECIPE.settings(optimizer).build(model, 2000, 100, 0)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, train.warmup_cosine(3, 20))
        network = torch.compile(model, dynamic=False) if compiled else model

        def step(x, y, network=network, opt=opt):
            return train._step(network, opt, x, y, 1 / len(x))

        if replay:
            step = graphs.replayed(step, opt)
            assert isinstance(step, Replayed)
        losses = []
        for x, y in zip(batches, targets, strict=True):
            losses.append(step(x, y).item())
            schedule.step()
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert len({round(loss, 6) for loss in curves[1]}) == len(batches)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_begun_on_a_gpu_goes_on_without_one(optimizer, gpu, tmp_path, monkeypatch):
    """Its lr and counters are tensors, which the fused passes of a CPU do not read."""

    class Killed(Exception):
        pass

    def killed(step, model, opt):
        assert isinstance(opt.param_groups[0]["lr"], torch.Tensor)
        if step > 8:
            raise Killed

    recipe = replace(RECIPE, compiled=True)
    traced(monkeypatch)
    with pytest.raises(Killed):
        train.train(recipe, optimizer, 0, tmp_path / "run", watch=killed)
    monkeypatch.undo()
    traced(monkeypatch)
    numbers(shutil.copytree(tmp_path / "run", tmp_path / "numbers") / "checkpoint.pt")
    kinds = []

    def look(step, model, opt):
        group = opt.param_groups[0]
        kinds.append({type(group["lr"]), type(group.get("draws", 0))})
        assert not group.get("capturable", False)

    found = train.train(recipe, optimizer, 0, tmp_path / "run", watch=look)
    expected = train.train(recipe, optimizer, 0, tmp_path / "numbers")
    assert kinds == [{float, int}] * 8  # of the second epoch
    assert found["curve"] == expected["curve"]


def numbers(path):
    """Rewrite a checkpoint as one of a run that never saw a GPU."""
    saved = runs.read_checkpoint(path)
    for group in saved["optimizer"]["param_groups"]:
        tensors = {k: v.item() for k, v in group.items() if isinstance(v, torch.Tensor)}
        assert tensors
        group.update(tensors, capturable=False)
    rates = {k: [*map(float, saved["schedule"][k])] for k in ("base_lrs", "_last_lr")}
    saved["schedule"].update(rates)
    runs.write_checkpoint(path, saved)
