"""The preference pairs of a run: read from where their `Source` says, checked, split, and tokenised once."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..hh import Finding, Pair, parse_row
from ..settings import Settings
from ..tokens import EncodedPair, encode_pairs
from ..untrusted import one_line
from ..worlds import embedded
from .chat import unrendered
from .rows import HELD_OUT, Unreadable, data_files, read_rows, without_pairs
from .shapes import ShapeError, as_hh
from .sources import SUFFIXES, Source, fetched, first_line, opening, source_of

MAX_DROPPED = 0.05  # share of the rows that may be unusable without --allow-dropped
MAX_FINDINGS = 100_000  # rows that may be unusable with it; after that many no more are read
MAX_TOGETHER = 2**20  # characters that meet the tokenizer together: a token takes a hundred bytes until it is an id
_HTML = re.compile(r"</?[a-zA-Z][^<>]*>|<!--")


class RowsError(DataError):
    """Too many rows cannot be used; `findings` has them all."""

    def __init__(self, message: str, findings: list[Finding]):
        super().__init__(message)
        self.findings = findings


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


def parse_rows(
    rows: Iterable[object], *, allow_dropped: bool = False, split: str = "train"
) -> tuple[list[Pair], list[Finding]]:
    """All rows as pairs, and what was found wrong with the others, in the order of the rows.

    A pair that is in the data both ways round, A preferred to B and B to A, says nothing: all rows of it are
    dropped. Text with HTML in it is kept, since it is data like any other, and reported. allow_dropped: accept it when
    more than MAX_DROPPED of the rows are dropped. Raises DataError for an empty data set, RowsError for one without a
    usable pair or with more dropped rows than accepted, for which it does not read on.
    """
    parsed: list[Pair | Finding] = []
    unusable = 0
    for index, row in enumerate(rows):
        try:
            parsed.append(Finding(index, row) if isinstance(row, Unreadable) else parse_row(as_hh(row)[0], index))
        except ShapeError as error:
            parsed.append(Finding(index, str(error)))
        unusable += isinstance(parsed[-1], Finding)
        if unusable > MAX_FINDINGS:
            break
    if not parsed:
        raise DataError("the data set is empty: it needs rows with 'chosen' and 'rejected' texts")
    first_row = {(p.prompt, p.chosen, p.rejected): p.index for p in reversed(parsed) if isinstance(p, Pair)}
    pairs: list[Pair] = []
    findings: list[Finding] = []
    for found in parsed:
        if isinstance(found, Pair):
            opposite = first_row.get((found.prompt, found.rejected, found.chosen))
            if opposite is not None:
                found = Finding(found.index, f"contradicts row {opposite}, which prefers the other response")
            elif _HTML.search(found.prompt + found.chosen + found.rejected):
                findings.append(Finding(found.index, "holds HTML, which is kept as text", "kept", split))
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            findings.append(replace(found, split=split))
    check_dropped([f for f in findings if f.action == "dropped"], len(parsed), allow_dropped)
    return pairs, findings


def check_dropped(dropped: Sequence[Finding], total: int, allow_dropped: bool) -> None:
    """RowsError, naming the commonest reason and its first row, if more of `total` rows are dropped than accepted."""
    if len(dropped) <= min(MAX_FINDINGS, total - 1 if allow_dropped else MAX_DROPPED * total):
        return
    reason, count = Counter(d.reason for d in dropped).most_common(1)[0]
    first = next(d.index for d in dropped if d.reason == reason)
    may_go_on = not allow_dropped and len(dropped) < total
    way_out = "check the file" + (", or go on without them with --allow-dropped" if may_go_on else "")
    raise RowsError(
        f"{len(dropped)} of {total} rows cannot be used (most often: {reason}; {count} rows, first row {first}); "
        + way_out,
        list(dropped),
    )


def _load_folder(folder: Path, name: str) -> tuple[Iterator[object], Iterator[object] | None]:
    """The rows of a folder by split; a printed line says what becomes of which file."""
    parts = data_files(folder)
    said = (
        f"{part}: {', '.join(f.relative_to(folder).as_posix() for f in files[:8]) or 'none'}"
        + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        for part, files in parts.items()
    )
    print(one_line(f"files of {name}: {'; '.join(said)}"))
    return read_rows(*parts["train"]), read_rows(*parts["held out"]) if parts["held out"] else None


@opening()
def _load_hub(source: Source) -> tuple[Iterable[object], Iterable[object] | None]:
    """The rows of a Hub data set, checked: as a folder, or by `datasets` where its card says how."""
    from datasets import load_dataset
    from huggingface_hub import metadata_load

    folder = fetched(source, ("README.md", "*.json", "*.csv", "*.arrow", *(f"*{suffix}" for suffix in SUFFIXES)))
    card = folder / "README.md"
    try:
        described = card.is_file() and (metadata_load(card) or {}).get("configs")
        if not described and any(path.name.lower().endswith(SUFFIXES) for path in folder.rglob("*")):
            return _load_folder(folder, source.name)
        parts = load_dataset(str(folder))
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds; each means that the data cannot be had
        raise DataError(
            f"cannot read data set {source.name!r} ({first_line(error)}); give --dataset a folder with the files of one"
        ) from error
    wanted = [name for name in parts if name not in without_pairs(parts)]
    held_out = [name for name in wanted if HELD_OUT.search(name.lower())]
    others = [name for name in wanted if name not in held_out]
    train = "train" if "train" in others else others[0] if len(others) == 1 else None
    if train is None:
        has = f"data set {source.name!r} has no 'train' split: it has {', '.join(parts)}"
        raise DataError(f"{has}; give --dataset a folder with the files of one")
    ignored = ", ".join(name for name in parts if name not in (train, *held_out)) or "none"
    said = f"train: {train}; held out: {', '.join(held_out) or 'none'}; ignored: {ignored}"
    print(one_line(f"splits of {source.name}: {said}"))
    return parts[train], chain(*(parts[name] for name in held_out)) if held_out else None


def _load(source: Source, settings: Settings) -> tuple[Iterable[object], Iterable[object] | None]:
    """Rows to train on, and rows to hold out where the data set has such."""
    if source.kind == "embedded":
        train = embedded.preference_rows("train", settings.max_pairs or 4000)
        return train, embedded.preference_rows("test", settings.held_out_pairs)
    if source.kind == "folder":
        return _load_folder(source.path, source.label)
    return _load_hub(source) if source.kind == "hub" else (read_rows(source.path), None)


def data_identity(settings: Settings) -> dict[str, Any]:
    """What decides the rows that `load_pairs` reads: name and commit, or the sha256 of each file.

    Raises DataError where it cannot be read.
    """
    source = source_of(settings, "dataset")
    try:
        if source.kind == "file" and not source.path.is_file():
            next(read_rows(source.path), None)  # says what is wrong with it
        parts = data_files(source.path) if source.kind == "folder" else {}
        return source.identity([file for part in ("train", "held out") for file in parts.get(part, [])])
    except OSError as error:
        raise DataError(f"{source.name} cannot be read: {error.strerror or error}; check --dataset") from error


def hold_out(pairs: list[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split off about `count` pairs by whole prompts, drawn by seed, so that no prompt is on both sides.

    Prompts that differ in blanks alone are one: a chat template may make the same of them.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(f"hold-out-{seed}").shuffle(prompts)
    words = {prompt: _words(prompt) for prompt in prompts}
    sizes = Counter(words[pair.prompt] for pair in pairs)
    held, chosen = 0, set[str]()
    for prompt in prompts:
        if held >= count:
            break
        held += sizes.pop(words[prompt], 0)  # once for all prompts of these words
        chosen.add(words[prompt])
    sides = [[p for p in pairs if (words[p.prompt] in chosen) == side] for side in (False, True)]
    return sides[0], sides[1]


def _words(prompt: str) -> str:
    return " ".join(prompt.split())


def _draw(pairs: list[Pair], count: int | None, seed: int, what: str) -> list[Pair]:
    """At most `count` of the pairs, drawn by seed, in the order of the data."""
    if count is None or count >= len(pairs):
        return pairs
    kept = random.Random(f"{what}-{seed}").sample(range(len(pairs)), count)
    return [pairs[i] for i in sorted(kept)]


def _named(rows: Iterable[object], label: str) -> Iterator[object]:
    """The rows; a printed line says what shape the first one has, where it is not HH's."""
    for number, row in enumerate(rows):
        with suppress(ShapeError):  # said of the row itself
            if number == 0 and (shape := as_hh(row)[1]) in ("texts", "messages"):
                print(one_line(f"rows of {label}: prompts and responses as {shape}"))
        yield row


