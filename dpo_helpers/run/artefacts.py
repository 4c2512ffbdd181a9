"""Artefacts: the finished things of a run on disk, used again while what they were made from is unchanged.

with open_artefact(settings, "data", made_from) as data:
    if data.mine:  # it is not there yet, and this process makes it
        ...  # fill data.folder, add to data.about
data.folder, data.manifest  # whole, undamaged, and made from that
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..device import Compute
from ..errors import ArtefactError
from ..logprobs import PairScores
from ..settings import Settings
from ..training import MetricsRow
from ..untrusted import one_line
from . import processes
from .disk import changed_keys, holding, load_manifest, require_idle, writing
from .loading import load_saved
from .machine import compute_of, describe, peak_memory_gb

FORMAT = 4  # of what the files of an artefact hold; an artefact of another format is made again
METRICS = "metrics.jsonl"
LOGPROBS = "logprobs.safetensors"


@dataclass
class Artefact:
    """A folder under `settings.run_dir`, and what `open_artefact` found there.

    wanted: whether it has to be made; mine: whether by this process. While it is made, folder is a temporary place to
    fill, and about can be added to; afterwards folder is its own place, and manifest what is written there.
    """

    folder: Path
    wanted: bool = False
    mine: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)


@contextmanager
def open_artefact(settings: Settings, name: str, made_from: Mapping[str, Any]) -> Iterator[Artefact]:
    """The artefact `name` of a run, to be filled inside the `with` where it says that it is wanted.

    It is wanted where there is none, or one that is damaged or was made from something else; that one is set aside, and
    a line says which file or setting it was. Of several processes the first one makes it, while the others take part in
    what they have to (a training), and wait at the end of the `with` until it is there. Raises ArtefactError, saying
    who it is, while another process makes it, or makes something that may need what would be set aside.
    """
    place = settings.run_dir / name
    made_from = json.loads(json.dumps({"format": FORMAT, **made_from}))
    artefact = Artefact(place)
    if not processes.is_main():
        artefact.wanted = processes.from_first(False)
        yield artefact
    elif _is_made(place, made_from):
        processes.from_first(False)
        yield artefact
    else:
        with holding(place):
            if place.exists() and not _is_made(place, made_from):
                require_idle(settings.run_dir, place)  # a training may be on what would be set aside
            artefact.wanted = artefact.mine = not _is_made(place, made_from, why=name)  # another one may be done by now
            processes.from_first(artefact.wanted)
            if not artefact.wanted:
                yield artefact
            else:
                started = time.perf_counter()
                with writing(place, made_from) as draft:
                    artefact.folder, artefact.about = draft.folder, draft.about
                    yield artefact
                    draft.about.update(about(settings), seconds=round(time.perf_counter() - started, 1))
    processes.wait_for_all()
    artefact.folder, artefact.manifest = place, load_manifest(place) or {}


def _is_made(folder: Path, made_from: Mapping[str, Any], why: str = "") -> bool:
    """Whether a whole artefact made from the same is there; why: its name, to print what is wrong with another one."""
    try:
        manifest = load_manifest(folder)
    except ArtefactError as error:
        if why:
            print(f"{why}: {error}; it is made again, what is left is set aside")
        return False
    if manifest is None:
        return False
    changes = changed_keys(manifest["made_from"], made_from)
    if changes and why:
        print(one_line(f"{why}: made again, the earlier one is set aside ({'; '.join(changes)})"))
    return not changes


def about(settings: Settings) -> dict[str, Any]:
    """What is good to know of a run: settings, versions, device, peak memory in GB (10^9 bytes)."""
    compute = compute_of(settings)
    packages = ("dpo-helpers", "torch", "transformers", "datasets")
    return {
        "settings": dataclasses.asdict(replace(settings, runs_dir="")),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": describe(compute),
        "peak_memory_gb": round(peak_memory_gb(compute), 2),
    }


@dataclass(frozen=True)
class ModelArtefact:
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
        """ArtefactError if a file was damaged, or the folder made again from other settings, since it was opened."""
        if load_manifest(self.folder) != self.manifest:
            raise ArtefactError(f"{self.folder} was made again since it was opened: open it again, with its settings")


def as_model(name: str, artefact: Artefact) -> ModelArtefact:
    """The model that a finished artefact holds."""
    return ModelArtefact(name, artefact.folder, read_jsonl(artefact.folder / METRICS), artefact.manifest)


def load_scores(folder: Path, part: str) -> PairScores:
    """The log-probabilities of the "train" or "held_out" pairs that a model's folder holds."""
    tensors = load_file(folder / LOGPROBS)
    return PairScores(**{field.name: tensors[f"{part}_{field.name}"] for field in fields(PairScores)})


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none where there is no file."""
    if not path.is_file():
        return []
    # not splitlines(): a text may hold other line separators than a newline
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
