"""Supply: known holes stay closed, every package is pinned and listed with its licence. Each check is seen to fail."""

import os
import re
import shutil
import subprocess
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_packaging import PROJECT

from conftest import ROOT
from dpo_helpers.errors import CourseError
from dpo_helpers.tools.versions import check_versions, installed_versions

FLOORS = {
    "transformers": "5.5", "torch": "2.10", "jupyterlab": "4.6.2", "jupyter-server": "2.18", "nbconvert": "7.17.1",
    "datasets": "4",
}  # fmt: skip
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
LICENCES = (ROOT / "LICENSES.md").read_text()
PIN = re.compile(r"([a-z0-9][a-z0-9-]*)==([\w.]+)( ; .+)?")
EXTRAS = [line for group in PROJECT["optional-dependencies"].values() for line in group]


def pins(constraints=CONSTRAINTS):
    """The pinned (name, version) pairs; a name has several where Pythons differ."""
    return {(pin[1], pin[2]) for pin in map(PIN.fullmatch, constraints.splitlines()) if pin}


def floors_too_low(requirements):
    """Packages that a known hole needs newer than the requirements do, and those without a floor."""
    needs = {need.name: need.specifier for need in map(Requirement, requirements)}
    floors = {name: Version(part.version) for name, parts in needs.items() for part in parts if part.operator == ">="}
    return {name for name, floor in FLOORS.items() if name not in floors or floors[name] < Version(floor)} | (
        needs.keys() - floors.keys()
    )


def faults_of_constraints(constraints):
    """Lines that are no exact pin, and packages of pyproject.toml that are not pinned, or below their floor."""
    faults = {line for line in constraints.splitlines() if not PIN.fullmatch(line)}
    for need in map(Requirement, [*PROJECT["dependencies"], *EXTRAS]):
        found = [pinned for name, pinned in pins(constraints) if name == canonicalize_name(need.name)]
        if not found or not all(map(need.specifier.contains, found)):
            faults.add(need.name)
    return faults


def faults_of_licences(text):
    """Pinned names that no row lists, rows of a version that is not pinned, and rows without a licence."""
    rows = re.findall(r"^\| ([\w.-]+) \| ([\d.]+)(?:\+cpu)? \|(.*)\|$", text, re.M)
    listed = {(canonicalize_name(name), number) for name, number, _ in rows}
    unknown = {canonicalize_name(name) for name, _, licence in rows if licence.strip() in ("", "UNKNOWN")}
    return {name for name, _ in listed - pins()} | ({n for n, _ in pins()} - {n for n, _ in listed}) | unknown


def test_the_floors_close_the_known_holes():
    assert floors_too_low(PROJECT["dependencies"]) == set()
    lowered = [
        line.replace("torch>=2.10", "torch>=2.9").replace("tqdm>=4.67", "tqdm") for line in PROJECT["dependencies"]
    ]
    assert floors_too_low(lowered) == {"torch", "tqdm"}


def test_constraints_pin_everything_exactly_and_satisfy_the_floors():
    assert faults_of_constraints(CONSTRAINTS) == set()


@pytest.mark.parametrize(
    ("old", "new", "faults"),
    [
        ("tqdm==4.70.1", "tqdm>=4.70.1", {"tqdm>=4.70.1", "tqdm"}),
        ("tqdm==4.70.1", "tqdm==4.70.*", {"tqdm==4.70.*", "tqdm"}),
        ("tqdm==4.70.1\n", "", {"tqdm"}),
        ("transformers==5.20.2", "transformers==5.4.9", {"transformers"}),
        ("six==1.17.0", "six @ https://example.org/six.whl", {"six @ https://example.org/six.whl"}),
    ],
)
def test_bad_constraints_are_found(old, new, faults):
    assert old in CONSTRAINTS
    assert faults_of_constraints(CONSTRAINTS.replace(old, new)) == faults


def needed_here():
    """Every package that dpo-helpers with its extra `dev` needs on this system, found as pip does."""
    found, todo = set(), [("dpo-helpers", "dev"), ("dpo-helpers", "")]
    while todo:
        package, extra = todo.pop()
        for need in map(Requirement, requires(package) or []):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                new = {(canonicalize_name(need.name), part) for part in ("", *need.extras)} - found
                found |= new
                todo += new
    return {name for name, _ in found}


