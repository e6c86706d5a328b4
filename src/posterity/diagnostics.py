"""Whether h, the noise and the steps are sound: numbers of a training's state, and plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .groups import SETTINGS, Group
from .ops.reference import curvature

__all__ = ["Diagnostics", "Layer", "Verdict"]

PART = 2**18  # weights at a time on a CPU: what is made of them fits in its cache
BINS, DECADES = 1200, (-6.0, 6.0)  # of |m|/σ: quantiles are known to within 1.2 %
STARTED = 0.5  # of h: more is a setting, not what training has found
GROWTH = 5.0  # of the steps since the start, as h fell
SCATTER = 0.5  # noise in h over squared gradients: h then scatters by 70 % and more
NEGATIVE = 0.05  # of the weights
NOISE = 1.0  # σ/|m|: above it the noise is larger than what it is added to
DECAY = 0.01  # as AdamW has it: of a step, not of the loss
POINT = 1000.0  # |m|/σ: above it no sample can be told from the mean
CLIPPED = 0.5  # of the weights: above it ξ decides the step of most, and h no more
FAST, SLOW = 0.1, 1e-7  # a step over a weight; the rounding of float32 is 6e-8
KEPT = (*SETTINGS, "initial_lr", "mc_samples", "antithetic", "hess_every", "samples")


class Verdict(NamedTuple):
    """What a number means and, where it is bad, what to do."""

    name: str
    value: float
    good: bool
    words: str


class Writer(Protocol):
    """TensorBoard's ``SummaryWriter``, or what has its method."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take a number."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One tensor of weights and its settings. Shares are of its elements.

    Attributes:
        steps: that it has taken.
        weight: root mean square of the mean m.
        noise: of σ = 1/√(λ(h+δ)).
        step: of the last step (6), at a learning rate of 1.
        started: share of h+δ that is what remains of ``hess_init``, β2^t h0/(h+δ), on average.
        growth: (h0+δ)/(h+δ) on average: of the steps since the start, with ``rescale_lr``.
        negative: share whose h is below zero.
        clipped: share whose last step was bounded by ``clip_radius``.
        odd: share that is not finite, in m, in its momentum, or in h.
        kl: KL to the prior, in nats: infinite where the prior is flat.
    """

    name: str
    shape: tuple[int, ...]
    group: Mapping[str, Any]
    steps: int
    weight: float
    noise: float
    step: float
    started: float
    growth: float
    negative: float
    clipped: float
    odd: float
    kl: float
    counts: Tensor  # of |m|/σ, in bins of equal width on a logarithmic axis

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def rate(self) -> float:
        """What a step is over (ḡ+δm): lr (h0+δ)/(h+δ) with ``rescale_lr``, on average."""
        start = self.group["hess_init"] + self.group["weight_decay"]
        return self.group["lr"] * self.growth / (1 if self.group["rescale_lr"] else start)

    @property
    def noise_to_weight(self) -> float:
        """σ over m, of root mean squares; infinite where all weights are zero."""
        return self.noise / self.weight if self.weight else math.inf

    @property
    def step_to_weight(self) -> float:
        """The last step over θ = m + σε, of root mean squares."""
        return self._step(self.group["lr"])

    @property
    def peak_step_to_weight(self) -> float:
        """The same at the learning rate that a schedule began with."""
        return self._step(self.group.get("initial_lr", self.group["lr"]))

    def _step(self, lr: float) -> float:
        return lr * self.step / math.hypot(self.weight, self.noise)

    @property
    def scattering(self) -> float:
        """λ as the gradient's own noise in ĥ knows it; in pairs, on one batch, it cancels."""
        g = self.group
        paired = g["antithetic"] and g["samples"] == "shared"
        if paired or g["hess_approx"] != "price":
            return 0.0
        return g["ess"] / g["mc_samples"]

    @property
    def learning(self) -> int:
        """The steps in which h has decayed: ``hess_every`` at each at which it was learnt."""
        return _learning(self.steps, self.group)

    def signal_to_noise(self, share: float) -> float:
        """A quantile of |m|/σ over the weights, in [1e-6, 1e6]."""
        return _quantile(self.counts, share)

    @classmethod
    def of(
        cls, name: str, mean: Tensor, momentum: Tensor, hess: Tensor, steps: int, group: Group
    ) -> Layer:
        """From an optimizer's state."""
        group = {k: group[k] for k in KEPT if k in group}
        group["lr"] = float(group["lr"])
        size = mean.numel() if mean.is_cuda else PART
        parts = zip(*(t.flatten().split(size) for t in (mean, momentum, hess)), strict=True)
        found = [_sums(m, g, h, steps, group) for m, g, h in parts]
        sums = torch.stack([row for row, _ in found]).sum(0) / mean.numel()
        weight, noise, step, started, growth, negative, clipped, odd, kl = sums.tolist()
        start = group["hess_init"] + group["weight_decay"]
        return cls(
            name=name,
            shape=tuple(mean.shape),
            group=group,
            steps=steps,
            weight=weight**0.5,
            noise=noise**0.5,
            step=step**0.5 * (start if group["rescale_lr"] else 1.0),
            started=started,
            growth=growth,
            negative=negative,
            clipped=clipped,
            odd=odd,
            kl=kl * mean.numel(),
            counts=torch.stack([counts for _, counts in found]).sum(0).cpu(),
        )


