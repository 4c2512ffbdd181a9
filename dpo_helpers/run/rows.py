"""The rows of data files, one at a time: nothing is cached, unpacked to disk or run."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from .sources import SUFFIXES

MAX_LINE = 2**24  # bytes of one row in a .jsonl file, unpacked: a longer one is no dialogue
_HELD_OUT = re.compile(r"(?<![a-z])(test|validation|eval)(?![a-z])")  # in the name of a file


class Unreadable(str):
    """What a reader gives in place of a row that it could not read: the reason."""

    __slots__ = ()


def read_rows(path: Path) -> Iterator[object]:
    """The rows of a .jsonl, .jsonl.gz or .parquet file, one at a time; a line that is no JSON is `Unreadable`.

    Nothing is cached, unpacked to disk or run. Raises DataError, naming the file, where it cannot be read to its end.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give --dataset an existing {', '.join(SUFFIXES)} file or a Hub id")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} is no {', '.join(SUFFIXES)} file: archives are not unpacked and scripts not run")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: it needs rows with 'chosen' and 'rejected' texts")
    try:
        yield from _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # of a damaged gzip or parquet file, or of the disk
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} cannot be read: {first}; get the file again") from error


def _json_lines(path: Path) -> Iterator[object]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise DataError(f"{path}: line {number} is longer than {MAX_LINE} bytes; is it one row a line?")
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    yield Unreadable(f"line {number} of {path.name} is no JSON ({type(error).__name__})")


def _parquet(path: Path) -> Iterator[object]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:  # opened here: pyarrow and datasets take a path for a pattern of paths
        with path.open("rb") as stream:
            for batch in ParquetFile(stream).iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def data_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split, sorted by name: "test" where a name says test, validation or eval.

    Other files are left alone: archives are not unpacked, scripts not run. Raises DataError where there is no data
    file, or where one is a link to a place outside the folder.
    """
    # a snapshot in the Hub's cache is made of links to ../../blobs
    root = (folder.parent.parent if folder.parent.name == "snapshots" else folder).resolve()
    parts: dict[str, list[Path]] = {"train": [], "test": []}
    for path in sorted(p for p in folder.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()):
        if not path.resolve().is_relative_to(root):
            raise DataError(f"{path} is a link to a place outside {folder}, which is not followed: copy the file there")
        name = path.relative_to(folder).as_posix().lower()
        parts["test" if _HELD_OUT.search(name) else "train"].append(path)
    if not parts["train"]:
        raise DataError(
            f"{folder} holds no training data: it needs {', '.join(SUFFIXES)} files; archives are not unpacked and "
            "scripts not run"
        )
    return parts
