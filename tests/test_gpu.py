"""The course on a GPU that is only pretended (`pretend_gpu`): none of it was ever run on a real one."""

import json
from dataclasses import replace

import numpy
import pytest
import torch
from pretend_gpu import pretend_gpu, pretending_kernels

from conftest import ROOT, SMALL
from dpo_helpers.run import machine, measures, stages
from dpo_helpers.run.course import execute
from dpo_helpers.run.loading import load_model, load_tokenizer, save_model
from dpo_helpers.run.machine import compute_of
from dpo_helpers.run.pairs import load_pairs
from dpo_helpers.settings import load_settings
from dpo_helpers.show.checks import rounding

H100, T4 = (9, 0), (7, 5)


@pytest.fixture
def _found_again():
    """What device there is, is asked once in a process."""
    machine._compute.cache_clear()
    yield
    machine._compute.cache_clear()


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(monkeypatch):
    with pretend_gpu(monkeypatch):
        here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
        layer = torch.nn.Linear(2, 2).to("cuda")
        assert [str(t.device) for t in (here, there, there[0], layer.weight, layer(there))] == ["cpu", *4 * ["cuda:0"]]
        for mixed in (
            lambda: here + there, lambda: layer(here), lambda: here[there.long()], lambda: torch.cat([here, there]),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
                mixed()
        for read in (there.numpy, lambda: numpy.asarray(there)):
            with pytest.raises(TypeError, match="can't convert cuda:0"):
                read()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, generator=torch.Generator(), device="cuda")


def test_and_allows_what_a_gpu_allows(monkeypatch):
    """A number of no dimension, an index, a copy; the gradient lies where its weight does."""
    with pretend_gpu(monkeypatch) as gpu:
        there = torch.ones(2, 2).cuda()
        assert (there * torch.tensor(2.0)).is_cuda
        assert there[torch.tensor([0])].is_cuda
        assert there.cpu().numpy().tolist() == [[1.0, 1.0], [1.0, 1.0]]
        layer = torch.nn.Linear(2, 2).to("cuda")
        layer(there).sum().backward()
        assert layer.weight.grad.is_cuda
        assert gpu.count["aten.addmm.default"] == 1
    assert not torch.zeros(1).is_cuda


def test_its_autocast_is_that_of_cuda(monkeypatch):
    """Products in 16 bits, layer norm and powers in 32: on a CPU autocast would leave these in 16."""
    with pretend_gpu(monkeypatch), torch.autocast("cuda", dtype=torch.float16):
        x = torch.ones(2, 2, device="cuda")
        half = x @ x
        assert half.dtype == torch.float16
        assert torch.nn.functional.layer_norm(half, (2,)).dtype == torch.float32
        assert (half**3).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == torch.float32


@pytest.mark.slow(30)
@pytest.mark.usefixtures("_found_again")
@pytest.mark.parametrize(
    ("chip", "precision", "tolerance"), [(T4, "fp32", 1e-5), (T4, "fp16", 0.02), (H100, "bf16", 0.05)]
)
def test_a_gpu_gets_the_numbers_of_a_cpu(small, tmp_path, monkeypatch, chip, precision, tolerance):
    dpo, scored = stages.get_dpo(small), stages.get_reference(small).scores("train")
    asked = "fp32" if precision == "fp32" else "auto"
    with pretend_gpu(monkeypatch, chip) as gpu:
        settings = replace(small, device="cuda", precision=asked, runs_dir=str(tmp_path / "gpu"))
        dpo_on_gpu = stages.get_dpo(settings)
        kl = measures.get_evaluation(settings, dpo_on_gpu).metrics["kl"]
        off = stages.get_reference(settings).scores("train").chosen - scored.chosen
    assert gpu.count["aten._foreach_sqrt.default"] > 0, "the optimiser updates on the GPU, all weights at once"
    assert dpo_on_gpu.metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-5), (
        "policy and reference agree in any precision"
    )
    for name in ("loss", "chosen_reward", "rejected_reward", "reward_margin"):
        assert dpo_on_gpu.metrics[-1][name] == pytest.approx(dpo.metrics[-1][name], abs=tolerance), name
    if precision == "fp32":  # in 16 bits other tokens are drawn here and there, and the KL is that of other answers
        assert kl == pytest.approx(measures.get_evaluation(small, dpo).metrics["kl"], abs=tolerance)
    allowed = [rounding(compute_of(settings), len(pair.chosen)) for pair in stages.get_data(small).train]
    assert all(abs(a) <= b for a, b in zip(off.tolist(), allowed, strict=True))
    made = json.loads((settings.run_dir / "dpo/manifest.json").read_text(encoding="utf-8"))
    assert made["about"]["device"] == f"cuda (Pretended GPU), {precision}"


@pytest.mark.slow(15)
@pytest.mark.usefixtures("_found_again")
def test_the_plain_path_too(small, tmp_path, monkeypatch):
    """With a head that trains there is no fast path; IPO divides by the numbers of tokens."""
    plain = replace(small, freeze_embeddings=False, loss_type="ipo", optimizer="adamw", learning_rate=1e-4)
    on_cpu = stages.get_dpo(plain).metrics[-1]
    with pretend_gpu(monkeypatch):
        on_gpu = stages.get_dpo(replace(plain, device="cuda", runs_dir=str(tmp_path / "gpu"))).metrics[-1]
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], abs=1e-5)
    assert on_gpu["reward_margin"] == pytest.approx(on_cpu["reward_margin"], abs=1e-5)


@pytest.fixture
def like_gpt2(tmp_path, monkeypatch):
    """Settings of the gpt2 profile, cut down: its epochs and precision, with a model and pairs from files."""
    mini, world = load_settings("mini"), load_pairs(load_settings("mini", max_pairs=36))
    save_model(load_model(mini), load_tokenizer(mini), tmp_path / "model")
    rows = [{"chosen": pair.prompt + pair.chosen, "rejected": pair.prompt + pair.rejected} for pair in world.train]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"model": tmp_path / "model", "dataset": tmp_path / "rows.jsonl", "runs_dir": tmp_path / "runs"}
    others = {"max_length": 256, "max_prompt_length": 128, "beta": 0.3}  # the model's 256 positions; no β of the sweep
    cut = {key: value for key, value in SMALL.items() if key not in ("epochs", "batch_size")}
    for key, value in {**cut, **files, **others}.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        monkeypatch.setenv(f"DPO_{key.upper()}", text)


@pytest.mark.slow(120)
@pytest.mark.usefixtures("like_gpt2")
def test_the_notebooks_run_on_a_t4_in_fp16(tmp_path, monkeypatch, is_long):
    """With the profile for a GPU, whose numbers the notebooks do not know; the last one first, so opened alone."""
    ran = pretending_kernels(tmp_path / "ipython")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    without_a_model = ("01_data", "03_sft", "04_dpo_loss_derivation")  # on the GPU, once what they need is made
    for source in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"), reverse=True):
        if is_long or source.stem not in without_a_model:
            before = source.read_bytes()
            execute(source, tmp_path / source.name, "gpt2")
            assert source.read_bytes() == before
            count = json.loads(ran.read_text(encoding="utf-8"))["count"]
            assert ("aten.addmm.default" in count) == (source.stem not in without_a_model)
    executed = (tmp_path / "02_reference.ipynb").read_text(encoding="utf-8")
    assert "computing on cuda (Pretended GPU), fp16" in executed
