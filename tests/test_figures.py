"""The pictures that explain, read back from their artists: what is drawn must be what was given or can be derived."""

import errno
import math
import sys
from dataclasses import replace
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from dpo_helpers.errors import ArtefactError
from dpo_helpers.evaluation import Evaluation
from dpo_helpers.fast.flat import flatten
from dpo_helpers.show import figures
from dpo_helpers.show.figures import canvas, worlds
from dpo_helpers.tokens import EncodedPair, collate
from dpo_helpers.uncertainty import Interval
from dpo_helpers.worlds import tabular

NAN = math.nan


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in order, instead of closed ones."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(canvas.plt, "close", found.append)
        yield found
    for figure in found:
        plt.close(figure)


def heights(axis):
    return [bar.get_height() for bar in axis.patches]


def ticks(axis, which="x"):
    return [label.get_text() for label in getattr(axis, f"get_{which}ticklabels")()]


def lines(axis):
    """Data of the lines of an axis: [(x, y), …]."""
    return [
        (np.asarray(x, float).tolist(), np.asarray(y, float).tolist()) for x, y in (a.get_data() for a in axis.lines)
    ]


def has_line(axis, x, y):
    near = [a for a in lines(axis) if len(a[0]) == len(x) and np.allclose(a[0], x) and np.allclose(a[1], y, atol=1e-6)]
    return bool(near)


def legend_of(artist):
    """Text -> colour of the legend of an axis or of a figure."""
    legend = artist.legends[0] if hasattr(artist, "legends") else artist.get_legend()
    return {t.get_text(): h for t, h in zip(legend.get_texts(), legend.legend_handles, strict=True)}


# tokens


def test_batch_layout(drawn):
    """Two pairs; the second one's chosen response is cut, so no end-of-text; its prompt is the id that pads.

    The first chosen response holds that id in its middle, which is no end: kinds go by position.
    """
    pairs = [EncodedPair([5, 6], [0, 8, 0], [7, 0], index=11), EncodedPair([0], [7], [0], index=4)]
    said = figures.plot_batch_layout(collate(pairs, 0), pad_id=0)
    (axis,) = drawn[0].axes
    mesh = axis.collections[0]
    assert mesh.get_array().reshape(4, 5).tolist() == [
        [1, 1, 2, 2, 3],
        [1, 2, 0, 0, 0],
        [1, 1, 2, 3, 0],
        [1, 3, 0, 0, 0],
    ]
    assert ticks(axis, "y") == ["chosen, pair 11", "chosen, pair 4", "rejected, pair 11", "rejected, pair 4"]
    shown = {name: to_rgb(handle.get_facecolor()) for name, handle in legend_of(axis).items()}
    for kind, name in enumerate(("padding", "prompt", "response", "its end-of-text")):
        assert shown[name] == pytest.approx(to_rgb(mesh.to_rgba(kind)))
    assert axis.get_ylim() == (4, 0), "the first row is at the top"
    assert said == (
        "2 pairs are 4 rows of 5 positions: 6 prompt tokens, 7 response tokens, 3 of them end-of-text, and padding."
    )


def test_token_logprobs(drawn):
    said = figures.plot_token_logprobs([" a", "\n", "$x$", " "], [-0.5, -2.0, -0.25, -1.0])
    (axis,) = drawn[0].axes
    assert heights(axis) == [-0.5, -2.0, -0.25, -1.0]
    assert ticks(axis) == ["a", "↵", r"\$x\$", "␣"]
    colours = [to_rgb(bar.get_facecolor()) for bar in axis.patches]
    assert [colour == colours[1] for colour in colours] == [False, True, False, False], "the most surprising is marked"
    assert said == "Of 4 tokens the most surprising one is “↵” with -2.00 nats."


def test_many_tokens_go_on_in_a_second_row(drawn):
    """49 tokens, one more than fit: 25 and 24, on the same scale; the first of two equal surprises is marked."""
    logps = [-0.1 * (i % 7) for i in range(49)]
    figures.plot_token_logprobs([str(i) for i in range(49)], logps)
    first, second = drawn[0].axes
    assert (len(first.patches), len(second.patches)) == (25, 24)
    assert heights(first) + heights(second) == logps
    assert ticks(first) + ticks(second) == [str(i) for i in range(49)]
    assert first.get_ylim() == second.get_ylim()
    assert first.get_xlim() == second.get_xlim()
    colours = [to_rgb(bar.get_facecolor()) for axis in (first, second) for bar in axis.patches]
    assert [i for i, colour in enumerate(colours) if colour != colours[0]] == [6]
    with pytest.raises(ValueError, match="zip"):
        figures.plot_token_logprobs(["a"], [-1.0, -2.0])


def packed(prompt, chosen, rejected):
    return flatten([EncodedPair(list(range(1, prompt + 1)), [7] * chosen, [8] * rejected)])


def mask_of(figure, n):
    return figure.axes[0].collections[0].get_array().reshape(n, n).tolist()


def test_pair_mask(drawn):
    """Prompt p q, chosen a b (its end is left out), rejected c: 1 read by the prompt, 2 by chosen, 3 by rejected."""
    said = figures.plot_pair_mask(packed(2, 3, 2), ["p", "q", " a", "b", "$"])
    assert mask_of(drawn[0], 5) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [2, 2, 2, 0, 0],
        [2, 2, 2, 2, 0],
        [3, 3, 0, 0, 3],
    ]
    (axis,) = drawn[0].axes
    assert ticks(axis) == ["p", "q", "a", "b", r"\$"]
    assert [int(text.split()[-1]) for text in ticks(axis, "y")] == [0, 1, 2, 3, 2], "rejected positions start again"
    assert {x[0] for x, _ in lines(axis) if x[0] == x[1]} == {2, 4}, "borders after the prompt and after chosen"
    assert said == (
        "5 tokens in one row: 2 of the prompt, 2 chosen, 1 rejected; 13 of 25 places are read, 0 of them between the "
        "two responses."
    )


