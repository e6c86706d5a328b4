"""The paper's claims, each with what the committed results say of it.

To add one, add it to ``CLAIMS``, with its judge in :mod:`posterity_studies.judges`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posterity_studies import judges, runs
from posterity_studies.recipes import UserError

Judge = Callable[[Any], judges.Verdict]
Status = Literal["holds", "does not hold", "not yet run"]
SCALES = {"desk": "", "paper": "paper/"}  # and their folders


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, its figures, and what judges ours.

    ``result`` is a file, or a pattern of files, under the folder of results.
    """

    where: str
    text: str
    paper: str
    setting: str  # what ours is at desk scale
    command: str
    result: str
    judge: Judge


@dataclass(frozen=True)
class Judged:
    """A claim at one scale."""

    claim: Claim
    scale: str
    status: Status
    ours: str = ""


def judged(results: Path) -> list[Judged]:
    """Every claim at every scale, in the paper's order.

    Raises:
        UserError: a result file is damaged, or is none of its study.
    """
    found = []
    for claim in CLAIMS:
        for scale, folder in SCALES.items():
            read = [runs.read_json(path) for path in sorted((results / folder).glob(claim.result))]
            found.append(_judged(claim, scale, read))
    return found


def _judged(claim: Claim, scale: str, read: Sequence[Any]) -> Judged:
    told = {content.get("scale", scale) for content in read}
    if told != {scale}:
        return Judged(claim, scale, "not yet run")
    try:
        holds, ours = claim.judge(read if "*" in claim.result else read[0])
    except KeyError as missing:  # of too few seeds, or made before the study asked it
        return Judged(claim, scale, "not yet run", f"the result lacks {missing}")
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{claim.result} cannot be judged ({type(error).__name__}: {error})"
        ) from None
    return Judged(claim, scale, "holds" if holds else "does not hold", ours)


