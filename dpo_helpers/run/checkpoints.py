"""Checkpoints: the state of an unfinished training on disk, so that it goes on bit for bit where it stopped.

`<name>.unfinished/` holds a folder `step-<updates>` for each of the two newest checkpoints, written and verified like
every folder of a run (`disk`), and `metrics.jsonl`, a log of each update as it came. No random state is saved: order
and randomness of an update are functions of (seed, step).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ArtefactError
from ..show.files import refused
from ..untrusted import one_line
from . import processes
from .artefacts import METRICS, read_jsonl, write_jsonl
from .disk import changed_keys, load_manifest, remove_halves, set_aside, write_text, writing

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
KEPT = 2  # the newest checkpoint, and the one before it in case the newest turns out damaged


@dataclass(frozen=True)
class TrainState:
    """What a training is after `step` updates.

    weights: the trainable parameters by name; optimizer: its tensors, named <parameter>/<key>, such as
    "h.11.mlp.c_fc.weight/square_avg"; rows: the metrics so far; micro_size: pairs a forward pass, which running out of
    memory may have lowered; scaler: of the fp16 loss, empty in other precisions.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rows: list[dict[str, Any]]
    micro_size: int
    scaler: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training, in a folder of their own beside the artefact that it will become."""

    def __init__(self, artefact: Path, made_from: Mapping[str, Any], *, every: int = 50, resume: bool = True):
        """made_from: what decides the training's result; every: updates between checkpoints; resume: use what is there.

        Without resume, what is there is set aside when `newest` is asked for.
        """
        self.folder = artefact.with_name(f"{artefact.name}.unfinished")
        self.made_from: dict[str, Any] = json.loads(json.dumps(dict(made_from)))
        self.every, self.resume = every, resume

    def newest(self) -> TrainState | None:
        """The newest checkpoint that is whole, to go on from; None where there is none.

        A damaged one is named in a printed line, and the one before it is used. Raises ArtefactError, listing exactly
        the keys that differ, where it was made from other settings or data. Of several processes the first one decides.
        """
        found = self._find() if processes.is_main() else None
        step = processes.from_first(-1 if found is None else found)
        return None if step < 0 else self._read(step)

    def _find(self) -> int | None:
        remove_halves(self.folder / "step-*")
        steps = self.steps()
        if steps and not self.resume:
            print(one_line(f"{self.folder.name}: not resumed, set aside as {set_aside(self.folder).name}"))
            return None
        for step in reversed(steps):
            try:
                manifest = load_manifest(self._at(step))
                assert manifest is not None
            except ArtefactError as error:
                print(one_line(f"{error}; the checkpoint before it is used"))
                continue
            changes = changed_keys(manifest["made_from"], self.made_from)
            if changes:
                raise ArtefactError(
                    f"{self.folder} is an unfinished training from other settings or data ({'; '.join(changes)}): go "
                    "on with those, or begin again with --no-resume, which sets it aside (in a notebook DPO_RESUME=no)"
                )
            print(f"{self.folder.name}: goes on after update {step}")
            return step
        if steps:
            kept = set_aside(self.folder)
            print(f"no checkpoint in {self.folder.name} is whole: it begins again, {kept.name} keeps what is left")
        return None

    def steps(self) -> list[int]:
        """The updates after which there is a checkpoint, whole or not, first to last."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def _at(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _read(self, step: int) -> TrainState:
        folder = self._at(step)
        manifest = load_manifest(folder)
        assert manifest is not None
        about = manifest["about"]
        weights, optimizer = load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER)
        return TrainState(step, weights, optimizer, read_jsonl(folder / METRICS), about["micro_size"], about["scaler"])

    def save(self, state: TrainState) -> None:
        """Write a checkpoint; those before the last good one go once it has been read back whole.

        Raises ArtefactError naming the path where the disk refuses; the earlier checkpoints are then untouched.
        """
        with writing(self._at(state.step), self.made_from) as draft:
            draft.about.update(step=state.step, micro_size=state.micro_size, scaler=state.scaler)
            save_file(state.weights, draft.folder / WEIGHTS)
            save_file(state.optimizer, draft.folder / OPTIMIZER)
            write_jsonl(draft.folder / METRICS, state.rows)
        load_manifest(self._at(state.step))
        for step in [step for step in self.steps() if step < state.step][: 1 - KEPT]:
            shutil.rmtree(self._at(step), ignore_errors=True)

    def begin_log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin the log again with the rows so far: those after the checkpoint that is gone on from will come again."""
        write_text(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append an update's metrics to the log, to be read while the training runs and after it failed."""
        path = self.folder / METRICS
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        except OSError as error:
            raise refused(path, error) from error

    def discard(self) -> None:
        """Remove the checkpoints of this training, now that its artefact is whole; those of another one stay."""
        steps = self.steps()
        try:
            manifest = load_manifest(self._at(steps[-1])) if steps else None
        except ArtefactError:
            return
        if manifest and manifest["made_from"] == self.made_from:
            shutil.rmtree(self.folder, ignore_errors=True)
