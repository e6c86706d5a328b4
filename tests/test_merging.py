"""Merging: closed forms, what each rule becomes in the limit, invariants, files, wrong input."""

import itertools
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posterity import IVON, Mixture, Posterior, merge, predict
from posterity.merging import METHODS, Marginal, average, fisher, hessian, merge_files
from posterity.merging import product as product_of
from posterity.merging import task_arithmetic as arithmetic
from test_posterior import bits, forge, parts

SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "scalar": ()}
OWN = ("hessian", "product", "task_arithmetic", "average", "fisher")  # PEFT's are slow to import
PEFT = ("ties", "dare_linear", "dare_ties")
EXACT = {"rtol": 1e-13, "atol": 1e-13}


def make(seed, dtype=torch.float32, **kwargs):
    """A posterior over SHAPES; its prior precision is .5. Number 0 is a base, wider than others."""
    low, high = (1, 10) if seed else (0.6, 1)
    rng = torch.Generator().manual_seed(seed)
    mean = {n: torch.randn(s, generator=rng).to(dtype) for n, s in SHAPES.items()}
    precision = {
        n: torch.rand(s, generator=rng).mul(high - low).add(low).to(dtype)
        for n, s in SHAPES.items()
    }
    kwargs = {"prior_precision": 0.5, "ess": 10.0 + seed, "settings": {"seed": seed}} | kwargs
    return Posterior(mean, precision, **kwargs)


def models(number=3, **kwargs):
    return [make(seed, **kwargs) for seed in range(1, number + 1)]


def based(method):
    return {"base": make(0)} if METHODS[method].base else {}


def close(one, other, **tolerance):
    for part in ("mean", "precision"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part), **tolerance)


# --- closed forms ----------------------------------------------------------------------------


@dataclass
class Regression:
    """Linear regression with an orthogonal design: the posterior is diagonal, and known."""

    x: torch.Tensor
    y: torch.Tensor

    def posterior(self, prior):
        (x, y), (m, p) = (self.x, self.y), (prior.mean["w"], prior.precision["w"])
        data = x.T @ x
        assert (data - data.diag().diag()).abs().max() < 1e-12
        precision = data.diag() + p
        mean = (p * m + x.T @ y) / precision
        return Posterior(
            {"w": mean},
            {"w": precision},
            prior_mean={"w": m},
            prior_precision={"w": p},
            ess=len(x),
        )

    def __add__(self, other):
        return Regression(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))


def regression(seed, n=20, d=6):
    rng = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, d, generator=rng, dtype=torch.float64))
    scale = torch.rand(d, generator=rng, dtype=torch.float64) * 3 + 0.5
    return Regression(q * scale, torch.randn(n, generator=rng, dtype=torch.float64))


def gaussian_prior(d=6):
    rng = torch.Generator().manual_seed(9)
    mean = torch.randn(d, generator=rng, dtype=torch.float64)
    precision = torch.rand(d, generator=rng, dtype=torch.float64) + 0.5
    return Posterior(
        {"w": mean}, {"w": precision}, prior_mean={"w": mean}, prior_precision={"w": precision}
    )


@pytest.mark.parametrize("method", ["hessian", "product"])
def test_two_data_sets_merge_to_the_exact_joint_posterior(method):
    prior, a, b = gaussian_prior(), regression(1), regression(2)
    merged = merge([a.posterior(prior), b.posterior(prior)], base=prior, method=method)
    joint = (a + b).posterior(prior)
    close(merged, joint, **EXACT)
    torch.testing.assert_close(merged.hessian(), joint.hessian(), **EXACT)
    assert merged.kl() == pytest.approx(joint.kl(), rel=1e-12)
    assert merged.ess == joint.ess == 40
    assert (joint.mean["w"] - a.posterior(prior).mean["w"]).abs().max() > 0.1


@pytest.mark.parametrize("method", ["hessian", "product"])
def test_models_finetuned_from_a_posterior_merge_to_the_exact_joint_posterior(method):
    """The base has seen data: its posterior is what finetuning took for the prior."""
    prior, (first, a, b) = gaussian_prior(), map(regression, range(3))
    base = first.posterior(prior)
    merged = merge([a.posterior(base), b.posterior(base)], base=base, method=method)
    joint = (first + a + b).posterior(prior)
    close(merged, joint, **EXACT)
    torch.testing.assert_close(merged.hessian(), joint.hessian(), **EXACT)
    assert merged.ess == joint.ess == 60


