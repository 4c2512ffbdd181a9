"""Pictures that explain what happens to tokens: the batch, their log-probabilities, the mask, one pair, one choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from ...losses import dpo_loss
from ...tokens import PairBatch
from .canvas import COLOURS, MODEL_COLOUR, SIDE_COLOUR, finish, label, legend, new, quoted, shorten, token_text

REFERENCE, POLICY = MODEL_COLOUR["reference"], MODEL_COLOUR["dpo"]
PROMPT, CHOSEN, REJECTED = SIDE_COLOUR.values()
PARTS = {"padding": (0.93, 0.93, 0.93), "prompt": PROMPT, "response": COLOURS[0], "its end-of-text": COLOURS[1]}
IN_ONE_ROW = 48  # bars of tokens: more of them go on in another row
IN_ONE_LINE = 98  # characters of running text that fit on nine inches


def token_label(token: str, length: int = 14) -> str:
    """A token as a tick label: its leading space, which GPT-2's tokens have, says nothing there."""
    return label(token_text(token).strip(" ") or "␣", length)


def plot_batch_layout(batch: PairBatch, pad_id: int, folder: Path | None = None) -> str:
    """A padded batch as a picture: what is at each position of its rows, all chosen first, then all rejected.

    pad_id: the id that pads and that ends a text: the last token of a response counts as end-of-text if it is that.
    """
    ids, real, response = batch.ids.cpu(), batch.attention_mask.cpu().bool(), batch.response_mask.cpu()
    after = torch.cat([response[:, 1:], torch.zeros_like(response[:, :1])], dim=1)
    kinds = real.int() + response.int() + (response & ~after & (ids == pad_id)).int()  # [2B, T], an index of PARTS
    counts = [int((kinds == kind).sum()) for kind in range(len(PARTS))]
    height, width = kinds.shape
    figure, (axis,) = new(width=9, height=1.2 + 0.26 * height)
    axis.grid(False)
    colours = ListedColormap(list(PARTS.values()))
    axis.pcolormesh(kinds.numpy(), cmap=colours, vmin=-0.5, vmax=3.5, edgecolors="white", lw=0.5 if width < 150 else 0)
    names = [f"{side}, pair {row}" for side in ("chosen", "rejected") for row in batch.rows]
    axis.set(xlabel="position", ylim=(height, 0), yticks=np.arange(height) + 0.5, yticklabels=names)
    axis.set_title("What is where in the batch")
    axis.tick_params(length=0)
    handles = [Patch(color=PARTS[part], label=part) for part in ("prompt", "response", "its end-of-text", "padding")]
    legend(axis, handles)
    _, prompt, inside, ends = counts
    summary = (
        f"{height // 2} pairs are {height} rows of {width} positions: {prompt} prompt tokens, {inside + ends} response "
        f"tokens, {ends} of them end-of-text, and padding."
    )
    return finish(figure, folder, "01-batch-layout", summary)


def plot_token_logprobs(tokens: Sequence[str], logps: Sequence[float], folder: Path | None = None) -> str:
    """Bars of log p(token | all before it), in nats, of each token of a response; the most surprising one is marked."""
    both = list(zip(tokens, logps, strict=True))
    rows = math.ceil(len(both) / IN_ONE_ROW)
    each = math.ceil(len(both) / rows)
    figure, axes = new(rows=rows, width=9, height=2.4 if rows > 1 else 3.0)
    surprise, least = min(logps), list(logps).index(min(logps))
    for row, axis in enumerate(axes):
        part = both[row * each : (row + 1) * each]
        colours = [COLOURS[3] if row * each + i == least else COLOURS[0] for i in range(len(part))]
        axis.bar(range(len(part)), [logp for _, logp in part], color=colours)
        axis.set(xticks=range(len(part)), xlim=(-0.6, each - 0.4), ylim=(1.08 * surprise - 1e-9, 0), ylabel="nats")
        names = [token_label(token) for token, _ in part]
        axis.set_xticklabels(names, rotation=90 if each > 12 else 0, fontsize=9 if each > 12 else None)
        axis.grid(False, axis="x")
    axes[0].set_title("Log-probability of each token of the response")
    summary = f"Of {len(both)} tokens the most surprising one is {quoted(tokens[least])} with {surprise:.2f} nats."
    return finish(figure, folder, "02-token-logprobs", summary)


class Packed(Protocol):
    """A `fast.flat.FlatBatch`, as far as its picture needs it."""

    ids: Tensor
    positions: Tensor
    groups: tuple[Tensor, ...]
    scored: Tensor
    side: Tensor


def _rows(flat: Packed) -> list[torch.Tensor]:
    """The rows of attention, as tokens, without padding: a place counts where its position is its own."""
    rows = [row for group in flat.groups for row in group.cpu()]
    return [row[flat.positions.cpu()[row] == torch.arange(len(row))] for row in rows]


def _reads(flat: Packed) -> torch.Tensor:
    """Which token reads which: itself and what comes before it in its row. [N, N] bool, one reader per row."""
    reads = torch.zeros(len(flat.ids), len(flat.ids), dtype=torch.bool)
    for row in _rows(flat):
        reads[row[:, None], row[None, :]] |= torch.ones(len(row), len(row), dtype=torch.bool).tril()
    return reads


