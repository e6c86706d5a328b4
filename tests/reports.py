"""What the reports' tests are of: a made-up comparison, a made-up sensitivity."""

from dataclasses import replace

import torch

from posterity.perturbation import Perturbation
from posterity_studies.report import Entry

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
LABELS = ("AdamW", "SGD", "IVON at the mean", "IVON, 64 samples")


def comparison(n=400, m=300, seed=0):
    """Four rows of plausible probabilities: right about 90 % of the time, unsure on the unknown."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(10, (n,), generator=g)
    entries = []
    for i, label in enumerate(LABELS):
        logits = 2 * torch.randn(n, 10, generator=g)
        logits[torch.arange(n), targets] += 5
        losses = [0.9 - 0.1 * i, 0.5, 0.4]
        curve = {"train_loss": losses, "test_nll": losses, "test_accuracy": losses}
        scores = ("accuracy", "nll", "ece", "brier", "ood_auroc", "ood_fpr_at_95")
        entries.append(
            Entry(
                label=label,
                metrics={key: 0.1 + 0.05 * (i + k) for k, key in enumerate(scores)}
                | {"seconds_per_epoch": 12.34, "peak_memory_mib": 1234.5},
                curve={"epoch": [1.0, 2.0, 3.0], **curve} if i < 3 else {},
                probs=(logits * (2 - 0.3 * i)).softmax(1),
                ood_probs=torch.randn(m, 10, generator=g).mul(2).softmax(1),
            )
        )
    return {
        "title": "AdamW, SGD and IVON",
        "entries": entries,
        "targets": targets,
        "class_names": CLASSES,
        "images": torch.randint(256, (n, 28, 28), generator=g, dtype=torch.uint8),
        "provenance": {"git": "0123abc", "seed": "0"},
        "ood_name": "MNIST",
        "data_name": "Fashion-MNIST",
    }


def sensitivity(n=400, seed=1):
    """Of the comparison's last row, as if its images had been trained on."""
    content = comparison(n)
    values = torch.rand(3, n, generator=torch.Generator().manual_seed(seed))
    shown = {k: content[k] for k in ("targets", "class_names", "images", "provenance")}
    return shown | {
        "title": "The images that IVON hangs on",
        "found": Perturbation(*values, torch.ones(n, dtype=torch.long)),
        "probs": content["entries"][-1].probs,
        "tested": (values[2], content["targets"]),
    }


def change(content, index, **fields):
    entries = list(content["entries"])
    entries[index] = replace(entries[index], **fields)
    return content | {"entries": entries}
