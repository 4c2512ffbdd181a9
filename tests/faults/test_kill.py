"""1 Kill anywhere: SIGKILL in the middle of an update, and the run goes on bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL, which Windows lacks")


def kill(kind, folder, kills):
    worker = Path(__file__).with_name("kill_worker.py")
    result = subprocess.run(
        [sys.executable, str(worker), kind, str(folder), ",".join(map(str, kills))],
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"update"')]
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert [line["update"] for line in lines] == list(kills)
    assert all(line["killed"] == -signal.SIGKILL for line in lines), "each run was really killed"
    return sum(line["same"] for line in lines)


@pytest.mark.slow(35)
def test_killed_at_each_of_30_updates_with_dropout_on(tmp_path, survived):
    """Losses, weights and optimiser tensors equal those of a run that nobody killed, across six epochs."""
    same = kill("tiny", tmp_path, range(1, 31))
    survived("1 kills survived bit for bit: tiny GPT-2, dropout on, plain path", same, 30)


@pytest.mark.slow(35)
def test_killed_on_the_fast_path_of_the_embedded_model(tmp_path, survived, is_long):
    kills = range(1, 31) if is_long else (17,)
    same = kill("mini", tmp_path, kills)
    survived("1 kills survived bit for bit: embedded GPT-2, fast path, evaluations between", same, len(kills))
