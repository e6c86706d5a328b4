"""The command line: ``posterity train``, ``compare``, ``predict`` …; each explains itself."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from posterity import __version__
from posterity_studies import (
    claims,
    compare,
    data,
    finetune,
    jobs,
    pretrain,
    ranks,
    report,
    runs,
    studies,
    tasks,
    train,
    tune,
)
from posterity_studies.arguments import Json, Name, Place, RecipeName, RunFolder, Whole, parsed
from posterity_studies.data import tokens
from posterity_studies.merge import Merge
from posterity_studies.predicting import Predict
from posterity_studies.progress import bar
from posterity_studies.recipes import Recipe, UserError, overridden, recipe, unknown
from posterity_studies.sensitivity import Sensitivity


@dataclass
class Train:
    """Train one optimizer with one seed. Run it again after an interruption: it goes on.

    posterity train fashion-mnist --seed 1 --set lr=0.3

    On several processes: torchrun --nproc-per-node N -m posterity_studies train ...
    """

    recipe: RecipeName
    """fashion-mnist, or smoke (the same cut to seconds); an unknown name lists all."""
    optimizer: str = "ivon"
    """adamw, sgd or ivon; an unknown name lists the recipe's."""
    seed: int = 0
    """Of the weights, the order of the images and the noise."""
    out: Place = None
    """Folder of the run; default runs/RECIPE/OPTIMIZER-seedSEED."""
    epochs: Whole = None
    """Fewer or more than the recipe's; the learning rate still ends at zero."""
    samples: Whole = None
    """Posterior samples at test time."""
    validation: int = 0
    """Hold out so many training images and evaluate on them instead of the test set."""
    set: tuple[str, ...] = ()
    """Settings of the optimizer, as KEY=NUMBER: --set lr=0.3 hess_init=0.05. IVON also has
    temperature, the training images over ess, and memory, 1/(1-betas[1]), in steps."""
    quiet: bool = False
    """Print nothing but errors and the progress bar."""
    as_json: Json = False
    """Print what result.json holds instead of a table."""

    def __call__(self) -> None:
        chosen = _changed(recipe(self.recipe), self.epochs, self.samples)
        chosen = replace(chosen, validation=self.validation)
        chosen = chosen.with_settings(self.optimizer, self.set)
        out = self.out or Path("runs") / chosen.name / f"{self.optimizer}-seed{self.seed}"
        with ranks.joined():
            result = train.train(chosen, self.optimizer, self.seed, out, bar)
            first = ranks.first()
        if first and self.as_json:
            print(runs.as_json(result))
        elif first and not self.quiet:
            compare.show([result])
            for verdict in result.get("diagnostics", ()):  # runs of earlier versions have none
                if not verdict["good"]:
                    print(f"! {verdict['words']}")
            print(f"run folder: {out}")


@dataclass
class Compare:
    """Train AdamW, SGD and IVON alike, print the comparison and write an HTML report.

    posterity compare fashion-mnist --seeds 0 1 2
    """

    recipe: RecipeName
    """fashion-mnist, or smoke (the same cut to seconds); an unknown name lists all."""
    seeds: tuple[int, ...] = (0,)
    """One run of each optimizer for each."""
    out: Place = None
    """Folder of the runs and the report; default runs/RECIPE. Finished runs are used again."""
    epochs: Whole = None
    """Fewer or more than the recipe's; the learning rate still ends at zero."""
    samples: Whole = None
    """Posterior samples at test time."""
    results: Place = None
    """Folder for copies of the result files, to be committed."""
    as_json: Json = False
    """Print a list of what the runs' result.json hold instead of a table."""

    def __call__(self) -> None:
        chosen = _changed(recipe(self.recipe), self.epochs, self.samples)
        out = self.out or Path("runs") / chosen.name
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds needs one number or more, each once")
        found = compare.run_all(chosen, self.seeds, out)
        if self.results:
            for result in found:
                name = f"{result['settings']['optimizer']}-seed{result['seed']}.json"
                runs.write_json(self.results / name, result)
        folders = [compare.run_folder(out, o, self.seeds[0]) for o in chosen.optimizers]
        report = compare.write_report(folders, out / "report.html")
        if self.as_json:
            print(runs.as_json(found))
            return
        compare.show(found)
        print(f"report: {report.resolve()}")


