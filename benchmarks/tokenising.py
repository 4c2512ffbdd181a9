"""Rows read, checked, cut and tokenised per second, on one core: `python -m benchmarks.tokenising --help`."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core; before the tokenizer is imported

import typer

from benchmarks.dpo_vs_trl import RESULTS, _machine
from benchmarks.workload import load_tokenizer
from dpo_helpers.hh import Pair, parse_row
from dpo_helpers.tokens import encode_pairs


def read_pairs(path: Path) -> Iterator[Pair]:
    """The usable pairs of a .jsonl or .jsonl.gz file, a line at a time."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
        for index, line in enumerate(stream):
            found = parse_row(json.loads(line), index)
            if isinstance(found, Pair):
                yield found


def main(
    data: Annotated[Path, typer.Option(help="a .jsonl or .jsonl.gz file of HH pairs")],
    tokenizer: Annotated[
        str, typer.Option(help="folder with vocab.json and merges.txt, or a Hub id")
    ] = "openai-community/gpt2",
    repeats: Annotated[int, typer.Option(help="of the whole file; the median counts")] = 7,
) -> None:
    """Measure and write the result into benchmarks/results/."""
    loaded = load_tokenizer(tokenizer)
    rates: list[float] = []
    pairs = tokens = 0
    for _ in range(repeats + 1):  # the first one warms up
        started, pairs, tokens = time.process_time(), 0, 0
        for pair in encode_pairs(loaded, read_pairs(data), max_length=512, max_prompt_length=256):
            pairs += 1
            tokens += len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
        rates.append(pairs / (time.process_time() - started))
    result: dict[str, Any] = {
        "machine": _machine("cpu"), "pairs": pairs, "tokens_a_pair": tokens / pairs,
        "pairs_per_s_per_core": median(rates[1:]),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tokenising.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
