"""Language models, and the sentences that they are finetuned on.

A subject is plain values: jobs in other processes make the model and read the sentences anew.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posterity_studies.data import hub, packages
from posterity_studies.data.cache import DataError

Row = tuple[list[int], int]  # tokens, class
Rows = Sequence[Row]
Splits = tuple[Rows, Rows, Rows]  # to train on, to choose by, to test with


@dataclass(frozen=True, kw_only=True)
class Subject(ABC):
    """A model, domains of sentences, and how long it learns on each."""

    domains: tuple[str, ...]
    batch: int
    epochs: int

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's."""

    @abstractmethod
    def make(self, seed: int, domain: str) -> nn.Module:
        """The model; what is to be trained requires gradients."""

    @abstractmethod
    def sentences(self, domain: str, seed: int) -> Splits:
        """Sentences as tokens with their classes."""

    def steps(self, sentences: int) -> int:
        """How many it learns for on so many."""
        return self.epochs * math.ceil(sentences / self.batch)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (sentences, classes)."""
        return model(**inputs).logits


@dataclass(frozen=True, kw_only=True)
class MiniLM(Subject):
    """MiniLM with a new head for two classes and frozen word vectors, on domains of sentiment."""

    domains: tuple[str, ...] = (*packages.DOMAINS, "airline")
    batch: int = 16
    epochs: int = 2
    train: int = 1500  # sentences of each domain
    validation: int = 300
    test: int = 1000
    tiny: bool = False  # a tiny network of its vocabulary, for tests

    @property
    def name(self) -> str:
        """The model's."""
        return "MiniLM"

    def make(self, seed: int, domain: str = "") -> nn.Module:
        """The same for all domains."""
        transformers = packages.transformers()
        torch.manual_seed(seed)
        quiet = {"num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        kind = transformers.AutoModelForSequenceClassification
        if self.tiny:
            small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
            small |= {"num_hidden_layers": 1}
            config = transformers.AutoConfig.from_pretrained(packages.folder("minilm"), **small)
            config.update(quiet)
            model = kind.from_config(config)
        else:
            model = kind.from_pretrained(packages.folder("minilm"), **quiet)
        model.get_input_embeddings().requires_grad_(False)
        return model

    def sentences(self, domain: str, seed: int) -> Splits:
        """A sentence counts once."""
        tokenizer = packages.transformers().AutoTokenizer.from_pretrained(packages.folder("minilm"))
        texts, labels, (first, second) = _drawn(self, domain, seed)
        tokens = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
        rows = list(zip(tokens, labels, strict=True))
        return rows[:first], rows[first:second], rows[second:]


TINY = MiniLM(epochs=1, train=16, validation=8, test=8, tiny=True)


@dataclass(frozen=True, kw_only=True)
class SmolLM2(Subject):
    """SmolLM2-135M, that names the sentiment of film reviews, with adapters of rank 8."""

    domains: tuple[str, ...] = ("movies",)
    batch: int = 8
    epochs: int = 1
    train: int = 500
    validation: int = 100
    test: int = 300

    @property
    def name(self) -> str:
        """The model's."""
        return "SmolLM2"

    def make(self, seed: int, domain: str = "") -> nn.Module:
        """Adapters on queries and values; all else is frozen."""
        try:
            import peft  # pyright: ignore
        except ImportError:
            raise DataError("this needs PEFT: pip install 'posterity[frameworks]'") from None
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        return peft.get_peft_model(packages.smollm2(), config)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        name = "SmolLM2-135M-Instruct.Q4_1.gguf"
        kind = packages.transformers().AutoTokenizer
        return kind.from_pretrained(packages.folder("smollm2"), gguf_file=name)(texts)["input_ids"]

    def sentences(self, domain: str, seed: int) -> Splits:
        """Each with the question after it, and last what would be the answers' first tokens."""
        texts, labels, (first, second) = _drawn(self, domain, seed)
        asked = [f"{text[:300]}\nSentiment:" for text in texts]
        rows = list(zip(self._tokens(asked), labels, strict=True))
        return rows[:first], rows[first:second], rows[second:]

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Of the words negative and positive, after the question."""
        last = inputs["attention_mask"].sum(1) - 1
        found = model(**inputs).logits[torch.arange(len(last)), last]
        return found[:, WORDS]


def _drawn(
    sizes: MiniLM | SmolLM2, domain: str, seed: int
) -> tuple[list[str], list[int], tuple[int, int]]:
    """Sentences in random order, each once, their classes, and where the parts are divided."""
    known = dict(zip(*packages.sentiment(domain), strict=True))
    texts, labels = list(known), list(known.values())
    first, second = sizes.train, sizes.train + sizes.validation
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    chosen = order[: second + sizes.test].tolist()
    return [texts[i] for i in chosen], [labels[i] for i in chosen], (first, second)


WORDS = [3524, 2731]  # SmolLM2's tokens for " negative" and " positive"


@dataclass(frozen=True, kw_only=True)
class Pretrained(Subject):
    """An encoder of the hub, or of a folder, with a new head, on sentences of the hub."""

    model: str
    domains: tuple[str, ...]
    batch: int = 16
    epochs: int = 3
    length: int = 256  # tokens of a sentence
    train: int | None = None  # sentences, where there are more
    validation: float = 0.1  # the part of them that is held out, to choose by

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.rstrip("/").rpartition("/")[2]

    def _had(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self.model, **options)
        except (OSError, ValueError) as error:
            told = " ".join(str(error).split())
            raise DataError(f"{self.model} cannot be had: {told}") from None

    def make(self, seed: int, domain: str) -> nn.Module:
        """With as many logits as the domain has classes."""
        kind = packages.transformers().AutoModelForSequenceClassification
        what, train, _ = hub.sentences(domain)
        torch.manual_seed(seed)
        return self._had(kind, num_labels=max(train.unique(what.label)) + 1)

    def sentences(self, domain: str, seed: int) -> Splits:
        """The training sentences are in random order, of which the last ones are held out."""
        tokenizer = self._had(packages.transformers().AutoTokenizer)
        what, train, test = hub.sentences(domain)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        rows, tests = (
            list(
                zip(
                    tokenizer(
                        *(list(chosen[c]) for c in what.columns),
                        truncation=True,
                        max_length=self.length,
                    )["input_ids"],
                    chosen[what.label],
                    strict=True,
                )
            )
            for chosen in (train.select(order[: self.train].tolist()), test)
        )
        kept = len(rows) - round(self.validation * len(rows))
        return rows[:kept], rows[kept:], tests
