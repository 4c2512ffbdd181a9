"""Ten seeded bugs each fail a unit test and a check in a notebook: `python tests/faults/seeded_bugs.py`, run and read."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from seeded_bugs import BUGS, copy_package

from conftest import ROOT


@pytest.mark.slow(120)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script copies its process, which Windows cannot")
def test_every_seeded_bug_is_found_twice_and_the_package_itself_passes(survived):
    result = subprocess.run(
        [sys.executable, "tests/faults/seeded_bugs.py"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    verdicts = {}
    for name, where, verdict in re.findall(r"^(?:ok |BAD) (.{20}) (\S+) +(\w+)", result.stdout, re.MULTILINE):
        verdicts.setdefault(name.strip(), {})[where] = verdict
    everywhere = {"tests", *(bug.notebook for bug in BUGS)}
    assert verdicts.pop("no bug", None) == dict.fromkeys(everywhere, "passed"), result.stdout[-3000:]
    found = {bug.name: {"tests": "failed", bug.notebook: "failed"} for bug in BUGS}
    assert verdicts == found, result.stdout[-3000:] + result.stderr[-1000:]
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    survived("10 seeded bugs found, by a unit test and by a notebook's check", 2 * len(verdicts), 2 * len(found))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_put_where_it_belongs_and_nowhere_else(bug, tmp_path):
    """One line of one file differs; a bug whose line has moved is an error, not a bug that nobody finds."""
    package = copy_package(tmp_path / "buggy", bug) / "dpo_helpers"
    changed = [p for p in package.rglob("*.py") if p.read_text() != (ROOT / p.relative_to(package.parent)).read_text()]
    assert changed == [package / bug.file]
    before, after = (path.read_text().splitlines() for path in (ROOT / "dpo_helpers" / bug.file, changed[0]))
    assert sum(a != b for a, b in zip(before, after, strict=True)) == len(bug.changes)
    with pytest.raises(AssertionError, match=f"{bug.name}: 0 lines of {bug.file} hold 'gone'"):
        copy_package(tmp_path / "moved", replace(bug, changes=(("gone", ""),)))
