"""Lightning changes nothing: its Trainer and the plain loop end in the same bits."""

import logging
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

from posterity import IVON, Posterior, leave_one_out, metrics, predict
from posterity_studies.models import NETWORKS
from posterity_studies.recipes import recipe
from posterity_studies.tasks import load_task
from ways import assert_same, bits, weights

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO  # noqa: E402

from posterity.integrations.lightning import PosteriorCallback  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)

N, BATCH = 96, 16
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1))
Y = (X @ torch.randn(4, 3, generator=torch.Generator().manual_seed(2))).argmax(1)
BF16 = torch.bfloat16


def loader(batch=BATCH):
    return DataLoader(TensorDataset(X, Y), batch)


class Classifier(lightning.LightningModule):
    """Automatic optimisation."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.settings = {"lr": 0.3, "ess": N, "hess_init": 0.1, "seed": 3, **settings}
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.seen.append(weights(self))

    def configure_optimizers(self):
        opt = IVON(self.parameters(), **self.settings)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
        return [opt], [{"scheduler": schedule, "interval": "step"}]


def fit(model, *callbacks, ckpt_path=None, validate=False, batch=BATCH, **settings):
    trainer = lightning.Trainer(
        accelerator="cpu",
        **{"enable_checkpointing": False, "max_epochs": 2, "logger": False, **settings},
        **{"enable_progress_bar": False, "enable_model_summary": False},
        callbacks=list(callbacks),
    )
    trainer.fit(model, loader(batch), loader() if validate else None, ckpt_path=ckpt_path)
    return trainer


def plain(model, epochs=2, k=1, accumulate=1, clip=None, autocast=nullcontext, scaler=None):
    """The loop that Lightning is compared with."""
    [opt], [schedule] = model.configure_optimizers()
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(epochs):
        batches = list(loader())
        for i in range(0, len(batches), accumulate):
            for _ in range(k):
                with opt.sampled_params(train=True):
                    opt.zero_grad()
                    for x, y in batches[i : i + accumulate]:
                        with autocast():
                            value = cross_entropy(model(x), y) / accumulate
                        scaler.scale(value).backward()
                    if clip:
                        clip_grad_norm_(model.parameters(), clip)
            scaler.step(opt)
            scaler.update()
            schedule["scheduler"].step()
    return opt


def assert_equal(model, trainer, other, opt):
    assert trainer.global_step > 0
    assert_same(bits(model, trainer.optimizers[0]), bits(other, opt))


@pytest.mark.parametrize("store_mean", [True, False])
@pytest.mark.parametrize("callbacks", [(), (PosteriorCallback(save=False),)])
def test_automatic_optimisation_is_the_plain_loop(callbacks, store_mean):
    model, other = Classifier(store_mean=store_mean), Classifier(store_mean=store_mean)
    trainer = fit(model, *callbacks)
    assert_equal(model, trainer, other, plain(other))


@pytest.mark.parametrize("callbacks", [(), (PosteriorCallback(save=False),)])
def test_several_samples_a_step(callbacks):
    model, other = Classifier(mc_samples=3), Classifier(mc_samples=3)
    assert_equal(model, fit(model, *callbacks), other, plain(other, k=3))


def test_accumulated_batches_share_one_sample():
    model, other = Classifier(), Classifier()
    trainer = fit(model, PosteriorCallback(save=False), accumulate_grad_batches=3)
    assert trainer.global_step == 4
    assert_equal(model, trainer, other, plain(other, accumulate=3))


@pytest.mark.parametrize("callbacks", [(), (PosteriorCallback(save=False),)])
def test_clipping(callbacks):
    model, other = Classifier(), Classifier()
    trainer = fit(model, *callbacks, gradient_clip_val=0.1)
    assert_equal(model, trainer, other, plain(other, clip=0.1))
    unclipped = Classifier()
    plain(unclipped)
    assert not torch.equal(weights(unclipped)[0], weights(model)[0])


class Clipped(Classifier):
    """Lightning itself refuses to clip for optimizers that unscale by themselves."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        clip_grad_norm_(self.parameters(), gradient_clip_val)


