import math

import pytest
import torch

from dpo_helpers.uncertainty import bootstrap_mean, mean_and_error, paired_difference


def test_mean_and_error_by_hand():
    """1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14/3, error √(14/3)/2 = 1.0801."""
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 3) / 2))
    assert math.isnan(mean_and_error([1.0])[1])


def test_bootstrap_of_a_normal_sample_is_the_textbook_interval():
    """n = 400, SD 2: ± 1.96 · 2/20 = ± 0.196 around the sample's mean."""
    x = 2 * torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = bootstrap_mean(x)
    assert interval.estimate == pytest.approx(x.mean().item())
    half = 1.96 * mean_and_error(x)[1]
    assert interval.low == pytest.approx(x.mean().item() - half, abs=0.02)
    assert interval.high == pytest.approx(x.mean().item() + half, abs=0.02)


def test_a_resample_has_as_many_values_as_the_sample():
    """Of 0 and 1: means 0, 1/2, 1 with chances 1/4, 1/2, 1/4, so the middle 40 % are 1/2 and 95 % go from 0 to 1."""
    assert str(bootstrap_mean([0.0, 1.0], level=0.4)) == "0.50 [0.50, 0.50]"
    assert str(bootstrap_mean([0.0, 1.0])) == "0.50 [0.00, 1.00]"


def test_a_large_sample_is_drawn_in_parts_and_alike(monkeypatch):
    """100,000 values 100 times at a time; with 1,000,000 all draws at once would take 32 GB."""
    x, randint, sizes = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double(), torch.randint, []
    monkeypatch.setattr(torch, "randint", lambda n, size, **how: sizes.append(size) or randint(n, size, **how))
    found = bootstrap_mean(x, resamples=250)
    assert sizes == [(100, 100_000), (100, 100_000), (50, 100_000)]
    drawn = randint(len(x), (250, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = x[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_coverage():
    """Of 200 samples of 60 coin flips with p = 0.7, about 95 % of the intervals hold 0.7; 50 % ones hold it about half."""
    generator = torch.Generator().manual_seed(1)
    samples = [(torch.rand(60, generator=generator) < 0.7).double() for _ in range(200)]
    for level, low, high in ((0.95, 0.90, 0.99), (0.5, 0.4, 0.62)):
        intervals = [bootstrap_mean(s, level=level, resamples=500) for s in samples]
        assert low <= sum(i.low <= 0.7 <= i.high for i in intervals) / 200 <= high


def test_pairing_takes_out_what_both_share():
    """Both share a difficulty of SD 10 and differ by 1 ± 0.5: paired ± 0.05, unpaired about ± 1.4."""
    generator = torch.Generator().manual_seed(2)
    hard = 10 * torch.randn(400, generator=generator)
    first, second = (hard + shift + 0.35 * torch.randn(400, generator=generator) for shift in (1.0, 0.0))
    paired = paired_difference(first, second)
    assert paired.low < 1.0 < paired.high
    assert paired.high - paired.low < 0.15
    assert bootstrap_mean(first).high - bootstrap_mean(first).low > 1.5
    with pytest.raises(ValueError, match="400 against 399"):
        paired_difference(first, second[1:])


def test_a_paired_difference_is_the_interval_of_the_differences_with_its_options():
    first, second, options = [3.0, 1.0, 4.0, 1.0], [1.0, 1.0, 2.0, 2.0], {"level": 0.5, "resamples": 50, "seed": 3}
    found = paired_difference(first, second, **options)
    assert found == bootstrap_mean([2.0, 0.0, 2.0, -1.0], **options) != paired_difference(first, second)
    assert (found.estimate, found.level) == (0.75, 0.5)


def test_the_same_seed_gives_the_same_interval_and_it_prints():
    x = torch.arange(50.0)
    assert bootstrap_mean(x) == bootstrap_mean(x) != bootstrap_mean(x, seed=1)
    assert str(bootstrap_mean([0.5, 0.5])) == "0.50 [0.50, 0.50]"