@dataclass
class Report:
    """Write the HTML report of one finished run, or of several on the same images.

    Scores, curves, calibration, what is unknown, the posterior layer by layer, and a gallery.

    posterity report runs/fashion-mnist/ivon-seed0 runs/fashion-mnist/sgd-seed0
    """

    run: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs of `train` or `compare`."""
    out: Place = None
    """The page; default report.html in the first folder."""
    as_json: Json = False
    """Print the page's path as JSON."""

    def __call__(self) -> None:
        if not self.run:
            raise UserError("report needs the folder of a finished run, or of several")
        path = self.out or self.run[0] / "report.html"
        if path.is_dir():
            raise UserError(f"{path} is a folder: name the page, as in {path / 'report.html'}")
        written = compare.write_report(self.run, path).resolve()
        print(runs.as_json({"report": str(written)}) if self.as_json else f"report: {written}")


@dataclass
class Evaluate:
    """Evaluate a finished run with any number of posterior samples.

    posterity evaluate runs/fashion-mnist/ivon-seed0 --samples 16
    """

    run: RunFolder
    """Folder of a run."""
    samples: int = 64
    """Posterior samples; 0 evaluates at the mean."""
    as_json: Json = False
    """Print the measures as JSON instead of a table."""

    def __call__(self) -> None:
        result, model, posterior = runs.load_sampled(self.run, self.samples)
        chosen = runs.recipe_of(result)
        task = tasks.load(chosen)
        found = train.evaluate(model, posterior, task.test, task.ood, self.samples, bar)
        samples = self.samples if posterior else 0
        kept = {"posterity": __version__, "samples": samples}
        kept |= {k: v for k, v in found.items() if isinstance(v, float)}
        runs.write_json(self.run / f"evaluation-{samples}.json", kept)
        if self.as_json:
            print(runs.as_json(kept))
            return
        drawn = Table(
            title=f"{self.run}: " + (f"{samples} samples" if posterior else "at the mean"),
            title_justify="left",
        )
        for metric, (heading, form, _) in compare.COLUMNS.items():
            if metric in found:
                drawn.add_row(heading, form.format(found[metric]))
        Console().print(drawn)


@dataclass
class Tune:
    """Search each optimizer's settings on a validation split, with the same budget for each.

    By successive halving: all trials run for a few epochs, the better third for three times as
    many, and so on; the last three then run in full with three seeds.

    posterity tune fashion-mnist --trials 12 --jobs 4
    """

    recipe: RecipeName
    """fashion-mnist, or smoke (the same cut to seconds); an unknown name lists all."""
    trials: int = 10
    """Trials for each optimizer."""
    first: Whole = None
    """Epochs of the first round; by default a ninth of the recipe's for 9 to 26 trials, at least
    one. The recipe's own number trains every trial in full: that takes longer, and is fooled
    less."""
    jobs: int = 2
    """Trials at a time; the processor's cores are divided among them."""
    out: Place = None
    """Folder of the trials; default runs/tune/RECIPE. Finished trials are not run again."""
    results: Place = None
    """Where to write the search's table as JSON."""
    as_json: Json = False
    """Print that table instead of the best settings."""

    def __call__(self) -> None:
        chosen = recipe(self.recipe)
        if self.trials < 1 or self.jobs < 1:
            raise UserError("tune needs trials >= 1 and jobs >= 1")
        if self.first is not None and not 0 < self.first <= chosen.epochs:
            raise UserError(f"--first must be between 1 and {chosen.epochs}, the recipe's epochs")
        out = self.out or Path("runs/tune") / chosen.name
        with jobs.on(jobs.Engine(self.jobs)):
            found = tune.tune(chosen, self.trials, out, bar, self.first)
        path = self.results or out / "tune.json"
        runs.write_json(path, found)
        tune.draw(path.with_suffix(".png"), found)
        if self.as_json:
            print(runs.as_json(found))
            return
        print(f"table and picture: {path}, {path.with_suffix('.png')}")
        for optimizer in (o for o in chosen.search if o in found):
            best = found[optimizer]["trials"][0]
            print(f"{optimizer}: {best['settings']}, validation {best['validation']}")