@pytest.mark.parametrize("callbacks", [(), (PosteriorCallback(save=False),)])
def test_bf16_mixed_with_clipping(callbacks):
    model, other = Clipped(), Clipped()
    trainer = fit(model, *callbacks, precision="bf16-mixed", gradient_clip_val=0.1)
    opt = plain(other, clip=0.1, autocast=lambda: torch.autocast("cpu", BF16, cache_enabled=False))
    assert_equal(model, trainer, other, opt)


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=3)


def test_fp16_mixed_with_overflows():
    model, other = Classifier(), Classifier()
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    trainer = fit(model, PosteriorCallback(save=False), plugins=plugin)
    mine = scaler()
    opt = plain(other, autocast=lambda: torch.autocast("cpu", torch.half), scaler=mine)
    assert_equal(model, trainer, other, opt)
    assert mine.get_scale() == plugin.scaler.get_scale() != 2.0**17


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_refuses_to_clip_in_mixed_precision(precision):
    plugin = MixedPrecision(precision, "cpu", scaler() if precision == "16-mixed" else None)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Classifier(), PosteriorCallback(save=False), plugins=plugin, gradient_clip_val=0.1)


class Watch(lightning.Callback):
    """What others see between batches: the mean."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, model, *args):
        self.seen.append(weights(model))


def test_between_batches_and_at_validation_the_weights_are_the_mean():
    model, watch = Classifier(), Watch()
    halves = {"accumulate_grad_batches": 3, "val_check_interval": 2}  # in the middle of a window
    fit(model, PosteriorCallback(), watch, validate=True, max_epochs=1, **halves)
    first = weights(Classifier())
    for seen in [*model.seen[:3], *watch.seen[:2]]:  # the sanity check, then batches 1 and 2
        assert_same(seen, first)
    after = watch.seen[2]
    assert not torch.equal(after[0], first[0])
    for seen in watch.seen[3:5]:
        assert_same(seen, after)
    unwatched = Classifier()
    fit(unwatched, PosteriorCallback(), max_epochs=1, accumulate_grad_batches=3)
    assert_same(weights(model), weights(unwatched))


def test_after_an_exception_the_weights_are_the_mean():
    class Fails(Classifier):
        def training_step(self, batch, index):
            if index == 1:
                raise ValueError("here")
            return super().training_step(batch, index)

    model = Fails()
    with pytest.raises(ValueError, match="here"):
        fit(model, PosteriorCallback(), accumulate_grad_batches=3)
    assert_same(weights(model), weights(Classifier()))


class Manual(Classifier):
    """Manual optimisation, in one of the ways."""

    way, k = "context", 1

    @property
    def automatic_optimization(self):
        return False

    def training_step(self, batch, index):
        opt = self.optimizers()
        assert type(opt).__name__ == "LightningIVON"
        if self.way == "train":
            opt.zero_grad()
            opt.train()
            self.manual_backward(super().training_step(batch, index))
        for _ in range(self.k if self.way == "context" else 0):
            with opt.sampled_params(train=True):
                opt.zero_grad()
                self.manual_backward(super().training_step(batch, index))
        if self.way == "closure":
            opt.step(lambda: self.closure(opt, batch, index))
        else:
            opt.step()
        self.lr_schedulers().step()

    def closure(self, opt, batch, index):
        opt.zero_grad()
        value = super().training_step(batch, index)
        self.manual_backward(value)
        return value


@pytest.mark.parametrize(("way", "k"), [("context", 1), ("context", 2), ("train", 1)])
def test_manual_optimisation(way, k):
    model, other = Manual(), Classifier()
    model.way, model.k = way, k
    trainer = fit(model, PosteriorCallback(save=False))
    assert trainer.global_step == 12
    assert_equal(model, trainer, other, plain(other, k=k))


@pytest.mark.parametrize("callbacks", [(), (PosteriorCallback(save=False),)])
def test_manual_optimisation_with_a_closure(callbacks):
    model, other = Manual(mc_samples=2), Classifier()
    model.way = "closure"
    trainer = fit(model, *callbacks)
    assert_equal(model, trainer, other, plain(other, k=2))


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"scaler": True}])
def test_several_samples_that_a_closure_cannot_draw_are_refused(settings):
    if "scaler" in settings:
        settings = {"plugins": MixedPrecision("16-mixed", "cpu", scaler())}
    with pytest.raises(ValueError, match="mc_samples"):
        fit(Classifier(mc_samples=2), PosteriorCallback(), **settings)


def test_a_module_without_ivon_is_refused():
    class Other(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(ValueError, match="for one IVON, and the module has 0"):
        fit(Other(), PosteriorCallback())


def test_validation_shows_the_posterior_beside_the_mean():
    model = Classifier(hess_init=0.01)
    trainer = fit(model, PosteriorCallback(samples=8, seed=5), validate=True)
    seen = {name: value.item() for name, value in trainer.callback_metrics.items()}
    posterior = trainer.optimizers[0].posterior(model)
    for name, q in (("mean", None), ("posterior", posterior)):
        probs = predict(model, q, X, samples=8, seed=5).probs
        assert seen[f"{name}/nll"] == pytest.approx(metrics.nll(probs, Y), rel=1e-5)
        assert seen[f"{name}/accuracy"] == pytest.approx(metrics.accuracy(probs, Y), rel=1e-5)
    assert seen["posterior/nll"] != pytest.approx(seen["mean/nll"], rel=1e-3)
    alone = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(callbacks=[PosteriorCallback(samples=8)], **alone)
    trainer.validate(model, loader(), verbose=False)  # without an optimizer
    assert not trainer.callback_metrics
    unseen = Classifier(hess_init=0.01)
    fit(unseen, PosteriorCallback())
    assert_same(weights(model), weights(unseen))


def test_the_test_loss_is_estimated_from_training_data_at_each_validation():
    model, callback = Classifier(), PosteriorCallback(leave_one_out=(X, Y))
    trainer = fit(model, callback, validate=True)
    posterior = trainer.optimizers[0].posterior(model)
    logged = trainer.callback_metrics["leave_one_out/nll"].item()
    assert logged == pytest.approx(leave_one_out(model, posterior, (X, Y)).nll, rel=1e-5)
    assert logged > cross_entropy(model(X), Y).item()
    part = PosteriorCallback(leave_one_out=(X[:8], Y[:8]), full=False)  # λ/N is still 1
    model = Classifier()
    found = fit(model, part, validate=True).callback_metrics["leave_one_out/nll"].item()
    expected = leave_one_out(model, posterior, (X[:8], Y[:8]), full=False, n_train=N).nll
    assert found == pytest.approx(expected, rel=1e-5)


def test_diagnostics_are_logged_at_each_validation():
    model = Classifier()
    trainer = fit(model, PosteriorCallback(diagnostics=True), validate=True)
    found = trainer.optimizers[0].diagnostics(model)
    logged = {k: v.item() for k, v in trainer.callback_metrics.items() if "posterior/" in k}
    assert logged == pytest.approx(found.scalars(), rel=1e-6)
    assert logged["posterior/noise_to_weight"] > 0


def test_the_posterior_predicts_in_the_trainers_precision():
    class Seen(Classifier):
        def forward(self, x):
            logits = super().forward(x)
            self.seen.append(logits.dtype)
            return logits

        def validation_step(self, batch, index):
            pass

    model = Seen()
    once = {"max_epochs": 1, "num_sanity_val_steps": 0, "precision": "bf16-mixed"}
    fit(model, PosteriorCallback(samples=2), validate=True, **once)
    assert model.seen == [BF16] * 6 * (1 + 1 + 2)  # training, the mean, two samples


def test_a_posterior_lies_beside_every_checkpoint(tmp_path):
    model, callback = Classifier(), PosteriorCallback(samples=2)
    saves = ModelCheckpoint(tmp_path, monitor="mean/nll", save_top_k=1, save_last=True)
    trainer = fit(model, callback, saves, enable_checkpointing=True, validate=True, max_epochs=4)
    found = sorted(p.name for p in tmp_path.iterdir())
    names = [p for p in found if p.endswith(".ckpt")]
    assert len(names) == 2
    assert found == sorted([*names, *(f"{name}.posterior.safetensors" for name in names)])
    posterior = Posterior.load(tmp_path / "last.ckpt.posterior.safetensors")
    expected = trainer.optimizers[0].posterior(model)
    for part in ("mean", "precision", "prior_precision"):
        assert_same(getattr(posterior, part), getattr(expected, part))


def test_beside_weights_alone_lies_no_posterior_of_another_step(tmp_path):
    saves = [
        ModelCheckpoint(tmp_path / kind, every_n_train_steps=n, save_top_k=-1, **how)
        for kind, n, how in (("whole", 4, {}), ("weights", 3, {"save_weights_only": True}))
    ]
    callback = PosteriorCallback()
    fit(Classifier(), callback, *saves, enable_checkpointing=True, max_epochs=2)
    whole, weights = (
        sorted(p.name for p in (tmp_path / k).iterdir()) for k in ("whole", "weights")
    )
    assert len(whole) > 2
    assert sum(name.endswith(".posterior.safetensors") for name in whole) == len(whole) / 2
    assert len(weights) > 2
    assert not any(name.endswith(".posterior.safetensors") for name in weights)
    assert callback.saving is None


def test_nothing_stays_behind():
    trainer = fit(Classifier(), PosteriorCallback())
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_bit_exact(tmp_path, accumulate):
    settings = {"enable_checkpointing": True, "accumulate_grad_batches": accumulate}
    saves = ModelCheckpoint(tmp_path, save_last=True)
    fit(Classifier(), PosteriorCallback(), saves, max_epochs=1, **settings)
    path = tmp_path / "last.ckpt"
    model = Classifier(seed=99)
    settings["enable_checkpointing"] = False
    resumed = fit(model, PosteriorCallback(), ckpt_path=path, max_epochs=3, **settings)
    other = Classifier()
    opt = plain(other, epochs=3, accumulate=accumulate)
    assert resumed.global_step == 18 // accumulate
    assert_equal(model, resumed, other, opt)


@pytest.mark.network
def test_the_fashion_mnist_recipe():
    """A hundred steps of the recipe's network and settings on real images."""
    chosen, steps = recipe("fashion-mnist"), 100
    task, size = load_task(chosen), chosen.batch_size
    inputs, targets = (values[: steps * size] for values in task.train)

    class Recipe(Classifier):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = NETWORKS[chosen.network]()

        def configure_optimizers(self):
            return chosen.settings("ivon").build(self, len(targets), steps=0, seed=0)

    model = Recipe()
    settings = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[PosteriorCallback(16)], **settings
    )
    training = DataLoader(TensorDataset(inputs, targets), size)
    test = TensorDataset(*(values[:1000] for values in task.test))
    trainer.fit(model, training, DataLoader(test, 500))
    other = Recipe()
    opt = other.configure_optimizers()
    for x, y in training:
        with opt.sampled_params(train=True):
            opt.zero_grad()
            cross_entropy(other(x), y).backward()
        opt.step()
    assert_same(bits(model, trainer.optimizers[0]), bits(other, opt))
    seen = trainer.callback_metrics
    probs = predict(other, opt.posterior(other), test, samples=16).probs
    assert seen["posterior/nll"].item() == pytest.approx(metrics.nll(probs, test[:][1]), rel=1e-4)
    assert seen["posterior/accuracy"].item() > 0.75
    assert steps == trainer.global_step
