"""What happens after an update in a run on disk: evaluate, log, save, and stop when a signal asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..training import MetricsRow, Watch
from . import processes
from .checkpoints import Checkpoints, TrainState
from .gradients import NotFinite
from .signals import Interrupted

Evaluate = Callable[[Any, int], MetricsRow]  # (model, updates done) -> what a held-out row of the curve says


class RunWatch(Watch):
    """The `watch` of a training whose state is kept on disk.

    evaluate is called before the first update, then about `evaluations` times, the last after the last update.
    asked_to_stop gives the number of a signal that came, or 0: then the state is saved and `Interrupted` is raised.
    """

    def __init__(
        self,
        name: str,
        checkpoints: Checkpoints,
        asked_to_stop: Callable[[], int],
        evaluate: Evaluate | None = None,
        evaluations: int = 8,
    ):
        self.name, self.checkpoints, self.asked_to_stop = name, checkpoints, asked_to_stop
        self.evaluate, self.evaluations = evaluate, evaluations

    def begin(self, model: Any, optimizer: torch.optim.Optimizer, gradient: Any, total: int) -> list[MetricsRow]:
        """As `Watch`: go on from the newest checkpoint, if there is one. gradient: an `InParts`."""
        self.model, self.optimizer, self.gradient, self.total = model, optimizer, gradient, total
        self.points = evaluation_points(total, self.evaluations)
        self.named = {key: p for key, p in model.named_parameters() if p.requires_grad}
        state = self.checkpoints.newest()
        rows = self._restore(state) if state else []
        if processes.is_main():
            self.checkpoints.begin_log(rows)
        if self.evaluate and not rows:
            self._note(rows, {"step": 0, "epoch": 0, "split": "held_out", **self.evaluate(model, 0)})
        return rows

    def updated(self, rows: list[MetricsRow]) -> None:
        """As `Watch`."""
        row = rows[-1]
        self._log(row)
        if self.evaluate and row["step"] in self.points:
            point = self.evaluate(self.model, row["step"])
            self._note(rows, {"step": row["step"], "epoch": row["epoch"], "split": "held_out", **point})
        done = row["step"]
        stop = processes.from_first(self.asked_to_stop())  # of several processes, the first one's counts
        due = done % self.checkpoints.every == 0 or done == self.total  # what follows may take long too
        if stop or due:
            if processes.is_main():
                self.checkpoints.save(self._state(done, rows))
            stop = stop or processes.from_first(self.asked_to_stop())  # asked while the checkpoint was written
        if stop:
            raise Interrupted(
                f"{self.name}: interrupted after update {done} of {self.total}, saved in {self.checkpoints.folder}; "
                "run the same again to go on (without --fresh or --no-resume)",
                stop,
            )

    def failed(self, error: NotFinite) -> None:
        """Note in the log which update could not be made; its row says NaN."""
        self._log({"step": error.step + 1, "split": "train", error.what: math.nan, "rows": error.rows})

    def _note(self, rows: list[MetricsRow], row: MetricsRow) -> None:
        rows.append(row)
        self._log(row)

    def _log(self, row: MetricsRow) -> None:
        if processes.is_main():
            self.checkpoints.log(row)

    def _restore(self, state: TrainState) -> list[MetricsRow]:
        with torch.no_grad():
            for key, parameter in self.named.items():
                parameter.copy_(state.weights[key])
        moments: dict[int, dict[str, Tensor]] = {}
        for number, key in enumerate(self.named):
            of_key = {k: v for k, v in state.optimizer.items() if k.rpartition("/")[0] == key}
            moments[number] = {k.rpartition("/")[2]: v for k, v in of_key.items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.gradient.micro_size = min(state.micro_size, self.gradient.micro_size)
        if state.scaler:
            self.gradient.scaler.load_state_dict(state.scaler)
        return list(state.rows)

    def _state(self, step: int, rows: list[MetricsRow]) -> TrainState:
        """What has to be kept to go on from here."""
        weights = {key: parameter.detach().cpu().contiguous() for key, parameter in self.named.items()}
        moments = {
            f"{key}/{k}": torch.as_tensor(v).cpu().contiguous()
            for key, parameter in self.named.items()
            for k, v in self.optimizer.state[parameter].items()
        }
        return TrainState(step, weights, moments, rows, self.gradient.micro_size, self.gradient.scaler.state_dict())


class Points(Watch):
    """The `watch` of a training that is not kept: `evaluate` before it, after every `every`-th update and the last."""

    def __init__(self, evaluate: Evaluate, every: int):
        self.evaluate, self.every = evaluate, every

    def begin(self, model: Any, optimizer: torch.optim.Optimizer, gradient: Any, total: int) -> list[MetricsRow]:
        """As `Watch`."""
        self.model, self.total = model, total
        return [{"step": 0, "epoch": 0, "split": "held_out", **self.evaluate(model, 0)}]

    def updated(self, rows: list[MetricsRow]) -> None:
        """As `Watch`."""
        step, epoch = rows[-1]["step"], rows[-1]["epoch"]
        if step % self.every == 0 or step == self.total:
            rows.append({"step": step, "epoch": epoch, "split": "held_out", **self.evaluate(self.model, step)})


def evaluation_points(updates: int, evaluations: int) -> set[int]:
    """The updates after which to evaluate: `evaluations` of them at even distances, the last one among them."""
    return {round(updates * k / evaluations) for k in range(1, evaluations + 1)}
