"""For Hugging Face's Trainer, which needs nothing to train with IVON but the optimizer::

    Trainer(model, args, ..., optimizer_cls_and_kwargs=(IVON, {"lr": 0.1, "ess": len(train)}))

It calls ``optimizer.train()`` before each batch and ``optimizer.eval()`` before it evaluates.
Several samples a step take :class:`SeveralSamples`.
"""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ivon import IVON
from ..perturbation import leave_one_out
from ..posterior import Posterior

if TYPE_CHECKING:  # it need not be installed
    from transformers import (  # pyright: ignore
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
else:
    try:
        from transformers import TrainerCallback
    except ImportError:  # there is then no Trainer to give the callback to
        TrainerCallback = object

NAME = "posterior.safetensors"


class PosteriorCallback(TrainerCallback):
    """Saves the posterior beside every checkpoint, and adds diagnostics to what Trainer logs.

    ``checkpoint-STEP/posterior.safetensors`` is what ``Posterior.load`` reads, and so is
    ``posterior.safetensors`` in the output folder at the end: the best checkpoint's where Trainer
    loads that. Of a PEFT model it holds the adapter alone. Logged are the
    numbers of :meth:`posterity.IVON.diagnostics`, as ``posterior/noise_to_weight``. They stand in
    Trainer's log history; callbacks that report elsewhere see them if they come later.

    Args:
        leave_one_out: training examples, all or a random part, as batches that have ``labels``.
            Each evaluation then also has ``eval_leave_one_out``: what
            :func:`posterity.leave_one_out` estimates of the loss without test data.
        diagnostics: whether to log them.
        options: of :func:`posterity.leave_one_out`. ``n_train`` is λ unless it is given, and
            examples are taken one at a time, since most of these models need that.

    Example::

        Trainer(..., callbacks=[PosteriorCallback(), TensorBoardCallback()])
    """

    def __init__(self, *, leave_one_out: Any = None, diagnostics: bool = True, **options: Any):
        self.left_out, self.options = leave_one_out, options
        self.diagnostics = diagnostics

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **given: Any,
    ) -> None:
        if self.left_out is None or given["optimizer"] is None:
            return
        posterior = posterior_of(_ivon(given["optimizer"]), given["model"])
        options = {"n_train": posterior.ess, "vectorize": False, **self.options}
        found = leave_one_out(given["model"], posterior, self.left_out, **options)
        for log in (metrics, state.log_history[-1]):
            if log is not None:
                log["eval_leave_one_out"] = found.nll

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        posterior = posterior_of(_ivon(given["optimizer"]), given["model"])
        if state.is_world_process_zero:
            posterior.save(_checkpoint(args, state.global_step) / NAME)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            # the weights are that checkpoint's now, but the optimizer's Hessian is the last step's
            best = Path(state.best_model_checkpoint) / NAME
            if state.is_world_process_zero and best.exists():
                shutil.copy(best, _folder(args) / NAME)
            elif state.is_world_process_zero:
                warnings.warn(
                    f"no posterior is saved: the best checkpoint has no {best}", stacklevel=2
                )
            return
        posterior = posterior_of(_ivon(given["optimizer"]), given["model"])
        if state.is_world_process_zero:
            _folder(args).mkdir(parents=True, exist_ok=True)
            posterior.save(_folder(args) / NAME)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **given: Any,
    ) -> None:
        if given["optimizer"] is None or not self.diagnostics:  # it evaluates before it has trained
            return
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        about = {"batch": batch, "loss": (logs or {}).get("loss")}
        found = _ivon(given["optimizer"]).diagnostics(given["model"], **about).scalars()
        state.log_history[-1].update(found)
        if logs is not None:
            logs.update(found)


