"""What the hub has: small sentences, models and pictures of the same form, and first steps."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from posterity import Posterior, merge
from posterity_studies import finetune, recipes, runs, studies, tasks, train
from posterity_studies.data import hub, imagenet
from posterity_studies.data.cache import DataError
from posterity_studies.recipes import UserError
from posterity_studies.studies import finetuning, merging
from posterity_studies.subjects import Pretrained

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SIZES = {"train": 40, "validation": 12, "test": 6}
GLUE = {name: what for name, what in hub.SENTENCES.items() if what.source == "nyu-mll/glue"}
REVIEWS = {name: what for name, what in hub.SENTENCES.items() if name not in GLUE}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "bad", "good", "film", "book", "very", "not", "a"]


def rows(n, columns, classes=2, labelled=True):
    generator = torch.Generator().manual_seed(n)
    for k in range(n):
        label = k % classes
        words = [WORDS[i] for i in torch.randint(6, 11, (3,), generator=generator).tolist()]
        texts = " ".join([*words, ("bad", "good", "film")[label]])
        yield {**dict.fromkeys(columns, texts), "label": label if labelled else -1, "idx": k}


def write(folder, configs):
    """A data set as it lies on the hub: files of Parquet, and a card that names them."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, made in splits.items():
            path = folder / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(list(made)).to_parquet(path)
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    """GLUE, reviews, and a tiny RoBERTa: folders of the hub's form."""
    home = tmp_path_factory.mktemp("hub")
    datasets.disable_progress_bars()
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
    for place in (datasets.config, huggingface_hub.constants):
        patch.setattr(place, "HF_HUB_OFFLINE", True)
    configs = {}
    for name, what in GLUE.items():
        held = {what.test, "test_matched" if name == "mnli" else "test"}
        classes = 3 if name == "mnli" else 2
        configs[name] = {
            split: rows(SIZES.get(split, 12), what.columns, classes, not split.startswith("test"))
            for split in ("train", *sorted(held))
        }
    write(home / "glue", configs)
    for name, what in REVIEWS.items():
        splits = {split: rows(SIZES[split], what.columns) for split in ("train", "test")}
        write(home / name, {"default": splits})
    for name, what in hub.SENTENCES.items():
        place = home / "glue" if name in GLUE else home / name
        patch.setitem(hub.SENTENCES, name, hub.Sentences(**{**vars(what), "source": str(place)}))
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.save_pretrained(home / "roberta")
    config = transformers.RobertaConfig(
        **{"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 64},
        **{"pad_token_id": 0, "type_vocab_size": 1},
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(home / "roberta")
    yield home
    patch.undo()


@pytest.mark.parametrize("name", hub.SENTENCES)
def test_sentences_are_read_with_their_classes(hubs, name):
    subject = Pretrained(model=str(hubs / "roberta"), domains=(name,), validation=0.25)
    train, held, test = subject.sentences(name, 0)
    what = hub.SENTENCES[name]
    assert (len(train), len(held), len(test)) == (30, 10, SIZES.get(what.test, 12))
    words = {"bad": 0, "good": 1, "film": 2}
    for tokens, label in (*train, *held, *test):
        seps = [i for i, t in enumerate(tokens) if WORDS[t] == "[SEP]"]
        assert len(seps) == len(what.columns)
        assert all(words[WORDS[tokens[i - 1]]] == label for i in seps)
    assert subject.make(0, name).config.num_labels == (3 if name == "mnli" else 2)
    assert subject.sentences(name, 0) == (train, held, test)
    assert subject.sentences(name, 1)[0] != train
    assert (
        len(Pretrained(model=subject.model, domains=(name,), train=20).sentences(name, 0)[0]) == 18
    )


def test_what_lacks_something_is_refused(hubs, tmp_path):
    with pytest.raises(DataError, match=r"no sentences 'sst'.*sst2"):
        hub.sentences("sst")
    with pytest.raises(DataError, match="cannot be had"):
        hub.sentences(str(tmp_path / "nothing"))
    write(tmp_path / "one", {"default": {"train": rows(4, ["text"])}})
    with pytest.raises(DataError, match="no split 'test', but train"):
        hub.sentences(str(tmp_path / "one"))
    write(tmp_path / "two", {"default": {s: rows(4, ["body"]) for s in ("train", "test")}})
    with pytest.raises(DataError, match="no column 'text', but body"):
        hub.sentences(str(tmp_path / "two"))
    unlabelled = {s: rows(4, ["text"], labelled=s == "train") for s in ("train", "test")}
    write(tmp_path / "three", {"default": unlabelled})
    with pytest.raises(DataError, match="no labels in its split 'test'"):
        hub.sentences(str(tmp_path / "three"))
    with pytest.raises(DataError, match=r"nothing.* cannot be had"):
        Pretrained(model=str(tmp_path / "nothing"), domains=("sst2",)).make(0, "sst2")


@pytest.mark.parametrize("optimizer", finetune.OPTIMIZERS)
def test_the_command_takes_its_first_steps(hubs, tmp_path, call, optimizer):
    out = tmp_path / "run"
    settings = ["--set", "lr=0.01", "--epochs", "2", "--samples", "2", "--out", out]
    command = ["finetune", hubs / "roberta", "rte", "--optimizer", optimizer, *settings]
    done = call(*command)
    assert done.returncode == 0, done.stderr
    assert "averaged" in done.stdout or optimizer == "adamw"
    result = runs.read_json(out / "result.json")
    assert result["settings"]["lr"] == 0.01
    assert 0 <= result["test"]["the mean"]["accuracy"] <= 1
    again = call(*command)
    assert again.returncode == 0
    assert runs.read_json(out / "result.json") == result


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["nothing/here", "rte"], "cannot be had"),
        (["ROBERTA", "sst"], "no sentences 'sst'"),
        (["smollm2", "rte"], "SmolLM2 has no sentences 'rte'; there are movies"),
        (["minilm", "rte"], "MiniLM has no sentences 'rte'; there are movies, amazon"),
        (["ROBERTA", "rte", "--optimizer", "sgd"], "no optimizer 'sgd'"),
        (["ROBERTA", "rte", "--set", "lr=x"], "expected lr=NUMBER"),
        (["ROBERTA", "rte", "--epochs", "0"], "at least 1"),
    ],
)
def test_wrong_input_is_one_line(hubs, tmp_path, call, given, told):
    given = [str(hubs / "roberta") if word == "ROBERTA" else word for word in given]
    done = call("finetune", *given, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_finetuned_on_two_domains_and_merged(hubs, tmp_path):
    """As the paper merges RoBERTa."""
    posteriors = []
    for name in ("imdb", "yelp"):
        subject = Pretrained(model=str(hubs / "roberta"), domains=(name,), epochs=1)
        settings = finetune.OPTIMIZERS["ivon"]
        finetune.run(subject, name, settings, 0, tmp_path / name, samples=1)
        posteriors.append(Posterior.load(tmp_path / name / "posterior.safetensors"))
    bases = [(tmp_path / name / "base.safetensors").read_bytes() for name in ("imdb", "yelp")]
    assert bases[0] == bases[1]
    merged = merge(posteriors, base=Posterior.load(tmp_path / "imdb/base.safetensors"))
    assert merged.ess == pytest.approx(3 * settings.ess)  # theirs and the base's


def test_two_ranks_are_one_process(tmp_path):
    """Batches of 3 on two ranks, the last one of a single sentence: the second has none."""
    script = tmp_path / "run.py"
    script.write_text(
        f"""
import sys
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_finetuning as small
from posterity_studies import finetune, ranks
from posterity_studies.settings import FinetuneIvon
@dataclass(frozen=True, kw_only=True)
class Odd(small.Words):
    def sentences(self, domain, seed):
        return small.rows()[:79], small.rows()[80:100], small.rows()[100:]


subject = Odd(batch=3, epochs=2)
settings = FinetuneIvon(1.0, 1e4, hess_init=0.1, clip_radius=1.0, memory=200)
with ranks.joined():
    finetune.run(subject, "above", settings, 0, Path(sys.argv[1]), samples=3)
"""
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for ranks in (1, 2):
        command = [*torchrun, f"--nproc-per-node={ranks}", script, tmp_path / f"{ranks}"]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (Posterior.load(tmp_path / f"{k}/posterior.safetensors") for k in (1, 2))
    for name, mean in one.mean.items():
        torch.testing.assert_close(two.mean[name], mean, atol=1e-5, rtol=1e-4)
    assert json.dumps(one.settings) == json.dumps(two.settings)
    scores = [runs.read_json(tmp_path / f"{k}/result.json")["test"] for k in (1, 2)]
    for way in ("the mean", "averaged"):
        assert scores[1][way]["nll"] == pytest.approx(scores[0][way]["nll"], rel=1e-4)


def test_the_papers_scale_of_finetuning_and_merging(hubs, tmp_path, monkeypatch):
    """The same studies, on RoBERTa: here a tiny one, and one epoch."""
    model = str(hubs / "roberta")
    monkeypatch.setattr(finetuning, "MODELS", (model,))
    monkeypatch.setattr(finetuning, "GLUE", ("rte", "mnli"))
    monkeypatch.setattr(finetuning, "SAMPLES", 1)
    monkeypatch.setattr(finetuning, "EPOCHS", 1)
    found = studies.study("finetuning", tmp_path / "glue", [0], "paper")
    assert {row["domain"] for row in found["rows"]} == {"rte", "mnli"}
    assert {len(tried) for tried in found["trials"].values()} == {4}
    paper = merging.SUBJECTS["paper"]
    assert paper.domains == ("imdb", "yelp", "rotten-tomatoes", "sst2", "amazon")
    small = replace(paper, model=model, epochs=1, validation=0.2)
    monkeypatch.setitem(merging.SUBJECTS, "paper", small)
    found = studies.study("merging", tmp_path / "merging", [0], "paper")
    assert set(paper.domains) < set(found["rows"][0])


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """ImageNet's form: two splits with a picture and a class each row, grey ones among them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    generator = numpy.random.default_rng(0)
    form = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    splits = {}
    for split, n in (("train", 6), ("validation", 3)):
        made = []
        for k in range(n):
            shape = (40 + 10 * k, 90) if k % 2 else (64, 50, 3)
            pixels = generator.integers(0, 256, shape).astype(numpy.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            made.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": 100 * k})
        splits[split] = datasets.Dataset.from_list(made, features=form)
    write(tmp_path / "imagenet", {"default": splits})
    monkeypatch.setattr(imagenet, "SOURCE", str(tmp_path / "imagenet"))
    return imagenet.load(imagenet.SOURCE)


def test_pictures_are_the_middle_or_parts_that_repeat(pictures):
    (train, targets), (test, _) = pictures
    assert (len(train), len(test), targets.tolist()) == (6, 3, [0, 100, 200, 300, 400, 500])
    whole = train.rows[0]["image"]
    assert whole.size == (50, 64)
    side = 50 * 224 / 256
    box = (25 - side / 2, 32 - side / 2, 25 + side / 2, 32 + side / 2)
    expected = whole.resize((224, 224), Image.Resampling.BILINEAR, box=box)
    mean, std = (torch.tensor(m).view(-1, 1, 1) for m in (imagenet.MEAN, imagenet.STD))
    pixels = ((train[0] * std + mean) * 255).round().permute(1, 2, 0)
    assert torch.equal(pixels, torch.from_numpy(numpy.array(expected)).float())
    cuts = [replace(train, epoch=epoch) for epoch in (0, 0, 1)]
    assert torch.equal(cuts[0][3], cuts[1][3])
    assert not torch.equal(cuts[0][3], cuts[2][3])
    assert cuts[0][3].shape == (3, 224, 224)
    assert imagenet.stacked([cuts[0][3]] * 2).shape == (2, 3, 224, 224)


def test_a_rank_without_pictures_feeds_none(pictures, monkeypatch):
    """The last batch may have fewer pictures than there are ranks."""
    monkeypatch.setattr(tasks.ranks, "part", lambda batch: batch[2:])
    task = tasks.Streamed(*pictures, imagenet.CLASS_NAMES, "made for a test")
    fed = list(task.feed((torch.arange(4), torch.tensor([4, 5])), True, 0, 0))
    assert [tuple(x.shape) for x, _ in fed] == [(2, 3, 224, 224), (0, 3, 224, 224)]
    assert [y.tolist() for _, y in fed] == [[200, 300], []]


def test_parts_have_the_published_areas_and_shapes():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([imagenet.part(200, 200, generator) for _ in range(4000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 200.001
    assert boxes[:, 3].max() <= 200.001
    share, ratio = wide * high / 40_000, wide / high
    assert 0.0799 < share.min() < 0.09
    assert share.max() > 0.9
    assert (ratio >= 0.7499).all()
    assert (ratio <= 1.3334).all()
    assert abs(ratio.log().mean()) < 0.02
    whole = imagenet.part(1000, 10, generator)  # no part fits: the middle
    assert whole == imagenet.middle(1000, 10)


def test_imagenet_takes_its_first_steps_and_a_killed_run_goes_on(pictures, tmp_path):
    recipe = replace(recipes.recipe("imagenet-resnet50"), epochs=2, batch_size=4, samples=2)
    assert recipe.settings("ivon").lr == 2.5

    def killed(items, total, label):
        if label == "ivon epoch 2":
            raise KeyboardInterrupt
        return items

    with pytest.raises(KeyboardInterrupt):
        train.train(recipe, "ivon", 0, tmp_path / "run", killed)
    found = train.train(recipe, "ivon", 0, tmp_path / "run")
    assert found == train.train(recipe, "ivon", 0, tmp_path / "run")
    whole = train.train(recipe, "ivon", 0, tmp_path / "whole")
    assert found["curve"] == whole["curve"]
    for way in ("mean", "samples"):
        assert set(found["evaluations"][way]) == {"accuracy", "nll", "ece", "brier"}
    with pytest.raises(UserError, match="trained on whole"):
        train.train(replace(recipe, validation=2), "ivon", 0, tmp_path / "held")
