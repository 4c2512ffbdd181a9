"""Look for the signs of the fifteen pains (`pains`) in a run on disk: `python -m dpo_helpers doctor RUN`.

RUN is a run of this course (`runs/mini`, or one model of it), or an output folder of transformers and TRL, of which
`trainer_state.json` is read. Each sign is looked for in numbers that the run itself wrote; where those are missing
the answer is "cannot tell", never "fine".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtefactError, CourseError
from ..evaluation import pair_values
from ..logprobs import PairScores
from ..run.artefacts import LOGPROBS, METRICS, load_scores, read_jsonl
from ..run.disk import MANIFEST
from ..run.measures import longer_wins
from ..uncertainty import bootstrap_mean
from ..untrusted import one_line
from .pains import LN_2, PAINS, Pain

TRL_NAMES = {
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "loss": "loss",
    "grad_norm": "grad_norm",
}


@dataclass(frozen=True)
class Diagnosis:
    """What was found of one pain: "applies", "no sign" or "cannot tell", and the numbers, or what is missing."""

    pain: Pain
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Run:
    """What a run's folder says; parts that are not there stay empty.

    training, held_out: rows of metrics in the course's names, in the order they were written. about, made_from: of the
    manifest. scores, reference: log-probabilities of the held-out pairs. evaluation, reference_evaluation: metrics
    of sampled responses. kl_by_beta: measured KL of each policy of a sweep, with its standard error.
    """

    folder: Path
    training: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)
    made_from: Mapping[str, Any] = field(default_factory=dict)
    scores: PairScores | None = None
    reference: PairScores | None = None
    reference_about: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)
    reference_evaluation: Mapping[str, float] = field(default_factory=dict)
    kl_by_beta: Mapping[float, tuple[float, float]] = field(default_factory=dict)

    @property
    def loss_type(self) -> str:
        """Of a DPO run of the course; "none" of another model; "unknown" where the run does not say, as TRL's."""
        return str(self.made_from.get("loss_type", "none")) if self.made_from else "unknown"


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtefactError(f"{path} is not JSON ({error}); is the run still being written?") from error
    return found if isinstance(found, dict) else {}


def read_run(folder: Path) -> Run:
    """Read a run of the course (its main DPO model), one model of it, or a TRL output folder.

    Raises ArtefactError where the folder holds neither, or files that are not what such a run writes: it can be
    anybody's, so nothing is expected of them.
    """
    try:
        return _read_run(folder)
    except CourseError:
        raise
    except Exception as error:  # whatever a strange file leads to
        raise ArtefactError(f"{folder} does not read as a run ({type(error).__name__}: {error})") from error


def _read_run(folder: Path) -> Run:
    if (folder / "dpo" / METRICS).is_file():
        return _read_model(folder / "dpo", folder)
    if (folder / METRICS).is_file():
        return _read_model(folder, folder.parent.parent if folder.parent.name == "sweep" else folder.parent)
    states = [*folder.glob("trainer_state.json"), *folder.glob("checkpoint-*/trainer_state.json")]
    if states:
        newest = max(states, key=lambda path: _json(path).get("global_step", 0))
        return _read_trainer_state(folder, _json(newest))
    raise ArtefactError(
        f"{folder} holds no run: give a run of this course (with dpo/{METRICS}) or a TRL output folder "
        "(with trainer_state.json)"
    )


def _read_model(model: Path, run: Path) -> Run:
    rows, manifest = read_jsonl(model / METRICS), _json(model / MANIFEST)
    start = manifest.get("about", {}).get("settings", {}).get("init_from")
    is_dpo = "beta" in manifest.get("made_from", {})
    pi_ref = run / ("sft" if is_dpo and start == "sft" else "reference")
    scores, reference = (load_scores(p, "held_out") if (p / LOGPROBS).is_file() else None for p in (model, pi_ref))
    current = [p for p in (run / "evaluation").glob("*") if ".old-" not in p.name]
    evaluations = {p.name: _json(p / "metrics.json") for p in current}
    betas = {p: _json(p / MANIFEST).get("made_from", {}).get("beta") for p in current}
    sweep = {
        b: (evaluations[p.name]["kl"], evaluations[p.name]["kl_se"])
        for p, b in betas.items()
        if p.name == "dpo" or p.name.startswith("beta-")
    }
    return Run(
        model, [r for r in rows if r["split"] == "train"], [r for r in rows if r["split"] == "held_out"],
        manifest.get("about", {}), manifest.get("made_from", {}), scores, reference,
        reference_about=_json(pi_ref / MANIFEST).get("about", {}),
        evaluation=evaluations.get(model.name, {}), reference_evaluation=evaluations.get(pi_ref.name, {}),
        kl_by_beta=sweep,
    )  # fmt: skip


def _read_trainer_state(folder: Path, state: Mapping[str, Any]) -> Run:
    training: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for row in state.get("log_history", []):
        prefix = "eval_" if any(key.startswith("eval_") for key in row) else ""
        named = {ours: row[prefix + theirs] for theirs, ours in TRL_NAMES.items() if prefix + theirs in row}
        if named:
            (held_out if prefix else training).append({"step": row.get("step", 0), **named})
    return Run(folder, training, held_out)


