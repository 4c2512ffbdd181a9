"""Where the preference pairs come from: the embedded world, a local file, or the Hub."""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from . import mini
from .checkpoints import file_hash
from .errors import DataError
from .hh import Finding, Pair, RowsError, Unreadable, check_dropped, parse_rows
from .hub import resolve_revision
from .settings import EMBEDDED, Settings
from .tokens import encode_pairs

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
MAX_LINE = 2**24  # bytes of one row in a .jsonl file, unpacked: a longer one is no dialogue
_HELD_OUT = re.compile(r"(?<![a-z])(test|validation|eval)(?![a-z])")  # in the name of a file


@dataclass(frozen=True)
class PairData:
    """Pairs to train on, pairs held out (no prompt is on both sides), what was wrong with rows, and the source."""

    train: list[Pair]
    held_out: list[Pair]
    findings: list[Finding]
    source: str

    @property
    def dropped(self) -> list[Finding]:
        """The rows that cannot be used."""
        return [finding for finding in self.findings if finding.action == "dropped"]


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


def _load_folder(folder: Path) -> tuple[Iterator[object], Iterator[object] | None]:
    parts = data_files(folder)
    train, test = (chain.from_iterable(map(read_rows, parts[split])) for split in ("train", "test"))
    return train, test if parts["test"] else None


def _load_hub(name: str, revision: str | None) -> tuple[dict[str, Iterable[object]], str]:
    from datasets import load_dataset

    revision = resolve_revision(name, revision, "dataset")
    try:
        parts = load_dataset(name, revision=revision)
    except Exception as error:  # the library raises many kinds; each means that the data cannot be had
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"cannot get data set {name!r} from the Hub or its cache ({first}); check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE, delete a damaged cache (HF_DATASETS_CACHE), or use --dataset FILE"
        ) from error
    return dict(parts), f"{name}@{revision}"


def data_identity(settings: Settings) -> dict[str, Any]:
    """What decides the rows that `load_pairs` reads: name and commit, or the sha256 of each file.

    Raises DataError where it cannot be read.
    """
    path = Path(settings.dataset)
    if settings.dataset == EMBEDDED:
        return {"name": EMBEDDED, "sha256": mini.fingerprint()}
    try:
        if path.is_file():
            return {"name": path.name, "sha256": file_hash(path)}
        if path.is_dir():
            files = [file for part in data_files(path).values() for file in part]
            return {"name": path.name, "sha256": {file.relative_to(path).as_posix(): file_hash(file) for file in files}}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; check --dataset") from error
    return {"name": settings.dataset, "revision": settings.dataset_revision}


def _hold_out(pairs: list[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split off about `count` pairs by whole prompts, drawn by seed, so that no prompt is on both sides."""
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(f"hold-out-{seed}").shuffle(prompts)
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    chosen: set[str] = set()
    held = 0
    for prompt in prompts:
        if held >= count:
            break
        chosen.add(prompt)
        held += len(by_prompt[prompt])
    return [p for p in pairs if p.prompt not in chosen], [p for p in pairs if p.prompt in chosen]


def _draw(pairs: list[Pair], count: int | None, seed: int, what: str) -> list[Pair]:
    """At most `count` of the pairs, drawn by seed, in the order of the data."""
    if count is None or count >= len(pairs):
        return pairs
    kept = random.Random(f"{what}-{seed}").sample(range(len(pairs)), count)
    return [pairs[i] for i in sorted(kept)]


def load_pairs(settings: Settings) -> PairData:
    """The training and held-out pairs that the settings name.

    The embedded world and Hub data sets with a test split keep their own split; elsewhere held-out pairs are
    drawn by seed, by whole prompts. Raises DataError naming the file or data set, the row, and what to do.
    """
    name, seed = settings.dataset, settings.seed
    if name == EMBEDDED:
        rows: Any = mini.preference_rows("train", settings.max_pairs or 4000)
        test: Any = mini.preference_rows("test", settings.held_out_pairs)
        source = "the embedded world"
    elif Path(name).is_dir():
        rows, test = _load_folder(Path(name))
        source = Path(name).name
    elif Path(name).exists() or name.endswith(SUFFIXES):
        rows, test, source = read_rows(Path(name)), None, Path(name).name
    else:
        parts, source = _load_hub(name, settings.dataset_revision)
        if "train" not in parts:
            raise DataError(f"data set {name!r} has no 'train' split: it has {', '.join(parts)}")
        rows, test = parts["train"], parts.get("test")
    allow = settings.allow_dropped
    try:
        train, findings = parse_rows(rows, allow_dropped=allow)
        if test is None:
            train, held_out = _hold_out(train, settings.held_out_pairs, seed)
        else:
            held_out, more = parse_rows(test, allow_dropped=allow, split="held_out")
            findings = findings + more
            seen = {pair.prompt for pair in held_out}
            train = [pair for pair in train if pair.prompt not in seen]
    except RowsError as error:
        raise RowsError(f"{name}: {error}", error.findings) from error
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
    train = _draw(train, settings.max_pairs, seed, "train")
    held_out = _draw(held_out, settings.held_out_pairs, seed, "held-out")
    if not train or not held_out:
        raise DataError(
            f"{name}: too few pairs: {len(train)} to train on and {len(held_out)} held out; lower --held-out-pairs"
        )
    return PairData(train, held_out, findings, source)


def fit_pairs(
    found: PairData, tokenizer: Any, *, max_length: int, max_prompt_length: int, allow_dropped: bool
) -> PairData:
    """The pairs that still differ once they are cut to `max_length` tokens, with a finding for each that is cut.

    Two responses that differ only in what is cut off cannot be told apart: such a pair is dropped. Raises RowsError
    where that meets more of the pairs than is accepted.
    """
    findings: list[Finding] = list(found.findings)

    def _fit(pairs: list[Pair], split: str) -> list[Pair]:
        kept, dropped = list[Pair](), list[Finding]()
        encoded = encode_pairs(tokenizer, pairs, max_length=max_length, max_prompt_length=max_prompt_length)
        for pair, ids in zip(pairs, encoded, strict=True):
            if ids.chosen == ids.rejected:
                reason = f"responses are identical in the tokens that fit into max_length {max_length}"
                dropped.append(Finding(pair.index, reason, split=split))
                continue
            kept.append(pair)
            if ids.was_cut:
                cut = f"{ids.prompt_cut} prompt, {ids.chosen_cut} chosen, {ids.rejected_cut} rejected tokens cut off"
                findings.append(Finding(pair.index, f"longer than max_length {max_length}: {cut}", "cut", split))
        check_dropped(dropped, len(pairs), allow_dropped)
        findings.extend(dropped)
        return kept

    train, held_out = _fit(found.train, "train"), _fit(found.held_out, "held_out")
    return PairData(train, held_out, findings, found.source)