def test_all_that_is_needed_here_is_pinned_and_installed_so():
    names = needed_here()
    assert len(names) > 140
    assert {(name, version(name).split("+")[0]) for name in names} <= pins()


def test_all_pinned_packages_are_in_the_list_of_licences():
    assert faults_of_licences(LICENCES) == set()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (r"\| tqdm \|.*\n", "", "tqdm"),
        (r"\| tqdm \| 4", "| tqdm | 3", "tqdm"),
        (r"(\| tqdm \| \S+ \|).*", r"\1 UNKNOWN |", "tqdm"),
        (r"\| nvidia-cublas \|.*\n", "", "nvidia-cublas"),
    ],
)
def test_an_incomplete_list_of_licences_is_found(old, new, fault):
    broken, count = re.subn(old, new, LICENCES)
    assert count == 1
    assert faults_of_licences(broken) == {fault}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Has Python find this metadata before that of the package really installed."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(name, number, *needs):
        folder = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info"
        folder.mkdir()
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {number}",
            *(f"Requires-Dist: {n}" for n in needs),
        ]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")

    return put


def test_the_installed_versions_are_good():
    rows = check_versions()
    assert [f"{row.package}{row.wanted}" for row in rows] == PROJECT["dependencies"]
    assert all(row.good and row.installed == version(row.package) for row in rows)


@pytest.mark.parametrize("number", ["5.4.9", "5.5.0rc1", "unknown"])
def test_an_old_version_is_named_with_its_floor_and_what_to_do(install, number):
    install("transformers", number)
    with pytest.raises(CourseError) as error:
        check_versions()
    assert str(error.value) == (
        f"not the versions that the course needs: transformers {number} (wanted: >=5.5); "
        "run python -m pip install 'transformers>=5.5'"
    )
    assert [row.package for row in installed_versions() if not row.good] == ["transformers"]


@pytest.mark.parametrize("number", ["2.10", "2.10.0+cpu", "2.11.0.dev20260101+cu130"])
def test_builds_of_torch_that_are_new_enough_are_good(install, number):
    install("torch", number)
    assert check_versions()[0] == ("torch", number, ">=2.10", True)


def test_a_missing_package_is_named_and_extras_and_other_systems_are_left_out(install):
    install(
        "dpo-helpers", "0.1.0", "no-such-package>=1", "tqdm>=9999", "numpy",
        "no-such-extra>=1; extra == 'dev'", "no-such-python>=1; python_version < '3'",
    )  # fmt: skip
    with pytest.raises(
        CourseError, match=r"^[^\n]*no-such-package is missing \(wanted: >=1\), tqdm [\d.]+ \(wanted: >=9999\); "
    ) as error:
        check_versions()
    assert str(error.value).endswith("; run python -m pip install 'no-such-package>=1' 'tqdm>=9999'")
    assert "no-such-extra" not in str(error.value)
    assert "no-such-python" not in str(error.value)


def test_the_package_itself_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(CourseError, match="dpo-helpers itself is not installed, .* run make course, or pip install"):
        check_versions()


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder without a .venv, and returns status, output and errors."""
    if not shutil.which("make"):
        pytest.skip("no make here")
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TORCH_INDEX")  # of a make that runs these tests
    env = {name: value for name, value in os.environ.items() if name not in outer}

    def run(*arguments):
        done = subprocess.run(["make", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


PYTHON = """#!/bin/sh
for argument; do printf '[%s]' "$argument" >> "{log}"; done
echo >> "{log}"
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
"""


@pytest.fixture
def asked(tmp_path):
    """A stand-in for Python, as `make PYTHON=…` takes it, and a function that gives the arguments of each call of it."""
    python, log = tmp_path / "a python", tmp_path / "calls"
    python.write_text(PYTHON.format(log=log))
    python.chmod(0o755)
    return python, lambda: [re.findall(r"\[(.*?)\](?=\[|$)", line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("index", ["", "ADDRESS"])
def test_every_install_takes_the_pins_and_torch_alone_comes_from_another_index(make, asked, index):
    python, calls = asked
    status, _, said = make(".venv/.dev", f"TORCH_INDEX={index}", f"PYTHON={python}")
    assert status == 0, said
    install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", "constraints.txt"]
    assert [call for call in calls() if "pip" in call] == [
        [*install, *(["--index-url", "ADDRESS"] if index else []), "torch"],
        [*install, "-e", "."],
        [*install, "-e", ".[dev,site]"],
    ]


HOSTILE = [
    "x; touch ran",
    "x & touch ran",
    '"; touch ran; "',
    "'; touch ran; '",
    "`touch ran`",
    "$(touch ran)",
    "$(shell touch ran)",
]


@pytest.mark.parametrize("payload", HOSTILE)
@pytest.mark.parametrize("name", ["PROFILE", "TORCH_INDEX", "PYTHON", "BEYOND", "DPO_SEED"])
def test_no_shell_runs_what_a_variable_of_make_holds(make, asked, tmp_path, name, payload):
    """Given on make's command line or from outside, it reaches the program that it is meant for as it is, or none."""
    python, calls = asked
    given = {"PYTHON": str(python), name: payload}
    status, _, said = make("course", *(f"{key}={value}" for key, value in given.items()))
    assert not (tmp_path / "ran").exists()
    if name == "PYTHON":
        assert status == 2, "there is no such program"
    else:
        assert status == 0, said
        assert name in ("BEYOND", "DPO_SEED") or any(payload in call for call in calls())


