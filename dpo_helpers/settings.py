"""Every setting of the course, with its meaning and source, and the two profiles.

`load_settings("mini")` is the embedded world, offline on a CPU; `load_settings("gpt2")` is the source
study's set-up. Any field can be overridden by keyword, by the command line, or by an environment variable
`DPO_<FIELD>` (so `DPO_BETA=0.1` works in a notebook too). Nothing else differs between the profiles.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import SettingsError

EMBEDDED = "embedded"  # name of the model and of the data set that ship in the package
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust")  # of `losses.dpo_loss`, with TRL's names
SMOOTHED = ("sigmoid", "robust")  # the losses that know of wrong labels
HH_REVISION = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Frozen: a value that cannot be used is a SettingsError, never rewritten.

    The metadata of each field holds its meaning and its source; `python -m dpo_helpers all --help` prints
    them. "Paper" is Rafailov et al. 2023 (arXiv 2305.18290), "EM" its code
    (eric-mitchell/direct-preference-optimization), "study" the source study of this course.
    """

    profile: str = _setting("mini", "mini (embedded, offline) or gpt2 (the study's set-up)")
    model: str = _setting(EMBEDDED, "'embedded', a Hub id, a local directory, or a .gguf file")
    model_revision: str | None = _setting(None, "40-hex commit of a Hub model; looked up and recorded if not given")
    dataset: str = _setting(EMBEDDED, "'embedded', a Hub id, or a .jsonl, .jsonl.gz or .parquet file of HH pairs")
    dataset_revision: str | None = _setting(None, "40-hex commit of a Hub data set; looked up if not given")
    max_pairs: int | None = _setting(None, "at most this many training pairs, drawn by seed; all if not given")
    held_out_pairs: int = _setting(480, "pairs kept for evaluation; no prompt is on both sides")
    allow_dropped: bool = _setting(False, "go on although more than 5 % of the rows cannot be used")
    max_length: int = _setting(256, "tokens of prompt + response at most; EM uses 512")
    max_prompt_length: int = _setting(128, "prompt tokens kept, the last ones, when a pair is too long; EM uses 256")
    freeze_layers: int = _setting(8, "first blocks that are frozen; study: 8 of 12")
    freeze_embeddings: bool = _setting(True, "freeze the input embeddings too, and so GPT-2's tied output head")
    epochs: int = _setting(2, "passes over the training pairs for DPO; study: 5")
    sft_epochs: int = _setting(1, "passes over the chosen responses for SFT")
    batch_size: int = _setting(16, "pairs an update; the paper uses 64, the study does not say")
    micro_batch_size: int = _setting(8, "pairs a forward pass, of like length: bounds memory, same gradient")
    learning_rate: float = _setting(1e-6, "of DPO; study and paper: 1e-6")
    sft_learning_rate: float = _setting(1e-6, "of SFT; the study names one rate, 1e-6")
    optimizer: str = _setting("rmsprop", "rmsprop (study, paper) or adamw")
    warmup_steps: int = _setting(150, "updates of linear warm-up; paper and EM: 150")
    schedule: str = _setting("constant", "after the warm-up: constant (EM) or linear, falling to 0")
    max_grad_norm: float = _setting(10.0, "gradients are clipped to this norm; EM: 10")
    beta: float = _setting(0.5, "weight of the KL to the reference; study: 0.5; paper: 0.1")
    betas: tuple[float, ...] = _setting((0.1, 0.5, 1.0, 5.0), "the sweep, comma-separated; study: 0.1,0.5,1,5")
    frontier_betas: tuple[float, ...] = _setting((0.05,), "more β for the frontier, beside the sweep's; paper: 0.05")
    loss_type: str = _setting("sigmoid", "sigmoid (DPO), ipo, hinge or robust; names as in TRL")
    label_smoothing: float = _setting(0.0, "share of labels taken to be wrong, for sigmoid (cDPO) and robust")
    init_from: str = _setting("base", "base: π_ref is the plain model (study); sft: both start from SFT (paper)")
    prompts: int = _setting(120, "held-out prompts on which responses are sampled for KL and text measures")
    max_new_tokens: int = _setting(64, "tokens of a sampled response at most")
    curve_prompts: int = _setting(40, "prompts on which KL is measured at each point of a training curve")
    curve_points: int = _setting(5, "evaluations during a training, for its curves")
    trunk_gb: float = _setting(4.0, "GB for the frozen blocks' output, on disk or on the GPU; the rest is run anew")
    save_every: int = _setting(50, "updates between two checkpoints of a training")
    resume: bool = _setting(True, "go on with an unfinished training; no: set it aside and begin anew")
    seed: int = _setting(0, "seed of everything random")
    device: str = _setting("auto", "auto, cuda, cuda:N, mps or cpu")
    precision: str = _setting("auto", "auto, fp32, bf16 or fp16; auto on cuda: bf16 if the chip has it, else fp16")
    runs_dir: str = _setting("", "where runs are kept; default: runs/ beside the notebooks")

    def __post_init__(self) -> None:
        """Check every value; raises SettingsError naming the field, its value and what is allowed."""
        for name in _POSITIVE:
            self._require(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "a positive number")
        for name in ("freeze_layers", "warmup_steps", "seed"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("trunk_gb", _is_number(self.trunk_gb) and self.trunk_gb >= 0, "0 or more")
        self._require("max_pairs", self.max_pairs is None or self.max_pairs > 0, "a positive number")
        self._require(
            "device", re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device), "auto, cpu, mps, cuda or cuda:N"
        )
        self._require("max_prompt_length", self.max_prompt_length < self.max_length, "less than max_length")
        self._require("betas", bool(self.betas) and all(_is_number(b) and b > 0 for b in self.betas), "positive")
        self._require("frontier_betas", all(_is_number(b) and b > 0 for b in self.frontier_betas), "positive")
        self._require("betas", len(set(self.betas)) == len(self.betas), "different numbers")
        self._require("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        smoothed = self.loss_type in SMOOTHED
        self._require("label_smoothing", smoothed or self.label_smoothing == 0, f"0 with loss_type {self.loss_type}")
        for name, allowed in _CHOICES.items():
            self._require(name, getattr(self, name) in allowed, "one of " + ", ".join(allowed))

    def _require(self, name: str, good: object, expected: str) -> None:
        if not good:
            raise SettingsError(f"{name} is {getattr(self, name)!r}, but must be {expected}")

    @property
    def run_dir(self) -> Path:
        """Folder of this profile's run: <runs_dir>/<profile>."""
        return (Path(self.runs_dir) if self.runs_dir else default_runs_dir()) / self.profile

    def is_profile(self) -> bool:
        """Whether nothing that changes a number differs from the profile, so that its expected values hold."""
        return _numbers(self) == _numbers(PROFILES[self.profile])


_POSITIVE = (
    "held_out_pairs", "max_length", "max_prompt_length", "epochs", "sft_epochs", "batch_size", "micro_batch_size",
    "learning_rate", "sft_learning_rate", "max_grad_norm", "beta", "prompts", "max_new_tokens", "curve_prompts",
    "curve_points", "save_every",
)  # fmt: skip
_CHOICES = {
    "optimizer": ("rmsprop", "adamw"),
    "schedule": ("constant", "linear"),
    "loss_type": LOSS_TYPES,
    "init_from": ("base", "sft"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _numbers(settings: Settings) -> Settings:
    return replace(settings, runs_dir="", device="auto", trunk_gb=4.0, save_every=50, resume=True)


# The lesson's numbers are those of float32, and a model as small as the embedded one gains nothing from less.
PROFILES: dict[str, Settings] = {
    "mini": Settings(
        max_pairs=4000, epochs=1, learning_rate=5e-4, sft_learning_rate=5e-4, warmup_steps=20, schedule="linear",
        prompts=240, curve_points=4, curve_prompts=60, precision="fp32",
    ),
    "gpt2": Settings(
        profile="gpt2", model="openai-community/gpt2", model_revision=GPT2_REVISION,
        dataset="Anthropic/hh-rlhf", dataset_revision=HH_REVISION,
        max_pairs=4000, held_out_pairs=500, max_length=512, max_prompt_length=256,
        epochs=5, batch_size=8,
    ),
}  # fmt: skip


def default_runs_dir() -> Path:
    """runs/ in the nearest folder upwards that holds this course (notebooks/ and pyproject.toml), else here."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder / "runs"
    return here / "runs"


def parse_value(name: str, text: str) -> Any:
    """The value of field `name` written as text, as on the command line; raises SettingsError."""
    kind = str({f.name: f.type for f in fields(Settings)}[name])
    try:
        if kind.startswith("tuple"):
            return tuple(float(part) for part in text.split(","))
        if kind.startswith("bool"):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind.startswith(("int", "float")):
            return int(text) if kind.startswith("int") else float(text)
    except (ValueError, KeyError):
        raise SettingsError(f"{name} is {text!r}, but must be of the form {kind}") from None
    return text


def load_settings(profile: str = "mini", **overrides: Any) -> Settings:
    """The settings of a profile, with overrides: keyword, else environment variable DPO_<FIELD>, else profile.

    DPO_PROFILE replaces `profile`. A model or data set other than the profile's drops the profile's revision.
    Raises SettingsError for an unknown profile, field or value.
    """
    profile = os.environ.get("DPO_PROFILE") or profile
    if profile not in PROFILES:
        raise SettingsError(f"unknown profile {profile!r}: use one of {', '.join(PROFILES)}")
    names = [f.name for f in fields(Settings) if f.name != "profile"]
    for name in names:
        text = os.environ.get(f"DPO_{name.upper()}")
        if text and name not in overrides:
            overrides[name] = parse_value(name, text)
    for name in overrides:
        if name not in names:
            raise SettingsError(f"unknown setting {name!r}: see python -m dpo_helpers all --help")
    for what in ("model", "dataset"):
        if overrides.get(what, getattr(PROFILES[profile], what)) != getattr(PROFILES[profile], what):
            overrides.setdefault(f"{what}_revision", None)
    return replace(PROFILES[profile], **overrides)


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values, for a manifest."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
