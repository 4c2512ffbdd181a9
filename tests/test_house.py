"""The house: a core that is read in an evening, one training loop, and a short way from a notebook's line to the loss."""

import ast
import inspect
from pathlib import Path

import pytest
from test_training import PLAN, pairs, run, scored

import dpo_helpers
from conftest import tiny_gpt2
from dpo_helpers import training
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.logprobs import PlainScorer
from dpo_helpers.models import freeze
from dpo_helpers.run import stages

PACKAGE = Path(dpo_helpers.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
NOT_CORE = {"__init__.py", "__main__.py", "cli.py"}
CORE = {name: text for name, text in SOURCES.items() if "/" not in name and name not in NOT_CORE}


def test_the_core_is_thirteen_modules_of_1300_lines_at_most():
    assert len(CORE) <= 13, "the ten of the lesson, and small print: " + " ".join(sorted(CORE))
    assert sum(len(text.splitlines()) for text in CORE.values()) <= 1300


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_nothing_else_of_the_package(name):
    for node in ast.walk(ast.parse(CORE[name])):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            inside = isinstance(node, ast.ImportFrom) and node.level
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else [a.name for a in node.names]
            assert all((f"{n}.py" in CORE) if inside else not n.startswith("dpo_helpers") for n in names), names


def test_the_loop_fits_on_a_screen():
    lines, _ = inspect.getsourcelines(training.train)
    assert len(lines) <= 60


# the loop's own parts; what pre-trains the embedded model and descends in a table; what learners write, and its pains
MAY_STEP = ("training.py", "run/gradients.py", "tools/pretrain.py", "worlds/tabular.py", "lesson/pains.py")


def test_there_is_one_training_loop():
    """A call of .backward() or of an optimizer's .step() is in the loop, or in what is no training of the course."""
    found = {
        f"{name}:{node.lineno}"
        for name, text in SOURCES.items()
        if name not in MAY_STEP and not name.startswith("lesson/exercises/")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("backward", "step")
    }
    assert found == set()
    assert CORE["training.py"].count("optimizer.step()") == CORE["training.py"].count(".backward()") == 1


@pytest.fixture
def ways(monkeypatch):
    """The package's functions on the way to each loss of a training, outermost first, `dpo_loss` at the end."""
    found, loss = [], training.dpo_loss

    def spy(*arguments, **more):
        ours = [frame.function for frame in inspect.stack(0) if PACKAGE in Path(frame.filename).parents]
        found.append([*reversed(ours), "dpo_loss"])
        return loss(*arguments, **more)

    monkeypatch.setattr(training, "dpo_loss", spy)
    return found


def test_from_get_dpo_to_the_loss_it_is_seven_frames_at_most(small, ways):
    stages.get_dpo(small)
    trained = [way for way in ways if "preference_metrics" not in way]
    assert len(trained) == 3, "24 pairs in batches of 8, each in one part"
    for way in trained:
        assert way[0] == "get_dpo"
        assert "train" in way
        assert len(way) <= 7, way


@pytest.mark.parametrize(
    "scorer", [lambda model, data: PlainScorer(data, 0), lambda model, data: FastScorer(model, data, 1)]
)
def test_from_train_to_the_loss_it_is_three_frames_at_most(cpu, ways, scorer):
    """With the whole batch at once and in parts, on the plain path and on the fast one: ten pairs, twice, by four."""
    data, policy = pairs(), tiny_gpt2()
    freeze(policy, 1)
    objective = training.DPOObjective(scored(policy, data, cpu), 0.5)
    training.train(policy, data, scorer(policy, data), objective, PLAN, cpu)
    assert len(ways) == 6
    run(cpu, objective, data, scorer=scorer(policy, data), micro_batch_size=2)
    assert len(ways) == 6 + 2 * (2 + 2 + 1)
    for way in ways:
        way = way[way.index("train") :]
        assert len(way) <= 3, way
