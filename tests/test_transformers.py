"""Hugging Face's Trainer trains as the plain loop does, on the same noise, to the bit."""

import copy

import pytest
import torch
from torch import nn

from posterity import IVON, Posterior, leave_one_out, predict
from posterity_studies.data import packages

transformers = pytest.importorskip("transformers")
ours = pytest.importorskip("posterity.integrations.transformers")
PosteriorCallback, SeveralSamples = ours.PosteriorCallback, ours.SeveralSamples
pytestmark = pytest.mark.slow

SETTINGS = {"lr": 0.3, "ess": 96.0, "hess_init": 0.3, "betas": (0.9, 0.99), "seed": 3}
DATA = [
    {
        "input_ids": torch.randint(50, (6,), generator=torch.Generator().manual_seed(i)),
        "labels": i % 3,
    }
    for i in range(96)
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **small,
        vocab_size=50,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=3,
        **none,
    )
    return transformers.BertForSequenceClassification(config)


class Seen(transformers.TrainerCallback):
    """What Trainer showed: the batches, in order, and the weights when it evaluated and saved."""

    def __init__(self, model):
        self.batches, self.evaluated = [], []
        self.handle = model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, model, args, kwargs):
        if model.training:
            self.batches.append({k: v.clone() for k, v in kwargs.items() if v is not None})
        else:
            self.evaluated.append(weights(model))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


class PairedTrainer(SeveralSamples, transformers.Trainer):
    pass


def trainer(
    model,
    folder,
    callbacks=(),
    optimizers=(None, None),
    train=DATA,
    settings=SETTINGS,
    kind=transformers.Trainer,
    **given,
):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            **{"use_cpu": True, "report_to": [], "per_device_train_batch_size": 8, "max_steps": 6},
            **{"lr_scheduler_type": "constant", "weight_decay": 0.01, "disable_tqdm": True},
            **{"save_strategy": "no", "logging_strategy": "no", **given},
        },
    )
    how = {"optimizer_cls_and_kwargs": (IVON, settings)} if optimizers[0] is None else {}
    return kind(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=DATA[:16],
        optimizers=optimizers,
        callbacks=list(callbacks),
        **how,
    )


