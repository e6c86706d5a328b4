"""Several processes train as one does: torchrun with gloo, on two and four ranks."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from posterity import IVON, predict
from posterity.distributed import boxes
from processes import PREDICTIONS, SETTINGS, STEPS, alone, data, network, resumable

PROCESSES = Path(__file__).with_name("processes.py")
slow = pytest.mark.slow


def launched(ranks, scenario, tmp_path, **given):
    """The finished processes of a scenario, and where rank 0 writes."""
    out = tmp_path / "out.pt"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(PROCESSES), scenario, str(out), json.dumps(given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180), out


def torchrun(ranks, scenario, tmp_path, **given):
    """What rank 0 of a scenario found."""
    done, out = launched(ranks, scenario, tmp_path, **given)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


def same(ours, theirs, rtol=1e-6):
    """Weights and precisions agree to ``rtol`` of each tensor's largest; the ranks to the bit."""
    assert ours.get("ranks agree", True)
    assert ours["draws"] == theirs["draws"]
    for kind in ("mean", "precision", "weights"):
        assert ours[kind].keys() == theirs[kind].keys()
        for name, value in theirs[kind].items():
            atol = rtol * float(value.abs().max())
            torch.testing.assert_close(ours[kind][name], value, rtol=0, atol=atol)
    if rtol < 1e-3:  # quantiles are known to within 3 %
        near = {"rtol": 0.03, "atol": 1e-6}
        torch.testing.assert_close(ours["diagnostics"], theirs["diagnostics"], **near)


def bits(ours, theirs):
    same(ours, theirs, 0.0)


CHANGES = [
    {},
    {"store_mean": False},
    {"fused": False},
    {"hess_approx": "gradsq", "gradsq_scale": 8},
]


@slow
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_ddp_with_a_shared_sample_is_one_process_with_the_joined_batch(changes, tmp_path):
    same(torchrun(2, "ddp", tmp_path, **changes), alone(**changes))


@slow
def test_ddp_takes_the_seed_of_the_first_rank_on_four_ranks_too(tmp_path):
    same(torchrun(4, "ddp", tmp_path, how={"way": "train"}), alone())


HOW = [{"accumulate": 2}, {"clip": 0.05}, {"autocast": True}]


@slow
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_accumulation_clipping_and_autocast_on_ranks(kind, how, tmp_path):
    rounding = 2e-2 if "autocast" in how else 1e-6  # of the parts of a batch in bfloat16
    same(torchrun(2, kind, tmp_path, how=how), alone(how=how), rounding)


@slow
def test_several_samples_in_trainer_on_ranks_are_one_process(tmp_path):
    pytest.importorskip("accelerate")
    one, two, always = (
        torchrun(ranks, "in_trainer", tmp_path, folder=str(tmp_path), **given)
        for ranks, given in (
            (1, {"batch": 24}),
            (2, {"batch": 4, "accumulate": 3}),
            (2, {"batch": 4, "accumulate": 3, "always": True}),
        )
    )
    same(two, one)
    same(always, one)
    samples = 2 * 7 + 13  # of 20 steps
    assert (two["quiet"], always["quiet"]) == (2 * (samples + STEPS), 0)  # STEPS are Trainer's own


PER_RANK = [
    ({}, {}),
    ({"way": "train"}, {}),
    ({"accumulate": True}, {}),
    ({"contexts": 2}, {"samples": 4}),
    ({"antithetic": True}, {"antithetic": True, "mc_samples": 2}),
    ({"fused": False}, {"fused": False}),
    ({"hess_approx": "gradsq", "gradsq_scale": 8},) * 2,
]


@slow
@pytest.mark.parametrize(("ours", "theirs"), PER_RANK, ids=str)
def test_a_sample_on_each_rank_is_as_many_samples_in_one_process(ours, theirs, tmp_path):
    same(torchrun(2, "per_rank", tmp_path, **ours), alone(**{"samples": 2, "parts": 2} | theirs))


