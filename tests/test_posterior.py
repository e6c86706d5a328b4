"""The hand-over type: its samples, its file, and what it writes into a model."""

import copy
import hashlib
import json
import math
import os
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Independent, MixtureSameFamily, Normal, kl_divergence

from posterity import Mixture, Posterior, storage
from posterity import posterior as module
from posterity.binding import bind, clean_name
from posterity.ops import noise

SHAPES = {"a.weight": (7, 11), "a.bias": (7,), "b": (300,), "scalar": ()}


def make(seed=0, dtype=torch.float32, **kwargs):
    """A posterior over SHAPES with uneven means and widths."""
    rng = torch.Generator().manual_seed(seed)
    mean = {n: torch.randn(s, generator=rng).to(dtype) for n, s in SHAPES.items()}
    precision = {n: (torch.randn(s, generator=rng) + 3).exp().to(dtype) for n, s in SHAPES.items()}
    return Posterior(mean, precision, **kwargs)


def of(model, precision=50.0, **kwargs):
    """A posterior around a model's weights."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    width = {n: torch.full(p.shape, precision) for n, p in trained.items()}
    mean = {n: p.float() for n, p in trained.items()}
    return Posterior(mean, width, **kwargs)


def bits(tensors):
    return {n: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist())
            for n, t in tensors.items()}  # fmt: skip


def state(model):
    return bits({n: t.detach() for n, t in model.state_dict().items()})


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors.values()])


# --- samples ---------------------------------------------------------------------------------


def test_moments_of_1000_samples():
    q, s = make(), 1000
    mean, std = flat(q.mean), flat(q.std())
    z = torch.stack([(flat(q.sample(3, i)) - mean) / std for i in range(s)])  # should be N(0, 1)
    n = z.shape[1]
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(s)  # each weight's mean, in standard errors
    assert z.mean().abs() < 4 / math.sqrt(s * n)
    assert (z.var(0) - 1).abs().max() < 4.5 * math.sqrt(2 / s)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / (s * n))
    correlation = z.T @ z / s
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(s)  # weights and tensors are independent
    assert (z[1:] * z[:-1]).mean().abs() < 4 / math.sqrt(s * n)  # and so are samples


def test_sample_is_the_formula_with_the_names_hash():
    q = make()
    for name, theta in q.sample(5, 9).items():
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        m, p = q.mean[name], q.precision[name]
        e = noise.normals(noise.draw_key(5, 9), [number], [m.numel()])[0].view(m.shape)
        torch.testing.assert_close(theta, m + e * p.rsqrt(), rtol=1e-6, atol=1e-6)
    assert module._number("weight") % 2**64 == 15774595392271762440  # files and papers rest on it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sample_is_written_into_tensors_of_any_dtype(dtype):
    q = make()
    out = {name: torch.full_like(m, math.nan, dtype=dtype) for name, m in q.mean.items()}
    made = q.sample(5, 9, out=out)
    for name, theta in q.sample(5, 9).items():
        assert made[name].data_ptr() == out[name].data_ptr()
        rtol = 2**-7 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(out[name], theta.to(dtype), rtol=rtol, atol=1e-6)


def test_a_sample_is_not_written_into_other_tensors():
    q = make()
    out = {name: torch.zeros_like(m) for name, m in q.mean.items()}
    with pytest.raises(ValueError, match="different names: other"):
        q.sample(5, 9, out=out | {"other": torch.zeros(1)})
    first = q.names[0]
    with pytest.raises(ValueError, match=f"differ in shape: {first}"):
        q.sample(5, 9, out=out | {first: torch.zeros(1)})
    assert not any(t.any() for t in out.values())


def test_sample_depends_on_seed_and_index_alone():
    q = make()
    assert bits(q.sample(1, 2)) == bits(q.sample(1, 2))
    different = [q.sample(1, 2), q.sample(2, 1), q.sample(1, 3), q.sample(2, 2)]
    assert len({float(s["b"][0]) for s in different}) == 4


def test_order_of_names_does_not_matter():
    q = make()
    names = sorted(SHAPES, reverse=True)
    r = Posterior({n: q.mean[n] for n in names}, {n: q.precision[n] for n in names})
    assert r.names == tuple(names)
    assert bits(q.sample(1, 2)) == {n: bits(r.sample(1, 2))[n] for n in SHAPES}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sample_keeps_the_dtype_and_calculates_wider(dtype):
    q = make(dtype=dtype)
    sample = q.sample(0, 0)
    assert {t.dtype for t in sample.values()} == {dtype}
    wide = q.to(torch.float64).sample(0, 0)
    error = (flat(sample) - flat(wide)).abs() / flat(wide).abs()
    assert error.max() <= 0.51 * torch.finfo(dtype).eps + 2e-7  # one rounding, at the end


# --- in a model ------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3)) + self.frozen


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_sampled_writes_in_place_and_restores_every_bit(net):
    q, before = of(net), state(net)
    pointers = [p.data_ptr() for p in net.parameters()]
    with q.sampled(net, 1, 2) as same:
        assert same is net
        assert [p.data_ptr() for p in net.parameters()] == pointers
        for name, value in q.sample(1, 2).items():
            assert torch.equal(net.get_parameter(name), value)
    assert state(net) == before


def test_sampled_restores_after_an_exception_and_nested(net):
    q, before = of(net), state(net)

    def interrupted():
        with q.sampled(net, 0, 0):
            outer = state(net)
            with q.sampled(net, 0, 1):
                assert state(net) != outer
            assert state(net) == outer
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state(net) == before


def test_sampled_restores_when_writing_itself_fails(net, monkeypatch):
    q, before, calls = of(net), state(net), []

    def failing():
        calls.append(0)
        if len(calls) == 1:
            raise RuntimeError("in the middle")

    monkeypatch.setattr(torch, "clear_autocast_cache", failing)
    with pytest.raises(RuntimeError, match="in the middle"), q.sampled(net, 0, 0):
        pass
    assert state(net) == before


def test_nan_weights_are_restored_too(net):
    with torch.no_grad():
        net.conv.weight[0] = math.nan
    before = state(net)
    q = Posterior(
        {n: torch.zeros(p.shape) for n, p in net.named_parameters() if p.requires_grad},
        {n: torch.ones(p.shape) for n, p in net.named_parameters() if p.requires_grad})  # fmt: skip
    with q.sampled(net, 0, 0):
        assert net.conv.weight.isfinite().all()
    assert state(net) == before


def test_backward_after_a_write_is_an_error_not_silently_wrong():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with of(model).sampled(model, 0, 0):
        loss = model(torch.ones(1, 2)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_samples_in_one_autocast_region():
    model = nn.Linear(8, 8)
    q, x = of(model, 1.0), torch.randn(4, 8)

    def run(index):
        with q.sampled(model, 0, index):
            return model(x).detach()

    with torch.autocast("cpu", torch.bfloat16):
        mean = model(x).detach()
        together = [run(0), run(1), model(x).detach()]
    with torch.autocast("cpu", torch.bfloat16):
        alone = run(1)
    assert torch.equal(together[1], alone)
    assert torch.equal(together[2], mean)
    assert not torch.equal(together[0], together[1])


def test_low_precision_model(net):
    q = of(net)
    net = net.bfloat16()
    before = state(net)
    with q.sampled(net, 0, 0):
        assert torch.equal(net.conv.weight, q.sample(0, 0)["conv.weight"].bfloat16())
    assert state(net) == before


def test_channels_last_model(net):
    q = of(net)
    net = net.to(memory_format=torch.channels_last)
    before = state(net)
    for r in (q, of(net)):  # a channels-last mean too: noise goes by logical index
        with r.sampled(net, 0, 0):
            assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(net.conv.weight, q.sample(0, 0)["conv.weight"])
        assert state(net) == before


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_tied_weights():
    model = Tied()
    q = of(model)
    assert q.names == ("embed.weight",)
    with q.sampled(model, 0, 0):
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight, q.sample(0, 0)["embed.weight"])
    other_name = Posterior(
        *({"head.weight": part["embed.weight"]} for part in (q.mean, q.precision))
    )
    with other_name.sampled(model, 0, 0):
        pass
    with pytest.raises(ValueError, match=r"tied in the model.*embed\.weight, head\.weight"):
        of(Tied(tie=False)).sampled(model, 0, 0).__enter__()


def test_batchnorm_buffers_and_frozen_parameters_travel(net):
    net(torch.randn(20, 2, 5, 5))
    extra = dict(net.named_buffers()) | {"frozen": net.frozen}
    q, x = of(net, buffers=extra), torch.randn(3, 2, 5, 5)
    with q.at_mean(net):
        expected = net.eval()(x)
    torch.manual_seed(99)
    fresh = Net().eval()
    before = state(fresh)
    with q.at_mean(fresh):
        assert torch.equal(fresh(x), expected)
        assert fresh.norm.num_batches_tracked == 1
    assert state(fresh) == before
    with of(net).at_mean(fresh):
        assert not torch.equal(fresh(x), expected)  # without them it cannot


def test_wrapped_names(net):
    def wrap(inner, name):
        outer = nn.Module()
        outer.add_module(name, inner)
        return outer

    q = of(net)
    compiled = wrap(net, "_orig_mod")
    for wrapped in (wrap(net, "module"), compiled, wrap(compiled, "module")):
        assert of(wrapped).names == q.names
        with q.sampled(wrapped, 0, 0):
            assert torch.equal(net.conv.weight, q.sample(0, 0)["conv.weight"])
    name = "_fsdp_wrapped_module.a._checkpoint_wrapped_module.module_list.0.w"
    assert clean_name(name) == "a.module_list.0.w"
    with pytest.raises(ValueError, match="same without their wrapper"):
        Posterior({"module.w": torch.ones(1), "w": torch.ones(1)}, {"w": torch.ones(1)})
    clash = nn.Linear(1, 1)
    clash.module = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="two tensors named"):
        bind(clash, {})


def test_wrong_model_names_everything_and_writes_nothing(net):
    wrong = copy.deepcopy(net)
    wrong.conv = nn.Conv2d(2, 3, 5, bias=False)
    wrong.extra = nn.Linear(1, 1)
    before = state(wrong)
    with pytest.raises(ValueError, match="does not fit") as error:
        of(net).sampled(wrong, 0, 0).__enter__()
    shapes = "conv.weight (3, 2, 3, 3), in the model (3, 2, 5, 5)"
    for part in ("not in the model: conv.bias", "extra.weight, extra.bias", shapes):
        assert part in str(error.value)
    assert state(wrong) == before
    wrong.extra.requires_grad_(False)  # frozen parameters may be absent
    with pytest.raises(ValueError, match="does not fit") as error:
        of(net).at_mean(wrong).__enter__()
    assert "extra" not in str(error.value)


def test_long_lists_of_names_are_cut():
    many = {f"w{i}": torch.ones(1) for i in range(40)}
    with pytest.raises(ValueError, match=r"w0, w1, w2, w3, w4 and 35 more$"):
        bind(nn.Sequential(), many)


def test_posterior_owns_its_tensors(net):
    mean = dict(net.named_parameters())
    del mean["frozen"]
    q = Posterior(mean, {n: torch.ones_like(m) for n, m in mean.items()})
    before = bits(q.mean)
    with torch.no_grad():
        net.conv.weight += 1
    assert bits(q.mean) == before
    assert not any(m.requires_grad for m in q.mean.values())


# --- densities -------------------------------------------------------------------------------


def normal(q):
    return Independent(Normal(flat(q.mean), flat(q.precision).rsqrt()), 1)


def test_log_prob_against_torch():
    q = make()
    sample = make(seed=8).mean
    assert q.log_prob(sample) == pytest.approx(normal(q).log_prob(flat(sample)).item(), rel=1e-12)
    with pytest.raises(ValueError, match="scalar"):
        q.log_prob({n: t for n, t in sample.items() if n != "scalar"})


def test_kl_against_torch():
    q, p = make(0), make(1)
    assert q.kl(p) == pytest.approx(kl_divergence(normal(q), normal(p)).item(), rel=1e-12)
    assert q.kl(q) == 0
    assert q.kl(p) != pytest.approx(p.kl(q), rel=1e-3)


def test_kl_to_the_own_prior():
    prior_mean = {n: torch.full((), float(k)) for k, n in enumerate(SHAPES)}
    prior_precision = {n: torch.tensor(0.3) for n in SHAPES} | {"a.weight": torch.rand(7, 1) + 1}
    q = make(prior_mean=prior_mean, prior_precision=prior_precision)
    prior = Posterior(
        {n: prior_mean[n].expand(s) for n, s in SHAPES.items()},
        {n: prior_precision[n].expand(s) for n, s in SHAPES.items()},
    )
    assert q.kl() == pytest.approx(kl_divergence(normal(q), normal(prior)).item(), rel=1e-12)
    zero = make(prior_precision=0.3)
    p = Independent(Normal(torch.zeros(385).double(), torch.tensor(0.3).double().rsqrt()), 1)
    assert zero.kl() == pytest.approx(kl_divergence(normal(zero), p).item(), rel=1e-12)
    assert make(prior_precision=0).kl() == math.inf
    with pytest.raises(ValueError, match="prior is unknown"):
        make().kl()
    with pytest.raises(ValueError, match="other names"):
        q.kl(Posterior({"w": torch.ones(1)}, {"w": torch.ones(1)}))
    with pytest.raises(ValueError, match="other shapes: b"):
        q.kl(Posterior(q.mean | {"b": torch.ones(4)}, q.precision | {"b": torch.ones(4)}))


@settings(deadline=None, max_examples=50)
@given(*[st.floats(-50, 50)] * 2, *[st.floats(1e-3, 1e6)] * 2)
def test_kl_is_never_negative(m0, m1, p0, p1):
    q, p = (Posterior({"w": torch.tensor([m])}, {"w": torch.tensor([r])})
            for m, r in ((m0, p0), (m1, p1)))  # fmt: skip
    assert q.kl(p) >= 0


def test_hessian_is_precision_without_prior():
    q = make(prior_precision={n: torch.tensor(0.5) for n in SHAPES})
    assert torch.equal(flat(q.hessian()), flat({n: p - 0.5 for n, p in q.precision.items()}))
    with pytest.raises(ValueError, match="prior is unknown"):
        make().hessian()


def test_temper_is_a_change_of_ess():
    h, delta, ess = make().precision, 0.01, 1000.0
    q = Posterior(
        h, {n: ess * (x + delta) for n, x in h.items()}, prior_precision=ess * delta, ess=ess
    )
    t = q.temper(4)
    assert t.ess == 250
    torch.testing.assert_close(flat(t.precision), flat(h) * 250 + 250 * delta, rtol=1e-6, atol=0)
    torch.testing.assert_close(flat(t.hessian()) / t.ess, flat(q.hessian()) / q.ess)
    torch.testing.assert_close(flat(t.std()), 2 * flat(q.std()))
    assert bits(t.mean) == bits(q.mean)
    assert make().temper(4).ess is None
    for bad in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            q.temper(bad)


def test_prune_makes_exact_zeros():
    q = make()
    snr = (flat(q.mean) * flat(q.precision).sqrt()).abs()
    small = snr < 3
    assert 50 < small.sum() < 330
    p = q.prune(3.0)
    for tensors in (p.mean, p.std(), p.sample(0, 0), p.sample(0, 1)):
        assert (flat(tensors)[small] == 0).all()
        assert (flat(tensors)[~small] != 0).all()
    assert torch.equal(flat(p.sample(0, 0))[~small], flat(q.sample(0, 0))[~small])
    assert bits(p.precision) == bits(q.precision)
    assert f"{int(small.sum())} pruned" in repr(p)
    kept = Independent(Normal(flat(q.mean)[~small], flat(q.std())[~small]), 1)
    expected = kept.log_prob(flat(p.sample(0, 0))[~small]).item()
    assert p.log_prob(p.sample(0, 0)) == pytest.approx(expected, rel=1e-6)
    twice = p.temper(1e-4).prune(0.1)  # sharper, so nothing new: the old zeros stay
    assert torch.equal(flat(twice.mean), flat(p.mean))
    assert (flat(twice.sample(0, 0))[small] == 0).all()
    assert bits(q.mean) == bits(make().mean)


def test_to_changes_dtype_but_not_buffers():
    q = make(prior_precision=1.0, buffers={"n": torch.tensor(3), "v": torch.ones(2)}).prune(1.0)
    half = q.to(torch.bfloat16)
    assert {t.dtype for t in (half.mean | half.prior_precision).values()} == {torch.bfloat16}
    assert [t.dtype for t in half.buffers.values()] == [torch.int64, torch.float32]
    assert bits(half.pruned) == bits(q.pruned)
    meta = q.to("cpu")
    assert bits(meta.sample(0, 0)) == bits(q.sample(0, 0))
    with pytest.raises(ValueError, match="precision is not finite: w"):
        Posterior({"w": torch.ones(1)}, {"w": torch.full((1,), 1e9)}).to(torch.float16)


def test_repr_and_len():
    assert repr(make(ess=60000)) == "Posterior(4 tensors, 385 parameters, ess=60000)"
    assert repr(make()) == "Posterior(4 tensors, 385 parameters, ess=unknown)"
    assert len(make()) == 4
    assert make().names == tuple(SHAPES)


ONE = {"w": torch.ones(2), "v": torch.ones(3)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": {}, "precision": {}}, "at least one tensor"),
        ({"mean": ONE | {"v": torch.tensor([1, math.nan, 1])}}, "mean is not finite: v"),
        ({"precision": ONE | {"w": torch.tensor([1, math.inf])}}, "precision is not finite: w"),
        ({"precision": ONE | {"w": torch.tensor([1.0, 0.0])}}, "precision is not positive: w"),
        ({"precision": ONE | {"w": torch.tensor([1.0, -1.0])}}, "precision is not positive: w"),
        ({"precision": {"w": torch.ones(2)}}, "different names: v"),
        ({"precision": {}}, "different names: v, w"),
        ({"precision": ONE | {"w": torch.ones(1)}}, "precision and mean differ in shape: w"),
        ({"mean": ONE | {"w": torch.ones(2).long()}}, "mean has the wrong dtype: w"),
        ({"mean": ONE | {"w": torch.ones(2).cfloat()}}, "mean has the wrong dtype: w"),
        ({"prior_mean": {"w": torch.ones(2)}}, "prior_mean and mean have different names: v"),
        ({"prior_precision": {}}, "prior_precision and mean have different names: v, w"),
        ({"prior_precision": ONE | {"w": torch.ones(1, 2)}}, "prior_precision and mean differ"),
        ({"prior_precision": -1.0}, "prior_precision is negative: w, v"),
        ({"prior_precision": math.nan}, "prior_precision is not finite"),
        ({"pruned": ONE}, "pruned has the wrong dtype"),
        ({"ess": 0}, "ess must be positive"),
        ({"ess": math.nan}, "ess must be positive"),
        ({"buffers": {"w": torch.ones(2)}}, "both in mean and in buffers: w"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Posterior(**({"mean": ONE, "precision": ONE} | arguments))


def test_masks_of_minus_infinity_are_fine_as_buffers():
    mask = torch.full((3, 3), -math.inf).triu(1)
    assert torch.equal(Posterior(ONE, ONE, buffers={"mask": mask}).buffers["mask"], mask)


# --- files -----------------------------------------------------------------------------------


def rich(dtype=torch.float32):
    return make(
        dtype=dtype,
        prior_mean={n: torch.tensor(0.25) for n in SHAPES},
        prior_precision=0.1,
        ess=1e10,
        buffers={"n": torch.tensor(3), "running_var": torch.rand(3), "m": torch.ones(2).bool()},
        settings={"optimizer": "IVON", "lr": 0.1, "betas": (0.9, 0.99999), "clip": math.inf},
    )


def parts(q):
    return {part: bits(getattr(q, part) or {}) for part in module.PARTS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_file_keeps_every_bit(tmp_path, dtype):
    q = rich(dtype).prune(0.5)
    q.save(tmp_path / "q.safetensors")
    r = Posterior.load(str(tmp_path / "q.safetensors"))
    assert parts(q) == parts(r)
    assert (r.ess, r.settings) == (1e10, q.settings)
    assert r.settings["betas"] == [0.9, 0.99999]
    assert bits(q.sample(7, 8)) == bits(r.sample(7, 8))
    bare = make()
    bare.save(tmp_path / "q.safetensors")  # over the old one
    r = Posterior.load(tmp_path / "q.safetensors")
    assert (r.prior_mean, r.prior_precision, r.pruned, r.buffers, r.ess) == (None,) * 3 + ({}, None)


def test_same_samples_in_a_new_process(tmp_path):
    q = rich().prune(0.3)
    q.save(tmp_path / "q")
    mixture = Mixture([q, make(4)], weights=[1, 2])
    mixture.save(tmp_path / "m")
    script = """if True:
        import sys
        from posterity import Mixture, Posterior
        from safetensors.torch import save_file
        q, m = Posterior.load(sys.argv[1] + "/q"), Mixture.load(sys.argv[1] + "/m")
        both = {f"q{i}{n}": t for i in range(3) for n, t in q.sample(11, i).items()}
        both |= {f"m{i}{n}": t for i in range(3) for n, t in m.sample(11, i).items()}
        save_file(both, sys.argv[1] + "/out")
    """
    paths = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths})
    expected = {f"q{i}{n}": t for i in range(3) for n, t in q.sample(11, i).items()}
    expected |= {f"m{i}{n}": t for i in range(3) for n, t in mixture.sample(11, i).items()}
    assert bits(load_file(tmp_path / "out")) == dict(sorted(bits(expected).items()))


def test_channels_last_and_scalar_tensors_are_saved(tmp_path):
    mean = {"w": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    q = Posterior(mean, {"w": torch.rand(2, 3, 4, 5) + 1}, prior_precision=2.0)
    q.save(tmp_path / "q")
    assert bits(Posterior.load(tmp_path / "q").sample(0, 0)) == bits(q.sample(0, 0))


def forge(path, tensors=None, **told):
    """A file of our format with something wrong."""
    facts = {"format": "posterity.posterior", "version": "1", "ess": "null", "settings": "{}"}
    one = {"mean/w": torch.ones(2), "precision/w": torch.ones(2)}
    facts = {k: v for k, v in (facts | told).items() if v is not None}
    save_file(one | (tensors or {}), path, facts)


FAULTS = {
    "newer": (lambda p: forge(p, version="2"), "version is 2"),
    "no version": (lambda p: forge(p, version="new"), "invalid literal"),
    "no format": (lambda p: save_file({"w": torch.ones(1)}, p), "format is unknown"),
    "foreign format": (lambda p: forge(p, format="pt"), "format is pt"),
    "nan": (lambda p: forge(p, {"mean/w": torch.tensor([1, math.nan])}), "mean is not finite: w"),
    "zero": (lambda p: forge(p, {"precision/w": torch.zeros(2)}), "precision is not positive: w"),
    "shape": (lambda p: forge(p, {"precision/w": torch.ones(3)}), "differ in shape: w"),
    "half": (lambda p: forge(p, {"mean/v": torch.ones(3)}), "different names: v"),
    "unknown part": (lambda p: forge(p, {"momentum/w": torch.ones(2)}), "unknown part momentum/w"),
    "no settings": (lambda p: forge(p, settings=None), "settings"),
    "damaged settings": (lambda p: forge(p, settings="{"), "Expecting"),
    "bad ess": (lambda p: forge(p, ess="-1"), "ess must be positive"),
    "mixture": (lambda p: Mixture([make()]).save(p), "format is posterity.mixture"),
    "text": (lambda p: p.write_text("epoch,loss\n1,0.3\n" * 20), "header"),
    "empty": (lambda p: p.write_bytes(b""), "header"),
    "pickle": (lambda p: torch.save({"w": torch.ones(3)}, p), "header"),
    "longer": (lambda p: (make().save(p), p.open("ab").write(b"x")), "incomplete|not fully"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_file_is_one_clear_error(tmp_path, fault):
    damage, message = FAULTS[fault]
    path = tmp_path / "model.safetensors"
    forge(path)
    assert Posterior.load(path).names == ("w",)
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        Posterior.load(path)
    assert str(path) in str(error.value)


def test_a_folder_that_is_a_file_s_name_or_is_missing(tmp_path, net):
    with pytest.raises(IsADirectoryError, match="name the file in it"):
        Posterior.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        of(net).save(tmp_path / "none" / "q.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_covariance_is_where_its_vector_is(net, share):
    q = of(net).prune_share(share)
    found = q.covariance({name: m.to("meta") for name, m in q.mean.items()})
    assert all(value.is_meta for value in found.values())


def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path):
    path = tmp_path / "q"
    rich().save(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 1, 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot load"):
            Posterior.load(path)


def test_a_missing_file_is_not_found(tmp_path):
    for kind in (Posterior, Mixture):
        with pytest.raises(FileNotFoundError):
            kind.load(tmp_path / "nothing")


@pytest.mark.parametrize("stage", ["_bytes", "fsync"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stage):
    path = tmp_path / "q"
    make(0).save(path)
    before = path.read_bytes()

    def failing(*_):
        raise OSError("disk full")

    where = storage if stage == "_bytes" else os
    monkeypatch.setattr(where, stage, failing)
    with pytest.raises(OSError, match="disk full"):
        make(1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_posterior_makes_the_same_bytes(tmp_path):
    rich().prune(0.5).save(tmp_path / "q")
    before = (tmp_path / "q").read_bytes()
    Posterior.load(tmp_path / "q").save(tmp_path / "r")
    assert (tmp_path / "r").read_bytes() == before


KINDS = [torch.float64, torch.bfloat16, torch.bool, torch.int64, torch.uint8, torch.complex64]


def test_tensors_of_every_kind_come_back_from_a_file(tmp_path):
    tensors = {f"t{i}": torch.rand(3, 5).to(kind) for i, kind in enumerate(KINDS)}
    tensors |= {"e": torch.empty(0, 3), "s": torch.tensor(True), "c": torch.rand(4, 4)[:, ::2]}
    storage.save(tmp_path / "x", "kinds", tensors, {"n": 1})
    assert bits(load_file(tmp_path / "x")) == dict(sorted(bits(tensors).items()))
    with storage.loaded(tmp_path / "x", "kinds") as (found, facts):
        assert bits(found) == dict(sorted(bits(tensors).items()))
        assert facts == {"n": 1}
    whole = (tmp_path / "x").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    for name, tensor in tensors.items():  # aligned, as readers expect
        assert (start + header[name]["data_offsets"][0]) % min(tensor.itemsize, 8) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [([("w", torch.ones(3))], "w has another"), ([("w", torch.ones(2).double())], "w has another"),
     ([("w", torch.ones(2))], "no values for v")],
)  # fmt: skip
def test_values_that_the_header_does_not_announce_make_no_file(tmp_path, values, message):
    like = {"w": torch.empty(2, device="meta"), "v": torch.empty(1, device="meta")}
    with pytest.raises(ValueError, match=message):
        storage.save(tmp_path / "x", "like", like, {}, values)
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    make().save(tmp_path / "q")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "q")}
    assert len(modes) == 1


def test_settings_must_be_jsonable():
    with pytest.raises(TypeError, match="JSON"):
        make(settings={"hook": print})
    assert json.dumps(make(settings={"a": (1, 2)}).settings) == '{"a": [1, 2]}'


# --- mixtures --------------------------------------------------------------------------------


def test_mixture_divides_samples_evenly():
    members = [make(k) for k in range(3)]
    mixture = Mixture(members)
    assert [mixture.component(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    for i in range(6):
        assert bits(mixture.sample(5, i)) == bits(members[i % 3].sample(5, i))


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (3, 1), (1, 100)])
def test_weighted_mixture_is_low_discrepancy(weights):
    mixture = Mixture([make(k) for k in range(len(weights))], weights)
    assert mixture.weights == pytest.approx([w / sum(weights) for w in weights])
    counts = [0] * len(weights)
    for index in range(1000):
        counts[mixture.component(index)] += 1
        for count, weight in zip(counts, mixture.weights, strict=True):
            assert abs(count - weight * (index + 1)) < 2.5  # random draws are off by some 15


def test_mixture_log_prob_against_torch():
    members = [make(k) for k in range(3)]
    mean = torch.stack([flat(m.mean) for m in members])
    std = torch.stack([flat(m.precision).rsqrt() for m in members])
    sample = members[0].temper(30).sample(0, 0)
    for weights in (None, [0.1, 0.3, 0.6]):
        mix = torch.distributions.Categorical(torch.tensor(weights or [1 / 3] * 3).double())
        expected = MixtureSameFamily(mix, Independent(Normal(mean, std), 1)).log_prob(flat(sample))
        got = Mixture(members, weights).log_prob(sample)
        assert got == pytest.approx(expected.item(), rel=1e-9)
    near = Mixture([members[0], members[0].temper(1.1)], [0.2, 0.8])  # both terms matter
    each = [m.log_prob(sample) for m in near.components]
    top = max(each)
    direct = top + math.log(
        sum(w * math.exp(x - top) for w, x in zip([0.2, 0.8], each, strict=True))
    )
    assert near.log_prob(sample) == pytest.approx(direct, rel=1e-12)


def test_mixture_writes_each_components_buffers(net):
    members = [of(net, buffers={"norm.running_mean": torch.full((3,), float(k))}) for k in range(2)]
    before = state(net)
    for index in range(4):
        with Mixture(members).sampled(net, 0, index):
            assert (net.norm.running_mean == index % 2).all()
    assert state(net) == before


def test_mixture_file(tmp_path):
    mixture = Mixture([rich(), make(1, ess=5)], [1, 3])
    mixture.save(tmp_path / "m")
    again = Mixture.load(tmp_path / "m")
    assert [parts(c) for c in again.components] == [parts(c) for c in mixture.components]
    assert [c.ess for c in again.components] == [1e10, 5]
    assert again.components[0].settings == mixture.components[0].settings
    assert again.weights == mixture.weights
    Mixture([make(0), make(1)]).save(tmp_path / "m")
    assert Mixture.load(tmp_path / "m").weights is None
    make().save(tmp_path / "q")
    with pytest.raises(ValueError, match=r"cannot load .*q: its format is posterity\.posterior"):
        Mixture.load(tmp_path / "q")
    forge(tmp_path / "m", format="posterity.mixture", components="[]", weights="null")
    with pytest.raises(ValueError, match="cannot load"):
        Mixture.load(tmp_path / "m")


def test_mixture_face_and_errors():
    mixture = Mixture([make(0, ess=10), make(1, ess=20)])
    assert len(mixture) == 2
    assert mixture.names == tuple(SHAPES)
    assert repr(mixture) == "Mixture(2 components of 4 tensors, 385 parameters)"
    assert [c.ess for c in mixture.temper(2).components] == [5, 10]
    assert all(c.pruned for c in mixture.prune(1.0).components)
    assert mixture.to(torch.float64).sample(0, 0)["b"].dtype == torch.float64
    with pytest.raises(AttributeError, match="'Mixture' object has no attribute 'mean'"):
        mixture.mean  # noqa: B018
    with pytest.raises(ValueError, match="at least one"):
        Mixture([])
    with pytest.raises(ValueError, match=r"components \[1\] have other names or shapes"):
        Mixture([make(), Posterior(ONE, ONE)])
    for weights in ([1], [1, 0], [1, -1], [1, math.nan]):
        with pytest.raises(ValueError, match="2 positive finite weights"):
            Mixture([make(), make()], weights)
