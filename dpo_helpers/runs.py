"""A run on disk: artefacts that are loaded if they are there and valid, else made."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from . import parallel
from .checkpoints import changed_keys, holding, load_manifest, writing
from .device import Compute, peak_memory_gb, pick_compute
from .errors import ArtefactError
from .evaluation import PairScores
from .models import load_saved
from .settings import Settings, as_dict
from .training import MetricsRow
from .untrusted import one_line

FORMAT = 3  # of what the files of an artefact hold; an artefact of another format is made anew
METRICS = "metrics.jsonl"
LOGPROBS = "logprobs.safetensors"


@dataclass(frozen=True)
class Stage:
    """One model of the comparison, on disk: its folder, the metrics of its training, and its manifest."""

    name: str
    folder: Path
    metrics: list[MetricsRow]
    manifest: dict[str, Any]

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights, as `models.weights_hash` gives it."""
        return str(self.manifest["about"]["weights_sha256"])

    def load(self, compute: Compute | None = None) -> Any:
        """The model, in float32, dropout off, on the device of `compute` (the CPU without one)."""
        self.require_unchanged()
        model = load_saved(self.folder)
        return model.to(compute.device) if compute else model

    def scores(self, part: str) -> PairScores:
        """Log-probabilities of the "train" or "held_out" pairs under this model, as stored with it."""
        self.require_unchanged()
        return load_scores(self.folder, part)

    def require_unchanged(self) -> None:
        """ArtefactError if a file was damaged, or the folder made anew from other settings, since it was opened."""
        if load_manifest(self.folder) != self.manifest:
            raise ArtefactError(f"{self.folder} was made anew since it was opened: ask for it again, with its settings")


def load_scores(folder: Path, part: str) -> PairScores:
    """The log-probabilities of the "train" or "held_out" pairs that a stage's folder holds."""
    tensors = load_file(folder / LOGPROBS)
    return PairScores(**{field.name: tensors[f"{part}_{field.name}"] for field in fields(PairScores)})


def open_stage(name: str, folder: Path) -> Stage:
    """The stage in a folder that `artefact` returned."""
    manifest = load_manifest(folder)
    assert manifest is not None, f"{folder} is no artefact"
    return Stage(name, folder, read_jsonl(folder / METRICS), manifest)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none where there is no file."""
    if not path.is_file():
        return []
    # not splitlines(): a text may hold other line separators than a newline
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@cache
def _compute(device: str, precision: str) -> Compute:
    return pick_compute(device, precision)


def compute_of(settings: Settings) -> Compute:
    """The device and precision that the settings ask for."""
    return _compute(settings.device, settings.precision)


def about(settings: Settings) -> dict[str, Any]:
    """What is good to know of a run: settings, versions, device, peak memory in GB (10^9 bytes)."""
    compute = compute_of(settings)
    packages = ("dpo-helpers", "torch", "transformers", "datasets")
    return {
        "settings": as_dict(replace(settings, runs_dir="")),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": compute.describe(),
        "peak_memory_gb": round(peak_memory_gb(compute), 2),
    }


def artefact(
    settings: Settings,
    name: str,
    made_from: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any]],
    take_part: Callable[[], object] = lambda: None,
) -> Path:
    """The folder of artefact `name`: as it is if it was made from the same, else made by `make`.

    make: fills a temporary folder and returns facts for the manifest. An artefact that is damaged or was made
    from something else is set aside, and a line says which file or setting it was. With several processes
    (`parallel`) the first one makes it, while the others run `take_part`, and then wait until it is there.
    """
    folder = settings.run_dir / name
    if not parallel.is_main():
        if parallel.agreed(False):  # the first process says whether it has to be made
            take_part()
        parallel.agreed(False)
        return folder
    made_from = json.loads(json.dumps({"format": FORMAT, **made_from}))
    if not _is_made(folder, made_from):
        with holding(folder):
            if not _is_made(folder, made_from, why=name):  # another process may have made it just now
                parallel.agreed(True)
                facts: dict[str, Any] = {}  # filled while the folder is written, put into the manifest at its end
                started = time.perf_counter()
                with writing(folder, made_from, facts) as temporary:
                    facts.update(make(temporary))
                    facts.update(about(settings), seconds=round(time.perf_counter() - started, 1))
                parallel.agreed(True)
                return folder
    parallel.agreed(False)
    parallel.agreed(True)
    return folder


def _is_made(folder: Path, made_from: Mapping[str, Any], why: str = "") -> bool:
    """Whether a whole artefact made from the same is there; why: its name, to print what is wrong with another one."""
    try:
        manifest = load_manifest(folder)
    except ArtefactError as error:
        if why:
            print(f"{why}: {error}; made anew, what is left is set aside")
        return False
    if manifest is None:
        return False
    changes = changed_keys(manifest["made_from"], made_from)
    if changes and why:
        print(one_line(f"{why}: made anew, the earlier one is set aside ({'; '.join(changes)})"))
    return not changes
