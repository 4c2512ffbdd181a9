"""The stages of the course, one function each: every stage loads its artefact, or makes it and all it needs.

    get_data → get_reference → get_sft, get_dpo, get_sweep; then `measures` and `outputs`

An artefact is a folder under `settings.run_dir` with a manifest of what it was made from (`artefacts`). It is used
again while that is unchanged and its files are undamaged; otherwise it is set aside (renamed, nothing is lost)
and made again, and a line says why. Notebooks and the command line call the same functions.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from ..evaluation import preference_metrics
from ..hh import Finding, Pair
from ..logprobs import PairScores
from ..losses import sft_loss
from ..settings import EMBEDDED, Settings
from ..tokens import EncodedPair, has_template
from ..training import DPOObjective, MetricsRow, SFTObjective
from ..uncertainty import mean_and_error
from .artefacts import ModelArtefact, as_model, open_artefact, read_jsonl, write_jsonl
from .check import check_limits, check_model
from .disk import json_hash, write_text
from .loading import load_config, load_model, load_tokenizer, model_identity, tokenizer_hash
from .machine import compute_of
from .pairs import PairData, RowsError, data_identity, fit_pairs, load_pairs
from .sources import source_of
from .trained import CurveRow, Data, plan_of, save_with_scores, train_model

HOT_FACTOR = 10  # learning rate of the run that over-optimises on purpose (notebook 6), in those of the main run
HOT_PAIRS = 1200  # training pairs of that run: enough to wreck it
PARTS = ("train", "held_out")
REJECTED = "rejected.jsonl"


def get_data(settings: Settings) -> Data:
    """Stage 1: the pairs, read, checked, split and tokenised. Artefact: data/."""
    tokenizer, tokenizer_sha256 = _tokenizer(settings)
    lengths = {"max_length": settings.max_length, "max_prompt_length": settings.max_prompt_length}
    made_from = {
        "dataset": data_identity(settings),
        "tokenizer": tokenizer_sha256,
        **{k: getattr(settings, k) for k in ("max_pairs", "held_out_pairs", "allow_dropped", "seed")},
        **lengths,
    }
    list_of_all = settings.run_dir / REJECTED  # of a data set that is refused; of one that is not, data/ holds it
    with open_artefact(settings, "data", made_from) as artefact:
        if artefact.mine:
            list_of_all.unlink(missing_ok=True)
            form = "the tokenizer's chat template" if has_template(tokenizer) else "HH's Human and Assistant markers"
            form += " (--template none)" if settings.template == "none" else ""
            if settings.model != EMBEDDED:
                print(f"prompts and responses are written with {form}")
            artefact.about["prompts"] = form
            try:
                pairs = load_pairs(settings)
                found, ids = fit_pairs(pairs, tokenizer, allow_dropped=settings.allow_dropped, **lengths)
            except RowsError as error:
                write_text(list_of_all, "".join(json.dumps(asdict(row)) + "\n" for row in error.findings))
                raise DataError(f"{error}; all of them are listed in {list_of_all}") from error
            for part in PARTS:
                write_jsonl(artefact.folder / f"{part}.jsonl", [asdict(pair) for pair in getattr(found, part)])
                write_jsonl(artefact.folder / f"{part}.ids.jsonl", [asdict(pair) for pair in ids[part]])
            write_jsonl(artefact.folder / REJECTED, [asdict(row) for row in found.findings])
            artefact.about["source"] = found.source
    return _read_data(settings, artefact.folder, json_hash(artefact.manifest))


@lru_cache(maxsize=4)
def _tokenizer(settings: Settings) -> tuple[Any, str]:
    """The settings' tokenizer, which the model and the lengths fit, and its hash; kept: every stage asks for them."""
    tokenizer = load_tokenizer(settings)
    check_limits(load_config(settings), tokenizer, settings)
    return tokenizer, tokenizer_hash(tokenizer)


