"""The closing project: change one thing of the main run, predict what happens, run it, report what can be said.

    run_project(settings, {"max_pairs": 1000}, prediction="…", because="…").show()

A project has a folder of its own, <runs>/projects/<change>/<profile>/. What the main run has made is copied there and
used if it is whole and of these settings, and made there otherwise: the main run is read, never written. Both models
are measured on the same held-out pairs and prompts with the same random numbers, so their differences are paired.
"""

from __future__ import annotations

import random
import re
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtefactError, SettingsError
from ..logprobs import PairScores
from ..run.artefacts import ModelArtefact
from ..run.disk import MANIFEST, SEAL, holding, json_hash, load_manifest, write_text, writing
from ..run.measures import get_values
from ..run.stages import dpo_objective, get_data, get_dpo, get_reference, train_dpo
from ..run.trained import Data
from ..settings import Settings
from ..show.tables import show_table, show_text
from ..uncertainty import Interval, mean_and_error, paired_difference
from ..untrusted import one_line, visible

FLIP = "flip_labels"  # of a project only: this share of the training pairs has chosen and rejected swapped
CHANGES = (
    "max_pairs", FLIP, "freeze_layers", "freeze_embeddings", "epochs", "batch_size", "learning_rate", "optimizer",
    "warmup_steps", "schedule", "max_grad_norm", "beta", "loss_type", "label_smoothing", "seed",
)  # fmt: skip
MEASURES = {
    "reward_accuracy": ("reward accuracy", "held-out pairs"),
    "reward_margin": ("reward margin", "held-out pairs"),
    "kl": ("KL(π_θ‖π_ref)", "nats per response"),
    "true_reward": ("true reward", "sampled answers"),
    "length": ("length", "tokens of sampled answers"),
    "ended": ("share ended", "sampled answers that end by themselves"),
}
NAME = "project.md"
CONCLUDE = "## What I conclude"
YOURS = "*Yours to write: was the prediction right? If not, what did it overlook? What would you change next?*"
LATE = "changed after the result was on disk"
LIMITS = (
    "One training each: the intervals say how another draw of held-out pairs and prompts could move a difference, not "
    "how another seed could. And six measures are six chances: even of two models that are equally good, about one "
    "pair in four would show a difference somewhere, by luck."
)
REPORT = """# Project: one change to the main run

`{title}`

## Prediction, written before the run

{prediction}

Because:

{because}

## What was measured

Means ± one standard error. Differences are paired, with 95 % bootstrap intervals.

{table}

## What the intervals allow

{verdict}

{limits}

## How it was made

{facts}

{conclude}

{conclusion}
"""


@dataclass(frozen=True)
class Measure:
    """One measure of both models: (mean, standard error) of each, and changed minus main, paired, with a 95 % interval.

    difference: None where the two have different scales and must not be compared.
    """

    main: tuple[float, float]
    changed: tuple[float, float]
    difference: Interval | None


@dataclass(frozen=True)
class ProjectReport:
    """What a project came to. measures: by the keys of MEASURES; facts: how it was made, by name."""

    setting: str
    before: object
    after: object
    prediction: str
    because: str
    measures: Mapping[str, Measure]
    facts: Mapping[str, object]
    folder: Path

    @property
    def title(self) -> str:
        """Such as "freeze_layers: 8 → 10"."""
        return f"{self.setting}: {self.before} → {self.after}"

    @property
    def verdict(self) -> str:
        """One line that says what the intervals allow, and no more."""
        return verdict({MEASURES[key][0]: m.difference for key, m in self.measures.items() if m.difference})

    @property
    def path(self) -> Path:
        """The report as Markdown."""
        return self.folder / NAME

    def rows(self) -> list[dict[str, str]]:
        """The table of both models: means with standard errors, and paired differences with 95 % intervals."""
        return [
            {
                "measure": ", ".join(MEASURES[key]),
                "main": "{:.3f} ± {:.3f}".format(*m.main),
                "changed": "{:.3f} ± {:.3f}".format(*m.changed),
                "changed − main [95 %]": _signed(m.difference) if m.difference else "– (another β is another scale)",
            }
            for key, m in self.measures.items()
        ]

    def show(self) -> None:
        """Display it in a notebook."""
        print(self.title)
        show_text("prediction, before the run", self.prediction)
        show_text("because", self.because)
        show_table(self.rows())
        print(f"{self.verdict}\n{LIMITS}")
        print(one_line(f"Write your conclusion into {'/'.join(self.path.parts[-5:])}."))

    def markdown(self, conclusion: str = YOURS) -> str:
        """The report as Markdown. What a person wrote is in indented blocks, in which nothing is rendered."""
        rows = self.rows()
        table = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        return REPORT.format(
            title=self.title, prediction=_quote(self.prediction), because=_quote(self.because), verdict=self.verdict,
            table="\n".join(f"| {' | '.join(cells)} |" for cells in table), limits=LIMITS, conclude=CONCLUDE,
            facts="\n".join(f"- {name}: `{value}`" for name, value in self.facts.items()), conclusion=conclusion,
        )  # fmt: skip


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _quote(text: str) -> str:
    """A person's text as an indented block of Markdown: word for word, and no line of it can act as markup."""
    return textwrap.indent(visible(text), "    ", predicate=lambda line: True)


