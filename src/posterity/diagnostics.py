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

PART = 2**18  # weights at a time: what is made of them fits in a cache
BINS, DECADES = 1200, (-6.0, 6.0)  # of |m|/σ: quantiles are known to within 2.4 %
STARTED = 0.5  # of h: more is a setting, not what training has found
NOISE = 1.0  # σ/|m|: above it the noise is larger than what it is added to
POINT = 1000.0  # |m|/σ: above it no sample can be told from the mean
CLIPPED = 0.5  # of the weights: above it ξ decides the step of most, and h no more
FAST, SLOW = 0.1, 1e-7  # a step over a weight; the rounding of float32 is 6e-8
SCATTER = 0.5  # noise in h over squared gradients: h then scatters by 70 % and more
NEGATIVE = 0.05  # of the weights: their h is noise


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
    """One tensor of weights and its settings. Shares are of its elements; all σ are at 1/√λ(h+δ).

    Attributes:
        steps: that it has taken.
        weight: root mean square of the mean m.
        noise: of σ.
        step: of the last step (6), at a learning rate of 1.
        started: share of h+δ that is still ``hess_init``'s, β2^t (h0+δ)/(h+δ) ≤ 1, on average.
        negative: share whose h is below zero, as noise in its estimate can take it.
        clipped: share whose last step was bounded by ``clip_radius``.
        rate: step over preconditioner: lr (h0+δ)/(h+δ) with ``rescale_lr``, on average.
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
    negative: float
    clipped: float
    rate: float
    kl: float
    counts: Tensor  # of |m|/σ, in bins of equal width on a logarithmic axis

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def noise_to_weight(self) -> float:
        """σ over m, of root mean squares; infinite where all weights are zero."""
        return self.noise / self.weight if self.weight else math.inf

    @property
    def step_to_weight(self) -> float:
        """The last step over m, likewise."""
        return self.group["lr"] * self.step / self.weight if self.weight else math.inf

    def signal_to_noise(self, share: float) -> float:
        """A quantile of |m|/σ over the weights, to within 3 % and in [1e-6, 1e6]."""
        return _quantile(self.counts, share)

    @classmethod
    def of(
        cls, name: str, mean: Tensor, momentum: Tensor, hess: Tensor, steps: int, group: Group
    ) -> Layer:
        """From an optimizer's state."""
        group = {k: group[k] for k in (*SETTINGS, "initial_lr") if k in group}
        group["lr"] = float(group["lr"])
        parts = zip(*(t.flatten().split(PART) for t in (mean, momentum, hess)), strict=True)
        found = [_sums(*part, steps=steps, **group) for part in parts]
        sums = torch.stack([row for row, _ in found]).sum(0) / mean.numel()
        weight, noise, step, started, negative, clipped, inverse, kl = sums.tolist()
        start = group["hess_init"] + group["weight_decay"]
        scale = start if group["rescale_lr"] else 1.0
        return cls(
            name=name,
            shape=tuple(mean.shape),
            group=group,
            steps=steps,
            weight=weight**0.5,
            noise=noise**0.5,
            step=scale * step**0.5,
            started=started,
            negative=negative,
            clipped=clipped,
            rate=group["lr"] * scale * inverse,
            kl=kl * mean.numel(),
            counts=torch.stack([counts for _, counts in found]).sum(0).cpu(),
        )


