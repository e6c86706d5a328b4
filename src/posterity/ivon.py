"""IVON, the variational optimizer: its groups, state and checkpoints. No maths."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint, distributed, groups, ops, presets
from .binding import clean_name
from .diagnostics import Diagnostics, Layer
from .groups import Group
from .ops.reference import curvature
from .posterior import Posterior
from .sampling import Draw, Written, forget_copies, touch
from .slots import Slot, state_of
from .trained import Trained
from .window import Window

NO_SAMPLE = (
    "IVON.step() found no posterior sample: gradients must be taken at a sample of the weights. "
    "Wrap forward and backward pass in `with opt.sampled_params(train=True):`, or pass a closure "
    "to `opt.step(closure)`, or call `opt.train()` before the forward pass."
)
UNSCALED = (
    'samples="per_rank" under GradScaler: unscale_() changes the gradients but not their products, '
    "which are averaged already. Call scaler.step(opt) without it, or train in bfloat16."
)
TRAINING = "sampled_params(train=True)"
UNAVERAGED = (
    "ranks have the same weights but stepped with different gradients, so their weights drift "
    "apart: a sampling context was left, or step() called, before gradients were averaged. Run "
    "all micro-batches of a step inside one context, its last backward pass outside `no_sync()`; "
    "inside Accelerate's `accumulate` call opt.train() instead."
)


class IVON(Optimizer):
    r"""Improved variational online Newton: AdamW's cost, and a Gaussian posterior over the weights.

    Minimises λ·E_q[ℓ̄(θ)] + KL(q ‖ p) over q = N(m, diag σ²), σ² = 1/(λ(h+δ)), with the prior
    p = N(0, 1/(λδ)): Algorithm 1 of the source, lines (1) to (7), which docs/maths.md explains.

    Gradients are taken at a posterior sample. There are three ways, over one mechanism:

    1. ``with opt.sampled_params(train=True): loss.backward()``, then ``opt.step()``. Several
       contexts before a step are several Monte Carlo samples and are averaged.
    2. ``opt.step(closure)`` draws ``mc_samples`` samples around the closure.
    3. ``opt.train()`` before the forward pass, ``opt.step()`` after the backward pass;
       ``opt.eval()`` puts the mean back without a step.

    At rest the parameters are the mean, so that saving a model is always right. Load other weights
    between steps, not while a sample stands in the parameters.

    Args:
        params: parameters, named parameters or parameter groups. A group may have its own lr, ess,
            hess_init, betas, weight_decay, clip_radius, hess_approx, gradsq_scale, rescale_lr and
            debias.
        lr: learning rate α, a float or a tensor. With ``rescale_lr`` good values are above SGD's.
        ess: effective sample size λ: number of training examples; the loss is a batch *mean*.
        hess_init: initial Hessian h0. Small is noisy, large nearly deterministic. "auto" sets σ at
            the first sample to a tenth of a typical weight, the geometric mean over the trained
            matrices of their root mean squares; to less where the prior alone is narrower.
        betas: decay of momentum and Hessian; .9999 for the latter suits short runs.
        weight_decay: prior precision over λ, δ. At 0 the prior is flat.
        mc_samples: samples drawn by ``step(closure)``.
        hess_approx: "price", ĥ = ĝ(θ−m)/σ² (2), or "gradsq", ĥ = gradsq_scale·ĝ².
        gradsq_scale: the factor of "gradsq", which needs it. For a mean over a batch of B, B is
            consistent with the Gauss-Newton matrix near stationarity.
        clip_radius: bound ξ on each element of the preconditioned step (6). Without one, a rare
            large gradient at a sample can throw training far off: try .3 where the loss jumps.
        rescale_lr: multiply lr by h0+δ.
        debias: divide the momentum by 1−β1^t (5). The Hessian is never debiased.
        antithetic: samples come in pairs m ± σε; needs an even ``mc_samples``. Where both see the
            same batch (and dropout), the gradient's own noise cancels in ĥ.
        hess_every: learn h at every k-th step alone, the first among them, and draw one sample at
            the others: ``samples_due`` says how many. With ``mc_samples=2, antithetic=True`` a step
            then takes 1 + 1/k gradients. The decay ``betas[1]`` is still a step's.
        fused: None takes the best implementation, True insists on a fused one, False asks for the
            reference; ``opt.implementation`` says what runs.
        store_mean: keep a copy of the mean while a sample stands in the parameters. False
            regenerates the noise instead and restores the mean to within one rounding.
        samples: "shared": all ranks of a process group draw the same sample. "per_rank": each
            rank of DistributedDataParallel draws its own, so that W ranks are W Monte Carlo
            samples; it needs the hook :func:`posterity.reduce_per_rank`.
        capturable: keep all counters on the parameters' device, for CUDA graphs; on a GPU those
            of steps are always there.
        seed: of the noise, 64 bits; None takes one from torch's global generator.

    State per parameter: ``step``, ``momentum``, ``hess`` (float32; float64 for float64 parameters)
    and, for bf16 and fp16 parameters, ``mean``: the float32 master weights.

    Raises:
        ValueError: a setting out of its range, complex or integer parameters, one that stands twice
            in a group or is FullyShardedDataParallel's, bf16 or fp16 parameters with
            ``store_mean=False``.
        TypeError: a setting that is no number, or betas that are no pair.
        RuntimeError: ``fused=True`` where no fused implementation runs for a parameter.

    Example:
        >>> import torch
        >>> from posterity import IVON
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
        >>> opt = IVON(model.parameters(), lr=0.1, ess=len(x), seed=0)
        >>> for _ in range(5):
        ...     with opt.sampled_params(train=True):
        ...         opt.zero_grad()
        ...         torch.nn.functional.mse_loss(model(x), y).backward()
        ...     _ = opt.step()
        >>> opt.posterior(model).names
        ('weight', 'bias')

    Source: Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024,
    arXiv 2402.17641.
    """

    _step_supports_amp_scaling = True  # on overflow GradScaler then leaves the skipping to step()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        ess: float,
        hess_init: float | Literal["auto"] = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: str = "price",
        gradsq_scale: float | None = None,
        clip_radius: float = math.inf,
        rescale_lr: bool = True,
        debias: bool = True,
        antithetic: bool = False,
        hess_every: int = 1,
        fused: bool | None = None,
        store_mean: bool = True,
        samples: str = "shared",
        capturable: bool = False,
        seed: int | None = None,
    ):
        settings = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        if seed is None:
            settings["seed"] = int(torch.randint(2**63 - 1, ()).item())
        self._reset()
        self._seeded = seed is not None
        counters = dict.fromkeys(("draws", "eval_draws", "pending", "hess_age"), 0)
        super().__init__(params, {**settings, **counters})

    @classmethod
    def from_sgd(
        cls,
        sgd: torch.optim.SGD,
        *,
        ess: float,
        hess_init: float | Literal["auto"] = 0.5,
        beta2: float = 0.99999,
        **settings: Any,
    ) -> IVON:
        """IVON in the place of SGD: its steps, at a sample of the weights.

        While h stays at ``hess_init``, as it does in tens of thousands of steps with the default
        ``beta2``, SGD's settings carry over: with momentum μ lr becomes lr/(1−μ), for SGD adds up
        the gradients that IVON averages, and weight decay is the same. Groups stay groups.

        Args:
            sgd: an optimizer that is built as for training without IVON; its state is not read.
            ess: effective sample size λ: number of training examples; the loss is a batch *mean*.
            hess_init: of .1 to 1 for training from scratch: σ is 1/√(λ h0).
            beta2: the second of ``betas``; the first is μ.
            settings: further ones of :class:`IVON`.

        Raises:
            ValueError: ``nesterov``, ``maximize`` or ``dampening``, which IVON has not; lr, betas
                or weight_decay, which follow from SGD's; another optimizer than SGD.

        Example:
            >>> import torch
            >>> from posterity import IVON
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> sgd = torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=5e-4)
            >>> opt = IVON.from_sgd(sgd, ess=50_000)
            >>> [round(opt.param_groups[0][k], 6) for k in ("lr", "weight_decay", "hess_init")]
            [1.0, 0.0005, 0.5]
        """
        presets.refuse(settings, "from_sgd", "lr", "betas", "weight_decay")
        own = presets.of_sgd(sgd, beta2)
        first = {"lr": own[0]["lr"], "ess": ess, "hess_init": hess_init, "debias": False}
        return cls(own, **{**first, **settings})

    @classmethod
    def from_adamw(
        cls,
        adamw: torch.optim.AdamW,
        task: str,
        *,
        n_train: int,
        steps: int,
        **settings: Any,
    ) -> IVON:
        """IVON in the place of AdamW that finetunes, at AdamW's rate.

        :meth:`defaults_for` a task, but for two settings. lr is AdamW's over ``clip_radius``, so
        that a weight moves by AdamW's rate at most. And below the rate at which the task's settings
        were found ``ess`` is higher, by the square of the rates' ratio: the noise is as much less
        as the steps are shorter. Groups stay groups; AdamW's weight decay is of another kind and
        not carried over, but a group that alone has none gets none. Keep the warm-up and the decay
        to zero; schedules that name a rate instead of a factor name it over ``clip_radius``.
        Finetuning in full was as good as AdamW's at 1e-5 to 1e-4, and failed at 3e-4.

        Args:
            adamw: an optimizer that is built as for training without IVON; its state is not read.
            task: "finetuning", of all weights, or "lora".
            n_train: number of training examples.
            steps: that training will take.
            settings: further ones of :class:`IVON`, also in the place of the task's.

        Raises:
            ValueError: ``amsgrad`` or ``maximize``, which IVON has not; another task, for which
                AdamW's rate does not carry over; lr, clip_radius, rescale_lr or weight_decay, which
                are set here; another optimizer than AdamW, or one whose rate is 0.

        Example:
            >>> import torch
            >>> from posterity import IVON
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> adamw = torch.optim.AdamW([w], lr=2e-5)
            >>> opt = IVON.from_adamw(adamw, "finetuning", n_train=10_000, steps=1_000)
            >>> group = opt.param_groups[0]
            >>> round(group["lr"], 6), group["clip_radius"], f"{group['ess']:.1e}"
            (0.02, 0.001, '1.8e+08')

        Source: what ``posterity study rates`` measures beside AdamW.
        """
        presets.refuse(settings, "from_adamw", "lr", "clip_radius", "rescale_lr", "weight_decay")
        if task in presets.PRESETS and task not in presets.LIKE_ADAMW:
            known = " and ".join(presets.LIKE_ADAMW)
            raise ValueError(
                f"AdamW's rate carries over for {known}: here use IVON.defaults_for({task!r}, ...)"
            )
        preset = cls.defaults_for(task, n_train, steps)
        return cls(**presets.of_adamw(adamw, preset) | settings)

    @staticmethod
    def defaults_for(task: str, n_train: int, steps: int) -> dict[str, Any]:
        """Settings that work untouched, to begin with or to stay with.

        Use them with a warm-up of a twentieth of the steps, then a decay to zero. To change one
        thing change ``lr``. For "vision", "plain" and "tabular" it is SGD's over 1−β1; for the
        others a weight moves by lr·``clip_radius`` at most, which is in the scale of AdamW's.
        ``ess`` is above ``n_train`` where a colder posterior, of less noise, trained better.

        Args:
            task: from scratch "vision" (with batch norm or the like), "plain" (without it),
                "tabular" (small networks, few rows), "language" or, better where a loop can draw
                two samples at every tenth step, "language_pairs"; "finetuning" of all weights, or
                "lora".
            n_train: number of training examples; those of language do not ask.
            steps: that training will take.

        Raises:
            ValueError: an unknown task; no examples, or no steps.

        Example:
            >>> import torch
            >>> from posterity import IVON
            >>> model = torch.nn.Linear(3, 2)
            >>> settings = IVON.defaults_for("vision", n_train=50_000, steps=7820)
            >>> settings["lr"], settings["hess_init"]
            (2.0, 0.5)
            >>> opt = IVON(model.parameters(), **settings)

        Source: what ``posterity study defaults`` measures beside tuned AdamW, and for "lora" what
        ``posterity study finetuning`` does.
        """
        known = presets.PRESETS
        if task not in known:
            raise ValueError(f"no settings for {task!r}; there are {', '.join(known)}")
        if n_train < 1 or steps < 1:
            raise ValueError(f"n_train and steps count from 1; got {n_train} and {steps}")
        return known[task](n_train, steps)

    def _reset(self) -> None:
        """Make what stands beside the state."""
        self._window = Window()
        self._trained = Trained(self._window)
        self._inside = ""  # the context we are in
        self._agreed = False  # whether all ranks share the counters
        self._stepped = self._compared = False  # among ranks: a first step and its gradients
        self._first_step: distributed.Fingerprint | None = None
        self._seeded = True  # whether the seed was given: else ranks have their own until then
        self._warned = False

    @property
    def implementation(self) -> str:
        """Which implementation runs, and why."""
        params = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        return ops.describe(params, self._whole["fused"], self._whole["capturable"])

    @property
    def samples_due(self) -> int:
        """How many samples the coming step still wants: of ``mc_samples``, or of 1 where h rests.

        For loops over ``sampled_params(train=True)``: read it before the first of them.
        ``step(closure)`` draws as many by itself. Each micro-batch with samples of its own needs
        as many.

        Example:
            >>> import torch
            >>> from posterity import IVON
            >>> w, x = torch.nn.Parameter(torch.zeros(2)), torch.ones(2)
            >>> pairs = {"mc_samples": 2, "antithetic": True, "hess_every": 10}
            >>> opt, drawn = IVON([w], lr=0.1, ess=100, seed=0, **pairs), []
            >>> for step in range(3):
            ...     drawn.append(opt.samples_due)
            ...     for _ in range(opt.samples_due):
            ...         with opt.sampled_params(train=True):
            ...             opt.zero_grad()
            ...             (w @ x - 1).square().backward()
            ...     _ = opt.step()
            >>> drawn
            [2, 1, 1]
        """
        whole = self._whole
        taken = whole["pending"] + (self._window.draw is not None)
        return max((1 if self._rests else whole["mc_samples"]) - taken, 0)

    @property
    def _rests(self) -> bool:
        """Whether h rests in the coming step."""
        return self._whole["hess_age"] % self._whole["hess_every"] != 0

    # -- groups and state -------------------------------------------------------------------------

    @property
    def _whole(self) -> Group:
        """Where the settings and counters of the whole optimizer stand."""
        return self.param_groups[0] if self.param_groups else self.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with settings of its own where it names them, at any time.

        Raises:
            ValueError: a setting out of its range or of the whole optimizer, or a parameter that
                cannot be trained.
            TypeError: a setting that is no number, or betas that are no pair.
        """
        whole = {k: self._whole[k] for k in groups.WHOLE}
        own = [k for k in groups.FIXED if param_group.get(k, whole[k]) != whole[k]]
        if own:
            raise ValueError(f"{', '.join(own)}: set for the whole optimizer, not for one group")
        super().add_param_group({**param_group, **whole})
        group = self.param_groups[-1]
        try:
            groups.check(group)
            for p in filter(lambda p: p.requires_grad, group["params"]):
                ops.choose(p, group["fused"], group["capturable"])
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        groups.share_counters(self.param_groups)
        draw = self._window.draw
        if draw is not None and draw.live:
            newcomers = [s for s in self._slots() if s.group is group]
            with torch.no_grad():
                self._window.enter(newcomers, group["store_mean"])

    def _slots(self) -> list[Slot]:
        """Every trainable parameter, with its state."""
        return self._trained.slots(self.param_groups, self.state)

    # -- three ways to sample ---------------------------------------------------------------------

    def sampled_params(self, train: bool = False) -> AbstractContextManager[None]:
        """A context in which the parameters are a posterior sample.

        Args:
            train: True draws a training sample for the next step: run forward and backward pass
                inside. Several such contexts before a step are several Monte Carlo samples, and
                each loss is then a whole batch mean (the average over samples is taken here).
                False draws an evaluation sample, from a stream of its own: evaluating never
                changes training.

        At exit the parameters are the mean again, exactly, also after an exception; a training
        sample that ends in one is dropped with its gradients.

        Raises:
            RuntimeError: inside another such context, or a gradient changed where it no longer
                counts.

        Example:
            >>> import torch
            >>> from posterity import IVON
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> opt = IVON([w], lr=0.1, ess=100, seed=0)
            >>> with opt.sampled_params():
            ...     bool((w != 0).all())
            True
            >>> bool((w == 0).all())
            True
        """
        return self._training_sample() if train else self._evaluation_sample()

    def _outside(self, name: str) -> None:
        """Raise inside a sampling context, where ``name`` has no meaning."""
        if self._inside:
            raise RuntimeError(f"{name} inside {self._inside}: leave that context first")

    @contextmanager
    def _within(self, name: str) -> Iterator[None]:
        self._outside(name)
        self._inside = name
        try:
            yield
        finally:
            self._inside = ""

    @contextmanager
    def _training_sample(self) -> Iterator[None]:
        with self._within(TRAINING):
            try:
                with torch.no_grad():
                    self._new_draw("context")
                yield
                self._hold()
            except BaseException:
                with torch.no_grad():
                    self._drop()
                raise

    def _drop(self) -> None:
        """Drop the latest sample. Among ranks, one may drop it alone: they must not drift apart."""
        draw = self._window.draw
        if draw is not None and not distributed.alone():
            groups.count(self.param_groups, "draws", -draw.counted)
        self._renew()
        self._window.drop()

    def _new_draw(self, way: str) -> None:
        self._guard_capture()
        slots, whole = self._slots(), self._whole  # first: the parameters may have moved
        self._close(last=False)
        if slots and not self._agreed and not distributed.alone():
            groups.agree(self.param_groups)
            self._agreed = True
        if slots and self._stepped and not self._compared and not distributed.alone():
            found = distributed.unaveraged(self._first_step)
            self._stepped = self._compared = found is not None  # else the next step is looked at
            if found:
                warnings.warn(UNAVERAGED, stacklevel=4)
        groups.share_counters(self.param_groups)  # on the parameters' device: they may have moved
        if whole["pending"]:  # each sample of several starts from zero gradients
            for slot in slots:
                slot.param.grad = None
        own = whole["samples"] == "per_rank" and not distributed.alone()
        ranks, rank = (distributed.world(), distributed.rank()) if own else (1, 0)
        pairs = 2 if whole["antithetic"] else 1
        if own and ranks % pairs:
            raise RuntimeError("antithetic=True with samples='per_rank' needs an even world size")
        of_step = whole["pending"] * ranks + rank  # this sample among all of the step
        mirrored = of_step % pairs == 1
        counted = ranks // pairs if own else int(not mirrored)
        number = groups.count(self.param_groups, "draws", counted) + rank // pairs
        if mirrored and not own:
            number = number - 1
        draw = Draw(whole["seed"], number, -1 if mirrored else 1, way, counted)
        draw.products = {} if own else None
        self._window.open(draw, slots, whole["store_mean"])

    def _guard_capture(self) -> None:
        same = self._whole["capturable"] and self._whole["hess_every"] == 1
        if same or not torch.cuda.is_initialized():
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph would replay the same noise and kind of step: build IVON with "
                "capturable=True and hess_every=1"
            )

    def _renew(self) -> None:
        """Find the parameters that moved while a sample stands in them: it is taken back there."""
        draw = self._window.draw
        if draw is not None and draw.live and draw.slots:
            with suppress(ValueError):  # of another shape: nothing can be put back
                self._slots()

    @torch.no_grad()
    def _hold(self) -> None:
        """Leave a training context: hold the first sample, sum up the others."""
        self._renew()
        self._window.hold()
        if self._whole["pending"]:
            self._close(last=False)

    def _close(self, *, last: bool, checked: bool = False) -> None:
        if self._window.close(last=last, checked=checked):
            groups.count(self.param_groups, "pending")

    @contextmanager
    def _evaluation_sample(self) -> Iterator[None]:
        with self._within("sampled_params()"):
            self._guard_capture()
            if not (self._agreed or self._seeded or distributed.alone()):
                raise RuntimeError(
                    "ranks have not agreed on a seed yet: build IVON with seed=, or draw a "
                    "training sample first"
                )
            slots = self._slots()
            number = -1 - groups.count(self.param_groups, "eval_draws")
            draw = Draw(self._whole["seed"], number, 1, "evaluation")
            with self._window.evaluating(draw, slots):
                yield

    @torch.no_grad()
    def train(self) -> None:
        """Put a training sample into the parameters; nothing to do when one is there already.

        Call it before the forward pass; calling it before every micro-batch is fine, for the
        sample stays the same until ``step()``. ``step()`` reads the gradients when it is called.
        Inside ``sampled_params(train=True)`` a sample is there already, too.

        Raises:
            RuntimeError: ``mc_samples > 1``, or samples of the other ways wait for ``step()``.
        """
        if self._inside == TRAINING:
            return
        whole, draw = self._whole, self._window.draw
        if whole["mc_samples"] > 1:
            raise RuntimeError(
                f"train() draws one sample a step, but mc_samples={whole['mc_samples']}: use "
                "`with opt.sampled_params(train=True):` several times before `step()`, or "
                "`opt.step(closure)`"
            )
        self._outside("train()")
        if draw is None and not whole["pending"]:
            self._new_draw("train")
        elif draw is None or draw.way != "train":
            raise RuntimeError("train(), but samples of sampled_params(train=True) wait for step()")
        elif not draw.live:  # eval() was called in the middle: the same sample again
            self._slots()  # the parameters may have moved since
            self._window.enter(list(draw.slots.values()), whole["store_mean"])

    @torch.no_grad()
    def eval(self) -> None:
        """Put the mean back without a step; a following ``train()`` takes up the same sample.

        Raises:
            RuntimeError: inside ``sampled_params``.
        """
        self._outside("eval()")
        self._renew()
        if self._window.draw is not None:
            self._window.draw.leave()

    # -- the step ---------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the posterior from the gradients at its samples; the parameters are then its mean.

        Args:
            closure: computes the loss with its gradients and returns it. It is called once for
                each of ``samples_due`` new samples, or once at the sample that ``train()`` drew.

        Returns:
            The closure's mean loss; None without a closure.

        Raises:
            RuntimeError: no sample was drawn, a gradient is sparse, or one changed where it no
                longer counts. The parameters are the mean then too, and all samples are dropped,
                as after an exception in the closure.

        A sample without any gradient is dropped with a warning, and one whose gradients overflowed
        under ``GradScaler`` silently: neither changes any state.
        """
        self._outside("step()")
        try:
            loss = None if closure is None else self._evaluate(closure)
            self._update()
        finally:
            self._end_window()
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        draw = self._window.draw
        if draw is not None and draw.live:
            try:
                with torch.enable_grad():
                    return closure()
            except BaseException:
                with torch.no_grad():
                    self._renew()
                    self._window.drop()
                raise
        losses = []
        for _ in range(max(self.samples_due, 1)):
            with self.sampled_params(train=True), torch.enable_grad():
                loss = closure()
            losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if len(losses) == 1 or losses[0] is None:
            return losses[0]
        return sum(losses[1:], losses[0]) / len(losses)

    @torch.no_grad()
    def _update(self) -> None:
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._window.draw is None and not self._whole["pending"]:
            return self._first_state()
        first = not (self._stepped or self._whole["capturable"] or distributed.alone())
        self._stepped |= first
        if found_inf is not None and float(found_inf):
            return None
        draw = self._window.draw
        if not self._trained.stayed(self.state):
            self._slots()  # they have moved since the sample was drawn
        unscaled = found_inf is not None and scale is None
        if unscaled and draw is not None and draw.products is not None:
            raise RuntimeError(UNSCALED)
        if self._whole["pending"] or draw is None or draw.outdated:  # from the sums over samples
            self._close(last=True, checked=scale is not None)
            slots = [s for s in self._slots() if "grad_sum" in s.state]
            draw, grads = None, state_of(slots, "grad_sum")
            products = state_of(slots, "product_sum")
        else:
            slots, grads = self._window.gradients(last=True, checked=scale is not None)
            products = draw.rank_products(slots)
            if products is not None:  # of a sample on each rank
                draw.leave()
                draw, grads = None, [g.to(p.dtype) for g, p in zip(grads, products, strict=True)]
        if found_inf is not None:
            unseen = [g for s, g in zip(slots, grads, strict=True) if s.param.grad is not g]
            if not all(g.isfinite().all() for g in unseen):
                return None  # of a sample whose gradients the scaler could not see any more
        if not slots:
            if not self._warned:
                warnings.warn(
                    "IVON.step(): a sample but no gradient; nothing changed", stacklevel=5
                )
            self._warned = True
            if not distributed.alone():  # for the other ranks it is a step
                self._age()
            return None
        if first:
            self._first_step = distributed.fingerprint([s.param for s in slots], grads)
        whole, samples = self._whole, max(self._whole["pending"], 1)
        factor, every = 1 / samples, whole["hess_every"]
        half = whole["antithetic"] and whole["samples"] == "shared" and samples % 2 == 1
        if half and not self._rests:
            warnings.warn(
                "IVON.step(): half a pair tells nothing of h, which rests: draw samples_due "
                "samples before a step",
                stacklevel=5,
            )
        if scale is not None:
            factor = factor / scale
        for run in self._window.runs(slots):
            group, params = run.group, run.params
            squares = scale is not None and group["hess_approx"] == "gradsq"
            settings = {k: group[k] for k in groups.SETTINGS}
            settings |= {"scale": factor, "product_scale": factor / scale if squares else factor}
            beta1, beta2 = group["betas"]
            settings["betas"] = beta1, 1.0 if half or self._rests else beta2**every
            state = run.momentum, run.hess, run.steps
            mine = [grads[i] for i in run.places]
            if draw is None:
                assert products is not None
                means, made = run.at_rest(), [products[i] for i in run.places]
                run.ops.update(means, mine, made, *state, **settings)
                for p, mean in zip(params, means, strict=True) if run.low else ():
                    p.copy_(mean)
            else:
                means, noise = draw.sources(run), draw.noise(run)
                stepped = Written(params)
                try:
                    run.ops.step(params, means, mine, *state, noise, draw.live, **settings)
                    stepped.whole = True
                finally:  # after an interrupt too: what has its new mean is not restored
                    draw.forget(run, stepped.each())
            for slot in run.slots:
                slot.state.pop("rounded", None)
            touch(run)
        if self._rests or not half:
            self._age()
        forget_copies()
        return None

    def _age(self) -> None:
        age, every = self._whole["hess_age"], self._whole["hess_every"]
        if every > 1:
            groups.count(self.param_groups, "hess_age", (age + 1) % every - age)

    @torch.no_grad()
    def _end_window(self) -> None:
        self._renew()
        self._window.end(self.state.values())
        groups.count(self.param_groups, "pending", -self._whole["pending"])

    def _first_state(self) -> None:
        """Allow the step without a sample that distributed checkpointing makes to get a state."""
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        learns = any(group["lr"] != 0 for group in self.param_groups)
        if self.state or learns or any(distributed.local(grad).any() for grad in grads):
            raise RuntimeError(NO_SAMPLE)
        auto = [group for group in self.param_groups if group["hess_init"] == "auto"]
        for group in auto:
            group["hess_init"] = 1.0
        try:
            self._slots()
        finally:
            for group in auto:  # the weights are not loaded yet: the first sample looks at them
                group["hess_init"] = "auto"
            self._trained.forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients. Those of a sample that waits for ``step()`` are not lost.

        But ``model.zero_grad(set_to_none=False)`` writes zeros into them, which counts as a change.
        """
        draw = self._window.draw
        if draw is not None and not set_to_none:
            for number, (held, _) in draw.held.items():
                p = draw.slots[number].param
                if p.grad is held:
                    p.grad = torch.zeros_like(held)
        super().zero_grad(set_to_none)

    # -- checkpoints, copies, the posterior -------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs beside the parameters' mean, never a perturbed weight.

        In the middle of a window, finished samples are held as their sums (``grad_sum``,
        ``product_sum`` in the state, their number as ``pending`` in the groups) and a live one is
        drawn again after loading.
        """
        if self._window.draw is not None:
            with suppress(ValueError):  # of another shape: the window says so
                self._slots()
        hook = self.register_state_dict_post_hook(
            lambda _, saved: checkpoint.add_window(saved, self._window), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            hook.remove()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; every tensor keeps its dtype and values, and moves to its parameter.

        A sample that stands in the parameters is dropped first.

        Raises:
            ValueError: the groups or the shapes are those of other parameters.
            RuntimeError: inside ``sampled_params``.
        """
        self._outside("load_state_dict()")
        seeded, seed = self._seeded, self._whole["seed"]
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, given: dict[str, Any]) -> None:
            checkpoint.check(self.param_groups, given)
            self._end_window()
            loaded.update(given)

        hook = self.register_load_state_dict_pre_hook(check)  # the last one: what it sees is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for p, number, group in checkpoint.matched(self.param_groups, loaded):
            for name, value in loaded["state"].get(number, {}).items():  # torch cast it like p
                if isinstance(value, Tensor):
                    on = groups.counter_device(p, group) if name == "step" else p.device
                    self.state[p][name] = value.to(on, copy=True)
        if self._whole["pending"] and not any("grad_sum" in s for s in self.state.values()):
            self._end_window()
            lost = "the checkpoint lost the sums of its unfinished window; its samples are dropped"
            warnings.warn(lost, stacklevel=3)
        groups.share_counters(self.param_groups)
        self._seeded = seeded or bool(seed != self._whole["seed"])

    def __getstate__(self) -> dict[str, Any]:
        if self._window.draw is not None:
            raise RuntimeError(
                "cannot copy or pickle IVON while a sample waits for step(): call step() first"
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults = {"hess_every": 1, "hess_age": 0, **self.defaults}  # newer than some copies
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._reset()

    @torch.no_grad()
    def posterior(self, model: nn.Module | Iterable[tuple[str, Tensor]]) -> Posterior:
        """The posterior N(m, 1/(λ(h+δ))) over the trained parameters, under their model's names.

        Args:
            model: the module, or its ``named_parameters()``. Wrappers' prefixes are dropped. Of a
                module, buffers and untrained parameters come along, so that a saved posterior can
                predict in a new process.

        Before the first step the Hessian is ``hess_init``. Of sharded parameters every rank gets
        the whole, so every rank must call this.

        Raises:
            ValueError: a trained parameter is not the model's.
        """
        names = self._names(model)
        mean, precision, prior = {}, {}, {}
        for slot in self._slots():
            name, width = names.pop(slot.param), slot.width
            ess = width.pop("ess")
            mean[name] = distributed.whole(distributed.like(self._window.mean(slot), slot.param))
            precision[name] = distributed.whole(curvature(slot.state["hess"], **width)) * ess
            prior[name] = torch.as_tensor(ess * width["weight_decay"], dtype=mean[name].dtype)
        buffers: dict[str, Tensor] = {}
        if isinstance(model, nn.Module):
            named = *model.named_buffers(), *((name, p) for p, name in names.items())  # not trained
            buffers.update((name, distributed.whole(t)) for name, t in named)
        sizes = {group["ess"] for group in self.param_groups}
        return Posterior(
            mean,
            precision,
            prior_precision=prior,
            ess=sizes.pop() if len(sizes) == 1 else None,
            buffers=buffers,
            settings={"optimizer": "IVON", "groups": [groups.plain(g) for g in self.param_groups]},
        )

    def _names(self, model: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
        """The names of a model's parameters, which must hold all that are trained."""
        distributed.gathered.free()  # the model may hold whole parameters in place of its shards
        named = [*(model.named_parameters() if isinstance(model, nn.Module) else model)]
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in named):
            raise TypeError("needs the model, or pairs as model.named_parameters() gives them")
        names = {p: name for name, p in named}
        if strangers := [s for s in self._slots() if s.param not in names]:
            told = ", ".join(f"{s.number} {tuple(s.param.shape)}" for s in strangers[:5])
            raise ValueError(
                "the model lacks parameters that the optimizer trains (number, shape): "
                f"{told}. Pass the model that it was built for."
            )
        return names

    @torch.no_grad()
    def diagnostics(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]] | None = None,
        *,
        loss: float | None = None,
        batch: int | None = None,
    ) -> Diagnostics:
        """How training goes: numbers of h, the noise and the steps, and what to do about them.

        It takes longer than a step: look every hundred or so. Of sharded parameters every rank
        gets the whole, a tensor at a time, so every rank must call this.

        Args:
            model: the module, or its ``named_parameters()``, for the tensors' names.
            loss: mean training loss per example at posterior samples, in nats: for the ELBO.
            batch: examples of a step, over all ranks, to judge the noise in h; times the samples
                where each context before a step has examples of its own. That of pairs is not
                judged: they are taken to share their examples.

        Raises:
            ValueError: a trained parameter is not the model's.

        Example:
            >>> import torch
            >>> from posterity import IVON
            >>> _ = torch.manual_seed(0)
            >>> x, model = torch.randn(8, 2), torch.nn.Linear(2, 1)
            >>> opt = IVON(model.parameters(), lr=0.1, ess=1000, betas=(0.9, 0.99999), seed=0)
            >>> def closure():
            ...     opt.zero_grad()
            ...     loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            ...     loss.backward()
            ...     return loss
            >>> for _ in range(20):
            ...     loss = opt.step(closure)
            >>> found = opt.diagnostics(model, loss=loss.item())
            >>> print([verdict.words for verdict in found.verdicts if not verdict.good][0][:15])
            h has not moved
        """
        names = {} if model is None else self._names(model)
        layers = []
        for slot in self._slots():
            state = slot.state
            own = distributed.like(self._window.mean(slot), slot.param)
            mean, momentum, hess = map(distributed.whole, (own, state["momentum"], state["hess"]))
            if mean.numel():
                name = clean_name(names.get(slot.param, str(slot.number)))
                steps = int(state["step"])
                layers.append(Layer.of(name, mean, momentum, hess, steps, slot.group))
        return Diagnostics(layers, loss, batch)
