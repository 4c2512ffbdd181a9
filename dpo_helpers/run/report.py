"""The report of a run: `results.json` for machines, `report.html` for people, the figures for both."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import jsonschema
from markupsafe import Markup

from ..errors import ArtefactError
from ..evaluation import Evaluation
from ..generation import Response
from ..settings import Settings
from ..show import figures
from ..uncertainty import bootstrap_mean
from ..untrusted import visible
from .artefacts import ModelArtefact, about
from .disk import write_text
from .measures import (
    accuracy_baselines,
    get_comparison,
    get_differences,
    get_frontier,
    get_sweep_evaluations,
    get_values,
)
from .outputs import get_final_model, get_generations
from .stages import beta_name, get_base, get_data, get_dpo, get_reference, get_sft, get_sweep

COLUMNS = {
    "true_reward": "true reward",
    "kl": "KL(π_θ‖π_ref)",
    "reward_accuracy": "reward accuracy",
    "chosen_reward": "chosen reward",
    "rejected_reward": "rejected reward",
    "reward_margin": "reward margin",
    "chosen_logratio": "chosen log-ratio",
    "length": "length",
    "repeated_3grams": "repeated 3-grams",
    "looping": "ends in a loop",
}


def _model_record(settings: Settings, evaluation: Evaluation, model: ModelArtefact) -> dict[str, Any]:
    facts = model.manifest["about"]
    values = get_values(settings, model)
    intervals = {key: bootstrap_mean(value) for key, value in values.items() if key in evaluation.metrics}
    return {
        "beta": evaluation.beta,
        "metrics": _plain(evaluation.metrics),
        "intervals": {key: [interval.low, interval.high] for key, interval in intervals.items()},
        "weights_sha256": model.weights_sha256,
        "seconds": facts["seconds"],
        "device": facts["device"],
    }


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null where one value is too few for a standard error."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


def collect_results(settings: Settings) -> dict[str, Any]:
    """Everything that was measured in a run, as JSON values; `results.schema.json` documents each key.

    Raises ArtefactError if they do not fit the schema.
    """
    data = get_data(settings)
    comparison, sweep = get_comparison(settings), get_sweep_evaluations(settings)
    models = {"reference": get_base(settings), "sft": get_sft(settings), "dpo": get_dpo(settings)}
    results = {
        "schema_version": 1,
        "about": about(settings),
        "data": {
            "source": data.pairs.source,
            "sha256": data.sha256,
            "training_pairs": len(data.train),
            "held_out_pairs": len(data.held_out),
            "dropped_rows": len(data.pairs.dropped),
            "cut_pairs": sum(pair.was_cut for pair in (*data.train, *data.held_out)),
            "accuracy_baselines": accuracy_baselines(settings),
        },
        "models": {name: _model_record(settings, e, models[name]) for name, e in comparison.items()},
        "sweep": {beta_name(b): _model_record(settings, sweep[b], s) for b, s in get_sweep(settings).items()},
        "frontier": {name: [_point(row) for row in rows] for name, rows in get_frontier(settings).items()},
        "differences": {key: vars(interval) for key, interval in get_differences(settings).items()},
    }
    check_results(results)
    return results


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    return _plain({k: v for k, v in row.items() if k not in ("epoch", "split", "pairs")})


def results_schema() -> dict[str, Any]:
    """The JSON schema of results.json: names, meanings, units."""
    schema: dict[str, Any] = json.loads(files(__package__).joinpath("results.schema.json").read_text(encoding="utf-8"))
    return schema


def check_results(results: Mapping[str, Any]) -> None:
    """ArtefactError, naming the key, unless these are results as `results_schema` describes them."""
    errors = jsonschema.Draft202012Validator(results_schema()).iter_errors(results)
    for error in errors:
        where = "/".join(map(str, error.absolute_path)) or "results"
        raise ArtefactError(f"results.json does not fit its schema at {where}: {error.message}")


def draw_figures(settings: Settings) -> dict[str, str]:
    """Draw every figure of the course into <run>/figures; returns each file's one-sentence summary."""
    folder = settings.run_dir / "figures"
    data, comparison, baselines = get_data(settings), get_comparison(settings), accuracy_baselines(settings)
    lengths = {part: [len(getattr(pair, part)) for pair in data.train] for part in ("prompt", "chosen", "rejected")}
    sweep, dpo = get_sweep_evaluations(settings), get_dpo(settings)
    frontier = get_frontier(settings)
    return {
        "01-lengths": figures.plot_lengths(lengths, folder),
        "03-sft": figures.plot_sft(get_sft(settings).metrics, folder),
        "04-gradient-weight": figures.plot_gradient_weight(folder),
        "05-dpo-training": figures.plot_dpo(dpo.metrics, baselines, folder),
        "05-reward-kl": figures.plot_reward_kl(comparison, folder),
        "06-beta-sweep": figures.plot_sweep(sweep, baselines, folder),
        "06-frontier": figures.plot_frontier(frontier, comparison[get_reference(settings).name], folder),
        "06-study": figures.plot_study(dpo.metrics, comparison, sweep, folder),
        "07-text-measures": figures.plot_text_measures(comparison, folder),
    }


def _table(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    columns = {key: title for key, title in COLUMNS.items() if all(key in r["metrics"] for r in records.values())}
    rows = [
        {"name": name, "cells": [_with_error(record["metrics"], key) for key in columns]}
        for name, record in records.items()
    ]
    return {"columns": list(columns.values()), "rows": rows}


def _with_error(metrics: dict[str, float], key: str) -> str:
    if key == "reward_accuracy" and metrics["ties"] == 1:
        return "– (all tie)"
    error = metrics.get(f"{key}_se")
    return f"{metrics[key]:.3f}" + (f"\u00a0± {error:.3f}" if error is not None else "")


def _generation_rows(generations: dict[str, list[Response]]) -> list[dict[str, Any]]:
    models = [name for name in generations if "/" not in name]
    prompts = [r.prompt for r in generations[models[0]]]
    return [
        {"prompt": p.strip(), "answers": [generations[m][i].text.strip() for m in models]}
        for i, p in enumerate(prompts)
    ]


def _show(value: object) -> str:
    """What the template does to every value before it escapes it; what a macro has made is escaped already."""
    return value if isinstance(value, Markup) else visible(str(value))


def make_report(settings: Settings) -> Path:
    """Write results.json, generations.json, figures/ and report.html of a run; returns the report's path.

    The report is one file that needs no network: figures are inside, data and model text is escaped. What was measured
    is written first, so that nothing that goes wrong with a figure costs it.
    """
    run = settings.run_dir
    results = collect_results(settings)
    write_text(run / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    generations = get_generations(settings)
    plain = {key: [vars(r) for r in responses] for key, responses in generations.items()}
    write_text(run / "generations.json", json.dumps(plain, indent=1) + "\n")
    get_final_model(settings)
    summaries = draw_figures(settings)
    images = [
        {"data": base64.b64encode((run / "figures" / f"{name}.png").read_bytes()).decode(), "summary": summary}
        for name, summary in summaries.items()
    ]
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, finalize=_show, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(
        about=results["about"], data=results["data"], images=images, sweep=_table(
            {f"β = {name}": record for name, record in results["sweep"].items()}
        ), models=_table(results["models"]), generations=_generation_rows(generations),
        differences=results["differences"],
        hashes={name: record["weights_sha256"] for name, record in results["models"].items()},
    )  # fmt: skip
    write_text(run / "report.html", page)
    return run / "report.html"
