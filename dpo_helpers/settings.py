"""Every setting of the course, with its meaning and source, and the two profiles.

`load_settings("mini")` is the embedded world, offline on a CPU; `load_settings("gpt2")` is the source
study's set-up. Any field can be overridden by keyword, by the command line, or by an environment variable
`DPO_<FIELD>` (so `DPO_BETA=0.1` works in a notebook too). Nothing else differs between the profiles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from .errors import SettingsError

EMBEDDED = "embedded"  # name of the model and of the data set that ship in the package
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
HH_REVISION = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero")  # of `losses.dpo_loss`, with TRL's names
SMOOTHED = ("sigmoid", "robust")  # the losses that know of wrong labels


class Rule(NamedTuple):
    """What a setting must be, in words and as a test of a value."""

    words: str
    holds: Callable[[Any], object]


def one_of(*names: str) -> Rule:
    """One of these words."""
    return Rule("one of " + ", ".join(names), lambda x: x in names)


def between(low: float, high: float, unit: str = "") -> Rule:
    """A number from low to high, both of them allowed."""
    return Rule(f"from {low:,} to {high:,} {unit}".strip(), lambda x: isinstance(x, (int, float)) and low <= x <= high)


def each(rule: Rule, least: int = 0) -> Rule:
    """At least so many values, all different, each of which keeps a rule."""
    words = f"{least} or more different values {rule.words}"
    return Rule(words, lambda xs: least <= len(xs) == len({*xs}) and all(map(rule.holds, xs)))


PAIRS, TOKENS, PROMPTS = (between(1, 1_000_000, unit) for unit in ("pairs", "tokens", "prompts"))
PAIRS_OR_ALL = Rule(PAIRS.words, lambda x: x is None or PAIRS.holds(x))
PASSES, RATE, BETA = between(1, 1000, "passes"), between(1e-12, 1), between(1e-6, 1_000_000)
SHARE = Rule("in [0, 0.5)", lambda x: isinstance(x, (int, float)) and 0 <= x < 0.5)
DEVICE = Rule("auto, cpu, mps, cuda or cuda:N", lambda x: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", x))
PRECISION = one_of("auto", "fp32", "bf16", "fp16")


def check_loss(beta: float, loss_type: str, label_smoothing: float) -> None:
    """SettingsError, naming the value, unless `losses.dpo_loss` can be computed with these."""
    _require({"beta": (beta, BETA), "loss_type": (loss_type, one_of(*LOSS_TYPES))})
    none = Rule(f"0, since loss_type {loss_type!r} has none; {' and '.join(SMOOTHED)} have", lambda x: x == 0)
    _require({"label_smoothing": (label_smoothing, SHARE if loss_type in SMOOTHED else none)})


def _require(given: dict[str, tuple[object, Rule | None]]) -> None:
    for name, (value, rule) in given.items():
        if rule and not rule.holds(value):
            raise SettingsError(f"{name} is {value!r}, but must be {rule.words}")


def _setting(default: Any, meaning: str, rule: Rule | None = None) -> Any:
    return field(default=default, metadata={"help": meaning, "rule": rule})


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Frozen: a value that cannot be used is a SettingsError, never rewritten.

    The metadata of each field holds its meaning, its source and its rule; `python -m dpo_helpers all --help` prints
    them. "Paper" is Rafailov et al. 2023 (arXiv 2305.18290), "EM" its code
    (eric-mitchell/direct-preference-optimization), "study" the source study of this course.
    """

    profile: str = _setting("mini", "mini (embedded, offline) or gpt2 (the study's set-up)")
    model: str = _setting(EMBEDDED, "'embedded', a Hub id, a local directory, or a .gguf file")
    model_revision: str | None = _setting(None, "40-hex commit of a Hub model; looked up and recorded if not given")
    dataset: str = _setting(EMBEDDED, "'embedded', a Hub id, a folder, or a .jsonl(.gz), .json, .csv or .parquet file")
    dataset_revision: str | None = _setting(None, "40-hex commit of a Hub data set; looked up if not given")
    max_pairs: int | None = _setting(None, "most training pairs, drawn by seed; all if not given", PAIRS_OR_ALL)
    held_out_pairs: int = _setting(480, "pairs kept for evaluation; no prompt is on both sides", PAIRS)
    allow_dropped: bool = _setting(False, "go on although more than 5 % of the rows cannot be used")
    max_length: int = _setting(256, "tokens of prompt + response at most; EM uses 512", TOKENS)
    max_prompt_length: int = _setting(128, "last prompt tokens kept of a pair that is too long; EM: 256", TOKENS)
    template: str = _setting("auto", "auto: the tokenizer's chat template, if any; none: HH's", one_of("auto", "none"))
    freeze_layers: int = _setting(8, "first blocks that are frozen; study: 8 of 12", between(0, 1000, "blocks"))
    freeze_embeddings: bool = _setting(True, "freeze the input embeddings too, and so GPT-2's tied output head")
    epochs: int = _setting(2, "passes over the training pairs for DPO; study: 5", PASSES)
    sft_epochs: int = _setting(1, "passes over the chosen responses for SFT", PASSES)
    batch_size: int = _setting(16, "pairs per update; the paper uses 64, the study does not say", PAIRS)
    micro_batch_size: int = _setting(8, "pairs per forward pass: bounds memory, same gradient", PAIRS)
    learning_rate: float = _setting(1e-6, "of DPO; study and paper: 1e-6", RATE)
    sft_learning_rate: float = _setting(1e-6, "of SFT; the study names one rate, 1e-6", RATE)
    optimizer: str = _setting("rmsprop", "rmsprop (study, paper) or adamw", one_of("rmsprop", "adamw"))
    warmup_steps: int = _setting(150, "updates of linear warm-up; paper and EM: 150", between(0, 1_000_000, "updates"))
    schedule: str = _setting("constant", "then: constant (EM) or linear, falling to 0", one_of("constant", "linear"))
    max_grad_norm: float = _setting(10.0, "gradients are clipped to this norm; EM: 10", between(1e-6, 1_000_000))
    beta: float = _setting(0.5, "weight of the KL to the reference; study: 0.5; paper: 0.1")
    betas: tuple[float, ...] = _setting((0.1, 0.5, 1.0, 5.0), "the sweep; study: 0.1,0.5,1,5", each(BETA, 1))
    frontier_betas: tuple[float, ...] = _setting((0.05,), "more β for the frontier; paper: 0.05", each(BETA))
    loss_type: str = _setting("sigmoid", "sigmoid (DPO), " + ", ".join(LOSS_TYPES[1:]) + "; names as in TRL")
    label_smoothing: float = _setting(0.0, "share of labels taken to be wrong, for sigmoid (cDPO) and robust")
    init_from: str = _setting("base", "π_ref: base, the plain model (study), or sft (paper)", one_of("base", "sft"))
    prompts: int = _setting(120, "held-out prompts that are answered to measure KL and text", PROMPTS)
    max_new_tokens: int = _setting(64, "tokens of a sampled response at most", TOKENS)
    curve_prompts: int = _setting(40, "prompts of them at each point of a training curve", PROMPTS)
    curve_points: int = _setting(5, "evaluations during a training, for its curves", between(1, 1000, "points"))
    trunk_gb: float = _setting(4.0, "for the frozen blocks' output, on disk or on the GPU", between(0, 100_000, "GB"))
    save_every: int = _setting(50, "updates between two checkpoints of a training", between(1, 1_000_000, "updates"))
    resume: bool = _setting(True, "go on with an unfinished training; no: set it aside and begin again")
    seed: int = _setting(0, "seed of everything random", between(0, 2**32 - 1))
    device: str = _setting("auto", "auto, cuda, cuda:N, mps or cpu", DEVICE)
    precision: str = _setting("auto", "of training; auto on cuda: bf16 if the chip has it, else fp16", PRECISION)
    runs_dir: str = _setting("", "where runs are kept; default: runs/ beside the notebooks")

    def __post_init__(self) -> None:
        """Check every value; raises SettingsError naming the field, its value and what is allowed."""
        _require({f.name: (getattr(self, f.name), f.metadata["rule"]) for f in fields(self)})
        shorter = Rule("less than max_length", lambda x: x < self.max_length)
        _require({"max_prompt_length": (self.max_prompt_length, shorter)})
        check_loss(self.beta, self.loss_type, self.label_smoothing)

    @property
    def run_dir(self) -> Path:
        """<runs_dir>/<profile>; by default in runs/ of the nearest folder upwards with the course, or of this one."""
        upwards = (Path.cwd(), *Path.cwd().parents)
        holds = (at for at in upwards if (at / "pyproject.toml").is_file() and (at / "notebooks").is_dir())
        return (Path(self.runs_dir) if self.runs_dir else next(holds, upwards[0]) / "runs") / self.profile


