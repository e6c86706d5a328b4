"""A posterior over LoRA adapters alone, saved beside them, on top of the base model."""

import copy
import subprocess
import sys

import pytest
import torch

from posterity import IVON, Posterior, predict
from posterity_studies.data import packages

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SETTINGS = {"lr": 0.3, "ess": 64.0, "hess_init": 0.3, "betas": (0.9, 0.99), "seed": 3}
TOKENS = torch.randint(40, (8, 10), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}


def base():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **heads))


def adapted(seed=1):
    torch.manual_seed(seed)
    return peft.get_peft_model(base(), peft.LoraConfig(**LORA))


def adapter(model):
    """The trained parameters: the posterior is over these, and holds no others."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def trained(model, steps=5, tokens=TOKENS, **settings):
    opt = IVON([p for _, p in adapter(model)], **SETTINGS | settings)
    losses = []
    for _ in range(steps):
        with opt.sampled_params(train=True):
            opt.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        opt.step()
        losses.append(loss.item())
    return opt.posterior(adapter(model)), losses


def test_only_the_adapter_has_a_posterior_and_the_base_is_never_written():
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    posterior, _ = trained(model)
    assert set(posterior.names) == {name for name, _ in adapter(model)}
    assert all("lora_" in name for name in posterior.names)
    assert sum(m.numel() for m in posterior.mean.values()) == 2 * 2 * 2 * 4 * 16
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in posterior.names)


LOADING = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from test_peft import TOKENS, base, peft
from posterity import Posterior, predict
model = peft.PeftModel.from_pretrained(base(), sys.argv[1])
posterior = Posterior.load(sys.argv[1] + "/posterior.safetensors")
found = predict(model, posterior, {"input_ids": TOKENS}, samples=4)
torch.save((found.probs, found.mutual_information), sys.argv[1] + "/found.pt")
"""


def test_saved_beside_the_adapter_it_predicts_in_a_new_process(tmp_path):
    model = adapted()
    posterior, _ = trained(model)
    model.save_pretrained(tmp_path)
    posterior.save(tmp_path / "posterior.safetensors")
    size = (tmp_path / "posterior.safetensors").stat().st_size
    assert size < 3 * (tmp_path / "adapter_model.safetensors").stat().st_size
    run = [sys.executable, "-c", LOADING, str(tmp_path), *sys.path]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    probs, information = torch.load(tmp_path / "found.pt")
    here = predict(model, posterior, {"input_ids": TOKENS}, samples=4)
    assert torch.equal(probs, here.probs)
    assert torch.equal(information, here.mutual_information)
    assert information.max() > 1e-4


@pytest.mark.parametrize("sampled", [False, True])
def test_adapters_still_merge_into_the_base(sampled):
    """At the mean, and at a posterior sample."""
    model = adapted()
    posterior, _ = trained(model)
    if sampled:
        model.load_state_dict(posterior.state(0, 1), strict=False)
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, before, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base()(input_ids=TOKENS).logits, before, atol=1e-3)


def test_two_trained_adapters_are_averaged_as_peft_does(tmp_path):
    models = [adapted(seed) for seed in (1, 2)]
    for i, model in enumerate(models):
        trained(model, seed=i)
        model.save_pretrained(tmp_path / str(i))
    both = peft.PeftModel.from_pretrained(base(), tmp_path / "0", adapter_name="a")
    both.load_adapter(tmp_path / "1", adapter_name="b")
    both.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="cat")
    both.set_adapter("mean")
    with torch.no_grad():
        deltas = [dict(m.merge_and_unload().named_parameters()) for m in models]
        merged = dict(both.merge_and_unload().named_parameters())
    for name, p in merged.items():
        torch.testing.assert_close(p, (deltas[0][name] + deltas[1][name]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.network
def test_smollm2_learns_a_text_by_its_adapters(tmp_path):
    folder, name = packages.folder("smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    how = {"gguf_file": name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    text = "The posterior is what remains of the prior after the data have spoken."
    tokens = tokenizer(text, return_tensors="pt").input_ids
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    posterior, losses = trained(model, 6, tokens, lr=1.0, ess=1e6, hess_init=1e-2)
    assert losses[-1] < 0.9 * losses[0], losses
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = Posterior.load(tmp_path / "posterior.safetensors")
    found = predict(model, loaded, {"input_ids": tokens}, samples=2)
    assert found.probs.shape == (1, tokens.shape[1], model.config.vocab_size)
