"""Every implementation is the reference: same noise, same passes, at every instruction set."""

import math
import os
import shutil
import struct
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from posterity import IVON
from posterity import ops as ops_module
from posterity.groups import SETTINGS
from posterity.ops import choose, cpu, describe, fused, noise, reference

if cpu.missing():
    assert not shutil.which("c++"), cpu.missing()  # there is a compiler: it must have been built
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


CUDA = "cuda" if torch.cuda.is_available() else "cpu"  # there interpreted
TRITON = "Triton" if find_spec("triton") else None
LEVELS = cpu.LEVELS[: cpu.levels() + 1]


@pytest.fixture(params=filter(None, [*LEVELS, TRITON]))
def ops(request, monkeypatch):
    """Every fused implementation; the CPU's at each instruction set."""
    if request.param == TRITON:
        return ops_of("triton")
    monkeypatch.setattr(cpu, "level", LEVELS.index(request.param))
    return cpu.passes


def ops_of(name):
    return import_module(f"posterity.ops.{name}").passes


def device(ops):
    return "cpu" if ops is cpu.passes else CUDA


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setattr(cpu, "level", request.param)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def noise_of(like, sign=1, draw=5, start=0):
    pieces = [[(start, t.numel())] for t in like]
    return noise.Noise(7, draw, sign, [3 * i + 1 for i in range(len(like))], like, pieces)


def drawn(ops, sizes, draw=5, sign=1):
    outs = [torch.full((n,), math.nan, device=device(ops)) for n in sizes]
    ops.normals(noise_of(outs, sign, draw), outs)
    return [out.cpu() for out in outs]


def ulps(a, b):
    return (a.view(torch.int32).long() - b.view(torch.int32).long()).abs().max().item()


def test_normals_are_those_of_the_reference_within_4_ulp(ops, threads):
    if threads > 1 and ops is not cpu.passes:
        pytest.skip("these threads are the CPU's")
    for sign, draw, last in ((1, 0, 2**20 + 3), (-1, 2**40 + 1, 4097), (1, -3, 511)):
        ours = drawn(ops, [1, 63, 1000, last], draw, sign)
        for a, b in zip(ours, noise_of(ours, sign, draw), strict=True):
            assert ulps(a, b) <= 4


def test_normals_are_within_4_ulp_of_float64(ops):
    """Of Box–Muller's formula, on the uniform numbers and angles that float32 holds."""
    given = noise_of([torch.empty(1 << 20)])
    found = drawn(ops, [1 << 20])[0].view(-1, 2, noise.HALF).double()
    key = noise.fold(noise.draw_key(given.seed, given.draw), torch.tensor(given.numbers[0]))
    counters = torch.arange(1 << 19, dtype=torch.int32).view(-1, noise.HALF)
    x0, x1 = noise.threefry(*key, counters, torch.zeros_like(counters))
    u = (((x0 >> 1) & 0x7FFFFFFF).float() + 0.5).double() * 2.0**-31
    angle = (x1 << 2).float().double() * (math.pi / 4 * 2.0**-31)
    angle += ((x1 << 1) < 0).double() * (math.pi / 2)
    radius = u.log().mul(-2).sqrt() * torch.where(x1 < 0, -1.0, 1.0)
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    ulp = 2.0 ** (expected.abs().log2().floor() - 23)
    assert ((found - expected).abs() <= 4 * ulp).all()


def test_integers_are_those_of_the_reference(ops):
    """The top bit of each half-turn and quarter survives in the signs; u in the radius."""
    ours = drawn(ops, [1 << 16])[0].view(-1, 2, noise.HALF)
    theirs = next(iter(noise_of([torch.empty(1 << 16)]))).view(-1, 2, noise.HALF)
    assert torch.equal(ours.signbit(), theirs.signbit())
    radius = [x.double().square().sum(1) for x in (ours, theirs)]
    torch.testing.assert_close(*radius, rtol=1e-6, atol=0)


