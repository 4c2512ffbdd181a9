"""Small data files that unpack to more than a machine holds: refused in one line, in little memory, before their end.

Each is read by a process of its own, whose memory is limited; the reader's own limits are lowered where they would take
long to reach.
"""

import gzip
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT

pytest.importorskip("resource", reason="needs limits on memory, which this system has not")

MIB = 2**20
SCRIPT = """
import resource, sys
from pathlib import Path
from dpo_helpers.errors import CourseError
from dpo_helpers.run import pairs, rows
from dpo_helpers.run.loading import load_tokenizer
from dpo_helpers.settings import load_settings
import pyarrow.parquet
path, most, *limits = sys.argv[1:]
for limit in limits:
    name, value = limit.split("=")
    setattr(rows, name, int(value))
settings = load_settings("mini", dataset=path, max_pairs=None, held_out_pairs=2, allow_dropped="allowed" in path)
tokenizer = load_tokenizer(settings)
has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (has + int(most) * 2**20,) * 2)
try:
    found = pairs.load_pairs(settings)
    pairs.fit_pairs(found, tokenizer, max_length=256, max_prompt_length=128, allow_dropped=False)
    print("read", len(found.train) + len(found.held_out))
except CourseError as error:
    print(f"{type(error).__name__}: {error}")
"""


def printed(path, mib, **limits):
    """Lines that reading and tokenising it prints, in at most this much memory more than the packages take.

    The limit is on addresses, of which malloc reserves 64 MiB for each thread, used or not: hence two arenas for all.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(mib), *(f"{name}={value}" for name, value in limits.items())],
        cwd=ROOT, env={**os.environ, "MALLOC_ARENA_MAX": "2"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-600:]
    return done.stdout.splitlines()


def read(path, mib, **limits):
    """The one line that it prints."""
    (line,) = printed(path, mib, **limits)
    return line


def dialogue(n, text):
    return {side: f"\n\nHuman: {n}?\n\nAssistant: {side}{text}" for side in ("chosen", "rejected")}


def parquet(path, text, rows, **options):
    """A file that holds one text of each column, and says of each row that it is that."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    batch = pa.record_batch([[dialogue(0, text)[side]] for side in ("chosen", "rejected")], ["chosen", "rejected"])
    one = pa.Table.from_batches([batch])
    table = pa.table({
        side: pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), one[side].combine_chunks())
        for side in ("chosen", "rejected")
    })  # fmt: skip
    with ParquetWriter(path, table.schema, compression="zstd", compression_level=19, **options) as writer:
        writer.write_table(table)
    return path


def packed(path, lines):
    with gzip.open(path, "wb") as stream:
        for line in lines:
            stream.write(line)
    return path


@pytest.mark.parametrize("is_told", [True, False])
def test_a_parquet_file_that_repeats_a_text_of_16_mb(tmp_path, is_told):
    """is_told: the reader, that the texts repeat."""
    path = parquet(tmp_path / "x.parquet", "a" * 16 * MIB, 400, store_schema=is_told)
    assert path.stat().st_size < 10_000
    assert read(path, 600) == f"DataError: {path}: row 0 is longer than 4194304 bytes; is it a dialogue?"


