"""Precision by chip: the CUDA queries are replaced, since the machine that tests may have no GPU."""

import subprocess
import sys

import pytest
import torch

from dpo_helpers.device import Compute
from dpo_helpers.errors import SettingsError
from dpo_helpers.run.gradients import InParts
from dpo_helpers.run.machine import describe, peak_memory_gb, pick_compute
from dpo_helpers.show.checks import rounding


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_bf16_only_where_it_is_native(monkeypatch, capability, precision):
    """A T4 is 7.5: torch says that bf16 is "supported" there, and emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    compute = pick_compute()
    assert (compute.device.type, compute.precision) == ("cuda", precision)
    assert pick_compute(precision="bf16").precision == "bf16", "emulated on an old chip, but it can be asked for"


def test_cpu_is_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    compute = pick_compute()
    assert describe(compute) == "cpu, fp32"
    assert not InParts(1, compute, []).scaler.is_enabled()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert describe(pick_compute()) == "cpu, fp32", "it has to be asked for: there is no float64 there"
    assert describe(pick_compute("mps")) == "mps, fp32"


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [("cuda", "auto", "torch sees no CUDA GPU"), ("mps", "auto", "has none"), ("cpu", "fp16", "no fp16 training")],
)
def test_what_is_not_there_is_an_error(monkeypatch, device, precision, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=message):
        pick_compute(device, precision)


def test_a_gpu_that_is_not_there_is_an_error_that_names_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device == "cuda:1" else (7, 5))
    compute = pick_compute("cuda:1")
    assert (compute.device, compute.precision) == (torch.device("cuda", 1), "bf16"), "of this GPU, not of the first"
    with pytest.raises(SettingsError, match="device is 'cuda:2', but torch sees only cuda:0, cuda:1: use one of these"):
        pick_compute("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        SettingsError, match="device is 'cuda:1', but torch sees no CUDA GPU: use --device cpu, or auto"
    ):
        pick_compute("cuda:1")


def test_autocast_computes_in_the_precision_and_only_inside():
    a = torch.randn(4, 4)
    with Compute(torch.device("cpu"), "bf16").autocast():
        assert (a @ a).dtype == torch.bfloat16
    assert (a @ a).dtype == torch.float32
    with Compute(torch.device("cpu"), "fp32").autocast():
        assert (a @ a).dtype == torch.float32


def test_the_allowance_for_rounding_grows_with_the_tokens_in_16_bits_alone():
    at = torch.device("cpu")
    assert [rounding(Compute(at, "fp32"), n) for n in (1, 30)] == [1e-3, 1e-3]
    assert [rounding(Compute(at, p), 30) for p in ("fp16", "bf16")] == pytest.approx([1.5, 1.5])


CHILD = """
import torch
from dpo_helpers.device import Compute
from dpo_helpers.run.machine import peak_memory_gb
print(peak_memory_gb(Compute(torch.device("cpu"), "fp32")))
"""


def test_peak_memory_is_of_this_process_and_not_of_the_one_that_started_it():
    """A child begins with its parent's peak in getrusage: here that of 800 MB, which are given back before."""
    ballast = torch.ones(200_000_000)
    own = peak_memory_gb(Compute(torch.device("cpu"), "fp32"))
    del ballast
    result = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True)
    assert 0.1 < float(result.stdout) < own - 0.4 < 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_training_on_cuda_starts_at_ln_2():
    from test_training import PLAN, pairs, scored, train_in_parts

    from conftest import tiny_gpt2
    from dpo_helpers.training import DPOObjective

    compute, data = pick_compute(), pairs()
    policy = tiny_gpt2().to(compute.device)
    rows = train_in_parts(policy, data, DPOObjective(scored(policy, data, compute), 0.5), PLAN, compute)
    assert abs(rows[0]["loss"] - 0.6931) < 2e-2
