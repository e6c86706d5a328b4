"""Where the answer is known: Bayesian linear regression, and expectations that can be integrated.

Every bound is four standard errors, derived beside it; seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import gamma, kstest
from sklearn.datasets import load_diabetes
from torch import Tensor

from posterity import IVON
from posterity.ops import noise, reference

CHAINS = 1000  # independent runs side by side, the rows of one parameter


class Regression(NamedTuple):
    """y = xᵀθ + noise of variance s²: ℓ̄(θ) = mean (y − xᵀθ)²/2s², of Hessian H = XᵀX/(N s²)."""

    x: Tensor
    y: Tensor
    delta: float = 0.05
    variance: float = 0.5  # s², known

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def hessian(self) -> Tensor:
        return self.x.T @ self.x / (self.n * self.variance)

    @property
    def linear(self) -> Tensor:
        return self.x.T @ self.y / (self.n * self.variance)

    @property
    def exact_mean(self) -> Tensor:
        """Of the posterior, and of the best diagonal Gaussian too."""
        ridge = self.delta * torch.eye(self.x.shape[1])
        return torch.linalg.solve(self.hessian + ridge, self.linear)

    @property
    def exact_std(self) -> Tensor:
        """Of the best diagonal Gaussian: 1/√(λ(diag H + δ))."""
        return (self.n * (self.hessian.diagonal() + self.delta)).rsqrt()

    def loss(self, weights: Tensor) -> Tensor:
        """ℓ̄ of each row of weights, summed: the rows do not touch each other."""
        misses = self.x @ weights.T - self.y[:, None]
        return misses.square().mean(0).sum() / (2 * self.variance)

    def quick_loss(self) -> Callable[[Tensor], Tensor]:
        """The same but for a constant, without running through the data each time."""
        half, linear = self.hessian / 2, self.linear
        return lambda weights: (weights * (weights @ half - linear)).sum()


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def diabetes() -> Regression:
    """Standardised, then scaled apart, so that no two diagonal elements of H are equal."""
    x, y = load_diabetes(return_X_y=True)
    x, y = ((a - a.mean(0)) / a.std(0) for a in (x, y))
    x = np.c_[x * np.linspace(0.6, 1.6, x.shape[1]), np.ones(len(x))]
    return Regression(torch.tensor(x), torch.tensor(y))


def step(opt: IVON, weights: torch.nn.Parameter, loss: Callable[[Tensor], Tensor]) -> None:
    def closure():
        opt.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    opt.step(closure)


def test_the_quick_loss_is_the_loss(diabetes):
    w = torch.randn(3, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (slow,) = torch.autograd.grad(diabetes.loss(w), w)
    (quick,) = torch.autograd.grad(diabetes.quick_loss()(w), w)
    assert torch.allclose(slow, quick, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("store_mean", [True, False])
def test_regression_converges_to_the_best_gaussian(store_mean, diabetes):
    """The chains' mean is the exact posterior mean, and their h the exact diagonal of H.

    Both are read off after the last step. With R independent chains the standard error of an
    average is the chains' standard deviation over √R.

    The mean: ĝ is linear in ε, so E ĝ = ∇ℓ̄(m), and the stationary law is symmetric about the
    exact mean (under ε → −ε): no bias. Decaying lr makes the chains' spread small beside σ.

    h: stationarity of (4) gives E h = H_ii + ½ρ·E(ĥ−h)²/(H_ii+δ): the second term is the
    Riemannian step's, of first order in ρ. With ĥ_i = ĝ_i ε_i/σ_i and ĝ = ∇ℓ̄(m) + Hσε, and
    ∇ℓ̄(m) = −δm at the exact mean, the variance of ĥ_i is
    V_i = H_ii² + Σ_j H_ij²σ_j²/σ_i² + (δm_i)²/σ_i², and h's is ρV/(2−ρ).
    """
    hessian, exact, std = diabetes.hessian, diabetes.exact_mean, diabetes.exact_std
    diagonal, u = hessian.diagonal(), hessian.diagonal() + diabetes.delta
    weights = torch.nn.Parameter(torch.zeros(CHAINS, len(exact)))
    width = {"ess": diabetes.n, "hess_init": 5.0, "weight_decay": diabetes.delta}
    opt = IVON([weights], 1.0, **width, rescale_lr=False, store_mean=store_mean, seed=0)
    group, loss = opt.param_groups[0], diabetes.quick_loss()
    rho = 0.008
    for lr, decay, steps in ((1.0, 0.01, 500), (0.1, 0.02, 80), (0.02, rho, 650)):
        group["lr"], group["betas"] = lr, (0.9, 1 - decay)
        for _ in range(steps):
            step(opt, weights, loss)

    m, h = weights.detach(), opt.state[weights]["hess"]
    error = m.std(0) / math.sqrt(CHAINS)
    assert (error < 0.005 * std).all()  # the test has power
    assert ((m.mean(0) - exact).abs() < 4 * error).all()

    cross = hessian.square() @ std.square()
    variance = diagonal**2 + (cross + (diabetes.delta * exact) ** 2) / std.square()
    spread = rho / (2 - rho) * variance
    bias = 0.5 * rho * (variance + spread) / u
    error = h.std(0) / math.sqrt(CHAINS)
    assert (error < 0.005 * diagonal).all()
    assert ((h.mean(0) - diagonal - bias).abs() < 4 * error).all()
    assert ((h.std(0) / spread.sqrt() - 1).abs() < 4 / math.sqrt(2 * CHAINS)).all()

    # what the posterior says: σ² = 1/(λ(h+δ)) is the mean-field optimum
    named = opt.posterior([("weights", weights)]).std()["weights"].square()
    error = named.std(0) / math.sqrt(CHAINS)
    shift = std.square() * (spread / u.square() - bias / u)  # E 1/u to second order
    assert ((named.mean(0) - std.square() - shift).abs() < 4 * error).all()


# -- the estimator of the Hessian ------------------------------------------------------------------


WIDTH = {"ess": 30.0, "hess_init": 1.0, "weight_decay": 0.05}
PRIOR = {k: WIDTH[k] for k in ("hess_init", "weight_decay")}


def price_estimates(
    gradient: Callable[[Tensor], Tensor], m: Tensor, h: Tensor, draws: int
) -> Tensor:
    """ĥ of many draws (rows), by the functions that make it in training: (2)."""
    rows = (draws, len(m))
    normals = noise.normals(noise.draw_key(11, 0), [0], [draws * len(m)])
    theta, wide = torch.empty(rows), h.expand(rows)
    reference.sample([theta], [m.expand(rows)], [wide], normals, **WIDTH)
    product = reference.product(gradient(theta), theta - m, "price")
    return product * (WIDTH["ess"] * reference.curvature(h, **PRIOR))


def assert_mean(estimates: Tensor, exact: Tensor, precision: float) -> None:
    """Within four standard errors, and the standard error below ``precision`` of the value."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert (error < precision * exact.abs()).all()
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all()