Sign = Callable[[Run], tuple[bool, str] | None]  # (applies, evidence); None: the run does not say


def _of(values: Mapping[str, float], key: str) -> tuple[float, float]:
    """A measured mean with its standard error, 0 where that was not written."""
    return values[key], values.get(f"{key}_se", 0.0)


def _is_above(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one mean is above another by more than chance would often do: two standard errors of the difference."""
    return one[0] - other[0] > 2 * math.hypot(one[1], other[1])


def _chosen_falls(run: Run) -> tuple[bool, str] | None:
    rows = [r for r in (run.held_out or run.training) if {"chosen_reward", "reward_margin"} <= set(r)]
    if not rows:
        return None
    last = rows[-1]
    falls = _is_above((0, 0), _of(last, "chosen_reward")) and _is_above(_of(last, "reward_margin"), (0, 0))
    return falls, f"chosen reward {last['chosen_reward']:.2f}, margin {last['reward_margin']:.2f} at the end"


def _beta_order(run: Run) -> tuple[bool, str] | None:
    if len(run.kl_by_beta) < 2:
        return None
    kls = [run.kl_by_beta[b] for b in sorted(run.kl_by_beta)]
    text = ", ".join(f"{kl:.2f} ± {error:.2f} at β = {b:g}" for b, (kl, error) in sorted(run.kl_by_beta.items()))
    rises = any(_is_above(larger, smaller) for smaller, larger in [*pairwise(kls), (kls[0], kls[-1])])
    return rises, f"measured KL {text}"


def _stuck(run: Run) -> tuple[bool, str] | None:
    losses = [r["loss"] for r in run.training if "loss" in r]
    if len(losses) < 10 or run.loss_type not in ("sigmoid", "unknown"):
        return None
    late = sum(losses[-len(losses) // 4 :]) / len(losses[-len(losses) // 4 :])
    norms = [r["grad_norm"] for r in run.training if "grad_norm" in r and not r.get("skipped")]
    still = bool(norms) and max(norms) == 0
    return abs(late - LN_2) < 0.003 or still, f"mean loss of the last quarter {late:.4f}, ln 2 = {LN_2:.4f}"


def _start(run: Run) -> tuple[bool, str] | None:
    rows = [r for r in (*run.held_out, *run.training) if r["step"] <= 1 and {"loss", "chosen_reward"} <= set(r)]
    if not rows:
        return None
    first = min(rows, key=lambda r: r["step"])
    wrong_loss = run.loss_type == "sigmoid" and abs(first["loss"] - LN_2) > 0.01
    off = wrong_loss or abs(first["chosen_reward"]) > 0.02
    return off, f"loss {first['loss']:.4f} and chosen reward {first['chosen_reward']:.4f} at step {first['step']}"


def _reference(run: Run) -> tuple[bool, str] | None:
    start = run.made_from.get("reference")
    reference = run.reference_about.get("weights_sha256")
    if not start or not reference:
        return None
    return start != reference, f"the policy started from {start[:12]}, the reference's weights are {reference[:12]}"


def _ends(run: Run) -> tuple[bool, str] | None:
    if "ended" not in run.evaluation:
        return None
    ended, before = _of(run.evaluation, "ended"), _of({"ended": 1.0, **run.reference_evaluation}, "ended")
    return (
        ended[0] < 0.5 and ended[0] < before[0] - 0.1 and _is_above(before, ended),
        f"{ended[0]:.0%} of the answers end by themselves, the reference's {before[0]:.0%}",
    )


def _truncation(run: Run) -> tuple[bool, str] | None:
    pairs, cut = (run.reference_about.get(key) for key in ("pairs", "cut_responses"))
    if not pairs:
        return None
    return cut > 0.02 * pairs, f"{cut} of {pairs} pairs have a response that was cut"


def _finite(run: Run) -> tuple[bool, str] | None:
    rows = (*run.training, *run.held_out)
    if not rows:
        return None
    done = [r for r in rows if not r.get("skipped")]  # fp16's scaler skips the updates whose gradient overflows
    bad = [r["step"] for r in done if any(isinstance(v, float) and not math.isfinite(v) for v in r.values())]
    zero = [r["step"] for r in run.training if r.get("loss") == 0.0 and r.get("grad_norm") in (0.0, None)]
    where = f", first at step {min([*bad, *zero])}" if bad or zero else ""
    return bool(bad or zero), f"{len(bad)} rows that are not finite, {len(zero)} with a loss of exactly 0{where}"


def _degenerate(run: Run) -> tuple[bool, str] | None:
    e, ref = run.evaluation, run.reference_evaluation
    if "looping" not in e or "looping" not in ref:
        return None
    worse = any(
        e[key] > ref[key] + 0.1 and _is_above(_of(e, key), _of(ref, key)) for key in ("looping", "repeated_3grams")
    )
    poor = e["distinct_2"] < 0.5 * ref["distinct_2"]
    text = ", ".join(
        f"{k} {e[k]:.2f} ({ref[k]:.2f} in the reference)" for k in ("looping", "repeated_3grams", "distinct_2")
    )
    return worse or poor, text


def _mean(run: Run) -> tuple[bool, str] | None:
    if run.scores is None:
        return None
    both = torch.stack([run.scores.chosen_tokens.float(), -run.scores.chosen]).log()
    if both.shape[1] < 3 or both[0].std() == 0 or not both.isfinite().all():
        return None
    covariance = both.cov()
    power = (covariance[0, 1] / covariance[0, 0]).item()
    return power < 0.2, f"-log p grows as length to the power {power:.2f} (a sum: well above 0, a mean: 0 or below)"


def _offline(run: Run) -> tuple[bool, str] | None:
    row = run.held_out[-1] if run.held_out else {}
    beta = run.made_from.get("beta")
    if run.scores is None or run.reference is None or beta is None or "reward_margin" not in row or "pairs" not in row:
        return None
    n = row["pairs"]
    offline = pair_values(run.scores[:n], run.reference[:n], beta)["reward_margin"].mean().item()
    off = abs(offline - row["reward_margin"]) > 1e-3 * max(1, abs(offline))
    return (
        off,
        f"margin of the first {n} held-out pairs: {offline:.4f} from stored scores, {row['reward_margin']:.4f} logged",
    )


def _noise(run: Run) -> tuple[bool, str] | None:
    if run.scores is None or run.reference is None:
        return None
    right = pair_values(run.scores, run.reference, beta=1.0)["reward_accuracy"]  # the same for every β
    interval, (longer, ties) = bootstrap_mean(right), longer_wins(run.scores)
    text = f"accuracy {interval} on {len(right)} pairs; 'longer wins' gets {longer + ties / 2:.2f}"
    return interval.high - interval.low > 0.1 or interval.low < longer + ties / 2, text


def _steps(run: Run) -> tuple[bool, str] | None:
    steps = [r["step"] for r in run.training]
    if len(steps) < 2:
        return None
    gaps = {b - a for a, b in pairwise(steps)}
    odd = min(gaps) <= 0 or len(gaps) > 2  # the last log of a run may come early
    return odd, f"{len(steps)} logged updates, from {steps[0]} to {steps[-1]}, distances {sorted(gaps)[:4]}"


SIGNS: dict[int, tuple[Sign, str]] = {
    1: (_chosen_falls, "needs rewards in the log"),
    2: (_beta_order, "needs the measured KL of two β or more"),
    3: (_stuck, "needs ten logged training losses of the sigmoid loss"),
    4: (_start, "needs rewards logged at step 0 or 1"),
    5: (_reference, "needs the hashes of start and reference"),
    6: (lambda run: (False, "tokenised apart by this course") if run.made_from else None, "needs the run's token ids"),
    7: (_ends, "needs measured samples (evaluation/)"),
    8: (_truncation, "needs the number of cut pairs"),
    9: (_finite, "needs logged rows"),
    10: (
        lambda run: (False, f"it ended; peak memory {run.about['peak_memory_gb']} GB") if run.about else None,
        "needs the run's peak memory",
    ),
    11: (_degenerate, "needs measured samples (evaluation/)"),
    12: (_mean, "needs stored log-probabilities"),
    13: (_offline, "needs stored log-probabilities and a logged margin"),
    14: (_noise, "needs stored log-probabilities"),
    15: (_steps, "needs logged training rows"),
}


def examine(run: Run) -> list[Diagnosis]:
    """One diagnosis for each of the fifteen pains, in their order."""
    diagnoses = []
    for pain in PAINS:
        sign, missing = SIGNS[pain.number]
        try:
            found = sign(run)
        except Exception as error:  # see read_run
            found, missing = None, f"its files hold no such numbers ({type(error).__name__}: {error})"
        verdict = "cannot tell" if found is None else "applies" if found[0] else "no sign"
        diagnoses.append(Diagnosis(pain, verdict, missing if found is None else found[1]))
    return diagnoses


def describe(diagnoses: list[Diagnosis]) -> str:
    """The diagnoses as text: what applies first, with cause and remedy, then the rest, a line each.

    Evidence may quote the run's files, so it is kept on its line, and what would act in a terminal is written out.
    """
    lines = []
    for found in (d for d in diagnoses if d.verdict == "applies"):
        pain = found.pain
        lines += [f"APPLIES  {pain.number:2d}. {pain.symptom}: {one_line(found.evidence)}"]
        lines += [f"             why: {pain.cause}", f"             do:  {pain.remedy}"]
    for verdict in ("no sign", "cannot tell"):
        lines += [
            f"{verdict:11s} {d.pain.number:2d}. {d.pain.symptom}: {one_line(d.evidence)}"
            for d in diagnoses
            if d.verdict == verdict
        ]
    return "\n".join(lines)
