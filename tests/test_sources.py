"""Pairs from files and from a Hub: the real loading code, against local files and a server on this machine."""

import gzip
import json

import pytest

from dpo_helpers.errors import CourseError, DataError
from dpo_helpers.hh import Pair
from dpo_helpers.run.pairs import data_identity, hold_out, load_pairs
from dpo_helpers.run.sources import source_of
from dpo_helpers.settings import load_settings
from dpo_helpers.worlds.embedded import preference_rows

ROWS = preference_rows("train", 60)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def settings(path, **more):
    return load_settings(
        "mini", dataset=str(path), max_pairs=None, held_out_pairs=more.pop("held_out_pairs", 10), **more
    )


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet"])
def test_file_formats(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        import pandas as pd

        pd.DataFrame(ROWS).to_parquet(path)
    else:
        write(path, ROWS)
    found = load_pairs(settings(path))
    assert len(found.train) + len(found.held_out) == 60
    assert len(found.held_out) >= 10
    assert found.source == name
    texts = {p.prompt + p.chosen for p in (*found.train, *found.held_out)}
    assert texts == {row["chosen"] for row in ROWS}


def test_no_prompt_is_on_both_sides(tmp_path):
    rows = ROWS + [{"chosen": r["chosen"], "rejected": r["rejected"] + " Bye."} for r in ROWS]
    found = load_pairs(settings(write(tmp_path / "d.jsonl", rows)))
    assert {p.prompt for p in found.train}.isdisjoint(p.prompt for p in found.held_out)


def test_few_prompts_behind_the_held_out_pairs_are_said(tmp_path, capsys):
    load_pairs(settings(write(tmp_path / "d.jsonl", ROWS)))
    assert "too small" not in capsys.readouterr().out
    rows = [r | {"chosen": r["chosen"] + f" {i}"} for r in ROWS for i in range(6)]
    found = load_pairs(settings(write(tmp_path / "e.jsonl", rows)))
    few = f"the {len(found.held_out)} held-out pairs of e.jsonl have {len({p.prompt for p in found.held_out})} prompts"
    assert (
        f"{few}: standard errors and intervals take pairs for independent, and are too small" in capsys.readouterr().out
    )


def test_prompts_that_differ_in_blanks_alone_are_on_one_side():
    """A chat template strips them: the same question would be trained on and measured."""
    pairs = [Pair(f"\n\nHuman: {i}?{end}\n\nAssistant:", " a", " b", i) for i in range(40) for end in ("", " ", "\n")]
    train, held_out = hold_out(pairs, 15, seed=0)
    assert (len(train), len(held_out)) == (105, 15)
    assert {pair.index for pair in train}.isdisjoint(pair.index for pair in held_out)


def test_held_out_pairs_are_drawn_by_seed(tmp_path):
    path = write(tmp_path / "d.jsonl", ROWS)
    first, again, other = (load_pairs(settings(path, seed=s)).held_out for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_max_pairs_limits_training_pairs_only(tmp_path):
    path = write(tmp_path / "d.jsonl", ROWS)
    few = load_pairs(load_settings("mini", dataset=str(path), max_pairs=7, held_out_pairs=10))
    assert len(few.train) == 7
    assert len(few.held_out) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"d\.jsonl is empty"),
        ('{"chosen": "a"\n', r"d\.jsonl: 1 of 1 rows cannot be used .*line 1 of d.jsonl is no JSON"),
        (json.dumps({"chosen": ROWS[0]["chosen"]}) + "\n", r"d\.jsonl: 1 of 1 rows .*no 'rejected': .*first row 0"),
        (
            json.dumps(ROWS[0]) + "\n" + json.dumps({"chosen": None, "rejected": "x"}) + "\n",
            r"d\.jsonl: 1 of 2 rows cannot be used .*no 'chosen': .*first row 1",
        ),
        (json.dumps(ROWS[0]) + "\n", r"d\.jsonl: too few pairs: 0 to train on and 1 held out"),
    ],
)
def test_bad_files_name_file_and_row(tmp_path, content, message):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_pairs(settings(tmp_path / "d.jsonl"))


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl: no such file; give --dataset"):
        load_pairs(settings(tmp_path / "no.jsonl"))


@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [
        ("embedded", "embedded", "embedded"), ("openai-community/gpt2", "hub", "openai-community/gpt2"), ("gpt2", "hub", "gpt2"),
        ("here", "folder", "here"), ("here/inside", "folder", "inside"), ("here/a.safetensors", "file", "a.safetensors"),
        ("gone/d.jsonl", "file", "d.jsonl"), ("gone.jsonl.gz", "file", "gone.jsonl.gz"), ("gone/M.GGUF", "file", "M.GGUF"),
        ("gone/model.bin", "file", "model.bin"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("what", ["model", "dataset"])
def test_a_name_says_where_it_comes_from_and_the_label_no_more_than_that(
    tmp_path, monkeypatch, what, name, kind, label
):
    """What is there goes first; what ends like a file is meant as one, also where there is none."""
    (tmp_path / "here/inside").mkdir(parents=True)
    (tmp_path / "here/a.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    revision = "0123456789" * 4
    found = source_of(load_settings("mini", **{what: name, f"{what}_revision": revision}), what)
    assert (found.kind, found.label, found.name) == (kind, label, name)
    assert found.commit() == (revision if kind == "hub" else None)


def test_identity_follows_the_content(tmp_path):
    path = write(tmp_path / "d.jsonl", ROWS)
    before = data_identity(settings(path))
    assert data_identity(settings(path)) == before
    write(path, ROWS[::-1])
    assert data_identity(settings(path)) != before


def test_offline_hub_data_is_one_clear_error():
    with pytest.raises(
        DataError, match=r"cannot get data set 'Anthropic/hh-rlhf' from the Hub or its cache .*or use --dataset FILE"
    ):
        load_pairs(load_settings("gpt2"))
    with pytest.raises(CourseError, match="dataset 'a b' is neither an existing path nor a Hub id"):
        load_pairs(load_settings("mini", dataset="a b"))


def test_the_real_slice(hh_slice):
    found = load_pairs(settings(hh_slice, held_out_pairs=200))
    assert len(found.train) + len(found.held_out) + len(found.dropped) == 1542
    assert 200 <= len(found.held_out) < 210