def test_thread_count_and_company_change_no_bit(ops):
    """Alone or among others, on one thread or two, a tensor's normals are the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [drawn(ops, SIZES[: i + 1])[-1] for i in range(len(SIZES))]
    torch.set_num_threads(2)
    together = drawn(ops, SIZES)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("start", [1, 200, 256, 777, 2**33 + 5])
def test_any_slice_is_the_same_bits(start, ops):
    whole = [torch.empty(2000, device=device(ops))]
    base = start // 256 * 256
    ops.normals(noise_of(whole, start=base), whole)
    part = [torch.full((900,), math.nan, device=device(ops))]
    ops.normals(noise_of(part, start=start), part)
    assert torch.equal(part[0], whole[0][start - base :][:900])


class State:
    """Parameters, gradients and state of the sizes above, the same values in any dtype.

    ``low``: with bfloat16 parameters, or, in float64, with values that such could hold.
    """

    def __init__(self, dtype, low=False, on="cpu"):
        generator = torch.Generator().manual_seed(0)

        def make(scale=1.0):
            return [(torch.randn(n, generator=generator) * scale).to(on) for n in SIZES]

        self.low = low and dtype == F32
        param = BF16 if self.low else dtype
        values, grads = ([x.to(BF16 if low else dtype) for x in make(scale)] for scale in (1, 0.1))
        self.params = [x.to(param) for x in values]
        self.means = [p.to(dtype, copy=True) for p in self.params] if low else self.params
        self.grads = [g.to(param) for g in grads]
        self.hess = [(h.abs() + 0.01).to(dtype) for h in make()]
        self.momentum = [g.to(dtype) for g in make(0.1)]
        self.steps = [torch.full((), 3.0, device=on) for _ in SIZES]  # a GPU reads them

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
            torch.testing.assert_close(a.double().cpu(), b.double(), rtol=rounding, atol=atol)


def pair(low, ops):
    return (State(F32, low, device(ops)), ops), (State(F64, low), reference)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("keep", [True, False])
def test_sample_unsample_and_restore(low, keep, ops, threads):
    both = (ours, _), (exact, _) = pair(low, ops)
    keep = keep and not low
    for s, implementation in both:
        s.start = [p.clone() for p in s.means]
        kept = [torch.full_like(p, math.nan) for p in s.params] if keep else s.means
        implementation.sample(s.params, kept, s.hess, noise_of(s.params), keep, **WIDTH)
        if keep:
            assert all(torch.equal(a, b) for a, b in zip(kept, s.start, strict=True))
    close(ours, exact)
    if not low:
        ops.unsample(ours.params, ours.hess, noise_of(ours.params), **WIDTH)
        for a, b in zip(ours.params, ours.start, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-7)
    ops.restore(ours.params, ours.start)
    for a, b in zip(ours.params, ours.start, strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("loaded", [0.0, 0.3, 1.0])
def test_a_sample_begins_at_weights_that_were_loaded_over_the_mean_s_rounding(loaded, ops, threads):
    ours, theirs = (State(F32, True, on) for on in (device(ops), "cpu"))
    g = torch.Generator().manual_seed(1)
    others = [torch.rand(n, generator=g) < loaded for n in SIZES]
    for s in (ours, theirs):
        s.means = [m + 1e-3 * m.abs() for m in s.means]  # what no bfloat16 holds
        s.params = [m.to(BF16) for m in s.means]
        for p, other in zip(s.params, others, strict=True):
            p[other.to(p.device)] = 50.0
            if loaded and len(p):
                p[0] = math.nan
    before = [m.clone() for m in theirs.means]
    for s, implementation in ((ours, ops), (theirs, reference)):
        noise = noise_of(s.params)
        implementation.sample(s.params, s.means, s.hess, noise, True, **WIDTH)
    for m, exact, was, other in zip(ours.means, theirs.means, before, others, strict=True):
        torch.testing.assert_close(m.cpu(), exact, rtol=0, atol=0, equal_nan=True)
        there = torch.arange(len(was)) > 0
        assert (exact[there & other] == 50).all()
        assert torch.equal(exact[there & ~other], was[there & ~other])
    for p, exact in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p.cpu(), exact, rtol=2**-7, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "unaligned"])
def test_what_goes_past_the_caches_is_the_same(offset, level, threads):
    """Above 2^22 elements, whose mean no cache would hold until the step."""
    numel = (1 << 22) + 1000
    p = torch.linspace(-1, 1, numel + offset)[offset:]
    mean, hess = torch.full((numel + offset,), math.nan)[offset:], torch.ones(numel)
    start, e = p.clone(), torch.empty(numel)
    for i in range(0, numel, 1 << 20):  # each piece is small
        piece = [e[i : i + (1 << 20)]]
        cpu.passes.normals(noise_of(piece, start=i), piece)
    cpu.passes.sample([p], [mean], [hess], noise_of([p]), True, **WIDTH)
    theta = start + e * (WIDTH["ess"] * (1 + WIDTH["weight_decay"])) ** -0.5
    torch.testing.assert_close(p, theta, rtol=1e-6, atol=1e-7)
    assert torch.equal(mean, start)
    cpu.passes.restore([p], [mean])
    assert torch.equal(p, start)


CHANGES = [
    {},
    {"hess_approx": "gradsq", "gradsq_scale": 8.0},
    {"clip_radius": 0.2},
    {"rescale_lr": False, "lr": 0.01},
    {"debias": False},
    {"weight_decay": 0.0},
    {"betas": (0.0, 0.5)},
    {"betas": (0.9, 1.0)},  # h rests
    {"lr": torch.tensor(0.1)},
    {"scale": 0.5, "product_scale": 0.25},
]


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["at rest", "kept", "regenerated"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_step(changes, where, low, ops):
    if low and where == "regenerated":
        pytest.skip("low-precision parameters always keep their mean")
    s = STEP | changes
    width = {k: s[k] for k in WIDTH}
    both = (ours, _), (exact, _) = pair(low, ops)
    for made, implementation in both:
        drawing = noise_of(made.params)
        means, live = made.means, where != "at rest"
        if live:
            keep = where == "kept" and not low
            if keep:
                means = [torch.full_like(p, math.nan) for p in made.params]
            implementation.sample(made.params, means, made.hess, drawing, keep, **width)
        state = made.momentum, made.hess, made.steps
        implementation.step(made.params, means, made.grads, *state, drawing, live, **s)
    assert all(t.item() == 4 for t in ours.steps)
    # σε is regenerated in float32 from θ's rounding: a bit more room where m is θ−σε
    close(ours, exact, rtol=2e-5 if s["hess_approx"] == "price" and not low else 4e-6)


@pytest.mark.parametrize("approx", ["price", "gradsq"])
def test_where_h_rests_no_gradient_reaches_it(approx, ops):
    state = State(F32, on=device(ops))
    before = [h.clone() for h in state.hess]
    s = STEP | {"betas": (0.9, 1.0), "hess_approx": approx, "gradsq_scale": 8.0}
    drawing, of = noise_of(state.params), (state.momentum, state.hess, state.steps)
    grads = [torch.full_like(g, 3e38) for g in state.grads]
    ops.step(state.params, state.means, grads, *of, drawing, False, **s)
    assert all(map(torch.equal, state.hess, before))
    infinite = [torch.full_like(h, math.inf) for h in state.hess]
    ops.update(state.means, state.grads, infinite, *of, **s)
    assert all(map(torch.equal, state.hess, before))


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_step_equals_the_update_from_the_sums_of_its_sample_bit_for_bit(changes, low, ops):
    s = STEP | changes
    width = {k: s[k] for k in WIDTH}
    one, two = (State(F32, low, device(ops)) for _ in range(2))
    drawing = noise_of(one.params)
    state = one.momentum, one.hess, one.steps
    ops.step(one.params, one.means, one.grads, *state, drawing, False, **s)
    sums, products = ([torch.zeros_like(h) for h in two.hess] for _ in range(2))
    approx = s["hess_approx"]
    ops.accumulate(sums, products, two.grads, two.means, two.hess, drawing, approx, **width)
    ops.update(two.means, sums, products, two.momentum, two.hess, two.steps, **s)
    for name in ("means", "momentum", "hess"):
        for a, b in zip(one.tensors()[name], two.tensors()[name], strict=True):
            assert torch.equal(a, b), name


def test_low_precision_rounds_to_nearest_even_and_keeps_nan(ops):
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, math.inf, math.nan, 0.0])
    p = torch.empty(len(values), dtype=BF16, device=device(ops))
    quiet = {"ess": 1e30, "hess_init": 1.0, "weight_decay": 0.0}
    hess = torch.ones(len(values), device=device(ops))
    ops.sample([p], [values.to(p.device, copy=True)], [hess], noise_of([p]), **quiet)
    p = p.cpu()
    assert torch.equal(p[:5], values.to(BF16)[:5])
    assert p[5].isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_visible_where_they_are(bad, ops):
    s = State(F32, on=device(ops))
    s.grads[5][17] = bad
    ops.step(
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
    monkeypatch.setattr("posterity.ops._fused", ops_module._fused.__wrapped__)  # not from its cache
    w = torch.nn.Parameter(torch.ones(3))
    assert IVON([w], 0.1, ess=10.0).implementation == "reference (this build holds no fused pass)"
    with pytest.raises(RuntimeError, match="fused=True"):
        IVON([w], 0.1, ess=10.0, fused=True)


# -- what happens while a pass runs, and between sample and step -----------------------------------


def interrupted(monkeypatch, kind):
    """Ctrl-C during the next pass of a kind: Python sees it when the pass has ended."""
    library = cpu._library()
    run = library.posterity_run

    def once(pass_, *rest):
        run(pass_, *rest)
        if pass_ == kind:
            raise KeyboardInterrupt

    class Interrupting:
        posterity_run = staticmethod(once)

    monkeypatch.setattr(cpu, "_library", lambda: Interrupting)
    monkeypatch.setattr(cpu.ctypes, "CDLL", type)


def draw_and_leave(opt):
    opt.train()
    opt.eval()


@pytest.mark.parametrize("store_mean", [True, False])
def test_ctrl_c_while_a_sample_is_drawn_or_restored_leaves_the_mean(store_mean, monkeypatch):
    for kind in (fused.SAMPLE, fused.UNSAMPLE):
        w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        opt = IVON([w], 0.1, ess=10.0, seed=0, store_mean=store_mean)
        if kind == fused.UNSAMPLE and store_mean:
            continue
        with monkeypatch.context() as patch:
            interrupted(patch, kind)
            with pytest.raises(KeyboardInterrupt):
                draw_and_leave(opt)
        opt.eval()
        bound = 0 if store_mean else 1e-6
        torch.testing.assert_close(w.data, torch.tensor([1.0, 2, 3, 4]), rtol=0, atol=bound)


@pytest.mark.parametrize("store_mean", [True, False])
def test_ctrl_c_during_a_step_leaves_the_new_mean(store_mean, monkeypatch):
    found = []
    for interrupt in (False, True):
        w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        opt = IVON([w], 0.1, ess=10.0, seed=0, store_mean=store_mean)
        opt.train()
        w.grad = torch.ones(4)
        with monkeypatch.context() as patch:
            if interrupt:
                interrupted(patch, fused.UPDATE)
                with pytest.raises(KeyboardInterrupt):
                    opt.step()
            else:
                opt.step()
        found.append(w.detach().clone())
    assert torch.equal(*found)


def test_parameters_that_change_their_dtype_before_the_step_go_to_the_reference():
    found = []
    for how in (None, False):
        model = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        opt = IVON(model.parameters(), 0.1, ess=10.0, seed=0, fused=how)
        with opt.sampled_params(train=True):
            model(torch.ones(1, 3)).sum().backward()
        model.double()
        opt.step()
        found.append(model.weight.detach().clone())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("contexts", [1, 2])
def test_parameters_that_change_their_dtype_are_read_in_the_new_one(contexts, changed):
    """No memory of one dtype is read as another's."""
    found = []
    for how in (None, False):
        w = torch.nn.Parameter(torch.ones(6, dtype=F64))
        opt = IVON([w], 0.1, ess=10.0, seed=0, fused=how)
        for i in range(contexts):
            with opt.sampled_params(train=True):
                w.grad = torch.ones_like(w)
            if i == 0:
                w.grad = None
                w.data = w.data.float()
        if changed:
            opt.param_groups[0]["weight_decay"] = 1e-3
        opt.step()
        found.append((w.detach(), opt.state[w]["momentum"]))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_parameter_of_another_size_is_refused():
    w = torch.nn.Parameter(torch.ones(4))
    opt = IVON([w], 0.1, ess=10.0, seed=0)
    opt.train()
    w.grad = torch.ones(4)
    opt.step()
    w.data = torch.ones(8)
    with pytest.raises(ValueError, match=r"become \(8,\)"):
        opt.train()


