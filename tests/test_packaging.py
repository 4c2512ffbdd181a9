"""The install files agree with each other. What is pinned, and to what: faults/test_supply.py."""

import sys

import pytest
import yaml

from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    patterns = tool["setuptools"]["package-data"]["dpo_helpers"]
    package = ROOT / "dpo_helpers"
    named = {path for pattern in patterns for path in package.glob(pattern)}
    data = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert data == named
    assert {p.name for p in data} >= {"topics.txt", "model.safetensors", "tokenizer.json", "results.schema.json"}
