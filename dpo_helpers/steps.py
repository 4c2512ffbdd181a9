"""The steps of the course, one function each: every step loads its artefact, or makes it and all it needs.

    get_data → get_reference → get_sft, get_dpo, get_sweep → get_evaluation → get_generations → get_final_model

An artefact is a folder under `settings.run_dir` with a manifest of what it was made from (`runs`). It is used
again while that is unchanged and its files are undamaged; otherwise it is set aside (renamed, nothing is lost)
and made anew, and a line says why. Notebooks and the command line call the same functions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import mini
from .card import model_card
from .checkpoints import json_hash, write_text
from .errors import DataError, SettingsError
from .evaluation import Evaluation, PairScores, longer_wins, pair_values, preference_metrics
from .generation import Response, sample
from .hh import Finding, Pair, RowsError, single_turn
from .losses import sft_loss
from .models import load_model, load_tokenizer, model_commit, model_identity, save_model, tokenizer_hash
from .runs import Stage, artefact, compute_of, open_stage, read_jsonl, write_jsonl
from .settings import EMBEDDED, Settings
from .sources import PairData, data_identity, fit_pairs, load_pairs
from .stages import CurveRow, Data, plan_of, prompts_to_sample, sample_and_measure, save_stage, train_stage
from .tokens import EncodedPair, encode_pairs
from .training import DPOObjective, MetricsRow, sft_objective
from .uncertainty import Interval, mean_and_error, paired_difference

HOT_FACTOR = 10  # learning rate of the run that over-optimises on purpose (notebook 6), in those of the main run
HOT_PAIRS = 1200  # training pairs of that run: enough to wreck it
PARTS = ("train", "held_out")
REJECTED = "rejected.jsonl"
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


def get_data(settings: Settings) -> Data:
    """Step 1: the pairs, read, checked, split and tokenised. Artefact: data/."""
    tokenizer, tokenizer_sha256 = _tokenizer(settings)
    lengths = {"max_length": settings.max_length, "max_prompt_length": settings.max_prompt_length}
    made_from = {
        "dataset": data_identity(settings),
        "tokenizer": tokenizer_sha256,
        **{k: getattr(settings, k) for k in ("max_pairs", "held_out_pairs", "allow_dropped", "seed")},
        **lengths,
    }

    list_of_all = settings.run_dir / REJECTED  # of a data set that is refused; of one that is not, data/ holds it

    def _make(folder: Path) -> dict[str, Any]:
        list_of_all.unlink(missing_ok=True)
        try:
            found = fit_pairs(load_pairs(settings), tokenizer, allow_dropped=settings.allow_dropped, **lengths)
        except RowsError as error:
            write_text(list_of_all, "".join(json.dumps(asdict(row)) + "\n" for row in error.findings))
            raise DataError(f"{error}; all of them are listed in {list_of_all}") from error
        for part in PARTS:
            write_jsonl(folder / f"{part}.jsonl", [asdict(pair) for pair in getattr(found, part)])
        write_jsonl(folder / REJECTED, [asdict(row) for row in found.findings])
        return {"source": found.source}

    folder = artefact(settings, "data", made_from, _make)
    files = open_stage("data", folder).manifest["files"]
    sha256 = json_hash({part: files[f"{part}.jsonl"] for part in PARTS})
    return _read_data(settings, folder, (sha256, files[REJECTED], tokenizer_sha256))


@lru_cache(maxsize=4)
def _tokenizer(settings: Settings) -> tuple[Any, str]:
    """The settings' tokenizer and its hash; kept, since every step asks for them."""
    tokenizer = load_tokenizer(settings)
    return tokenizer, tokenizer_hash(tokenizer)


@lru_cache(maxsize=2)
def _read_data(settings: Settings, folder: Path, hashes: tuple[str, str, str]) -> Data:
    """Read and tokenise a data artefact; kept while the hashes of its pairs, findings and tokenizer are these."""
    train_pairs, held_out = ([Pair(**row) for row in read_jsonl(folder / f"{part}.jsonl")] for part in PARTS)
    findings = [Finding(**row) for row in read_jsonl(folder / REJECTED)]
    pairs = PairData(train_pairs, held_out, findings, open_stage("data", folder).manifest["about"]["source"])
    tokenizer, tokenizer_sha256 = _tokenizer(settings)

    def encode(part: Sequence[Pair]) -> list[EncodedPair]:
        lengths = {"max_length": settings.max_length, "max_prompt_length": settings.max_prompt_length}
        return list(encode_pairs(tokenizer, part, **lengths))

    return Data(pairs, encode(pairs.train), encode(pairs.held_out), tokenizer, hashes[0], tokenizer_sha256)