def _learning(steps: int, group: Mapping[str, Any]) -> int:
    every = group["hess_every"]
    return math.ceil(steps / every) * every


def _sums(
    mean: Tensor, momentum: Tensor, hess: Tensor, steps: int, group: Group
) -> tuple[Tensor, Tensor]:
    """Of a part of a tensor: sums of what a layer has on average, and counts of |m|/σ."""
    (beta1, beta2), xi = group["betas"], group["clip_radius"]
    ess, start, delta = group["ess"], group["hess_init"], group["weight_decay"]
    u = curvature(hess, hess_init=start, weight_decay=delta)
    gbar = momentum / (1 - beta1**steps) if group["debias"] and steps else momentum  # (5)
    step = (gbar + delta * mean) / u if steps else torch.zeros_like(u)  # (6)
    precision = ess * u
    ratio = mean.abs() * precision.sqrt()  # |m|/σ (7)
    share = delta / u  # of the prior's precision in the posterior's
    averaged = (
        mean.square(),
        1 / precision,
        step.clamp(-xi, xi).square(),
        (beta2 ** _learning(steps, group) * start / u).clamp(max=1),
        (start + delta) / u,
        hess < 0,
        step.abs() >= xi,
        ~(mean.isfinite() & momentum.isfinite() & hess.isfinite()),
        (share - 1 - share.log() + ess * delta * mean.square()) / 2,
    )
    first, last = DECADES
    place = ((ratio.log10() - first) * (BINS / (last - first))).nan_to_num().clamp(0, BINS - 1)
    counts = torch.bincount(place.long(), minlength=BINS)
    return torch.stack([values.sum(dtype=torch.float64) for values in averaged]), counts


