"""Save a checkpoint while the disk fails or the process dies: `python saving_worker.py FOLDER`.

Run by test_saving.py in a process of its own. Each attempt is a fork that meets a fault at one point of saving: before an
operation that changes the disk, or halfway through a write. Prints a line of JSON per attempt.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from forks import in_a_fork

from dpo_helpers.errors import ArtefactError
from dpo_helpers.run import checkpoints
from dpo_helpers.run.checkpoints import Checkpoints, TrainState
from dpo_helpers.run.disk import load_manifest

MODES = {"kill": None, "disk full": errno.ENOSPC, "read-only": errno.EROFS}


class Faults:
    """Counts the operations that change the disk; from point number `at` on each of them fails, or the process dies."""

    def __init__(self, at: int, mode: str):
        self.at, self.mode, self.points = at, mode, 0

    def point(self, finish_half=lambda: None) -> None:
        self.points += 1
        if self.points < self.at:
            return
        if self.points == self.at:
            finish_half()
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(MODES[self.mode], os.strerror(MODES[self.mode]))

    def around(self, module, name: str) -> None:
        real = getattr(module, name)

        def faulty(*arguments, **more):
            self.point()
            return real(*arguments, **more)

        setattr(module, name, faulty)

    def install(self) -> None:
        for name in ("mkdir", "chmod", "fsync", "replace", "rename"):
            self.around(os, name)
        real_open, real_save = io.open, checkpoints.save_file

        def faulty_open(file, mode="r", *arguments, **more):
            if not set(mode) & set("wax"):
                return real_open(file, mode, *arguments, **more)
            self.point()
            stream = real_open(file, mode, *arguments, **more)
            write = stream.write

            def faulty_write(data):
                self.point(lambda: (write(data[: len(data) // 2]), stream.flush()))
                return write(data)

            stream.write = faulty_write
            return stream

        def faulty_save(tensors, path):
            self.point()
            real_save(tensors, path)
            self.point(lambda: os.truncate(path, os.path.getsize(path) // 2))

        io.open, checkpoints.save_file = faulty_open, faulty_save


def state(step: int) -> TrainState:
    weights = {f"layer.{n}": torch.full((16, 16), float(step + n)) for n in range(3)}
    moments = {f"{name}/square_avg": tensor / 2 for name, tensor in weights.items()}
    rows = [{"step": s, "loss": 0.5 / s} for s in range(1, step + 1)]
    return TrainState(step, weights, moments, rows, 4, {})


def save_with_fault(folder: Path, faults: Faults) -> None:
    training = Checkpoints(folder / "dpo", {"beta": 0.5})
    faults.install()
    try:
        training.save(state(30))
    except ArtefactError as error:
        names_it = "step-000030" in str(error) and "--runs-dir" in str(error)  # the path, and the next thing to do
        sys.exit(3 if names_it else 4)


def prepare(folder: Path) -> Path:
    training = Checkpoints(folder / "dpo", {"beta": 0.5})
    for step in (10, 20):
        training.save(state(step))
    return folder


def newest_is_whole(folder: Path) -> int:
    """The step of the newest checkpoint, after checking that it is exactly what was saved then."""
    training = Checkpoints(folder / "dpo", {"beta": 0.5})
    for step in training.steps():
        assert load_manifest(training.folder / f"step-{step:06d}"), "no partial checkpoint has a checkpoint's name"
    found = training.newest()
    assert found, "a checkpoint is left"
    expected = state(found.step)
    assert found.rows == expected.rows
    for got, want in ((found.weights, expected.weights), (found.optimizer, expected.optimizer)):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
    halves = [p.name for p in training.folder.iterdir() if p.name.startswith(".step")]
    assert not halves, f"what was half-written is gone: {halves}"
    return found.step


def attempt(folder: Path, mode: str, at: int, run=None) -> None:
    prepare(folder)
    status = in_a_fork(run or (lambda: save_with_fault(folder, Faults(at, mode))))
    step = newest_is_whole(folder)
    print(json.dumps({"mode": mode, "point": at, "status": status, "newest": step}), flush=True)


def too_small(folder: Path) -> None:
    """The system itself refuses: no file may grow past 1,000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    save_with_fault(folder, Faults(10**9, "kill"))


def as_nobody(folder: Path) -> None:
    """A folder that belongs to somebody else."""
    for path in (folder, folder / "dpo.unfinished"):
        path.chmod(0o555)
    if os.getuid() == 0:
        os.setuid(65534)
    save_with_fault(folder, Faults(10**9, "kill"))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    counter = Faults(10**9, "kill")
    prepare(folder / "count")

    def count() -> None:
        save_with_fault(folder / "count", counter)
        (folder / "points").write_bytes(str(counter.points).encode())

    assert in_a_fork(count) == 0
    points = int((folder / "points").read_text())
    for mode in MODES:
        for at in range(1, points + 1):
            place = folder / f"{mode}-{at}"
            attempt(place, mode, at)
            shutil.rmtree(place)
    folder.chmod(0o755)
    attempt(folder / "rlimit", "file size limit", 0, lambda: too_small(folder / "rlimit"))
    attempt(folder / "nobody", "folder of another user", 0, lambda: as_nobody(folder / "nobody"))
    with suppress(OSError):
        (folder / "nobody/dpo.unfinished").chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