@slow
def test_four_ranks_are_four_samples(tmp_path):
    same(torchrun(4, "per_rank", tmp_path), alone(samples=4, parts=4))


@slow
def test_per_rank_without_its_hook_or_reduced_twice_says_what_to_do(tmp_path):
    done, _ = launched(2, "per_rank", tmp_path, hook=False)
    assert "ddp.register_comm_hook(opt, posterity.reduce_per_rank)" in done.stderr
    done, _ = launched(2, "per_rank", tmp_path, accumulate=True, no_sync=False)
    assert "with ddp.no_sync()" in done.stderr


@slow
def test_gradients_that_ranks_have_not_averaged_are_told_of_once(tmp_path):
    said = torchrun(2, "unaveraged", tmp_path)["said"]
    for way, line in (("late", "sampled_params"), ("not", "opt.train()")):
        before, [(message, where)], after = said[way]  # when the second step's sample is drawn
        assert before == after == []
        assert "before gradients were averaged" in message
        assert line in where
    *before, [(message, _)] = said["overflow"]  # whose first step changed nothing
    assert before == [[], []]
    assert "before gradients were averaged" in message
    assert said["always"] == said["other weights"] == [[], [], []]


FSDP = [
    (2, {}, {}),
    (2, {"how": {"way": "train"}}, {}),
    (2, {"hess_init": "auto"}, {"hess_init": "auto"}),  # of the whole weights
    (2, {"store_mean": False}, {"store_mean": False}),
    (2, {"fused": False}, {"fused": False}),
    (2, {"offload": True}, {}),  # here from a CPU to itself
    (2, {"dimension": 1, "width": 6}, {"width": 6}),  # parts that are not contiguous
    (4, {}, {}),  # a rank without a part
    (4, {"mesh": [2, 2]}, {}),  # HSDP
]


@slow
@pytest.mark.parametrize(("ranks", "ours", "theirs"), FSDP, ids=str)
def test_fsdp2_is_one_process(ranks, ours, theirs, tmp_path):
    same(torchrun(ranks, "fsdp", tmp_path, **ours), alone(**theirs))


@slow
def test_shards_are_looked_at_first_in_inference_mode(tmp_path):
    same(torchrun(2, "looked_at_first", tmp_path), alone(hess_init="auto"))


@slow
def test_fsdp2_of_bfloat16_parameters_is_one_process_up_to_their_gradients_rounding(tmp_path):
    same(torchrun(2, "fsdp", tmp_path, bf16=True), alone(dtype=torch.bfloat16), 2e-2)


@slow
def test_a_step_notices_that_sharded_weights_have_become_bfloat16(tmp_path):
    """Shards have no address that would tell: the mean must not be rounded with the sample."""
    found = torchrun(2, "narrowed", tmp_path)
    assert found["ranks agree"]
    for name, mean in found["mean"].items():
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, found["before"][name], rtol=0, atol=0)


@slow
def test_the_posterior_of_a_sharded_network_holds_what_is_not_trained_whole(tmp_path):
    assert torchrun(2, "frozen", tmp_path)["same"]


@slow
def test_fsdp2_beside_whole_parameters(tmp_path):
    same(torchrun(2, "mixed", tmp_path), alone())


@slow
def test_a_sample_reaches_the_modules_that_fsdp2_left_gathered(tmp_path):
    """Forward passes alone leave the root gathered: each sample, and then the mean, must show."""
    found = torchrun(2, "fsdp", tmp_path, look=True)
    same(found, alone())
    looks = found["looks"]
    assert len(looks) == 2 * STEPS + 1
    assert all(not torch.equal(a, b) for a, b in pairwise(looks))
    first = torchrun(1, "fsdp", tmp_path, look=True)["looks"]
    torch.testing.assert_close(looks, first, rtol=1e-5, atol=1e-5)


@slow
@pytest.mark.parametrize("norm", [False, True])
def test_tensor_parallelism_is_one_process(norm, tmp_path):
    same(torchrun(2, "tensor_parallel", tmp_path, norm=norm), alone(width=6, norm=norm))