def groups(model, decay=0.01):
    """Trainer's own: no decay for biases and norms, where the prior is flat then."""
    decayed = [n for n, _ in model.named_parameters() if not ("bias" in n or "LayerNorm" in n)]
    named = dict(model.named_parameters())
    rest = [p for n, p in named.items() if n not in decayed]
    return [
        {"params": [named[n] for n in decayed], "weight_decay": decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def plain(model, batches, accumulate=1, clip=1.0, autocast=False, decay=0.01, settings=SETTINGS):
    opt = IVON(groups(model, decay), **settings)
    model.train()
    for first in range(0, len(batches), accumulate):
        opt.train()
        for batch in batches[first : first + accumulate]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            whole = "num_items_in_batch" in batch  # the model has divided by it then
            (loss if whole else loss / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
    return opt


WAYS = [
    {},
    {"gradient_accumulation_steps": 2},
    {"max_grad_norm": 0.05},
    {"bf16": True},
    {"gradient_checkpointing": True},
]


@pytest.mark.parametrize("given", WAYS, ids=str)
def test_trainer_is_the_plain_loop(given, model, tmp_path):
    ours, theirs = copy.deepcopy(model), model
    seen = Seen(ours)
    its = trainer(ours, tmp_path, [seen], **given)
    its.train()
    opt = plain(
        theirs,
        seen.batches,
        accumulate=given.get("gradient_accumulation_steps", 1),
        clip=given.get("max_grad_norm", 1.0),
        autocast=given.get("bf16", False),
    )
    equal(weights(ours), weights(theirs))
    mine = its.optimizer.optimizer.posterior(ours)
    equal(mine.precision, opt.posterior(theirs).precision)


PAIRS = {"mc_samples": 2, "antithetic": True, "hess_every": 2}


SEVERAL = [
    (PAIRS, {}),
    ({"mc_samples": 3}, {"max_grad_norm": 0.05}),
    (PAIRS, {"bf16": True}),
    ({}, {}),
    (PAIRS, {"gradient_accumulation_steps": 5, "max_grad_norm": 0.05}),
]


@pytest.mark.parametrize(("settings", "given"), SEVERAL, ids=str)
def test_several_samples_a_step_are_the_plain_loop(settings, given, model, tmp_path):
    """Each on the whole step's examples, and clipped by itself."""
    ours, theirs = copy.deepcopy(model), model
    seen, settings = Seen(ours), SETTINGS | settings
    its = trainer(ours, tmp_path, [seen], settings=settings, kind=PairedTrainer, **given)
    logged = its.train().training_loss
    opt, batches = IVON(groups(theirs), **settings), iter(seen.batches)
    theirs.train()
    accumulate, losses = given.get("gradient_accumulation_steps", 1), []
    epoch = [min(accumulate, 12 - i) for i in range(0, 12, accumulate)]  # its last step is short
    for count in (epoch * 6)[:6]:
        first, due = None, opt.samples_due
        for _ in range(due):
            sample = [next(batches) for _ in range(count)]
            first = first or sample
            with opt.sampled_params(train=True):
                opt.zero_grad()
                for batch, expected in zip(sample, first, strict=True):
                    equal(batch, expected)
                    with torch.autocast("cpu", torch.bfloat16, enabled=given.get("bf16", False)):
                        loss = theirs(**batch).loss
                    part = loss if "num_items_in_batch" in batch else loss / count
                    part.backward()
                    losses.append(part.item() / due)
                nn.utils.clip_grad_norm_(theirs.parameters(), given.get("max_grad_norm", 1.0))
        opt.step()
    assert next(batches, None) is None
    assert logged == pytest.approx(sum(losses) / 6, rel=1e-5)
    equal(weights(ours), weights(theirs))
    state = its.optimizer.optimizer.state_dict()["state"]
    assert all(
        torch.equal(s["hess"], state[i]["hess"]) for i, s in opt.state_dict()["state"].items()
    )


def test_the_samples_of_a_step_have_the_same_dropout(model, tmp_path):
    states = []
    model.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state().sum().item()))
    model.bert.embeddings.dropout.p = 0.1
    settings = SETTINGS | PAIRS | {"hess_every": 1}
    trainer(model, tmp_path, settings=settings, kind=PairedTrainer).train()
    assert states[::2] == states[1::2]
    assert len(set(states)) == 6


@pytest.mark.parametrize("accumulate", [1, 3])
def test_several_samples_resume_log_and_save(accumulate, model, tmp_path):
    whole, killed = copy.deepcopy(model), copy.deepcopy(model)
    how = {"settings": SETTINGS | PAIRS, "kind": PairedTrainer, "callbacks": [PosteriorCallback()]}
    how |= {"gradient_accumulation_steps": accumulate}
    how |= {"save_strategy": "steps", "save_steps": 3, "logging_strategy": "steps"}
    how |= {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    its = trainer(whole, tmp_path / "whole", **how)
    its.train()
    logs = [log for log in its.state.log_history if "grad_norm" in log]
    assert len({log["grad_norm"] for log in logs}) == len(logs) == 6
    assert max(log["grad_norm"] for log in logs) > 0.3
    stopped = how | {"callbacks": [PosteriorCallback(), StopAt(4)]}
    trainer(killed, tmp_path / "killed", **stopped).train()
    resumed = trainer(copy.deepcopy(model), tmp_path / "killed", **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-3"))
    equal(weights(resumed.model), weights(whole))
    posterior = Posterior.load(tmp_path / "whole" / "posterior.safetensors")
    equal({n: posterior.mean[n] for n in weights(whole)}, weights(whole))


class Interrupt(transformers.TrainerCallback):
    """Ends training in its second step, by an event of Trainer's."""

    def __init__(self, where):
        setattr(self, where, self.interrupt)

    def interrupt(self, args, state, control, **_):
        if state.global_step == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["on_substep_end", "on_pre_optimizer_step", "second sample"])
def test_an_interrupted_step_leaves_nothing_for_the_next_training(where, model, tmp_path):
    how = {"settings": SETTINGS | PAIRS | {"hess_every": 1}, "kind": PairedTrainer}
    how |= {"callbacks": [Interrupt(where)], "gradient_accumulation_steps": 2}
    its = trainer(model, tmp_path, **how)
    calls = []

    def interrupt(*_):
        calls.append(0)
        if len(calls) == 4 + 3 and where == "second sample":
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        its.train()
    handle.remove()
    its.remove_callback(Interrupt)
    seen = Seen(model)
    its.train()
    assert len(seen.batches) == 2 * 2 * 6


def test_a_sample_without_gradients_ends(model, tmp_path):
    """Of parameters that the batches do not reach."""
    settings = SETTINGS | PAIRS
    opt = IVON([nn.Parameter(torch.zeros(3))], **settings)
    schedule = torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)
    its = trainer(model, tmp_path, optimizers=(opt, schedule), kind=PairedTrainer)
    with pytest.warns(UserWarning, match="no gradient"):
        its.train()


def test_several_samples_refuse_what_they_cannot(model, tmp_path):
    its = trainer(model, tmp_path, kind=PairedTrainer)
    its.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="bf16 in place of fp16"):
        its.train()
    its = trainer(model, tmp_path, kind=PairedTrainer)
    its.optimizer_cls_and_kwargs = None
    with pytest.raises(TypeError, match="SeveralSamples need IVON"):
        its.train()


