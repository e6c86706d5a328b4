"""The reference is Algorithm 1: against an implementation of its own, by hand, and under attack."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from posterity import IVON
from posterity.ops import reference

# -- lines (1) to (7) of the paper, written again: float64, numpy, one array, no in-place tricks ---


def by_the_paper(m, h, g, t, noise, gradients, s):
    """One step. ``noise`` and ``gradients``: one array for each Monte Carlo sample."""
    lam, delta, h0, rho = s["ess"], s["weight_decay"], s["hess_init"], 1 - s["betas"][1]
    alpha = float(s["lr"]) * (h0 + delta if s["rescale_lr"] else 1)
    sigma = 1 / np.sqrt(lam * (h + delta))
    thetas = [m + sigma * e for e in noise]
    if s["hess_approx"] == "price":
        hats = [gr * (th - m) / sigma**2 for gr, th in zip(gradients, thetas, strict=True)]
    else:
        hats = [s["gradsq_scale"] * gr**2 for gr in gradients]
    h_hat, g_hat = np.mean(hats, axis=0), np.mean(gradients, axis=0)
    g_new = s["betas"][0] * g + (1 - s["betas"][0]) * g_hat
    h_new = (1 - rho) * h + rho * h_hat + rho**2 * (h - h_hat) ** 2 / (h + delta) / 2
    g_bar = g_new / (1 - s["betas"][0] ** (t + 1)) if s["debias"] else g_new
    direction = (g_bar + delta * m) / (h_new + delta)
    m_new = m - alpha * np.clip(direction, -s["clip_radius"], s["clip_radius"])
    return thetas, (m_new, h_new, g_new, t + 1)


USUAL = {
    "lr": 0.1,
    "ess": 50.0,
    "hess_init": 0.7,
    "betas": (0.9, 0.99),
    "weight_decay": 0.03,
    "hess_approx": "price",
    "gradsq_scale": None,
    "clip_radius": math.inf,
    "rescale_lr": True,
    "debias": True,
}
SHAPES = [(3, 4), (5,), (), (2, 3, 1, 2)]


def rounded(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normals that float32 can hold, in float64."""
    return np.asarray(rng.normal(size=shape)).astype(np.float32).astype(np.float64)


def apart(made: list[torch.Tensor], exact: list[np.ndarray]) -> float:
    """The largest error of some tensors relative to their largest value."""
    a = torch.cat([x.flatten() for x in made]).numpy()
    b = np.concatenate([x.ravel() for x in exact])
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-11)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hess_approx": "gradsq", "gradsq_scale": 8.0},
        {"clip_radius": 0.2},
        {"rescale_lr": False},
        {"debias": False},
        {"weight_decay": 0.0},
        {"betas": (0.0, 0.5)},
        {"betas": (0.99, 0.99999)},
        {"ess": 1e6, "hess_init": 1e-3, "weight_decay": 1e-6, "lr": 0.3, "clip_radius": 1e-3},
        {"lr": torch.tensor(0.1, dtype=torch.float64)},
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [1, 3])
def test_reference_equals_an_independent_float64_implementation(dtype, bound, changes, samples):
    s = USUAL | changes
    rng = np.random.default_rng(0)
    state = [
        (rng.normal(size=shape), np.full(shape, s["hess_init"]), np.zeros(shape), 0)
        for shape in SHAPES
    ]
    means, hess, momentum = ([torch.tensor(x[i], dtype=dtype) for x in state] for i in range(3))
    steps = [torch.zeros(()) for _ in SHAPES]
    width = {k: s[k] for k in ("ess", "hess_init", "weight_decay")}
    for _ in range(10):
        noise = [[rounded(rng, x) for _ in range(samples)] for x in SHAPES]
        slopes = [[rounded(rng, x) for _ in range(samples)] for x in SHAPES]
        results = [
            by_the_paper(*x, e, gr, s) for x, e, gr in zip(state, noise, slopes, strict=True)
        ]
        grads = [torch.zeros_like(m) for m in means]
        products = [torch.zeros_like(m) for m in means]
        for k in range(samples):
            flat = [torch.tensor(e[k], dtype=torch.float32).flatten() for e in noise]
            params = [torch.empty_like(m) for m in means]
            reference.sample(params, means, hess, flat, **width)
            assert apart(params, [r[0][k] for r in results]) < bound
            for i in range(len(SHAPES)):
                grad = torch.tensor(slopes[i][k], dtype=dtype)
                displacement = reference.perturbation(hess[i], flat[i], **width)
                grads[i] += grad / samples
                products[i] += reference.product(grad, displacement, s["hess_approx"]) / samples
        reference.update(means, grads, products, momentum, hess, steps, **s)
        state = [r[1] for r in results]
        for made, index in ((means, 0), (hess, 1), (momentum, 2)):
            assert apart(made, [x[index] for x in state]) < bound
    assert all(t.item() == 10 for t in steps)