def get_base(settings: Settings) -> Stage:
    """The plain model, before any training, with its log-probabilities. Artefact: reference/."""
    data = get_data(settings)
    made_from = {
        "model": model_identity(settings),
        "data": data.sha256,
        "tokenizer": data.tokenizer_sha256,
        **{k: getattr(settings, k) for k in ("max_length", "max_prompt_length")},
    }

    def _make(folder: Path) -> dict[str, Any]:
        model = load_model(settings).to(compute_of(settings).device)
        facts = save_stage(folder, settings, data, model, [], is_reference=settings.init_from == "base")
        return facts | {"model_commit": model_commit(settings)}

    made_from["scores_training_pairs"] = settings.init_from == "base"
    return open_stage("reference", artefact(settings, "reference", made_from, _make))


def get_reference(settings: Settings) -> Stage:
    """Step 2: π_ref, from which the policy starts: the plain model, or SFT with init_from="sft"."""
    return get_base(settings) if settings.init_from == "base" else get_sft(settings)


def get_sft(settings: Settings) -> Stage:
    """Step 3: the plain model fine-tuned on the chosen responses. Artefact: sft/."""
    serves = {"is_reference": settings.init_from == "sft"}
    return _train_sft(settings, "sft", settings.sft_epochs, settings.sft_learning_rate, _sft_row, **serves)


def _sft_row(scores: PairScores, start: PairScores) -> MetricsRow:
    loss, error = mean_and_error(sft_loss(scores.chosen, scores.chosen_tokens))
    return {"loss": loss, "loss_se": error}


def _train_sft(
    settings: Settings, name: str, epochs: int, rate: float, curve: CurveRow | None, **made_from: Any
) -> Stage:
    plan = plan_of(settings, epochs, rate)
    return train_stage(settings, get_data(settings), name, get_base(settings), sft_objective, plan, curve, **made_from)


def get_dpo(settings: Settings, beta: float | None = None) -> Stage:
    """Step 5: the policy trained with DPO at `beta`. Artefact: dpo/, for other β than the settings' sweep/beta-<β>/."""
    beta = settings.beta if beta is None else beta

    def _row(scores: PairScores, start: PairScores) -> MetricsRow:
        return preference_metrics(scores, start, beta, settings.loss_type, settings.label_smoothing)

    is_main = beta == settings.beta
    name = "dpo" if is_main else f"sweep/beta-{beta:g}"
    return _train_dpo(settings, name, beta, settings.learning_rate, _row)


def get_hot_sft(settings: Settings) -> Stage:
    """SFT driven to collapse on purpose: HOT_FACTOR times the rate, on HOT_PAIRS pairs. Artefact: hot-sft/."""
    rate = HOT_FACTOR * settings.sft_learning_rate
    return _train_sft(settings, "hot-sft", settings.sft_epochs, rate, None, pairs=HOT_PAIRS)


def get_hot_dpo(settings: Settings) -> Stage:
    """DPO that over-optimises on purpose: HOT_FACTOR times the rate, on HOT_PAIRS pairs. Artefact: hot-dpo/."""
    rate = HOT_FACTOR * settings.learning_rate
    return _train_dpo(settings, "hot-dpo", settings.beta, rate, None, pairs=HOT_PAIRS)


def _train_dpo(
    settings: Settings,
    name: str,
    beta: float,
    rate: float,
    curve: CurveRow | None,
    pairs: int | None = None,
) -> Stage:
    reference = get_reference(settings)
    scores = reference.scores("train")
    loss = {"loss_type": settings.loss_type, "label_smoothing": settings.label_smoothing}
    objective = DPOObjective(scores.chosen, scores.rejected, beta, **loss)  # type: ignore[arg-type]
    plan = plan_of(settings, settings.epochs, rate)
    data, made_from = get_data(settings), {"beta": beta, "pairs": pairs, **loss}
    return train_stage(settings, data, name, reference, objective, plan, curve, **made_from)


