"""DPO on real pairs with a small chat model, several β, seeds and epochs: `python -m benchmarks.real_run --help`.

The runs share one pass through the frozen blocks, which is why this is a script and not `python -m dpo_helpers sweep`.
Held-out pairs are drawn once, by whole prompts. Rates are compared on a second split, of the training part: held-out
pairs are looked at when all settings are settled. Each finished run is written at once; started again, the script goes
on with the next one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from benchmarks.dpo_vs_trl import RESULTS, _machine
from dpo_helpers.evaluation import pair_values, preference_metrics, score_pairs
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.logprobs import BOTH, PairScores
from dpo_helpers.models import count_parameters, freeze
from dpo_helpers.run.gradients import InParts
from dpo_helpers.run.loading import load_model, load_tokenizer
from dpo_helpers.run.machine import compute_of
from dpo_helpers.run.measures import longer_wins
from dpo_helpers.run.pairs import PairData, fit_pairs, hold_out, load_pairs
from dpo_helpers.run.sampled import prompts_to_sample, sample_and_measure
from dpo_helpers.run.trained import plan_of
from dpo_helpers.settings import Settings, load_settings
from dpo_helpers.training import DPOObjective, Watch, train
from dpo_helpers.uncertainty import bootstrap_mean

FROZEN = 26  # of SmolLM2's 30 blocks: the last four train, as in GPT-2
HELD_OUT, VALIDATION = 320, 200
RATES = (1e-6, 1e-5, 5e-5)
BETAS = (0.05, 0.1, 0.5)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Run:
    """One training and what differs from the others. trained: blocks that train; validate: on the training part."""

    beta: float
    rate: float
    seed: int = 0
    epochs: int = 1
    template: str = "auto"
    max_length: int = 512
    frozen: int = FROZEN
    validate: bool = False
    sampled: bool = True

    @property
    def measured_on(self) -> str:
        """The part of the pairs that it is measured on."""
        return "validation" if self.validate else "held out"

    @property
    def name(self) -> str:
        """What tells it from all others."""
        return " ".join(f"{key}={value}" for key, value in asdict(self).items())


class Prepared:
    """Model, pairs, scorer and reference log-probabilities of all runs that read the same tokens.

    The pairs lie one after another: those that rates are tried on, validation, held out. One pass through the frozen
    blocks serves them all. To train for good is to train on the first two parts.
    """

    def __init__(self, settings: Settings):
        self.settings, self.tokenizer, self.compute = settings, load_tokenizer(settings), compute_of(settings)
        found = load_pairs(settings)
        first, validation = hold_out(found.train, VALIDATION, seed=1)
        found = PairData([*first, *validation], found.held_out, found.findings, found.source)
        self.pairs, ids = fit_pairs(
            found, self.tokenizer, max_length=settings.max_length, max_prompt_length=settings.max_prompt_length,
            allow_dropped=True,
        )  # fmt: skip
        kept = {pair.index for pair in first}
        tried, train = sum(pair.index in kept for pair in ids["train"]), len(ids["train"])
        self.all = [*ids["train"], *ids["held_out"]]
        self.part = {"tried": slice(0, tried), "validation": slice(tried, train), "train": slice(0, train),
                     "held out": slice(train, len(self.all))}  # fmt: skip
        self.model = load_model(settings)
        freeze(self.model, settings.freeze_layers)
        self.start = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.scorer = FastScorer(self.model, self.all, settings.freeze_layers)
        self.reference = score_pairs(self.model, self.all, self.scorer, self.compute, name="reference")

    def score(self, part: str) -> PairScores:
        """Log-probabilities of a part's pairs under the model as it is now."""
        pairs, first = self.all[self.part[part]], self.part[part].start

        def _scorer(model: Any, at: Sequence[int], sides: Sequence[str] = BOTH) -> tuple[Tensor, ...]:
            return self.scorer(model, [first + i for i in at], sides)

        return score_pairs(self.model, pairs, _scorer, self.compute, name=f"scoring {part}")


class Curve(Watch):
    """Held-out loss, accuracy and margin in the middle and at the end of each epoch."""

    def __init__(self, prepared: Prepared, run: Run):
        self.prepared, self.beta, self.points, self.part = prepared, run.beta, 2 * run.epochs, run.measured_on
        self.rows: list[dict[str, Any]] = []

    def begin(self, model: Any, optimizer: Any, gradient: Any, total: int) -> list[dict[str, Any]]:
        """Nothing to go on from."""
        self.at = {round(total * part / self.points) for part in range(1, self.points + 1)}
        return []

    def updated(self, rows: list[dict[str, Any]]) -> None:
        """Measure at those points."""
        if rows[-1]["step"] in self.at:
            reference, now = self.prepared.reference[self.prepared.part[self.part]], self.prepared.score(self.part)
            self.rows.append({"step": rows[-1]["step"], **preference_metrics(now, reference, self.beta)})
            print(f"  update {rows[-1]['step']}: {_said(self.rows[-1])}", flush=True)


def _said(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {row[key]:.3f} ± {row[key + '_se']:.3f}"
        for key in ("loss", "reward_accuracy", "reward_margin", "chosen_logratio")
    )


