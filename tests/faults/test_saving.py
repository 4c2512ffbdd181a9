"""2 Kill while saving: the newest checkpoint is whole whatever happens, and an error names the path."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL, which Windows lacks")


@pytest.fixture(scope="module")
def attempts():
    folder = tempfile.mkdtemp()  # not tmp_path, whose parents other users may not enter
    try:
        result = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("saving_worker.py")), folder],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"mode"')]


def test_a_death_at_every_point_of_saving(attempts, survived):
    """Before each mkdir, open, write, fsync and rename, and halfway through each write."""
    killed = [a for a in attempts if a["mode"] == "kill"]
    whole = sum(a["status"] == -signal.SIGKILL and a["newest"] in (20, 30) for a in killed)
    survived("2 deaths while saving, newest checkpoint whole", whole, len(killed))
    assert len(killed) >= 20
    assert {a["newest"] for a in killed} == {20, 30}, "before the rename the old one, after it the new one"


@pytest.mark.parametrize("mode", ["disk full", "read-only"])
def test_a_refusing_disk_at_every_point_of_saving(attempts, survived, mode):
    """From each point on every operation fails: one ArtefactError that names the path (status 3)."""
    refused = [a for a in attempts if a["mode"] == mode]
    good = sum(a["status"] == 3 and a["newest"] in (20, 30) for a in refused)
    survived(f"2 {mode} while saving: error names the path, newest checkpoint whole", good, len(refused))
    assert sum(len([a for a in attempts if a["mode"] == m]) for m in ("kill", "disk full", "read-only")) >= 50


@pytest.mark.parametrize("mode", ["file size limit", "folder of another user"])
def test_a_refusal_by_the_system_itself(attempts, mode):
    """Not injected: the kernel refuses, also in the middle of what safetensors writes."""
    (found,) = [a for a in attempts if a["mode"] == mode]
    assert (found["status"], found["newest"]) == (3, 20)
