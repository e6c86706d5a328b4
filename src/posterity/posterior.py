"""What training leaves behind: a Gaussian over the weights.

Prediction, merging and sensitivity see only this, never the optimizer that made it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops
from .binding import Tensors, clean_name, fill, kept, some
from .ops.noise import Noise
from .storage import loaded, save

PARTS = ("mean", "precision", "prior_mean", "prior_precision", "buffers", "pruned")
PREFIXES = {part.removesuffix("s"): part for part in PARTS}  # in the files


def _named(values: Mapping[str, Tensor] | None) -> Tensors | None:
    """Own copies under clean names: training on cannot change a posterior."""
    if values is None:
        return None
    named = {clean_name(name): value.detach().clone() for name, value in values.items()}
    if len(named) < len(values):
        raise ValueError("two names are the same without their wrapper prefixes")
    return named


def _number(name: str) -> int:
    """The number of a tensor in the noise: a hash of its name, for files come in any order."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(n in (1, m) for n, m in pairs)


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype to calculate in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


class Posterior:
    r"""A Gaussian over a model's weights, q(θ) = N(m, diag(σ²)) with σ = 1/√precision (7).

    Args:
        mean: m, name → tensor. Names lose their wrapper prefixes (:func:`clean_name`).
        precision: 1/σ², names and shapes as the mean; for IVON λ(h+δ).
        prior_mean: the prior's mean, name → tensor that broadcasts to the mean; default 0.
        prior_precision: the prior's, name → tensor that broadcasts to the mean, or one number;
            for IVON λδ. Unknown by default; 0 is a flat prior.
        ess: λ, the effective number of training examples, if known.
        buffers: what else a fresh process needs in order to predict: BatchNorm's statistics,
            parameters that were not trained. Written into the model with every sample.
        settings: what made it; JSON-able.
        pruned: masks of weights that are exactly zero (:meth:`prune`).

    All tensors are copied. Methods that change something return a new posterior.

    Raises:
        ValueError: names or shapes differ, or values are not finite (precision: and positive).

    Example:
        >>> import torch
        >>> from posterity.posterior import Posterior
        >>> model = torch.nn.Linear(2, 1)
        >>> mean = dict(model.named_parameters())
        >>> precision = {name: torch.full_like(m, 100.0) for name, m in mean.items()}
        >>> posterior = Posterior(mean, precision, prior_precision=1.0, ess=100)
        >>> posterior
        Posterior(2 tensors, 3 parameters, ess=100)
        >>> with posterior.sampled(model, seed=0, index=7):
        ...     y = model(torch.ones(1, 2))  # sample 7 of stream 0: the same on every machine

    Source: Shen et al. 2024, arXiv 2402.17641.
    """

    FORMAT = "posterity.posterior"

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        precision: Mapping[str, Tensor],
        *,
        prior_mean: Mapping[str, Tensor] | None = None,
        prior_precision: Mapping[str, Tensor] | float | None = None,
        ess: float | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        settings: Mapping[str, Any] | None = None,
        pruned: Mapping[str, Tensor] | None = None,
    ):
        self.mean = _named(mean) or {}
        self.precision = _named(precision) or {}
        self.prior_mean = _named(prior_mean)
        if isinstance(prior_precision, (int, float)):
            prior_precision = {
                name: torch.tensor(prior_precision, dtype=_wide(p), device=p.device)
                for name, p in self.precision.items()
            }
        self.prior_precision = _named(prior_precision)
        self.ess = ess
        self.buffers = _named(buffers) or {}
        self.pruned = _named(pruned)
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings or {})))
        self._check()

    def _check(self) -> None:
        if not self.mean:
            raise ValueError("a posterior needs at least one tensor")
        if self.ess is not None and not 0 < self.ess < math.inf:
            raise ValueError(f"ess must be positive and finite, not {self.ess}")
        for part in PARTS:
            values: Tensors | None = getattr(self, part)
            if part == "buffers" or values is None:
                continue
            if odd := values.keys() ^ self.mean.keys():
                raise ValueError(f"{part} and mean have different names: {some(sorted(odd))}")
            fits = _broadcasts if part.startswith("prior") else torch.Size.__eq__
            if odd := [n for n, v in values.items() if not fits(v.shape, self.mean[n].shape)]:
                raise ValueError(f"{part} and mean differ in shape: {some(odd)}")
            if odd := [n for n, v in values.items() if v.is_floating_point() == (part == "pruned")]:
                raise ValueError(f"{part} has the wrong dtype: {some(odd)}")
            if odd := [n for n, v in values.items() if not v.isfinite().all()]:
                raise ValueError(f"{part} is not finite: {some(odd)}")
        if odd := [n for n, v in self.precision.items() if not (v > 0).all()]:
            raise ValueError(f"precision is not positive: {some(odd)}")
        if odd := [n for n, v in (self.prior_precision or {}).items() if not (v >= 0).all()]:
            raise ValueError(f"prior_precision is negative: {some(odd)}")
        if odd := sorted(self.buffers.keys() & self.mean.keys()):
            raise ValueError(f"both in mean and in buffers: {some(odd)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in order."""
        return tuple(self.mean)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self.mean)

    def __repr__(self) -> str:
        size = sum(m.numel() for m in self.mean.values())
        pruned = sum(int(p.sum()) for p in (self.pruned or {}).values())
        extra = f", {pruned:,} pruned" if pruned else ""
        ess = "unknown" if self.ess is None else f"{self.ess:g}"
        return f"Posterior({len(self)} tensors, {size:,} parameters{extra}, ess={ess})"

    def std(self) -> Tensors:
        """σ = 1/√precision, in float32 at least; 0 where pruned."""
        return {name: self._std(name) for name in self.mean}

    def _std(self, name: str) -> Tensor:
        precision = self.precision[name]
        std = precision.to(_wide(precision)).rsqrt()
        return std.masked_fill(self.pruned[name], 0) if self.pruned else std

    def covariance(self, vector: Mapping[str, Tensor]) -> Tensors:
        """Σv, the covariance times a vector of the weights: σ²v, 0 where pruned.

        Further dimensions may come first: (…, *shape of the mean).
        """
        spread = {
            n: v / self.precision[n].to(v.device, _wide(self.precision[n]))
            for n, v in vector.items()
        }
        for name, pruned in (self.pruned or {}).items():
            spread[name].masked_fill_(pruned.to(spread[name].device), 0)
        return spread

    def hessian(self) -> Tensors:
        """The data's Hessian: precision − prior precision (for IVON λh).

        Raises:
            ValueError: the prior is unknown.
        """
        prior = self._prior()[1]
        return {name: p - prior[name] for name, p in self.precision.items()}

    def _prior(self) -> tuple[Tensors, Tensors]:
        if self.prior_precision is None:
            raise ValueError("the prior is unknown: pass prior_precision (0 for a flat prior)")
        zeros = {name: m.new_zeros(()) for name, m in self.mean.items()}
        return self.prior_mean or zeros, self.prior_precision

    @torch.no_grad()
    def sample(self, seed: int, index: int, out: Mapping[str, Tensor] | None = None) -> Tensors:
        """Sample number ``index`` of the stream ``seed``: θ = m + σε.

        A pure function of both and of the tensors' names: the same on every machine, in any order,
        after a file (:mod:`posterity.ops.noise`; between implementations the normals agree to a
        few ulp).

        Args:
            seed: of the stream.
            index: of the sample.
            out: tensors of the mean's names and shapes to write into, of any dtype and device;
                default new ones like the mean.

        Raises:
            ValueError: ``out`` has other names or shapes.
        """
        if out is None:
            made = {name: torch.empty_like(m) for name, m in self.mean.items()}
        else:
            made = {name: t.detach() for name, t in out.items()}
            if odd := made.keys() ^ self.mean.keys():
                raise ValueError(f"out and mean have different names: {some(sorted(odd))}")
            if odd := [n for n, m in self.mean.items() if made[n].shape != m.shape]:
                raise ValueError(f"out and mean differ in shape: {some(odd)}")
        alike: dict[tuple[ops.Ops, torch.device], list[str]] = {}
        for name, m in self.mean.items():
            alike.setdefault((self._ops(name, made[name]), m.device), []).append(name)
        for (implementation, _), names in alike.items():
            means = [self.mean[name] for name in names]
            precisions = [self.precision[name].to(_wide(self.precision[name])) for name in names]
            noise = Noise(seed, index, 1, [_number(name) for name in names], means)
            into = [made[name] for name in names]
            implementation.sample(
                into, means, precisions, noise, ess=1.0, hess_init=0.0, weight_decay=0.0
            )
        for name, pruned in (self.pruned or {}).items():
            made[name].masked_fill_(pruned.to(made[name].device), 0)
        return {name: made[name] for name in self.mean}

    def _ops(self, name: str, target: Tensor) -> ops.Ops:
        m = self.mean[name]
        fits = all(x.dtype == torch.float32 for x in (m, self.precision[name]))
        fits &= m.device == target.device == self.precision[name].device
        return ops.choose(target, None) if fits else ops.reference

    def state(self, seed: int, index: int) -> Tensors:
        """All that sample ``index`` writes into a model: :meth:`sample`, and copied buffers."""
        return self.sample(seed, index) | {name: b.clone() for name, b in self.buffers.items()}

    @contextmanager
    def sampled(self, model: nn.Module, seed: int, index: int) -> Iterator[nn.Module]:
        """A context in which the model holds sample ``index``; it then gets back what it held.

        Written in place (tied weights, low precision, channels last are fine) and restored bit by
        bit, after an exception too. One thread at a time: ``predict(functional=True)`` for more.

        Raises:
            ValueError: the model has other names or shapes; nothing is written then.
        """
        with kept(model, self.mean | self.buffers) as own:
            self.sample(seed, index, {name: own[name] for name in self.mean})
            fill(own, self.buffers)
            yield model

    @contextmanager
    def at_mean(self, model: nn.Module) -> Iterator[nn.Module]:
        """A context in which the model holds the mean (and the buffers), as :meth:`sampled`."""
        with kept(model, self.mean | self.buffers) as own:
            fill(own, self.mean | self.buffers)
            yield model

    def log_prob(self, sample: Mapping[str, Tensor]) -> float:
        """log q(θ) in nats, summed in float64: Σ ½[log precision − precision·(θ−m)² − log 2π].

        Pruned weights are no longer variables: they do not count.
        """
        if sample.keys() != self.mean.keys():
            raise ValueError(f"other names: {some(sorted(sample.keys() ^ self.mean.keys()))}")
        total = 0.0
        for name, m in self.mean.items():
            p, miss = self.precision[name].double(), sample[name].to(m.device).double() - m.double()
            total += self._sum(name, p.log() - p * miss.square() - math.log(2 * math.pi))
        return total / 2

    def kl(self, prior: Posterior | None = None) -> float:
        """KL(q ‖ p) in nats, in float64, to another posterior or (default) to the own prior.

        Σ ½[r − 1 − log r + p_prec·(m − p_mean)²] with r = p_prec/precision: infinite under a flat
        prior. Pruned weights do not count.

        Raises:
            ValueError: other names or shapes, or the own prior is unknown.
        """
        means, precisions = self._prior() if prior is None else (prior.mean, prior.precision)
        if means.keys() != self.mean.keys():
            raise ValueError(f"other names: {some(sorted(means.keys() ^ self.mean.keys()))}")
        if odd := [n for n, m in self.mean.items() if not _broadcasts(means[n].shape, m.shape)]:
            raise ValueError(f"other shapes: {some(odd)}")
        total = 0.0
        for name, m in self.mean.items():
            p = precisions[name].to(m.device).double()
            ratio = p / self.precision[name].double()
            miss = m.double() - means[name].to(m.device).double()
            total += self._sum(name, ratio - 1 - ratio.log() + p * miss.square())
        return total / 2

    def _sum(self, name: str, terms: Tensor) -> float:
        return (terms.masked_fill(self.pruned[name], 0) if self.pruned else terms).sum().item()

    def temper(self, t: float) -> Posterior:
        """The posterior at ``t`` times the temperature: λ, precision and prior precision over t.

        Temperature is τ = N/λ (docs/maths.md). At fixed δ the prior λδ is tempered with the
        likelihood. σ grows by √t: t < 1 sharpens the posterior, the mean stays.
        """
        if not 0 < t < math.inf:
            raise ValueError(f"a temperature must be positive and finite, not {t}")
        prior = self.prior_precision
        return self._but(
            precision={n: p / t for n, p in self.precision.items()},
            prior_precision=prior and {n: p / t for n, p in prior.items()},
            ess=None if self.ess is None else self.ess / t,
        )

    def prune(self, snr: float) -> Posterior:
        """Weights with |mean|/σ < ``snr`` become exact zeros: in the mean and in every sample.

        They keep their precision, but ``std`` is 0 there and the density leaves them out.

        Source: Blundell et al. 2015, arXiv 1505.05424, section 5.1.1.
        """
        return self._zeroed({n: m.abs() < snr * self._std(n) for n, m in self.mean.items()})

    def prune_share(self, share: float, by: Literal["snr", "magnitude"] = "snr") -> Posterior:
        """The ``share`` of all weights with the smallest |mean|/σ, or |mean|, become exact zeros.

        As :meth:`prune`, whose threshold is then that of the share; weights that tie there stay.

        Raises:
            ValueError: a share that is not in [0, 1], or another measure.
        """
        if not 0 <= share <= 1 or by not in ("snr", "magnitude"):
            raise ValueError(f"needs a share in [0, 1] by 'snr' or 'magnitude', not {share}, {by}")
        worth = {n: m.abs().to(_wide(m)) for n, m in self.mean.items()}
        if by == "snr":
            worth = {n: w * self.precision[n].to(w).sqrt() for n, w in worth.items()}
        flat = torch.cat([w.flatten() for w in worth.values()])
        count = math.floor(share * len(flat) + 1e-9)
        limit = flat.kthvalue(count + 1).values if count < len(flat) else torch.inf
        return self._zeroed({n: w < limit for n, w in worth.items()})

    def _zeroed(self, pruned: Tensors) -> Posterior:
        if self.pruned:
            pruned = {n: mask | self.pruned[n] for n, mask in pruned.items()}
        mean = {n: m.masked_fill(pruned[n], 0) for n, m in self.mean.items()}
        return self._but(mean=mean, pruned=pruned)

    def to(self, where: torch.device | str | int | torch.dtype) -> Posterior:
        """On another device, or with another dtype (which leaves the buffers as they are)."""
        fixed = {"buffers", "pruned"} if isinstance(where, torch.dtype) else set()
        return self._but(
            **{
                part: {name: value.to(where) for name, value in values.items()}
                for part in PARTS
                if part not in fixed and (values := getattr(self, part)) is not None
            }
        )

    def _but(self, **changes: Any) -> Posterior:
        """A copy with other attributes."""
        new = copy.copy(self)
        new.__dict__.update(changes)
        new._check()
        return new

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: whole or not at all, every bit as it is, no pickle."""
        save(path, self.FORMAT, *self._packed())

    @classmethod
    def load(cls, path: str | Path) -> Posterior:
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a truncated, foreign or newer file, or one with impossible values; the
                message has the path. There is no checksum: a flipped bit may go unseen.
        """
        with loaded(path, cls.FORMAT) as (tensors, facts):
            return cls._unpacked(tensors, facts)

    def _packed(self) -> tuple[Tensors, dict[str, Any]]:
        tensors = {
            f"{prefix}/{name}": value
            for prefix, part in PREFIXES.items()
            for name, value in (getattr(self, part) or {}).items()
        }
        return tensors, {"ess": self.ess, "settings": self.settings}

    @classmethod
    def _unpacked(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Posterior:
        parts: dict[str, Any] = {"mean": {}, "precision": {}}
        for key, value in tensors.items():
            prefix, _, name = key.partition("/")
            if prefix not in PREFIXES:
                raise ValueError(f"unknown part {key}")
            parts.setdefault(PREFIXES[prefix], {})[name] = value
        return cls(**parts, ess=facts["ess"], settings=facts["settings"])
