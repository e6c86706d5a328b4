"""The noise on 10^8 draws: moments, distribution, tails and independence, by standard errors."""

import math

import pytest
import torch

from posterity.ops import cpu, noise

if cpu.missing():
    pytest.skip("10^8 draws take the fused pass", allow_module_level=True)

N, PART = 100_000_000, 4_000_000
BOUND, WIDTH = 7.0, 1e-3  # of the histogram


def drawn(n, start=0, seed=1, draw=0, number=0):
    out = [torch.empty(n)]
    cpu.passes.normals(noise.Noise(seed, draw, 1, [number], out, [[(start, len(out[0]))]]), out)
    return out[0]


def phi(x):
    return torch.special.ndtr(x.double())


@pytest.fixture(scope="module")
def summed():
    """Raw moments 1 to 6 of the draws and their histogram."""
    moments, counts = torch.zeros(6, dtype=torch.float64), torch.zeros(14_000, dtype=torch.float64)
    for start in range(0, N, PART):
        z = drawn(PART, start)
        counts += torch.histc(z, 14_000, -BOUND, BOUND).double()
        z = z.double()
        power = torch.ones_like(z)
        for k in range(6):
            power *= z
            moments[k] += power.sum()
    return moments / N, counts


@pytest.mark.parametrize("k", range(1, 7))
def test_moments(k, summed):
    """E z^k is (k−1)!! for even k, else 0; z^k has variance E z^2k − (E z^k)²."""

    def moment(k):
        return math.prod(range(k - 1, 0, -2)) if k % 2 == 0 else 0

    error = math.sqrt((moment(2 * k) - moment(k) ** 2) / N)
    assert abs(summed[0][k - 1] - moment(k)) < 4 * error


def test_kolmogorov_smirnov(summed):
    """The largest distance of the distribution functions, at the histogram's edges."""
    counts = summed[1]
    assert counts.sum() == N  # none lies beyond
    edges = -BOUND + WIDTH * torch.arange(1, len(counts) + 1, dtype=torch.float64)
    distance = (counts.cumsum(0) / N - phi(edges)).abs().max()
    assert distance * math.sqrt(N) < 1.95  # p = .001


@pytest.mark.parametrize("sigmas", [3, 4, 5])
@pytest.mark.parametrize("side", [-1, 1])
def test_tails(side, sigmas, summed):
    counts = summed[1] if side < 0 else summed[1].flip(0)
    found = counts[: round((BOUND - sigmas) / WIDTH)].sum()
    expected = N * phi(torch.tensor(-float(sigmas)))
    assert abs(found - expected) < 4 * expected.sqrt()


NEIGHBOURS = {
    "the next element": {"start": 1},
    "the sine beside the cosine": {"start": noise.HALF},
    "the next chunk": {"start": noise.CHUNK},
    "the next parameter": {"number": 1},
    "the next draw": {"draw": 1},
    "an evaluation draw": {"draw": -1},
    "the next seed": {"seed": 2},
    "a seed that differs in its high word": {"seed": 1 + 2**32},
}


@pytest.mark.parametrize("other", NEIGHBOURS)
def test_neighbours_are_independent(other):
    """Neither they nor their squares are correlated."""
    n, change = 10_000_000, NEIGHBOURS[other]
    a, b = drawn(n).double(), drawn(n, **change).double()
    for x, y in ((a, b), ((a.square() - 1) / math.sqrt(2), (b.square() - 1) / math.sqrt(2))):
        assert abs((x * y).mean()) < 4 / math.sqrt(n)