def test_price_is_unbiased_for_a_quadratic(diabetes):
    """E ĝ(θ−m)/σ² = diag H, whatever m and h."""
    h = torch.linspace(0.2, 2.0, 11)
    m = diabetes.exact_mean + 0.1

    def gradient(theta):
        return theta @ diabetes.hessian - diabetes.linear

    estimates = price_estimates(gradient, m, h, 400_000)
    assert_mean(estimates, diabetes.hessian.diagonal(), 0.01)


def test_price_is_unbiased_for_logistic_regression(diabetes):
    """E ĥ = E_q ∂²ℓ̄/∂θ_i² = mean_n x_i² E[p(1−p)](f_n), f_n = xᵀθ ~ N(xᵀm, Σ x_i²σ_i²): quadrature.

    The logits are wide enough that the Hessian at the mean is another one: that would be seen.
    """
    x = diabetes.x[:60, ::2]
    y = (diabetes.y[:60] > 0).double()
    m, h = torch.linspace(-1.0, 1.5, 6), torch.linspace(0.1, 1.0, 6)
    sigma = 1 / (WIDTH["ess"] * (h + WIDTH["weight_decay"])).sqrt()

    def gradient(theta):
        return (torch.sigmoid(theta @ x.T) - y) @ x / len(x)

    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
    logits = (x @ m)[:, None] + (x.square() @ sigma.square()).sqrt()[:, None] * nodes
    p = torch.sigmoid(logits)
    curvatures = (p * (1 - p)) @ weights / math.sqrt(2 * math.pi)
    exact = curvatures @ x.square() / len(x)

    estimates = price_estimates(gradient, m, h, 600_000)
    assert_mean(estimates, exact, 0.03)
    at_mean = torch.sigmoid(x @ m)
    error = estimates.std(0) / math.sqrt(len(estimates))
    there = (at_mean * (1 - at_mean)) @ x.square() / len(x)
    assert ((there - exact).abs() > 4 * error).any()


