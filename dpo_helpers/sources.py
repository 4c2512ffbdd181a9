"""Where the preference pairs come from: the embedded world, a local file, or the Hub."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import mini
from .checkpoints import file_hash
from .errors import DataError
from .hh import Dropped, Pair, parse_rows
from .hub import resolve_revision
from .settings import EMBEDDED, Settings

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class PairData:
    """Pairs to train on and pairs held out (no prompt on both sides), dropped rows, where they came from."""

    train: list[Pair]
    held_out: list[Pair]
    dropped: list[Dropped]
    source: str


def _load_file(path: Path) -> Iterable[Mapping[str, object]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise DataError(f"{path}: no such file; give --dataset an existing {', '.join(SUFFIXES)} file or a Hub id")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: it needs rows with 'chosen' and 'rejected' texts")
    kind = "parquet" if path.suffix == ".parquet" else "json"
    try:
        rows: Iterable[Mapping[str, object]] = load_dataset(
            kind, data_files=str(path), split="train"
        )  # a local file: there is no revision
        return rows
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{path} cannot be read as {kind}: {cause}") from error


def _load_hub(name: str, revision: str | None) -> tuple[dict[str, Iterable[Mapping[str, object]]], str]:
    from datasets import load_dataset

    revision = resolve_revision(name, revision, "dataset")
    try:
        parts = load_dataset(name, revision=revision)
    except Exception as error:  # the library raises many kinds; each means that the data cannot be had
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"cannot get data set {name!r} from the Hub ({first}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
            "or use --dataset FILE"
        ) from error
    return dict(parts), f"{name}@{revision}"


def data_identity(settings: Settings) -> dict[str, Any]:
    """What decides the rows that `load_pairs` reads: name and commit, or the sha256 of the file."""
    path = Path(settings.dataset)
    if settings.dataset == EMBEDDED:
        return {"name": EMBEDDED, "sha256": mini.fingerprint()}
    if path.is_file():
        return {"name": path.name, "sha256": file_hash(path)}
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
    elif Path(name).is_file() or name.endswith(SUFFIXES):
        rows, test, source = _load_file(Path(name)), None, Path(name).name
    else:
        parts, source = _load_hub(name, settings.dataset_revision)
        if "train" not in parts:
            raise DataError(f"data set {name!r} has no 'train' split: it has {', '.join(parts)}")
        rows, test = parts["train"], parts.get("test")
    try:
        train, dropped = parse_rows(rows, settings.max_dropped)
        if test is None:
            train, held_out = _hold_out(train, settings.held_out_pairs, seed)
        else:
            held_out, more = parse_rows(test, settings.max_dropped)
            dropped = dropped + more
            seen = {pair.prompt for pair in held_out}
            train = [pair for pair in train if pair.prompt not in seen]
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    train = _draw(train, settings.max_pairs, seed, "train")
    held_out = _draw(held_out, settings.held_out_pairs, seed, "held-out")
    if not train or not held_out:
        raise DataError(
            f"{name}: too few pairs: {len(train)} to train on and {len(held_out)} held out; lower --held-out-pairs"
        )
    return PairData(train, held_out, dropped, source)
