"""Ten seeded bugs each fail a unit test and a check in a notebook: `python tests/faults/seeded_bugs.py`, run and read."""

import os
import subprocess
import sys

import pytest
from seeded_bugs import BUGS

from conftest import ROOT


@pytest.mark.slow(120)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script copies its process, which Windows cannot")
def test_every_seeded_bug_is_found_twice_and_the_package_itself_passes(survived):
    result = subprocess.run(
        [sys.executable, "tests/faults/seeded_bugs.py"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    lines = [line for line in result.stdout.splitlines() if line[:3] in ("ok ", "BAD")]
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    found = sum("failed" in line for line in lines)
    survived("10 seeded bugs found, by a unit test and by a notebook's check", found, 2 * len(BUGS))
    assert len(BUGS) == 10
    assert sum(line.startswith("ok  no bug") or line.startswith("ok no bug") for line in lines) >= 5