def test_padding_of_the_rows_reads_nothing(drawn):
    """Rows of 2 + 4 and 2 + 3 tokens share a group, so the shorter one is padded: 1+2 + (3+4+5+6) + (3+4+5) = 33."""
    flat = packed(2, 5, 4)
    assert [tuple(group.shape) for group in flat.groups] == [(2, 6)]
    assert "33 of 81 places are read, 0 of them between" in figures.plot_pair_mask(flat, list("abcdefghi"))
    assert mask_of(drawn[0], 9)[0] == [1] + [0] * 8


def test_a_mask_that_leaks_is_seen(drawn):
    """Were the responses in one row, at positions that go on, the rejected token would read both chosen ones."""
    flat = packed(2, 3, 2)
    groups = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[0, 1]])
    leaking = replace(flat, groups=groups, positions=torch.tensor([0, 1, 2, 3, 4]))
    assert "15 of 25 places are read, 2 of them between the two responses" in figures.plot_pair_mask(
        leaking, list("pqabc")
    )
    assert mask_of(drawn[0], 5)[4] == [3, 3, 3, 3, 3]


def test_a_long_pair_has_fewer_labels_at_their_tokens(drawn):
    """100 tokens, a label every third of them, each at its own place."""
    figures.plot_pair_mask(packed(50, 26, 26), [f"t{i}" for i in range(100)])
    (axis,) = drawn[0].axes
    assert ticks(axis) == [f"t{i}" for i in range(0, 100, 3)]
    assert axis.get_xticks().tolist() == [i + 0.5 for i in range(0, 100, 3)]
    with pytest.raises(ValueError, match="zip"):
        figures.plot_pair_mask(packed(2, 3, 2), ["too", "few"])


def test_token_logratios(drawn):
    """Largest |log-ratio| 2: colours at 0 (-2), 3/4 (+1) and 5/8 (+0.5) of the colour map."""
    said = figures.plot_token_logratios([(" ab", 1.0), ("\n", -2.0)], [("$5", 0.5)])
    chosen, rejected, bar = drawn[0].axes
    boxes = [(box.get_x(), box.get_width(), to_rgb(box.get_facecolor())) for box in chosen.patches + rejected.patches]
    colours = plt.get_cmap("PuOr_r")
    assert [box[:2] for box in boxes] == [(0, 3), (3, 1), (0, 2)]
    for box, place in zip(boxes, (0.75, 0.0, 0.625), strict=True):
        assert box[2] == pytest.approx(to_rgb(colours(place)))
    assert [text.get_text() for text in [*chosen.texts, *rejected.texts]] == [" ab", "↵", r"\$5"]
    assert bar.get_xlim() == (-2, 2)
    assert chosen.get_title(loc="left") == "chosen: log-ratio -1.00"
    assert said == (
        "Token by token: the chosen log-ratio is -1.00, its largest part -2.00 at “↵”; "
        "the rejected log-ratio is +0.50, its largest part +0.50 at “$5”."
    )


def test_running_text_breaks_lines_and_stays_in_its_boxes(drawn):
    """Of 98 characters a line, 24 tokens of four fit: 60 tokens are 24 + 24 + 12. One long token is shortened to 40."""
    figures.plot_token_logratios([("word", 0.0)] * 60, [("x" * 500, 0.0)])
    chosen, rejected, bar = drawn[0].axes
    places = [(box.get_x(), math.floor(box.get_y())) for box in chosen.patches]
    assert places == [(4 * (i % 24), i // 24) for i in range(60)]
    assert chosen.get_ylim() == (3, 0)
    assert rejected.patches[0].get_width() == 40
    assert rejected.texts[0].get_text() == "x" * 39 + "…"
    assert bar.get_xlim() == (-1, 1), "all 0: a scale is still there"
    drawn[0].canvas.draw()
    renderer = drawn[0].canvas.get_renderer()
    for axis in (chosen, rejected):
        for box, text in zip(axis.patches, axis.texts, strict=True):
            outer, inner = box.get_window_extent(renderer), text.get_window_extent(renderer)
            assert outer.x0 - 1 <= inner.x0, text.get_text()
            assert inner.x1 <= outer.x1 + 1, text.get_text()
            assert outer.x1 <= drawn[0].bbox.x1


def test_one_pair(drawn):
    """β = 0.1, log-ratios 2 and -5: rewards 0.2 and -0.5, margin 0.7, loss ln(1 + e^-0.7) = 0.40319."""
    said = figures.plot_one_pair((-10.0, -20.0), (-12.0, -15.0), 0.1)
    logps, ratios, rewards, ends = drawn[0].axes
    assert heights(logps) == [-12, -15, -10, -20]
    assert [round(bar.get_x() + bar.get_width() / 2, 6) for bar in logps.patches] == [-0.2, 0.8, 0.2, 1.2]
    assert heights(ratios) == [2, -5]
    assert heights(rewards) == pytest.approx([0.2, -0.5])
    assert heights(ends) == pytest.approx([0.7, 0.40319], abs=1e-5)
    assert [text.get_text() for text in ends.texts] == ["0.70", "0.40"]
    assert ticks(ratios) == ticks(rewards) == ["chosen", "rejected"]
    names = {name: to_rgb(handle.get_facecolor()) for name, handle in legend_of(logps).items()}
    assert to_rgb(logps.patches[0].get_facecolor()) == names["π_ref"]
    assert to_rgb(logps.patches[2].get_facecolor()) == names["π_θ"] != names["π_ref"]
    assert said == (
        "Log-ratios +2.00 (chosen) and -5.00 (rejected), times β = 0.1, are rewards +0.20 and -0.50: the margin is +0.70 "
        "and the loss 0.40."
    )


def test_next_tokens(drawn):
    """Four tokens by their largest probability; a token that a model's mapping lacks has no bar there."""
    said = figures.plot_next_tokens({"sft": {"a": 0.5, "b": 0.3, "c": 0.2}, "dpo": {" d": 0.6, "a": 0.4}})
    (axis,) = drawn[0].axes
    assert ticks(axis) == ["d", "a", "b", "c"]
    assert heights(axis) == pytest.approx([NAN, 0.5, 0.3, 0.2, 0.6, 0.4, NAN, NAN], nan_ok=True)
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axis.patches]
    assert centres == pytest.approx([-0.2, 0.8, 1.8, 2.8, 0.2, 1.2, 2.2, 3.2])
    assert to_rgb(legend_of(axis)["dpo"].get_facecolor()) == to_rgb(axis.patches[4].get_facecolor())
    assert said == "The likeliest first token of each model: sft “a” with 0.50, dpo “ d” with 0.60."


def test_next_tokens_are_eight_at_most_and_each_model_has_its_likeliest(drawn):
    """Three models without a common token: the first two of each, then the third of the first two."""
    found = {m: {f"{m}{i}": 0.3 - 0.05 * i - 0.01 * k for i in range(5)} for k, m in enumerate("xyz")}
    figures.plot_next_tokens(found)
    assert ticks(drawn[0].axes[0]) == ["x0", "y0", "z0", "x1", "y1", "z1", "x2", "y2"]


# worlds


def areas(axis):
    """(bottom, top) of each stacked area at each update, by area."""
    found = []
    for area in axis.collections:
        points = area.get_paths()[0].vertices
        found.append([(points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in (0, 1)])
    return np.round(found, 6).tolist()


def test_mass(drawn, tmp_path):
    histories = {
        "one": torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]),
        "$two$": torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], requires_grad=True),
    }
    said = figures.plot_mass(histories, ["a", "b$", "c"], tmp_path, "03-mass")
    one, two = drawn[0].axes
    assert areas(one) == [[[0, 0.5], [0, 0.6]], [[0.5, 0.8], [0.6, 0.9]], [[0.8, 1], [0.9, 1]]]
    assert areas(two) == [[[0, 0.5], [0, 0.1]], [[0.5, 0.8], [0.1, 0.2]], [[0.8, 1], [0.2, 1]]]
    assert [axis.get_title() for axis in (one, two)] == ["one", r"\$two\$"]
    assert list(legend_of(drawn[0])) == ["a", r"b\$", "c"]
    assert one.get_xlim() == (0, 1)
    assert said == (
        "Probabilities from first to last update. one: a 0.50 → 0.60, b$ 0.30 → 0.30, c 0.20 → 0.10; "
        "$two$: a 0.50 → 0.10, b$ 0.30 → 0.10, c 0.20 → 0.80."
    )
    assert (tmp_path / "03-mass.png").exists()
    with pytest.raises(ValueError, match="zip"):
        figures.plot_mass(histories, ["a", "b"])


