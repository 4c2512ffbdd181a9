"""The install files agree with each other. What is pinned, and to what: faults/test_supply.py."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
COURSE = (
    "torch", "transformers", "datasets", "accelerate", "jupyterlab", "matplotlib", "seaborn", "nbval", "tqdm", "typer",
    "safetensors",
)  # fmt: skip


def split(requirement):
    name, _, floor = requirement.split(";")[0].partition(">=")
    return name.strip().lower().replace("_", "-"), floor.strip()


def test_environment_and_pyproject_agree():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = dict(split(d) for d in environment["dependencies"] if isinstance(d, str) and ">=" in d)
    assert conda.pop("python") == PROJECT["requires-python"].removeprefix(">=")
    project = dict(split(d) for d in PROJECT["dependencies"])
    assert conda == {CONDA_NAMES.get(name, name): floor for name, floor in project.items()}


def test_the_course_packages_are_there():
    assert set(COURSE) <= {name for name, _ in map(split, PROJECT["dependencies"])}


def test_no_functions_or_modules_that_need_scrolling():
    import ast

    for path in ROOT.glob("dpo_helpers/**/*.py"):
        source = path.read_text()
        assert source.count("\n") <= 400, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_every_data_file_of_the_package_is_installed_with_it():
    """An editable install finds files that a wheel, as on Colab, would lack: each must be named as package data."""
    patterns = [
        (ROOT / package.replace(".", "/"), pattern)
        for package, listed in PYPROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in listed
    ]
    assert all((folder / "__init__.py").is_file() for folder, _ in patterns)
    named = {path for folder, pattern in patterns for path in folder.glob(pattern)}
    data = {p for p in (ROOT / "dpo_helpers").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert data == named
    assert {p.name for p in data} >= {"topics.txt", "model.safetensors", "tokenizer.json", "results.schema.json"}


IMPORTED = (
    "import dpo_helpers, json, os, sys; print(json.dumps([os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules]))"
)


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_leave_the_core_to_others_unless_told_otherwise(given, expected):
    """OpenMP reads it when torch is loaded: the package's import sets it, loads no torch, and overrides nobody."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == [expected, False]


WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_the_workflow_runs_what_ci_runs_and_may_only_read():
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in WORKFLOW["jobs"].items()}
    assert runs == {"course": [".ci/run"], "floors": ["make floors"]}
    assert "if" not in WORKFLOW["jobs"]["course"]
    assert re.findall(r"'(\w+)'", WORKFLOW["jobs"]["floors"]["if"]) == ["schedule", "workflow_dispatch"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert set(WORKFLOW[True]) == {"push", "pull_request", "workflow_dispatch", "schedule"}, (
        "YAML takes the key `on` for true"
    )
    for job in WORKFLOW["jobs"].values():
        assert "permissions" not in job, "more than those of all jobs"
        assert job["timeout-minutes"] <= 90
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/(checkout|setup-python)@v\d+", action) for action in used), used


def test_binder_and_codespaces_install_the_pins_on_the_python_of_ci():
    install = (ROOT / ".binder/postBuild").read_text().splitlines()[-1].split()
    assert install[:3] == ["uv", "pip", "install"]
    assert " ".join(install).endswith("--torch-backend cpu -c constraints.txt -e .")
    assert os.access(ROOT / ".binder/postBuild", os.X_OK)
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert container["postCreateCommand"] == "bash .binder/postBuild"
    named = {
        (ROOT / ".binder/runtime.txt").read_text().strip().removeprefix("python-"),
        container["image"].removeprefix("python:"),
        *(step["with"]["python-version"] for step in STEPS if "setup-python" in step.get("uses", "")),
    }
    assert named == {PYPROJECT["tool"]["mypy"]["python_version"]}, "one Python, the one that types are checked for"


def test_the_citation_is_one_of_this_version():
    """Required by the Citation File Format 1.2.0: these four keys, an author with a name, a type and authors of works."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["message"].endswith(".")
    assert f"# {citation['title']}\n" in (ROOT / "README.md").read_text()
    assert citation["authors"] == [{"name": "The authors of this course"}]
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert "repository-code" not in citation, (
        "the course's address is in dpo_helpers/tools/skeleton.py, and nowhere else"
    )


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_help_has_a_line_for_each_target_and_course_is_the_default():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.M)[1].split()
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = dict(re.findall(r"^make ([a-z-]+) +(\S.*)$", said, re.M))
    assert sorted(listed) == sorted(targets)
    assert "  PROFILE=gpt2 " in said
    assert re.search(r"^([a-z-]+):", makefile, re.M)[1] == "course"