def test_unsample_is_the_inverse_of_sample_to_one_rounding():
    generator = torch.Generator().manual_seed(0)
    m, e = torch.randn(2, 1000, generator=generator)
    h = torch.rand(1000, generator=generator)
    p, width = m.clone(), {"ess": 10.0, "hess_init": 1.0, "weight_decay": 0.1}
    reference.sample([p], [m], [h], [e], **width)
    moved = p.clone()
    assert not (moved == m).any()
    reference.unsample([p], [h], [e], **width)
    rounding = torch.finfo(torch.float32).eps * torch.maximum(m.abs(), moved.abs())
    assert ((p - m).abs() <= rounding).all()


def test_low_precision_parameters_get_the_sample_rounded_once():
    m, e, h = torch.tensor([1.0, -2.0]), torch.tensor([0.3, 0.7]), torch.ones(2)
    p = torch.empty(2, dtype=torch.bfloat16)
    reference.sample([p], [m], [h], [e], ess=1.0, hess_init=1.0, weight_decay=0.0)
    assert torch.equal(p, (m + e).bfloat16())


# -- by hand ---------------------------------------------------------------------------------------


def train(opt: torch.optim.Optimizer, w: torch.nn.Parameter, target: torch.Tensor, steps: int):
    for _ in range(steps):

        def closure():
            opt.zero_grad()
            loss = (w - target).square().sum() + w.pow(4).sum()
            loss.backward()
            return loss

        opt.step(closure)
    return w.detach()


QUIET = {"ess": 1e30, "betas": (0.9, 1 - 1e-16), "hess_init": 0.3}  # σ under a rounding, h constant


def test_without_noise_and_at_constant_h_a_step_equals_a_hand_written_one():
    start, target = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 0.25, -1.0])
    lr, delta, beta = 0.01, 0.05, 0.9
    w = torch.nn.Parameter(start.clone())
    opt = IVON([w], lr, weight_decay=delta, fused=False, seed=0, **QUIET)
    m, g = start.double(), torch.zeros(3, dtype=torch.float64)
    for t in range(1, 8):
        g = beta * g + (1 - beta) * (2 * (m - target) + 4 * m**3)
        m = m - lr * (g / (1 - beta**t) + delta * m)  # the scale h0+δ of rescale_lr cancels
        assert torch.allclose(train(opt, w, target, 1).double(), m, rtol=1e-6, atol=0)
        assert torch.equal(opt.state[w]["hess"], torch.full((3,), 0.3))


def test_without_noise_constant_h_and_debiasing_it_is_torch_sgd_with_momentum():
    start, target = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 0.25, -1.0])
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    opt = IVON([ours], 0.1, weight_decay=0.0, debias=False, fused=False, seed=0, **QUIET)
    sgd = torch.optim.SGD([theirs], 0.1 * (1 - 0.9), momentum=0.9)
    a, b = (train(o, w, target, 20) for o, w in ((opt, ours), (sgd, theirs)))
    assert torch.allclose(a, b, rtol=2e-6, atol=0)


