"""Ten bugs that DPO code really has had, put into a copy of the package one at a time: who notices?

    python tests/faults/seeded_bugs.py

Each must fail at least one unit test and at least one check in a notebook. Every attempt runs in a process of its own
that starts as a copy of this one, so torch is imported once. The unchanged package goes first and must pass everything.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = {
    "MAX_PAIRS": "24", "HELD_OUT_PAIRS": "12", "PROMPTS": "4", "MAX_NEW_TOKENS": "6", "EPOCHS": "1", "BATCH_SIZE": "8",
    "BETAS": "0.5,5", "WARMUP_STEPS": "1", "CURVE_PROMPTS": "2", "CURVE_POINTS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Bug:
    """A bug: its name, what is replaced by what in which file, the unit test and the notebook that must fail."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    test: str
    notebook: str


BUGS = (
    Bug("sign", "losses.py",
        (("right, wrong = -logsigmoid(beta * h), -logsigmoid(-beta * h)", "wrong, right = -logsigmoid(beta * h), -logsigmoid(-beta * h)"),),
        "test_losses.py::test_literals", "04_dpo_loss_derivation"),
    Bug("beta twice", "losses.py", (("h = chosen_logratios - rejected_logratios", "h = 2 * (chosen_logratios - rejected_logratios)"),),
        "test_losses.py::test_literals", "04_dpo_loss_derivation"),
    Bug("mask off by one", "tokens.py", ((">= torch.tensor([[len(prompt)]", "> torch.tensor([[len(prompt)]"),),
        "test_tokens.py", "02_reference"),
    Bug("sides swapped", "logprobs.py", (("chosen, rejected = sums.chunk(2)", "rejected, chosen = sums.chunk(2)"),),
        "test_logprobs.py", "02_reference"),
    Bug("reference = policy", "training.py",
        (("chosen, rejected, ref.chosen, ref.rejected,", "chosen, rejected, chosen.detach(), rejected.detach(),"),),
        "test_training.py::test_dpo_learns_the_pairs", "05_dpo_training"),
    Bug("detach missing", "losses.py",
        (("beta * chosen_logratios.detach(), beta * rejected_logratios.detach()", "beta * chosen_logratios, beta * rejected_logratios"),),
        "test_losses.py::test_rewards_carry_no_gradient", "04_dpo_loss_derivation"),
    Bug("mean for sum", "logprobs.py",
        (("* response_mask[:, 1:]).sum(dim=-1)", "* response_mask[:, 1:]).sum(dim=-1) / response_mask.sum(dim=-1)"),),
        "test_logprobs.py", "02_reference"),
    Bug("end of text masked", "tokens.py",
        (("in_response = attention.bool() &", "in_response = attention.bool() & (ids != pad_id) &"),),
        "test_tokens.py", "02_reference"),
    Bug("warm-up off by one", "training.py", (("(step + 1) / (warmup_steps + 1)", "step / (warmup_steps + 1)"),),
        "test_training.py::test_warmup_literals", "03_sft"),
    Bug("KL the other way", "evaluation.py", (("(log_p.exp() * (log_p - log_q))", "(log_q.exp() * (log_q - log_p))"),),
        "test_kl.py", "04_dpo_loss_derivation"),
)  # fmt: skip


@dataclass
class Outcome:
    """What an attempt came to: "passed", "failed" (a test, or a check of a notebook) or "broken" (anything else)."""

    verdict: str
    output: str = field(repr=False)

    def last_line(self) -> str:
        """The line that says what failed."""
        lines = [line for line in self.output.splitlines() if line.startswith(("E  ", "AssertionError"))]
        return (lines or self.output.splitlines() or [""])[-1 if not lines else 0].strip()


