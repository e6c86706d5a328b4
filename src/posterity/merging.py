"""Several posteriors of one network become one, without training (docs/maths.md).

A rule says what becomes of one tensor; :func:`merge` applies it name by name, :func:`merge_files`
does so with one tensor of each model in memory. Both are one code path, and give the same bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .binding import Tensors, some
from .posterior import PREFIXES, Posterior, _number
from .storage import loaded, save, stored

__all__ = ["METHODS", "merge", "merge_files"]


class Marginal(NamedTuple):
    """One tensor of a posterior, in float64."""

    mean: Tensor
    precision: Tensor
    prior: Tensor  # its precision; 0 where unknown

    @property
    def hessian(self) -> Tensor:
        """The data's Hessian."""
        return self.precision - self.prior


Models = Sequence[Marginal]
Weights = Sequence[float]
Merged = tuple[Tensor, Tensor]  # mean and precision of one tensor


def _total(weights: Weights, values: Iterable[Tensor]) -> Tensor:
    """Σ_t w_t v_t."""
    return reduce(add, (w * v for w, v in zip(weights, values, strict=True)))


def hessian(models: Models, base: Marginal, weights: Weights, alpha: float) -> Merged:
    """θ0 + α Σ_t H̄⁻¹(s_tH_t + H_0 + δ0)(θ_t − θ0), precision H̄ = α Σ_r s_rH_r + H_0 + δ0."""
    own = base.precision  # H_0 + δ0
    precision = own + alpha * _total(weights, (q.hessian for q in models))
    pulls = (
        (w * q.hessian + own) * (q.mean - base.mean) for q, w in zip(models, weights, strict=True)
    )
    return base.mean + alpha * reduce(add, pulls) / precision, precision


def product(models: Models, base: Marginal, weights: Weights, alpha: float) -> Merged:
    """p Π_t (q_t/p)^s_t: precision P = P_0 + Σ_t s_t(P_t − P_0), θ0 + P⁻¹ Σ_t s_tP_t(θ_t − θ0)."""
    precision = base.precision + _total(weights, (q.precision - base.precision for q in models))
    pull = _total(weights, (q.precision * (q.mean - base.mean) for q in models))
    return base.mean + pull / precision, precision


def task_arithmetic(models: Models, base: Marginal, weights: Weights, alpha: float) -> Merged:
    """θ0 + α Σ_t w_t(θ_t − θ0), the base's precision: H_t = 0 beside a constant H_0."""
    return base.mean + alpha * _total(weights, (q.mean - base.mean for q in models)), base.precision


def average(models: Models, base: None, weights: Weights, alpha: float) -> Merged:
    """Σ_t w_tθ_t / Σ_t w_t, and so the precisions: equal constant H_t, no base, α = 1/T."""
    parts = ([q.mean for q in models], [q.precision for q in models])
    mean, precision = (_total(weights, part) / sum(weights) for part in parts)
    return mean, precision


def fisher(models: Models, base: None, weights: Weights, alpha: float) -> Merged:
    """H⁻¹ Σ_t s_tH_tθ_t, precision H = Σ_t s_tH_t: no base, H_0 = δ0 = 0."""
    precision = _total(weights, (q.hessian for q in models))
    return _total(weights, (q.hessian * q.mean for q in models)) / precision, precision


def sparsified(
    rule: str,
    models: Models,
    base: Marginal,
    weights: Weights,
    alpha: float,
    *,
    density: float,
    seed: int,
) -> Merged:
    """θ0 + α·rule(θ_t − θ0), a rule of ``peft.utils.merge_utils``; the base's precision."""
    try:
        from peft.utils import merge_utils  # pyright: ignore
    except ImportError:
        raise ImportError(f"method {rule!r} needs PEFT: pip install peft") from None
    moves = [(q.mean - base.mean).cpu() for q in models]  # one generator, whatever the device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scale = torch.tensor(weights, dtype=torch.float64)
        moved = getattr(merge_utils, rule)(moves, scale, density)
    return base.mean + alpha * moved.to(base.mean.device), base.precision


class Method(NamedTuple):
    """A rule, what it takes, and how precisions (and with them λ) join."""

    rule: Callable[..., Merged]
    joins: Literal["sum", "mean", "base"]
    base: bool = True
    alpha: bool = True
    density: bool = False
    hessians: bool = False  # the models' priors must be known


METHODS: dict[str, Method] = {
    "hessian": Method(hessian, "sum", hessians=True),
    "product": Method(product, "sum", alpha=False),
    "task_arithmetic": Method(task_arithmetic, "base"),
    "average": Method(average, "mean", base=False, alpha=False),
    "fisher": Method(fisher, "sum", base=False, alpha=False, hessians=True),
    **{
        name: Method(partial(sparsified, name), "base", density=True)
        for name in ("ties", "dare_linear", "dare_ties")
    },
}