def test_price_by_finite_differences_of_the_expected_loss(diabetes):
    """E_q ∂²f = ∂²/∂m² E_q f, for f that does not factor: a small network's loss of two weights."""
    x, y = diabetes.x[:20, 2], diabetes.y[:20]
    m, h = torch.tensor([0.5, -0.8]), torch.tensor([0.3, 0.6])
    sigma = 1 / (WIDTH["ess"] * (h + WIDTH["weight_decay"])).sqrt()

    def loss(theta):  # of each row: y ≈ b·tanh(a·x)
        return (theta[:, 1:] * torch.tanh(theta[:, :1] * x) - y).square().mean(1)

    def gradient(theta):
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(loss(theta).sum(), theta)[0]

    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(40))
    grid = torch.cartesian_prod(nodes, nodes) * sigma
    mass = (weights[:, None] * weights).flatten() / (2 * math.pi)

    def expected(shift):
        return mass @ loss(m + shift + grid)

    e, unit = 1e-3, torch.eye(2)
    exact = torch.stack(
        [(expected(e * v) - 2 * expected(0 * v) + expected(-e * v)) / e**2 for v in unit]
    )
    assert_mean(price_estimates(gradient, m, h, 500_000), exact, 0.02)


# -- samples ---------------------------------------------------------------------------------------


def test_antithetic_pairs_leave_the_gradient_at_the_mean(diabetes):
    """For a quadratic the mean of ĝ at m ± σε is ∇ℓ̄(m); and in ĥ the term ∇ℓ̄(m)·ε/σ is gone."""
    start = torch.linspace(-1, 1, 11)
    w = torch.nn.Parameter(start[None].clone())
    width = {"ess": diabetes.n, "hess_init": 2.0, "weight_decay": diabetes.delta}
    opt = IVON([w], 0.1, **width, betas=(0.0, 0.0), mc_samples=2, antithetic=True, seed=0)
    step(opt, w, diabetes.loss)
    assert opt.param_groups[0]["draws"] == 1
    slope = diabetes.hessian @ start - diabetes.linear
    assert torch.allclose(opt.state[w]["momentum"][0], slope, rtol=1e-9, atol=1e-12)

    (normal,) = noise.normals(noise.draw_key(0, 0), [0], [11])
    product = diabetes.hessian @ normal.double() * normal  # ε ⊙ Hε: no ∇ℓ̄(m) in it
    r = product - 2.0
    h = 2.0 + r + r**2 / (2 * (2.0 + diabetes.delta))  # (4) at ρ = 1
    assert torch.allclose(opt.state[w]["hess"][0], h, rtol=1e-9)


def test_a_single_sample_does_not(diabetes):
    """What the pair removes is there in the first place."""
    start = torch.linspace(-1, 1, 11)
    w = torch.nn.Parameter(start[None].clone())
    opt = IVON([w], 0.1, ess=diabetes.n, betas=(0.0, 0.0), seed=0, hess_init=2.0)
    step(opt, w, diabetes.loss)
    slope = diabetes.hessian @ start - diabetes.linear
    assert ((opt.state[w]["momentum"][0] - slope).abs() > 1e-4).all()


def test_a_thousand_samples_have_the_mean_and_variance_of_the_posterior():
    """s.e. of the mean σ/√n, of the variance σ²√(2/(n−1)); Σz² over all elements is χ²."""
    n, size, ess, delta = 1000, 300, 40.0, 0.3
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for dtype in (torch.float32, torch.float64):
        w = torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype))
        pairs[w] = (0.01 + 3 * torch.rand(size, generator=generator)).to(dtype)
    opt = IVON(pairs, 0.1, ess=ess, weight_decay=delta, seed=1)
    opt.posterior(zip("ab", pairs, strict=True))  # makes the state
    means = [w.detach().clone() for w in pairs]
    for w, h in pairs.items():
        opt.state[w]["hess"].copy_(h)
    samples = []
    for _ in range(n):
        with opt.sampled_params():
            samples.append(torch.cat([w.detach().double() for w in pairs]))
        assert all(map(torch.equal, pairs, means))
    drawn = torch.stack(samples)
    variance = 1 / (ess * (torch.cat([h.double() for h in pairs.values()]) + delta))
    z_mean = (drawn.mean(0) - torch.cat(means)) / (variance / n).sqrt()
    z_variance = (drawn.var(0) / variance - 1) / math.sqrt(2 / (n - 1))
    for z in (z_mean, z_variance):
        assert abs(z.mean()) < 4 / math.sqrt(2 * size)
        assert abs(z.square().mean() - 1) < 4 * math.sqrt(2 / (2 * size))
        assert z.abs().max() < 4.5  # of 600: once in 250 such tests