def copy_package(target: Path, bug: Bug | None) -> Path:
    """A copy of the package in target/, with the bug in it; every replaced text must occur exactly once."""
    shutil.copytree(ROOT / "dpo_helpers", target / "dpo_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    if bug:
        path = target / "dpo_helpers" / bug.file
        text = path.read_text(encoding="utf-8")
        for old, new in bug.changes:
            # a docstring may hold the same formula; the code must hold it once
            code = [line for line in text.split("\n") if old in line and '"""' not in line]
            assert len(code) == 1, f"{bug.name}: {len(code)} lines of {bug.file} hold {old!r}"
            text = text.replace(code[0], code[0].replace(old, new))
        path.write_text(text, encoding="utf-8")
    return target


def run_tests(nodes: list[str]) -> int:
    """Exit status of these unit tests: 0 passed, 1 failed, more: broken."""
    import pytest

    return int(
        pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--tb=short", *(str(ROOT / "tests" / n) for n in nodes)])
    )


def run_notebook(name: str) -> int:
    """Run the code cells of a notebook in this process, set-up apart: 0 to the end, 1 where one of its checks fails."""
    from functools import partial

    import nbformat

    from dpo_helpers.run import machine

    machine.median_seconds = partial(machine.median_seconds, repeats=1)  # a time is not what is tested here
    namespace = {"__name__": "__main__"}
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in [cell for cell in notebook.cells if cell.cell_type == "code"][1:]:
        try:
            exec(compile(cell.source, name, "exec"), namespace)
        except AssertionError as error:
            print(f"AssertionError: {error}")
            return 1
    return 0


def attempt(package: Path, work: Path, what: str, *arguments: object) -> Outcome:
    """Run `run_tests` or `run_notebook` in a copy of this process that imports the package from `package`."""
    log = work / "log.txt"
    child = os.fork()
    if child == 0:
        status = 99
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
            for key in [key for key in os.environ if key.startswith("DPO_")]:
                del os.environ[key]
            if what == "notebook":
                os.environ.update({f"DPO_{key}": value for key, value in SMALL.items()})
                os.environ["DPO_RUNS_DIR"] = str(work / "runs")
            sys.path.insert(0, str(package))
            import dpo_helpers

            assert Path(dpo_helpers.__file__).is_relative_to(package), "the copy must be what is imported"
            status = run_tests(*arguments) if what == "tests" else run_notebook(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, code = os.waitpid(child, 0)
    verdict = {0: "passed", 1: "failed"}.get(os.waitstatus_to_exitcode(code), "broken")
    return Outcome(verdict, log.read_text(encoding="utf-8", errors="replace"))


def prepare() -> None:
    """Import what is slow once, before the copies are made; nothing of the package itself."""
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")
    for name in (
        "datasets", "filelock", "huggingface_hub", "hypothesis.strategies", "IPython.display", "jinja2", "matplotlib.pyplot",
        "nbformat", "pytest", "seaborn", "torch", "transformers.models.auto.tokenization_auto",
        "transformers.models.gpt2.modeling_gpt2", "transformers.generation.utils",
    ):  # fmt: skip
        import_module(name)
    assert "dpo_helpers" not in sys.modules, "the copies must import their own"


def outcomes(bug: Bug | None) -> dict[str, Outcome]:
    """The unit test and the notebook of a bug, run with it; for None, all of them with the package as it is."""
    bugs = [bug] if bug else list(BUGS)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        package = copy_package(work / "package", bug)
        tests = sorted({b.test for b in bugs})
        found["tests"] = attempt(package, work, "tests", tests)
        for notebook in sorted({b.notebook for b in bugs}):
            found[notebook] = attempt(package, work, "notebook", notebook)
    return found


def main() -> int:
    """Try all; print a line each; 0 if the package passes and every bug is found twice."""
    prepare()
    good = True
    for bug in (None, *BUGS):
        for where, outcome in outcomes(bug).items():
            expected = "failed" if bug else "passed"
            good &= outcome.verdict == expected
            mark = "ok " if outcome.verdict == expected else "BAD"
            why = outcome.last_line() if outcome.verdict != "passed" else ""
            print(
                f"{mark} {bug.name if bug else 'no bug':20s} {where:24s} {outcome.verdict:7s} {why[:110]}", flush=True
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