def load_pairs(settings: Settings) -> PairData:
    """The training and held-out pairs that the settings name.

    The embedded world and Hub data sets with a test split keep their own split; elsewhere held-out pairs are
    drawn by seed, by whole prompts. Raises DataError naming the file or data set, the row, and what to do.
    """
    source, name, seed = source_of(settings, "dataset"), settings.dataset, settings.seed
    rows, test = _load(source, settings)
    label = {"embedded": "the embedded world", "hub": f"{name}@{source.commit()}"}.get(source.kind, source.label)
    allow = settings.allow_dropped
    try:
        rows = _named(rows, label)
        train, findings = parse_rows(rows, allow_dropped=allow)
        if test is None:
            train, held_out = hold_out(train, settings.held_out_pairs, seed)
        else:
            held_out, more = parse_rows(test, allow_dropped=allow, split="held_out")
            findings = findings + more
            seen = {_words(pair.prompt) for pair in held_out}
            train = [pair for pair in train if _words(pair.prompt) not in seen]
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
    if (prompts := len({pair.prompt for pair in held_out})) < len(held_out) / 2:
        few = f"the {len(held_out)} held-out pairs of {label} have {prompts} prompts"
        print(one_line(f"{few}: standard errors and intervals take pairs for independent, and are too small"))
    return PairData(train, held_out, findings, label)