@pytest.mark.parametrize("method", ["hessian", "fisher"])
def test_weights_are_data_sizes_where_a_hessian_is_a_mean_over_examples(method):
    """λ = 1 says so: the data count by their mean, and the weight brings their number."""
    prior, sizes = gaussian_prior(), [20, 50]
    summed = [regression(k, n).posterior(prior) for k, n in enumerate(sizes)]
    own = {"prior_mean": prior.mean, "prior_precision": prior.precision, "ess": 1.0}
    meant = [
        Posterior(q.mean, {"w": q.hessian()["w"] / n + prior.precision["w"]}, **own)
        for q, n in zip(summed, sizes, strict=True)
    ]
    how = {"method": method} | ({"base": prior} if method == "hessian" else {})
    merged, expected = merge(meant, weights=sizes, **how), merge(summed, **how)
    close(merged, expected, **EXACT)
    assert merged.ess == expected.ess == 70


def test_a_weight_in_the_product_repeats_the_data():
    prior, a = gaussian_prior(), regression(1)
    merged = merge([a.posterior(prior)], base=prior, method="product", weights=[3])
    close(merged, (a + a + a).posterior(prior), **EXACT)
    assert merged.ess == 60


def gaussians(number=4, seed=0, d=7):
    rng = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(d, generator=rng, dtype=torch.float64)

    return [
        Marginal(draw(), draw().exp() + 0.3, torch.tensor(0.3, dtype=torch.float64))
        for _ in range(number)
    ]


def constant(qs, value, prior):
    width = torch.full_like(qs[0].mean, value)
    return [Marginal(q.mean, width, torch.tensor(prior, dtype=torch.float64)) for q in qs]


def test_task_arithmetic_is_zero_hessians_beside_a_constant_one():
    base, *tasks = gaussians()
    base = constant([base], 2.7, 0.0)[0]
    flat = constant(tasks, 0.4, 0.4)  # H_t = 0
    weights = [1.0] * 3
    for alpha in (0.3, 1.0, -0.5):
        assert_same(hessian(flat, base, weights, alpha), arithmetic(tasks, base, weights, alpha))


def test_average_is_equal_constant_hessians_no_base_and_alpha_one_over_t():
    base, *tasks = gaussians()
    nothing = Marginal(base.mean, torch.zeros_like(base.mean), torch.tensor(0.0))
    equal = constant(tasks, 2.7, 0.0)
    weights = [1.0] * 3
    mean, _ = hessian(equal, nothing, weights, 1 / 3)
    torch.testing.assert_close(mean, base.mean + (average(tasks, None, weights, 1)[0] - base.mean))
    assert_same(hessian(equal, nothing, weights, 1 / 3), average(equal, None, weights, 1))


def test_fisher_is_no_hessian_of_the_base():
    base, *tasks = gaussians()
    nothing = Marginal(base.mean, torch.zeros_like(base.mean), torch.tensor(0.0))
    weights = [1.0, 20.0, 0.5]
    assert_same(hessian(tasks, nothing, weights, 1), fisher(tasks, None, weights, 1))


def test_hessian_from_the_shared_prior_is_the_product():
    base, *tasks = gaussians()
    tasks = [Marginal(q.mean, q.precision + base.precision, base.precision) for q in tasks]
    weights = [1.0] * 3
    assert_same(hessian(tasks, base, weights, 1), product_of(tasks, base, weights, 1))


