"""The noise is the published generator, the stated layout, and normal.

Statistical checks use fixed seeds: a result beyond four standard errors is a fault, not bad luck.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from posterity.ops import noise
from posterity.ops.noise import box_muller, draw_key, normals, threefry

MASK = 2**32 - 1
WORD = st.integers(0, MASK)
SEED = st.integers(-(2**63), 2**64 - 1)
quick = settings(deadline=None, max_examples=50)


# -- an implementation of its own: integers in Python, floating point in double precision ----------


def threefry_py(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Salmon et al. 2011, section 3.2 and table 2, one block at a time."""
    schedule = [key[0], key[1], 0x1BD11BDA ^ key[0] ^ key[1]]
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    a, b = (counter[0] + schedule[0]) & MASK, (counter[1] + schedule[1]) & MASK
    for r in range(13):
        a = (a + b) & MASK
        distance = rotations[r % 8]
        b = ((b << distance) & MASK | b >> (32 - distance)) ^ a
        if r % 4 == 3:
            n = r // 4 + 1
            a, b = (a + schedule[n % 3]) & MASK, (b + schedule[(n + 1) % 3] + n) & MASK
    return a, b


def words(value: int) -> tuple[int, int]:
    value %= 2**64
    return value & MASK, value >> 32


def gauss(x0: np.ndarray, x1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box–Muller of uint32 words: both become float32 as the layout says, the rest is exact."""
    u = ((x0 >> 1).astype(np.float32) + np.float32(0.5)).astype(np.float64) * 2.0**-31
    radius = np.sqrt(-2 * np.log(u))
    offset = (x1 << np.uint32(2)).astype(np.int32).astype(np.float32).astype(np.float64)
    offset *= math.pi / 4 * 2.0**-31
    cos, sin = np.cos(offset), np.sin(offset)
    turns = x1 >> np.uint32(30)
    cos, sin = np.where(turns & 1, -sin, cos), np.where(turns & 1, cos, sin)
    sign = np.where(turns & 2, -1.0, 1.0)
    return sign * radius * cos, sign * radius * sin


def expected(seed: int, draw: int, parameter: int, elements: range) -> np.ndarray:
    key = (0, 0)
    for word in (seed, draw, parameter):
        key = threefry_py(key, words(word))
    values = []
    for element in elements:
        chunk, place = divmod(element, 256)
        x = threefry_py(key, words(128 * chunk + place % 128))
        pair = gauss(*(np.array([w], dtype=np.uint32) for w in x))
        values.append(pair[place // 128][0])
    return np.array(values)


def int32(values) -> torch.Tensor:
    return torch.from_numpy(np.atleast_1d(np.array(values, dtype=np.uint32)).view(np.int32))


def uint32(x: torch.Tensor) -> np.ndarray:
    return x.numpy().view(np.uint32)


def ulps(z: torch.Tensor, exact: np.ndarray) -> float:
    """The largest error in units of the last place of a float32."""
    error = np.abs(z.numpy().astype(np.float64) - exact)
    return float((error / np.spacing(np.abs(exact).astype(np.float32))).max())


# -- the integers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "out"),
    [
        ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        ((MASK, MASK), (MASK, MASK), (0xFD36D048, 0x2D17272C)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_known_answers_of_random123(counter, key, out):
    """threefry2x32 of 13 rounds in kat_vectors of the Random123 distribution."""
    x = threefry(*(int32(k) for k in key), *(int32(c) for c in counter))
    assert tuple(int(uint32(w)[0]) for w in x) == out
    assert threefry_py(key, counter) == out


@quick
@given(st.tuples(WORD, WORD), st.lists(st.tuples(WORD, WORD), min_size=1, max_size=5))
def test_integers_equal_an_independent_implementation(key, counters):
    c0, c1 = (int32(c) for c in zip(*counters, strict=True))
    x0, x1 = threefry(int32(key[0]), int32(key[1]), c0, c1)
    assert list(zip(uint32(x0), uint32(x1), strict=True)) == [threefry_py(key, c) for c in counters]
    assert uint32(c0).tolist() == [c[0] for c in counters]  # the counters are left as they were


def test_keys_and_counters_broadcast():
    rows, lanes = torch.arange(3, dtype=torch.int32)[:, None], torch.arange(4, dtype=torch.int32)
    table = threefry(rows, rows + 7, lanes, lanes[:1])
    for i in range(3):
        for j in range(4):
            one = threefry(rows[i], rows[i] + 7, lanes[j], lanes[0])
            assert [t[i, j] for t in table] == list(one)


@quick
@given(SEED, SEED, SEED)
def test_key_is_three_folds(seed, draw, parameter):
    key = (0, 0)
    for word in (seed, draw):
        key = threefry_py(key, words(word))
    assert noise.fold_int(noise.fold_int((0, 0), seed), draw) == key
    made = draw_key(seed, draw)
    assert [int(uint32(w[None])[0]) for w in made] == list(key)
    folded = noise.fold(made, torch.tensor([noise._signed(parameter, 64)]))
    assert [int(uint32(w)[0]) for w in folded] == list(threefry_py(key, words(parameter)))


# -- the normals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "draw", "parameter", "start"),
    [
        (0, 0, 0, 0),
        (1, 2, 3, 100),
        (2**63 - 1, 10**12, 2**40 + 1, 2**31 - 200),
        (-1, -1, 2**64 - 1, 2**33 - 300),  # the counter's high word changes on the way
        (2**64 - 1, -7, -1, 2**62 + 17),
    ],
)
def test_normals_follow_the_layout_within_4_ulp(seed, draw, parameter, start):
    (z,) = normals(draw_key(seed, draw), [parameter], [600], [start])
    assert z.dtype == torch.float32
    assert z.shape == (600,)
    assert ulps(z, expected(seed, draw, parameter, range(start, start + 600))) <= 4


def run_box_muller(x0: np.ndarray, x1: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = torch.empty(2, len(x0))
    box_muller(int32(x0), int32(x1), cos, sin)
    return cos, sin


def test_box_muller_within_4_ulp_on_many_bits():
    bits = np.random.default_rng(0).integers(0, 2**32, (2, 2_000_000), dtype=np.uint32)
    assert max(map(ulps, run_box_muller(*bits), gauss(*bits))) <= 4


def test_box_muller_within_4_ulp_at_the_edges():
    """u next to 0 (|z| up to 6.66) and 1 (tiny |z|), angles next to 0 (tiny too) and ±π/4."""
    near = (-600, -70, -3, -2, -1, 0, 1, 2, 3)
    edge = np.array([at + by & MASK for at in range(0, 2**32, 2**29) for by in near], np.uint32)
    x0, x1 = (g.ravel() for g in np.meshgrid(edge, edge))
    made, exact = run_box_muller(x0, x1), gauss(x0, x1)
    sizes = np.abs(np.concatenate(exact))
    assert sizes.max() > 6.6
    assert 0 < sizes[sizes > 0].min() < 1e-8
    assert max(map(ulps, made, exact)) <= 4
    assert all(bool(z.isfinite().all()) for z in made)


def test_u_of_one_gives_zero_and_the_least_u_the_largest_value():
    cos, sin = run_box_muller(np.array([MASK, 0]), np.array([5, 0]))
    assert cos[0] == 0 == sin[0]
    assert float(cos[1]) == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)


# -- pure functions of (seed, draw, parameter, element) --------------------------------------------

PIECE = st.tuples(
    SEED,  # the parameter
    st.one_of(st.integers(0, 700), st.sampled_from([0, 1, 127, 128, 129, 255, 256, 257, 512])),
    st.one_of(
        st.integers(0, 1000),
        st.integers(0, 2**62),
        st.tuples(st.sampled_from([2**32, 2**33, 2**40]), st.integers(-300, 9)).map(sum),
    ),
)


@quick
@given(PIECE, st.integers(0, 600), st.integers(0, 600))
def test_any_slice_equals_the_whole(piece, before, after):
    parameter, count, start = piece
    before = min(before, start)
    key = draw_key(3, 5)
    (part,) = normals(key, [parameter], [count], [start])
    (whole,) = normals(key, [parameter], [before + count + after], [start - before])
    assert torch.equal(part, whole[before : before + count])


@quick
@given(st.lists(PIECE, max_size=6), st.sampled_from([1, 2, 3, 2048]))
def test_many_tensors_at_once_equal_each_alone_whatever_the_block(pieces, block):
    key = draw_key(3, 5)
    alone = [normals(key, [p], [n], [s])[0] for p, n, s in pieces]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "BLOCK", block)
        parameters, counts, starts = ([p[i] for p in pieces] for i in range(3))
        together = normals(key, parameters, counts, starts)
    assert [len(z) for z in together] == counts
    assert all(map(torch.equal, together, alone))


def test_block_borders_change_nothing():
    key, count = draw_key(0, 0), noise.CHUNK * noise.BLOCK * 2 + 77
    (whole,) = normals(key, [1], [count])
    border = noise.CHUNK * noise.BLOCK
    (part,) = normals(key, [1], [1000], [border - 500])
    assert torch.equal(part, whole[border - 500 : border + 500])


def test_starts_default_to_zero_and_nothing_gives_nothing():
    key = draw_key(0, 0)
    assert torch.equal(normals(key, [4], [10])[0], normals(key, [4], [10], [0])[0])
    assert normals(key, [], []) == []
    assert [len(z) for z in normals(key, [0, 1], [0, 0])] == [0, 0]


def test_threads_change_no_bit():
    threads = torch.get_num_threads()
    made = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            made.append(normals(draw_key(1, 1), [0, 1], [300_000, 70_001])[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_the_draw_may_be_a_tensor():
    for draw in (0, 1, -1, 2**31, -(2**40), 2**63 - 1):
        words = draw_key(9, torch.tensor(draw)), draw_key(9, draw)
        assert all(map(torch.equal, *words))


def test_all_64_bits_count_and_no_more():
    def sample(seed=0, draw=0, parameter=0):
        return tuple(normals(draw_key(seed, draw), [parameter], [4])[0].tolist())

    values = [0, 1, 2, -1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1, -(2**63)]
    for name in ("seed", "draw", "parameter"):
        assert len({sample(**{name: v}) for v in values}) == len(values)
        for v in values:
            assert sample(**{name: v}) == sample(**{name: v % 2**64})
    # the three words are not interchangeable
    assert len({sample(1, 0, 0), sample(0, 1, 0), sample(0, 0, 1)}) == 3


def test_draws_of_evaluation_are_not_those_of_training():
    draws = [*range(200), *(-1 - i for i in range(200))]
    firsts = {tuple(normals(draw_key(0, d), [0], [2])[0].tolist()) for d in draws}
    assert len(firsts) == len(draws)


# -- normal, and independent -----------------------------------------------------------------------

N = 20_000_000


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    """20 million: 200 draws of 10 tensors of 10,000."""
    keys = (draw_key(2024, d) for d in range(200))
    return torch.cat([z for k in keys for z in normals(k, range(10), [10_000] * 10)]).numpy()


def test_moments_1_to_6(many):
    """The k-th moment's standard error is √((E z^2k − (E z^k)²)/n)."""
    moment = [math.prod(range(k - 1, 0, -2)) if k % 2 == 0 else 0 for k in range(13)]
    z, power = many.astype(np.float64), np.ones(N)
    for k in range(1, 7):
        power *= z
        error = math.sqrt((moment[2 * k] - moment[k] ** 2) / N)
        assert abs(power.mean() - moment[k]) < 4 * error, k


def test_kolmogorov_smirnov(many):
    assert stats.kstest(many[:2_000_000], "norm").pvalue > 1e-3
    assert stats.kstest(np.abs(many[-1_000_000:]), "halfnorm").pvalue > 1e-3


@pytest.mark.parametrize("bound", [3, 4, 5])
def test_tails(many, bound):
    for side in (many, -many):
        tail = N * stats.norm.sf(bound)
        assert abs(np.count_nonzero(side > bound) - tail) < 4 * math.sqrt(tail)


def correlated(a: np.ndarray, b: np.ndarray) -> float:
    """The largest correlation of values and squares, in standard errors (1/√n)."""
    pairs = [(a, b), (a**2 - 1, b**2 - 1), (a, b**2 - 1), (a**2 - 1, b)]
    return max(abs(float(np.corrcoef(x, y)[0, 1])) * math.sqrt(a.size) for x, y in pairs)


@pytest.mark.parametrize("lag", [1, 2, 64, 127, 128, 129, 256])
def test_elements_are_independent(lag):
    """128 apart within a chunk are the cosine and the sine of one angle with one radius."""
    (z,) = normals(draw_key(7, 0), [0], [2_000_000])
    z = z.double().numpy()
    if lag == 128:
        pairs = z[: z.size // 256 * 256].reshape(-1, 2, 128)
        assert correlated(pairs[:, 0].ravel(), pairs[:, 1].ravel()) < 4
    assert correlated(z[:-lag], z[lag:]) < 4


@pytest.mark.parametrize(
    "other",
    [(8, 0, 0), (7 + 2**32, 0, 0), (7, 1, 0), (7, -1, 0), (7, 0, 1), (7, 0, 2**32), (0, 7, 0)],
)
def test_seeds_draws_and_parameters_are_independent(other):
    def sample(seed, draw, parameter):
        return normals(draw_key(seed, draw), [parameter], [500_000])[0].double().numpy()

    assert correlated(sample(7, 0, 0), sample(*other)) < 4


def test_first_elements_of_many_streams_are_independent():
    """A stream is mostly used from its start: sequential seeds, draws and parameters."""
    first = [torch.stack(normals(draw_key(0, d), range(400), [2] * 400)) for d in range(250)]
    z = torch.stack(first).double().numpy()
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    assert correlated(z[1:].ravel(), z[:-1].ravel()) < 4
    assert correlated(z[:, 1:].ravel(), z[:, :-1].ravel()) < 4