def test_the_lock_is_made_of_wheels_only_with_their_hashes_outside_of_the_tree(make, tmp_path):
    """First the pins of all extras, then each of these with its sha256 and nothing else, into a folder that git ignores."""
    (tmp_path / "build/tools").mkdir(parents=True)
    (tmp_path / "build/tools/.made").touch()
    status, said, _ = make("-n", "lock")
    assert status == 0
    pinned, hashed = (line.split(" pip compile ")[1].split() for line in said.splitlines() if " pip compile " in line)
    assert [line[line.index("-o") + 1] for line in (pinned, hashed)] == [
        "constraints.txt",
        "build/requirements-hashed.txt",
    ]
    assert all("--only-binary :all:" in " ".join(line) for line in (pinned, hashed))
    assert {"pyproject.toml", "--all-extras"} <= set(pinned)
    assert {"constraints.txt", "--no-deps", "--generate-hashes"} <= set(hashed)
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()
    assert not (ROOT / "requirements-hashed.txt").exists()


def test_the_floors_are_tried_in_an_environment_of_their_own(make, tmp_path):
    (tmp_path / "build/tools").mkdir(parents=True)
    (tmp_path / "build/tools/.made").touch()
    status, said, _ = make("-n", "floors")
    assert status == 0
    oldest, besides = (line.split() for line in said.splitlines() if " pip install " in line)
    assert {"--resolution", "lowest-direct", "-e", "'.[gguf]'"} <= set(oldest)
    assert all(line[line.index("-p") + 1] == "build/floors" for line in (oldest, besides))
    assert "constraints.txt" not in said, "the pins are the newest versions"
    assert ".venv" not in said


@pytest.mark.parametrize(
    ("tool", "status", "said"),
    [
        ("exit 0", 0, "audit: no known holes in the pinned versions"),
        ("echo 'six 1.17.0 X-1' > build/audit.txt; exit 1", 2, "six 1.17.0 X-1\naudit: these pinned versions have known holes"),
        ("echo a; echo no answer >&2; exit 1", 2, "no answer\naudit: nothing was audited: the advisory service of PyPI cannot be"),
    ],
)  # fmt: skip
def test_the_audit_says_what_it_found_or_that_it_could_not(make, tmp_path, tool, status, said):
    tools = tmp_path / "build" / "tools"
    (tools / "bin").mkdir(parents=True)
    (tools / ".made").touch()
    (tools / "bin" / "pip-audit").write_text(f"#!/bin/sh\n{tool}\n")
    (tools / "bin" / "pip-audit").chmod(0o755)
    (tmp_path / "build" / "audit.txt").write_text("left by an earlier audit")
    code, out, err = make("audit")
    assert code == status
    assert said in out + err
    assert "Traceback" not in out + err
    asked = make("-n", "audit")[1]
    assert "--strict" in asked, "without it pip-audit passes what it could not look up"
    assert "--disable-pip --no-deps -r constraints.txt" in asked, "the pins themselves, not what pip would take"
