"""Run notebooks in order, backwards, and the last one once more: `python order_worker.py FOLDER "03 05"`. Prints JSON."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from forks import in_a_fork
from seeded_bugs import SMALL, prepare, run_notebook

ROOT = Path(__file__).parents[2]


def run(name: str, runs: Path) -> None:
    points = {"CURVE_POINTS": "2"}  # one on the way of each training, which notebook 6 reads
    os.environ.update({f"DPO_{key}": value for key, value in (SMALL | points).items()})
    os.environ["DPO_RUNS_DIR"] = str(runs)
    os.environ["MPLBACKEND"] = "Agg"
    status = run_notebook(name)
    assert status == 0, f"{name} failed"


def results(runs: Path) -> dict[str, dict[str, str]]:
    """What the artefacts of a run hold: hashes of their files, but for manifests and times."""
    found = {}
    for manifest in sorted(runs.rglob("manifest.json")):
        files = json.loads(manifest.read_text())["files"]
        name = manifest.parent.relative_to(runs).as_posix().removeprefix("mini/")
        found[name] = {key: value for key, value in files.items() if key not in ("metrics.jsonl", "README.md")}
        rows = manifest.parent / "metrics.jsonl"
        if rows.is_file():
            plain = [json.loads(line) for line in rows.read_text().splitlines()]
            found[name]["metrics"] = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in plain])
    return found


def main(folder: Path, numbers: list[str]) -> None:
    torch.set_num_threads(1)
    prepare()  # what is slow to import, once for all forks
    import_module("dpo_helpers.show.figures")
    import_module("dpo_helpers.run.stages")
    names = [next((ROOT / "notebooks").glob(f"{number}_*.ipynb")).stem for number in numbers]
    for order, runs in ((names, folder / "forward"), (names[::-1], folder / "backward")):
        for name in order:
            assert in_a_fork(lambda n=name, r=runs: run(n, r)) == 0, name
    forward, backward = results(folder / "forward"), results(folder / "backward")
    made = {p: p.stat().st_mtime_ns for p in (folder / "backward").rglob("manifest.json")}
    assert in_a_fork(lambda: run(names[-1], folder / "backward")) == 0, "the one that uses most of the others"
    again = {p: p.stat().st_mtime_ns for p in (folder / "backward").rglob("manifest.json")}
    made_again = [str(p.relative_to(folder)) for p in again if made.get(p) != again[p]]
    twice = results(folder / "backward")
    print(json.dumps({"forward": forward, "backward": backward, "twice": twice, "made_again": made_again}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split())
