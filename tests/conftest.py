"""Shared fixtures: a tiny random GPT-2, the embedded tokenizer, a settings factory, the shared data folder."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the package does, and like it before torch is loaded
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
for name in [key for key in os.environ if key.startswith("DPO_")]:
    del os.environ[name]  # a setting from outside would change what the tests expect

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_helpers.device import Compute
from dpo_helpers.settings import load_settings

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def tiny_gpt2(seed: int = 0, vocab: int = 50, blocks: int = 3, positions: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab, n_positions=positions, n_embd=16, n_layer=blocks, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # GPT-2's initial weights are so small that all logits would be almost equal
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="tests/faults at their full counts, test_gpu.py with all notebooks"
    )


COUNTS: list[tuple[str, int, int]] = []


@pytest.fixture
def survived():
    """Asserts that all of a count were survived, and has the count printed at the end of the tests."""

    def say(what: str, count: int, of: int) -> None:
        COUNTS.append((what, count, of))
        assert count == of, f"{what}: {count} of {of}"

    return say


@pytest.fixture(scope="session")
def is_long(request) -> bool:
    return bool(request.config.getoption("--long"))


def pytest_collection_modifyitems(items):
    """The slowest files first, so that no test process is left alone with a long one at the end: slow(seconds)."""
    seconds: Counter = Counter()
    for item in items:
        for marker in item.iter_markers("slow"):
            seconds[item.path] += marker.args[0] if marker.args else 10
    items.sort(key=lambda item: -seconds[item.path])


def pytest_sessionfinish(session):
    """With several test processes (xdist) each hands its counts to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = COUNTS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    COUNTS.extend(getattr(node, "workeroutput", {}).get("counts", []))


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        terminalreporter.section("what it survived")
        for what, count, of in sorted(COUNTS):
            terminalreporter.line(f"{count:6d} of {of:6d}  {what}")


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return tiny_gpt2()


@pytest.fixture(scope="session")
def cpu() -> Compute:
    return Compute(torch.device("cpu"), "fp32")


@pytest.fixture(scope="session")
def tokenizer():
    from dpo_helpers.run.loading import load_tokenizer

    return load_tokenizer(load_settings("mini"))


SMALL = {
    "max_pairs": 24, "held_out_pairs": 12, "prompts": 4, "max_new_tokens": 6, "epochs": 1, "batch_size": 8,
    "betas": (0.5, 5.0), "warmup_steps": 1,
}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """The mini profile, cut down so that a stage takes a second."""
    return load_settings("mini", runs_dir=str(tmp_path / "runs"), **SMALL)


@pytest.fixture(scope="session")
def hh_slice() -> Path:
    path = SHARED / "data/hh-rlhf/harmless-base-slice.jsonl.gz"
    if not path.is_file():
        pytest.skip("real HH-RLHF pairs are not beside this checkout (../shared/data/hh-rlhf)")
    return path
