"""A data set folder of somebody else's: archives stay packed, links and hostile names lead nowhere, damage is named."""

import gzip
import json
import os
import tarfile
import zipfile

import pytest

from dpo_helpers.errors import DataError
from dpo_helpers.run.pairs import data_identity, load_pairs
from dpo_helpers.run.rows import MAX_ROW
from dpo_helpers.run.stages import get_data
from dpo_helpers.settings import load_settings
from dpo_helpers.worlds.embedded import preference_rows

ROWS = preference_rows("train", 80)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS[:60])


def asked(numbers):
    """A row for each number, each with a prompt of its own."""
    return [{side: f"\n\nHuman: {n}?\n\nAssistant: {side}" for side in ("chosen", "rejected")} for n in numbers]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(path, **more):
    return load_pairs(load_settings("mini", dataset=str(path), max_pairs=None, held_out_pairs=10, **more))


def texts(pairs):
    return {p.prompt + p.chosen for p in pairs}


@pytest.fixture
def folder(tmp_path):
    """As HH-RLHF's own: a folder per subset, gzipped JSON lines per split."""
    base = tmp_path / "hh"
    (base / "harmless-base").mkdir(parents=True)
    (base / "harmless-base/train.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    held_out = "".join(json.dumps(row) + "\n" for row in ROWS[60:])
    (base / "harmless-base/test.jsonl.gz").write_bytes(gzip.compress(held_out.encode()))
    return base


def test_a_prompt_of_the_test_split_is_not_trained_on_with_other_blanks_either(folder):
    spaced = [row | {key: row[key].replace("\n\nHuman: ", "\n\nHuman:  ") for key in row} for row in ROWS[60:]]
    (folder / "harmless-base/train.jsonl.gz").write_bytes(
        gzip.compress((LINES + "".join(json.dumps(row) + "\n" for row in spaced)).encode())
    )
    assert texts(load(folder).train) <= {row["chosen"] for row in ROWS[:60]}


def test_a_data_file_whose_name_is_no_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"donn\xe9es.jsonl")
    try:
        path.write_text(LINES)
    except OSError:
        pytest.skip("this file system takes no such name")
    here = {"held_out_pairs": 10, "max_pairs": 20, "runs_dir": str(tmp_path / "runs")}
    assert len(get_data(load_settings("mini", dataset=str(path), **here)).train) == 20


def test_a_folder_with_its_own_split(folder):
    found = load(folder)
    assert texts(found.held_out) <= {row["chosen"] for row in ROWS[60:]}
    assert texts(found.train) <= {row["chosen"] for row in ROWS[:60]}
    assert len(found.held_out) == 10, "drawn from the 20 of its own test split"
    assert found.source == "hh"


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    for name, part in (("b.jsonl", ROWS[40:]), ("a.jsonl", ROWS[:40])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    found = load(tmp_path)
    by_index = {p.index: p.prompt + p.chosen for p in (*found.train, *found.held_out)}
    assert by_index == {i: row["chosen"] for i, row in enumerate(ROWS)}


def test_the_identity_names_each_file(folder):
    settings = load_settings("mini", dataset=str(folder))
    before = data_identity(settings)
    assert set(before["sha256"]) == {"harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz"}
    (folder / "harmless-base/train.jsonl.gz").write_bytes(gzip.compress(LINES.encode()[::-1]))
    assert data_identity(settings) != before


def test_archives_are_not_unpacked_and_scripts_not_run(folder, tmp_path, monkeypatch, survived):
    """zip and tar members that climb out, a loading script, pickles: none is opened, and nothing appears beside it."""
    marker = tmp_path / "ran"
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        archive.writestr("../../escaped.jsonl", LINES)
    evil = tmp_path / "evil"
    evil.write_text(LINES)
    with tarfile.open(folder / "train.tar.gz", "w:gz") as archive:
        archive.add(evil, "../../escaped.jsonl")
    script = f"open({str(marker)!r}, 'w').write('x')\n"
    for name in ("hh.py", "train.py", "setup.py"):
        (folder / name).write_text(script)
    (folder / "train.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    monkeypatch.chdir(tmp_path)
    found = load(folder)
    assert texts(found.train) <= {row["chosen"] for row in ROWS}
    left_alone = sum(
        not path.exists() for path in (marker, tmp_path / "escaped.jsonl", folder.parent / "escaped.jsonl")
    )
    survived("hostile archives, scripts and pickles in a data folder left alone", left_alone, 3)


@pytest.mark.parametrize("name", ["x.pkl", "x.zip", "x.tar.gz", "x.py", "x.bin", "x.tsv", "x.xlsx", "x.arrow"])
def test_a_file_of_another_kind_is_refused_and_the_error_says_what_to_make_of_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused = (
        rf"{name} is no \.jsonl, .* file; other kinds are neither unpacked, converted nor run: make a \.jsonl file of"
    )
    with pytest.raises(DataError, match=refused):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["X.JSONL", "x.Jsonl.GZ", "x.PARQUET"])
def test_the_end_of_a_name_may_be_in_capitals(tmp_path, name):
    if name.endswith("PARQUET"):
        import pandas as pd

        pd.DataFrame(ROWS[:60]).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(LINES.encode()) if name.endswith("GZ") else LINES.encode())
    for path in (tmp_path / name, tmp_path):
        found = load(path)
        assert len(found.train) + len(found.held_out) == 60