def test_an_optimizer_of_ones_own_with_a_schedule(model, tmp_path):
    ours, theirs = copy.deepcopy(model), model
    seen = Seen(ours)
    opt = IVON(groups(ours), **SETTINGS)
    schedule = torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)
    trainer(ours, tmp_path, [seen], optimizers=(opt, schedule)).train()
    plain(theirs, seen.batches)
    equal(weights(ours), weights(theirs))


def test_the_rate_and_the_groups_of_trainers_adamw(model, tmp_path):
    ours, theirs = copy.deepcopy(model), model
    seen = Seen(ours)
    arguments = {"learning_rate": 2e-4, "warmup_steps": 2, "lr_scheduler_type": "linear"}
    arguments |= {"use_cpu": True, "report_to": [], "max_steps": 6, "weight_decay": 0.01}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **arguments)
    its = transformers.Trainer(ours, arguments, train_dataset=DATA, callbacks=[seen])
    given = {"n_train": len(DATA), "steps": 6, "seed": 3}
    its.optimizer = IVON.from_adamw(its.create_optimizer(), "finetuning", **given)
    its.train()
    preset = IVON.defaults_for("finetuning", len(DATA), 6) | {"lr": 0.2, "seed": 3}
    opt = IVON(groups(theirs, preset["weight_decay"]), **preset)
    rate = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min(t / 2, (6 - t) / 4))
    for batch in seen.batches:
        opt.train()
        theirs.train()
        theirs(**batch).loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        opt.step()
        rate.step()
        opt.zero_grad()
    equal(weights(ours), weights(theirs))