@lru_cache(maxsize=2)
def _read_data(settings: Settings, folder: Path, manifest_sha256: str) -> Data:
    """Read a data artefact; kept while its manifest is this one."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    train, held_out = ([Pair(**row) for row in read_jsonl(folder / f"{part}.jsonl")] for part in PARTS)
    ids, held_out_ids = ([EncodedPair(**row) for row in read_jsonl(folder / f"{part}.ids.jsonl")] for part in PARTS)
    findings = [Finding(**row) for row in read_jsonl(folder / REJECTED)]
    pairs = PairData(train, held_out, findings, manifest["about"]["source"])
    sha256 = json_hash({part: manifest["files"][f"{part}.jsonl"] for part in PARTS})
    tokenizer, tokenizer_sha256 = _tokenizer(settings)
    return Data(pairs, ids, held_out_ids, tokenizer, sha256, tokenizer_sha256)


def get_base(settings: Settings) -> ModelArtefact:
    """The plain model, before any training, with its log-probabilities. Artefact: reference/."""
    data = get_data(settings)
    longest = max(settings.max_length, settings.max_prompt_length + settings.max_new_tokens)  # scored or sampled
    made_from = {
        "model": model_identity(settings),
        "longest": longest,
        "data": data.sha256,
        "tokenizer": data.tokenizer_sha256,
        **{k: getattr(settings, k) for k in ("max_length", "max_prompt_length")},
    }
    with open_artefact(settings, "reference", made_from) as artefact:
        if artefact.mine:
            model = load_model(settings).to(compute_of(settings).device)
            check_model(model, longest)
            save_with_scores(artefact, settings, data, model, [], training_pairs=True)
            artefact.about["model_commit"] = source_of(settings, "model").commit()
    return as_model("reference", artefact)


def get_reference(settings: Settings) -> ModelArtefact:
    """Stage 2: π_ref, from which the policy starts: the plain model, or SFT with init_from="sft"."""
    return get_base(settings) if settings.init_from == "base" else get_sft(settings)


def get_sft(settings: Settings) -> ModelArtefact:
    """Stage 3: the plain model fine-tuned on the chosen responses. Artefact: sft/."""
    return _sft(settings, "sft", settings.sft_learning_rate, _sft_row)


def get_hot_sft(settings: Settings) -> ModelArtefact:
    """SFT driven to collapse on purpose: HOT_FACTOR times the rate, on HOT_PAIRS pairs. Artefact: hot-sft/."""
    return _sft(settings, "hot-sft", HOT_FACTOR * settings.sft_learning_rate, None, HOT_PAIRS)


def _sft_row(scores: PairScores, start: PairScores) -> MetricsRow:
    loss, error = mean_and_error(sft_loss(scores.chosen, scores.chosen_tokens))
    return {"loss": loss, "loss_se": error}


def _sft(
    settings: Settings, name: str, rate: float, curve_row: CurveRow | None, first_pairs: int | None = None
) -> ModelArtefact:
    data = get_data(settings)
    return train_model(
        settings, data, name, get_base(settings), SFTObjective(torch.tensor([len(p.chosen) for p in data.train])),
        plan_of(settings, settings.sft_epochs, rate), made_from={"objective": "sft"}, curve_row=curve_row,
        first_pairs=first_pairs, scores_training_pairs=name == "sft",
    )  # fmt: skip


def get_dpo(settings: Settings, beta: float | None = None) -> ModelArtefact:
    """Stage 5: the policy trained with DPO at `beta`. Artefact: dpo/, for a β of the sweep sweep/beta-<β>/."""
    beta = settings.beta if beta is None else beta
    objective = dpo_objective(settings, beta, get_reference(settings).scores("train"))

    def _row(scores: PairScores, start: PairScores) -> MetricsRow:
        return preference_metrics(scores, start, beta, settings.loss_type, settings.label_smoothing)

    name = "dpo" if beta == settings.beta else f"sweep/beta-{beta_name(beta)}"
    return train_dpo(settings, get_data(settings), name, objective, settings.learning_rate, curve_row=_row)


def get_dpo_from_sft(settings: Settings) -> ModelArtefact:
    """DPO as in the paper, whatever the settings' start: from SFT, which is π_ref too. Artefact: dpo-from-sft/."""
    objective = dpo_objective(settings, settings.beta, get_sft(settings).scores("train"))
    name, settings = "dpo-from-sft", replace(settings, init_from="sft")
    return train_dpo(settings, get_data(settings), name, objective, settings.learning_rate)


def beta_name(beta: float) -> str:
    """β as folders and keys name it: "5", "0.1", and all digits where there are more, so that no two share a name."""
    return repr(float(beta)).removesuffix(".0")


def get_hot_dpo(settings: Settings) -> ModelArtefact:
    """DPO that over-optimises on purpose: HOT_FACTOR times the rate, on HOT_PAIRS pairs. Artefact: hot-dpo/."""
    objective = dpo_objective(settings, settings.beta, get_reference(settings).scores("train"))
    rate = HOT_FACTOR * settings.learning_rate
    return train_dpo(settings, get_data(settings), "hot-dpo", objective, rate, first_pairs=HOT_PAIRS)


def dpo_objective(settings: Settings, beta: float, reference: PairScores) -> DPOObjective:
    """The settings' loss at this β. reference: log-probabilities of the training pairs under π_ref."""
    return DPOObjective(reference, beta, settings.loss_type, settings.label_smoothing)


def train_dpo(
    settings: Settings,
    data: Data,
    name: str,
    objective: DPOObjective,
    rate: float,
    *,
    curve_row: CurveRow | None = None,
    first_pairs: int | None = None,
) -> ModelArtefact:
    """Every DPO training of the course: from π_ref, with the settings' plan at this learning rate. Artefact: `name`."""
    made_from = {"beta": objective.beta, "loss_type": objective.loss_type, "label_smoothing": objective.label_smoothing}
    return train_model(
        settings, data, name, get_reference(settings), objective, plan_of(settings, settings.epochs, rate),
        made_from=made_from, curve_row=curve_row, first_pairs=first_pairs,
    )  # fmt: skip


def get_sweep(settings: Settings) -> dict[float, ModelArtefact]:
    """Stage 6: one DPO policy for each β of the sweep, all from the same reference."""
    return {beta: get_dpo(settings, beta) for beta in settings.betas}
