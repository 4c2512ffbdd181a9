"""Batches without padding: the tokens of all pairs one after another, each prompt once.

A pair of P prompt and C + R response tokens is P + (C - 1) + (R - 1) tokens here: prompt, chosen, rejected. The last
token of a response predicts nothing that counts, so it is left out. Linear layers and norms treat tokens one by one
and run on the flat [N, d] tensor; attention alone needs rows, and gathers them (`FlatBatch.groups`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..errors import DataError
from ..tokens import EncodedPair

PADDING = 1.25  # rows share a group while the longest has at most this many times the tokens of the shortest


@dataclass(frozen=True)
class FlatBatch:
    """B pairs as N tokens, with what attention and the head need to find them; all int64.

    ids, positions: [N]; the rejected response's positions start again after the prompt's.
    groups: rows of like length for causal attention, each [n, S]: which token is at place s of row r. A pair has
        two rows, prompt + chosen and prompt + rejected, so the responses never see each other. Padded on the right
        with token 0, which no earlier place sees.
    back: [N], where a token is found in the groups' outputs, all rows flattened one after another.
    scored: [M], one entry per response token: the token that predicts it (for both first ones the prompt's last).
    targets: [M], its id. side: [M], its place in the 2B log-probabilities, all chosen, then all rejected.
    """

    ids: Tensor
    positions: Tensor
    groups: tuple[Tensor, ...]
    back: Tensor
    scored: Tensor
    targets: Tensor
    side: Tensor

    def to(self, device: torch.device) -> FlatBatch:
        """The same batch on a device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "groups"}
        return replace(self, groups=tuple(rows.to(device) for rows in self.groups), **moved)


def tokens_of(pair: EncodedPair) -> int:
    """How many tokens of a pair are run: P + (C - 1) + (R - 1)."""
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected) - 2


def flatten(pairs: Sequence[EncodedPair], *, chosen_only: bool = False) -> FlatBatch:
    """Lay out pairs one after another; chosen_only leaves the rejected responses out (SFT). DataError: no prompt."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[list[int]] = []
    scored: list[int] = []
    targets: list[int] = []
    side: list[int] = []
    for i, pair in enumerate(pairs):
        if not pair.prompt:
            raise DataError(f"row {pair.index}: the prompt is empty, so nothing predicts the first response token")
        p, prompt = len(pair.prompt), range(len(ids), len(ids) + len(pair.prompt))
        ids += pair.prompt
        positions += range(p)
        for s, response in enumerate((pair.chosen,) if chosen_only else (pair.chosen, pair.rejected)):
            own = range(len(ids), len(ids) + len(response) - 1)
            ids += response[:-1]
            positions += range(p, p + len(own))
            rows.append([*prompt, *own])
            scored += [prompt[-1], *own]
            targets += response
            side += [s * len(pairs) + i] * len(response)
    groups, back = _group(rows, len(ids))
    return FlatBatch(
        torch.tensor(ids), torch.tensor(positions), groups, back, *map(torch.tensor, (scored, targets, side))
    )


def _group(rows: list[list[int]], tokens: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Pad rows of like length into groups; returns them with `back`."""
    rows = sorted(rows, key=len)
    back = torch.empty(tokens, dtype=torch.int64)
    groups: list[Tensor] = []
    places = 0  # in the groups before this one
    while rows:
        n = sum(len(row) <= PADDING * len(rows[0]) for row in rows)
        length = len(rows[n - 1])
        group = torch.zeros(n, length, dtype=torch.int64)
        for r, row in enumerate(rows[:n]):
            group[r, : len(row)] = at = torch.tensor(row)
            back[at] = torch.arange(places + r * length, places + r * length + len(row))
        groups.append(group)
        places += n * length
        rows = rows[n:]
    return tuple(groups), back