def test_evaluation_and_saving_see_the_mean(model, tmp_path):
    """In the middle of training too; and evaluating changes nothing."""
    ours, theirs = copy.deepcopy(model), model
    seen = Seen(ours)
    how = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trainer(ours, tmp_path, [seen], **how).train()
    for step in (2, 4, 6):
        mean = copy.deepcopy(theirs)
        plain(mean, seen.batches[:step])
        equal(seen.evaluated[(step // 2 - 1) * 2], weights(mean))  # two batches each
        if step == 4:
            saved = type(model).from_pretrained(tmp_path / "checkpoint-4")
            equal(weights(saved), weights(mean))
    plain(theirs, seen.batches)
    equal(weights(ours), weights(theirs))


def test_resumed_from_a_checkpoint_the_run_has_the_same_bits(model, tmp_path):
    whole, killed = copy.deepcopy(model), copy.deepcopy(model)
    how = {"save_strategy": "steps", "save_steps": 2}
    trainer(whole, tmp_path / "whole", **how).train()
    trainer(killed, tmp_path / "killed", **how, callbacks=[StopAt(3)]).train()
    resumed = copy.deepcopy(model)
    seen = Seen(resumed)
    its = trainer(resumed, tmp_path / "killed", [seen], **how)
    its.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-2"))
    assert len(seen.batches) == 4  # of six
    equal(weights(resumed), weights(whole))


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def test_where_the_prior_is_flat_the_posterior_is_proper(model, tmp_path):
    """The no-decay group's prior has precision 0: its Hessian alone holds the posterior."""
    its = trainer(model, tmp_path)
    its.train()
    posterior = its.optimizer.optimizer.posterior(model)
    assert posterior.prior_precision["classifier.bias"] == 0
    assert posterior.prior_precision["classifier.weight"] > 0
    assert all((p > 0).all() and p.isfinite().all() for p in posterior.precision.values())


def test_the_callback_saves_the_posterior_and_logs_its_state(model, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 3, "logging_strategy": "steps"}
    its = trainer(model, tmp_path, [PosteriorCallback()], logging_steps=3, **how)
    its.train()
    final = its.optimizer.optimizer.posterior(model)
    for folder in (tmp_path / "checkpoint-6", tmp_path):
        saved = Posterior.load(folder / "posterior.safetensors")
        equal(saved.mean, final.mean)
        equal(saved.precision, final.precision)
    assert (tmp_path / "checkpoint-3" / "posterior.safetensors").exists()
    logged = [line for line in its.state.log_history if "posterior/noise_to_weight" in line]
    assert [line["step"] for line in logged[:2]] == [3, 6]
    assert 0 < logged[1]["posterior/started"] < logged[0]["posterior/started"] <= 1
    inputs = torch.stack([row["input_ids"] for row in DATA[:8]])
    prediction = predict(model, saved, {"input_ids": inputs}, samples=4)
    assert prediction.probs.shape == (8, 3)


def test_evaluation_estimates_the_test_loss_from_training_data(model, tmp_path):
    def rows(n):
        return {
            name: torch.stack([torch.as_tensor(row[name]) for row in DATA[:n]])
            for name in ("input_ids", "labels")
        }

    callback = PosteriorCallback(leave_one_out=[rows(8)])
    its = trainer(model, tmp_path, [callback])
    assert "eval_leave_one_out" not in its.evaluate()  # there is no optimizer yet
    its.train()
    found = its.evaluate()["eval_leave_one_out"]
    posterior = its.optimizer.optimizer.posterior(model)
    expected = leave_one_out(model, posterior, [rows(8)], n_train=posterior.ess, vectorize=False)
    assert found == pytest.approx(expected.nll, rel=1e-5)
    assert its.state.log_history[-1]["eval_leave_one_out"] == found
    assert found > model(**rows(8)).loss.item()


def test_the_callback_saves_at_the_end_without_checkpoints(model, tmp_path):
    its = trainer(model, tmp_path, [PosteriorCallback()])
    its.evaluate()  # when there is no optimizer yet
    its.train()
    equal(Posterior.load(tmp_path / "posterior.safetensors").mean, weights(model))


def test_the_best_model_loaded_at_the_end_has_its_own_posterior(model, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "worth"}
    its = trainer(model, tmp_path, [PosteriorCallback()], **how, **best)
    its.compute_metrics = lambda _: {"worth": -its.state.global_step}  # the first is the best
    its.train()
    posterior = Posterior.load(tmp_path / "posterior.safetensors")
    equal(posterior.mean, weights(model))
    first = Posterior.load(tmp_path / "checkpoint-2" / "posterior.safetensors")
    equal(posterior.precision, first.precision)
    last = its.optimizer.optimizer.posterior(model).precision
    assert not torch.equal(posterior.precision["classifier.weight"], last["classifier.weight"])


def test_a_best_model_of_before_the_callback_has_no_posterior(model, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "worth"}
    its = trainer(model, tmp_path, **how, **best, max_steps=2)
    its.compute_metrics = lambda _: {"worth": -its.state.global_step}
    its.train()
    again = trainer(model, tmp_path, [PosteriorCallback()], **how, **best)
    again.compute_metrics = lambda _: {"worth": -again.state.global_step}
    with pytest.warns(UserWarning, match="no posterior is saved: the best checkpoint has no"):
        again.train(resume_from_checkpoint=True)
    assert not (tmp_path / "posterior.safetensors").exists()
    assert (tmp_path / "checkpoint-6" / "posterior.safetensors").exists()


def test_in_a_search_the_posterior_lies_beside_its_trial_s_checkpoint(model, tmp_path, monkeypatch):
    folder = str(tmp_path / "run-3")
    monkeypatch.setattr(transformers.Trainer, "_get_output_dir", lambda self, trial: folder)
    (tmp_path / "run-2" / "checkpoint-6").mkdir(parents=True)  # of an earlier trial
    trainer(model, tmp_path, [PosteriorCallback()], save_strategy="steps", save_steps=6).train()
    assert (tmp_path / "run-3" / "checkpoint-6" / "posterior.safetensors").exists()
    assert not [*(tmp_path / "run-2" / "checkpoint-6").iterdir()]


def test_of_a_peft_model_the_callback_saves_the_adapter_alone(model, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    ours, theirs = peft.get_peft_model(copy.deepcopy(model), lora), model
    trainer(ours, tmp_path, [PosteriorCallback()], save_strategy="steps", save_steps=6).train()
    posterior = Posterior.load(tmp_path / "checkpoint-6" / "posterior.safetensors")
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert set(posterior.names) == trained
    assert not posterior.buffers
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "checkpoint-6")
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in DATA[:8]])}
    here, there = (predict(m, posterior, inputs, samples=4) for m in (ours, loaded))
    assert torch.equal(here.probs, there.probs)


