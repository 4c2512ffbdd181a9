"""The steps of the course, one function each: every step loads its artefact, or makes it and all it needs.

    get_data → get_reference → get_sft, get_dpo, get_sweep → get_evaluation → get_generations → get_final_model

An artefact is a folder under `settings.run_dir` with a manifest of what it was made from (`runs`). It is used
again while that is unchanged and its files are undamaged; otherwise it is set aside (renamed, nothing is lost)
and made anew, and a line says why. Notebooks and the command line call the same functions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import mini
from .checkpoints import json_hash
from .errors import SettingsError
from .evaluation import (
    Evaluation,
    PairScores,
    mean_and_error,
    measure_kl,
    preference_metrics,
    score_pairs,
    text_measures,
)
from .generation import Response, sample
from .hh import Dropped, Pair, single_turn
from .models import freeze, load_model, load_tokenizer, model_commit, model_identity, save_model, weights_hash
from .runs import LOGPROBS, METRICS, Stage, artefact, compute_of, open_stage, read_jsonl, write_jsonl
from .settings import EMBEDDED, Settings
from .sources import PairData, data_identity, load_pairs
from .tokens import EncodedPair, encode_pair
from .training import DPOObjective, MetricsRow, Objective, TrainPlan, sft_objective, train

CURVE_PAIRS = 160  # held-out pairs behind each point of a training curve; final numbers use all of them
HOT_FACTOR = 10  # learning rate of the run that over-optimises on purpose (notebook 6), in those of the main run
HOT_PAIRS = 1200  # training pairs of that run: enough to wreck it
FINAL_MODEL = "dpo_gpt2_model_final"
STUDY_PROMPTS = (
    "What are some fun things to do in Paris?",
    "How can I learn to code for free?",
    "What is the meaning of life?",
)
WORLD_PROMPTS = (
    "How can I grow roses?",
    "Can you help me make new friends?",
    "What is a good way to wake up early?",
    "Do you have any advice on making pizza?",
    "I want to adopt a cat. Where do I start?",
)


@dataclass(frozen=True)
class Data:
    """Pairs as text and as token ids, in the same order, with the tokenizer that made them."""

    pairs: PairData
    train: list[EncodedPair]
    held_out: list[EncodedPair]
    tokenizer: Any
    sha256: str

    @property
    def pad_id(self) -> int:
        """The id that fills a batch up: end-of-text, masked by position."""
        return int(self.tokenizer.eos_token_id)


def get_data(settings: Settings) -> Data:
    """Step 1: the pairs, read, checked, split and tokenised. Artefact: data/."""
    made_from = {
        "dataset": data_identity(settings),
        **{k: getattr(settings, k) for k in ("max_pairs", "held_out_pairs", "max_dropped", "seed")},
    }

    def _make(folder: Path) -> dict[str, Any]:
        found = load_pairs(settings)
        for part, pairs in (("train", found.train), ("held_out", found.held_out)):
            write_jsonl(folder / f"{part}.jsonl", [asdict(pair) for pair in pairs])
        write_jsonl(folder / "dropped.jsonl", [asdict(row) for row in found.dropped])
        return {"source": found.source}

    folder = artefact(settings, "data", made_from, _make)
    return _read_data(settings, folder, json_hash(open_stage("data", folder).manifest["files"]))


@lru_cache(maxsize=2)
def _read_data(settings: Settings, folder: Path, sha256: str) -> Data:
    """Read and tokenise the pairs of a data artefact; kept, since every step asks for them."""
    train_pairs, held_out = (
        [Pair(**row) for row in read_jsonl(folder / f"{part}.jsonl")] for part in ("train", "held_out")
    )
    dropped = [Dropped(**row) for row in read_jsonl(folder / "dropped.jsonl")]
    pairs = PairData(train_pairs, held_out, dropped, open_stage("data", folder).manifest["about"]["source"])
    tokenizer = load_tokenizer(settings)

    def encode(part: Sequence[Pair]) -> list[EncodedPair]:
        lengths = {"max_length": settings.max_length, "max_prompt_length": settings.max_prompt_length}
        return [encode_pair(tokenizer, pair, **lengths) for pair in part]

    return Data(pairs, encode(pairs.train), encode(pairs.held_out), tokenizer, sha256)


def _save_stage(
    folder: Path, settings: Settings, data: Data, model: Any, metrics: list[MetricsRow], *, is_reference: bool
) -> dict[str, Any]:
    """Save a model with its metrics and its log-probabilities of the held-out (for π_ref also training) pairs."""
    compute = compute_of(settings)
    write_jsonl(folder / METRICS, metrics)
    parts = {"held_out": data.held_out} | ({"train": data.train} if is_reference else {})
    logprobs: dict[str, torch.Tensor] = {}
    for part, pairs in parts.items():
        scores = score_pairs(model, pairs, compute, pad_id=data.pad_id, name=f"scoring {part} pairs")
        logprobs |= {f"{part}_chosen": scores.chosen, f"{part}_rejected": scores.rejected}
    save_file(logprobs, folder / LOGPROBS)
    save_model(model, data.tokenizer, folder)
    return {"weights_sha256": weights_hash(model)}


def get_base(settings: Settings) -> Stage:
    """The plain model, before any training, with its log-probabilities. Artefact: reference/."""
    data = get_data(settings)
    made_from = {
        "model": model_identity(settings),
        "data": data.sha256,
        **{k: getattr(settings, k) for k in ("max_length", "max_prompt_length")},
    }

    def _make(folder: Path) -> dict[str, Any]:
        model = load_model(settings).to(compute_of(settings).device)
        facts = _save_stage(folder, settings, data, model, [], is_reference=settings.init_from == "base")
        return facts | {"model_commit": model_commit(settings)}

    made_from["scores_training_pairs"] = settings.init_from == "base"
    return open_stage("reference", artefact(settings, "reference", made_from, _make))


def get_reference(settings: Settings) -> Stage:
    """Step 2: π_ref, from which the policy starts: the plain model, or SFT with init_from="sft"."""
    return get_base(settings) if settings.init_from == "base" else get_sft(settings)


def _train_stage(
    settings: Settings, name: str, start: Stage, objective: Objective, plan: TrainPlan, evaluate: Any, **made_from: Any
) -> Stage:
    """Train a copy of `start` with the first blocks frozen, and store it as artefact `name`."""
    data = get_data(settings)
    made_from |= {
        "start": start.weights_sha256,
        "data": data.sha256,
        "plan": asdict(plan),
        **{k: getattr(settings, k) for k in ("max_length", "max_prompt_length", "freeze_layers", "freeze_embeddings")},
    }

    def _make(folder: Path) -> dict[str, Any]:
        compute = compute_of(settings)
        model = start.load(compute)
        freeze(model, settings.freeze_layers, settings.freeze_embeddings)
        rows = train(
            model, data.train[: made_from.get("pairs")], objective, plan, compute, pad_id=data.pad_id, name=name,
            evaluate=(lambda: evaluate(model)) if evaluate else None, evaluations=settings.curve_points,
        )  # fmt: skip
        is_reference = name == "sft" and settings.init_from == "sft"
        return _save_stage(folder, settings, data, model, rows, is_reference=is_reference)

    return open_stage(name, artefact(settings, name, made_from, _make))


def _plan(settings: Settings, epochs: int, learning_rate: float) -> TrainPlan:
    same = ("batch_size", "micro_batch_size", "optimizer", "warmup_steps", "schedule", "max_grad_norm", "seed")
    return TrainPlan(epochs=epochs, learning_rate=learning_rate, **{k: getattr(settings, k) for k in same})


def get_sft(settings: Settings) -> Stage:
    """Step 3: the plain model fine-tuned on the chosen responses. Artefact: sft/."""
    data, base = get_data(settings), get_base(settings)
    curve = data.held_out[:CURVE_PAIRS]
    tokens = torch.tensor([len(pair.chosen) for pair in curve])

    def evaluate(model: Any) -> MetricsRow:
        scores = score_pairs(model, curve, compute_of(settings), pad_id=data.pad_id)
        loss, error = mean_and_error(-scores.chosen / tokens)
        return {"loss": loss, "loss_se": error}

    plan = _plan(settings, settings.sft_epochs, settings.sft_learning_rate)
    serves = {"is_reference": settings.init_from == "sft"}
    return _train_stage(settings, "sft", base, sft_objective, plan, evaluate, **serves)


def get_dpo(settings: Settings, beta: float | None = None) -> Stage:
    """Step 5: the policy trained with DPO at `beta`. Artefact: dpo/, for other β than the settings' sweep/beta-<β>/."""
    beta = settings.beta if beta is None else beta
    if beta != settings.beta:
        return _train_dpo(settings, f"sweep/beta-{beta:g}", beta, settings.learning_rate)
    data, held_out = get_data(settings), get_reference(settings).scores("held_out")
    reference = PairScores(held_out.chosen[:CURVE_PAIRS], held_out.rejected[:CURVE_PAIRS])

    def evaluate(model: Any) -> MetricsRow:
        scores = score_pairs(model, data.held_out[:CURVE_PAIRS], compute_of(settings), pad_id=data.pad_id)
        return preference_metrics(scores, reference, beta)

    return _train_dpo(settings, "dpo", beta, settings.learning_rate, evaluate)