def verdict(differences: Mapping[str, Interval]) -> str:
    """Which measures are higher, which lower, and which cannot be told apart, by intervals of changed minus main.

    An interval that touches 0 holds it. "Cannot be told apart" is not "equal".
    """
    groups: dict[str, list[str]] = {"Higher than the main run": [], "Lower": [], "Cannot be told apart": []}
    higher, lower, unclear = groups.values()
    for name, interval in differences.items():
        (higher if interval.low > 0 else lower if interval.high < 0 else unclear).append(name)
    if not higher:
        groups = {"Lower than the main run": lower, "Cannot be told apart": unclear}
    return " ".join(f"{name}: {'; '.join(found)}." for name, found in groups.items() if found)


def run_project(settings: Settings, change: Mapping[str, Any], *, prediction: str, because: str) -> ProjectReport:
    """Train the main run with one change (what is on disk is loaded), measure both, and write the report.

    change: one of CHANGES with its new value, such as {"freeze_layers": 10}; {"flip_labels": 0.2} swaps chosen and
    rejected in a fifth of the training pairs. prediction, because: your words, from before the run. The report is
    written to <folder>/project.md; a conclusion that you wrote there stays. Raises SettingsError, before anything is
    trained, for a change that is none, unknown, unusable or more than one, and for an empty prediction.
    """
    for what, text in (("prediction", prediction), ("because", because)):
        if not isinstance(text, str) or not text.strip():
            raise SettingsError(f"{what} is empty: write down what you expect, and why, before you run it")
    name, before, value = _one_change(settings, change)
    label = re.sub(r"[^\w.+-]", "-", f"{name}-{value}")
    home = replace(settings, runs_dir=str(settings.run_dir.parent / "projects" / label))
    _borrow(settings, home)
    data = get_data(home)
    _require_pairs(name, value, len(data.train))
    main, changed = get_dpo(home), _train(home, data, name, value)
    of_main, of_changed = (get_values(home, model) for model in (main, changed))
    measures = {
        key: Measure(
            mean_and_error(of_main[key]), mean_and_error(of_changed[key]),
            None if (key, name) == ("reward_margin", "beta") else paired_difference(of_changed[key], of_main[key]),
        )
        for key in MEASURES
        if key in of_main
    }  # fmt: skip
    facts = {
        "profile": home.profile,
        "training pairs of the main run": len(data.train),
        "updates of the main run": main.metrics[-1]["step"],
        "updates of the changed run": changed.metrics[-1]["step"],
        "held-out pairs": len(data.held_out),
        "prompts": len(of_main["kl"]),
        "weights of the main model": main.weights_sha256,
        "weights of the changed model": changed.weights_sha256,
    }
    report = ProjectReport(name, before, value, prediction, because, measures, facts, home.run_dir)
    earlier = report.path.read_text(encoding="utf-8", errors="replace") if report.path.is_file() else ""
    if earlier and (LATE in earlier or _quote(prediction) not in earlier):
        facts["prediction"] = LATE
    write_text(report.path, report.markdown(_conclusion(earlier)))
    return report


def _conclusion(earlier: str) -> str:
    """What is under the last heading of an earlier report; the prompt to write it where there is none."""
    return earlier.partition(f"\n{CONCLUDE}\n")[2].strip("\n") or YOURS