@pytest.mark.network
def test_minilm_learns_sentiment_from_real_sentences_as_in_the_plain_loop(tmp_path):
    minilm = packages.folder("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts, labels = packages.sentiment("movies")
    assert len(texts) == 10_568
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    how = {"truncation": True, "max_length": 24, "padding": "max_length", "return_tensors": "pt"}

    def rows(chosen):
        tokens = tokenizer([texts[i] for i in chosen], **how)
        return [
            {"labels": labels[i], **{k: v[n] for k, v in tokens.items()}}
            for n, i in enumerate(chosen)
        ]

    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    ours = load(minilm, num_labels=2, **quiet)
    theirs, seen = copy.deepcopy(ours), Seen(ours)
    settings = {**SETTINGS, "lr": 1.0, "ess": 1e9, "hess_init": 1e-3, "clip_radius": 0.1}
    settings["betas"] = (0.9, 0.9999)
    given = {"max_steps": 40, "per_device_train_batch_size": 16, "weight_decay": 1e-4}
    its = trainer(ours, tmp_path, [seen], settings=settings, train=rows(order[:640]), **given)
    its.train()
    plain(theirs, seen.batches, decay=1e-4, settings=settings)
    equal(weights(ours), weights(theirs))
    test = rows(order[-256:])
    inputs = {k: torch.stack([row[k] for row in test]) for k in test[0] if k != "labels"}
    posterior = its.optimizer.optimizer.posterior(ours)
    prediction = predict(ours, posterior, inputs, samples=4, batch_size=64)
    right = prediction.labels == torch.tensor([row["labels"] for row in test])
    assert right.double().mean() > 0.62  # 40 steps; half is chance