def assert_same(one, other):
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_formulas_by_hand():
    base, *tasks = gaussians(3)
    (a, b), alpha, s = tasks, 0.7, [2.0, 5.0]
    h = [s[0] * (a.precision - 0.3), s[1] * (b.precision - 0.3)]
    full = alpha * (h[0] + h[1]) + base.precision
    mean = base.mean + alpha * (
        (h[0] + base.precision) / full * (a.mean - base.mean)
        + (h[1] + base.precision) / full * (b.mean - base.mean)
    )
    assert_same(hessian(tasks, base, s, alpha), (mean, full))
    full = a.precision + b.precision - base.precision
    pull = a.precision * a.mean + b.precision * b.mean - base.precision * base.mean
    assert_same(product_of(tasks, base, [1.0, 1.0], 1), (pull / full, full))
    mean, precision = average(tasks, None, s, 1)
    assert_same((mean, precision), ((2 * a.mean + 5 * b.mean) / 7,
                                    (2 * a.precision + 5 * b.precision) / 7))  # fmt: skip
    mean, precision = fisher(tasks, None, s, 1)
    assert_same((mean, precision), ((h[0] * a.mean + h[1] * b.mean) / (h[0] + h[1]), h[0] + h[1]))


# --- invariants ------------------------------------------------------------------------------

SEEDS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from(OWN), st.randoms())
def test_the_order_of_models_does_not_matter(seeds, method, random):
    given_order = [(make(seed), 0.5 + seed) for seed in seeds]
    shuffled = random.sample(given_order, len(given_order))

    def merged(pairs):
        qs, weights = zip(*pairs, strict=True)
        return merge(qs, method=method, weights=weights, **based(method))

    one, other = merged(given_order), merged(shuffled)
    close(one, other, rtol=1e-6, atol=1e-6)
    assert one.ess == pytest.approx(other.ess)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 99), st.integers(1, 5))
def test_a_model_merged_with_itself(seed, times):
    q, base = make(seed, dtype=torch.float64), make(0, dtype=torch.float64)
    same = [q] * times
    tight = {"rtol": 1e-12, "atol": 1e-12}
    close(merge(same, method="average"), q, **tight)
    assert merge(same, method="average").ess == pytest.approx(q.ess)
    fishers = merge(same, method="fisher")
    torch.testing.assert_close(fishers.mean, q.mean, **tight)
    torch.testing.assert_close(fishers.hessian(), {n: times * h for n, h in q.hessian().items()})
    for method in ("hessian", "task_arithmetic"):
        again = merge(same, method=method, alpha=1 / times, base=base)
        torch.testing.assert_close(again.mean, q.mean, **tight)
    alone = merge([q], base=base, method="product")
    close(alone, q, **tight)  # the prior over the prior


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 99), st.sampled_from(OWN), st.floats(-3, 3).map(lambda x: 10**x))
def test_units_of_the_weights_and_of_the_loss_do_not_matter(seed, method, scale):
    """θ → cθ scales means by c and precisions by 1/c²; the loss times c scales precisions by c."""
    qs = [make(seed + i, dtype=torch.float64) for i in range(3)]
    base = make(0, dtype=torch.float64)

    def changed(q, by, width):
        return Posterior(
            {n: m * by for n, m in q.mean.items()},
            {n: p * width for n, p in q.precision.items()},
            prior_precision={n: p * width for n, p in q.prior_precision.items()},
        )

    def merged(by, width):
        how = {"base": changed(base, by, width)} if METHODS[method].base else {}
        return merge([changed(q, by, width) for q in qs], method=method, **how)

    plain, tight = merged(1, 1), {"rtol": 1e-9, "atol": 1e-9 * min(scale, 1)}
    for by, width in ((scale, scale**-2), (1, scale)):
        close(merged(by, width), changed_by(plain, by, width), **tight)


def changed_by(q, by, width):
    return Posterior(
        {n: m * by for n, m in q.mean.items()}, {n: p * width for n, p in q.precision.items()}
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 99), st.sampled_from(("average", "fisher")))
def test_averages_lie_between_the_models(seed, method):
    qs = [make(seed + i) for i in range(3)]
    merged = merge(qs, method=method, weights=[1, 2, 3])
    for name, m in merged.mean.items():
        held = torch.stack([q.mean[name] for q in qs])
        assert (m <= held.amax(0) + 1e-6).all()
        assert (m >= held.amin(0) - 1e-6).all()


