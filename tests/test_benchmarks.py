"""The arithmetic and the summaries of benchmarks/, by hand; the measurements themselves are not tests."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import dpo_vs_trl, gpu_estimate, real_report, real_run, sampling, scaling
from benchmarks.workload import Shape, Workload, batches, draw_pairs, products
from conftest import ROOT, SHARED
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import EncodedPair

WORK = Workload("data", "tokenizer", 4, 2, 3, 0, "cpu", "fp32")


def flop(listed):
    return sum(2 * m * k * n * count for (m, k, n), count in listed)


@pytest.mark.parametrize(
    ("p", "c", "later", "first"), [(140, 60, 58.4, 111), (60, 60, 47.1, 86.4), (300, 60, 81.6, 161)]
)
def test_floors_are_those_worked_out_by_hand(p, c, later, first):
    """b = 24d² a token and block, h = 2dV a scored position: later 3·(3bT + 4d²T + 20d²Q) + 4C·h, with attention on
    what is visible, and the first epoch 8bT more with one more forward pass; in GFLOP."""
    work = products([EncodedPair([1] * p, [1] * c, [1] * c)])
    total = 3 * flop(work["forward"]) + flop(work["head"]) + work["later_attention"]
    assert total / 1e9 == pytest.approx(later, rel=0.005)
    assert (total + flop(work["first"]) + work["first_attention"]) / 1e9 == pytest.approx(first, rel=0.01)


def test_pairs_are_drawn_over_the_whole_range(hh_slice):
    work = replace(WORK, data=str(hh_slice), tokenizer=str(SHARED / "data/gpt2-tokenizer"), pairs=12)
    lengths = sorted(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in draw_pairs(work))
    assert lengths[0] < 80
    assert lengths[-1] > 400
    again = sorted(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in draw_pairs(work))
    assert lengths == again
    assert draw_pairs(replace(work, seed=1)) != draw_pairs(work)
    with pytest.raises(SystemExit, match="usable pairs, but --pairs is 99999"):
        draw_pairs(replace(work, pairs=99999))


def test_batches():
    pairs = [EncodedPair([i], [1], [2]) for i in range(5)]
    assert [[p.prompt[0] for p in part] for part in batches(pairs, [4, 2, 0, 1, 3], 2)] == [[4, 2], [0, 1], [3]]


def run(precompute, seconds, epochs=3, peak=1.0, losses=(0.69, 0.68)):
    steps = [[epoch, 2, s] for epoch in range(epochs) for s in seconds]
    return {"precompute_s": precompute, "steps": steps, "peak_gb": peak, "losses": list(losses)}


def test_summary_by_hand():
    """4 pairs, 2 updates an epoch. Ours: precomputation 2 s, steps of 9 (the first, dropped) or 1 s and 1 s: 0.5 s a
    pair, so 3 epochs take 2 + 6 s for 12 pairs. TRL: one epoch timed, 10 s a step: 5 s a pair, 4 + 60 s."""
    ours = run(2.0, (1.0, 1.0), peak=2.0)
    ours["steps"][0][2] = 9.0
    runs = {
        "ours": [ours] * 3, "TRL tuned (b)": [run(4.0, (3.0, 10.0), epochs=1, peak=8.0)],
        "TRL defaults (a)": [run(0.0, (3.0, 20.0), epochs=1)],
        "ours, sweep": [run(2.0, [1.0] * 8)], "floor": [{"first_s": 1.0, "later_s": 1.2}],
    }  # fmt: skip
    rows = dpo_vs_trl.summarise(runs, WORK)
    assert rows["ours"]["pairs_per_s"] == pytest.approx(12 / 8)
    assert rows["ours"]["later_pairs_per_s"] == pytest.approx(2.0)
    assert rows["TRL tuned (b)"]["pairs_per_s"] == pytest.approx(12 / 64)
    assert rows["ours, sweep"]["pairs_per_s"] == pytest.approx(48 / 26), "one precomputation for four β"
    table = {what: (value, met) for what, value, _, met in dpo_vs_trl.ratios(rows, runs, WORK)}
    assert table["pairs/s over 3 epochs, × TRL tuned (b)"] == (pytest.approx(8.0), True)
    assert table["pairs/s over 3 epochs, × TRL's defaults (a)"] == (pytest.approx(15.0), True)
    assert table["pairs/s of later epochs, × TRL tuned (b)"] == (pytest.approx(10.0), True)
    assert table["peak memory, of TRL tuned's"] == (0.25, True)
    assert table["efficiency: matrix-product floor / time, later epochs"] == (pytest.approx(0.6), True)
    assert table["efficiency of the first pass (frozen blocks, reference)"][0] == pytest.approx(0.5)
    runs["TRL tuned (b)"] = [run(4.0, (3.0, 1.0), epochs=1, losses=(0.69, 0.7))]
    slow = {what: met for what, _, _, met in dpo_vs_trl.ratios(dpo_vs_trl.summarise(runs, WORK), runs, WORK)}
    assert not slow["pairs/s over 3 epochs, × TRL tuned (b)"]
    assert not slow["largest difference of the losses of the first 2 updates"]


def test_the_committed_results_are_those_the_readme_quotes():
    folder = dpo_vs_trl.RESULTS
    result = json.loads((folder / "dpo_vs_trl.json").read_text(encoding="utf-8"))
    assert result["work"]["pairs"] >= 48
    assert result["repeats"] >= 3
    assert (folder / "dpo_vs_trl.md").read_text(encoding="utf-8") == dpo_vs_trl.as_markdown(result)
    rows = dpo_vs_trl.summarise(result["runs"], Workload(**result["work"]))
    assert rows == result["rows"]
    readme = (folder.parent / "README.md").read_text(encoding="utf-8")
    for what, value, goal, _ in result["ratios"]:
        assert f"| {what} | {value:.3g} | {goal} |" in readme, what
    assert torch.tensor([value for _, value, _, _ in result["ratios"]]).isfinite().all()


def test_the_estimate_for_a_gpu_takes_off_what_it_would_do_and_adds_its_launches():
    """70 s, of which 30 in 100,000 products and 5 in additions; views cost a GPU nothing and stay where they are."""
    count = {"aten.mm.default": 100_000, "aten.add_.Tensor": 50_000, "aten.view.default": 10**6, "aten.t.default": 7}
    seconds = {"aten.mm.default": 30.0, "aten.add_.Tensor": 5.0, "aten.view.default": 9.0, "aten.t.default": 0.1}
    row = gpu_estimate.row("x", 70.0, {"count": count, "seconds": seconds})
    assert (row["operations"], row["inside_s"]) == (150_000, 35.0)
    assert row["gpu_s"] == pytest.approx(70 - 35 + 150_000 * 20e-6)  # 38
    nothing = gpu_estimate.row("01_data", 11.0, {"count": {}, "seconds": {}})
    assert (nothing["operations"], nothing["gpu_s"]) == (0, 11.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("aten.view.default", True), ("aten.transpose.int", True), ("aten.split.Tensor", True), ("aten.slice.Tensor", True),
     ("aten.mm.default", False), ("aten.add_.Tensor", False), ("aten.copy_.default", False), ("aten._foreach_add_.Scalar", False)],
)  # fmt: skip
def test_a_view_is_told_from_an_operation(name, expected):
    assert gpu_estimate.is_view(name) is expected


def test_exponents_by_hand():
    """Twice the time for twice the size is 1; the same time 0; 8 times the time for 4 times the size 1.5."""
    assert scaling.exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert scaling.exponent([1, 10], [5, 5]) == pytest.approx(0)
    assert scaling.exponent([2, 8], [1, 8]) == pytest.approx(1.5)


def test_tokens_count_up_to_the_first_end_of_text():
    """Of rows that end after three tokens, at once, and not at all: 3 + 1 + 4."""
    assert sampling.count(torch.tensor([[5, 6, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]]), 0) == 8


def test_a_llamas_products_by_hand():
    """One pair of 2 prompt and twice 2 response tokens, 4 run: of two blocks one is frozen, d 4, keys 2, MLP 6, gated.

    A whole block: 4 × 4 × (8 + 4 + 12) + 4 × 6 × 4 = 480 multiply-adds; the last one asks at 3 places: 4 × 4 × 4 for keys
    and values, 3 × 4 × (4 + 4 + 12) + 3 × 6 × 4 = 376.
    """
    shape = Shape("tiny", 2, 1, 4, 2, 6, 2)
    work = products([EncodedPair([1, 1], [1, 1], [1, 1])], shape)
    assert flop(work["forward"]) == 2 * 376
    assert flop(work["first"]) == 2 * (480 + 376 + 4 * 4 * 50257)


# one real run


def test_the_tables_and_numbers_of_the_real_run_are_its_results():
    """docs/real_runs.md holds the very table that the results give, and says what every interval says."""
    results = json.loads((real_report.RESULTS / "real_run.json").read_text(encoding="utf-8"))
    assert real_report.table(results) in (ROOT / "docs/real_runs.md").read_text(encoding="utf-8")
    final = [found for found in results["runs"].values() if not found["run"]["validate"]]
    assert len(final) == len(real_run.BETAS) * len(real_run.SEEDS)
    for found in final:
        assert found["intervals"]["reward_accuracy"]["low"] > 0.5
        assert sum(found["right"]) / len(found["right"]) == pytest.approx(found["metrics"]["reward_accuracy"])
    losses = {f["run"]["rate"]: f["metrics"]["loss"] for f in results["runs"].values() if f["run"]["validate"]}
    assert results["rate"] == min(losses, key=losses.get)


@pytest.fixture(scope="module")
def prepared():
    small = load_settings("mini", max_pairs=120, held_out_pairs=20, prompts=4, max_new_tokens=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_run, "VALIDATION", 30)
        return real_run.Prepared(small)


def test_no_prompt_is_on_two_sides_of_the_real_runs_splits(prepared):
    """Rates are tried on 90 or so of the 120 pairs and compared on the rest, which are trained on afterwards."""
    prompts = {name: {tuple(pair.prompt) for pair in prepared.all[part]} for name, part in prepared.part.items()}
    sizes = {name: len(prepared.all[part]) for name, part in prepared.part.items()}
    assert sizes["tried"] + sizes["validation"] == sizes["train"] == 120
    assert sizes["validation"] >= 30
    assert sizes["held out"] == 20
    assert not prompts["tried"] & prompts["validation"]
    assert not prompts["train"] & prompts["held out"]


def test_a_real_run_starts_from_the_reference_and_is_measured_where_it_says(prepared):
    """Each run begins at ln 2, also the second; with next to no rate it stays there; the other part is not looked at."""
    still = real_run.one_run(prepared, real_run.Run(0.1, 1e-12, validate=True, sampled=False))
    assert still["metrics"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(still["right"]) == len(prepared.all[prepared.part["validation"]])
    moved = real_run.one_run(prepared, real_run.Run(0.1, 1e-3))
    assert moved["updates"] == math.ceil(120 / 16) > still["updates"]  # for good, the validation part is trained on too
    assert moved["trained_loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert moved["metrics"]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert len(moved["right"]) == 20
    assert moved["sampled"]["kl"] > 0.0
    assert [sorted(response) for response in moved["responses"]] == [["ended", "text"]] * 4
    again = real_run.one_run(prepared, real_run.Run(0.1, 1e-3, sampled=False))
    assert again["trained_loss"] == moved["trained_loss"]