def one_run(prepared: Prepared, run: Run) -> dict[str, Any]:
    """Train from the reference, measure on held-out pairs, and sample."""
    settings = replace(
        prepared.settings, seed=run.seed, beta=run.beta, epochs=run.epochs, learning_rate=run.rate, warmup_steps=10,
        schedule="linear", batch_size=16, micro_batch_size=8,
    )  # fmt: skip
    model, compute = prepared.model, prepared.compute
    model.load_state_dict(prepared.start)
    curve, parameters = Curve(prepared, run), [p for p in model.parameters() if p.requires_grad]
    started = time.perf_counter()
    part = prepared.part["tried" if run.validate else "train"]
    rows = train(
        model, prepared.all[part], prepared.scorer, DPOObjective(prepared.reference[part], run.beta),
        plan_of(settings, run.epochs, run.rate), compute,
        gradient=InParts(8, compute, parameters), watch=curve, name=f"β {run.beta:g}, rate {run.rate:g}",
    )  # fmt: skip
    seconds = time.perf_counter() - started
    now, reference = prepared.score(run.measured_on), prepared.reference[prepared.part[run.measured_on]]
    values = pair_values(now, reference, run.beta)
    found: dict[str, Any] = {
        "run": asdict(run), "seconds": seconds, "updates": len(rows), "curve": curve.rows,
        "trained_loss": [row["loss"] for row in rows],
        "trained_accuracy": [row["reward_accuracy"] for row in rows],
        "metrics": preference_metrics(now, reference, run.beta),
        "intervals": {key: asdict(bootstrap_mean(values[key])) for key in ("reward_accuracy", "reward_margin", "loss")},
        "right": values["reward_accuracy"].int().tolist(),
    }  # fmt: skip
    if run.sampled:
        found |= sampled(prepared, settings)
    return found


def sampled(prepared: Prepared, settings: Settings) -> dict[str, Any]:
    """Measures of the model's own samples, with the KL to the reference, and the first samples, without the prompts."""
    base, prompts = load_model(prepared.settings).eval(), prompts_to_sample(settings, prepared.pairs)
    measured = sample_and_measure(settings, prepared.tokenizer, prepared.model, base, prompts)
    first = [{"text": response.text, "ended": response.ended} for response in measured.responses[:12]]
    return {"sampled": measured.metrics, "responses": first}


def plan(rate: float) -> Sequence[Run]:
    """Three β, two seeds; then more epochs; then one experiment each against what could hold the accuracy back."""
    sweep = [Run(beta, rate, seed, sampled=seed == 0) for seed in SEEDS for beta in BETAS]
    tried = [
        Run(0.1, rate, epochs=3),
        Run(0.1, 5 * rate),
        Run(0.1, rate, template="none", sampled=False),
        Run(0.1, rate, max_length=256, sampled=False),
        Run(0.1, rate, frozen=0, sampled=False),
    ]
    return [*sweep, *tried]


def main(
    model: Annotated[str, typer.Option(help="a chat model: a .gguf file, folder or Hub id")],
    data: Annotated[str, typer.Option(help="HH pairs: a file or Hub id")],
    out: Annotated[Path, typer.Option(help="where results are kept")] = RESULTS / "real_run.json",
) -> None:
    """Choose a rate, run everything of `plan`, and write it down."""
    results = json.loads(out.read_text()) if out.exists() else {"machine": _machine("cpu"), "runs": {}}
    base = load_settings(
        "gpt2", model=model, model_revision=None, dataset=data, dataset_revision=None, held_out_pairs=HELD_OUT,
        max_pairs=None, prompts=80, max_new_tokens=64, precision="fp32", device="cpu",
    )  # fmt: skip
    kept: dict[tuple[object, ...], Prepared] = {}

    def _do(run: Run) -> dict[str, Any]:
        if run.name not in results["runs"]:
            what = (run.template, run.max_length, run.frozen)
            if what not in kept:
                kept.clear()
                settings = replace(
                    base, template=run.template, max_length=run.max_length, max_prompt_length=run.max_length // 2,
                    freeze_layers=run.frozen,
                )  # fmt: skip
                kept[what] = Prepared(settings)
                said = results.setdefault("data", {}).setdefault(str(what), {})
                said |= _described(kept[what])
                if "reference" not in results:
                    results["reference"] = sampled(kept[what], base)
            print(f"{time.strftime('%H:%M')} {run.name}", flush=True)
            results["runs"][run.name] = one_run(kept[what], run)
            out.write_text(json.dumps(results, indent=1) + "\n")
        found: dict[str, Any] = results["runs"][run.name]
        print(f"{time.strftime('%H:%M')} {run.name}: {_said(found['metrics'])}, {found.get('sampled', {}).get('kl')}")
        return found

    tried = {rate: _do(Run(0.1, rate, validate=True, sampled=False))["metrics"]["loss"] for rate in RATES}
    results["rate"] = min(tried, key=tried.__getitem__)
    for run in plan(results["rate"]):
        _do(run)


def _described(prepared: Prepared) -> dict[str, Any]:
    held_out = prepared.reference[prepared.part["held out"]]
    accuracy, ties = longer_wins(held_out)
    tokens = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in prepared.all]
    return {
        "pairs": {name: len(prepared.all[part]) for name, part in prepared.part.items()},
        "cut": sum(pair.was_cut for pair in prepared.all), "mean_tokens": sum(tokens) / len(tokens),
        "longer_wins": accuracy, "longer_ties": ties,
        "longer_right": (held_out.chosen_tokens > held_out.rejected_tokens).int().tolist(),
        **asdict(count_parameters(prepared.model)),
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
