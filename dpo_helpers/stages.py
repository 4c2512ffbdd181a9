"""How a stage of the comparison is made: train a copy of its start, measure along the way, score, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import mini, parallel
from .architectures import is_known
from .engine import FastPath
from .evaluation import PairScores, measure_samples, score_pairs
from .generation import Response
from .models import freeze, frozen_part, save_model, weights_hash
from .resume import Unfinished
from .runs import FORMAT, LOGPROBS, METRICS, Stage, artefact, compute_of, open_stage, write_jsonl
from .settings import EMBEDDED, Settings
from .sources import PairData
from .tokens import EncodedPair
from .training import DPOObjective, MetricsRow, SFTObjective, TrainPlan, train, updates_of
from .untrusted import one_line

# (scores of the policy, of its start) on held-out pairs -> what a row of the training curve says of them
CurveRow = Callable[[PairScores, PairScores], MetricsRow]

CURVE_PAIRS = 120  # held-out pairs behind each point of a training curve; final numbers use all of them


@dataclass(frozen=True)
class Data:
    """Pairs as text and as token ids, in the same order, with the tokenizer that made them."""

    pairs: PairData
    train: list[EncodedPair]
    held_out: list[EncodedPair]
    tokenizer: Any
    sha256: str  # of the pairs' text
    tokenizer_sha256: str

    @property
    def pad_id(self) -> int:
        """The id that fills a batch up: end-of-text, masked by position."""
        return int(self.tokenizer.eos_token_id)


def prompts_to_sample(settings: Settings, data: Data) -> list[str]:
    """Prompts on which responses are sampled: of the embedded world's held-out topics, or of held-out pairs."""
    if settings.dataset == EMBEDDED:
        return mini.sampling_prompts(settings.prompts)
    unique = dict.fromkeys(pair.prompt for pair in data.pairs.held_out)
    return list(unique)[: settings.prompts]


def save_stage(
    folder: Path, settings: Settings, data: Data, model: Any, metrics: list[MetricsRow], *, is_reference: bool
) -> dict[str, Any]:
    """Save a model with its metrics and its log-probabilities of the held-out (for π_ref also training) pairs."""
    compute = compute_of(settings)
    write_jsonl(folder / METRICS, metrics)
    parts = {"held_out": data.held_out} | ({"train": data.train} if is_reference else {})
    logprobs: dict[str, torch.Tensor] = {}
    for part, pairs in parts.items():
        fast = fast_path(settings, data, model, part)
        scores = score_pairs(model, pairs, compute, pad_id=data.pad_id, name=f"scoring {part} pairs", fast=fast)
        logprobs |= {f"{part}_{key}": value for key, value in vars(scores).items()}
    save_file(logprobs, folder / LOGPROBS)
    save_model(model, data.tokenizer, folder)
    both = (*data.train, *data.held_out)
    cut = sum(pair.chosen_cut + pair.rejected_cut > 0 for pair in both)
    return {"weights_sha256": weights_hash(model), "pairs": len(both), "cut_responses": cut}


def train_stage(
    settings: Settings,
    data: Data,
    name: str,
    start: Stage,
    objective: SFTObjective | DPOObjective,
    plan: TrainPlan,
    curve_row: CurveRow | None,
    **made_from: Any,
) -> Stage:
    """Train a copy of `start` with the first blocks frozen, and store it as artefact `name`.

    curve_row: what held-out scores become in a row of the training curve; None: no curve.
    """
    made_from |= {
        "reference": start.weights_sha256,
        "data": data.sha256,
        "tokenizer": data.tokenizer_sha256,
        "plan": asdict(plan),
        **{k: getattr(settings, k) for k in ("max_length", "max_prompt_length", "freeze_layers", "freeze_embeddings")},
    }
    if curve_row:
        made_from["curve"] = [CURVE_PAIRS, settings.curve_points, settings.curve_prompts, settings.max_new_tokens]
    # half a training may go on in smaller parts, as the advice after running out of memory says, but not otherwise
    half = {**made_from, "format": FORMAT, "precision": compute_of(settings).precision}
    half["plan"] = {key: value for key, value in asdict(plan).items() if key != "micro_batch_size"}
    unfinished = Unfinished(settings.run_dir / name, half, every=settings.save_every, resume=settings.resume)
    pairs = data.train[: made_from.get("pairs")]

    def _train() -> tuple[Any, list[MetricsRow]]:
        compute = compute_of(settings)
        model = start.load(compute)
        freeze(model, settings.freeze_layers, settings.freeze_embeddings)
        last = updates_of(len(pairs), plan)
        evaluate = _curve(settings, data, start, curve_row, last) if curve_row and parallel.is_main() else None
        fast = fast_path(settings, data, model, "train")
        rows = train(
            model, pairs, replace(objective, fast=fast), plan, compute, pad_id=data.pad_id, name=name,
            evaluate=(lambda step: evaluate(model, step)) if evaluate else None,
            evaluations=settings.curve_points, unfinished=unfinished,
        )  # fmt: skip
        return model, rows

    def _make(folder: Path) -> dict[str, Any]:
        model, rows = _train()
        start.require_unchanged()  # the reference never moves
        is_reference = name == "sft" and settings.init_from == "sft"
        return save_stage(folder, settings, data, model, rows, is_reference=is_reference)

    stage = open_stage(name, artefact(settings, name, made_from, _make, take_part=_train))
    if parallel.is_main():
        unfinished.discard()
    return stage


