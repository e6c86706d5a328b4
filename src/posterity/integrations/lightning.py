"""Lightning: IVON under a Trainer, and its posterior at validation and beside every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import metrics
from ..ivon import IVON
from ..perturbation import leave_one_out
from ..posterior import Posterior
from ..prediction import predict

if TYPE_CHECKING:  # it need not be installed
    from lightning.fabric.plugins import CheckpointIO  # pyright: ignore
    from lightning.pytorch import Callback, LightningModule, Trainer  # pyright: ignore
else:
    try:
        from lightning.fabric.plugins import CheckpointIO
        from lightning.pytorch import Callback
    except ImportError:  # there is then no Trainer to give the callback to
        Callback = CheckpointIO = object

__all__ = ["PosteriorCallback"]


class PosteriorCallback(Callback):
    """Trains IVON under a Lightning ``Trainer``, and shows and saves the posterior.

    - Every training batch runs at a posterior sample, the same one through all the batches that
      are accumulated for a step; between batches the parameters are the mean, so that validation,
      checkpoints and other callbacks see it. ``mc_samples > 1`` is left to ``step(closure)``.
    - With ``samples``, each validation batch of (inputs, targets) is also predicted by calling the
      module on the inputs, which must give logits (…, classes). Logged are ``mean/nll`` (in nats),
      ``mean/accuracy``, ``posterior/nll`` and ``posterior/accuracy``.
    - With ``leave_one_out``, training data, each validation logs ``leave_one_out/nll``: what
      :func:`posterity.leave_one_out` estimates of the test loss without test data.
    - With ``diagnostics``, each validation logs the numbers of
      :meth:`posterity.IVON.diagnostics`, as ``posterior/noise_to_weight``.
    - Beside every checkpoint ``path`` lies ``path.posterior.safetensors``, for
      :meth:`Posterior.load`; its names are the module's. It goes when the checkpoint goes. Beside
      weights alone (``save_weights_only``) lies none: Lightning does not ask then.

    Args:
        samples: of the posterior, for each validation batch; 0 leaves validation alone.
        seed: of the stream of these samples.
        save: whether to save posteriors.
        leave_one_out: training examples, all or a random part: a pair or a loader.
        diagnostics: whether to log them.
        options: of :func:`posterity.leave_one_out`; ``n_train`` is λ unless it is given.

    Raises:
        ValueError: the module has no IVON or several, or ``mc_samples > 1`` with accumulated
            batches or a gradient scaler, neither of which ``step(closure)`` can repeat.

    Example:
        >>> from posterity.integrations.lightning import PosteriorCallback
        >>> callbacks = [PosteriorCallback(samples=16)]  # of lightning.Trainer(callbacks=callbacks)
    """

    def __init__(
        self,
        samples: int = 0,
        *,
        seed: int = 0,
        save: bool = True,
        leave_one_out: Any = None,
        diagnostics: bool = False,
        **options: Any,
    ):
        self.samples, self.seed, self.save = samples, seed, save
        self.left_out, self.options = leave_one_out, options
        self.diagnostics = diagnostics
        self.posterior: Posterior | None = None  # of a validation
        self.saving: Posterior | None = None  # for the file that is written next
        self._hook: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        opt = _ivon(trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        once = trainer.accumulate_grad_batches > 1 or scaler is not None
        if pl_module.automatic_optimization and _several(opt) and once:
            raise ValueError("mc_samples > 1 needs accumulate_grad_batches=1 and no 16-mixed")
        self._hook = opt.register_step_pre_hook(_finish_window)
        if self.save:
            trainer.strategy.checkpoint_io = _Beside(trainer.strategy.checkpoint_io, self)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if pl_module.automatic_optimization and not _several(opt := _ivon(trainer)):
            opt.train()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        _ivon(trainer).eval()

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        if trainer.optimizers:
            _ivon(trainer).eval()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wanted = self.samples or self.left_out is not None
        predicts = wanted and trainer.optimizers  # not so in Trainer.validate()
        self.posterior = _ivon(trainer).posterior(pl_module) if predicts else None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if self.posterior is None or not self.samples:
            return
        for name, posterior in (("mean", None), ("posterior", self.posterior)):
            with trainer.precision_plugin.forward_context():
                found = predict(pl_module, posterior, [batch], self.samples, seed=self.seed)
            scores = {
                f"{name}/nll": metrics.nll(found.log_probs, batch[1], log=True),
                f"{name}/accuracy": metrics.accuracy(found.probs, batch[1]),
            }
            pl_module.log_dict(scores, on_epoch=True, batch_size=len(batch[1]), sync_dist=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.posterior is not None and self.left_out is not None:
            options = {"n_train": self.posterior.ess, **self.options}
            found = leave_one_out(pl_module, self.posterior, self.left_out, **options)
            pl_module.log("leave_one_out/nll", found.nll, sync_dist=True)
        if self.diagnostics and trainer.optimizers:
            scalars = _ivon(trainer).diagnostics(pl_module).scalars()
            pl_module.log_dict(scalars, sync_dist=True)

    def on_validation_end(self, *_: Any) -> None:
        self.posterior = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.save and trainer.optimizers:  # on every rank: sharded parameters need all
            self.saving = _ivon(trainer).posterior(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
        if isinstance(files := trainer.strategy.checkpoint_io, _Beside):
            trainer.strategy.checkpoint_io = files.inner


def _ivon(trainer: Trainer) -> IVON:
    found = [opt for opt in trainer.optimizers if isinstance(opt, IVON)]
    if len(found) != 1:
        raise ValueError(f"PosteriorCallback is for one IVON, and the module has {len(found)}")
    return found[0]


def _several(opt: IVON) -> bool:
    return opt.param_groups[0]["mc_samples"] > 1


def _finish_window(opt: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """In manual optimisation Lightning makes step() a step(closure), which would draw a sample."""
    draw = opt._window.draw
    if opt.param_groups[0]["pending"] or (draw is not None and not draw.live):
        kwargs.pop("closure", lambda: None)()
    return args, kwargs


class _Beside(CheckpointIO):
    """Files of another kind, and a posterior beside each."""

    def __init__(self, inner: Any, owner: PosteriorCallback):
        self.inner, self.owner = inner, owner

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.inner.save_checkpoint(checkpoint, path, storage_options)
        posterior, self.owner.saving = self.owner.saving, None
        if posterior is not None:  # Lightning asks for none beside weights alone
            posterior.save(f"{path}.posterior.safetensors")

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)
        Path(f"{path}.posterior.safetensors").unlink(missing_ok=True)

    def teardown(self) -> None:
        self.inner.teardown()
