"""Corpora as tokens: what is written can be read back, killed or not, and a GPT trains on it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from posterity_studies import pretrain, runs
from posterity_studies.data import cache, packages, text, tokens
from posterity_studies.models.gpt import GPTConfig
from posterity_studies.recipes import UserError
from posterity_studies.studies import pretraining
from posterity_studies.train import silent

pytest.importorskip("tokenizers")

WORDS = ["The cat sat.", "Größe und Maß", "  def f(x):\n\treturn x", "日本語", "<|endoftext|>", ""]


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    """A byte-level vocabulary without merges, and a few of its own, as GPT-2's files."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path / "cache/gpt2-bpe"
    folder.mkdir(parents=True)
    letters = sorted(ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "c")]
    listed = {x: i for i, x in enumerate([*letters, *("".join(m) for m in merges)])}
    (folder / "encoder.json").write_text(json.dumps(listed))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "vocab.bpe").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("POSTERITY_DATA", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path, vocabulary, monkeypatch):
    """A folder of texts; every third document is held out, saved two by two."""
    monkeypatch.setattr(tokens, "HELD_OUT", 3)
    monkeypatch.setattr(tokens, "AT_ONCE", 2)
    folder = tmp_path / "texts"
    folder.mkdir()
    for k in range(8):
        (folder / f"{k}.txt").write_text(f"{WORDS[k % len(WORDS)]} {k}", encoding="utf-8")
    return folder


def read_back(ids):
    """The documents of a stream of tokens."""
    ids, found, start = ids.long(), [], 0
    for end in (ids == tokens.END).nonzero().flatten().tolist():
        found.append(tokens.bpe().decode(ids[start:end].tolist()))
        start = end + 1
    assert start == len(ids)
    return found


def test_documents_come_back_in_order_and_some_are_held_out(corpus, tmp_path, call):
    done = call("tokens", corpus, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = tokens.load(tmp_path / "out")
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    assert read_back(found["held"]) == [texts[2], texts[5]]
    assert read_back(found["train"]) == [t for k, t in enumerate(texts) if k not in (2, 5)]
    assert f"{len(found['train'])} tokens to train on" in done.stdout
    told = call("tokens", corpus, "--out", tmp_path / "out", "--json").stdout
    assert json.loads(told) == runs.read_json(tmp_path / "out/tokens.json")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("train.bin", "held.bin", "tokens.json")
    }


