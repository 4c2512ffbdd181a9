"""What waiting threads cost: `python -m benchmarks.threads` (about ten minutes on a quiet machine).

The same DPO training (320 embedded pairs, 40 updates, the course's loop and fast path) in a process of its own, with
OpenMP's default, whose threads spin while they wait, and with OMP_WAIT_POLICY=passive, which the package sets: alone,
and with a second copy beside it. Alternating, medians; result in benchmarks/results/threads.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

RESULT = Path(__file__).parent / "results" / "threads.json"
REPEATS = 5
# torch is loaded before the package, so that what the package sets comes too late and only the environment counts
WORKER = """
import sys, time
import torch
from dataclasses import replace
from dpo_helpers.lesson.faulty import good_setup, train_faulty
from dpo_helpers.settings import load_settings
good = good_setup(load_settings("mini", runs_dir=sys.argv[1]))
started = time.perf_counter()
train_faulty(good, "training")
print(time.perf_counter() - started)
"""


def start(policy: str | None, runs: str) -> subprocess.Popen[str]:
    """A training in a process of its own; it prints its seconds, set-up left out."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "DPO_"))}
    env |= {"TQDM_DISABLE": "1"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    return subprocess.Popen([sys.executable, "-c", WORKER, runs], env=env, stdout=subprocess.PIPE, text=True)


def seconds(policy: str | None, copies: int, runs: str) -> float:
    """The mean seconds of so many trainings side by side."""
    found = [worker.communicate()[0].split()[-1] for worker in [start(policy, runs) for _ in range(copies)]]
    return sum(map(float, found)) / copies


def main() -> None:
    """Measure, print and keep."""
    cases = [(policy, copies) for copies in (1, 2) for policy in (None, "passive")]
    times: dict[tuple[str | None, int], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as runs:
        seconds("passive", 1, runs)  # makes data and reference, which the others only load
        for _ in range(REPEATS):
            for case in cases:
                times[case].append(seconds(*case, runs))
    middle = {case: median(found) for case, found in times.items()}
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "seconds": {f"{policy or 'default'}, {n} at once": times[policy, n] for policy, n in cases},
        "passive / default, alone": middle["passive", 1] / middle[None, 1],
        "passive / default, two at once": middle["passive", 2] / middle[None, 2],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
