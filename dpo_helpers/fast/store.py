"""Where the frozen blocks' output is kept: in a file on the CPU, in its memory on a GPU, both with a size budget."""

from __future__ import annotations

import mmap
import os
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def room(budget: float, device: torch.device) -> float:
    """How many bytes may be kept: the budget, and on a GPU half of what is free at most, for training needs some."""
    if device.type != "cuda":
        return budget
    torch.cuda.empty_cache()  # what PyTorch still holds of earlier tensors does not count as free
    return min(budget, torch.cuda.mem_get_info(device)[0] / 2)


class TrunkStore:
    """Rows of `width` numbers, kept by the number of the pair they belong to.

    On the CPU they lie in a file that is mapped into memory. Its pages are given back after each use, so the process
    does not grow with the data; the system's file cache keeps what there is room for. Behind the rows the file has a
    checksum per pair: rows that another process left there are taken where it fits, whatever became of that process,
    and made again where it does not. Processes may share a file; what two of them write in one place is the same.
    """

    def __init__(
        self,
        sizes: Mapping[int, int],
        width: int,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        file: Path | None = None,
    ):
        """sizes: how many rows each pair has. file: kept for later, and for these sizes only; else a nameless one.

        Where the disk has no room for it, a line says so, and nothing is kept.
        """
        self._row, rows, self._sums = width * dtype.itemsize, sum(sizes.values()), torch.zeros(0, dtype=torch.int64)
        self._places, self._here, start = dict[int, tuple[int, int, int]](), set[int](), 0  # number, rows from, to
        self._map: mmap.mmap | None = None
        if device.type == "cpu" and rows:
            in_rows = -(-rows * self._row // 8) * 8  # bytes; the checksums begin at a multiple of theirs
            self._map = _mapped_file(in_rows + 8 * len(sizes), file)
            if self._map is None:
                return
            self._sums = torch.frombuffer(self._map, dtype=torch.int64, offset=in_rows)
            self._rows = torch.frombuffer(self._map, dtype=dtype, count=rows * width).view(rows, width)
        else:
            self._rows = torch.empty(rows, width, dtype=dtype, device=device)
        for number, (pair, size) in enumerate(sizes.items()):
            self._places[pair] = (number, start, start + size)
            start += size

    def keeps(self, pair: int) -> bool:
        """Whether the rows of a pair have a place here."""
        return pair in self._places

    def has(self, pair: int) -> bool:
        """Whether the rows of a pair are here."""
        if pair not in self._here and self._map is not None and pair in self._places:
            number, start, end = self._places[pair]
            kept = int(self._sums[number])
            if kept and kept == self._checksum(start, end):
                self._here.add(pair)
        return pair in self._here

    def put(self, pair: int, rows: Tensor) -> None:
        """Keep the rows [n, width] of a pair, if they have a place."""
        if pair in self._places:
            number, start, end = self._places[pair]
            self._rows[start:end] = rows
            if self._map is not None:
                self._sums[number] = self._checksum(start, end)
            self._here.add(pair)

    def get(self, pair: int, n: int) -> Tensor:
        """The first n rows of a pair: a view, to be copied before `release`."""
        _, start, _ = self._places[pair]
        return self._rows[start : start + n]

    def release(self) -> None:
        """Give the pages that were read and written back to the system; their content stays in the file."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _checksum(self, start: int, end: int) -> int:
        assert self._map is not None
        with memoryview(self._map) as content:
            return zlib.crc32(content[start * self._row : end * self._row]) + 1  # never 0, which is an empty place's


def _mapped_file(size: int, path: Path | None) -> mmap.mmap | None:
    """A file of this size, mapped; None, with a line that says so, where the disk has no room for it."""
    try:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") if path else tempfile.TemporaryFile() as file:
            if os.fstat(file.fileno()).st_size >= size:
                pass  # another process has made it
            elif hasattr(os, "posix_fallocate"):  # reserves the room: writing a map past a full disk would kill us
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        with suppress(OSError):
            if path:
                path.unlink()
        print(
            f"no room for {size / 1e9:.2f} GB of the frozen blocks' output ({error.strerror}): they are run again "
            "at each step, which is slower and gives the same numbers"
        )
        return None