def test_rows_are_made_once_and_anew_where_memory_moved(triton, monkeypatch):
    """What stays on the device is told by addresses: a gradient elsewhere is another list."""
    module, made = import_module("posterity.ops.triton"), []
    launches = module._launches
    monkeypatch.setattr(module.passes, "_known", {})
    monkeypatch.setattr(module, "_launches", lambda *a: made.append(1) or launches(*a))
    w = torch.nn.Parameter(torch.ones(300, device=CUDA))
    plain = torch.nn.Parameter(torch.ones(300))
    gradients = [torch.full((300,), g) for g in (0.1, 0.2, 0.3)]
    standing = [g.to(CUDA) for g in gradients]
    opts = [IVON([p], 0.1, ess=10.0, seed=0, fused=f) for p, f in ((w, None), (plain, False))]
    for i in (0, 0, 1, 0, 2, 1):
        for opt, p, grad in zip(opts, (w, plain), (standing[i], gradients[i]), strict=True):
            opt.train()
            p.grad = grad.clone() if p is plain else grad
            opt.step()
    torch.testing.assert_close(w.cpu(), plain, rtol=1e-5, atol=1e-6)
    assert len(made) == 1 + 3  # of the samples, and of the steps with each gradient


@pytest.mark.skipif(CUDA != "cpu", reason="the interpreter stands in for compiled kernels")
def test_a_compiled_kernel_is_started_with_the_constants_of_its_signature(triton, monkeypatch):
    module, asked, started = import_module("posterity.ops.triton"), [], []
    passes = module._passes

    class Kernel:
        def __getitem__(self, grid):
            def start(*given):
                started.append(grid)
                constants = dict(zip(module.CONSTANTS, given[4:], strict=True))
                passes[grid[:1]](*given[:4], **constants)

            return start

    class Compiling:
        def __getitem__(self, grid):
            def start(*given, **constants):
                asked.append(constants)
                passes[grid](*given, **constants)
                return Kernel()

            return start

    monkeypatch.setattr(module, "_passes", Compiling())
    monkeypatch.setattr(module.passes, "_compiled", {})
    found = []
    for way in (None, False):
        w, rest = (torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (300, 7))
        opt = IVON([w, rest], 0.1, ess=10.0, seed=0, fused=way)
        for _ in range(4):
            opt.train()
            w.grad, rest.grad = w.detach() ** 3, rest.detach() ** 3
            opt.step()
        found.append(torch.cat([w.detach(), rest.detach()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert len(asked) == len({str(constants) for constants in asked}) == 4  # sample and step, twice
    assert len(started) == 4 * 4 - len(asked)
    assert set(module.CONSTANTS) | {"enable_fp_fusion"} == asked[0].keys()


def test_what_is_remembered_does_not_fill_the_device(triton, monkeypatch):
    """Gradients that never return to an address make a table each step; the latest stay."""
    module = import_module("posterity.ops.triton")
    passes, made = module.Triton(), []
    monkeypatch.setattr(module, "REMEMBERED", 3 * (module.LEAST + 1))
    for given in "abcadaeb":
        passes._remembered(given, lambda given, _: made.append(given) or given, torch.device("cpu"))
    assert made == [*"abcdeb"]  # "a" was asked for again and again


@pytest.mark.parametrize("store_mean", [True, False])
@pytest.mark.parametrize("when", ["train", "eval", "step"])
def test_a_pass_that_fails_after_some_launches_keeps_what_these_wrote(
    when, store_mean, triton, monkeypatch
):
    """The tensor whose memory is aligned is one launch, the others are the second."""
    module, launches = import_module("posterity.ops.triton"), 0
    opts, weights = [], []
    for _ in range(2):
        rooms = [torch.arange(8.0, device=CUDA) for _ in range(3)]
        mine = [torch.nn.Parameter(room[i:]) for i, room in enumerate(rooms)]
        opts.append(IVON(mine, 0.1, ess=10.0, seed=0, store_mean=store_mean))
        weights.append(mine)
    start = [w.detach().clone() for w in weights[0]]
    for opt, mine in zip(opts, weights, strict=True):
        if when != "train":
            opt.train()
        for w in mine:
            w.grad = torch.ones_like(w)
    kernel = module._passes

    class Failing:
        def __getitem__(self, grid):
            nonlocal launches
            launches += 1
            if launches == 2:
                raise MemoryError
            return kernel[grid]

    opt, other = opts
    monkeypatch.setattr(module, "_passes", Failing())
    monkeypatch.setattr(module.passes, "_compiled", {})
    if when == "eval" and store_mean:  # there no pass runs
        opt.eval()
    else:
        with pytest.raises(MemoryError):
            getattr(opt, when)()
    monkeypatch.setattr(module, "_passes", kernel)
    opt.eval()
    stepped = [False] * 3
    if when == "step":
        other.step()
        stepped = [bool(opt.state[w]["step"]) for w in weights[0]]
        assert stepped == [True, False, False]
    for w, was, now, did in zip(weights[0], start, weights[1], stepped, strict=True):
        torch.testing.assert_close(w.detach(), now.detach() if did else was)


def test_lists_of_other_lengths_are_refused():
    """A table of theirs would be read past its end."""
    params = [torch.zeros(4), torch.zeros(4)]
    for hess, numbers in (([torch.ones(4)], [0, 1]), ([], [0, 1]), (params, [0])):
        made = noise.Noise(0, 0, 1, numbers, params)
        with pytest.raises(ValueError, match="as many tensors"):
            cpu.passes.sample(params, params, hess, made, **WIDTH)


def test_settings_are_remembered_for_each_device(triton, monkeypatch):
    """Default streams of all devices have the same number."""
    passes = import_module("posterity.ops.triton").passes
    monkeypatch.setattr(passes, "_known", {})
    devices = torch.device("cpu"), torch.device("meta")
    made = [passes._remembered("given", lambda _, on: on, d) for d in (*devices, *devices)]
    assert made == [*devices, *devices]


@pytest.mark.parametrize("store_mean", [True, False])
@pytest.mark.parametrize("when", ["train", "eval", "step"])
def test_a_pass_that_fails_before_it_writes_changes_nothing(when, store_mean, triton, monkeypatch):
    """A compiler that is missing or interrupted, memory that runs out."""
    module = import_module("posterity.ops.triton")
    start = torch.tensor([1.0, 2.0, 3.0, 4.0])
    w = torch.nn.Parameter(start.to(CUDA))
    opt = IVON([w], 0.1, ess=10.0, seed=0, store_mean=store_mean)

    def fail(*_):
        raise MemoryError

    if when == "train":
        monkeypatch.setattr(module.passes, "_remembered", fail)
        with pytest.raises(MemoryError):
            opt.train()
    else:
        opt.train()
        w.grad = torch.ones_like(w)
        if not (when == "eval" and store_mean):  # there no pass runs
            with monkeypatch.context() as patch:
                patch.setattr(module.passes, "_remembered", fail)
                with pytest.raises(MemoryError):
                    opt.eval() if when == "eval" else opt.step()
        opt.eval()
        assert int(opt.state[w]["step"]) == 0
    torch.testing.assert_close(w.detach().cpu(), start, rtol=0, atol=1e-6)


def test_settings_that_change_while_a_sample_is_live_do_not_harm_the_mean():
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    opt = IVON([w], 0.0, ess=10.0, seed=0, store_mean=False)
    for leave in (opt.eval, opt.step):
        opt.param_groups[0]["weight_decay"] = 1e-4
        opt.train()
        w.grad = torch.ones(4)
        opt.param_groups[0]["weight_decay"] = 1.0
        leave()
        torch.testing.assert_close(w.data, torch.tensor([1.0, 2, 3, 4]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["context", "train", "eval"])
def test_settings_that_change_before_the_step_do_not_change_the_sample_it_saw(way):
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    opt = IVON([w], 0.0, ess=10.0, betas=(0.9, 0.9), seed=0)
    mean, grad = w.detach().clone(), torch.tensor([1.0, -2.0, 3.0, 0.5])
    with opt.sampled_params(train=True) if way == "context" else nullcontext():
        if way != "context":
            opt.train()
        moved = w.detach() - mean
        w.grad = grad.clone()
    if way == "eval":
        opt.eval()
    opt.param_groups[0].update(ess=1000.0, weight_decay=0.5)
    opt.step()
    state = [torch.zeros(4), torch.ones(4), torch.zeros(())]
    group = {k: opt.param_groups[0][k] for k in SETTINGS}
    product = grad * moved * 10 * (1 + 1e-4) / (1000 * 1.5)  # of the σ that the sample had
    reference.update([mean], [grad], [product], *([t] for t in state), **group)
    torch.testing.assert_close(opt.state[w]["hess"], state[1])


def test_a_negated_gradient_keeps_its_sign(level):
    moved = []
    for grad in (torch.tensor([-1.0]), torch.tensor([1 + 1j]).conj().imag):
        w = torch.nn.Parameter(torch.ones(1))
        opt = IVON([w], 0.1, ess=1e6, seed=0)
        opt.train()
        w.grad = grad
        opt.step()
        moved.append(w.item())
    assert moved[0] == moved[1] > 1


def test_a_nearly_deterministic_posterior_stays_finite(ops):
    p, h = torch.ones(2, 4, device=device(ops))
    ops.sample([p], [p], [h], noise_of([p]), ess=1e39, hess_init=1.0, weight_decay=0.0)
    torch.testing.assert_close(p.cpu(), torch.ones(4))


def test_subclasses_of_tensor_go_to_the_reference():
    class Other(torch.Tensor):
        pass

    other = torch.ones(3).as_subclass(Other)
    assert choose(other, None) is reference
    assert "Other" in describe([other], None)


@pytest.mark.parametrize(
    ("name", "other"),
    [("SETTINGS", struct.Struct("=QQ13d")), ("COLUMNS", 13)],
    ids=["settings", "rows"],
)
def test_a_library_of_other_sources_is_not_used(name, other, monkeypatch):
    monkeypatch.setattr(cpu, name, other)
    assert "other sources" in cpu._library.__wrapped__()


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from posterity.ops import triton as ours

fixed = {"PAIRS": ours.PAIRS, "TILES": ours.TILES, "WORDS": ours.COLUMNS}
flags = ("LOW", "LOW_GRAD", "REGENERATE", "HELD", "APART", "MEAN", "SUMS", "PRICE", "ALIGNED")
cases = (
    *((0, {"MEAN"}), (0, {"MEAN", "LOW", "APART"}), (1, ()), (2, {"MEAN", "SUMS", "PRICE"})),
    *((3, {"HELD", "MEAN", "PRICE"}), (3, {"REGENERATE", "PRICE"}), (3, {"SUMS"})),
    (3, {"LOW", "LOW_GRAD", "MEAN", "PRICE"}),
)
cases = [(kind, {*given, "ALIGNED"}) for kind, given in cases] + [(3, {"HELD", "MEAN"}), (4, ())]
for kind, given in cases:
    constant = {"PASS": kind, **fixed, **{flag: flag in given for flag in flags}}
    signature = {"header": "*i64", "rows": "*i64", "n": "i32", "draw": "i32"}
    signature |= dict.fromkeys(constant, "constexpr")
    source = triton.compiler.ASTSource(ours._passes, signature, constexprs=constant)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    wide = (re.search(op + r"\\.global\\S*\\.v[24]", made) is not None for op in ("ld", "st"))
    print(kind, *sorted(given), *wide)
"""


def test_the_cuda_passes_compile_and_move_several_words_at_a_time():
    """Without a GPU too; the interpreter runs what the compiler would refuse."""
    if TRITON is None:
        pytest.skip("Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert all(line.endswith("True True") for line in lines if "ALIGNED" in line), done.stdout


# -- IVON over the CUDA passes ---------------------------------------------------------------------


@pytest.fixture
def triton(monkeypatch):
    """IVON's parameters are trained by Triton, interpreted where there is no GPU."""
    if TRITON is None:
        pytest.skip("Triton is not installed")
    passes = ops_of("triton")
    monkeypatch.setattr("posterity.ops._fused", lambda *_: passes)


def trained(fused, *, lr, capturable, way="train", dtype=F32, **settings):
    torch.manual_seed(0)
    on = CUDA if fused is None else "cpu"
    model = torch.nn.Sequential(torch.nn.Linear(5, 30), torch.nn.Tanh(), torch.nn.Linear(30, 2))
    model.to(on, dtype)
    x, y = torch.randn(40, 5).to(on, dtype), torch.randn(40, 2).to(on, dtype)
    lr = torch.tensor(lr, device=on) if capturable else lr
    constant = {"ess": 40.0, "hess_init": 0.1, "betas": (0.9, 0.99), "seed": 3}
    opt = IVON(model.parameters(), lr, **constant, fused=fused, capturable=capturable, **settings)

    def closure():
        opt.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(4):
        if way == "train":
            opt.train()
            closure()
            opt.step()
        else:
            opt.step(closure)
    return [
        t.double().cpu() for p in model.parameters() for t in (p.detach(), opt.state[p]["hess"])
    ]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"store_mean": False},
        {"dtype": BF16},
        {"way": "closure", "mc_samples": 2, "antithetic": True},
        {"hess_approx": "gradsq", "gradsq_scale": 40.0},
    ],
    ids=str,
)
def test_ivon_over_triton_is_ivon_over_the_reference(settings, capturable, triton):
    ours, theirs = (trained(f, lr=0.1, capturable=capturable, **settings) for f in (None, False))
    rtol = 2e-2 if "dtype" in settings else 1e-5
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


def test_with_capturable_the_host_reads_nothing(triton, monkeypatch):
    w = torch.nn.Parameter(torch.ones(300, device=CUDA))
    opt = IVON([w], torch.tensor(0.1, device=CUDA), ess=10.0, seed=0, capturable=True)
    opt.train()
    w.grad = torch.ones_like(w)
    opt.step()  # makes what is made once

    def read(tensor, *_):
        raise AssertionError("read on the host")

    names = ("item", "__float__", "__int__", "__bool__", "tolist")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(torch.Tensor, name, read)
        opt.train()
        opt.step()
    assert int(opt.param_groups[0]["draws"]) == 2


@pytest.mark.skipif(CUDA == "cpu", reason="a CUDA graph needs a GPU")
def test_a_replayed_graph_steps_as_the_uncaptured_loop_does(triton):
    def make():
        w = torch.nn.Parameter(torch.ones(3000, device=CUDA))
        lr = torch.tensor(0.1, device=CUDA)
        return w, IVON([w], lr, ess=1e3, betas=(0.9, 0.99), seed=0, capturable=True)

    def step(w, opt):
        opt.train()
        w.grad.copy_(w.detach() ** 3)
        opt.step()

    (one, plain), (two, captured) = make(), make()
    one.grad, two.grad = torch.zeros_like(one), torch.zeros_like(two)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(two, captured)  # makes and compiles what is made once
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(two, captured)  # recorded, not run
    for _ in range(4):
        step(one, plain)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_a_moved_counter_draws_other_noise(triton):
    """As a graph does when it is replayed: the same launch, the counter advanced in place."""
    like = [torch.empty(300, device=CUDA)]
    draw = torch.tensor(5, device=CUDA)
    drawing = noise.Noise(7, draw, 1, [1], like)
    found = []
    for _ in range(2):
        out = [torch.empty(300, device=CUDA)]
        ops_of("triton").normals(drawing, out)
        found.append(out[0].cpu())
        draw += 1
    for number, ours in zip((5, 6), found, strict=True):
        theirs = next(iter(noise.Noise(7, number, 1, [1], like))).cpu()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.equal(*found)