def get_hot_dpo(settings: Settings) -> Stage:
    """DPO that over-optimises on purpose: HOT_FACTOR times the rate, on HOT_PAIRS pairs. Artefact: hot/."""
    return _train_dpo(settings, "hot", settings.beta, HOT_FACTOR * settings.learning_rate, pairs=HOT_PAIRS)


def _train_dpo(
    settings: Settings, name: str, beta: float, learning_rate: float, evaluate: Any = None, pairs: int | None = None
) -> Stage:
    reference = get_reference(settings)
    scores = reference.scores("train")
    objective = DPOObjective(scores.chosen, scores.rejected, beta)
    plan = _plan(settings, settings.epochs, learning_rate)
    return _train_stage(settings, name, reference, objective, plan, evaluate, beta=beta, pairs=pairs)


def get_sweep(settings: Settings) -> dict[float, Stage]:
    """Step 6: one DPO policy for each β of the sweep, all from the same reference."""
    return {beta: get_dpo(settings, beta) for beta in settings.betas}


def _beta_of(settings: Settings, stage: Stage) -> float:
    return float(stage.manifest["made_from"].get("beta", settings.beta))


def evaluation_prompts(settings: Settings) -> list[str]:
    """Prompts on which responses are sampled: of the embedded world's held-out topics, or of held-out pairs."""
    if settings.dataset == EMBEDDED:
        return mini.sampling_prompts(settings.prompts)
    unique = dict.fromkeys(pair.prompt for pair in get_data(settings).pairs.held_out)
    return list(unique)[: settings.prompts]