@pytest.mark.parametrize(("panels", "axes"), [(1, 1), (4, 4), (5, 6)])
def test_mass_of_many_histories_and_responses(drawn, panels, axes):
    """Twelve responses have twelve colours; panels without a history are empty."""
    even = torch.full((2, 12), 1 / 12)
    figures.plot_mass({str(i): even for i in range(panels)}, [f"r{i}" for i in range(12)])
    assert len(drawn[0].axes) == axes
    assert [len(axis.collections) for axis in drawn[0].axes] == [12] * panels + [0] * (axes - panels)
    assert len({tuple(area.get_facecolor()[0]) for area in drawn[0].axes[0].collections}) == 12


def test_loss_and_weight(drawn):
    """β = 1, margin ln 3: σ(-ln 3) = 1/4 is the weight, ln(4/3) the loss; the tangent reaches 2 to each side."""
    margin, loss = math.log(3), math.log(4 / 3)
    said = figures.plot_loss_and_weight((margin,), 1.0)
    left, right = drawn[0].axes
    assert has_line(left, [margin], [loss])
    assert has_line(left, [margin - 2, margin + 2], [loss + 0.5, loss - 0.5])
    assert has_line(right, [margin], [0.25])
    (x, losses), (_, weights) = lines(left)[0], lines(right)[0]
    assert (x[0], x[120], x[240]) == (-6, 0, 6)
    assert losses[120] == pytest.approx(math.log(2))
    assert weights[120] == 0.5
    assert losses[0] == pytest.approx(6.002476, abs=1e-6)
    assert weights[240] == pytest.approx(0.002473, abs=1e-6)
    slopes = np.gradient(losses, x)[1:-1]
    assert np.allclose(slopes, -np.array(weights)[1:-1], atol=1e-3), "the weight is the loss's slope"
    assert said == "With β = 1, at margin 1.09861 the loss is 0.29 and the weight 0.25."


def test_a_margin_outside_the_usual_range_is_on_the_sheet(drawn):
    figures.plot_loss_and_weight((-20.0,), 0.5)
    left, right = drawn[0].axes
    for axis, y in ((left, 10.0000454), (right, 0.4999773)):
        assert has_line(axis, [-20.0], [y])
        low, high = axis.get_xlim()
        bottom, top = axis.get_ylim()
        assert low < -20 < high
        assert bottom < y < top


@pytest.fixture
def shown(monkeypatch):
    """What is displayed in the notebook."""
    found = []
    monkeypatch.setattr("IPython.display.display", lambda *things, **_: found.extend(things))
    return found


def points(figure):
    """The marked margin and its loss, and the marked margin and its weight."""
    return [[(x[0], round(y[0], 5)) for x, y in lines(axis) if len(x) == 1] for axis in figure.axes]


def test_explore_loss(drawn, shown, monkeypatch):
    """β = 0.5, margins -2, 0, 3: ln(1+e), ln 2, ln(1+e^-1.5); weights σ(1)/2, 1/4, σ(-1.5)/2. Then the sliders."""
    cleared = []
    monkeypatch.setattr("ipywidgets.widgets.interaction.clear_output", lambda wait=False: cleared.append(wait))
    said = figures.explore_loss(0.5)
    assert said == (
        "With β = 0.5, at margin -2 the loss is 1.31 and the weight 0.37; at margin 0 the loss is 0.69 and the weight "
        "0.25; at margin 3 the loss is 0.20 and the weight 0.09."
    )
    assert points(drawn[0]) == [
        [(-2, 1.31326), (0, 0.69315), (3, 0.20141)],
        [(-2, 0.36553), (0, 0.25), (3, 0.09121)],
    ]
    (panel,) = shown
    margin, beta = panel.children[:2]
    assert (margin.min, margin.max, beta.min, beta.max, beta.value) == (-6, 6, 0.1, 5, 0.5)
    assert points(drawn[1]) == [[(0, 0.69315)], [(0, 0.25)]]
    margin.value = 2.0
    assert points(drawn[2]) == [[(2, 0.31326)], [(2, 0.13447)]]
    beta.value = 2.0
    assert points(drawn[3]) == [[(2, 0.01815)], [(2, 0.03597)]]
    assert drawn[3].axes[0].get_title() == "DPO loss, β = 2"
    assert len(drawn) == 4, "one figure a change"
    assert cleared == [True] * 3, "each takes the place of the one before"