def test_averages_do_not_change_with_the_scale_of_the_weights():
    for method in ("average", "fisher"):
        one, ten = (merge(models(), method=method, weights=[k, 2 * k, 3 * k]) for k in (1, 10))
        torch.testing.assert_close(one.mean, ten.mean)


# --- what a merged posterior carries ---------------------------------------------------------


def test_the_prior_is_the_bases_and_sizes_follow_the_precision():
    base = make(0, prior_mean={n: torch.tensor(0.25) for n in SHAPES}, ess=None)
    qs = models()  # λ = 11, 12, 13
    for method in ("hessian", "product", "task_arithmetic"):
        merged = merge(qs, base=base, method=method)
        assert bits(merged.prior_mean) == bits(base.prior_mean)
        assert bits(merged.prior_precision) == bits(base.prior_precision)
    assert merge(qs, base=base).ess == 36
    assert merge(qs, base=base, alpha=0.5, weights=[1, 2, 3]).ess == 0.5 * (11 + 24 + 39)
    assert merge(qs, base=make(0, ess=100.0)).ess == 136
    assert merge(qs, base=base, method="product").ess == 36
    assert merge(qs, base=base, method="task_arithmetic").ess is None
    assert merge(qs, base=make(0, ess=100.0), method="task_arithmetic").ess == 100
    assert merge([*qs, make(4, ess=None)], base=base).ess is None
    plain, weighted = merge(qs, method="average"), merge(qs, method="average", weights=[1, 2, 1])
    assert (plain.ess, weighted.ess) == (12, 12)
    assert (plain.prior_mean, plain.prior_precision) == (None, None)
    found = merge(qs, method="fisher")
    assert found.ess == 36
    assert bits(found.hessian()) == bits(found.precision)
    bare = make(0, prior_precision=None)
    assert merge(qs, base=bare).prior_precision is None


def test_settings_record_what_was_merged():
    merged = merge(models(2), base=make(0), alpha=0.5, weights=(2, 3))
    assert merged.settings == {
        "merged": {
            "method": "hessian",
            "alpha": 0.5,
            "weights": [2.0, 3.0],
            "number": 2,
            "models": [{"ess": 10.0 + k, "settings": {"seed": k}} for k in (1, 2)],
            "base": {"ess": 10.0, "settings": {"seed": 0}},
        }
    }
    assert json.loads(json.dumps(merged.settings)) == merged.settings


