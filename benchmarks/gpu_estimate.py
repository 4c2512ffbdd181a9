"""What a GPU would change for the notebooks, estimated on a machine that has none: `python -m benchmarks.gpu_estimate`.

All notebooks are executed in order, twice, with the mini profile and from an empty runs folder: as they are, on the
CPU, and on the tests' pretended GPU (`tests/pretend_gpu.py`), which counts and times the operations that a GPU would
take over. What lies between them (Python, tokens, files, figures, the sampler's bookkeeping) stays on the CPU. The
embedded model is so small that a GPU needs for each operation what it takes to launch it:

    estimate = seconds on the CPU - seconds in these operations + operations · LAUNCH

An estimate, no measurement: run `make course` on a GPU for the real ones.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.dpo_vs_trl import RESULTS, _machine
from dpo_helpers.run.course import execute, notebooks_dir, notebooks_in

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pretend_gpu import pretending_kernels

LAUNCH = 20e-6  # s per operation in PyTorch's eager mode; an assumption: 5 to 10 µs on a fast host, more on Colab's


def is_view(name: str) -> bool:
    """Whether an operation ("aten.view.default") only looks at its tensor in another way: a GPU has nothing to do."""
    _, operation, overload = name.split(".")
    returns = getattr(getattr(torch.ops.aten, operation), overload)._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def row(name: str, seconds: float, ran: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One notebook's line; ran: count and seconds of each operation, as `pretend_gpu` notes them."""
    launched = [operation for operation in ran["count"] if not is_view(operation)]
    operations = sum(ran["count"][operation] for operation in launched)
    inside = sum(ran["seconds"][operation] for operation in launched)
    estimate = seconds - inside + operations * LAUNCH
    return {"notebook": name, "cpu_s": seconds, "inside_s": inside, "operations": operations, "gpu_s": estimate}


def main() -> None:
    """Execute all notebooks both ways, print the table and write results/gpu_estimate.json."""
    sources = notebooks_in(notebooks_dir(), beyond=False)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        os.environ["DPO_RUNS_DIR"] = str(folder / "cpu")
        seconds = [execute(source, folder / source.name, "mini") for source in sources]
        os.environ |= {"DPO_RUNS_DIR": str(folder / "gpu"), "IPYTHONDIR": str(folder / "ipython")}
        log, rows = pretending_kernels(folder / "ipython"), []
        for source, on_cpu in zip(sources, seconds, strict=True):
            execute(source, folder / source.name, "mini")
            rows.append(row(source.stem, on_cpu, json.loads(log.read_text(encoding="utf-8"))))
    machine = _machine("cpu")
    print(f"{machine}; {LAUNCH * 1e6:g} µs per operation\n")
    print("| notebook | s on the CPU | s in operations for a GPU | operations | estimate on a GPU, s |")
    print("|---|---|---|---|---|")
    for r in rows:
        numbers = f"{r['cpu_s']:.0f} | {r['inside_s']:.0f} | {r['operations']:,} | {r['gpu_s']:.0f}"
        print(f"| {r['notebook']} | {numbers} |")
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": machine, "launch_s": LAUNCH, "rows": rows}
    (RESULTS / "gpu_estimate.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