@slow
def test_a_sample_that_one_rank_drops_parts_no_ranks(tmp_path):
    same(torchrun(2, "dropped", tmp_path), alone())


@slow
def test_what_ranks_must_not_do_is_an_error(tmp_path):
    state, late, parts, unseeded, *first = torchrun(2, "misplaced", tmp_path)["said"]
    assert "set_optimizer_state_dict" in state
    assert "modified by an inplace operation" in late
    assert "every rank must pass all the data" in parts
    assert "ranks have not agreed on a seed yet" in unseeded
    assert len(first) == 2
    assert all("torch.distributed.fsdp.fully_shard" in said for said in first)


@slow
def test_tensor_parallelism_inside_fsdp2_says_what_it_does_not_know(tmp_path):
    done, _ = launched(4, "both_parallel", tmp_path)
    assert "_StridedShard" in done.stderr
    assert "IVON knows the placements Shard and Replicate" in done.stderr


@slow
def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_on_four(tmp_path):
    folder = tmp_path / "two"
    torchrun(2, "resumable", tmp_path, folder=str(folder), upto=10)
    for ranks in (2, 4):
        shutil.copytree(folder, tmp_path / str(ranks))
        same(torchrun(ranks, "resumable", tmp_path, folder=str(tmp_path / str(ranks))), alone())
    same(resumable(0, 0, folder), alone())


@slow
def test_a_checkpoint_of_one_process_goes_on_on_two_ranks(tmp_path):
    resumable(0, 0, tmp_path / "one", upto=10)
    same(torchrun(2, "resumable", tmp_path, folder=str(tmp_path / "one")), alone())


@slow
def test_a_killed_rank_costs_no_bit(tmp_path):
    """Killed between checkpoints, and while one is half written, the run goes on to the same."""
    whole = torchrun(2, "resumable", tmp_path, folder=str(tmp_path / "whole"))
    for crash in ({"crash": 8}, {"crash_saving": 10}):
        folder = tmp_path / "-".join(crash)
        done, out = launched(2, "resumable", tmp_path, folder=str(folder), **crash)
        assert done.returncode != 0
        assert not out.exists()
        assert sorted(f.name for f in folder.glob("step-*")) == ["step-005"]
        bits(torchrun(2, "resumable", tmp_path, folder=str(folder)), whole)


@slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_divide_the_samples_of_a_prediction(ranks, tmp_path):
    found = torchrun(ranks, "predicted", tmp_path)
    assert found["ranks agree"]
    assert found["refused"] == f"{ranks - 1} samples cannot be divided among {ranks} ranks"
    model = network()
    posterior = IVON(model.parameters(), **SETTINGS).posterior(model)
    for how, fields in zip(PREDICTIONS, found["fields"], strict=True):
        one = predict(model, posterior, data(0)[0], samples=5, seed=3, batch_size=7, **how)
        for name, value in fields.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, getattr(one, name), rtol=1e-5, atol=1e-6)
            else:
                assert value == getattr(one, name)


# -- without processes ----------------------------------------------------------------------------


def test_the_parts_of_boxes_are_what_slicing_takes():
    whole = torch.arange(4 * 5 * 6).view(4, 5, 6)
    for part in (whole[1:3], whole[:, 2:4], whole[1:, :, 3:], whole[2:, 1:3, 5:], whole[:0]):
        offset = [0, 0, 0]
        if part.numel():
            first = int(part.flatten()[0])
            offset = [first // 30, first // 6 % 5, first % 6]
        pieces = boxes(whole.shape, part.shape, offset)
        indices = [i for start, count in pieces for i in range(start, start + count)]
        assert indices == part.flatten().tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"store_mean": False}, "store_mean=True with samples"), ({"samples": "all"}, "per_rank")],
)
def test_settings_that_ranks_cannot_have(settings, words):
    w = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=words):
        IVON([w], 0.1, ess=10, **{"samples": "per_rank"} | settings)
