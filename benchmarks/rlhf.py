"""RLHF beside DPO in the embedded world, where the true reward is known: `python -m benchmarks.rlhf`, an hour.

Reward models, RLOO, best-of-n and DPO on the policy's own samples, all from the same reference and the same 4,000
pairs, with what each cost. Each part is written when it is done; started again, the script goes on with the next one.
At the end the numbers that notebook c shows are written into the package (`dpo_helpers/show/rlhf.json`).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.dpo_vs_trl import RESULTS, _machine
from dpo_helpers.evaluation import preference_metrics, score_pairs
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.models import freeze
from dpo_helpers.run.gradients import InParts
from dpo_helpers.run.loading import load_model
from dpo_helpers.run.machine import compute_of, peak_memory_gb
from dpo_helpers.run.measures import accuracy_baselines, best_of, calibration
from dpo_helpers.run.rlhf import BradleyTerry, OnPolicy, RewardModel, RewardScorer, Rloo, Score, on_policy_dpo
from dpo_helpers.run.sampled import prompts_to_sample, sample_and_measure, true_score
from dpo_helpers.run.stages import get_data, get_reference
from dpo_helpers.run.trained import plan_of, scorer_of
from dpo_helpers.run.watch import Points
from dpo_helpers.settings import load_settings
from dpo_helpers.show import rlhf as shown
from dpo_helpers.tokens import encode_prompts, epoch_order
from dpo_helpers.training import DPOObjective, TrainPlan, train
from dpo_helpers.uncertainty import mean_and_error

OUT = RESULTS / "rlhf.json"
REWARD_PAIRS = (4000, 500)  # of the reward models
DPO_BETAS = RLOO_BETAS = (0.1, 0.5, 1.0)
BETA = 0.5  # the main one, of the course and of the study
RATES = (5e-4, 1e-3, 2e-3)  # tried for RLOO
UPDATES, PROMPTS, SAMPLES = 160, 16, 4  # of RLOO: updates; prompts and samples per prompt of each
WARMUP = 4  # updates, of RLOO and of the short runs
ON_POLICY_ROUNDS, ON_POLICY_PROMPTS = 3, 960  # 320 pairs per round
LABELS = {"the world's labels": True, "the reward model's labels": False}  # and whether they have its noise
BEST_OF = (1, 2, 4, 8, 16)
CURVE_PROMPTS, EVERY, PUSH_EVERY = 80, 40, 20  # held-out prompts of each point; updates from one to the next
PUSH_UPDATES, PUSH_BETA = 100, 0.0  # of the run against the weak reward model
SEEDS, SEED_PROMPTS = 10, 80  # stability: short runs
SEED_UPDATES = {"DPO": 60, "RLOO": 20}
SETTINGS = {  # what has to be chosen for each method, beside those of the reward model where it needs one; not counted
    # is what all share: optimizer, warm-up, clipping, frozen blocks
    "DPO": ("β", "rate", "passes", "batch size", "longest pair"),
    "RLOO": ("β", "rate", "updates", "prompts per update", "samples per prompt", "longest response"),
    "best of n": ("n", "longest response"),
    "on-policy DPO": ("β", "rate", "rounds", "prompts per round", "batch size", "longest response"),
}
REWARD_SETTINGS = ("rate", "passes", "batch size", "longest pair")
EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)  # of the calibration's bins


class Bench:
    """What all parts share: data, reference, prompts, and the reward models once they are made."""

    def __init__(self) -> None:
        self.settings = load_settings("mini")
        self.compute, self.data = compute_of(self.settings), get_data(self.settings)
        self.tokenizer, self.eos = self.data.tokenizer, self.data.pad_id
        self.folder = self.settings.run_dir / "rlhf"
        self.held_out = prompts_to_sample(self.settings, self.data.pairs)
        self.true = true_score(self.tokenizer)
        self.tokens = 0  # sampled by the part that runs

    @cached_property
    def base(self) -> Any:
        """π_ref."""
        return load_model(self.settings).eval()

    def fresh(self) -> Any:
        """A model to train, from π_ref."""
        model = load_model(self.settings)
        freeze(model, self.settings.freeze_layers)
        return model

    def plan(self, **changes: Any) -> TrainPlan:
        """The course's plan for DPO: one pass, RMSprop, a warm-up, then a rate that falls to 0."""
        return replace(plan_of(self.settings, 1, self.settings.learning_rate), **changes)

    def fit(self, model: Any, *given: Any, watch: Any = None) -> list[dict[str, Any]]:
        """`training.train` with the gradient in parts, as the course's runs have it."""
        parts = InParts(
            self.settings.micro_batch_size, self.compute, [p for p in model.parameters() if p.requires_grad]
        )
        return train(model, *given, self.compute, gradient=parts, watch=watch)

    def reward(self, pairs: int) -> RewardModel:
        """The reward model of so many pairs, from the disk; trained again where only its results are left."""
        if not (self.folder / f"reward-{pairs}.safetensors").exists():
            self.train_reward(pairs)
        model = RewardModel(load_model(self.settings))
        model.load_state_dict(load_file(self.folder / f"reward-{pairs}.safetensors"))
        return model.eval()

    def score(self, pairs: int) -> Score:
        """What it says of responses."""
        return self.reward(pairs).score

    def sampler(self, score: Score, prompts: Sequence[list[int]]) -> OnPolicy:
        """Four samples per prompt."""
        return OnPolicy(prompts, self.base, score, self.eos, frozen=self.settings.freeze_layers, k=SAMPLES)

    def measure(self, policy: Any, count: int | None = None) -> dict[str, Any]:
        """True reward, KL and the reward models' scores of one response to each held-out prompt (the first ones)."""
        prompts = self.held_out[:count]
        found = sample_and_measure(self.settings, self.tokenizer, policy, self.base, prompts)
        keys = ("kl", "kl_se", "true_reward", "true_reward_se", "length", "looping", "ended")
        row: dict[str, Any] = {key: found.metrics[key] for key in keys if key in found.metrics}
        ids = encode_prompts(self.tokenizer, prompts, self.settings.max_prompt_length)
        for pairs in REWARD_PAIRS:
            scores = self.scores[pairs](ids, [r.ids for r in found.responses])
            row[f"score_{pairs}"], row[f"score_{pairs}_se"] = mean_and_error(scores)
        return row

    @cached_property
    def scores(self) -> dict[int, Score]:
        """Of both reward models."""
        return {pairs: self.score(pairs) for pairs in REWARD_PAIRS}

    # the parts

    def reference(self) -> dict[str, Any]:
        """π_ref, measured."""
        return {"metrics": self.measure(self.base), "baselines": accuracy_baselines(self.settings)}

    def train_reward(self, pairs: int) -> dict[str, Any]:
        """A reward model of the first pairs, its held-out accuracy and calibration."""
        model, part = RewardModel(self.fresh()), self.data.train[:pairs]
        started = time.process_time()
        rows = self.fit(model, part, RewardScorer(part, self.eos), BradleyTerry(), self.plan())
        spent = time.process_time() - started
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), self.folder / f"reward-{pairs}.safetensors")
        of_pairs = score_pairs(model, self.data.held_out, RewardScorer(self.data.held_out, self.eos), self.compute)
        margins = of_pairs.chosen - of_pairs.rejected
        accuracy, error = mean_and_error((margins > 0).float())
        return {
            "training_cpu_s": spent, "losses": [row["loss"] for row in rows],
            "accuracy": accuracy, "accuracy_se": error,
            "calibration": calibration(margins, EDGES),
        }  # fmt: skip

    def dpo(self, beta: float, seed: int = 0, updates: int | None = None, prompts: int | None = None) -> dict[str, Any]:
        """DPO on the data's pairs, with the frozen blocks' output and the reference's scores in its time.

        updates: of a short run, with a short warm-up, on pairs drawn by seed; without it one pass over all pairs.
        """
        model, plan = self.fresh(), self.plan(seed=seed)
        started = time.process_time()
        pairs: Sequence[Any] = self.data.train
        if updates:
            order = epoch_order(len(pairs), seed, 0)[: updates * plan.batch_size]
            pairs, plan = [pairs[i] for i in order], replace(plan, warmup_steps=WARMUP)
        scorer = FastScorer(model, pairs, self.settings.freeze_layers)
        reference = score_pairs(self.base, pairs, scorer, self.compute)
        rows = self.fit(model, pairs, scorer, DPOObjective(reference, beta), plan)
        spent = time.process_time() - started
        held_out = scorer_of(self.settings, self.data, model, "held_out")
        of_pairs = (score_pairs(m, self.data.held_out, held_out, self.compute) for m in (model, self.base))
        accuracy = preference_metrics(*of_pairs, beta)
        kept = {key: accuracy[key] for key in ("reward_accuracy", "reward_accuracy_se")}
        return {"training_cpu_s": spent, "updates": len(rows), **kept, "metrics": self.measure(model, prompts)}

    def rloo(
        self, beta: float, rate: float, updates: int, pairs: int = 4000, *, seed: int = 0, every: int = 0,
        prompts: int | None = None, schedule: str = "linear",
    ) -> dict[str, Any]:  # fmt: skip
        """RLOO against a reward model, from a short warm-up at a rate that falls to 0, as DPO's, or stays.

        prompts: those it is measured on.
        """
        model = self.fresh()
        order = epoch_order(len(self.data.train), seed, 0)[: updates * PROMPTS]
        part = [self.data.train[i] for i in order]
        sampler = self.sampler(self.scores[pairs], [pair.prompt for pair in part])
        plan = self.plan(
            learning_rate=rate, optimizer="adamw", schedule=schedule, warmup_steps=WARMUP, max_grad_norm=1.0,
            batch_size=PROMPTS, micro_batch_size=PROMPTS, epochs=1, seed=seed,
        )  # fmt: skip
        measuring = 0.0

        def evaluate(policy: Any, step: int) -> dict[str, Any]:
            nonlocal measuring
            began = time.process_time()
            point = self.measure(policy, CURVE_PROMPTS)
            measuring += time.process_time() - began
            return point

        watch = Points(evaluate, every) if every else None
        started = time.process_time()
        rows = train(model, part, sampler, Rloo(beta), plan, self.compute, watch=watch)
        spent = time.process_time() - started - measuring
        self.tokens += sampler.tokens
        keys = ("step", "score", "k1", "length", "grad_norm")
        trained = [{key: round(row[key], 4) for key in keys} for row in rows if row["split"] == "train"]
        return {
            "training_cpu_s": spent, "updates": len(trained), "rows": trained,
            "curve": [row for row in rows if row["split"] == "held_out"],
            "metrics": self.measure(model, prompts),
        }  # fmt: skip

    def best_of(self) -> dict[str, Any]:
        """The best of n by each reward model, and by the truth: 16 samples of the reference per held-out prompt."""
        ids, most = encode_prompts(self.tokenizer, self.held_out, self.settings.max_prompt_length), max(BEST_OF)
        sampler, pairs = self.sampler(self.true, ids), []
        judges = {f"score_{n}": self.scores[n] for n in REWARD_PAIRS} | {"true_reward": self.true}
        torch.manual_seed(self.settings.seed)
        started, spent = time.process_time(), 0.0
        for start in range(0, len(ids), 8):
            pairs += sampler.draw(self.base, ids[start : start + 8], most)
        self.tokens += sampler.tokens
        judged: dict[str, torch.Tensor] = {}
        for name, score in judges.items():  # the one that counts comes first
            judged[name] = replace(sampler, score=score).scores(pairs).view(len(ids), most)
            spent = spent or time.process_time() - started
        found: dict[str, Any] = {}
        for judge, scores in judged.items():
            for n in BEST_OF:
                row = found.setdefault(judge, {})[str(n)] = {}
                for name, values in judged.items():
                    row[name], row[f"{name}_se"] = mean_and_error(best_of(scores, values, n))
        return {"training_cpu_s": spent, "by": found}

    def on_policy(self, noisy_world: bool, beta: float = BETA) -> dict[str, Any]:
        """DPO on the policy's own samples, labelled by the world with its noise, or by the reward model without."""
        model = self.fresh()
        prompts = [pair.prompt for pair in self.data.train[:ON_POLICY_PROMPTS]]
        sampler = self.sampler(self.true if noisy_world else self.scores[REWARD_PAIRS[0]], prompts)
        started = time.process_time()
        rows = on_policy_dpo(
            model, sampler, beta, self.plan(), self.compute, rounds=ON_POLICY_ROUNDS, noisy=noisy_world
        )
        self.tokens += sampler.tokens
        spent = time.process_time() - started
        return {"training_cpu_s": spent, "updates": len(rows), "metrics": self.measure(model)}