def test_a_folder_without_data_says_so(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="holds no training data: it needs .*nor run: make a .jsonl file of"):
        load(tmp_path)
    (tmp_path / "dev.jsonl").write_text(LINES)
    with pytest.raises(
        DataError, match=r"holds no training data but those held out by name \(dev\.jsonl, …\): it needs"
    ):
        load(tmp_path)


HELD_OUT = ["test", "testing", "eval", "evaluation", "validation", "valid", "dev", "val"]  # datasets.data_files


@pytest.mark.parametrize(
    "name",
    [f"{word}{more}" for word in (*HELD_OUT, "held_out", "held-out", "heldout", "holdout", "hold_out") for more in (".jsonl", "/a.jsonl")]
    + ["pairs-dev.jsonl", "pairs_val_2.jsonl", "hh.valid.jsonl", "dev0.jsonl", "data/val-00000-of-00001.jsonl",
       "my dev set.jsonl", "DEV.jsonl", "sub/dev/train.jsonl", "test-train.jsonl", "a/Validation_1/b/c.jsonl"],
)  # fmt: skip
def test_what_is_named_as_held_out_is_not_trained_on(tmp_path, name, capsys):
    """No pair of it, and no pair about its prompts, which the last row of the other file has."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(lines(asked(range(9))))
    again = {"chosen": asked([8])[0]["rejected"], "rejected": asked([8])[0]["rejected"] + " again"}
    (tmp_path / "train.jsonl").write_text(lines([*asked(range(100, 130)), again]))
    found = load(tmp_path)
    assert texts(found.train) == {row["chosen"] for row in asked(range(100, 130))}
    assert texts(found.held_out) == {row["chosen"] for row in asked(range(9))}
    assert capsys.readouterr().out.endswith(f": train: train.jsonl; held out: {name}; ignored: none\n")


@pytest.mark.parametrize(
    "name", ["train", "training", "development", "validity", "devices", "pretest", "contest", "evals"]
)
def test_a_name_that_only_holds_such_a_word_is_trained_on(tmp_path, name):
    """As `datasets` has it: a keyword stands between separators."""
    (tmp_path / f"{name}.jsonl").write_text(LINES)
    found = load(tmp_path)
    assert len(found.train) + len(found.held_out) == 60


def test_the_words_are_those_of_datasets(tmp_path):
    from datasets.data_files import SPLIT_KEYWORDS

    words = {str(split): set(words) for split, words in SPLIT_KEYWORDS.items()}
    assert words == {"train": {"train", "training"}, "validation": set(HELD_OUT[4:]), "test": set(HELD_OUT[:4])}


def test_beside_a_file_named_train_those_without_a_split_are_ignored_as_in_hh_rlhf(folder, capsys):
    """Its red-team attempts are no pairs; `datasets` leaves them out too. Without a name train, all of them count."""
    (folder / "red-team-attempts").mkdir()
    attempts = folder / "red-team-attempts/red_team_attempts.jsonl.gz"
    attempts.write_bytes(gzip.compress(LINES.encode()))
    (folder / "README.md").touch()
    load(folder)
    assert capsys.readouterr().out == (
        "files of hh: train: harmless-base/train.jsonl.gz; held out: harmless-base/test.jsonl.gz; "
        "ignored: README.md, red-team-attempts/red_team_attempts.jsonl.gz\n"
    )
    (folder / "harmless-base/train.jsonl.gz").unlink()
    assert load(folder).train
    assert set(data_identity(load_settings("mini", dataset=str(folder)))["sha256"]) == {
        "harmless-base/test.jsonl.gz", "red-team-attempts/red_team_attempts.jsonl.gz",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints/train-checkpoint.jsonl", "._train.jsonl", "__MACOSX/train.jsonl", "a/.b/c/train.jsonl"]
)
def test_what_is_hidden_is_no_data(folder, capsys, name):
    """Jupyter's copy of a file, macOS's notes on one: what `datasets` does not see either."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("no rows")
    assert load(folder).train
    assert capsys.readouterr().out == (
        "files of hh: train: harmless-base/train.jsonl.gz; held out: harmless-base/test.jsonl.gz; ignored: none\n"
    )