def _one_change(settings: Settings, change: Mapping[str, Any]) -> tuple[str, object, Any]:
    """(Setting, its value in the main run, its new value) of a change; SettingsError if it is not one change."""
    if not isinstance(change, Mapping) or not change:
        raise SettingsError(f"change is {change!r}: give one setting and its value, such as {{'freeze_layers': 10}}")
    if len(change) > 1:
        raise SettingsError(
            f"change has {len(change)} settings ({', '.join(map(str, change))}): nobody could say which one made the "
            "difference; run a project for each"
        )
    ((name, value),) = change.items()
    if name not in CHANGES:
        known = hasattr(settings, str(name))
        why = f"{name} is no setting of the DPO training" if known else f"unknown setting {name!r}"
        raise SettingsError(f"{why}: change one of {', '.join(CHANGES)}")
    before = 0.0 if name == FLIP else getattr(settings, name)
    kinds = {float: (int, float), type(None): (int,)}.get(type(before), (type(before),))
    if type(value) not in kinds:  # a bool is an int for Python, but no number of blocks
        raise SettingsError(f"{name} is {value!r}, but must be of type {kinds[-1].__name__}")
    if value == before:
        raise SettingsError(f"{name} is {before!r} in the main run too: give it another value")
    if name == FLIP and not 0 < value <= 1:
        raise SettingsError(f"{FLIP} is {value!r}, but must be a share, above 0 and 1 at most")
    if name != FLIP:
        replace(settings, **{name: value})  # raises SettingsError for a value that cannot be used
    return name, before, value


def _require_pairs(name: str, value: Any, n: int) -> None:
    """SettingsError where a change of the training pairs, of which the main run has n, leaves them as they are."""
    if name == "max_pairs" and value >= n:
        raise SettingsError(f"max_pairs is {value}, but the main run has {n} training pairs: give fewer")
    if name == FLIP and round(value * n) == 0:
        raise SettingsError(f"{FLIP} is {value!r}, which is none of {n} training pairs: give a larger share")


def _borrow(settings: Settings, home: Settings) -> None:
    """Copy what the main run has made into the project's folder, once, each artefact whole with its manifest.

    What is damaged is not copied, and made in the project's folder instead. Whether it is of these settings, the steps
    find out there.
    """
    wanted = ("data", "reference", *(["sft"] if settings.init_from == "sft" else []), "dpo", "evaluation/dpo")
    for name in wanted:
        source, target = settings.run_dir / name, home.run_dir / name
        if target.exists():
            continue
        try:
            manifest = load_manifest(source)
        except ArtefactError as error:
            print(one_line(f"{error}; the project makes its own, the main run stays as it is"))
            continue
        if manifest:
            with holding(target), writing(target, manifest["made_from"]) as draft:
                draft.about.update(manifest["about"])
                shutil.copytree(source, draft.folder, ignore=shutil.ignore_patterns(MANIFEST, SEAL), dirs_exist_ok=True)


def flipped(data: Data, scores: PairScores, share: float, seed: int) -> tuple[Data, PairScores]:
    """Data with chosen and rejected swapped in a share of the training pairs, and their scores swapped alike.

    Exactly round(share · n) of the n training pairs, drawn by seed; a larger share swaps the same ones and more. The
    held-out pairs stay as they are, so the noise is in what is learned and not in what is measured. Prompts and texts
    stay too, so a true reward that was known stays known.
    """
    order = list(range(len(data.train)))
    random.Random(f"{FLIP}-{seed}").shuffle(order)
    swap = torch.zeros(len(order), dtype=torch.bool)
    swap[order[: round(share * len(order))]] = True
    texts, pairs = list(data.pairs.train), list(data.train)
    for i in swap.nonzero().flatten().tolist():
        text, pair = texts[i], pairs[i]
        texts[i] = replace(text, chosen=text.rejected, rejected=text.chosen)
        cuts = {"chosen_cut": pair.rejected_cut, "rejected_cut": pair.chosen_cut}
        pairs[i] = replace(pair, chosen=pair.rejected, rejected=pair.chosen, **cuts)
    sha256 = json_hash({"data": data.sha256, "swapped": swap.tolist()})
    sides = (
        torch.where(swap, b, a)
        for a, b in (
            (scores.chosen, scores.rejected), (scores.rejected, scores.chosen),
            (scores.chosen_tokens, scores.rejected_tokens), (scores.rejected_tokens, scores.chosen_tokens),
        )
    )  # fmt: skip
    return replace(data, pairs=replace(data.pairs, train=texts), train=pairs, sha256=sha256), PairScores(*sides)


def _train(home: Settings, data: Data, name: str, value: Any) -> ModelArtefact:
    """The changed model. Artefact: changed/. Reference and held-out pairs are the main run's."""
    scores, settings, first_pairs = get_reference(home).scores("train"), home, None
    if name == FLIP:
        data, scores = flipped(data, scores, value, home.seed)
    elif name == "max_pairs":
        first_pairs = value  # the first ones: read again with another max_pairs, other pairs might be held out
    else:
        settings = replace(home, **{name: value})
    objective = dpo_objective(settings, settings.beta, scores)
    return train_dpo(settings, data, "changed", objective, settings.learning_rate, first_pairs=first_pairs)
