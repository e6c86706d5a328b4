"""Cards of images with what the model says of them, to be ordered and chosen from in the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from posterity_studies.report import figures

STEP = 24  # cards at first, and more at each click


@dataclass(frozen=True)
class Gallery:
    """What the template takes. Of several scores the first one is printed on the cards.

    `orders` are pairs of a score with its sign, -1 for the largest first, and of words for it;
    without any all cards stand there.
    """

    cards: Sequence[Mapping[str, Any]]
    what: str
    score_word: str
    form: str
    truth_word: str
    class_word: str
    answers: Mapping[str, str]  # of "right" and "wrong"
    orders: Sequence[tuple[str, str]] = ()
    step: int = STEP

    @property
    def classes(self) -> list[tuple[int, str]]:
        """Those of which there is a card."""
        return sorted({(card["target"], card["truth"]) for card in self.cards})


def cards(
    chosen: Tensor,
    scores: Mapping[str, Tensor],
    probs: Tensor,
    targets: Tensor,
    class_names: Sequence[str],
    images: Tensor,
) -> list[dict[str, Any]]:
    """A card for each chosen example: its image, its scores, its three likeliest classes."""
    made = []
    for i in chosen.tolist():
        target, ranked = int(targets[i]), probs[i].argsort(descending=True, stable=True).tolist()
        shown = ranked[:3] + [target] * (target not in ranked[:3])
        made.append(
            {
                "index": i,
                "target": target,
                "truth": class_names[target],
                "answer": "right" if ranked[0] == target else "wrong",
                "scores": {key: float(values[i]) for key, values in scores.items()},
                "image": figures.picture(images[i].numpy()),
                "bars": [(class_names[k], float(probs[i, k]), k == target) for k in shown],
            }
        )
    return made