@dataclass
class Tokens:
    """Write a corpus as GPT-2's tokens, for `pretrain`. Interrupted, it goes on where it was.

    posterity tokens Skylion007/openwebtext --out tokens/openwebtext
    """

    corpus: Annotated[Name, tyro.conf.arg(metavar="CORPUS")]
    """A file; a folder of files *.txt; anarchism, dictionary or news, or several joined by +; or a
    data set of the Hugging Face hub, such as Skylion007/openwebtext."""
    out: Path
    """Folder for train.bin, held.bin and tokens.json."""
    as_json: Json = False
    """Print what tokens.json holds instead of a sentence."""

    def __call__(self) -> None:
        facts = tokens.prepare(self.corpus, self.out, bar)
        if self.as_json:
            print(runs.as_json(facts))
            return
        print(f"{self.out}: {facts['train']:,} tokens to train on, {facts['held']:,} held out")


@dataclass
class Pretrain:
    """Train a language model from scratch. Run it again after an interruption: it goes on.

    posterity pretrain gpt2 --tokens tokens/openwebtext --steps 1000

    On several GPUs: torchrun --nproc-per-node N -m posterity_studies pretrain ...
    """

    recipe: RecipeName
    """gpt2, gpt2-medium or gpt2-large, with the paper's settings."""
    tokens: Path
    """Folder that `posterity tokens` wrote."""
    optimizer: str = "ivon"
    """adamw or ivon."""
    seed: int = 0
    """Of the weights, the windows of text and the noise."""
    out: Place = None
    """Folder of the run; default runs/RECIPE/OPTIMIZER-seedSEED."""
    steps: Whole = None
    """Fewer steps than the paper's 100,000; the learning rate still ends at zero."""
    batch: Whole = None
    """Sequences a step, of all processors together; the paper's are 480."""
    micro: Whole = None
    """Sequences at once on each processor; less takes less memory. IVON draws a posterior sample
    for each such part of a batch."""
    compiled: bool = False
    """Compile the network first (torch.compile): a minute at the start, faster steps on a GPU,
    where steps of one part (--micro not below --batch) also become a CUDA graph."""
    as_json: Json = False
    """Print what result.json holds instead of a sentence."""

    def __call__(self) -> None:
        if self.recipe not in pretrain.RECIPES:
            raise UserError(unknown("recipe", self.recipe, pretrain.RECIPES))
        what, settings = pretrain.RECIPES[self.recipe]
        if self.optimizer not in settings:
            raise UserError(unknown("optimizer", self.optimizer, settings))
        given = {"steps": self.steps, "batch": self.batch, "micro": self.micro}
        given["compiled"] = self.compiled
        what = replace(what, **{k: v for k, v in given.items() if v is not None})
        read = tokens.load(self.tokens)
        out = self.out or Path("runs") / self.recipe / f"{self.optimizer}-seed{self.seed}"
        with ranks.joined():
            found = pretrain.pretrain(
                what, settings[self.optimizer], self.seed, out, read["train"], read["held"], bar
            )
            first = ranks.first()
        if first and self.as_json:
            print(runs.as_json(found))
        elif first:
            loss, seconds = found["curve"]["held"][-1], found["seconds_per_step"]
            print(f"held-out loss {loss:.4f} nats a token, {seconds:.3g} s a step")
            print(f"run folder: {out}")