def test_buffers():
    def at(k):
        return make(
            k,
            buffers={
                "running_mean": torch.tensor([float(k), 1.0]),
                "half": torch.tensor([1.0, k]).bfloat16(),
                "num_batches_tracked": torch.tensor(10 * k),
                "mask": torch.tensor([[0.0, -math.inf], [0.0, 0.0]]),
                "frozen": torch.tensor([0.1, 0.7], dtype=torch.float64),
                "rotations": torch.polar(
                    torch.ones(2), torch.rand(2, generator=torch.manual_seed(0))
                ),
            },
        )

    merged = merge([at(1), at(2), at(6)], base=make(0), weights=[1, 1, 8])
    assert merged.buffers["running_mean"].tolist() == [3, 1]
    assert merged.buffers["half"].tolist() == [1, 3]
    assert merged.buffers["half"].dtype == torch.bfloat16
    assert merged.buffers["num_batches_tracked"] == 60
    for name in ("mask", "frozen", "rotations"):  # to the bit
        assert torch.equal(merged.buffers[name], at(1).buffers[name])
    with pytest.raises(ValueError, match=r"posterior 1 and posterior 0 .*buffer/frozen, buffer"):
        merge([at(1), make(2)], base=make(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay_and_sums_are_float64(dtype):
    merged = merge(models(dtype=dtype), base=make(0, dtype=dtype))
    assert {t.dtype for t in (*merged.mean.values(), *merged.precision.values())} == {dtype}
    wide = merge([q.to(torch.float64) for q in models(dtype=dtype)],
                 base=make(0, dtype=dtype).to(torch.float64))  # fmt: skip
    close(merged, wide.to(dtype), rtol=0, atol=0)
    mixed = [make(1, dtype=torch.bfloat16), make(2)]
    both = [merge(order, base=make(0)) for order in (mixed, mixed[::-1])]
    assert {m.dtype for q in both for m in q.mean.values()} == {torch.float32}


def test_inputs_are_not_touched_nor_shared():
    qs, base = models(), make(0)
    before = [parts(q) for q in (*qs, base)]
    merged = merge(qs, base=base, method="task_arithmetic")
    for part in (merged.mean, merged.precision, merged.prior_precision):
        for tensor in part.values():
            tensor.fill_(7.0)
    assert [parts(q) for q in (*qs, base)] == before


def test_it_predicts_and_merges_again():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    opt = IVON(model.parameters(), 0.1, ess=50)
    base, found = opt.posterior(model), []
    for seed in range(2):
        x = torch.randn(50, 3, generator=torch.Generator().manual_seed(seed))
        with opt.sampled_params(train=True):
            model(x).square().mean().backward()
        opt.step()
        found.append(opt.posterior(model))
    merged = merge(found, base=base)
    assert predict(model, merged, torch.randn(5, 3), samples=4).probs.isfinite().all()
    assert merge([merged, found[0]], base=base).ess == 50 + (150 + 50)
    deep = merge([merged, found[0]], base=base).settings["merged"]["models"][0]["settings"]
    assert deep["merged"]["number"] == 2


# --- PEFT's rules ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", PEFT)
def test_ties_and_dare_are_pefts(method):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    qs, base = models(), make(0)
    how = {"base": base, "method": method, "weights": [1, -2, 3], "alpha": 0.5, "density": 0.4}
    state = torch.get_rng_state()
    merged = merge(qs, **how, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert bits(merged.mean) == bits(merge(qs, **how, seed=3).mean)
    assert bits(merged.precision) == bits(base.precision)
    others = bits(merge(qs, **how, seed=4).mean) != bits(merged.mean)
    assert others == (method != "ties")
    if method == "ties":
        name = "a.weight"
        moves = [(q.mean[name].double() - base.mean[name].double()) for q in qs]
        moved = merge_utils.ties(moves, torch.tensor([1.0, -2.0, 3.0]).double(), 0.4)
        expected = (base.mean[name].double() + 0.5 * moved).float()
        assert torch.equal(merged.mean[name], expected)
    assert merged.settings["merged"]["density"] == 0.4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The density 1.0 is")
def test_dare_is_unbiased_and_without_pruning_task_arithmetic():
    pytest.importorskip("peft")
    qs, base = models(), make(0)
    plain = merge(qs, base=base, method="task_arithmetic", alpha=0.5)
    whole = merge(qs, base=base, method="dare_linear", alpha=0.5, density=1.0)
    close(whole, plain)
    draws = [merge(qs, base=base, method="dare_linear", alpha=0.5, density=0.5, seed=i).mean
             for i in range(300)]  # fmt: skip
    for name, m in plain.mean.items():
        drawn = torch.stack([draw[name] for draw in draws])
        error = (drawn.mean(0) - m).abs() / (drawn.std(0) / math.sqrt(300))
        assert error.max() < 4.5


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.utils", None)
    with pytest.raises(ImportError, match="'ties' needs PEFT: pip install peft"):
        merge(models(), base=make(0), method="ties", density=0.5)


# --- wrong input -----------------------------------------------------------------------------


def without(q, name):
    return Posterior(*({n: t for n, t in part.items() if n != name}
                       for part in (q.mean, q.precision)), prior_precision=0.5)  # fmt: skip


WRONG = {
    "nothing": (lambda: {"posteriors": []}, "nothing to merge"),
    "method": (lambda: {"method": "mean"}, "unknown method 'mean'; there are hessian, product"),
    "no base": (lambda: {"base": None}, "'hessian' needs a base"),
    "product without": (lambda: {"base": None, "method": "product"}, "'product' needs a base"),
    "useless base": (lambda: {"method": "average"}, "'average' uses no base"),
    "alpha nan": (lambda: {"alpha": math.nan}, "alpha=nan must be finite"),
    "alpha unused": (lambda: {"alpha": 0.5, "method": "product"}, "alpha=0.5 is not used"),
    "few weights": (lambda: {"weights": [1.0]}, "needs 2 positive finite weights"),
    "nan weights": (lambda: {"weights": [1, math.nan]}, "needs 2 positive finite weights"),
    "zero weights": (lambda: {"weights": [1, 0]}, "needs 2 positive finite weights"),
    "infinite weights": (
        lambda: {"weights": [1, math.inf], "method": "task_arithmetic"},
        "needs 2 finite weights",
    ),
    "density": (lambda: {"density": 0.5}, "uses no density"),
    "no density": (lambda: {"method": "ties"}, r"needs a density in \(0, 1\], not None"),
    "density 0": (lambda: {"method": "ties", "density": 0.0}, "needs a density"),
    "names": (
        lambda: {"posteriors": [make(1), without(make(2), "scalar")]},
        "posterior 1 and posterior 0 have different names: mean/scalar, precision/scalar",
    ),
    "base's names": (lambda: {"base": without(make(0), "a.bias")}, "base and posterior 0 .*a.bias"),
    "shapes": (
        lambda: {"posteriors": [make(1), reshaped(make(2))]},
        r"posterior 1 and posterior 0 differ in shape: mean/a.bias \(1,\) and \(5,\)",
    ),
    "base's shapes": (lambda: {"base": reshaped(make(0))}, "base and posterior 0 differ in shape"),
    "no prior": (
        lambda: {"posteriors": [make(1), make(2, prior_precision=None)]},
        r"posterior 1: its prior is unknown.*prior_precision",
    ),
    "pruned": (lambda: {"posteriors": [make(1), make(2).prune(1.0)]}, "posterior 1 is pruned"),
    "base pruned": (lambda: {"base": make(0).prune(1.0)}, "base is pruned"),
    "mixture": (lambda: {"posteriors": [make(1), Mixture([make(2)])]}, "posterior 1 is no Post"),
}


def reshaped(q):
    mean, precision = ({**part, "a.bias": torch.ones(1)} for part in (q.mean, q.precision))
    return Posterior(mean, precision, prior_precision=0.5)


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_input_is_one_clear_error(fault):
    changes, message = WRONG[fault]
    arguments = {"posteriors": models(2), "base": make(0), "method": "hessian"} | changes()
    posteriors = arguments.pop("posteriors")
    with pytest.raises(ValueError, match=message) as error:
        merge(posteriors, **arguments)
    assert "\n" not in str(error.value)


def test_a_precision_that_is_not_positive_names_the_tensor():
    narrow = make(0)
    narrow = Posterior(narrow.mean, {**narrow.precision, "a.bias": torch.full((5,), 50.0)})
    with pytest.raises(ValueError, match=r"not positive: a\.bias\. The base is narrower"):
        merge(models(2), base=narrow, method="product")  # 2·≤10 − 50
    zero = Posterior({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 0.5])}, prior_precision=0.5)
    with pytest.raises(ValueError, match=r"not positive: w.*take method 'hessian' with a base"):
        merge([zero, zero], method="fisher")
    with pytest.raises(ValueError, match="not positive"):
        merge(models(2), base=make(0), alpha=-100)


def test_a_precision_beyond_the_dtype_is_an_error():
    great = Posterior({"w": torch.ones(1)}, {"w": torch.full((1,), 3e38)}, prior_precision=0.0)
    with pytest.raises(ValueError, match="not finite: w"):
        merge([great, great], method="fisher")


def test_adapters_of_other_names_are_told_apart_from_other_models():
    def adapter(name, layer="layers.0"):
        ones = {f"{layer}.q_proj.lora_{k}.{name}.weight": torch.ones(2, 2) for k in "AB"}
        ones |= {f"{layer}.embed.lora_embedding_A.{name}": torch.ones(2)}
        return Posterior(ones, ones, prior_precision=0.5)

    with pytest.raises(ValueError, match=r"only by the adapter's name \(default and imdb\)"):
        merge([adapter("default"), adapter("imdb")], method="average")
    with pytest.raises(ValueError, match="have different names: mean/layers"):
        merge([adapter("default"), adapter("default", "layers.1")], method="average")


# --- files -----------------------------------------------------------------------------------


def saved(folder, posteriors):
    paths = [folder / f"{i}.safetensors" for i in range(len(posteriors))]
    for path, posterior in zip(paths, posteriors, strict=True):
        posterior.save(path)
    return paths


def full(seed, **kwargs):
    """With a wide and a narrow dtype among the buffers, and prior means."""
    buffers = {"mean": torch.tensor([0.1 * seed]), "n": torch.tensor(seed), "b": torch.tensor(True)}
    prior = {n: torch.tensor(0.25) for n in SHAPES}
    return make(seed, buffers=buffers, prior_mean=prior, **kwargs)


@pytest.mark.parametrize("method", [*OWN, *(pytest.param(m, marks=pytest.mark.slow) for m in PEFT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_merge_to_the_bytes_of_the_memorys(tmp_path, method, dtype):
    if method in PEFT:
        pytest.importorskip("peft")
    base, *paths = saved(tmp_path, [full(seed, dtype=dtype) for seed in range(4)])
    how = {"method": method, "weights": [1, 2, 3]}
    how |= {"alpha": 0.5} if METHODS[method].alpha else {}
    how |= {"density": 0.5} if method in PEFT else {}
    if not METHODS[method].base:
        base = None
    facts = merge_files(paths, tmp_path / "out", base=base, **how)
    merged = merge([Posterior.load(p) for p in paths], base=base and Posterior.load(base), **how)
    merged.save(tmp_path / "memory")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "memory").read_bytes()
    again = Posterior.load(tmp_path / "out")
    assert parts(again) == parts(merged)
    assert facts == {"ess": again.ess, "settings": again.settings}


def test_a_file_may_be_merged_into_itself(tmp_path):
    paths = saved(tmp_path, models(2))
    expected = merge(models(2), method="average")
    merge_files(paths, paths[0], method="average")
    assert bits(Posterior.load(paths[0]).mean) == bits(expected.mean)


MEASURED = """
import sys
from pathlib import Path
from posterity import Posterior, merge
from posterity.merging import merge_files
how, folder = sys.argv[1], Path(sys.argv[2])
base, *paths = sorted(folder.glob("?.safetensors"))

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

small = folder / "small"  # what the first use of anything costs
merge_files([small], small, base=small)
before = peak()
if how == "files":
    merge_files(paths, folder / "out", base=base)
else:
    merge([Posterior.load(p) for p in paths], base=Posterior.load(base)).save(folder / "out")
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_files_are_merged_with_one_tensor_of_each_in_memory(tmp_path):
    """6 models and a base of 12 tensors of 1 MB, mean and precision: 168 MB."""
    make(1).save(tmp_path / "small")
    value = {f"w{i}": torch.full((512, 512), 1.5) for i in range(12)}
    saved(tmp_path, [Posterior(value, value, prior_precision=0.5)] * 7)
    used = {}
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc keeps what is freed
    for how in ("files", "memory"):
        run = [sys.executable, "-c", MEASURED, how, str(tmp_path)]
        done = subprocess.run(run, env=at_once, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        used[how] = float(done.stdout)
    # one tensor of each: 14 MB of the files and 28 in float64; the rule's own are 2 MB each
    assert used["files"] < 60, used
    assert used["memory"] > 168, used  # that it is measured at all


def test_a_truncated_file_is_one_error_and_writes_nothing(tmp_path):
    paths = saved(tmp_path, models(2))
    base, whole = saved(tmp_path, [make(0)])[0].rename(tmp_path / "base"), paths[1].read_bytes()
    make(1).save(paths[0])
    for length in [*range(0, len(whole) - 1, 211), len(whole) - 1]:
        paths[1].write_bytes(whole[:length])
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=r"cannot load .*1\.safetensors"):
            merge_files(paths, tmp_path / "out", base=base)
        assert sorted(tmp_path.iterdir()) == before


FORGED = {
    "missing precision": ({"mean/v": torch.ones(1)}, "different names: v"),
    "foreign part": ({"momentum/w": torch.ones(2)}, "cannot load .*momentum"),
    "nan": ({"mean/w": torch.tensor([1, math.nan])}, "not finite: w"),
    "shape": ({"precision/w": torch.ones(3)}, "cannot load .*differ in shape: w"),
    "negative": ({"precision/w": torch.tensor([1.0, -9.0])}, "not positive: w"),
}


@pytest.mark.parametrize("fault", FORGED)
def test_a_damaged_file_is_one_error_and_writes_nothing(tmp_path, fault):
    tensors, message = FORGED[fault]
    ones = {"w": torch.ones(2)}
    (path,) = saved(tmp_path, [Posterior(ones, ones)])
    forge(tmp_path / "forged", tensors)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        merge_files([path, tmp_path / "forged"], tmp_path / "out", method="average")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(FileNotFoundError):
        merge_files([path, tmp_path / "none"], tmp_path / "out", method="average")
    Mixture([Posterior(ones, ones)]).save(tmp_path / "mixture")
    with pytest.raises(ValueError, match=r"mixture: its format is posterity\.mixture"):
        merge_files([path, tmp_path / "mixture"], tmp_path / "out", method="average")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_leaves_no_half_file(tmp_path):
    value = {"w": torch.ones(100_000), "v": torch.ones(100_000)}
    paths = saved(tmp_path, [Posterior(value, value)] * 2)
    (tmp_path / "out").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            merge_files(paths, tmp_path / "out", method="average")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "out").read_bytes() == b"old"


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interruption_leaves_no_half_file(tmp_path, monkeypatch, after):
    from posterity import merging

    paths, calls = saved(tmp_path, models(2)), itertools.count()
    before, rule = sorted(tmp_path.iterdir()), average

    def interrupted(*arguments):
        if next(calls) == after:
            raise KeyboardInterrupt
        return rule(*arguments)

    found = METHODS["average"]._replace(rule=interrupted)
    monkeypatch.setitem(merging.METHODS, "average", found)
    if after < len(SHAPES):
        with pytest.raises(KeyboardInterrupt):
            merge_files(paths, tmp_path / "out", method="average")
        assert sorted(tmp_path.iterdir()) == before
    else:
        merge_files(paths, tmp_path / "out", method="average")


# --- adapters --------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_adapters_merge_by_the_names_that_peft_gives_and_predict(tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from test_peft import LORA, TOKENS, adapted, adapter, trained

    model = adapted()  # both begin with the same A
    start = {n: p.detach().clone() for n, p in adapter(model)}
    prior = IVON([p for _, p in adapter(model)], 0.1, ess=1).posterior(adapter(model))
    width = {n: torch.full_like(m, 10.0) for n, m in prior.mean.items()}
    base = Posterior(start, width, prior_mean=start, prior_precision=width)
    paths = []
    for seed in range(2):
        model.load_state_dict(start, strict=False)
        tokens = TOKENS.roll(seed, 0)[: 4 + seed]
        found, _ = trained(model, tokens=tokens, seed=seed)
        paths.append(tmp_path / f"{seed}.safetensors")
        found.save(paths[-1])
    qs = [Posterior.load(path) for path in paths]
    merged = merge(qs, base=base)
    assert set(merged.names) == {n for n, _ in adapter(model)}
    moved = [n for n, m in merged.mean.items() if not torch.equal(m, base.mean[n])]
    assert any("lora_A" in n for n in moved)
    assert any("lora_B" in n for n in moved)
    found = predict(model, merged, {"input_ids": TOKENS}, samples=4)
    assert found.probs.isfinite().all()
    assert found.mutual_information.max() > 1e-5
    # the mean of A and of B is not the mean of BA
    plain = merge(qs, method="average")
    b = next(n for n in plain.names if "lora_B" in n)
    a = b.replace("lora_B", "lora_A")
    apart = sum(q.mean[b] @ q.mean[a] for q in qs) / 2
    together = plain.mean[b] @ plain.mean[a]
    assert (apart - together).abs().max() > 1e-3 * apart.abs().max()
    second = peft.get_peft_model(model.unload(), peft.LoraConfig(**LORA), adapter_name="imdb")
    other = {n: torch.ones_like(p) for n, p in adapter(second)}
    with pytest.raises(ValueError, match="differ only by the adapter's name"):
        merge([qs[0], Posterior(other, other)], method="average")