SMALL_GPT = "GPT of 3.2M weights over bytes, 43 MB of essays and a dictionary, bf16"
FASHION = "Fashion-MNIST, 207k weights, 18 epochs"
CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Figures 1, 2",
        "GPT-2 from scratch: lower validation perplexity than AdamW's.",
        "12.6 against 13.0 (773M), 14.1 against 14.5 (355M), 17.9 against 18.1 (125M)",
        SMALL_GPT,
        "posterity study pretraining --seeds 0 1 2 --jobs 2",
        "pretraining/result.json",
        judges.pretrained,
    ),
    Claim(
        "Figures 1, 2",
        "The same with h from a pair of samples at every tenth step.",
        "our addition: not in the paper",
        SMALL_GPT,
        "posterity study pretraining --seeds 0 1 2 --jobs 2",
        "pretraining/result.json",
        judges.paired,
    ),
    Claim(
        "Figure 2",
        "Averaging more than 8 posterior samples lowers perplexity further.",
        "GPT-2, off a plot",
        "byte-level GPT of 1.9M weights on essays",
        "posterity study language --seeds 0 1 2",
        "language/result.json",
        judges.averaging,
    ),
    Claim(
        "Figure 2",
        "The same in pairs, after one pass over a tenth of the text: 32 samples.",
        "GPT-2, off a plot",
        SMALL_GPT,
        "posterity study pretraining --seeds 0 1 2 --jobs 2",
        "pretraining/result.json",
        judges.averaged,
    ),
    Claim(
        "Figure 2",
        "The same on news, at the temperature that other news chose.",
        "our addition: not in the paper",
        SMALL_GPT,
        "posterity study pretraining --seeds 0 1 2 --jobs 2",
        "pretraining/result.json",
        judges.elsewhere,
    ),
    Claim(
        "Section 3",
        "IVON costs what Adam costs.",
        "less than 20 % more on GPT-2, nothing on images",
        "two cores, against PyTorch's fused AdamW",
        "make bench",
        "bench/bench.json",
        judges.speed,
    ),
    Claim(
        "Table 1",
        "As accurate as AdamW and SGD or better, with lower NLL and calibration error.",
        "ImageNet, ResNet-50, top-1 / NLL / ECE: 77.46/.869/.022; SGD 76.63/.917/.038; "
        "AdamW 75.16/1.018/.066",
        FASHION,
        "posterity compare fashion-mnist --seeds 0 1 2",
        "fashion-mnist/*-seed*.json",
        judges.accuracy,
    ),
    Claim(
        "Table 1",
        "The same with a residual network on colour images.",
        "CIFAR-10, ResNet-20: accuracy ≈ 92.6 %, NLL ≈ .219 (200 epochs)",
        "CIFAR-10, ResNet-20, 20 epochs",
        "posterity study classification",
        "classification/result.json",
        judges.classified,
    ),
    Claim(
        "Table 1",
        "Calibration comes from sampling.",
        "TinyImageNet, ResNet-18, ECE: .150 at the mean, .019 averaged",
        FASHION,
        "posterity compare fashion-mnist --seeds 0 1 2",
        "fashion-mnist/*-seed*.json",
        judges.sampling,
    ),
    Claim(
        "Section 4.2.1",
        "Better in-domain uncertainty than SGD, Bayes by backprop, MC-dropout and SWAG.",
        "CIFAR-10, ResNet-20: NLL ≈ .219",
        FASHION,
        "posterity study in-domain --seeds 0 1 2",
        "in-domain/result.json",
        judges.in_domain,
    ),
    Claim(
        "Section 4.2.1",
        "Multi-IVON is better than a deep ensemble.",
        "CIFAR-10, ResNet-20, five members each",
        FASHION,
        "posterity study in-domain --seeds 0 1 2",
        "in-domain/result.json",
        judges.multi,
    ),
    Claim(
        "Section 4.2.2, Figure 3",
        "Tells unknown inputs apart better than AdamW and SGD.",
        "CIFAR-10 against SVHN and Flowers102",
        "Fashion-MNIST against MNIST; CIFAR-10 against emoji and MNIST",
        "posterity study ood --seeds 0 1 2",
        "ood/result.json",
        judges.unknown,
    ),
    Claim(
        "Figure 3c",
        "The variance grows where there are no data.",
        "a picture",
        "a line with a gap",
        "posterity study gap --seeds 0 1 2",
        "gap/result.json",
        judges.between,
    ),
    Claim(
        "Section 4.2.3, Figure 4",
        "More samples at test time help, up to some 64.",
        "accuracy ≈ 91.2 %, NLL ≈ .288 with one, ≈ 92.6 %, .219 with 64",
        FASHION,
        "posterity study mc-samples --seeds 0 1 2",
        "mc-samples/result.json",
        judges.more_samples,
    ),
    Claim(
        "Section 4.2.4",
        "Near the exact posterior: agreement with HMC.",
        "an earlier version won the NeurIPS 2021 competition",
        "610 weights, 1,000 images of Fashion-MNIST, three chains of the No-U-Turn Sampler",
        "posterity study agreement --seeds 0 1 2 3 4",
        "agreement/result.json",
        judges.exact,
    ),
    Claim(
        "Section 4.3",
        "Finetuned large language models as accurate as AdamW's, or better.",
        "RoBERTa-large and DeBERTa-v3-large on GLUE",
        "MiniLM on four domains of sentiment; SmolLM2-135M by LoRA on film reviews",
        "posterity study finetuning --seeds 0 1 2",
        "finetuning/result.json",
        judges.finetuned,
    ),
    Claim(
        "Section 4.3",
        "IVON's Hessian merges as well as squared gradients, at no further pass over the data.",
        "average accuracy 94.0 against 93.9 (RoBERTa, five domains)",
        "MiniLM, five domains of 1,500 sentences",
        "posterity study merging --seeds 0 1 2",
        "merging/result.json",
        judges.merged,
    ),
    Claim(
        "Figure 5",
        "The leave-one-out estimate follows the test loss during training; AdamW's does not.",
        "curves on ImageNet",
        "Fashion-MNIST, LeNet-5, the paper's settings",
        "posterity study leave-one-out --seeds 0 1 2",
        "leave-one-out/result.json",
        judges.left_out,
    ),
    Claim(
        "Section 4.5",
        "The examples that a model is most sensitive to are the odd ones.",
        "pictures",
        "5 % of Fashion-MNIST's training labels made wrong",
        "posterity study label-noise --seeds 0 1 2",
        "label-noise/result.json",
        judges.wrong_labels,
    ),
)