@dataclass(frozen=True)
class Diagnostics:
    """The state of a training, tensor by tensor; printed it is a table with verdicts below.

    Args:
        layers: trained tensors.
        loss: mean training loss per example, in nats, at posterior samples.
        batch: examples of a step.

    Example: see :meth:`posterity.IVON.diagnostics`.
    """

    layers: Sequence[Layer]
    loss: float | None = None
    batch: int | None = None

    @property
    def steps(self) -> int:
        """Of the tensor that has taken most."""
        return max((layer.steps for layer in self.layers), default=0)

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(layer.size for layer in self.layers)

    def average(self, what: str) -> float:
        """An attribute of the layers, on average over their weights."""
        total = sum(layer.size * getattr(layer, what) for layer in self.layers)
        return total / max(self.size, 1)

    def signal_to_noise(self, share: float) -> float:
        """A quantile of |m|/σ over all weights, in [1e-6, 1e6]."""
        return _quantile(torch.stack([x.counts for x in self.layers]).sum(0), share)

    @property
    def kl(self) -> float:
        """KL(q ‖ p) to the prior, in nats; tensors whose prior is flat do not count."""
        return sum(x.kl for x in self._proper) if self._proper else math.inf

    @property
    def elbo(self) -> float | None:
        """−loss − Σ KL/λ, in nats an example; None without loss.

        Where λ is the number of examples it bounds the log evidence of each from below. Tensors
        whose prior is flat do not count: to compare two, they must be the same ones.
        """
        if self.loss is None:
            return None
        shares = [x.kl / x.group["ess"] for x in self._proper]
        return -self.loss - (sum(shares) if shares else math.inf)

    @property
    def verdicts(self) -> list[Verdict]:
        """On each diagnostic; of a training that is not finite, on that alone."""
        if not self.steps:
            words = "no step has been taken yet: there is nothing to judge"
            return [Verdict("steps", 0, False, words)]
        if odd := [layer for layer in self.layers if layer.odd]:
            words = (
                f"training diverged: {_names(odd)} not finite. Go back to a checkpoint, lower lr, "
                "and bound the steps with clip_radius (try .3)"
            )
            return [Verdict("not_finite", len(odd), False, words)]
        idle = [layer for layer in self.layers if not layer.steps]
        learning = replace(self, layers=[layer for layer in self.layers if layer.steps])
        return [*_idle(idle), *learning._judged(), self._prior(), *self._bound()]

    def _judged(self) -> Iterator[Verdict]:
        yield self._start()
        if any(layer.group["rescale_lr"] for layer in self.layers):
            yield self._growth()
        if self.batch is not None and self._noisy:
            yield self._scatter()
        yield self._negative()
        yield self._noise()
        yield self._signal()
        if any(layer.group["clip_radius"] < math.inf for layer in self.layers):
            yield self._clipping()
        yield self._step()

    @property
    def _matrices(self) -> Sequence[Layer]:
        return [layer for layer in self.layers if len(layer.shape) > 1] or self.layers

    @property
    def _proper(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.group["weight_decay"] > 0]

    @property
    def _noisy(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.scattering]

    def _start(self) -> Verdict:
        share, t = self.average("started"), self.steps
        words = f"{share:.0%} of h+δ is what remains of hess_init"
        if share > STARTED:
            moved = max(x.group["betas"][1] ** x.learning for x in self.layers) < STARTED
            words = (
                f"{'h is small beside its start' if moved else 'h has not moved'}: {words} after "
                f"{t} steps. To train and predict that is a choice, but what needs the curvature "
                f"(sensitivity, leave_one_out, merging) has none yet: {self._cure(t)}"
            )
        return Verdict("started", share, share <= STARTED, words)

    def _cure(self, t: int) -> str:
        """docs/hessian.md: a quarter of the steps forgets the start, 5λ/B steps average noise."""
        cure = f"lower hess_init, or betas[1] to 1 - 1/{max(t // 4, 1):,}"
        if self.batch is not None and self._scattered(1 - 4 / (t + 4)) > 0.1:
            return f"{cure}; but h would be noisy then: train longer, or lower ess too"
        return cure

    def _growth(self) -> Verdict:
        rescaled = [layer for layer in self.layers if layer.group["rescale_lr"]]
        growth = replace(self, layers=rescaled).average("growth")
        words = f"steps are {growth:.2g} times what they were at the start, at the same lr"
        if growth > GROWTH:
            words += (
                f", and the noise {growth**0.5:.2g} times, as h fell. Lower hess_init and lr to "
                "where h goes, or raise betas[1], that h falls later"
            )
        return Verdict("growth", growth, growth <= GROWTH, words)

    def _scattered(self, beta2: float | None = None) -> float:
        """docs/hessian.md: noise adds λs²/2M to h, and s² is F/B near the end."""
        assert self.batch is not None
        each = (
            x.scattering * (1 - (beta2 or x.group["betas"][1]) ** x.group["hess_every"])
            for x in self._noisy
        )
        return max(each, default=0.0) / (2 * self.batch)

    def _scatter(self) -> Verdict:
        share = self._scattered()
        words = f"noise adds {share:.2g} times the squared gradients to h"
        if share > SCATTER:
            assert self.batch is not None
            ess = max(layer.scattering * layer.group["hess_every"] for layer in self._noisy)
            words += (
                ", and scatters it: it remembers few examples beside ess. Raise betas[1] to "
                f"1 - 1/{math.ceil(5 * ess / self.batch):,}, or lower ess {10 * share:.2g} times, "
                "or draw pairs, antithetic, on each batch"
            )
        return Verdict("scatter", share, share <= SCATTER, words)

    def _negative(self) -> Verdict:
        share = self.average("negative")
        words = f"h is below zero in {share:.0%} of the weights"
        if share > NEGATIVE:
            words += (
                ": noise, mostly, or negative curvature. Raise betas[1] or mc_samples, or lower ess"
            )
        return Verdict("negative", share, share <= NEGATIVE, words)

    def _noise(self) -> Verdict:
        def rms(what: str) -> float:
            squares = (x.size * getattr(x, what) ** 2 for x in self._matrices)
            return math.sqrt(sum(squares))

        value = rms("noise") / max(rms("weight"), 1e-30)
        worst = max(self._matrices, key=lambda layer: layer.noise_to_weight)
        most = f"{worst.noise_to_weight:.2g} in {worst.name}"
        words = f"σ is {value:.2g} times the weights of the matrices, {most}"
        if value > NOISE:
            words = f"noise drowns the weights: {words}. Where accuracy suffers raise {self._width}"
            if any(layer.group["weight_decay"] >= DECAY for layer in self._matrices):
                words += ", or lower weight_decay, which shrinks the weights: AdamW's is too much"
        return Verdict("noise_to_weight", value, value <= NOISE, words)

    @property
    def _width(self) -> str:
        """What sets σ: the start too, as long as h holds it."""
        return "ess or hess_init" if self.average("started") > 0.1 else "ess"

    def _signal(self) -> Verdict:
        low, median, high = map(self.signal_to_noise, (0.05, 0.5, 0.95))
        words = f"|m|/σ is {median:.3g} (5 to 95 %: {low:.2g} to {high:.3g})"
        if median > POINT:
            words += f": samples do not differ from the mean. Lower {self._width}"
        return Verdict("signal_to_noise", median, median <= POINT, words)

    def _clipping(self) -> Verdict:
        share = self.average("clipped")
        words = f"clip_radius bounds the step of {share:.0%} of the weights"
        if share > CLIPPED:
            words += ": it decides the steps, not h. Raise clip_radius, and lower lr by as much"
        return Verdict("clipped", share, share <= CLIPPED, words)

    def _step(self) -> Verdict:
        fastest = max(self._matrices, key=lambda layer: layer.step_to_weight)
        most = fastest.step_to_weight
        slow = max(layer.peak_step_to_weight for layer in self._matrices) < SLOW  # ends at lr = 0
        words = f"a step changes the weights of a matrix by up to {most:.2g} of their size"
        if most > FAST:
            words += f" ({fastest.name}): lower lr, or clip_radius"
        elif slow:
            words += f": nothing is learnt. Raise lr{RESCALED * fastest.group['rescale_lr']}"
        return Verdict("step_to_weight", most, not slow and most <= FAST, words)

    def _prior(self) -> Verdict:
        if not self._proper:
            words = "the prior is flat, and the KL to it infinite: set weight_decay above 0"
            return Verdict("kl", self.kl, False, words)
        flat = len(self.layers) - len(self._proper)
        words = f"KL to the prior: {self.kl:.4g} nats"
        return Verdict(
            "kl", self.kl, True, words + f" ({flat} tensors have a flat one)" * (flat > 0)
        )

    def _bound(self) -> Iterator[Verdict]:
        if self.elbo is not None:
            words = f"ELBO: {self.elbo:.4g} nats an example"
            good = math.isfinite(self.elbo)
            yield Verdict(
                "elbo", self.elbo, good, words + ": so are the loss or the KL" * (not good)
            )

    def scalars(self, *, layers: bool = False) -> dict[str, float]:
        """Numbers by name, for any logger; with ``layers`` those of each tensor too.

        Names begin with ``posterior/``; those of a tensor are ``posterior/NUMBER/TENSOR``.
        ``posterior/good`` is 1 where no verdict is bad.
        """
        found = {f"posterior/{v.name}": v.value for v in self.verdicts}
        found["posterior/signal_to_noise_5%"] = self.signal_to_noise(0.05)
        found["posterior/signal_to_noise_95%"] = self.signal_to_noise(0.95)
        found["posterior/rate"] = self.average("rate")
        found["posterior/good"] = float(all(v.good for v in self.verdicts))
        for layer in self.layers if layers else ():
            for name in ("noise_to_weight", "step_to_weight", "started", "clipped", "rate"):
                found[f"posterior/{name}/{layer.name}"] = getattr(layer, name)
            found[f"posterior/signal_to_noise/{layer.name}"] = layer.signal_to_noise(0.5)
        return found

    def write(self, writer: Writer, step: int) -> None:
        """Write all numbers, and those of each tensor, to TensorBoard."""
        for name, value in self.scalars(layers=True).items():
            writer.add_scalar(name, value, step)

    def __str__(self) -> str:
        """The table, and the verdicts: ``!`` marks what is amiss."""
        heads = ("tensor", "weights", "rms m", "σ/m", "|m|/σ", "step/θ", "rate", "h0", "clipped")
        rows = [heads, *(_row(layer) for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"IVON after {self.steps:,} steps, {self.size:,} weights"]
        for first, *rest in rows:
            cells = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
            lines.append("  ".join((f"{first:<{widths[0]}}", *cells)))
        lines += [f"{' ' if v.good else '!'} {v.words}" for v in self.verdicts]
        return "\n".join(lines)


RESCALED = "; with rescale_lr good values are above SGD's (.1 and more, not AdamW's .001)"


def _row(layer: Layer) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.size:,}",
        *(f"{x:.2g}" for x in (layer.weight, layer.noise_to_weight, layer.signal_to_noise(0.5))),
        *(f"{x:.2g}" for x in (layer.step_to_weight, layer.rate)),
        *(f"{x:.0%}" for x in (layer.started, layer.clipped)),
    )


def _idle(layers: Sequence[Layer]) -> Iterator[Verdict]:
    if layers:
        words = f"{_names(layers)} never had a gradient: freeze what is not to learn"
        yield Verdict("idle", len(layers), False, words)


def _names(layers: Sequence[Layer], most: int = 3) -> str:
    more = f" and {len(layers) - most} more" if len(layers) > most else ""
    return ", ".join(layer.name for layer in layers[:most]) + more


def _quantile(counts: Tensor, share: float) -> float:
    below = counts.cumsum(0) / counts.sum(dtype=torch.float64)
    first, last = DECADES
    place = int((below < share).sum()) + 0.5
    return 10 ** (first + place * (last - first) / BINS)
