"""How a model of the comparison is made: train a copy of its start, measure along the way, score, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from safetensors.torch import save_file

from ..evaluation import score_pairs
from ..fast.architectures import is_known
from ..fast.engine import FastScorer
from ..logprobs import PairScores, PlainScorer, Scorer
from ..models import freeze, frozen_part, weights_hash
from ..settings import Settings
from ..tokens import EncodedPair
from ..training import MetricsRow, Objective, TrainPlan, train
from ..untrusted import one_line
from . import processes
from .artefacts import FORMAT, LOGPROBS, METRICS, Artefact, ModelArtefact, as_model, open_artefact, write_jsonl
from .checkpoints import Checkpoints
from .disk import FROZEN, json_hash
from .gradients import InParts, NotFinite, free_memory, halved
from .loading import save_model
from .machine import compute_of
from .pairs import PairData
from .sampled import prompts_to_sample, sample_and_measure
from .signals import finishing_first
from .watch import Evaluate, RunWatch

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


def plan_of(settings: Settings, epochs: int, learning_rate: float) -> TrainPlan:
    """The plan of one training, from the settings."""
    same = ("batch_size", "micro_batch_size", "optimizer", "warmup_steps", "schedule", "max_grad_norm", "seed")
    return TrainPlan(epochs=epochs, learning_rate=learning_rate, **{k: getattr(settings, k) for k in same})


def updates_of(pairs: int, plan: TrainPlan) -> int:
    """How many updates a plan makes of so many pairs."""
    return plan.epochs * -(-pairs // plan.batch_size)


def train_model(
    settings: Settings,
    data: Data,
    name: str,
    start: ModelArtefact,
    objective: Objective,
    plan: TrainPlan,
    *,
    made_from: dict[str, Any],
    curve_row: CurveRow | None = None,
    first_pairs: int | None = None,
    scores_training_pairs: bool = False,
) -> ModelArtefact:
    """Train a copy of `start` with the first blocks frozen, and store it as artefact `name`.

    made_from: what decides the objective. curve_row: what held-out scores become in a row of the curve; without it
    there is no curve. first_pairs: how many training pairs, the first ones; all if not given. scores_training_pairs:
    the model will be a reference, so its log-probabilities of the training pairs are stored too.
    """
    compute, pairs = compute_of(settings), data.train[:first_pairs]
    decides = {
        **made_from,
        "pairs": first_pairs,
        "scores_training_pairs": scores_training_pairs,
        "reference": start.weights_sha256,
        "data": data.sha256,
        "tokenizer": data.tokenizer_sha256,
        "plan": asdict(plan),
        **{k: getattr(settings, k) for k in ("max_length", "max_prompt_length", "freeze_layers", "freeze_embeddings")},
    }
    if curve_row:
        decides["curve"] = [CURVE_PAIRS, settings.curve_points, settings.curve_prompts, settings.max_new_tokens]
    # half a training may go on in smaller parts, as the advice after running out of memory says, but not otherwise
    half = {**decides, "format": FORMAT, "precision": compute.precision}
    half["plan"] = {key: value for key, value in asdict(plan).items() if key != "micro_batch_size"}
    checkpoints = Checkpoints(settings.run_dir / name, half, every=settings.save_every, resume=settings.resume)
    with open_artefact(settings, name, decides) as artefact:
        if artefact.wanted:
            model = start.load(compute)
            freeze(model, settings.freeze_layers, settings.freeze_embeddings)
            in_parts = InParts(plan.micro_batch_size, compute, [p for p in model.parameters() if p.requires_grad])
            evaluate = _curve(settings, data, start, curve_row, updates_of(len(pairs), plan)) if curve_row else None
            scorer = scorer_of(settings, data, model, "train")
            with finishing_first() as asked_to_stop:
                watch = RunWatch(name, checkpoints, asked_to_stop, evaluate, settings.curve_points)
                try:
                    rows = train(
                        model, pairs, scorer, objective, plan, compute, gradient=in_parts, watch=watch, name=name
                    )
                except NotFinite as error:
                    watch.failed(error)
                    raise
            if artefact.mine:
                start.require_unchanged()  # the reference never moves
                save_with_scores(artefact, settings, data, model, rows, training_pairs=scores_training_pairs)
    if processes.is_main():
        checkpoints.discard()
    return as_model(name, artefact)


def save_with_scores(
    artefact: Artefact, settings: Settings, data: Data, model: Any, metrics: list[MetricsRow], *, training_pairs: bool
) -> None:
    """Save a model with its metrics and its log-probabilities of the held-out (and the training) pairs."""
    write_jsonl(artefact.folder / METRICS, metrics)
    logprobs: dict[str, torch.Tensor] = {}
    for part in ("held_out", "train") if training_pairs else ("held_out",):
        scores = score_part(settings, data, model, part, name=f"scoring {part} pairs")
        logprobs |= {f"{part}_{key}": value for key, value in vars(scores).items()}
    save_file(logprobs, artefact.folder / LOGPROBS)
    save_model(model, data.tokenizer, artefact.folder)
    both = (*data.train, *data.held_out)
    cut = sum(pair.chosen_cut + pair.rejected_cut > 0 for pair in both)
    artefact.about.update(weights_sha256=weights_hash(model), pairs=len(both), cut_responses=cut)


def score_part(
    settings: Settings, data: Data, model: Any, part: str, first: int | None = None, name: str = ""
) -> PairScores:
    """`evaluation.score_pairs` of the "train" or "held_out" pairs (the first ones), in batches that fit into memory.

    Held-out pairs are scored in float32, training pairs in the precision of the training that reads their scores.
    """
    pairs: list[EncodedPair] = getattr(data, part)[:first]
    scorer, compute, size = scorer_of(settings, data, model, part), compute_of(settings), 16
    if part == "held_out":
        compute = replace(compute, precision="fp32")
    while True:
        try:
            return score_pairs(model, pairs, scorer, compute, batch_size=size, name=name)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            size = halved(min(size, len(pairs)), f"scoring {part} pairs")
        free_memory(compute)


_FAST: dict[tuple[object, ...], FastScorer] = {}  # of the latest frozen blocks


def scorer_of(settings: Settings, data: Data, model: Any, part: str) -> Scorer:
    """Where log-probabilities of the "train" or "held_out" pairs come from, for models with this one's frozen blocks.

    The fast path, which all trainings of this process share: what it keeps of the frozen blocks serves reference, SFT,
    DPO at every β, and their evaluation; on a CPU it lies in the run's folder, for the next process too. Where the fast
    path does not apply, a line says so once, and it is the plain one.
    """
    pairs: Sequence[EncodedPair] = getattr(data, part)
    if not settings.freeze_embeddings or not is_known(model):
        _say_plain("the embeddings train" if is_known(model) else f"model type {model.config.model_type}")
        return PlainScorer(pairs, data.pad_id)
    # what they compute is in no weight alone: RoPE's base, the norms' epsilon
    of_saving = ("_name_or_path", "architectures")  # what `save_model` changes
    configuration = {key: value for key, value in model.config.to_dict().items() if key not in of_saving}
    frozen = weights_hash(frozen_part(model, settings.freeze_layers)), json_hash(configuration)
    lengths = settings.max_length, settings.max_prompt_length
    same = (frozen, data.sha256, lengths, settings.freeze_layers, settings.trunk_gb, compute_of(settings))
    if (same, part) not in _FAST:
        for key in [key for key in _FAST if key[0] != same]:
            del _FAST[key]
        budget, file = settings.trunk_gb * 1e9, _frozen_file(settings, part, [same, data.tokenizer_sha256])
        _FAST[same, part] = FastScorer(model, pairs, settings.freeze_layers, budget=budget, file=file)
    return _FAST[same, part]


def _frozen_file(settings: Settings, part: str, decides: object) -> Path:
    """The file for the frozen blocks' output, named by what decides it; one that was made from something else goes."""
    folder = settings.run_dir / FROZEN
    file = folder / f"{part}-{json_hash([FORMAT, torch.__version__, repr(decides)])[:16]}.rows"
    for other in folder.glob(f"{part}-*.rows"):
        if other != file:
            with suppress(OSError):  # Windows keeps a file that another process reads
                other.unlink()
    return file


@cache
def _say_plain(why: str) -> None:
    if processes.is_main():
        print(one_line(f"{why}: the plain path is used, which is slower and gives the same numbers"))


def _curve(settings: Settings, data: Data, start: ModelArtefact, row: CurveRow, last: int) -> Evaluate | None:
    """What is measured along a training: some held-out pairs, and samples with their KL to the start."""
    if not processes.is_main():
        return None
    reference = start.load(compute_of(settings))
    prompts = prompts_to_sample(settings, data.pairs)[: settings.curve_prompts]
    # in the same batches as the policy's, so that equal models tie exactly
    start_scores = score_part(settings, data, reference, "held_out", CURVE_PAIRS)

    def _evaluate(model: Any, step: int) -> MetricsRow:
        scores = score_part(settings, data, model, "held_out", CURVE_PAIRS)
        held_out = {"pairs": len(start_scores.chosen), **row(scores, start_scores)}
        # both ends have their samples measured apart, on all prompts: the reference's, and the trained model's
        if step in (0, last):
            return held_out
        return held_out | sample_and_measure(settings, data.tokenizer, model, reference, prompts).metrics

    return _evaluate