def test_a_parquet_file_whose_rows_are_all_in_one_page(tmp_path):
    """A page is unpacked as a whole: 60 rows of 2 MB in a few kB, none of them too long by itself."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    rows = [dialogue(n, "a" * 2_000_000) for n in range(60)]
    write_table(
        pa.Table.from_pylist(rows), tmp_path / "d.parquet", compression="zstd", use_dictionary=False,
        data_page_size=2**30, write_batch_size=60,
    )  # fmt: skip
    assert (tmp_path / "d.parquet").stat().st_size < 100_000
    assert "d.parquet: with this file the rows unpack to more than 67108864 bytes; is it a data set?" in read(
        tmp_path / "d.parquet", 100, MAX_UNPACKED=64 * MIB
    )


def test_a_parquet_file_that_repeats_a_text_which_is_not_too_long_by_itself(tmp_path):
    path = parquet(tmp_path / "x.parquet", "a" * MIB, 2000)
    said = read(path, 600, MAX_UNPACKED=200 * MIB)
    assert said.startswith(f"DataError: {path}: with this file the rows unpack to more than 209715200 bytes;")


@pytest.mark.parametrize("letter", ["", "\U0001f600"], ids=["as long in memory", "four times as long in memory"])
def test_a_gzip_of_many_long_rows(tmp_path, letter):
    """An emoji makes Python keep four bytes for each letter of a text, wherever it is."""
    rows = (json.dumps(dialogue(n, "a" * MIB + letter)).encode() + b"\n" for n in range(60 if letter else 300))
    path = packed(tmp_path / "x.jsonl.gz", rows)
    assert path.stat().st_size < 2 * MIB
    said = read(path, 600, MAX_UNPACKED=200 * MIB)
    assert said.startswith(f"DataError: {path}: with this file the rows unpack to more than 209715200 bytes;")


def test_the_files_of_a_folder_count_together(tmp_path):
    for name in "abc":
        packed(tmp_path / f"{name}.jsonl.gz", (json.dumps(dialogue(name, "a" * MIB)).encode() + b"\n",))
    said = printed(tmp_path, 600, MAX_UNPACKED=5 * MIB)[-1]
    assert said.startswith(f"DataError: {tmp_path / 'c.jsonl.gz'}: with this file the rows")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "allowed.jsonl.gz"])
def test_millions_of_rows_that_are_none_are_not_read_to_the_end(tmp_path, name):
    path = packed(tmp_path / name, [b"1\n" * 6_000_000])
    reason = "it is int, not an object with 'chosen' and 'rejected'"
    assert read(path, 600) == (
        f"RowsError: {path}: 100001 of 100001 rows cannot be used (most often: {reason}; 100001 rows, first row 0); "
        "check the file"
    )


def test_millions_of_empty_lines_are_not_read_to_the_end(tmp_path):
    """4,177,983 of them, or the 256 bytes that each counts for would be none of 2**30."""
    path = packed(tmp_path / "x.jsonl.gz", [b"\n" * 4_000_000] * 10)
    assert read(path, 200).startswith(
        f"DataError: {path}: with this file the rows unpack to more than 1073741824 bytes"
    )


def test_long_texts_meet_the_tokenizer_few_at_a_time(tmp_path):
    """Three megabytes of text that are as many tokens, a hundred times over."""
    rows = (json.dumps(dialogue(n, "~" + "}{" * 50_000)).encode() + b"\n" for n in range(120))
    assert read(packed(tmp_path / "x.jsonl.gz", rows), 400) == "read 120"


def test_empty_lines_between_rows_are_no_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n".join(json.dumps(dialogue(n, "")) for n in range(20)) + "\n\n\n")
    assert read(path, 600) == "read 20"


def test_rows_that_share_their_texts_are_as_long_as_their_own(tmp_path):
    """As pandas writes categories: a row names one of the texts of all rows, which are 6 MiB together."""
    import pandas as pd

    rows = pd.DataFrame([dialogue(n, "a" * 60_000) for n in range(100)]).astype("category")
    rows.to_parquet(tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", 600) == "read 100"


def test_other_columns_of_a_parquet_file_are_not_unpacked(tmp_path):
    import pandas as pd

    rows = [{**dialogue(n, ""), "other": "a" * 5 * MIB} for n in range(50)]
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet", compression="zstd")
    assert read(tmp_path / "x.parquet", 600) == "read 50"
    pd.DataFrame([{"other": 1}] * 3).to_parquet(tmp_path / "x.parquet")
    assert "3 of 3 rows cannot be used (most often: its columns are other; wanted are" in read(
        tmp_path / "x.parquet", 600
    )
