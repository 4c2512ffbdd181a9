"""Where the time of the whole course goes: `python -m benchmarks.course`.

All notebooks are executed in order with the mini profile and from an empty runs folder, as `make course` does it. In
each kernel the functions of PARTS are timed: a part has the time that is spent in it and in none of the parts that it
calls. What cells do besides is "other", and what no cell does "a kernel's start and end".
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.dpo_vs_trl import RESULTS, _machine
from dpo_helpers.run.course import execute, notebooks_dir, notebooks_in

PARTS = {
    "updates of trainings": ["training.train", "lesson.faulty.train_faulty"],
    "sampling": ["generation.continued"],
    "KL of samples": ["run.sampled.response_kls"],
    "scoring pairs": ["evaluation.score_pairs"],
    "hashing weights and files": ["models.weights_hash", "run.disk.file_hash", "run.disk.json_hash"],
    "checkpoints and models on disk": [
        "run.checkpoints.Checkpoints.save", "run.loading.load_model", "run.loading.load_saved",
        "run.loading.load_tokenizer", "run.loading.save_model",
    ],
    "reading and tokenising data": ["run.pairs.load_pairs", "run.pairs.fit_pairs", "run.artefacts.read_jsonl"],
    "figures": ["show.figures.canvas.new", "show.figures.canvas.finish"],
    "exercises' checks": ["lesson.exercises.check", "lesson.exercises.running.limited"],
    "tabular laboratory": ["worlds.tabular.fit", "worlds.tabular.follow"],
}  # fmt: skip
IMPORTS, START, OTHER = "imports", "a kernel's start and end", "other"

# runs in each kernel before its first cell
_TIMERS = """
import atexit, collections, functools, importlib, json, sys, time
inside, now = collections.Counter(), time.perf_counter
calls = []  # of what is being called, the seconds that its own calls took
def timed(part, function):
    @functools.wraps(function)
    def call(*arguments, **more):
        calls.append(0.0)
        started = now()
        try:
            return function(*arguments, **more)
        finally:
            took = now() - started
            inside[part] += took - calls.pop()
            if calls:
                calls[-1] += took
    return call
started = now()
found = []
for part, names in json.loads({parts!r}).items():
    for name in names:
        where, _, attribute = name.rpartition(".")
        try:
            owner = importlib.import_module("dpo_helpers." + where)
        except ModuleNotFoundError:
            module, _, kind = where.rpartition(".")
            owner = getattr(importlib.import_module("dpo_helpers." + module), kind)
        found.append((owner, attribute, getattr(owner, attribute), part))
for owner, attribute, function, part in found:
    new = timed(part, function)
    setattr(owner, attribute, new)
    for module in [m for n, m in sys.modules.items() if n.startswith("dpo_helpers")]:
        for key in [key for key, value in vars(module).items() if value is function]:
            setattr(module, key, new)
inside[{imports!r}] = now() - started
cells = []
get_ipython().events.register("pre_run_cell", lambda *_: cells.append(now()))
get_ipython().events.register("post_run_cell", lambda *_: cells.append(now() - cells.pop()))
atexit.register(lambda: open({log!r}, "w").write(json.dumps([inside, cells])))
"""


def seconds_of(source: Path, folder: Path) -> tuple[Counter[str], list[float]]:
    """Execute a notebook: the seconds of each part, and of each cell. folder: for the copy, timers and their log."""
    startup, log = folder / "ipython/profile_default/startup", folder / "log.json"
    startup.mkdir(parents=True, exist_ok=True)
    script = _TIMERS.format(parts=json.dumps(PARTS), imports=IMPORTS, log=str(log))
    (startup / "00-timers.py").write_text(script, encoding="utf-8")
    os.environ["IPYTHONDIR"] = str(folder / "ipython")
    whole = execute(source, folder / source.name, "mini")
    inside, cells = json.loads(log.read_text(encoding="utf-8"))
    parts = Counter(inside)
    parts[OTHER] = sum(cells) - (sum(inside.values()) - inside[IMPORTS])
    parts[START] = whole - sum(parts.values())
    return parts, cells


def main() -> None:
    """Execute all notebooks, print the table and write results/course.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beyond", action="store_true", help="the notebooks of notebooks/beyond/ too")
    beyond, rows = parser.parse_args().beyond, {}
    with tempfile.TemporaryDirectory() as made:
        os.environ["DPO_RUNS_DIR"] = str(Path(made) / "runs")
        for source in notebooks_in(notebooks_dir(), beyond=beyond):
            parts, cells = seconds_of(source, Path(made))
            rows[source.stem] = {"parts": parts, "cells": cells}
            print(f"{source.stem}: {sum(parts.values()):.0f} s", flush=True)
    total = sum((row["parts"] for row in rows.values()), Counter())
    machine, whole = _machine("cpu"), sum(total.values())
    print(f"\n{machine}; {whole:.0f} s\n\n| part | {' | '.join(name[:2] for name in rows)} | all, s | share |")
    print("|---|" + "---|" * (len(rows) + 2))
    for part, seconds in total.most_common():
        each = " | ".join(f"{row['parts'][part]:.1f}" for row in rows.values())
        print(f"| {part} | {each} | {seconds:.1f} | {seconds / whole:.1%} |")
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": machine, "seconds": whole, "notebooks": rows}
    (RESULTS / "course.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
