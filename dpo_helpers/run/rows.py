"""The rows of data files, one at a time: nothing is cached, unpacked to disk or run."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from sys import getsizeof

from ..errors import DataError
from .sources import ROWS, SUFFIXES

MAX_ROW = 2**22  # bytes of one row, unpacked: a longer one is no dialogue
MAX_UNPACKED = 2**30  # bytes that all rows to train on, or to hold out, take in memory; HH-RLHF's take a third of that
PER_ROW = 256  # bytes that a row or a line takes besides its text
MAX_ARRAY = 2**28  # bytes of a .json file, which is read as a whole
COLUMNS = ("prompt", "question", "system", "chosen", "rejected")  # that a row may be read from: `shapes`
_NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `datasets`, no data
_BLANK = object()
_KIND = re.compile(r"(?<![a-z])(?:train|test|dev|validation)_([a-z]+)")
# words in the name of a file or its folder: those of `datasets` (data_files.SPLIT_KEYWORDS), and our own "held out"
_TRAIN = re.compile(r"(?<![a-z])(train|training)(?![a-z])")
HELD_OUT = re.compile(r"(?<![a-z])(test|testing|eval|evaluation|validation|valid|val|dev|h[eo]ld[-_. ]?out)(?![a-z])")
_MAKE_LINES = "make a .jsonl file of it, with one object with 'chosen' and 'rejected' texts a line"
_WAY_OUT = f"other kinds are neither unpacked, converted nor run: {_MAKE_LINES}"


class Unreadable(str):
    """What a reader gives in place of a row that it could not read: the reason."""

    __slots__ = ()


def read_rows(*paths: Path) -> Iterator[object]:
    """The rows of data files (SUFFIXES), one at a time; a line that is no JSON is `Unreadable`.

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
            for size, row in _READERS.get(path.suffix.lower(), _json_lines)(path):
                texts = row.values() if isinstance(row, dict) else ()
                taken += PER_ROW + max(
                    size,
                    sum(map(getsizeof, texts)),  # one rare letter makes a text four times as big
                )
                if taken > MAX_UNPACKED:
                    raise _too_much(path)
                if row is not _BLANK:
                    yield row
        except (OSError, EOFError, ValueError, RecursionError, zlib.error, MemoryError) as error:
            # of a damaged file, or of the disk
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
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_missing)
                except (ValueError, RecursionError) as error:
                    row = Unreadable(f"line {number} of {path.name} is no JSON ({type(error).__name__})")
            yield len(line), row


def _json(path: Path) -> Iterator[tuple[int, object]]:
    """The rows of an array; of a file with one row a line, those."""
    with path.open("rb") as stream:
        if not stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _json_lines(path)
            return
    if path.stat().st_size > MAX_ARRAY:
        raise DataError(f"{path} is longer than {MAX_ARRAY} bytes, and an array is read as a whole: {_MAKE_LINES}")
    for row in json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_missing):
        yield len(row) if isinstance(row, str) else 0, row


def _missing(_: str) -> None:
    """NaN, as pandas writes what is missing."""


def _csv(path: Path) -> Iterator[tuple[int, object]]:
    """The rows of a table with a line of names."""
    csv.field_size_limit(MAX_ROW)
    read = 0

    def _lines() -> Iterator[str]:
        nonlocal read
        with path.open(encoding="utf-8-sig", newline="") as stream:
            while line := stream.readline(MAX_ROW + 1):
                read += len(line)
                if len(line) > MAX_ROW:
                    raise DataError(f"{path}: a line is longer than {MAX_ROW} bytes; is it a table?")
                yield line

    before = 0
    try:
        table = csv.DictReader(_lines(), strict=True)
        for row in table:
            found: object = {str(key): value if key in COLUMNS else None for key, value in row.items()}
            if any(row.get(None, ())):  # what DictReader has no name for
                found = Unreadable(f"line {table.line_num} of {path.name} has more fields than the table has names")
            yield read - before, found
            before = read
    except csv.Error as error:
        raise ValueError(str(error)) from error


def _parquet(path: Path) -> Iterator[tuple[int, object]]:
    """The rows of a file, each with its bytes. They are unpacked singly: a long text that repeats is stored once."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:  # opened here: pyarrow and datasets take a path for a pattern of paths
        with path.open("rb") as stream:
            file = ParquetFile(stream)
            others = [name for name in file.schema_arrow.names if name not in COLUMNS]
            columns = [name for name in file.schema_arrow.names if name in COLUMNS]
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            parts = (group.column(i) for group in groups for i in range(group.num_columns))
            # a page is unpacked as a whole, and one may hold all rows: what the file says of itself comes first
            wanted = (part for part in parts if part.path_in_schema.split(".")[0] in columns)
            if sum(part.total_uncompressed_size for part in wanted) > MAX_UNPACKED:
                raise _too_much(path)
            batches = file.iter_batches(1, columns=columns, use_threads=False)
            for number, batch in enumerate(batches):
                texts = (c.dictionary_decode() if hasattr(c, "dictionary_decode") else c for c in batch.columns)
                if (size := sum(text.nbytes for text in texts)) > MAX_ROW:
                    raise DataError(f"{path}: row {number} is longer than {MAX_ROW} bytes; is it a dialogue?")
                yield size, dict.fromkeys(others) | (batch.to_pylist() or [{}])[0]
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, object]]]] = {
    ".parquet": _parquet, ".json": _json, ".csv": _csv
}  # fmt: skip


def without_pairs(names: Iterable[str]) -> set[str]:
    """Of splits or files those that hold no pairs, where others say they do: train_sft beside train_prefs, as in
    UltraFeedback-binarized and its like."""
    kinds = {name: found[1] for name in names if (found := _KIND.search(name.lower()))}
    return {name for name, kind in kinds.items() if kind != "prefs"} if "prefs" in kinds.values() else set()


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
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    others = without_pairs(path.name for path in files)
    # beside files of rows, .json and .csv are notes
    suffixes = ROWS if any(path.name.lower().endswith(ROWS) for path in files) else SUFFIXES
    for path in files:
        name = path.relative_to(folder).as_posix().lower()
        if any(part.startswith((".", "__")) for part in name.split("/")):
            continue
        if not name.endswith(suffixes) or path.name in _NOTES or path.name in others:
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