def _part_of(flat: Packed) -> torch.Tensor:
    """0 for tokens of a prompt, which are in two rows, 1 for those of a chosen response, 2 of a rejected one: [N]."""
    rows = _rows(flat)
    part = torch.zeros(len(flat.ids), dtype=torch.int64)
    part[flat.scored.cpu()] = 1 + (flat.side.cpu() >= len(rows) // 2).long()
    part[torch.cat(rows).bincount(minlength=len(part)) > 1] = 0
    return part


def plot_pair_mask(flat: Packed, tokens: Sequence[str], folder: Path | None = None) -> str:
    """Which token reads which in a packed pair: prompt, chosen, rejected, as `flat.flatten` lays them out.

    tokens: the text of each of the N tokens. All else is read from the batch: a mistake in its rows would show.
    """
    reads, part = _reads(flat), _part_of(flat)
    n = len(part)
    names = [token_label(token, 12) for token, _ in zip(tokens, range(n), strict=True)]
    size = min(8.6, max(4.6, 3.4 + 0.17 * n))
    figure, (axis,) = new(width=size, height=0.93 * size)
    axis.grid(False)
    colours = ListedColormap(["white", PROMPT, CHOSEN, REJECTED])
    shown = torch.where(reads, part[:, None] + 1, 0).numpy()
    axis.pcolormesh(shown, cmap=colours, vmin=-0.5, vmax=3.5, edgecolors="0.85", lw=0.4 if n <= 80 else 0)
    for border in (i for i in range(1, n) if part[i] != part[i - 1]):
        axis.axhline(border, color="black", lw=1)
        axis.axvline(border, color="black", lw=1)
    at = range(0, n, math.ceil(n / 48))
    ticks = [i + 0.5 for i in at]
    axis.set(
        xticks=ticks,
        yticks=ticks,
        ylim=(n, 0),
        xlabel="token that is read",
        ylabel="token that reads, and its position",
    )
    axis.set_xticklabels([names[i] for i in at], rotation=90, fontsize=8)
    axis.set_yticklabels([f"{names[i]}  {int(flat.positions[i]):>2}" for i in at], fontsize=8)
    axis.set_title("Which token reads which")
    kinds = ((PROMPT, "prompt"), (CHOSEN, "chosen"), (REJECTED, "rejected"))
    handles = [Patch(color=colour, label=kind) for colour, kind in kinds]
    legend(axis, handles, "reads")
    across = int((reads & (part[:, None] * part[None, :] == 2)).sum())
    counts = part.bincount(minlength=3).tolist()
    summary = (
        f"{n} tokens in one row: {counts[0]} of the prompt, {counts[1]} chosen, {counts[2]} rejected; "
        f"{int(reads.sum())} of {n * n} places are read, {across} of them between the two responses."
    )
    return finish(figure, folder, "05-pair-mask", summary)


def plot_token_logratios(
    chosen: Sequence[tuple[str, float]], rejected: Sequence[tuple[str, float]], folder: Path | None = None
) -> str:
    """Both responses as running text, each token on a colour that tells its log-ratio log π_θ - log π_ref, in nats.

    chosen, rejected: (text of the token, log-ratio). The colours are symmetric about 0.
    """
    sides = {"chosen": chosen, "rejected": rejected}
    lines = [_lines(tokens) for tokens in sides.values()]
    counts = [len(found) for found in lines]
    height = (1.6 + 0.27 * sum(counts)) / 2
    figure, axes = new(rows=2, width=9, height=height, height_ratios=counts)
    largest = max((abs(x) for tokens in sides.values() for _, x in tokens), default=0.0) or 1.0
    colours = ScalarMappable(Normalize(-largest, largest), plt.get_cmap("PuOr_r"))
    parts = []
    for axis, found, (side, tokens) in zip(axes, lines, sides.items(), strict=True):
        _running_text(axis, found, colours)
        total = math.fsum(x for _, x in tokens)
        axis.set_title(f"{side}: log-ratio {total:+.2f}", loc="left")
        token, value = max(tokens, key=lambda pair: abs(pair[1]))
        parts.append(f"the {side} log-ratio is {total:+.2f}, its largest part {value:+.2f} at {quoted(token)}")
    figure.colorbar(colours, ax=axes, location="bottom", label="log π_θ − log π_ref of the token, nats", aspect=60)
    return finish(figure, folder, "05-token-logratios", f"Token by token: {'; '.join(parts)}.")


def _lines(tokens: Sequence[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """Tokens as they are shown, with their values, broken into lines of at most IN_ONE_LINE characters."""
    lines: list[list[tuple[str, float]]] = [[]]
    room = IN_ONE_LINE
    for token, value in tokens:
        text = shorten(token_text(token), 40)
        if len(text) > room and lines[-1]:
            lines.append([])
            room = IN_ONE_LINE
        lines[-1].append((text, value))
        room -= len(text)
    return lines


def _running_text(axis: Axes, lines: Sequence[Sequence[tuple[str, float]]], colours: Any) -> None:
    """Write lines of tokens on boxes of their colour; x counts characters, y lines."""
    axis.set(xlim=(0, IN_ONE_LINE), ylim=(len(lines), 0))
    axis.set_axis_off()
    for y, line in enumerate(lines):
        x = 0
        for text, value in line:
            colour = colours.to_rgba(value)
            axis.add_patch(Rectangle((x, y + 0.06), len(text), 0.88, facecolor=colour, edgecolor="white", lw=0.6))
            ink = "white" if np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.5 else "black"
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": ink, "fontsize": 9, "family": "monospace"}
            axis.text(x + len(text) / 2, y + 0.5, label(text), **style)
            x += len(text)


def plot_one_pair(
    policy: tuple[float, float], reference: tuple[float, float], beta: float, folder: Path | None = None
) -> str:
    """From four log-probabilities to the loss of one pair, step by step.

    policy, reference: (log p(chosen | prompt), log p(rejected | prompt)) of each model, in nats.
    """
    logps = [torch.tensor([x], dtype=torch.float64) for x in (*policy, *reference)]
    losses, *rewards = (x.item() for x in dpo_loss(*logps, beta=beta))
    ratios = [p - r for p, r in zip(policy, reference, strict=True)]
    margin = rewards[0] - rewards[1]
    wide = [1.7, 1, 1, 1]  # the first has four bars with their values
    figure, axes = new(4, width=2.25, height=3.3, width_ratios=wide)
    sides = ["chosen", "rejected"]
    _bars(axes[0], [-0.2, 0.8], reference, [REFERENCE] * 2, width=0.4)
    _bars(axes[0], [0.2, 1.2], policy, [POLICY] * 2, width=0.4)
    axes[0].set(xticks=[0, 1], xticklabels=sides, title="log-probability")
    handles = [Patch(color=REFERENCE, label="π_ref"), Patch(color=POLICY, label="π_θ")]
    legend(axes[0], handles)
    for axis, values, title in ((axes[1], ratios, "log-ratio"), (axes[2], rewards, f"reward, β = {beta:g}")):
        _bars(axis, [0, 1], values, [CHOSEN, REJECTED])
        axis.set(xticks=[0, 1], xticklabels=sides, title=title)
    _bars(axes[3], [0, 1], [margin, losses], [COLOURS[4], COLOURS[5]])
    axes[3].set(xticks=[0, 1], xticklabels=["margin", "loss"], title="margin and loss")
    summary = (
        f"Log-ratios {ratios[0]:+.2f} (chosen) and {ratios[1]:+.2f} (rejected), times β = {beta:g}, are rewards "
        f"{rewards[0]:+.2f} and {rewards[1]:+.2f}: the margin is {margin:+.2f} and the loss {losses:.2f}."
    )
    return finish(figure, folder, "05-one-pair", summary)


def _bars(axis: Axes, x: Sequence[float], values: Sequence[float], colours: Sequence[Any], width: float = 0.7) -> None:
    """Bars with their values at their ends, and room for these."""
    bars = axis.bar(x, values, width=width, color=colours)
    axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8, padding=2)
    axis.axhline(0, color="black", lw=0.8)
    axis.margins(y=0.15)
    axis.grid(False, axis="x")


def plot_next_tokens(probabilities: Mapping[str, Mapping[str, float]], folder: Path | None = None) -> str:
    """The first token of the answer under several models: bars of its probability, one group per token.

    probabilities: model -> token -> probability. Drawn are the likeliest of each model, at most 8 in all; a token that
    a model's mapping lacks has no bar there.
    """
    ranked = [sorted(found, key=lambda token: -found[token]) for found in probabilities.values()]
    longest = max(map(len, ranked), default=0)
    union = dict.fromkeys(tokens[i] for i in range(longest) for tokens in ranked if i < len(tokens))
    best = {token: max(found.get(token, 0.0) for found in probabilities.values()) for token in list(union)[:8]}
    tokens = sorted(best, key=lambda token: -best[token])
    figure, (axis,) = new(width=9, height=3.4)
    width = 0.8 / max(1, len(probabilities))
    for i, (name, found) in enumerate(probabilities.items()):
        x = np.arange(len(tokens)) + (i - (len(probabilities) - 1) / 2) * width
        heights = [found.get(token, math.nan) for token in tokens]
        axis.bar(x, heights, width=width, label=label(name), color=MODEL_COLOUR.get(name, COLOURS[2 + i % 8]))
    axis.set(xticks=range(len(tokens)), ylabel="probability", title="First token of the answer")
    axis.set_xticklabels([token_label(token) for token in tokens])
    axis.grid(False, axis="x")
    axis.locator_params(axis="y", nbins=6)
    legend(axis)
    first = [(name, found, order[0]) for (name, found), order in zip(probabilities.items(), ranked, strict=True)]
    likeliest = ", ".join(f"{name} {quoted(token)} with {found[token]:.2f}" for name, found, token in first)
    return finish(figure, folder, "07-next-tokens", f"The likeliest first token of each model: {likeliest}.")