def test_without_rescaling_the_step_is_preconditioned_by_h_plus_delta():
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = IVON([w], 0.01, weight_decay=0.1, rescale_lr=False, fused=False, seed=0, **QUIET)
    with opt.sampled_params(train=True):
        w.grad = torch.tensor([0.5, 0.25])
    opt.step()
    hand = torch.tensor([1 - 0.01 * (0.5 + 0.1) / 0.4, -2 - 0.01 * (0.25 - 0.2) / 0.4])
    assert torch.allclose(w, hand, rtol=1e-6, atol=0)


# -- positivity ------------------------------------------------------------------------------------


class Chain:
    """One weight whose ĥ an adversary chooses; the mean stays, for it would run away."""

    def __init__(self, delta: float, rho: float, hess_init: float, dtype: torch.dtype):
        self.h, self.m = torch.tensor([hess_init], dtype=dtype), torch.ones(1, dtype=dtype)
        self.g, self.t = torch.zeros(1, dtype=dtype), torch.zeros(())
        self.prior = {"hess_init": hess_init, "weight_decay": delta}
        self.rho = rho

    @property
    def u(self) -> torch.Tensor:
        return reference.curvature(self.h, **self.prior)

    def step(self, ratio: float) -> None:
        """An update with ĥ+δ = ``ratio``·(h+δ)."""
        hhat = ratio * self.u.double() - self.prior["weight_decay"]
        product = (hhat / self.u.double()).to(self.h.dtype)  # at λ = 1
        s = USUAL | self.prior | {"ess": 1.0, "betas": (0.9, 1 - self.rho), "lr": 0.0}
        state = ([self.m], [product], [product], [self.g], [self.h], [self.t])
        reference.update(*state, **s)


def worst(rho: float) -> float:
    """The ratio at which u_new = u/2, the least there is."""
    return -(1 - rho) / rho


@settings(deadline=None, max_examples=150)
@given(
    delta=st.floats(0, 10),
    rho=st.floats(1e-6, 1),
    hess_init=st.floats(1e-6, 10),
    ratios=st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(None)), max_size=18),
)
@example(delta=0.37, rho=0.99, hess_init=1.0, ratios=[None] * 18)
def test_u_at_least_halves_in_float64(delta, rho, hess_init, ratios):
    """u_new = u·[½ + ½(1−ρ+ρû/u)²] ≥ u/2. In 18 steps the floor 2⁻²⁰(h0+δ) cannot have helped."""
    chain = Chain(delta, rho, hess_init, torch.float64)
    rho = 1 - (1 - rho)  # as the update will see it
    for choice in ratios:
        ratio = worst(rho) if choice is None else choice
        u = chain.u.item()
        if u > 1e100:  # its square is no float64 any more
            break
        chain.step(ratio)
        law = u * (0.5 + 0.5 * (1 - rho + rho * ratio) ** 2)
        slack = 1e-14 * (u * (1 + abs(ratio)) + delta)  # ĥ = ratio·u − δ and h = u − δ round
        assert chain.u.item() >= u / 2 - slack
        assert chain.u.item() == pytest.approx(law, rel=1e-9, abs=slack)


@settings(deadline=None, max_examples=100)
@given(
    delta=st.floats(0, 10),
    rho=st.floats(1e-6, 1),
    hess_init=st.floats(1e-3, 10),
    ratios=st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(None)), max_size=60),
)
@example(delta=0.37, rho=0.99, hess_init=1.0, ratios=[None] * 60)
def test_float32_stays_positive(delta, rho, hess_init, ratios):
    chain = Chain(delta, rho, hess_init, torch.float32)
    least = reference.floor(**chain.prior)
    for choice in ratios:
        chain.step(worst(rho) if choice is None else choice)
        assert (chain.u >= np.float32(least)).all()
        assert (chain.h + delta > 0).all()  # in the state itself
        if chain.u.item() > 1e30:
            break  # float32 ends here: squares overflow
        assert chain.m.isfinite().all()
        p = torch.empty(1)
        reference.sample([p], [chain.m], [chain.h], [torch.ones(1)], ess=1.0, **chain.prior)
        assert p.isfinite().all()