def get_sweep(settings: Settings) -> dict[float, Stage]:
    """Step 6: one DPO policy for each β of the sweep, all from the same reference."""
    return {beta: get_dpo(settings, beta) for beta in settings.betas}


def accuracy_baselines(settings: Settings) -> dict[str, float]:
    """What an accuracy on the held-out pairs is to be compared with: "longer wins", and "best possible" if known.

    best possible: expected of a judge who knows the true reward; only the embedded world has one.
    """
    data, scores = get_data(settings), get_reference(settings).scores("held_out")
    accuracy, ties = longer_wins(scores)
    baselines = {"longer wins": accuracy + ties / 2}  # a tie is decided by a coin
    if settings.dataset == EMBEDDED:
        pairs = data.pairs.held_out
        gaps = [mini.true_reward(p.prompt, p.chosen) - mini.true_reward(p.prompt, p.rejected) for p in pairs]
        baselines["best possible"] = mini.best_possible_accuracy(gaps)
    return baselines


def _beta_of(settings: Settings, stage: Stage) -> float:
    return float(stage.manifest["made_from"].get("beta", settings.beta))


def evaluation_prompts(settings: Settings) -> list[str]:
    """Prompts on which responses are sampled: of the embedded world's held-out topics, or of held-out pairs."""
    return prompts_to_sample(settings, get_data(settings))


def get_evaluation(settings: Settings, stage: Stage) -> Evaluation:
    """Measure a model: rewards on all held-out pairs, KL to π_ref and text measures on its own samples.

    Artefact: evaluation/<name>/. metrics: those of `preference_metrics` and `measure_samples`. Rewards use the
    model's own β (for reference and SFT the settings' β).
    """
    data, reference = get_data(settings), get_reference(settings)
    name, beta = stage.name.replace("sweep/", ""), _beta_of(settings, stage)
    made_from = {
        "model": stage.weights_sha256,
        "reference": reference.weights_sha256,
        "data": data.sha256,
        "tokenizer": data.tokenizer_sha256,
        "beta": beta,
        "loss": [settings.loss_type, settings.label_smoothing],
        **{k: getattr(settings, k) for k in ("prompts", "max_new_tokens", "max_length", "max_prompt_length", "seed")},
    }

    def _make(folder: Path) -> dict[str, Any]:
        compute = compute_of(settings)
        policy, base = stage.load(compute), reference.load(compute)
        loss = settings.loss_type, settings.label_smoothing
        metrics = preference_metrics(stage.scores("held_out"), reference.scores("held_out"), beta, *loss)
        prompts = evaluation_prompts(settings)
        responses, sampled = sample_and_measure(settings, data, policy, base, prompts, f"sampling from {name}")
        write_jsonl(folder / "responses.jsonl", [asdict(r) for r in responses])
        (folder / "metrics.json").write_text(json.dumps(metrics | sampled, indent=1), encoding="utf-8")
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


def get_frontier(settings: Settings) -> dict[str, list[MetricsRow]]:
    """Points on the way of each training, in order: SFT, DPO at every β (the frontier's too), and the hot run.

    A point is a row with step (updates done), kl, true_reward where it is known, reward_margin of DPO, each with _se:
    on `curve_prompts` prompts on the way, at the end on all of them, as `get_evaluation` has it.
    """
    betas = sorted({*settings.betas, *settings.frontier_betas})
    stages = {"sft": get_sft(settings)} | {f"β = {beta:g}": get_dpo(settings, beta) for beta in betas}
    return {name: _points(settings, stage) for name, stage in (stages | {"hot": get_hot_dpo(settings)}).items()}


def _points(settings: Settings, stage: Stage) -> list[MetricsRow]:
    updates = max(row["step"] for row in stage.metrics)
    on_the_way = [row for row in stage.metrics if "kl" in row and row["step"] < updates]
    return [*on_the_way, {"step": updates, **get_evaluation(settings, stage).metrics}]


