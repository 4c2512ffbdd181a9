"""The install files agree with each other, with the rules for the Hub, and with what is closed as unsafe."""

import re
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
FLOORS = {
    "transformers": (5, 5), "torch": (2, 10), "jupyterlab": (4, 6, 2), "jupyter-server": (2, 18),
    "nbconvert": (7, 17, 1), "datasets": (4,),
}  # fmt: skip
COURSE = (
    "torch", "transformers", "datasets", "accelerate", "jupyterlab", "matplotlib", "seaborn", "nbval", "tqdm", "typer",
    "safetensors",
)  # fmt: skip


def split(requirement):
    name, _, floor = requirement.split(";")[0].partition(">=")
    return name.strip().lower().replace("_", "-"), floor.strip()


def version(text):
    return tuple(int(part) for part in re.findall(r"\d+", text))


def test_environment_and_pyproject_agree():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = dict(split(d) for d in environment["dependencies"] if isinstance(d, str) and ">=" in d)
    assert conda.pop("python") == PROJECT["requires-python"].removeprefix(">=")
    project = dict(split(d) for d in PROJECT["dependencies"])
    assert conda == {CONDA_NAMES.get(name, name): floor for name, floor in project.items()}


def test_the_course_packages_are_there_and_known_holes_closed():
    project = dict(split(d) for d in PROJECT["dependencies"])
    assert set(COURSE) <= set(project)
    for name, floor in FLOORS.items():
        assert version(project[name]) >= floor, name


def test_constraints_pin_everything_exactly_and_satisfy_the_floors():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition("==")
            assert rest, f"not an exact pin: {line}"
            pins.setdefault(name, []).append(version(rest.split(";")[0]))
    extras = [d for group in PROJECT["optional-dependencies"].values() for d in group]
    for name, floor in map(split, [*PROJECT["dependencies"], *extras]):
        assert all(pin >= version(floor) for pin in pins[name]), name


def test_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version as installed

    pins = (ROOT / "constraints.txt").read_text()
    for name in ("torch", "transformers", "datasets", "jupyterlab", "nbval"):
        assert f"{name}=={installed(name).split('+')[0]}" in pins, name


@pytest.mark.parametrize("path", sorted(ROOT.glob("dpo_helpers/**/*.py")), ids=lambda p: p.name)
def test_nothing_loads_unpinned_or_remote_code(path):
    """A lint: each Hub call names a revision near it, no remote code, no pickled weights."""
    text = path.read_text()
    for call in re.finditer(r"(Auto\w+|GPT2\w+)\.from_pretrained\(|load_dataset\(\s*(\w+)", text):
        context = text[max(0, call.start() - 700) : call.end() + 300]
        assert "revision" in context, f"{path.name}: {call[0]} without a word on its revision"
    assert "trust_remote_code=True" not in text
    assert "torch.load(" not in text
    assert "pickle" not in text.replace("pickled", "")


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
