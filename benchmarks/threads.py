"""What waiting threads cost: `python -m benchmarks.threads` (two minutes, on a quiet machine).

A loop of small matrix products on all cores, in a process of its own: with OpenMP's default, whose threads spin while
they wait, and with OMP_WAIT_POLICY=passive, which the package sets; alone, and beside one other busy process. Rounds
per second, alternating, medians; the result is in benchmarks/results/threads.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

RESULT = Path(__file__).parent / "results" / "threads.json"
REPEATS = 5
LOOP = """
import time, torch
a, b = torch.randn(128, 256), torch.randn(256, 512)
for _ in range(50):
    (a @ b).relu()
started, rounds = time.perf_counter(), 0
while time.perf_counter() - started < 3:
    for _ in range(20):
        (a @ b).relu()
    rounds += 20
print(rounds / (time.perf_counter() - started))
"""


def rounds(policy: str | None, is_alone: bool) -> float:
    """Rounds per second of the loop, in a process with this waiting policy."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    env |= {"OMP_WAIT_POLICY": policy} if policy else {}
    other = None if is_alone else subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        run = subprocess.run([sys.executable, "-c", LOOP], env=env, capture_output=True, text=True, check=True)
    finally:
        if other:
            other.kill()
    return float(run.stdout)


def main() -> None:
    """Measure, print and keep."""
    cases = [(policy, is_alone) for is_alone in (True, False) for policy in (None, "passive")]
    found: dict[tuple[str | None, bool], list[float]] = {case: [] for case in cases}
    for _ in range(REPEATS):
        for case in cases:
            found[case].append(rounds(*case))
    middle = {case: median(values) for case, values in found.items()}
    where = {True: "alone", False: "beside a busy process"}
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "rounds per second": {f"{case[0] or 'default'}, {where[case[1]]}": middle[case] for case in cases},
        "passive / default": {where[alone]: middle["passive", alone] / middle[None, alone] for alone in (True, False)},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