@dataclass
class Finetune:
    """Finetune a language model on sentences, and keep its posterior: to predict with, to merge.

    Run it again after an interruption: it goes on.

    posterity finetune minilm movies --epochs 2

    On several processes: torchrun --nproc-per-node N -m posterity_studies finetune ...
    """

    model: Annotated[Name, tyro.conf.arg(metavar="MODEL")]
    """An encoder of the Hugging Face hub, such as FacebookAI/roberta-large, or a folder that holds
    one; minilm (22.7M weights) or smollm2 (135M, by LoRA) need no hub."""
    sentences: Annotated[Name, tyro.conf.arg(metavar="SENTENCES")]
    """cola, sst2, mrpc, qqp, mnli, qnli or rte of GLUE; imdb, yelp, rotten-tomatoes, amazon; a data
    set of the hub, or a folder, with columns text and label and splits train and test. For minilm
    movies, amazon, nyt, tweets or airline; for smollm2 movies."""
    optimizer: str = "ivon"
    """adamw or ivon."""
    seed: int = 0
    """Models that are to be merged need one seed: their heads start from it."""
    out: Place = None
    """Folder of the run; default runs/MODEL/SENTENCES/OPTIMIZER-seedSEED."""
    epochs: Whole = None
    """Passes over the training sentences."""
    batch: Whole = None
    """Sentences a step, of all processes together."""
    samples: int = 16
    """Posterior samples that the test averages."""
    set: tuple[str, ...] = ()
    """Settings of the optimizer, as KEY=NUMBER: --set lr=0.01 ess=1e8."""
    as_json: Json = False
    """Print what result.json holds instead of a table."""

    def __call__(self) -> None:
        if self.optimizer not in finetune.OPTIMIZERS:
            raise UserError(unknown("optimizer", self.optimizer, finetune.OPTIMIZERS))
        settings = overridden(finetune.OPTIMIZERS[self.optimizer], self.optimizer, self.set)
        given = {"epochs": self.epochs, "batch": self.batch}
        if min(self.samples, *(v for v in given.values() if v is not None), 1) < 1:
            raise UserError("needs --epochs, --batch and --samples of at least 1")
        subject = finetune.subject(self.model, self.sentences)
        subject = replace(subject, **{k: v for k, v in given.items() if v is not None})
        name = Path(self.sentences.rstrip("/")).name
        out = self.out or Path("runs", subject.name, name, f"{self.optimizer}-seed{self.seed}")
        with ranks.joined():
            how = {"samples": self.samples, "progress": bar}
            found = finetune.run(subject, self.sentences, settings, self.seed, out, **how)
            first = ranks.first()
        if not first:
            return
        if self.as_json:
            print(runs.as_json(found))
            return
        drawn = Table("on the test", *finetune.MEASURES, title_justify="left")
        for way, score in found["test"].items():
            drawn.add_row(way, *(f"{score[measure]:.4f}" for measure in finetune.MEASURES))
        Console().print(drawn)
        print(f"run folder: {out}")


@dataclass
class Study:
    """Ask on real data what the posterior is good for; without a name, list the questions.

    posterity study gap --seeds 0 1 2
    """

    name: Annotated[Name, tyro.conf.arg(metavar="[STUDY]")] = ""
    """One of the list."""
    seeds: tuple[int, ...] = (0,)
    """Of the training runs."""
    scale: Literal["smoke", "desk", "gpu", "paper"] = "desk"
    """smoke takes seconds and its numbers mean nothing; gpu takes minutes on one; paper is the
    published size, and takes several: CIFAR-10 with ResNet-20, GPT-2 on OpenWebText."""
    out: Place = None
    """Folder of the study; default runs/studies/NAME. What is finished there is used again."""
    results: Place = None
    """Folder for a copy of the result file and the pictures, to be committed."""
    jobs: int = 1
    """Training runs at a time, where a study has several; the cores are divided among them."""
    slurm: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None
    """Submit the training runs to this Slurm partition instead (needs submitit)."""
    list: bool = False
    """List the questions, as without a name."""
    report: bool = False
    """Set the paper's claims beside the results under --results (default results), as a page."""
    as_json: Json = False
    """Print what result.json holds, or the list of claims, instead of a table."""

    def __call__(self) -> None:
        if self.report:
            self._report(self.results or Path("results"))
            return
        if self.as_json and (self.list or not self.name):
            print(runs.as_json(studies.STUDIES))
            return
        if self.list or not self.name:
            drawn = Table("study", "question", title_justify="left")
            for name, question in studies.STUDIES.items():
                drawn.add_row(name, question)
            Console().print(drawn)
            return
        out = self.out or Path("runs/studies") / self.name
        with jobs.on(jobs.Engine(self.jobs, self.slurm, folder=out)):
            found = studies.study(self.name, out, self.seeds, self.scale, bar)
        if self.results:
            self._keep(found, out, self.results)
        if self.as_json:
            print(runs.as_json(found))
            return
        drawn = Table(title=f"{self.name}, {self.scale}: {out}", title_justify="left")
        for heading in dict.fromkeys(key for row in found["rows"] for key in row):
            drawn.add_column(heading, justify="left" if heading == "method" else "right")
        for row in found["rows"]:
            cells = (row.get(str(column.header), "") for column in drawn.columns)
            drawn.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
        console = Console()
        Console(width=None if console.is_terminal else 160).print(drawn)

    def _keep(self, found: dict[str, Any], out: Path, results: Path) -> None:
        """Copy what is to be committed; one result never takes another study's place."""
        path = results / "result.json"
        if path.exists():
            before = runs.read_json(path)
            for key in ("study", "scale"):
                if before.get(key) != found[key]:
                    raise UserError(
                        f"{path} is of {key} {before.get(key)!r}, not {found[key]!r}: "
                        "choose another --results"
                    )
            if before != found:
                when = before["provenance"]["finished"]
                told = f"replacing {path}, of seeds {before['seeds']}, finished {when}"
                print(told, file=sys.stderr)
        runs.write_json(path, found)
        for picture in out.glob("*.png"):
            shutil.copy(picture, results)

    def _report(self, results: Path) -> None:
        if not results.is_dir():
            raise UserError(f"{results} is no folder: pass --results, where the results are")
        found = claims.judged(results)
        drawn = Table("claim", "at desk scale", "ours", title_justify="left")
        for judged in found:
            if judged.scale == "desk":
                drawn.add_row(judged.claim.text, judged.status, judged.ours)
        out = self.out or Path("runs/studies/report.html")
        report.write_claims(out, found, runs.provenance("the result files' own", "theirs"))
        if self.as_json:
            shown = ("where", "text", "paper", "command")
            told = [{k: getattr(j.claim, k) for k in shown} for j in found]
            for row, j in zip(told, found, strict=True):
                row |= {"scale": j.scale, "status": j.status, "ours": j.ours}
            print(runs.as_json(told))
            return
        Console().print(drawn)
        print(f"report: {out.resolve()}")


