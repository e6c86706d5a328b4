"""Every implementation is the reference: same noise, same passes, at every instruction set."""

import math

import pytest
import torch

from posterity import IVON
from posterity.ops import cpu, noise, reference

if cpu.missing():
    pytest.skip(f"{cpu.missing()}", allow_module_level=True)

SIZES = (1, 63, 255, 256, 257, 1000, 0, 70_001)
WIDTH = {"ess": 500.0, "hess_init": 0.1, "weight_decay": 1e-2}
STEP = {
    **WIDTH,
    "lr": 0.3,
    "betas": (0.9, 0.999),
    "hess_approx": "price",
    "gradsq_scale": None,
    "clip_radius": math.inf,
    "rescale_lr": True,
    "debias": True,
}
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(params=range(cpu.levels() + 1), ids=cpu.LEVELS[: cpu.levels() + 1])
def level(request, monkeypatch):
    monkeypatch.setattr(cpu, "level", request.param)
    return request.param


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def noise_of(like, sign=1, draw=5):
    return noise.Noise(7, draw, sign, [3 * i + 1 for i in range(len(like))], like)


def drawn(sizes, draw=5, sign=1):
    outs = [torch.full((n,), math.nan) for n in sizes]
    cpu.normals(noise_of(outs, sign, draw), outs)
    return outs


def ulps(a, b):
    return (a.view(torch.int32).long() - b.view(torch.int32).long()).abs().max().item()


def test_normals_are_those_of_the_reference_within_4_ulp(level, threads):
    sizes = [1, 63, 1000, 2**20 + 3]
    for sign, draw in ((1, 0), (-1, 2**40 + 1), (1, -3)):
        ours = drawn(sizes, draw, sign)
        for a, b in zip(ours, noise_of(ours, sign, draw), strict=True):
            assert ulps(a, b) <= 4


def test_integers_are_those_of_the_reference(level):
    """The top bit of each half-turn and quarter survives in the signs; u in the radius."""
    ours = drawn([1 << 16])[0].view(-1, 2, noise.HALF)
    theirs = next(iter(noise_of([torch.empty(1 << 16)]))).view(-1, 2, noise.HALF)
    assert torch.equal(ours.signbit(), theirs.signbit())
    radius = [x.double().square().sum(1) for x in (ours, theirs)]
    torch.testing.assert_close(*radius, rtol=1e-6, atol=0)