def test_a_killed_call_goes_on_to_the_same_files(corpus, tmp_path, monkeypatch):
    whole = tokens.prepare(str(corpus), tmp_path / "whole")
    write, calls = runs.write_json, []

    def killed(path, content):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt  # documents are written, but not yet counted
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            tokens.prepare(str(corpus), tmp_path / "killed")
    assert (tmp_path / "killed/progress.json").exists()
    assert tokens.prepare(str(corpus), tmp_path / "killed") == whole
    for name in ("train.bin", "held.bin", "tokens.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert tokens.prepare(str(corpus), tmp_path / "whole") == whole  # and is not done again


def test_a_text_holds_out_its_own_part(vocabulary, tmp_path, monkeypatch):
    train, test = (np.frombuffer(bytearray(t), np.uint8) for t in (b"to learn\n" * 9, b"to test\n"))
    arrays = {"train.inputs": train, "test.inputs": test}
    arrays |= {f"{split}.targets": np.zeros(0, np.uint8) for split in ("train", "test")}
    cache.prepare("anarchism")
    cache.write("anarchism", arrays, "made for a test")
    origin = replace(text.TEXTS["anarchism"], digest=cache.digest(arrays))
    monkeypatch.setattr(text, "TEXTS", {"anarchism": origin})
    tokens.prepare("anarchism", tmp_path / "out")
    found = tokens.load(tmp_path / "out")
    assert read_back(found["train"]) == ["to learn\n" * 9]
    assert "".join(read_back(found["held"])) == "to test\n"


def test_wrong_input_gets_one_line(corpus, tmp_path, call):
    out = tmp_path / "out"
    tokens.prepare(str(corpus), out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/a.tex").touch()
    (tmp_path / "nothing").mkdir()
    for arguments, message in (
        (("tokens", "nosuch", "--out", tmp_path / "x"), "no corpus 'nosuch'"),
        (("tokens", tmp_path / "nothing", "--out", tmp_path / "x"), "holds no *.txt"),
        (("tokens", "anarchism", "--out", out), "holds the tokens of"),
        (("tokens", corpus, "--out", tmp_path / "thesis"), "is not empty"),
        (("pretrain", "nosuch", "--tokens", out), "no recipe 'nosuch'; there are gpt2"),
        (("pretrain", "gpt2", "--tokens", out, "--optimizer", "sgd"), "no optimizer 'sgd'"),
        (("pretrain", "gpt2", "--tokens", tmp_path / "x"), "holds no tokens"),
        (("pretrain", "gpt2", "--tokens", out, "--steps", 0), "at least 1"),
    ):
        done = call(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    (out / "train.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="not whole"):
        tokens.load(out)


@pytest.mark.parametrize("files", [1, 2, 30])
def test_a_small_corpus_too_has_a_part_to_test_with(files, vocabulary, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for k in range(files):
        (folder / f"{k}.txt").write_text("the cat\n" * (70_000 if files == 1 else 10))
    corpus = folder / "0.txt" if files == 1 else folder
    facts = tokens.prepare(str(corpus), tmp_path / "out")
    assert 0 < facts["held"] <= facts["train"] / (1 if files == 2 else 10)


def test_a_corpus_of_one_piece_is_too_short_until_it_grows(vocabulary, tmp_path):
    corpus, out = tmp_path / "a.txt", tmp_path / "out"
    corpus.write_text("the cat")
    with pytest.raises(UserError, match="is too short"):
        tokens.prepare(str(corpus), out)
    assert not out.exists()
    corpus.write_text("the cat\n" * 5_000)
    facts = tokens.prepare(str(corpus), out)
    assert len(tokens.load(out)["train"]) == facts["train"] > 0


def test_two_processes_do_not_share_a_folder_of_tokens(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with runs.occupied(out), pytest.raises(UserError, match="another process is at work"):
        tokens.prepare(str(corpus), out)
    tokens.prepare(str(corpus), out)
    with runs.occupied(out):  # it is finished: anyone may read
        tokens.prepare(str(corpus), out)


@pytest.mark.parametrize("optimizer", ["adamw", "ivon"])
def test_the_papers_recipe_takes_its_first_steps(optimizer, corpus, tmp_path, call, monkeypatch):
    """All of it but the size: bf16, warm-up, micro-batches, each optimizer's settings."""
    what, settings = pretrain.RECIPES["gpt2"]
    small = replace(what, shape=GPTConfig(1, 2, 16, 8), batch=6, held=2)
    monkeypatch.setitem(pretrain.RECIPES, "gpt2", (small, settings))
    monkeypatch.setattr(tokens, "HELD_OUT", 2)
    tokens.prepare(str(corpus), tmp_path / "tokens")
    arguments = ("--tokens", tmp_path / "tokens", "--out", tmp_path / "run", "--micro", 2)
    done = call("pretrain", "gpt2", "--optimizer", optimizer, "--steps", 3, *arguments)
    assert done.returncode == 0, done.stderr
    result = runs.read_json(tmp_path / "run/result.json")
    assert result["bf16"]
    assert result["settings"]["lr"] == {"adamw": 6e-4, "ivon": 300.0}[optimizer]
    assert result["curve"]["held"][-1] < 11.5  # ln 50257 = 10.8
    assert f"{result['curve']['held'][-1]:.4f} nats a token" in done.stdout
    again = call("pretrain", "gpt2", "--optimizer", optimizer, "--steps", 3, *arguments, "--json")
    assert json.loads(again.stdout) == result


def test_published_settings():
    for name, lrs in {
        "gpt2": (6e-4, 300),
        "gpt2-medium": (3e-4, 200),
        "gpt2-large": (2e-4, 150),
    }.items():
        what, settings = pretrain.RECIPES[name]
        assert (what.steps, what.warmup, what.shape.context, what.clip) == (100_000, 2000, 1024, 1)
        assert what.batch * what.shape.context == pytest.approx(0.49e6, rel=0.01)
        assert (settings["adamw"].lr, settings["ivon"].lr) == lrs
        ivon = settings["ivon"].build(torch.nn.Linear(2, 2), 1, 1, 0).param_groups
        assert [g["weight_decay"] for g in ivon] == [1e-6, 0.0]
        for group in ivon:
            assert (group["ess"], group["hess_init"], group["clip_radius"]) == (1e10, 1e-3, 1e-3)
            assert group["betas"] == pytest.approx((0.9, 0.99999))
        assert (settings["adamw"].weight_decay, settings["adamw"].beta2) == (0.1, 0.95)


@pytest.mark.network
@pytest.mark.slow
def test_the_vocabulary_is_gpt2s():
    """OpenAI's own examples of tokens."""
    assert packages.PACKAGES["gpt2-bpe"].licence == "MIT"
    tokenizer = tokens.bpe()
    assert tokenizer.encode("Hello world").ids == [15496, 995]
    assert tokenizer.get_vocab_size() == 50257
    for words in WORDS:
        assert tokenizer.decode(tokenizer.encode(words).ids) == words


def test_the_papers_scale_prepares_its_tokens(vocabulary, tmp_path, monkeypatch):
    asked = []

    def documents(corpus):
        asked.append(corpus)
        return [f"{word} {k}" for k, word in enumerate(WORDS * 8)], 0, lambda place: place % 2 == 0

    monkeypatch.setattr(tokens, "documents", documents)
    what, settings = pretrain.RECIPES["gpt2"]
    small = replace(what, shape=GPTConfig(1, 2, 16, 8), batch=2, micro=1, held=2, steps=2)
    monkeypatch.setitem(pretrain.RECIPES, "gpt2", (small, settings))
    found = pretraining.study(tmp_path / "out", [0], "paper", silent)
    assert asked == ["Skylion007/openwebtext"]
    assert [row["method"] for row in found["rows"]][:2] == ["AdamW", "IVON"]
    assert found["settings"]["ivon"]["lr"] == 300.0
    assert found["data"] == "Skylion007/openwebtext, 48 documents"