@pytest.mark.parametrize("slope", [0.0, 3.0])
@pytest.mark.parametrize("antithetic", [False, True])
def test_what_antithetic_pairs_do_to_the_variance(antithetic, slope):
    """For ℓ(θ) = aθ²/2 of slope g at the mean: from two samples ĝ has variance (aσ)²/2, from a pair
    none; ĥ = gε/σ + aε² (2) has (g/σ)²/2 + a² from two, and 2a² from a pair, for ε² is the same.

    A pair removes the slope's noise altogether, which is most of it away from the optimum; at the
    optimum two samples are better.
    """
    a, n, sigma, rho = 2.0, 50_000, 0.2, 1e-6
    mean = torch.full((n,), slope / a, dtype=torch.float64)
    w = torch.nn.Parameter(mean.clone())
    h0 = 1 / (10 * sigma**2)
    opt = IVON(
        [w], 0.0, ess=10, hess_init=h0, weight_decay=0.0, betas=(0.0, 1 - rho), debias=False,
        mc_samples=2, antithetic=antithetic, seed=0,
    )  # fmt: skip

    def closure():
        opt.zero_grad()
        loss = a * w.square().sum() / 2
        loss.backward()
        return loss

    opt.step(closure)
    ghat, hhat = opt.state[w]["momentum"], (opt.state[w]["hess"] - h0) / rho + h0
    pair = {"ĝ": 0.0, "ĥ": 2 * a**2}
    two = {"ĝ": (a * sigma) ** 2 / 2, "ĥ": (slope / sigma) ** 2 / 2 + a**2}
    for (name, expected), found in zip(
        (pair if antithetic else two).items(), (ghat, hhat), strict=True
    ):
        squares = (found - found.mean()).square()
        assert abs(squares.mean() - expected) <= 4 * squares.std() / math.sqrt(n) + 1e-4, name
    assert abs(hhat.mean() - a) < 4 * hhat.std() / math.sqrt(n) + 1e-4


@pytest.mark.parametrize("share", [0.05, 0.5, 4.0])
def test_bf16_training_estimates_the_curvature_by_what_was_drawn(share):
    """Of aθ²/2 with σ a share of bf16's spacing u: σε is unbiased over weights anywhere between two
    bf16 values; what rounding left of it is too large by the rounding's variance u²/12 over σ².
    """
    a, n, spacing = 2.0, 200_000, 2.0**-7
    sigma = share * spacing
    mean = 1 + torch.rand(n, generator=torch.Generator().manual_seed(0))
    width = {"ess": 1.0, "hess_init": sigma**-2, "weight_decay": 0.0}
    h, normals = torch.full((n,), sigma**-2), noise.normals(noise.draw_key(3, 0), [0], [n])
    theta = torch.empty(n, dtype=torch.bfloat16)
    reference.sample([theta], [mean], [h], normals, **width)
    applied = theta.float() - mean
    grad = (a * applied).bfloat16()
    sums, products = torch.zeros(2, n)
    reference.accumulate([sums], [products], [grad], [mean], [h], normals, "price", **width)
    ratio = 1 + 1 / (12 * share**2)
    for estimate, expected in ((products, a), (grad.float() * applied, a * ratio)):
        estimate = estimate / sigma**2
        error = estimate.std() / math.sqrt(n)
        assert error < 0.02 * expected
        assert abs(estimate.mean() - expected) < 4 * error


@pytest.mark.parametrize("curvature", [0.6, 0.0])
def test_the_law_of_h_where_gradients_are_noisy(curvature):
    """Gradients Hθ + sn, n standard normal: by (2), (4) and (7) in small steps, h + δ = u follows
    du = (H + δ + λs²/2M − u)/M dt + (s/M)√(λu) dW, whose law is in the end a Gamma's. By Itô's rule
    d log u = ((H + δ)/u − 1)/M dt + …: then E[1/u] = 1/(H + δ), and σ² is right on average.
    """
    n, memory, ess, s, delta = 10_000, 200, 1e4, 0.1, 1e-4
    noise_alone = ess * s**2 / (2 * memory)
    mean, shape = curvature + delta + noise_alone, 1 + (curvature + delta) / noise_alone
    w = torch.nn.Parameter(torch.zeros(n))
    settings = {"betas": (0.9, 1 - 1 / memory), "weight_decay": delta, "rescale_lr": False}
    opt = IVON([w], 1e-30, ess=ess, hess_init=mean, seed=1, **settings)  # the mean stays
    generator = torch.Generator().manual_seed(0)
    for _ in range(6 * memory):
        with opt.sampled_params(train=True):
            w.grad = curvature * w.detach() + s * torch.randn(n, generator=generator)
        opt.step()
    found = opt.state[w]["hess"].double() + delta
    assert abs(found.mean() - mean) < 4 * mean / math.sqrt(shape * n)
    assert kstest(found.numpy(), gamma(shape, scale=mean / shape).cdf).pvalue > 1e-3
    wrong = gamma(1 + shape, scale=mean / (1 + shape)).cdf
    assert kstest(found.numpy(), wrong).pvalue < 1e-9  # it can tell
    if shape > 2:  # else the variance of 1/u is infinite
        error = 1 / (curvature + delta) / math.sqrt((shape - 2) * n)
        assert abs((1 / found).mean() - 1 / (curvature + delta)) < 4 * error