def get_values(settings: Settings, stage: Stage) -> dict[str, torch.Tensor]:
    """What the means of `get_evaluation` are means of: of each held-out pair, and of each sampled response.

    Keys as in metrics: loss … chosen_logratio [held-out pairs], true_reward [prompts] in the embedded world.
    """
    held_out = get_reference(settings).scores("held_out")
    loss = settings.loss_type, settings.label_smoothing
    values = pair_values(stage.scores("held_out"), held_out, _beta_of(settings, stage), *loss)
    if settings.dataset == EMBEDDED:
        responses = get_evaluation(settings, stage).responses
        values["true_reward"] = torch.tensor([mini.true_reward(r.prompt, r.text) for r in responses])
    return values


def get_differences(settings: Settings) -> dict[str, Interval]:
    """Differences between the three models with 95 % bootstrap intervals, paired: by held-out pair, or by prompt.

    Keys such as "reward_accuracy: dpo - sft"; true_reward only in the embedded world. The reference has no accuracy of
    its own: all its margins are ties.
    """
    stages = {"reference": get_base(settings), "sft": get_sft(settings), "dpo": get_dpo(settings)}
    values = {name: get_values(settings, stage) for name, stage in stages.items()}
    wanted = [("reward_accuracy", "dpo", "sft"), ("reward_margin", "dpo", "sft")]
    if settings.dataset == EMBEDDED:
        wanted += [("true_reward", *pair) for pair in (("dpo", "reference"), ("sft", "reference"), ("dpo", "sft"))]
    return {
        f"{metric}: {first} - {second}": paired_difference(values[first][metric], values[second][metric])
        for metric, first, second in wanted
    }


def get_generations(settings: Settings) -> dict[str, list[Response]]:
    """Step 7: the study's and the embedded world's prompts through the three models, sampled and greedy.

    Artefact: generations/. Keys: "<model>" (temperature 1) and "<model>/greedy".
    """
    data = get_data(settings)
    stages = (get_base(settings), get_sft(settings), get_dpo(settings))
    prompts = [single_turn(question) for question in (*STUDY_PROMPTS, *WORLD_PROMPTS)]
    made_from = {
        "tokenizer": data.tokenizer_sha256,
        "models": {stage.name: stage.weights_sha256 for stage in stages},
        "prompts": prompts,
        **{k: getattr(settings, k) for k in ("max_new_tokens", "max_prompt_length", "seed")},
    }

    def _make(folder: Path) -> dict[str, Any]:
        compute = compute_of(settings)
        out: dict[str, list[dict[str, Any]]] = {}
        for stage in stages:
            model = stage.load(compute)
            for key, temperature in ((stage.name, 1.0), (f"{stage.name}/greedy", 0.0)):
                responses = sample(
                    model, data.tokenizer, prompts, max_new_tokens=settings.max_new_tokens, compute=compute,
                    max_prompt_length=settings.max_prompt_length, seed=settings.seed, temperature=temperature,
                    name=f"generating: {key}",
                )  # fmt: skip
                out[key] = [asdict(response) for response in responses]
        (folder / "generations.json").write_text(json.dumps(out, indent=1), encoding="utf-8")
        return {}

    folder = artefact(settings, "generations", made_from, _make)
    found = json.loads((folder / "generations.json").read_text(encoding="utf-8"))
    return {key: [Response(**row) for row in rows] for key, rows in found.items()}


def get_final_model(settings: Settings) -> Path:
    """The DPO model in a folder that `GPT2LMHeadModel.from_pretrained` opens, with tokenizer and model card."""
    stage, data, comparison = get_dpo(settings), get_data(settings), get_comparison(settings)
    tokenizer = {"tokenizer": data.tokenizer_sha256}
    made_from = tokenizer | {
        "model": stage.weights_sha256,
        "measured": {name: e.metrics for name, e in comparison.items()},
    }

    def _make(folder: Path) -> dict[str, Any]:
        save_model(stage.load(), data.tokenizer, folder)
        card = model_card(settings, comparison, data.pairs.source, stage.weights_sha256)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return {"weights_sha256": stage.weights_sha256}

    return artefact(settings, FINAL_MODEL, made_from, _make)


def require_embedded(settings: Settings) -> None:
    """SettingsError unless the data set is the embedded world, whose true reward is known."""
    if settings.dataset != EMBEDDED:
        raise SettingsError(f"dataset is {settings.dataset!r}, but a true reward is known only of {EMBEDDED!r}")