def test_thread_count_and_company_change_no_bit(level):
    """Alone or among others, on one thread or two, a tensor's normals are the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [drawn(SIZES[: i + 1])[-1] for i in range(len(SIZES))]
    torch.set_num_threads(2)
    together = drawn(SIZES)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


class State:
    """Parameters, gradients and state of the sizes above, the same values in any dtype.

    ``low``: with bfloat16 parameters, or, in float64, with values that such could hold.
    """

    def __init__(self, dtype, low=False):
        generator = torch.Generator().manual_seed(0)

        def make(scale=1.0):
            return [torch.randn(n, generator=generator) * scale for n in SIZES]

        self.low = low and dtype == F32
        param = BF16 if self.low else dtype
        values, grads = ([x.to(BF16 if low else dtype) for x in make(scale)] for scale in (1, 0.1))
        self.params = [x.to(param) for x in values]
        self.means = [p.to(dtype, copy=True) for p in self.params] if low else self.params
        self.grads = [g.to(param) for g in grads]
        self.hess = [(h.abs() + 0.01).to(dtype) for h in make()]
        self.momentum = [g.to(dtype) for g in make(0.1)]
        self.steps = [torch.full((), 3.0) for _ in SIZES]

    def tensors(self):
        return {
            "params": self.params,
            "means": self.means,
            "momentum": self.momentum,
            "hess": self.hess,
        }


def close(ours, exact, rtol=1e-6):
    for name, theirs in exact.tensors().items():
        for a, b in zip(ours.tensors()[name], theirs, strict=True):
            atol = rtol * float(b.double().abs().max()) if b.numel() else 0.0
            rounding = 2**-7 if name == "params" and ours.low else rtol
            torch.testing.assert_close(a.double(), b.double(), rtol=rounding, atol=atol)


def pair(low):
    return State(F32, low), State(F64, low)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("keep", [True, False])
def test_sample_and_unsample(low, keep, level, threads):
    ours, exact = pair(low)
    keep = keep and not low
    for s, ops in ((ours, cpu), (exact, reference)):
        s.start = [p.clone() for p in s.means]
        kept = [torch.full_like(p, math.nan) for p in s.params] if keep else s.means
        ops.sample(s.params, kept, s.hess, noise_of(s.params), keep, **WIDTH)
        if keep:
            assert all(torch.equal(a, b) for a, b in zip(kept, s.start, strict=True))
    close(ours, exact)
    if not low:
        cpu.unsample(ours.params, ours.hess, noise_of(ours.params), **WIDTH)
        for a, b in zip(ours.params, ours.start, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-7)


CHANGES = [
    {},
    {"hess_approx": "gradsq", "gradsq_scale": 8.0},
    {"clip_radius": 0.2},
    {"rescale_lr": False, "lr": 0.01},
    {"debias": False},
    {"weight_decay": 0.0},
    {"betas": (0.0, 0.5)},
    {"lr": torch.tensor(0.1)},
    {"scale": 0.5, "product_scale": 0.25},
]


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["at rest", "kept", "regenerated"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_step(changes, where, low, level, threads):
    if low and where == "regenerated":
        pytest.skip("low-precision parameters always keep their mean")
    s = STEP | changes
    width = {k: s[k] for k in WIDTH}
    ours, exact = pair(low)
    for made, ops in ((ours, cpu), (exact, reference)):
        drawing = noise_of(made.params)
        means, live = made.means, where != "at rest"
        if live:
            keep = where == "kept" and not low
            if keep:
                means = [torch.full_like(p, math.nan) for p in made.params]
            ops.sample(made.params, means, made.hess, drawing, keep, **width)
        state = made.momentum, made.hess, made.steps
        ops.step(made.params, means, made.grads, *state, drawing, live, **s)
    assert all(t.item() == 4 for t in ours.steps)
    # σε is regenerated in float32 from θ's rounding: a bit more room where m is θ−σε
    close(ours, exact, rtol=2e-5 if s["hess_approx"] == "price" and not low else 4e-6)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_step_equals_the_update_from_the_sums_of_its_sample_bit_for_bit(changes, low, level):
    s = STEP | changes
    width = {k: s[k] for k in WIDTH}
    one, two = State(F32, low), State(F32, low)
    drawing = noise_of(one.params)
    state = one.momentum, one.hess, one.steps
    cpu.step(one.params, one.means, one.grads, *state, drawing, False, **s)
    sums, products = ([torch.zeros_like(h) for h in two.hess] for _ in range(2))
    approx = s["hess_approx"]
    cpu.accumulate(sums, products, two.grads, two.means, two.hess, drawing, approx, **width)
    cpu.update(two.means, sums, products, two.momentum, two.hess, two.steps, **s)
    for name in ("means", "momentum", "hess"):
        for a, b in zip(one.tensors()[name], two.tensors()[name], strict=True):
            assert torch.equal(a, b), name


def test_low_precision_rounds_to_nearest_even_and_keeps_nan(level):
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, math.inf, math.nan, 0.0])
    p = torch.empty(len(values), dtype=BF16)
    quiet = {"ess": 1e30, "hess_init": 1.0, "weight_decay": 0.0}
    hess = torch.ones(len(values))
    cpu.sample([p], [values.clone()], [hess], noise_of([p]), **quiet)
    assert torch.equal(p[:5], values.to(BF16)[:5])
    assert p[5].isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_visible_where_they_are(bad, level):
    s = State(F32)
    s.grads[5][17] = bad
    cpu.step(
        s.params, s.params, s.grads, s.momentum, s.hess, s.steps, noise_of(s.params), False, **STEP
    )
    finite = s.params[5].isfinite()
    assert not finite[17]
    assert finite.sum() == len(finite) - 1


def test_writes_are_seen_by_autograd(level):
    """A backward pass after a write through a raw pointer must not use the new value silently."""
    w = torch.nn.Parameter(torch.ones(4))
    opt = IVON([w], 0.1, ess=10.0, seed=0)
    value = (w * w).sum()
    opt.train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_the_implementation_is_named():
    single, double = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3).double())
    assert "fused CPU" in IVON([single], 0.1, ess=10.0).implementation
    assert "1 of 2" in IVON([single, double], 0.1, ess=10.0).implementation
    assert IVON([single], 0.1, ess=10.0, fused=True).implementation.startswith("fused")
    with pytest.raises(RuntimeError, match=r"fused=True.*float64"):
        IVON([double], 0.1, ess=10.0, fused=True)


def test_without_the_extension_the_reference_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda: "this build holds no fused pass")
    w = torch.nn.Parameter(torch.ones(3))
    assert IVON([w], 0.1, ess=10.0).implementation == "reference (this build holds no fused pass)"
    with pytest.raises(RuntimeError, match="fused=True"):
        IVON([w], 0.1, ess=10.0, fused=True)