_FAST: dict[tuple[object, ...], FastPath] = {}  # of the latest frozen blocks


def fast_path(settings: Settings, data: Data, model: Any, part: str) -> FastPath | None:
    """The fast path over the "train" or "held_out" pairs, for models with this one's frozen blocks.

    All stages of this process share it, whatever they train: what it keeps of the frozen blocks serves reference,
    SFT, DPO at every β, and their evaluation. None, with a line that says so once, where the plain path is needed.
    """
    if not settings.freeze_embeddings or not is_known(model):
        _say_plain("the embeddings train" if is_known(model) else f"model type {model.config.model_type}")
        return None
    weights = weights_hash(frozen_part(model, settings.freeze_layers))
    lengths = settings.max_length, settings.max_prompt_length
    same = (weights, data.sha256, lengths, settings.freeze_layers, settings.trunk_gb, compute_of(settings))
    if (same, part) not in _FAST:
        for key in [key for key in _FAST if key[0] != same]:
            del _FAST[key]
        pairs = data.train if part == "train" else data.held_out
        budget, folder = settings.trunk_gb * 1e9, settings.run_dir
        _FAST[same, part] = FastPath(model, pairs, settings.freeze_layers, budget=budget, folder=folder)
    return _FAST[same, part]


@cache
def _say_plain(why: str) -> None:
    if parallel.is_main():
        print(one_line(f"{why}: the plain path is used, which is slower and gives the same numbers"))


def _curve(settings: Settings, data: Data, start: Stage, row: CurveRow, last: int) -> Callable[[Any, int], MetricsRow]:
    """What is measured along a training: some held-out pairs, and samples with their KL to the start."""
    compute = compute_of(settings)
    reference = start.load(compute)
    prompts = prompts_to_sample(settings, data)[: settings.curve_prompts]
    fast = fast_path(settings, data, reference, "held_out")

    def _score(model: Any) -> PairScores:
        return score_pairs(model, data.held_out[:CURVE_PAIRS], compute, pad_id=data.pad_id, fast=fast)

    start_scores = _score(reference)  # in the same batches as the policy's, so that equal models tie exactly

    def _evaluate(model: Any, step: int) -> MetricsRow:
        held_out = {"pairs": len(start_scores.chosen), **row(_score(model), start_scores)}
        # both ends have their samples measured apart, on all prompts: the reference's, and the trained model's
        if step in (0, last):
            return held_out
        return held_out | sample_and_measure(settings, data, model, reference, prompts)[1]

    return _evaluate


def sample_and_measure(
    settings: Settings, data: Data, policy: Any, reference: Any, prompts: Sequence[str], name: str = ""
) -> tuple[list[Response], dict[str, float]]:
    """`evaluation.measure_samples` as the settings say, with the true reward in the embedded world."""
    return measure_samples(
        policy, reference, data.tokenizer, prompts, compute_of(settings), name=name,
        true_reward=mini.true_reward if settings.dataset == EMBEDDED else None,
        **{k: getattr(settings, k) for k in ("max_new_tokens", "max_prompt_length", "seed")},
    )  # fmt: skip


def plan_of(settings: Settings, epochs: int, learning_rate: float) -> TrainPlan:
    """The plan of one training, from the settings."""
    same = ("batch_size", "micro_batch_size", "optimizer", "warmup_steps", "schedule", "max_grad_norm", "seed")
    return TrainPlan(epochs=epochs, learning_rate=learning_rate, **{k: getattr(settings, k) for k in same})
