"""The rows of data files, one at a time: nothing is cached, unpacked to disk or run."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from sys import getsizeof

from ..errors import DataError
from .sources import SUFFIXES

MAX_ROW = 2**22  # bytes of one row, unpacked: a longer one is no dialogue
MAX_UNPACKED = 2**30  # bytes that all rows to train on, or to hold out, take in memory; HH-RLHF's take a third of that
PER_ROW = 256  # bytes that a row or a line takes besides its text
_BLANK = object()
# words in the name of a file or its folder: those of `datasets` (data_files.SPLIT_KEYWORDS), and our own "held out"
_TRAIN = re.compile(r"(?<![a-z])(train|training)(?![a-z])")
HELD_OUT = re.compile(r"(?<![a-z])(test|testing|eval|evaluation|validation|valid|val|dev|h[eo]ld[-_. ]?out)(?![a-z])")
_WAY_OUT = (
    "other kinds are neither unpacked, converted nor run: make a .jsonl file of it, with one object with 'chosen' and "
    "'rejected' texts a line"
)


class Unreadable(str):
    """What a reader gives in place of a row that it could not read: the reason."""

    __slots__ = ()


def read_rows(*paths: Path) -> Iterator[object]:
    """The rows of .jsonl, .jsonl.gz or .parquet files, one at a time; a line that is no JSON is `Unreadable`.

    Nothing is cached, unpacked to disk or run. However small the files are, a row has at most MAX_ROW bytes and all of
    them take at most MAX_UNPACKED. Raises DataError, naming the file, for more, and where it cannot be read to its end.
    """
    taken = 0
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file; give --dataset an existing {', '.join(SUFFIXES)} file or a Hub id")
        if not path.name.lower().endswith(SUFFIXES):
            raise DataError(f"{path} is no {', '.join(SUFFIXES)} file; {_WAY_OUT}")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty: it needs rows with 'chosen' and 'rejected' texts")
        try:
            for size, row in (_parquet if path.suffix.lower() == ".parquet" else _json_lines)(path):
                texts = row.values() if isinstance(row, dict) else ()
                taken += PER_ROW + max(
                    size, sum(map(getsizeof, texts))
                )  # one rare letter makes a text four times as big
                if taken > MAX_UNPACKED:
                    raise _too_much(path)
                if row is not _BLANK:
                    yield row
        except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:  # of a damaged file, or of the disk
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{path} cannot be read: {first}; get the file again") from error


def _too_much(path: Path) -> DataError:
    return DataError(
        f"{path}: with this file the rows unpack to more than {MAX_UNPACKED} bytes; is it a data set? If so, give "
        "--dataset a part of it"
    )


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """The lines of a file, each with its bytes; one of blanks is _BLANK."""
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_ROW + 1):
            number += 1
            if len(line) > MAX_ROW:
                raise DataError(f"{path}: line {number} is longer than {MAX_ROW} bytes; is it one row a line?")
            row: object = _BLANK
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    row = Unreadable(f"line {number} of {path.name} is no JSON ({type(error).__name__})")
            yield len(line), row


def _parquet(path: Path) -> Iterator[tuple[int, object]]:
    """The rows of a file, each with its bytes. They are unpacked singly: a long text that repeats is stored once."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:  # opened here: pyarrow and datasets take a path for a pattern of paths
        with path.open("rb") as stream:
            file, columns = ParquetFile(stream), ["chosen", "rejected"]
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            parts = (group.column(i) for group in groups for i in range(group.num_columns))
            # a page is unpacked as a whole, and one may hold all rows: what the file says of itself comes first
            if sum(part.total_uncompressed_size for part in parts if part.path_in_schema in columns) > MAX_UNPACKED:
                raise _too_much(path)
            batches = file.iter_batches(1, columns=columns, use_threads=False)
            for number, batch in enumerate(batches):
                texts = (c.dictionary_decode() if hasattr(c, "dictionary_decode") else c for c in batch.columns)
                if (size := sum(text.nbytes for text in texts)) > MAX_ROW:
                    raise DataError(f"{path}: row {number} is longer than {MAX_ROW} bytes; is it a dialogue?")
                yield size, batch.to_pylist()[0]
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def data_files(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by what becomes of them, sorted by name: "train", "held out" or "ignored".

    A data file is held out where its name, or that of a folder in it, says test, validation or the like. Of the others
    those named train are trained on, or all, where none is. What is no data file is ignored. What is hidden, or in a
    folder that is (Jupyter's copies, macOS's notes), is not there, as for `datasets`. Raises DataError where there is
    nothing to train on, or where a data file is a link to a place outside the folder.
    """
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":  # of the Hub's cache: made of links to ../../blobs
        roots.append((folder.parent.parent / "blobs").resolve())
    parts: dict[str, list[Path]] = {"train": [], "held out": [], "ignored": []}
    unnamed: list[Path] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix().lower()
        if any(part.startswith((".", "__")) for part in name.split("/")):
            continue
        if not name.endswith(SUFFIXES):
            parts["ignored"].append(path)
        elif not any(path.resolve().is_relative_to(root) for root in roots):
            raise DataError(f"{path} is a link to a place outside {folder}, which is not followed: copy the file there")
        elif HELD_OUT.search(name):
            parts["held out"].append(path)
        else:
            (parts["train"] if _TRAIN.search(name) else unnamed).append(path)
    parts["ignored" if parts["train"] else "train"] += unnamed
    if not parts["train"]:
        held_out = f" but those held out by name ({parts['held out'][0].name}, …)" if parts["held out"] else ""
        raise DataError(f"{folder} holds no training data{held_out}: it needs {', '.join(SUFFIXES)} files; {_WAY_OUT}")
    return parts
