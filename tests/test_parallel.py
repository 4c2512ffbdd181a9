"""Two gloo processes under `accelerate launch` give the numbers of one, and write everything once."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from ddp_worker import PLAN, run
from typer.testing import CliRunner

from conftest import ROOT, SMALL
from dpo_helpers.cli import app
from dpo_helpers.errors import SettingsError
from dpo_helpers.run import processes
from dpo_helpers.run.artefacts import read_jsonl
from dpo_helpers.run.machine import pick_compute
from dpo_helpers.run.stages import get_dpo
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import batch_order


def launch(*arguments, **environment):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options,
        "--main_process_port",
        str(port),
        *arguments,
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=300,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_losses_of_two_processes_are_those_of_one(tmp_path):
    launch(str(ROOT / "tests/ddp_worker.py"), str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["processes"] for one in found] == [2, 2]
    for fast in (False, True):
        rows, _, _ = run(fast)
        assert len(rows) == 21
        for one in (f[str(fast)] for f in found):
            for name, key in (("losses", "loss"), ("margins", "reward_margin"), ("norms", "grad_norm")):
                assert one[name] == pytest.approx([row[key] for row in rows], abs=1e-5, rel=1e-5), name
        assert found[0][str(fast)]["weights"] == found[1][str(fast)]["weights"], "both end with the same policy"
        shares = [f[str(fast)]["seen"] for f in found]
        assert [[len(micro) for micro in share[:2]] for share in shares] == [[2, 1], [2, 2]]


@pytest.mark.slow
def test_a_step_of_the_course_writes_its_artefact_once(tmp_path):
    """`accelerate launch … -m dpo_helpers dpo`: the losses of a single process, and no second folder."""
    values = SMALL | {"max_pairs": 40, "epochs": 4, "learning_rate": 1e-4, "curve_points": 1, "curve_prompts": 2}
    options = [
        f"--{k.replace('_', '-')}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in values.items()
    ]
    done = launch("-m", "dpo_helpers", "dpo", "--device", "cpu", f"--runs-dir={tmp_path / 'two'}", *options)
    assert done.stdout.count("dpo: ") == 1
    assert len(list((tmp_path / "two/mini/frozen").iterdir())) == 2, "one file for both processes, and one of each part"
    assert sorted(p.name for p in (tmp_path / "two/mini").iterdir() if not p.name.startswith(".")) == [
        "data", "dpo", "frozen", "reference",
    ]  # fmt: skip
    one = get_dpo(load_settings("mini", runs_dir=str(tmp_path / "one"), device="cpu", **values))
    two = tmp_path / "two/mini/dpo"
    losses = [
        [row["loss"] for row in rows if row["split"] == "train"]
        for rows in (one.metrics, read_jsonl(two / "metrics.jsonl"))
    ]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def as_rank(monkeypatch, rank, of):
    class State:
        process_index, is_main_process = rank, rank == 0

    monkeypatch.setenv("WORLD_SIZE", str(of))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(processes, "_state", State)


def test_shares_are_a_partition(monkeypatch):
    batches = [at for _, at in batch_order(10, PLAN.batch_size, 2, 0)]
    shares = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        shares.append([processes.share(at) for at in batches])
    for at, parts in zip(batches, zip(*shares, strict=True), strict=True):
        assert sorted(i for part in parts for i in part) == sorted(at)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert pick_compute("cuda").device == torch.device("cuda")
    as_rank(monkeypatch, 1, 2)
    assert pick_compute("cuda").device == torch.device("cuda", 1)
    assert pick_compute("cpu").device == torch.device("cpu")
    with pytest.raises(SettingsError, match="device is 'cuda:0', but 2 processes cannot share it: use cuda"):
        pick_compute("cuda:0")


def test_a_parameter_without_a_gradient_takes_part_in_the_sum(monkeypatch):
    """A process without a share of the batch has no gradient; what the other one has of it must reach its weights.

    Three parameters of 2, 2 and 1 numbers; here the second has none. The other process has 10, 20, 30, 40, 50.
    """
    as_rank(monkeypatch, 0, 2)
    sent = []

    def with_the_other(values):
        sent.append(values.tolist())
        return values + torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])

    monkeypatch.setattr(processes, "total", with_the_other)
    first, second, third = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2,), (1, 2), (1,)))
    first.grad, third.grad = torch.tensor([1.0, 2.0]), torch.tensor([5.0])
    processes.add_up_gradients([first, second, third])
    assert sent == [[1.0, 2.0, 0.0, 0.0, 5.0]]
    assert [p.grad.tolist() for p in (first, second, third)] == [[11.0, 22.0], [[30.0, 40.0]], [55.0]]


def test_one_process_leaves_its_gradients_alone():
    with_one, without = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    with_one.grad = torch.tensor([3.0])
    processes.add_up_gradients([with_one, without])
    assert (with_one.grad.tolist(), without.grad) == ([3.0], None)


def test_a_world_size_without_a_rank_is_no_launch(monkeypatch):
    """Some container images set WORLD_SIZE for everybody."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert processes.count() == 1


@pytest.mark.parametrize("command", ["report", "generate", "all", "course"])
def test_what_only_one_process_can_do_says_so(monkeypatch, tmp_path, command):
    as_rank(monkeypatch, 0, 2)
    monkeypatch.setenv("DPO_PROFILE", "mini")  # which the command sets
    result = CliRunner().invoke(app, [command, f"--runs-dir={tmp_path}"])
    assert result.exit_code == 2
    assert f"{command} runs in one process, but 2 were started" in result.output
    with pytest.raises(SettingsError):
        processes.require_one(command)