def get_evaluation(settings: Settings, stage: Stage) -> Evaluation:
    """Measure a model: rewards on all held-out pairs, KL to π_ref and text measures on its own samples.

    Artefact: evaluation/<name>/. metrics: those of `preference_metrics`, `measure_kl` and `text_measures`; in
    the embedded world also true_reward of the samples (mean, _se, _sd). Rewards use the model's own β (for
    reference and SFT the settings' β).
    """
    data, reference = get_data(settings), get_reference(settings)
    name, beta = stage.name.replace("sweep/", ""), _beta_of(settings, stage)
    made_from = {
        "model": stage.weights_sha256,
        "reference": reference.weights_sha256,
        "data": data.sha256,
        "beta": beta,
        **{k: getattr(settings, k) for k in ("prompts", "max_new_tokens", "max_prompt_length", "seed")},
    }

    def _make(folder: Path) -> dict[str, Any]:
        compute = compute_of(settings)
        policy, base = stage.load(compute), reference.load(compute)
        lengths = {"max_prompt_length": settings.max_prompt_length}
        responses = sample(
            policy, data.tokenizer, evaluation_prompts(settings), max_new_tokens=settings.max_new_tokens,
            compute=compute, seed=settings.seed, name=f"sampling from {name}", **lengths,
        )  # fmt: skip
        metrics = preference_metrics(stage.scores("held_out"), reference.scores("held_out"), beta)
        metrics |= measure_kl(policy, base, data.tokenizer, responses, compute, **lengths)
        metrics |= text_measures(responses)
        if settings.dataset == EMBEDDED:
            rewards = torch.tensor([mini.true_reward(r.prompt, r.text) for r in responses], dtype=torch.float64)
            mean, error = mean_and_error(rewards)
            metrics |= {"true_reward": mean, "true_reward_se": error, "true_reward_sd": rewards.std().item()}
        write_jsonl(folder / "responses.jsonl", [asdict(r) for r in responses])
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        return {}

    folder = artefact(settings, f"evaluation/{name}", made_from, _make)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    responses = [Response(**row) for row in read_jsonl(folder / "responses.jsonl")]
    return Evaluation(name, beta, metrics, responses)