def fit_pairs(
    found: PairData, tokenizer: Any, *, max_length: int, max_prompt_length: int, allow_dropped: bool
) -> tuple[PairData, dict[str, list[EncodedPair]]]:
    """The pairs that still differ once they are cut to `max_length` tokens, as text, and as ids of "train", "held_out".

    Each pair that is cut gets a finding. One that the chat template cannot render is dropped, and so are two
    responses that differ only in what is cut off. Raises RowsError where that meets more of the pairs than is accepted.
    """
    findings: list[Finding] = list(found.findings)

    def _fit(pairs: list[Pair], split: str) -> tuple[list[Pair], list[EncodedPair]]:
        kept, ids_of = list[Pair](), list[EncodedPair]()
        dropped, total = unrendered(tokenizer, pairs, split), len(pairs)
        refused = {finding.index for finding in dropped}
        pairs = [pair for pair in pairs if pair.index not in refused]
        longest = max((len(pair.prompt + pair.chosen + pair.rejected) for pair in pairs), default=1)
        encoded = encode_pairs(
            tokenizer, pairs, max_length=max_length, max_prompt_length=max_prompt_length,
            chunk=min(256, max(1, MAX_TOGETHER // longest)),
        )  # fmt: skip
        for pair, ids in zip(pairs, encoded, strict=True):
            if ids.chosen == ids.rejected:
                reason = f"responses are identical in the tokens that fit into max_length {max_length}"
                dropped.append(Finding(pair.index, reason, split=split))
                continue
            kept.append(pair)
            ids_of.append(ids)
            if ids.was_cut:
                cut = f"{ids.prompt_cut} prompt, {ids.chosen_cut} chosen, {ids.rejected_cut} rejected tokens cut off"
                findings.append(Finding(pair.index, f"longer than max_length {max_length}: {cut}", "cut", split))
        check_dropped(dropped, total, allow_dropped)
        findings.extend(dropped)
        return kept, ids_of

    (train, train_ids), (held_out, held_out_ids) = _fit(found.train, "train"), _fit(found.held_out, "held_out")
    return PairData(train, held_out, findings, found.source), {"train": train_ids, "held_out": held_out_ids}