def objective(part: dict[str, Any], beta: float) -> float:
    """What RLOO maximises, on held-out prompts: the reward model's score - β × KL."""
    return float(part["metrics"][f"score_{REWARD_PAIRS[0]}"] - beta * part["metrics"]["kl"])


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """What notebook c shows of the results: `show.rlhf.stored`. Costs are of the training, without its measurements."""
    parts, models = results["parts"], {n: results["parts"][f"reward model, {n} pairs"] for n in REWARD_PAIRS}
    strong, start = models[REWARD_PAIRS[0]], parts["reference"]["metrics"]
    main = parts[f"RLOO {BETA:g}, rate {results['rate']:g}"]
    methods, peaks = list[dict[str, Any]](), parts["peak memory"]["mb"]

    def add(family: str, name: str, short: str, metrics: dict[str, Any], part: dict[str, Any], seconds: float) -> None:
        paid = family in ("RLOO", "best of n") or "reward model" in name
        reward_s = strong["training_cpu_s"] if paid else 0.0
        peak = max(peaks[family], peaks["reward model"] if paid else 0.0)
        cost: dict[str, Any] = {"tokens": part["tokens"], "peak_mb": peak, "cpu_s": seconds + reward_s}
        cost["settings"] = [*SETTINGS[family], *(f"reward model: {name}" for name in REWARD_SETTINGS if paid)]
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        methods.append({"family": family, "name": name, "short": short, **numbers, **cost, "reward_model_s": reward_s})

    for beta in DPO_BETAS:
        part = parts[f"DPO {beta:g}"]
        add("DPO", f"DPO, β = {beta:g}", f"β = {beta:g}", part["metrics"], part, part["training_cpu_s"])
    for beta in RLOO_BETAS:
        part = parts[f"RLOO {beta:g}, rate {results['rate']:g}"]
        add("RLOO", f"RLOO, β = {beta:g}", f"β = {beta:g}", part["metrics"], part, part["training_cpu_s"])
    part, judge = parts["best of n"], f"score_{REWARD_PAIRS[0]}"
    for n in BEST_OF[1:]:
        bound = math.log(n) - (n - 1) / n
        row = {**part["by"][judge][str(n)], "kl": bound, "kl_se": 0.0}
        share = n / max(BEST_OF)  # of the samples that were drawn and scored
        paid = {**part, "tokens": round(part["tokens"] * share)}
        add("best of n", f"best of {n}", f"n = {n}", row, paid, part["training_cpu_s"] * share)
    for labels in LABELS:
        part = parts[f"on-policy DPO, {labels}"]
        judge = labels.removesuffix("'s labels").split()[-1]
        add("on-policy DPO", f"on-policy DPO, {labels}", f"by {judge}", part["metrics"], part, part["training_cpu_s"])
    seeds = {kind: [parts[f"{kind}, seed {seed}"]["metrics"] for seed in range(1, SEEDS + 1)] for kind in SEED_UPDATES}
    return {
        "machine": results["machine"], "rate": results["rate"],
        "reference": start,
        "baselines": parts["reference"]["baselines"], "methods": methods,
        "dpo_accuracy": {key: parts[f"DPO {BETA:g}"][key] for key in ("reward_accuracy", "reward_accuracy_se")},
        "reward_models": {
            str(n): {key: model[key] for key in ("accuracy", "accuracy_se", "calibration")}
            for n, model in models.items()
        },
        "best_of": part_of_best(parts["best of n"]),
        "rates": {
            f"{rate:g}": {key: part["metrics"][key] for key in ("kl", "true_reward", "true_reward_se")}
            | {"objective": objective(part, BETA)}
            for rate, part in ((rate, parts[f"RLOO {BETA:g}, rate {rate:g}"]) for rate in RATES)
        },
        "curves": {f"RLOO {BETA:g}": main["curve"], "over-optimisation": parts["over-optimisation"]["curve"]},
        "seeds": {"start": main["curve"][0], **seeds},
    }  # fmt: skip