# The lesson's numbers are those of float32, and a model as small as the embedded one gains nothing from less.
PROFILES: dict[str, Settings] = {
    "mini": Settings(
        max_pairs=4000, epochs=1, learning_rate=5e-4, sft_learning_rate=5e-4, warmup_steps=20, schedule="linear",
        prompts=240, curve_points=4, curve_prompts=60, precision="fp32",
    ),
    "gpt2": Settings(
        profile="gpt2", model="openai-community/gpt2", model_revision=GPT2_REVISION,
        dataset="Anthropic/hh-rlhf", dataset_revision=HH_REVISION,
        max_pairs=4000, held_out_pairs=500, max_length=512, max_prompt_length=256, epochs=5, batch_size=8,
    ),
}  # fmt: skip


_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_READ: dict[str, Callable[[str], Any]] = {
    "int": int, "float": float, "bool": lambda x: _WORDS[x.lower()], "tuple": lambda x: (*map(float, x.split(",")),)
}  # fmt: skip


def parse_value(name: str, text: str) -> Any:
    """The value of field `name` written as text, as on the command line; raises SettingsError."""
    kind = str({f.name: f.type for f in fields(Settings)}[name])
    try:
        return _READ.get(kind.partition("[")[0].removesuffix(" | None"), str)(text)
    except (ValueError, KeyError):
        raise SettingsError(f"{name} is {text!r}, but must be of the form {kind}") from None


def load_settings(profile: str = "mini", **overrides: Any) -> Settings:
    """The settings of a profile, with overrides: keyword, else environment variable DPO_<FIELD>, else profile.

    DPO_PROFILE replaces `profile`. A model or data set other than the profile's drops the profile's revision.
    Raises SettingsError for an unknown profile, field or value.
    """
    if (profile := os.environ.get("DPO_PROFILE") or profile) not in PROFILES:
        raise SettingsError(f"unknown profile {profile!r}: use one of {', '.join(PROFILES)}")
    names = [f.name for f in fields(Settings) if f.name != "profile"]
    for name in names:
        text = os.environ.get(f"DPO_{name.upper()}")
        if text and name not in overrides:
            overrides[name] = parse_value(name, text)
    if unknown := sorted(overrides.keys() - names):
        raise SettingsError(f"unknown setting {unknown[0]!r}: see python -m dpo_helpers all --help")
    for what in ("model", "dataset"):
        if overrides.get(what, getattr(PROFILES[profile], what)) != getattr(PROFILES[profile], what):
            overrides.setdefault(f"{what}_revision", None)
    return replace(PROFILES[profile], **overrides)