def test_the_floor_is_needed_in_float32():
    """Without it the adversary of δ = .37, ρ = .99 brings h+δ to 0 within 30 steps."""
    delta, rho = np.float32(0.37), np.float32(0.99)
    h, lowest = np.float32(1), math.inf
    for _ in range(30):
        u = h + delta
        lowest = min(lowest, u)
        if u <= 0:
            break
        r = rho * (np.float32(worst(0.99)) * u - delta - h)
        h = h + r + r * r / (2 * u)
    assert lowest <= 0
    chain = Chain(0.37, 0.99, 1.0, torch.float32)
    for _ in range(60):
        chain.step(worst(0.99))
    assert chain.u.item() == pytest.approx(2**-20 * 1.37, abs=2**-25)  # the rounding of h at -δ


def test_lowering_weight_decay_in_mid_run_keeps_h_plus_delta_positive():
    chain = Chain(1.0, 0.9, 0.1, torch.float32)
    for _ in range(8):
        chain.step(worst(0.9))
    assert chain.h.item() < -0.9
    chain.prior["weight_decay"] = 0.01
    assert chain.h.item() + 0.01 < 0
    assert chain.u.item() == pytest.approx(2**-20 * 0.11, rel=1e-6)
    chain.step(1.0)  # ĥ = h: nothing to do, and (h−ĥ)²/(h+δ) must not catapult h
    assert chain.u.item() == pytest.approx(2**-20 * 0.11, rel=1e-2)
    for ratio in (worst(0.9), 1.0, 3.0):
        chain.step(ratio)
        assert chain.u.item() >= 2**-20 * 0.11 * (1 - 1e-6)
        assert chain.m.isfinite().all()


def test_the_floor_touches_nothing_above_it():
    h = torch.tensor([1e-4, 0.3, 7.0])
    assert torch.equal(reference.curvature(h, hess_init=1.0, weight_decay=0.25), h + 0.25)


# -- precision and visibility ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_minus_beta2_is_taken_in_double(dtype):
    """In float32 1 − .99999 is 1.00136e-05: h would move 0.14 % too far."""
    h = torch.zeros(1, dtype=dtype)
    m, g, nothing = (torch.zeros(1, dtype=dtype) for _ in range(3))
    product = torch.full((1,), 100.0, dtype=dtype)
    s = USUAL | {"ess": 1.0, "hess_init": 1.0, "weight_decay": 1.0, "betas": (0.9, 0.99999)}
    reference.update([m], [nothing], [product], [g], [h], [torch.zeros(())], **s)
    exact = 1e-5 * 100 + 0.5e-10 * 100**2  # u = 1, ĥ = 100
    assert h.item() == pytest.approx(exact, rel=2e-7 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
@pytest.mark.parametrize("clip_radius", [math.inf, 0.1])
def test_nan_and_infinity_stay_visible_where_they_are(hess_approx, clip_radius):
    s = USUAL | {"hess_approx": hess_approx, "clip_radius": clip_radius, "gradsq_scale": 1.0}
    m, g, h, t = torch.ones(6), torch.zeros(6), torch.full((6,), 0.7), torch.zeros(())
    displacement = torch.tensor([0.1, 0.1, -0.1, 0.1, 0.1, 0.1])
    for bad in ([math.nan, math.inf, math.inf, -math.inf, 1.0, 2.0], [1.0] * 6):
        grad = torch.tensor(bad)
        product = reference.product(grad, displacement, hess_approx)
        reference.update([m], [grad], [product], [g], [h], [t], **s)
        for x in (m, g, h):
            assert x.isfinite().tolist()[4:] == [True, True]
        assert m.isfinite().tolist() == [False] * 4 + [True, True]
        assert g.isfinite().tolist() == [False] * 4 + [True, True]