class SeveralSamples:
    """Mixin for Trainer that draws all ``mc_samples`` of a step.

    Or for a class made of it, whose ``training_step`` is called for each sample and micro-batch.
    Each sample is of the whole step, with the same dropout, and its gradient clipped to
    ``max_grad_norm`` before they are summed up; ``grad_norm`` in the logs is the mean of their
    norms. The parameters' ``grad`` is then empty: ``on_pre_optimizer_step`` finds none. Accumulated
    micro-batches wait for the last of their step, for each sample has to see them all: their loss
    is 0 until then. A ``training_step`` must not count its calls.

    Raises:
        ValueError: in training with ``fp16``, whose scaler looks at one gradient a step.

    Example::

        class PairedTrainer(SeveralSamples, Trainer):
            pass

        preset = IVON.defaults_for("language_pairs", n_train, steps)
        PairedTrainer(model, args, ..., optimizer_cls_and_kwargs=(IVON, preset))

    (The arguments' ``weight_decay`` counts, not the preset's.)
    """

    _grad_norm: float | Tensor = 0.0  # of the last step, before gradients were clipped
    _waiting: tuple[Any, ...] = ()  # calls of training_step, for the last of their step

    def train(self, *args: Any, **given: Any) -> Any:
        """Trainer's training; an unfinished step's micro-batches go with it."""
        try:
            return super().train(*args, **given)  # pyright: ignore
        finally:
            self._waiting = ()

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **given: Any) -> Tensor:
        """The mean loss of the step's samples, once all its micro-batches are there, and before 0.

        The samples' gradients are with the optimizer.
        """
        trainer: Any = self
        arguments, accelerator = trainer.args, trainer.accelerator
        if accelerator.scaler is not None:
            raise ValueError("SeveralSamples needs bf16 in place of fp16")
        opt = _ivon(trainer.optimizer)
        calls = (*self._waiting, (inputs, args, given))
        if not accelerator.sync_gradients:
            self._waiting = calls
            return torch.zeros((), device=arguments.device)
        self._waiting = ()
        step = super().training_step  # pyright: ignore
        always = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        limit = arguments.max_grad_norm if arguments.max_grad_norm > 0 else math.inf
        gpu = [arguments.device] if arguments.device.type == "cuda" else []
        losses, norms = [], []
        opt._end_window()  # of a step that was interrupted between its samples
        for left in range(opt.samples_due, 0, -1):
            same = torch.random.fork_rng(gpu, enabled=left > 1)  # dropout, for the next one
            with same, opt.sampled_params(train=True):
                for k, (batch, rest, named) in enumerate(calls, 1):
                    synced = always or k == len(calls)
                    with nullcontext() if synced else accelerator.no_sync(model):
                        losses.append(step(model, copy.copy(batch), *rest, **named))
                norms.append(accelerator.clip_grad_norm_(model.parameters(), limit))
        opt.zero_grad()  # Trainer would clip the last sample's again
        self._grad_norm = torch.stack(norms).mean()
        return torch.stack(losses).sum() / len(norms)

    def log(self, logs: dict[str, float], *args: Any, **given: Any) -> None:
        """Trainer's log, with the norm."""
        if "grad_norm" in logs:
            logs["grad_norm"] = float(self._grad_norm)
        super().log(logs, *args, **given)  # pyright: ignore


def posterior_of(opt: IVON, model: nn.Module) -> Posterior:
    """The posterior over the model; over the adapter, without its base, if the model is PEFT's."""
    if hasattr(model, "peft_config"):
        return opt.posterior((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return opt.posterior(model)


def _folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    """Where Trainer has just saved; a search keeps each trial's in a folder of its own."""
    folder, name = _folder(args), f"checkpoint-{step}"
    found = [path for path in (folder / name, *folder.glob(f"*/{name}")) if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime, default=folder / name)


def _ivon(optimizer: Any) -> IVON:
    """The optimizer inside Accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, IVON):
        raise TypeError(
            "PosteriorCallback and SeveralSamples need IVON, but Trainer trains with "
            f"{type(inner)}: pass optimizer_cls_and_kwargs=(IVON, settings)"
        )
    return inner