def merge(
    posteriors: Sequence[Posterior],
    *,
    base: Posterior | None = None,
    method: str = "hessian",
    alpha: float = 1.0,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Posterior:
    r"""One posterior from several of the same network, element by element and without training.

    Args:
        posteriors: at least one, of the same names and shapes; of a mixture its ``components``.
        base: where the models were finetuned from, θ0 with precision H_0 + δ0; for ``product``
            the prior that they share. ``average`` and ``fisher`` take none.
        method: by the gradients' mismatch, ``"hessian"``
            θ0 + α Σ_t H̄⁻¹(s_tH_t + H_0 + δ0)(θ_t − θ0), H̄ = α Σ_r s_rH_r + H_0 + δ0; the Gaussian
            ``"product"`` of the posteriors over the prior counted once; ``"task_arithmetic"``
            θ0 + α Σ_t w_t(θ_t − θ0); ``"average"`` Σ_t w_tθ_t / Σ_t w_t; ``"fisher"``
            (Σ_t s_tH_t)⁻¹ Σ_t s_tH_tθ_t; PEFT's ``"ties"``, ``"dare_linear"`` and ``"dare_ties"``
            of the task vectors θ_t − θ0, tensor by tensor.
        alpha: α, for ``hessian`` and the methods of task vectors.
        weights: one per posterior, default 1. In ``hessian``, ``product`` and ``fisher`` s_t: it
            multiplies what the data say, H_t. Leave it at 1 for IVON, whose H_t = λh is a sum over
            examples already; it is the number of examples where H_t is a mean over them. Elsewhere
            w_t multiplies the weights θ_t or the task vectors; there it may be negative.
        density: the share of each task vector's tensor that ties and dare keep, in (0, 1].
        seed: of what dare keeps.

    H_t is ``posterior.hessian()``, precision − prior precision. For squared gradients pass them as
    ``Posterior(mean, precision=squares + floor, prior_precision=floor)``.

    The merged precision is what the rule takes for the curvature of the merged loss: H̄; of the
    product, P_0 + Σ_t s_t(P_t − P_0); Σ_t s_tH_t; the mean precision; with task vectors, where
    nothing is known of H_t, the base's. ``ess`` follows it: (α) Σ_t s_tλ_t, and λ_0 if known; the
    mean; the base's; None where unknown. The prior is the base's; flat for ``fisher``; unknown for
    ``average``. Buffers, of the same names in all models, are their plain mean (BatchNorm's
    statistics: :func:`posterity.update_bn` makes better ones), counters and masks the largest; the
    base's are not used. ``settings`` records arguments and inputs. Sums run in float64.

    A mixture needs no merging and is often better, but costs as many models:
    :class:`posterity.Mixture`. Of LoRA, A and B are merged each for itself, and the product of
    means is not the mean of products BA.

    Raises:
        ValueError: no posteriors, other names or shapes, an argument that the method lacks or does
            not use, a prior that it needs unknown, pruned posteriors (merge first, then prune), or
            a merged precision that is not positive; each with the names.
        ImportError: ties or dare without PEFT.

    Example:
        >>> import torch
        >>> from posterity import Posterior, merge
        >>> prior = Posterior({"w": torch.zeros(1)}, {"w": torch.ones(1)}, prior_precision=1.0)
        >>> a = Posterior({"w": torch.ones(1)}, {"w": torch.full((1,), 4.0)}, prior_precision=1.0)
        >>> b = Posterior({"w": -torch.ones(1)}, {"w": torch.full((1,), 2.0)}, prior_precision=1.0)
        >>> merged = merge([a, b], base=prior)
        >>> merged.mean["w"], merged.precision["w"]  # (4·1 − 2·1) / 5, and 3 + 1 + 1
        (tensor([0.4000]), tensor([5.]))

    Source: Daheim et al. 2024, arXiv 2310.12808; task vectors: Ilharco et al. 2023, arXiv
    2212.04089; fisher: Matena and Raffel 2022, arXiv 2111.09832; ties: Yadav et al. 2023, arXiv
    2306.01708; dare: Yu et al. 2024, arXiv 2311.03099.
    """
    _, facts, values = _merging(
        [_held(q, f"posterior {i}") for i, q in enumerate(posteriors)],
        None if base is None else _held(base, "base"),
        **{"method": method, "alpha": alpha, "weights": weights, "density": density, "seed": seed},
    )
    return Posterior._unpacked(dict(values), facts)


def merge_files(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    method: str = "hessian",
    alpha: float = 1.0,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Merge files of posteriors into a file, with one tensor of each in memory.

    ``out`` has the bytes that :func:`merge` of the loaded files, saved, would have. It is written
    whole or not at all.

    Returns:
        what the file says beside its tensors: ``ess`` and ``settings``.

    Raises:
        ValueError, ImportError: as :func:`merge`, and as :meth:`Posterior.load`.
        FileNotFoundError: a file is missing.
    """
    like, facts, values = _merging(
        [source(path) for path in paths],
        None if base is None else source(base),
        **{"method": method, "alpha": alpha, "weights": weights, "density": density, "seed": seed},
    )
    save(out, Posterior.FORMAT, like, facts, values)
    return facts


class Source(NamedTuple):
    """What merging reads of a posterior, by a file's keys, from memory or from the file."""

    name: str  # in messages
    like: Tensors  # dtypes and shapes; of a file on the meta device
    facts: dict[str, Any]
    read: Callable[[str], Tensor]

    def gaussian(self, name: str, device: torch.device) -> Marginal:
        """One tensor's mean and precisions."""
        keys = (f"{part}/{name}" for part in ("mean", "precision", "prior_precision"))
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return Marginal(
            *(self.read(k).to(device, torch.float64) if k in self.like else zero for k in keys)
        )

    def shapes(self, *parts: str) -> dict[str, torch.Size]:
        """Of the tensors of these parts, by a file's keys."""
        return {k: t.shape for k, t in self.like.items() if k.partition("/")[0] in parts}


def _held(posterior: Posterior, name: str) -> Source:
    if not isinstance(posterior, Posterior):
        raise ValueError(f"{name} is no Posterior but {posterior!r}; of a Mixture pass components")
    tensors, facts = posterior._packed()
    return Source(name, tensors, facts, tensors.__getitem__)


def source(path: str | Path) -> Source:
    """A file of a posterior, none of whose tensors is read yet."""
    with loaded(path, Posterior.FORMAT) as (tensors, facts):  # mapped: nothing is read yet
        names = {part: set[str]() for part in PREFIXES}
        for key in tensors:
            part, _, name = key.partition("/")
            names[part].add(name)
        for part, held in names.items():
            needed = held or part in ("mean", "precision")
            if needed and part != "buffer" and (odd := held ^ names["mean"]):
                raise ValueError(f"{part} and mean have different names: {some(sorted(odd))}")
        mean, precision = (
            {n: tensors[f"{part}/{n}"].shape for n in names["mean"]}
            for part in ("mean", "precision")
        )
        if odd := [n for n in mean if mean[n] != precision[n]]:
            raise ValueError(f"precision and mean differ in shape: {some(odd)}")
        told = {"ess": facts["ess"], "settings": facts["settings"]}
        like = {key: tensor.to("meta") for key, tensor in tensors.items()}
    return Source(str(path), like, told, partial(stored, path))


def _merging(
    models: Sequence[Source],
    base: Source | None,
    method: str,
    alpha: float,
    weights: Sequence[float] | None,
    density: float | None,
    seed: int,
) -> tuple[Tensors, dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Dtypes and shapes, facts, and the values one by one, of what merging makes."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    how = METHODS[method]
    weights = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    _check_arguments(how, method, len(models), base, alpha, weights, density)
    _check_models(models, base, how)
    inherited = [] if base is None else [*base.shapes("prior_mean", "prior_precision")]
    like = {
        key: torch.empty(tensor.shape, dtype=_joint(models, key), device="meta")
        for key, tensor in models[0].like.items()
        if key.partition("/")[0] in ("mean", "precision", "buffer")
    }
    like |= {key: base.like[key].to("meta") for key in inherited} if base else {}
    names = [key.removeprefix("mean/") for key in models[0].shapes("mean")]
    if method == "fisher":
        like |= {f"prior_precision/{n}": like[f"precision/{n}"].new_zeros(()) for n in names}

    def values() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            device = models[0].read(f"mean/{name}").device
            made = how.rule(
                [model.gaussian(name, device) for model in models],
                base and base.gaussian(name, device),
                weights,
                alpha,
                **({"density": density, "seed": seed ^ _number(name)} if how.density else {}),
            )
            mean, precision = (
                value.to(like[f"{part}/{name}"].dtype)
                for part, value in zip(("mean", "precision"), made, strict=True)
            )
            _check_values(method, name, mean, precision)
            yield f"mean/{name}", mean
            yield f"precision/{name}", precision
            if method == "fisher":
                yield f"prior_precision/{name}", precision.new_zeros(())
        for key in inherited:
            assert base is not None
            device = models[0].read(f"mean/{key.partition('/')[2]}").device
            yield key, base.read(key).to(device)
        for key in models[0].shapes("buffer"):
            yield key, _buffer([model.read(key) for model in models]).to(like[key].dtype)

    settings = {
        **{"method": method, "alpha": float(alpha), "weights": weights, "number": len(models)},
        **({} if density is None else {"density": density, "seed": seed}),
        **{"models": [model.facts for model in models], "base": base and base.facts},
    }
    ess = _ess(how, models, base, weights, alpha)
    return like, {"ess": ess, "settings": {"merged": settings}}, values()


def _joint(models: Sequence[Source], key: str) -> torch.dtype:
    return reduce(torch.promote_types, (model.like[key].dtype for model in models))


def _buffer(held: Sequence[Tensor]) -> Tensor:
    first, *others = (value.to(held[0].device) for value in held)
    if all(torch.equal(first, other) for other in others):
        return first
    if first.is_floating_point():
        return sum((other.double() for other in others), first.double()) / len(held)
    return reduce(torch.maximum, others, first)


def _ess(
    how: Method,
    models: Sequence[Source],
    base: Source | None,
    weights: Sequence[float],
    alpha: float,
) -> float | None:
    known: float | None = base.facts["ess"] if base else None
    if how.joins == "base":
        return known
    sizes = [model.facts["ess"] for model in models]
    if None in sizes:
        return None
    total = alpha * sum(w * size for w, size in zip(weights, sizes, strict=True))
    total = total / sum(weights) if how.joins == "mean" else total + (known or 0)
    return total if 0 < total < math.inf else None


def _check_arguments(
    how: Method,
    method: str,
    number: int,
    base: Source | None,
    alpha: float,
    weights: Sequence[float],
    density: float | None,
) -> None:
    if not number:
        raise ValueError("there is nothing to merge: needs at least one posterior")
    if how.base and base is None:
        raise ValueError(f"method {method!r} needs a base: what the models were finetuned from")
    if not how.base and base is not None:
        raise ValueError(f"method {method!r} uses no base")
    if not math.isfinite(alpha) or (not how.alpha and alpha != 1):
        wanted = "must be finite" if how.alpha else f"is not used by method {method!r}: leave it 1"
        raise ValueError(f"alpha={alpha} {wanted}")
    signed = how.joins == "base"
    if len(weights) != number or not all(math.isfinite(w) and (signed or w > 0) for w in weights):
        kind = "finite" if signed else "positive finite"
        raise ValueError(f"method {method!r} needs {number} {kind} weights, not {weights}")
    if how.density and not (density is not None and 0 < density <= 1):
        raise ValueError(f"method {method!r} needs a density in (0, 1], not {density}")
    if not how.density and density is not None:
        raise ValueError(f"method {method!r} uses no density")


def _check_values(method: str, name: str, mean: Tensor, precision: Tensor) -> None:
    if not precision.isfinite().all():
        raise ValueError(f"the merged precision is not finite: {name}")
    if not (precision > 0).all():
        why = {
            "product": "The base is narrower than the models: is it the prior that they share?",
            "fisher": "Hessians are zero or negative there, as noise makes some of IVON's: take "
            "method 'hessian' with a base, or raise the models' precision above their prior's",
        }.get(method, "Hessians are zero or negative there: a base of more precision would help")
        raise ValueError(f"the merged precision is not positive: {name}. {why}")
    if not mean.isfinite().all():
        raise ValueError(f"the merged mean is not finite: {name}")


def _check_models(models: Sequence[Source], base: Source | None, how: Method) -> None:
    first = models[0]
    for model in [*models, *([base] if base else [])]:
        parts = ("mean", "precision") if model is base else ("mean", "precision", "buffer")
        if model.shapes("pruned"):
            raise ValueError(f"{model.name} is pruned: merge first, then prune what comes out")
        mine, theirs = model.shapes(*parts), first.shapes(*parts)
        if odd := mine.keys() ^ theirs.keys():
            raise ValueError(_other_names(model.name, first.name, mine, theirs, odd))
        if odd := [f"{k} {(*mine[k],)} and {(*theirs[k],)}" for k in mine if mine[k] != theirs[k]]:
            raise ValueError(f"{model.name} and {first.name} differ in shape: {some(odd)}")
        if how.hessians and model is not base and not model.shapes("prior_precision"):
            raise ValueError(
                f"{model.name}: its prior is unknown, and with it its Hessian. Pass "
                "prior_precision to its Posterior (0 for a flat prior)"
            )


def _other_names(
    name: str, first: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], odd: set[str]
) -> str:
    """What to say of names that differ; PEFT puts an adapter's name in the middle of them."""
    adapter = re.compile(r"(\.lora_[^.]+)\.([^.]+)(?=\.|$)")
    if {adapter.sub(r"\1", k) for k in mine} == {adapter.sub(r"\1", k) for k in theirs}:
        called = sorted({found[2] for key in odd if (found := adapter.search(key))})
        return (
            f"the names in {name} and {first} differ only by the adapter's name "
            f"({' and '.join(called)}): load both adapters under one name, such as 'default'"
        )
    return f"{name} and {first} have different names: {some(sorted(odd))}"