def _sums(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    *,
    steps: int,
    ess: float,
    hess_init: float,
    betas: tuple[float, float],
    weight_decay: float,
    clip_radius: float,
    debias: bool,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Of a part of a tensor: sums of what a layer has on average, and counts of |m|/σ."""
    beta1, beta2 = betas
    u = curvature(hess, hess_init=hess_init, weight_decay=weight_decay)
    gbar = momentum / (1 - beta1**steps) if debias and steps else momentum  # (5)
    step = (gbar + weight_decay * mean) / u if steps else torch.zeros_like(u)  # (6)
    precision = ess * u
    ratio = mean.abs() * precision.sqrt()  # |m|/σ (7)
    share = weight_decay / u  # of the prior's precision in the posterior's
    averaged = (
        mean.square(),
        1 / precision,
        step.clamp(-clip_radius, clip_radius).square(),
        (beta2**steps * (hess_init + weight_decay) / u).clamp(max=1),
        hess < 0,
        step.abs() >= clip_radius,
        1 / u,
        (share - 1 - share.log() + ess * weight_decay * mean.square()) / 2,
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
        """A quantile of |m|/σ over all weights."""
        return _quantile(sum((x.counts for x in self.layers), torch.zeros(BINS)), share)

    @property
    def kl(self) -> float:
        """KL(q ‖ p) to the prior, in nats; tensors whose prior is flat do not count."""
        found = [layer.kl for layer in self.layers if math.isfinite(layer.kl)]
        return sum(found) if found else math.inf

    @property
    def elbo(self) -> float | None:
        """A lower bound on log evidence, in nats an example: −loss − Σ KL/λ; None without loss.

        Tensors whose prior is flat do not count: to compare two, they must be the same ones.
        """
        if self.loss is None:
            return None
        shares = (x.kl / x.group["ess"] for x in self.layers if math.isfinite(x.kl))
        return -self.loss - sum(shares)

    @property
    def verdicts(self) -> list[Verdict]:
        """On each diagnostic; of a training that is not finite, on that alone."""
        if not self.steps:
            words = "no step has been taken yet: there is nothing to judge"
            return [Verdict("steps", 0, False, words)]
        if odd := [x for x in self.layers if not math.isfinite(x.weight + x.noise + x.step)]:
            words = (
                f"training diverged: {_names(odd)} not finite. Go back to a checkpoint, lower lr, "
                "and bound the steps with clip_radius (try .3)"
            )
            return [Verdict("finite", len(odd), False, words)]
        taken = [layer for layer in self.layers if layer.steps]
        return list(replace(self, layers=taken)._judged(len(self.layers) - len(taken)))

    def _judged(self, idle: int) -> Iterator[Verdict]:
        if idle:
            words = f"{idle} tensors never had a gradient: freeze them, or find out why"
            yield Verdict("idle", idle, False, words)
        yield self._start()
        if self.batch is not None:
            yield self._scatter(self.batch)
        yield self._negative()
        yield self._noise()
        yield self._signal()
        if any(layer.group["clip_radius"] < math.inf for layer in self.layers):
            yield self._clipping()
        yield self._step()
        yield self._prior()
        if self.elbo is not None:
            words = f"the evidence's lower bound is {self.elbo:.4g} nats an example"
            good = math.isfinite(self.elbo)
            yield Verdict("elbo", self.elbo, good, words if good else f"{words}: so is the loss")

    def _start(self) -> Verdict:
        share, t = self.average("started"), self.steps
        words = f"{share:.0%} of h+δ is still hess_init"
        if share > STARTED:
            words = (
                f"h has not moved: {words} after {t} steps. To train and predict that is a choice, "
                "but what needs the curvature (sensitivity, leave_one_out, merging) has none yet: "
                f"lower hess_init, or betas[1]; with {1 - 10 / (t + 10):.6g} h forgets its start "
                "in so many steps"
            )
        return Verdict("started", share, share <= STARTED, words)

    def _scatter(self, batch: int) -> Verdict:
        """docs/hessian.md: a step's noise adds λs²/2M to h, and s² is F/B near the end."""
        share, group = max(
            (
                (x.group["ess"] * (1 - x.group["betas"][1]) / (2 * batch), x.group)
                for x in self.layers
            ),
            key=lambda found: found[0],
        )
        words = f"noise adds {share:.0%} of the squared gradients to h"
        if share > SCATTER:
            seen, ess = batch / (1 - group["betas"][1]), group["ess"]
            words += (
                f": it remembers {seen:,.0f} examples, few beside ess = {ess:,.0f}. Raise betas[1] "
                f"to {1 - batch / (5 * ess):.6g}, or lower ess to {seen / 5:,.0f}"
            )
        return Verdict("scatter", share, share <= SCATTER, words)

    def _negative(self) -> Verdict:
        share = self.average("negative")
        words = f"h is below zero in {share:.0%} of the weights"
        if share > NEGATIVE:
            words += ", which is noise: raise betas[1] or mc_samples, or lower ess"
        return Verdict("negative", share, share <= NEGATIVE, words)

    def _noise(self) -> Verdict:
        matrices = [layer for layer in self.layers if len(layer.shape) > 1] or self.layers
        drowned = [layer for layer in matrices if layer.noise_to_weight > NOISE]
        most = max(layer.noise_to_weight for layer in matrices)
        words = f"σ is at most {most:.2g} of the weights of a matrix"
        if drowned:
            words = (
                f"noise drowns the weights of {_names(drowned)}: σ is {most:.2g} times their size. "
                "Where accuracy suffers raise ess or hess_init"
            )
        return Verdict("noise_to_weight", most, not drowned, words)

    def _signal(self) -> Verdict:
        low, median, high = map(self.signal_to_noise, (0.05, 0.5, 0.95))
        words = f"|m|/σ is {median:.3g} (5 to 95 %: {low:.2g} to {high:.3g})"
        if median > POINT:
            words += ": samples do not differ from the mean. Lower ess or hess_init"
        return Verdict("signal_to_noise", median, median <= POINT, words)

    def _clipping(self) -> Verdict:
        share = self.average("clipped")
        words = f"clip_radius bounds the step of {share:.0%} of the weights"
        if share > CLIPPED:
            words += ": it decides the steps, not h. Raise clip_radius or hess_init"
        return Verdict("clipped", share, share <= CLIPPED, words)

    def _step(self) -> Verdict:
        matrices = [layer for layer in self.layers if len(layer.shape) > 1] or self.layers
        fastest = max(matrices, key=lambda layer: layer.step_to_weight)
        most = fastest.step_to_weight
        words = f"a step changes the weights of a matrix by up to {most:.2g} of their size"
        group = fastest.group
        at_peak = group.get("initial_lr", group["lr"]) * fastest.step  # a schedule ends at zero
        slow = at_peak < SLOW * fastest.weight
        if most > FAST:
            words += f" ({fastest.name}): lower lr, or clip_radius"
        elif slow:
            words += f": nothing is learnt. Raise lr; {_scale(group)}"
        return Verdict("step_to_weight", most, not slow and most <= FAST, words)

    def _prior(self) -> Verdict:
        if math.isinf(self.kl):
            words = "the prior is flat, and the KL to it infinite: set weight_decay above 0"
            return Verdict("kl", self.kl, False, words)
        flat = sum(math.isinf(layer.kl) for layer in self.layers)
        words = f"KL to the prior: {self.kl:.4g} nats"
        return Verdict(
            "kl", self.kl, True, words + f" ({flat} tensors have a flat one)" * bool(flat)
        )

    def scalars(self, *, layers: bool = False) -> dict[str, float]:
        """Numbers by name, for any logger; with ``layers`` those of each tensor too.

        Names begin with ``posterior/``; those of a tensor are ``posterior/NUMBER/TENSOR``.
        """
        found = {f"posterior/{v.name}": v.value for v in self.verdicts}
        found["posterior/rate"] = self.average("rate")
        found["posterior/good"] = float(all(v.good for v in self.verdicts))
        for layer in self.layers if layers else ():
            for name in ("noise_to_weight", "step_to_weight", "started", "clipped", "rate"):
                found[f"posterior/{name}/{layer.name}"] = getattr(layer, name)
        return found

    def write(self, writer: Writer, step: int) -> None:
        """Write all numbers, and those of each tensor, to TensorBoard."""
        for name, value in self.scalars(layers=True).items():
            writer.add_scalar(name, value, step)

    def __str__(self) -> str:
        """The table, and the verdicts: ``!`` marks what is to be changed."""
        heads = (
            "tensor",
            "weights",
            "rms m",
            "σ/m",
            "|m|/σ",
            "step/m",
            "rate",
            "of start",
            "clipped",
        )
        rows = [heads, *(_row(layer) for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"IVON after {self.steps:,} steps, {self.size:,} weights"]
        for first, *rest in rows:
            cells = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
            lines.append("  ".join((f"{first:<{widths[0]}}", *cells)))
        lines += [f"{' ' if v.good else '!'} {v.words}" for v in self.verdicts]
        return "\n".join(lines)


def _row(layer: Layer) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.size:,}",
        *(f"{x:.2g}" for x in (layer.weight, layer.noise_to_weight, layer.signal_to_noise(0.5))),
        *(f"{x:.2g}" for x in (layer.step_to_weight, layer.rate)),
        *(f"{x:.0%}" for x in (layer.started, layer.clipped)),
    )


def _scale(group: Mapping[str, Any]) -> str:
    if group["rescale_lr"]:
        return "with rescale_lr good values are above SGD's (.1 and more, not AdamW's .001)"
    return "without rescale_lr it is divided by h+δ, not by h+δ over h0+δ"


def _names(layers: Sequence[Layer], most: int = 3) -> str:
    more = f" and {len(layers) - most} more" if len(layers) > most else ""
    return ", ".join(layer.name for layer in layers[:most]) + more


def _quantile(counts: Tensor, share: float) -> float:
    below = counts.cumsum(0) / counts.sum()
    first, last = DECADES
    place = int((below < share).sum()) + 0.5
    return 10 ** (first + place * (last - first) / BINS)