def _changed(chosen: Recipe, epochs: int | None, samples: int | None) -> Recipe:
    given = {"epochs": epochs, "samples": samples}
    return replace(chosen, **{k: v for k, v in given.items() if v is not None})


COMMANDS = {
    "train": Train,
    "compare": Compare,
    "report": Report,
    "evaluate": Evaluate,
    "predict": Predict,
    "tune": Tune,
    "tokens": Tokens,
    "pretrain": Pretrain,
    "finetune": Finetune,
    "sensitivity": Sensitivity,
    "merge": Merge,
    "study": Study,
}
FREE = "free some and run the same command again"
ADVICE = {errno.ENOSPC: FREE, errno.EDQUOT: FREE}
ADVICE |= dict.fromkeys((errno.EACCES, errno.EROFS), "choose a place that may be written to")
RESUMED = (Train, Compare, Tune, Tokens, Pretrain, Finetune, Study)


def main() -> None:
    """Run the command line; wrong input ends in one line and exit code 2."""
    command = None
    try:
        if sys.argv[1:] == ["--version"]:
            print(f"posterity {__version__}")
            return
        command = parsed(
            COMMANDS,
            prog="posterity",
            description="Variational learning of deep networks, tried on real data. "
            "--version tells this one; --tyro-print-completion bash (or zsh, tcsh) writes what a "
            "shell completes.",
        )
        if ranks.several() and not isinstance(command, (Train, Pretrain, Finetune)):
            raise UserError("only train, pretrain and finetune run on several processes")
        command()
    except KeyboardInterrupt:
        resumed = isinstance(command, RESUMED)
        then = "goes on from the last checkpoint" if resumed else "starts again"
        print(f"\nposterity: interrupted; the same command {then}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # who reads has enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, data.DataError, ValueError, OSError) as error:
        print("posterity: error:", *_told(error).split(), file=sys.stderr)
        sys.exit(2)


def _told(error: Exception) -> str:
    """What is wrong, and what to do where the system's words leave that out."""
    advice = ADVICE.get(getattr(error, "errno", None) or 0)
    if not isinstance(error, OSError) or advice is None:
        return str(error)
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{(error.strerror or '').lower()}: {advice}"
