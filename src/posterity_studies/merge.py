"""``posterity merge``: posteriors of finetuned models become one, file to file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import safetensors
import torch
import tyro

import posterity
from posterity.merging import METHODS, merge_files, source
from posterity_studies import report, runs
from posterity_studies.arguments import Json, Place, Real
from posterity_studies.progress import bar
from posterity_studies.recipes import UserError


@dataclass
class Merge:
    """Merge posteriors of one network, finetuned on other data, into one without training.

    Tensor by tensor, so the models may be larger than the memory. A model card, OUT with the
    ending .md, says what was merged and how to load it; a page, OUT with .html, what became of each
    tensor.

    posterity merge runs/a runs/b --base base.safetensors --out merged.safetensors
    """

    models: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="MODEL ...")]
    """Files that Posterior.save wrote, or folders of runs."""
    out: Path
    """The merged posterior's file; must not exist."""
    base: Place = None
    """What the models were finetuned from: a file or folder, as models; the methods average and
    fisher take none."""
    method: str = "hessian"
    """hessian, product, task_arithmetic, average, fisher, ties, dare_linear or dare_ties."""
    alpha: float = 1.0
    """Scale of the task vectors; not of product, average and fisher."""
    weights: tuple[float, ...] = ()
    """One per model: data sizes where Hessians are means over examples; default 1."""
    density: Real = None
    """Share of each task vector that ties and dare keep."""
    seed: int = 0
    """Of what dare keeps."""
    as_json: Json = False
    """Print the names of what was written, and what was merged, as JSON."""

    def __call__(self) -> None:
        paths = [_posterior(path) for path in self.models]
        base = None if self.base is None else _posterior(self.base)
        card, page = (self.out.with_suffix(ending) for ending in (".md", ".html"))
        if self.out in (card, page):
            what = "model card" if self.out == card else "page"
            raise UserError(f"{self.out} would be the {what}: name a .safetensors file")
        if taken := [path for path in (self.out, card, page) if path.exists()]:
            raise UserError(f"{taken[0]} exists: choose another --out, or remove it")
        how: dict[str, Any] = {"method": self.method, "alpha": self.alpha, "seed": self.seed}
        how |= {"weights": self.weights or None, "density": self.density}
        with (
            runs.replacing(self.out) as merged,
            runs.replacing(card) as text,
            runs.replacing(page) as look,
        ):
            try:
                facts = merge_files(paths, merged, base=base, **how)
            except ImportError as error:
                raise UserError(str(error)) from None
            text.write_text(_card(self.out.name, paths, base, facts))
            _page(look, self.out.name, merged, paths, facts)
        if self.as_json:
            written = {"posterior": str(self.out), "card": str(card), "page": str(page)}
            print(runs.as_json(written | facts))
            return
        print(f"merged posterior: {self.out}\nmodel card: {card}\npage: {page}")


def _page(
    page: Path, name: str, merged: Path, paths: Sequence[Path], facts: dict[str, Any]
) -> None:
    """The page of a merged file, with one tensor of each model in memory."""
    told, cpu = facts["settings"]["merged"], torch.device("cpu")
    scale = {"hessian": told["alpha"], "fisher": 1.0}.get(told["method"])
    held = [] if scale is None else [scale * w for w in told["weights"]]  # of each Hessian
    into, models = source(merged), [source(path) for path in paths]
    names = [key.removeprefix("mean/") for key, shape in into.shapes("mean").items() if all(shape)]
    found = [
        report.merged(n, into.gaussian(n, cpu), [q.gaussian(n, cpu) for q in models], held)
        for n in bar(names, len(names), "page")
    ]
    labels = [p.parent.name if p.name == "posterior.safetensors" else p.stem for p in paths]
    report.write_merge(
        page,
        title=f"{name}, merged by {told['method']}",
        labels=runs.distinct(labels),
        found=found,
        provenance=runs.provenance("of no training", "the files named in the model card"),
    )


def _posterior(path: Path) -> Path:
    """The file of a posterior, or of a run's."""
    found = path / "posterior.safetensors" if path.is_dir() else path
    if not found.is_file():
        missing = "holds no posterior.safetensors" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {missing}: needs a file that Posterior.save wrote, or a run's")
    return found


def _card(name: str, paths: Sequence[Path], base: Path | None, facts: dict[str, Any]) -> str:
    merged = facts["settings"]["merged"]
    settings = [("method", merged["method"])]
    if METHODS[merged["method"]].alpha:
        settings += [("α", f"{merged['alpha']:g}")]
    settings += [(key, f"{merged[key]:g}") for key in ("density", "seed") if key in merged]
    settings += [
        ("ess", _size(facts["ess"])),
        ("posterity", posterity.__version__),
        ("torch", torch.__version__),
        ("safetensors", safetensors.__version__),
        ("made", datetime.now(timezone.utc).isoformat(timespec="seconds")),
    ]
    rows = [
        _row(f"{weight:g}", path, told)
        for weight, path, told in zip(merged["weights"], paths, merged["models"], strict=True)
    ]
    if base is not None:
        rows.append(_row("base", base, merged["base"]))
    return f"""# {name}

A Gaussian posterior over a network's weights, merged from {merged["number"]} by posterity
(https://arxiv.org/abs/2310.12808; no training).

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in settings)}

| weight | file | bytes | sha256 | ess | settings |
|---|---|---|---|---|---|
{chr(10).join(rows)}

```python
from posterity import Posterior, predict
posterior = Posterior.load("{name}")
prediction = predict(model, posterior, inputs, samples=64)  # model: of the same architecture
```
"""


def _row(weight: str, path: Path, told: dict[str, Any]) -> str:
    made = json.dumps(told["settings"]).replace("|", "\\|")
    size = path.stat().st_size
    return f"| {weight} | {path} | {size} | {_sha256(path)} | {_size(told['ess'])} | `{made}` |"


def _size(ess: float | None) -> str:
    return "unknown" if ess is None else f"{ess:g}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