def test_of_many_files_eight_are_named(tmp_path, capsys):
    for number in range(10):
        (tmp_path / f"{number}\n.jsonl").write_text(lines(asked(range(number * 6, number * 6 + 6))))
    load(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(
        ": train: " + ", ".join(f"{n} .jsonl" for n in range(8)) + " and 2 more; held out: none; ignored: none"
    )


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_followed(folder, tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text(LINES)
    os.symlink(folder / "harmless-base/train.jsonl.gz", folder / "again-train.jsonl.gz")
    load(folder)
    os.symlink(secret, folder / "train-secret.jsonl")
    with pytest.raises(
        DataError, match=r"train-secret\.jsonl is a link to a place outside .*hh, which is not followed"
    ):
        load(folder)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
@pytest.mark.parametrize("place", ["snapshots/a/train.jsonl", "hh/deep/train.jsonl", "hh/train/in.jsonl"])
def test_no_link_leads_out_of_any_folder(tmp_path, place):
    """Also not where the folder's own place looks like one in the Hub's cache, and not through a folder's link."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/in.jsonl").write_text(LINES)
    link = tmp_path / place
    if link.name == "in.jsonl":  # a link to a whole folder
        link.parent.parent.mkdir(parents=True)
        os.symlink(tmp_path / "secret", link.parent)
    else:
        link.parent.mkdir(parents=True)
        os.symlink(os.path.relpath(tmp_path / "secret/in.jsonl", link.parent), link)
    folder = tmp_path / "snapshots/a" if place.startswith("snap") else tmp_path / "hh"
    for read in (load, lambda path: data_identity(load_settings("mini", dataset=str(path)))):
        with pytest.raises(DataError, match=r"is a link to a place outside|holds no training data"):
            read(folder)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(tmp_path):
    """datasets--x/snapshots/<commit>/train.jsonl -> ../../blobs/<hash>"""
    snapshot, blobs = tmp_path / "datasets--x/snapshots" / ("a" * 40), tmp_path / "datasets--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "b").write_text(LINES)
    os.symlink("../../blobs/b", snapshot / "train.jsonl")
    assert load(snapshot).train


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "train-pipe.jsonl")
    assert load(folder).train


def test_hostile_file_names_are_read_and_shown_harmlessly(tmp_path, survived):
    names = [
        "<img src=x onerror=alert(1)>.jsonl",
        "a\x1b[31mred.jsonl",
        "\u202egpj.jsonl",
        "new\nline.jsonl",
        "$(id).jsonl",
    ]
    good = 0
    for name in names:
        path = tmp_path / name
        path.write_text(LINES)
        assert load(path).train
        path.write_text("")
        with pytest.raises(DataError) as caught:
            load(path)
        said = str(caught.value)
        good += "is empty" in said and "\x1b" not in said and "\u202e" not in said
    survived("hostile file names read, and shown harmlessly in errors", good, len(names))


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_gzip_that_ends_early_is_named(folder, keep):
    path = folder / "harmless-base/train.jsonl.gz"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz cannot be read: Compressed file ended .*get the file again"):
        load(folder)


def test_flipped_bits_in_a_gzip_are_found_by_its_checksum(folder, survived):
    path = folder / "harmless-base/train.jsonl.gz"
    raw, found = path.read_bytes(), 0
    places = range(12, len(raw), len(raw) // 50)
    for place in places:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 8]) + raw[place + 1 :])
        with pytest.raises(DataError, match=r"train\.jsonl\.gz"):
            load(folder)
        found += 1
    survived("flipped bits in a gzipped data file found and the file named", found, len(places))


def test_a_parquet_files_name_is_no_pattern(tmp_path):
    """ "a*.parquet" must not bring the rows of "ab-test.parquet" into training."""
    import pandas as pd

    pd.DataFrame(ROWS[:50]).to_parquet(tmp_path / "a*.parquet")
    pd.DataFrame(ROWS[50:]).to_parquet(tmp_path / "ab-test.parquet")
    found = load(tmp_path)
    assert texts(found.train) <= {row["chosen"] for row in ROWS[:50]}
    (tmp_path / "a*.parquet").rename(tmp_path / "a[1].parquet")
    assert load(tmp_path).train == found.train


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.encode())
    assert not load(tmp_path / "x.jsonl").findings


def test_a_name_that_the_system_refuses_is_an_error_of_ours(tmp_path):
    name = "x" * 300 + ".jsonl"
    with pytest.raises(DataError, match=r"cannot be read: File name too long; check --dataset"):
        data_identity(load_settings("mini", dataset=str(tmp_path / name)))


def test_garbage_parquet_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(200) + b"PAR1")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read: "):
        load(tmp_path / "x.parquet")


def test_a_line_without_end_is_not_read_into_memory(tmp_path):
    """Packed, 100 MB of one letter are 100 KB."""
    with gzip.open(tmp_path / "x.jsonl.gz", "wb") as stream:
        stream.write(LINES.encode())
        for _ in range(100):
            stream.write(b"a" * 1_000_000)
    with pytest.raises(DataError, match=rf"x\.jsonl\.gz: line 61 is longer than {MAX_ROW} bytes"):
        load(tmp_path / "x.jsonl.gz")