def test_explore_loss_without_ipywidgets(drawn, shown, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    said = figures.explore_loss(1.0)
    assert len(drawn) == 1
    assert shown == []
    first, second = capsys.readouterr().out.splitlines()
    assert first == said
    assert "ipywidgets" in second
    assert "not installed" in second


def test_ipywidgets_is_imported_only_when_it_is_used():
    assert [name for name, value in vars(worlds).items() if getattr(value, "__name__", "") == "ipywidgets"] == []


def row(step, split, **values):
    return {"step": step, "split": split, **values}


def training(losses, held):
    """A run: training loss by update, held-out (step, loss); rewards are ± the loss, the accuracy half of it."""
    values = [(step, "train", loss) for step, loss in enumerate(losses, 1)] + [(s, "held_out", x) for s, x in held]
    return [
        row(s, split, loss=x, chosen_reward=x, rejected_reward=-x, reward_accuracy=x / 2, ties=float(s == 0))
        for s, split, x in values
    ]  # fmt: skip


def test_puzzles(drawn):
    runs = {"A": training([0.7, 0.5, 0.3], [(0, 0.8), (3, 0.4)]), "$B": training([0.2, 1.0], [(0, 0.6), (2, 1.6)])}
    said = figures.plot_puzzles(runs)
    loss, rewards, accuracy, other_loss, other_rewards, other_accuracy = drawn[0].axes
    assert has_line(loss, [1, 2, 3], [0.7, 0.5, 0.3])
    assert has_line(loss, [0, 3], [0.8, 0.4])
    assert has_line(loss, [0, 1], [math.log(2)] * 2)
    for sign in (1, -1):
        assert has_line(rewards, [1, 2, 3], [sign * 0.7, sign * 0.5, sign * 0.3])
        assert has_line(rewards, [0, 3], [sign * 0.8, sign * 0.4])
    assert has_line(accuracy, [1, 2, 3], [0.35, 0.25, 0.15])
    assert has_line(accuracy, [3], [0.2]), "at the start all pairs tie: no accuracy yet"
    assert has_line(other_loss, [1, 2], [0.2, 1.0])
    assert has_line(other_rewards, [0, 2], [-0.6, -1.6])
    assert has_line(other_accuracy, [2], [0.8])
    assert [axis.get_ylabel() for axis in (loss, other_loss)] == ["A", r"\$B"]
    assert accuracy.get_xlim() == loss.get_xlim()
    assert said == (
        "At the end (chosen before rejected): A: loss 0.40, rewards 0.40 and -0.40, accuracy 0.20; "
        "$B: loss 1.60, rewards 1.60 and -1.60, accuracy 0.80."
    )


def test_puzzles_of_a_run_that_was_never_evaluated(drawn):
    """Its last training row speaks for it."""
    assert "A: loss 0.30, rewards 0.30" in figures.plot_puzzles({"A": training([0.7, 0.3], [])})


def test_optimum_frontier(drawn):
    """Rewards ln 3 and 0, π_ref ½: π*(β = 1) = (¾, ¼), reward ¾·ln 3 = 0.82396, KL ¾·ln 1.5 + ¼·ln ½ = 0.13081.

    β = 0.5: (0.9, 0.1), reward 0.98875, KL 0.9·ln 1.8 + 0.1·ln 0.2 = 0.36806.
    """
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    world = tabular.TabularWorld(torch.tensor([math.log(3), 0.0], dtype=torch.float64), half)
    said = figures.plot_optimum_frontier(world, [0.5, 1.0])
    (axis,) = drawn[0].axes
    (kls, rewards), *_ = lines(axis)
    shares = [1 / (1 + 3 ** (-1 / beta)) for beta in (20, 0.05)]
    assert (rewards[0], rewards[-1]) == pytest.approx([p * math.log(3) for p in shares])
    assert kls == sorted(kls)
    assert rewards == sorted(rewards)
    assert has_line(axis, [0.130812], [0.823959])
    assert has_line(axis, [0.368064], [0.988751])
    assert has_line(axis, [0], [math.log(3) / 2])
    assert has_line(axis, [0, 1], [math.log(3)] * 2)
    names = [line.get_label() for line in axis.lines]
    assert names == ["π*, β from 20 to 0.05", "π_ref", "β = 1", "β = 0.5", "reward of the best response"]
    assert said == ("Mean reward of π*: 0.82 at KL 0.13 with β = 1, 0.99 at KL 0.37 with β = 0.5; π_ref has 0.55.")


def test_no_policy_lies_above_the_optimum_frontier(drawn):
    world = tabular.make_world(5)
    figures.plot_optimum_frontier(world, [1.0])
    (kls, rewards), *_ = lines(drawn[0].axes[0])
    generator = torch.Generator().manual_seed(0)
    below = 0
    for policy in (3 * torch.randn(500, 5, generator=generator, dtype=torch.float64)).softmax(dim=1):
        kl, reward = tabular.kl_divergence(policy, world.reference), (policy * world.reward).sum().item()
        if kls[0] <= kl <= kls[-1]:
            below += 1
            assert reward <= np.interp(kl, kls, rewards) + 1e-3
    assert below > 100


def point(step, kl, reward, **more):
    return {"step": step, "kl": kl, "true_reward": reward, "reward_margin": -reward, **more}


START = Evaluation("reference", 0.5, {"kl": 0.0, "true_reward": -1.0, "reward_margin": 0.0}, [], {})


def test_plane_filling(drawn):
    """Evaluated after 62, 125, 188 and 250 updates, the rounded quarters; the hot run only at its end."""
    steady = [point(62, 0.1, 1.0), point(125, 0.2, 2.0), point(188, 0.4, 1.5), point(250, 0.8, 0.5)]
    said = figures.plot_plane_filling({"β = $1$": steady, "hot": [point(75, 30.0, 3.0)]}, START)
    axes = drawn[0].axes
    kls, rewards = [0.0, 0.1, 0.2, 0.4, 0.8], [-1.0, 1.0, 2.0, 1.5, 0.5]
    for quarter, axis in enumerate(axes, 1):
        assert has_line(axis, kls[: quarter + 1], rewards[: quarter + 1])
        assert has_line(axis, [kls[quarter]], [rewards[quarter]]), "the last point is marked"
        assert has_line(axis, [0.0, 30.0], [-1.0, 3.0]) is (quarter == 4)
        assert (axis.get_xlim(), axis.get_ylim()) == (axes[0].get_xlim(), axes[0].get_ylim())
        assert axis.get_title() == f"After {quarter}/4 of each training"
    low, high = axes[0].get_ylim()
    assert low < -1
    assert high > 3
    assert list(legend_of(drawn[0])) == [r"β = \$1\$", "hot", "π_ref"]
    assert said == (
        "Highest true reward so far: after 1/4 1.00 (β = $1$, KL 0.10), after 2/4 2.00 (β = $1$, KL 0.20), "
        "after 3/4 2.00 (β = $1$, KL 0.20), after 4/4 3.00 (hot, KL 30.00)."
    )


def test_plane_filling_without_a_true_reward(drawn):
    """The margin is drawn then, and runs that have none are left out, as SFT."""
    start = Evaluation("reference", 0.5, {"kl": 0.0, "reward_margin": 0.0}, [], {})
    said = figures.plot_plane_filling({"sft": [{"step": 4, "kl": 9.0}], "dpo": [point(4, 0.5, -2.0)]}, start)
    assert has_line(drawn[0].axes[3], [0.0, 0.5], [0.0, 2.0])
    assert list(legend_of(drawn[0])) == ["dpo", "π_ref"]
    assert said == (
        "Highest reward margin so far: after 1/4 0.00 (the reference, KL 0.00), after 2/4 0.00 (the reference, KL 0.00), "
        "after 3/4 0.00 (the reference, KL 0.00), after 4/4 2.00 (dpo, KL 0.50)."
    )


def test_win_rates(drawn):
    """From top to bottom; a rate whose interval is lopsided, and one that is sure."""
    said = figures.plot_win_rates({"true": Interval(0.75, 0.7, 0.9, 0.95), "all": Interval(1.0, 1.0, 1.0, 0.95)})
    (axis,) = drawn[0].axes
    bars = [c for c in axis.containers if isinstance(c, ErrorbarContainer)]
    ends = [bar.lines[2][0].get_segments()[0].tolist() for bar in bars]
    assert np.allclose(ends, [[[0.7, 0], [0.9, 0]], [[1.0, 1], [1.0, 1]]])
    assert [bar.lines[0].get_xdata().tolist() for bar in bars] == [[0.75], [1.0]]
    assert ticks(axis, "y") == ["true", "all"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first one on top"
    assert has_line(axis, [0.5, 0.5], [0, 1])
    assert axis.get_xlabel() == "win rate, 95% interval"
    assert said == "Win rates: true 0.75 [0.70, 0.90]; all 1.00 [1.00, 1.00]."


# pictures of notebook c


def gain(kl, score, true_reward):
    """A point along a training: what a reward model says, and what is true."""
    return {"kl": kl, "kl_se": 0.1, "score": score, "score_se": 0.2, "true_reward": true_reward, "true_reward_se": 0.3}


def on_plane(family, name="x", kl=1.0, reward=2.0):
    return {"family": family, "name": name, "short": name, **gain(kl, 0.0, reward)}


def rloo_rows(updates):
    """A training with a held-out point at its start and at its end: scores 0, 1, …, log-ratios 0, 0.5, …."""
    rows = [{"split": "train", "step": i + 1, "score": float(i), "k1": i / 2} for i in range(updates)]
    points = [{"split": "held_out", "step": step, **gain(step / 2, step, -step)} for step in (0, updates)]
    return [points[0], *rows, points[1]]


def test_calibration(drawn):
    rows = [{"predicted": 0.6, "observed": 0.5, "observed_se": 0.1}, {"predicted": 0.9, "observed": 1.0}]
    said = figures.plot_calibration({"small": rows})
    (axis,) = drawn[0].axes
    assert has_line(axis, [0.5, 1], [0.5, 1]), "the diagonal"
    assert has_line(axis, [0.6, 0.9], [0.5, 1.0])
    assert said == "Agreement in the surest bin, observed (predicted): small 1.00 (0.90)."


def test_rlhf_run(drawn):
    """Two updates and three: a line each of 2 and 3 training values; points at the start and at the end."""
    said = figures.plot_rlhf_run(rloo_rows(2))
    score, true_reward, kl = drawn[0].axes
    assert has_line(score, [1, 2], [0.0, 1.0])
    assert has_line(score, [0, 2], [0, 2])
    assert has_line(true_reward, [0, 2], [0, -2])
    assert has_line(kl, [1, 2], [0.0, 0.5])
    assert has_line(kl, [0, 2], [0.0, 1.0])
    assert said == (
        "On held-out prompts, from first to last point: score 0.00 → 2.00, true reward 0.00 → -2.00, kl 0.00 → 1.00."
    )
    unknown = [{k: v for k, v in row.items() if "true" not in k} for row in rloo_rows(2)]
    figures.plot_rlhf_run(unknown)
    assert len(drawn[1].axes) == 2, "without a true reward"


def test_rlhf_plane(drawn):
    points = [
        on_plane("RLOO", "b", 2.0, 1.5),
        on_plane("RLOO", "a", 1.0, 1.0),
        on_plane("on-policy DPO", "c", 0.5, 0.5),
    ]
    said = figures.plot_rlhf_plane(points, -0.5)
    (axis,) = drawn[0].axes
    assert has_line(axis, [1.0, 2.0], [1.0, 1.5]), "a family is joined by rising KL"
    assert has_line(axis, [0], [-0.5])
    assert said == "True reward at KL: π_ref -0.50 at 0, b 1.50 at 2.00, a 1.00 at 1.00, c 0.50 at 0.50."


def test_parting(drawn):
    """Gains over the start: the score rises from 1 to 4, the true reward from -1 to 1 and back to 0."""
    rows = [gain(0.0, 1.0, -1.0), gain(2.0, 3.0, 1.0), gain(5.0, 4.0, 0.0)]
    said = figures.plot_parting(rows, {"score": "the weak model"})
    (axis,) = drawn[0].axes
    assert has_line(axis, [0.0, 2.0, 5.0], [0.0, 2.0, 3.0])
    assert has_line(axis, [0.0, 2.0, 5.0], [0.0, 2.0, 1.0])
    assert said == (
        "Gain at the end, at KL 5.00: the weak model 3.00 (highest 3.00 at KL 5.00), "
        "true reward 1.00 (highest 2.00 at KL 2.00)."
    )
    unknown = [{key: value for key, value in row.items() if "true_reward" not in key} for row in rows]
    said = figures.plot_parting(unknown, {"score": "the weak model"})
    assert said == "Gain at the end, at KL 5.00: the weak model 3.00 (highest 3.00 at KL 5.00)."


# every picture

WORLD = tabular.TabularWorld(*torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64))
PICTURES = {
    "01-batch-layout": lambda t, f: figures.plot_batch_layout(collate([EncodedPair([1], [2, 0], [3, 0])], 0), 0, f),
    "02-token-logprobs": lambda t, f: figures.plot_token_logprobs([t, "b"], [-2.0, -1.0], f),
    "mass": lambda t, f: figures.plot_mass({t: torch.tensor([[0.5, 0.5], [1.0, 0.0]])}, [t, "b"], f),
    "04-loss-and-weight": lambda t, f: figures.plot_loss_and_weight((1.0,), 0.5, f),
    "05-pair-mask": lambda t, f: figures.plot_pair_mask(packed(1, 2, 2), [t, "b", t], f),
    "05-token-logratios": lambda t, f: figures.plot_token_logratios([(t, 2.0), ("b", 1.0)], [(t, -1.0)], f),
    "05-one-pair": lambda t, f: figures.plot_one_pair((-1.0, -2.0), (-1.5, -1.5), 0.5, f),
    "05-puzzles": lambda t, f: figures.plot_puzzles({t: training([0.7, 0.6], [(0, 0.7), (2, 0.5)])}, f),
    "06-optimum-frontier": lambda t, f: figures.plot_optimum_frontier(WORLD, [1.0], f),
    "06-plane-filling": lambda t, f: figures.plot_plane_filling({t: [point(4, 1.0, 1.0)]}, START, f),
    "07-next-tokens": lambda t, f: figures.plot_next_tokens({t: {t: 0.5, "b": 0.2}}, f),
    "07-win-rates": lambda t, f: figures.plot_win_rates({t: Interval(0.6, 0.5, 0.8, 0.95)}, f),
    "c-calibration": lambda t, f: figures.plot_calibration({t: [{"predicted": 0.6, "observed": 0.7}]}, f),
    "c-parting": lambda t, f: figures.plot_parting([gain(0.0, 0.0, 1.0), gain(1.0, 2.0, 0.5)], {"score": t}, f),
    "c-rlhf-plane": lambda t, f: figures.plot_rlhf_plane([on_plane("DPO", t)], 0.0, f),
    "c-rlhf-run": lambda t, f: figures.plot_rlhf_run(rloo_rows(3), f),
}
NO_TEXT = {"01-batch-layout", "04-loss-and-weight", "05-one-pair", "06-optimum-frontier", "c-rlhf-run"}
HOSTILE = "$\\frac{$\x1b[31m\x07\n\r\x85\u202eab\u200b" + "x" * 3000


@pytest.mark.parametrize("name", PICTURES)
def test_hostile_text_has_no_effect_in_any_picture(name, drawn, tmp_path, capsys):
    """Neither in the figure, nor in the sentence, nor in the file; it is no formula, and pushes nothing off the sheet."""
    said = PICTURES[name](HOSTILE, tmp_path)
    assert capsys.readouterr().out == said + "\n"
    assert said.isprintable()
    assert [file.name for file in tmp_path.iterdir()] == [f"{name}.png"]
    assert Image.open(tmp_path / f"{name}.png").text["Description"] == said
    labels = [artist.get_text() for artist in drawn[0].findobj(Text)]
    assert any(r"\$\frac{\$" in label for label in labels) is (name not in NO_TEXT)
    for label in labels:
        assert label.isprintable()
        assert len(label) < 100
        assert Text(0, 0)._preprocess_math(label)[1] is False, label
    assert_tidy(drawn[0])


def assert_tidy(figure):
    """No two tick labels of an axis overlap, and titles, labels and legends are on the sheet, to a pixel."""
    renderer, sheet = figure.canvas.get_renderer(), figure.bbox.padded(1)

    def extent(artist):
        return artist.get_window_extent(renderer)

    for axis in figure.axes:
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [extent(text) for text in labels if text.get_text()]
            assert not any(one.overlaps(two) for one, two in pairwise(boxes))
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            if text.get_text():
                box = extent(text)
                assert sheet.contains(box.x0, box.y0), text.get_text()
                assert sheet.contains(box.x1, box.y1), text.get_text()
    for legend in legends_of(figure):
        box = extent(legend)
        assert sheet.contains(box.x0, box.y0)
        assert sheet.contains(box.x1, box.y1)


# pictures of a run, and what all of them keep to

BETAS = (0.05, 0.1, 0.5, 1.0, 5.0)


def measured(beta=0.5, kl=1.0, **more):
    """An evaluation with all that is drawn; every metric but the KL is `beta` or `more`'s."""
    keys = (
        "chosen_reward rejected_reward reward_margin true_reward reward_accuracy chosen_logratio length ended "
        "repeated_3grams looping distinct_2"
    )
    metrics = dict.fromkeys(keys.split(), beta) | {"kl": kl} | more
    return Evaluation("x", beta, metrics | {f"{key}_se": 0.1 for key in metrics}, [], {})


def busy():
    """A training whose curves fill their panels from corner to corner, so that a legend finds no free place in them."""
    zigzag = [float(i % 2) for i in range(400)]
    rows = training(zigzag, [(40 * i, float(i % 2)) for i in range(11)])
    return [one | {"reward_margin": one["loss"], "loss_se": 0.1} for one in rows]


def path_of(name, i):
    points = ((0.1, 2.0), (5.0 + i, -1.0), (30.0, 2.0), (0.5, 0.5))
    return [measured(kl=kl, true_reward=r, reward_margin=-r).metrics | {"step": s} for s, (kl, r) in enumerate(points)]


def run_paths(*names):
    return {name: path_of(name, i) for i, name in enumerate(names)}


MODELS = {
    name: measured(kl=i / 2, true_reward=i, chosen_logratio=i) for i, name in enumerate(("reference", "sft", "dpo"))
}
SWEEP = {beta: measured(beta, kl=(7 * i) % 5, chosen_logratio=-i) for i, beta in enumerate(BETAS)}
LAB = tabular.make_world(20)
ALL_RUNS = run_paths("sft", *(f"β = {beta:g}" for beta in BETAS), "hot")
RUN_PICTURES = {
    "dpo": lambda: figures.plot_dpo(busy(), {"longer wins": 0.2, "best possible": 0.9}),
    "frontier": lambda: figures.plot_frontier(ALL_RUNS, MODELS["reference"]),
    "gradient_weight": lambda: figures.plot_gradient_weight(),
    "lengths": lambda: figures.plot_lengths({"prompt": range(50), "chosen": [1, 2, 49, 49], "rejected": [9] * 3}),
    "reward_kl": lambda: figures.plot_reward_kl(MODELS | {"dpo-from-sft": measured(kl=0.0, true_reward=2.0)}),
    "sft": lambda: figures.plot_sft(busy()),
    "study": lambda: figures.plot_study(busy(), MODELS, SWEEP),
    "sweep": lambda: figures.plot_sweep(SWEEP, {"longer wins": 0.2, "best possible": 5.0}),
    "tabular": lambda: figures.plot_tabular(LAB, {"π*": LAB.reference.flip(0)}, {300: 0.2, 3000: 0.01, 30000: 0.2}),
    "text_measures": lambda: figures.plot_text_measures(MODELS),
}
IDEAS = {name: lambda draw=draw: draw("a", None) for name, draw in PICTURES.items()}
IDEAS |= {
    "07-next-tokens": lambda: figures.plot_next_tokens({m: dict.fromkeys("abcdefgh", 0.5) for m in MODELS}),
    "05-puzzles": lambda: figures.plot_puzzles({"A": busy(), "B": busy()}),
    "06-optimum-frontier": lambda: figures.plot_optimum_frontier(LAB, BETAS),
    "06-plane-filling": lambda: figures.plot_plane_filling(ALL_RUNS, MODELS["reference"]),
    "04-loss-and-weight": lambda: figures.plot_loss_and_weight((-6.0, -3.0, 0.0, 3.0, 5.9), 5.0),
}
IDEAS |= {
    "c-rlhf-plane": lambda: figures.plot_rlhf_plane(
        [on_plane(f, f"n = {2**i}", 2.0**i / 4, (-1) ** i) for f in ("DPO", "RLOO", "best of n") for i in range(5)], 0.0
    ),
    "c-rlhf-run": lambda: figures.plot_rlhf_run(rloo_rows(200)),
}
EVERY = IDEAS | RUN_PICTURES


def test_a_line_joins_only_what_was_measured_alike(drawn):
    """The last point, of more prompts, stands apart where another has its update; a run of one point is a line to it."""
    rows = path_of("β = 1", 0)[:3]
    ends = [*rows, measured(kl=3.0, true_reward=1.0, reward_margin=1.0).metrics | {"step": rows[-1]["step"]}]
    figures.plot_frontier({"β = 1": ends, "hot": ends[:1]}, MODELS["reference"])
    lines = {tuple(line.get_xdata()) for line in drawn[-1].axes[0].lines}
    assert (0.0, *(row["kl"] for row in rows)) in lines
    assert (0.0, rows[0]["kl"]) in lines
    figures.plot_frontier({"β = 1": [{**ends[0], "kl_se": math.nan}]}, MODELS["reference"])  # of a single prompt
    figures.plot_plane_filling({"β = 1": ends}, MODELS["reference"])
    assert not any(3.0 in line.get_xdata() for axis in drawn[-1].axes for line in axis.lines)


def legends_of(figure):
    return [*figure.legends, *filter(None, (axis.get_legend() for axis in figure.axes))]


def covered(figure):
    """What lies under a legend: lines along their whole way, markers, error bars, bars and areas, and texts."""
    figure.canvas.draw()
    boxes = [legend.get_window_extent() for legend in legends_of(figure)]
    found = [("legend", one) for i, one in enumerate(boxes) if any(one.overlaps(two) for two in boxes[:i])]
    for box in boxes:
        for axis in figure.axes:
            texts = [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
            texts += [*axis.get_xticklabels(), *axis.get_yticklabels()]
            found += [text for text in texts if text.get_text() and text.get_window_extent().overlaps(box)]
            found += [artist for artist in artists_of(axis) if lies_under(artist, box)]
    return found


def artists_of(axis):
    return [*axis.lines, *axis.patches, *axis.collections]


def lies_under(artist, box):
    if artist.get_clip_on():  # only what is inside the axes is drawn of it
        box = Bbox.intersection(box, artist.axes.bbox)
    if box is None:
        return False
    to_pixels, point = artist.get_transform(), artist.get_figure().dpi / 72
    if isinstance(artist, Line2D):
        along = artist.get_linestyle() != "None" and artist.get_path().transformed(to_pixels).intersects_bbox(
            box, False
        )
        radius = artist.get_markersize() / 2 * point if artist.get_marker() not in ("None", None, "") else 0
        at = to_pixels.transform(artist.get_xydata())
        return along or (radius > 0 and bool(box.padded(radius).count_contains(at)))
    if isinstance(artist, PathCollection):  # a scatter's markers
        at = artist.get_offset_transform().transform(artist.get_offsets())
        return bool(box.padded(math.sqrt(max(artist.get_sizes())) / 2 * point).count_contains(at))
    if isinstance(artist, QuadMesh):
        return artist.axes.bbox.overlaps(box)
    paths = [artist.get_path()] if isinstance(artist, Patch) else artist.get_paths()
    return any(
        path.transformed(to_pixels).intersects_bbox(box, isinstance(artist, (Patch, PolyCollection))) for path in paths
    )


@pytest.mark.parametrize("name", EVERY)
def test_a_legend_covers_nothing(name, drawn):
    EVERY[name]()
    for figure in drawn:
        assert covered(figure) == []
        assert_tidy(figure)


def test_what_a_legend_covers_is_seen():
    """A line that only passes between its two far ends, a marker, an error bar, a bar, an area, a scatter, a label."""
    for draw in (
        lambda axis: axis.plot([0, 1], [0, 1]),
        lambda axis: axis.plot([0.5], [0.5], "o"),
        lambda axis: axis.errorbar([0.5], [0.1], yerr=0.6, ls="none"),
        lambda axis: axis.bar([0.5], [1.0]),
        lambda axis: axis.stackplot([0, 1], [1, 1]),
        lambda axis: axis.scatter([0.5], [0.5]),
        lambda axis: axis.pcolormesh(np.zeros((2, 2))),
        lambda axis: axis.text(0.5, 0.5, "x"),
    ):
        figure, axis = plt.subplots()
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.legend(handles=[Line2D([], [], label="all")], loc="center")
        assert covered(figure) == []
        draw(axis)
        axis.set(xlim=(0, 1), ylim=(0, 1))
        assert covered(figure) != []
        plt.close(figure)


def looks(figure):
    """Name -> the (colour, marker) of all that has this name."""
    found = {}
    for axis in figure.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            line = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
            found.setdefault(name, set()).add((to_rgb(line.get_color()), line.get_marker()))
    return found


def test_a_beta_has_one_look_in_all_figures(drawn):
    """Whichever other β are drawn and in whatever order, also those that are not the course's."""
    figures.plot_gradient_weight(betas=(5.0, 0.2, 0.05, 0.5))
    figures.plot_gradient_weight(betas=BETAS)
    figures.plot_optimum_frontier(LAB, (1.0, 0.1, 0.2))
    figures.plot_optimum_frontier(LAB, BETAS)
    for draw in (figures.plot_plane_filling, figures.plot_frontier):
        draw(ALL_RUNS, MODELS["reference"])
        draw(run_paths("hot", "β = 1", "β = 0.2", "sft"), MODELS["reference"])
    merged = {}
    for figure in drawn:
        for name, seen in looks(figure).items():
            merged.setdefault(name, set()).update(seen)
    names = {"sft", "hot", "π_ref", *(f"β = {beta:g}" for beta in (*BETAS, 0.2))}
    merged = {name: seen for name, seen in merged.items() if name in names}
    assert {name: len(seen) for name, seen in merged.items()} == dict.fromkeys(names, 1)
    assert len(set.union(*merged.values())) == len(names), "no two look alike"
    assert (
        len({marker for seen in merged.values() for _, marker in seen if seen != merged["β = 0.2"]}) == len(names) - 1
    )
    models = {"sft": "sft", "hot": "hot", "π_ref": "reference"}
    for name, model in models.items():
        assert merged[name] == {(to_rgb(canvas.MODEL_COLOUR[model]), canvas.MODEL_MARKER[model])}


def test_over_beta_each_point_has_the_marker_of_its_beta(drawn):
    RUN_PICTURES["sweep"]()
    RUN_PICTURES["study"]()
    for axis in (*drawn[0].axes, drawn[1].axes[2]):
        points = [(x[0], line.get_marker()) for line in axis.lines if len(x := line.get_xdata()) == 1]
        assert {beta for beta, _ in points} == set(BETAS)
        assert {marker for beta, marker in points if beta == 0.1 and marker not in ("|", "_", 2, 3)} == {"^"}
        for beta, marker in points:
            assert marker in ("_", canvas.beta_style(beta)[1]), "of a point, or the cap of its error bar"


def test_any_beta_has_a_look_of_its_own():
    """Named with six digits, as in a run's name; extreme values too."""
    assert canvas.beta_style(1 / 3) == canvas.run_style("β = 0.333333") == canvas.beta_style(0.333333)
    others = [canvas.beta_style(beta) for beta in (1e-9, 0.02, 0.2, 0.3, 2.0, 10.0, 1e9)]
    assert len({colour for colour, _ in others}) == 7
    taken = {*canvas.MODEL_MARKER.values(), *(canvas.beta_style(beta)[1] for beta in BETAS)}
    assert len(taken) == len(canvas.MODEL_MARKER) + len(BETAS)
    assert not taken & {marker for _, marker in others}
    assert canvas.run_style("β = $1$") == canvas.run_style("β = -1")


def test_a_disk_that_refuses_leaves_the_earlier_picture_and_is_one_error_with_its_path(tmp_path, monkeypatch):
    figures.plot_gradient_weight(tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()

    def full(self, target, **more):
        with open(target, "wb") as stream:
            stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plt.Figure, "savefig", full)
    with pytest.raises(ArtefactError) as caught:
        figures.plot_gradient_weight(tmp_path)
    assert str(caught.value) == f"cannot write {file}: No space left on device; free space or use another --runs-dir"
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_all_pictures_are_here():
    """A new public picture must be added above, so that its legend is looked at."""
    ideas = {name.lstrip("0123456789c").lstrip("-").replace("-", "_") for name in PICTURES}
    public = {name.removeprefix("plot_") for name in figures.__all__ if name.startswith("plot_")}
    assert public == set(RUN_PICTURES) | ideas
    assert all(hasattr(figures, name) for name in figures.__all__)