def get_comparison(settings: Settings) -> dict[str, Evaluation]:
    """The three models of the course, measured: reference, sft, dpo."""
    return {s.name: get_evaluation(settings, s) for s in (get_base(settings), get_sft(settings), get_dpo(settings))}


def get_sweep_evaluations(settings: Settings) -> dict[float, Evaluation]:
    """Every β of the sweep, measured."""
    return {beta: get_evaluation(settings, stage) for beta, stage in get_sweep(settings).items()}


def get_generations(settings: Settings) -> dict[str, list[Response]]:
    """Step 7: the study's and the embedded world's prompts through the three models, sampled and greedy.

    Artefact: generations/. Keys: "<model>" (temperature 1) and "<model>/greedy".
    """
    data = get_data(settings)
    stages = (get_base(settings), get_sft(settings), get_dpo(settings))
    prompts = [single_turn(question) for question in (*STUDY_PROMPTS, *WORLD_PROMPTS)]
    made_from = {
        "models": {stage.name: stage.weights_sha256 for stage in stages},
        "prompts": prompts,
        **{k: getattr(settings, k) for k in ("max_new_tokens", "seed")},
    }

    def _make(folder: Path) -> dict[str, Any]:
        compute = compute_of(settings)
        out: dict[str, list[dict[str, Any]]] = {}
        for stage in stages:
            model = stage.load(compute)
            for key, temperature in ((stage.name, 1.0), (f"{stage.name}/greedy", 0.0)):
                responses = sample(
                    model, data.tokenizer, prompts, max_new_tokens=settings.max_new_tokens, compute=compute,
                    seed=settings.seed, temperature=temperature, name=f"generating: {key}",
                )  # fmt: skip
                out[key] = [asdict(response) for response in responses]
        (folder / "generations.json").write_text(json.dumps(out, indent=1), encoding="utf-8")
        return {}

    folder = artefact(settings, "generations", made_from, _make)
    found = json.loads((folder / "generations.json").read_text(encoding="utf-8"))
    return {key: [Response(**row) for row in rows] for key, rows in found.items()}


def get_final_model(settings: Settings) -> Path:
    """The DPO model in a folder of its own that `GPT2LMHeadModel.from_pretrained` opens, with its tokenizer."""
    stage, data = get_dpo(settings), get_data(settings)
    made_from = {"model": stage.weights_sha256}

    def _make(folder: Path) -> dict[str, Any]:
        save_model(stage.load(), data.tokenizer, folder)
        return {"weights_sha256": stage.weights_sha256}

    return artefact(settings, FINAL_MODEL, made_from, _make)


def require_embedded(settings: Settings) -> None:
    """SettingsError unless the data set is the embedded world, whose true reward is known."""
    if settings.dataset != EMBEDDED:
        raise SettingsError(f"dataset is {settings.dataset!r}, but a true reward is known only of {EMBEDDED!r}")