def part_of_best(part: dict[str, Any]) -> dict[str, Any]:
    """True reward of the best of n by each judge, with its standard error."""
    return {
        judge: {n: {key: row[key] for key in ("true_reward", "true_reward_se")} for n, row in rows.items()}
        for judge, rows in part["by"].items()
    }


def peak_of(family: str) -> float:
    """Peak memory in MB of a process that does a few updates of a method and nothing else, libraries included."""
    command = [sys.executable, "-m", "benchmarks.rlhf", family]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def a_few_updates(family: str) -> None:
    """What `peak_of` runs: five batches of pairs, three of prompts, or as many samples at once as the method draws."""
    bench = Bench()
    model, pairs = bench.fresh(), bench.data.train[: 5 * bench.settings.batch_size]
    prompts = [pair.prompt for pair in bench.data.train]
    if family == "reward model":
        reward, scorer = RewardModel(model), RewardScorer(pairs, bench.eos)
        bench.fit(reward, pairs, scorer, BradleyTerry(), bench.plan())
    elif family == "DPO":
        fast = FastScorer(model, pairs, bench.settings.freeze_layers)
        reference = score_pairs(bench.base, pairs, fast, bench.compute)
        bench.fit(model, pairs, fast, DPOObjective(reference, BETA), bench.plan())
    elif family == "RLOO":
        sampler = bench.sampler(bench.score(REWARD_PAIRS[0]), prompts)
        plan = bench.plan(batch_size=PROMPTS)
        train(model, bench.data.train[: 3 * PROMPTS], sampler, Rloo(BETA), plan, bench.compute)
    elif family == "best of n":
        sampler = bench.sampler(bench.score(REWARD_PAIRS[0]), prompts)
        sampler.scores(sampler.draw(bench.base, prompts[:8], max(BEST_OF)))
    else:
        sampler = bench.sampler(bench.score(REWARD_PAIRS[0]), prompts[: ON_POLICY_PROMPTS // ON_POLICY_ROUNDS])
        on_policy_dpo(model, sampler, BETA, bench.plan(), bench.compute, rounds=1, noisy=False)
    print(peak_memory_gb(bench.compute) * 1000)


def main() -> None:
    """Make every part that is not there yet, then the notebook's numbers."""
    results: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {"parts": {}}
    bench = Bench()

    def part(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in results["parts"]:
            bench.tokens = 0
            clock, cpu = time.perf_counter(), time.process_time()
            found = make()
            results["parts"][name] = {
                "seconds": time.perf_counter() - clock, "cpu_s": time.process_time() - cpu,
                "tokens": bench.tokens, **found,
            }  # fmt: skip
            results["machine"] = _machine("cpu")
            OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{time.strftime('%H:%M')} {name}: {results['parts'][name]['cpu_s']:.0f} s of the CPU", flush=True)
        made: dict[str, Any] = results["parts"][name]
        return made

    def rloo(name: str, beta: float, **more: Any) -> None:
        part(name, lambda: bench.rloo(beta, rate, **more))

    get_reference(bench.settings)
    for pairs in REWARD_PAIRS:
        part(f"reward model, {pairs} pairs", partial(bench.train_reward, pairs))
    part("reference", bench.reference)
    whole = {"updates": UPDATES, "every": EVERY}
    tried = {r: part(f"RLOO {BETA:g}, rate {r:g}", partial(bench.rloo, BETA, r, **whole)) for r in RATES}
    rate = results["rate"] = max(RATES, key=lambda r: objective(tried[r], BETA))
    part(f"DPO {BETA:g}", partial(bench.dpo, BETA))
    part("best of n", bench.best_of)
    pushed = {"updates": PUSH_UPDATES, "pairs": REWARD_PAIRS[1], "every": PUSH_EVERY}
    rloo("over-optimisation", PUSH_BETA, schedule="constant", **pushed)
    for labels, noisy in LABELS.items():
        part(f"on-policy DPO, {labels}", partial(bench.on_policy, noisy))

    for beta in DPO_BETAS:
        part(f"DPO {beta:g}", partial(bench.dpo, beta))
    part("peak memory", lambda: {"mb": {family: peak_of(family) for family in ("reward model", *SETTINGS)}})
    for seed in range(1, SEEDS + 1):
        part(f"DPO, seed {seed}", partial(bench.dpo, BETA, seed, SEED_UPDATES["DPO"], SEED_PROMPTS))
        rloo(f"RLOO, seed {seed}", BETA, updates=SEED_UPDATES["RLOO"], seed=seed, prompts=SEED_PROMPTS)
    for beta in RLOO_BETAS:
        rloo(f"RLOO {beta:g}, rate {rate:g}", beta, **whole)
    shown.STORED.write_text(json.dumps(summary(results), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        a_few_updates(sys.argv[1])
    else:
        main()
