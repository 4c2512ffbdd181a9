"""Where the frozen blocks' output is kept: a memory map on the CPU, a tensor on a GPU, both with a size budget."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class TrunkStore:
    """Rows of `width` numbers, kept by the number of the pair they belong to, up to `budget` bytes.

    On the CPU they lie in a nameless temporary file that is mapped into memory. Its pages are given back after each
    use, so the process does not grow with the data; the system's file cache keeps what there is room for. On a GPU
    they lie in its memory, in half of what is free at most. What finds no room is simply not kept: `put` ignores it,
    and `has` says so.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        budget: float,
        folder: Path | None = None,
    ):
        """Room for `rows` rows, or for as many as the budget (or the disk) allows; folder: for the file."""
        row = width * dtype.itemsize  # bytes
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what PyTorch still holds of earlier tensors does not count as free
            budget = min(budget, torch.cuda.mem_get_info(device)[0] / 2)  # the training needs some of what is free
        self.capacity = min(rows, int(budget / row))
        self.used, self._places = 0, dict[int, tuple[int, int]]()
        self._map: mmap.mmap | None = None
        if device.type == "cpu" and self.capacity:
            self._map = _mapped_file(row * self.capacity, folder)
            self.capacity = self.capacity if self._map else 0
        if self._map:
            self._rows = torch.frombuffer(self._map, dtype=dtype).view(-1, width)
        else:
            self._rows = torch.empty(self.capacity, width, dtype=dtype, device=device)

    def has(self, pair: int) -> bool:
        """Whether the rows of a pair are here."""
        return pair in self._places

    def put(self, pair: int, rows: Tensor) -> None:
        """Keep the rows [n, width] of a pair, if there is room."""
        if self.used + len(rows) <= self.capacity:
            self._rows[self.used : self.used + len(rows)] = rows
            self._places[pair] = (self.used, len(rows))
            self.used += len(rows)

    def get(self, pair: int, n: int) -> Tensor:
        """The first n rows of a pair: a view, to be copied before `release`."""
        start, _ = self._places[pair]
        return self._rows[start : start + n]

    def release(self) -> None:
        """Give the pages that were read and written back to the system; their content stays in the file."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _mapped_file(size: int, folder: Path | None) -> mmap.mmap | None:
    """A nameless file of this size, mapped; None, with a line that says so, where the disk has no room for it."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # reserves the room: writing a map past a full disk would kill us
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        print(
            f"no room for {size / 1e9:.2f} GB of the frozen blocks' output ({error.strerror}): they are run again "
            "at each step, which is slower and gives the same numbers"
        )
        return None
