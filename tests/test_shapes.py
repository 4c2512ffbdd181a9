"""The shapes in which preference pairs are published: each gives the text that HH-RLHF would have."""

import json

import pytest

from dpo_helpers.errors import DataError
from dpo_helpers.hh import Pair, parse_row
from dpo_helpers.run.pairs import RowsError, load_pairs, parse_rows
from dpo_helpers.run.rows import without_pairs
from dpo_helpers.run.shapes import ShapeError, as_hh
from dpo_helpers.settings import load_settings

PAIR = Pair("\n\nHuman: Why?\n\nAssistant:", " Because.", " No.", 3)
LATER = Pair("\n\nHuman: Why?\n\nAssistant: Who asks?\n\nHuman: I.\n\nAssistant:", " Because.", " No.", 3)
TOLD = Pair("Be kind.\n\nHuman: Why?\n\nAssistant:", " Because.", " No.", 3)


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


WHY, BECAUSE, NO = ("user", "Why?"), ("assistant", "Because."), ("assistant", "No.")
ASKED = (WHY, ("assistant", "Who asks?"), ("user", "I."))
SHAPES = {
    "HH text": ({"chosen": PAIR.prompt + " Because.", "rejected": PAIR.prompt + " No."}, "HH text", PAIR),
    "a prompt without markers": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, "texts", PAIR),
    "a prompt with markers": ({"prompt": PAIR.prompt, "chosen": " Because.", "rejected": "No."}, "texts", PAIR),
    "markers without blank lines before": (
        {"prompt": "Human: Why?\n\nAssistant: ", "chosen": "Because.", "rejected": "No."}, "texts", PAIR),
    "a prompt beside whole dialogues": (
        {"prompt": PAIR.prompt, "chosen": PAIR.prompt + " Because.", "rejected": PAIR.prompt + " No."}, "texts", PAIR),
    "several turns with markers": ({"prompt": LATER.prompt, "chosen": "Because.", "rejected": "No."}, "texts", LATER),
    "orca pairs": ({"system": "Be kind.", "question": "Why?", "chosen": "Because.", "rejected": "No."}, "texts", TOLD),
    "a system text beside a prompt with markers": (
        {"system": "Be kind.", "prompt": PAIR.prompt, "chosen": "Because.", "rejected": "No."}, "texts", TOLD,
    ),
    "orca pairs without system": ({"system": "", "question": "Why?", "chosen": "Because.", "rejected": "No."}, "texts", PAIR),
    "messages with the prompt apart": (
        {"prompt": said(WHY), "chosen": said(BECAUSE), "rejected": said(NO)}, "messages", PAIR),
    "messages that begin alike": ({"chosen": said(WHY, BECAUSE), "rejected": said(WHY, NO)}, "messages", PAIR),
    "several turns as messages": ({"chosen": said(*ASKED, BECAUSE), "rejected": said(*ASKED, NO)}, "messages", LATER),
    "a system turn": (
        {"chosen": said(("system", "Be kind."), WHY, BECAUSE), "rejected": said(("system", "Be kind."), WHY, NO)},
        "messages", TOLD),
    "UltraFeedback, binarised": (
        {"prompt": "Why?", "prompt_id": "a", "chosen": said(WHY, BECAUSE), "rejected": said(WHY, NO),
         "messages": said(WHY, BECAUSE), "score_chosen": 8.0, "score_rejected": 2.0}, "messages", PAIR),
    "HH text whose first blank lines were stripped": (
        {"chosen": PAIR.prompt.lstrip() + " Because.", "rejected": PAIR.prompt.lstrip() + " No."}, "HH text", PAIR),
    "HH text beside an empty prompt": (
        {"prompt": "", "chosen": PAIR.prompt + " Because.", "rejected": PAIR.prompt + " No."}, "HH text", PAIR),
    "orca pairs as messages": (
        {"prompt": "Why?", "chosen": said(("system", "Be kind."), WHY, BECAUSE),
         "rejected": said(("system", "Be kind."), WHY, NO)}, "messages", TOLD),
    "the last question beside the messages": (
        {"prompt": "I.\n", "chosen": said(*ASKED, BECAUSE), "rejected": said(*ASKED, NO)}, "messages", LATER),
    "a system text beside messages": (
        {"system": "Be kind.", "prompt": "Why?", "chosen": said(WHY, BECAUSE), "rejected": said(WHY, NO)}, "messages", TOLD),
    "a system text that stands in the messages too": (
        {"system": "Be kind.", "prompt": said(("system", "Be kind."), WHY), "chosen": said(BECAUSE), "rejected": said(NO)},
        "messages", TOLD),
    "an empty system turn": (
        {"chosen": said(("system", ""), WHY, BECAUSE), "rejected": said(("system", None), WHY, NO)}, "messages", PAIR),
    "a blank system text": ({"system": " ", "prompt": "Why?", "chosen": "Because.", "rejected": "No."}, "texts", PAIR),
    "no prompt beside a question": (
        {"prompt": None, "question": "Why?", "chosen": "Because.", "rejected": "No."}, "texts", PAIR),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_same_pair(name):
    row, shape, pair = SHAPES[name]
    text, found = as_hh(row)
    assert found == shape
    assert parse_row(text, 3) == pair


WRONG = {
    "KTO": ({"prompt": "Why?", "completion": "No.", "label": False}, "single responses with a label, as for KTO"),
    "other columns": ({"instruction": "Why?", "output": "No."}, "its columns are instruction, output; wanted are 'chosen'"),
    "a turn twice": ({"chosen": said(WHY, WHY, BECAUSE), "rejected": said(WHY, WHY, NO)}, "roles are out of order: user, user"),
    "a late system turn": (
        {"chosen": said(WHY, ("system", "x"), BECAUSE), "rejected": said(WHY, NO)}, "roles are out of order: user, system"),
    "the assistant first": ({"chosen": said(BECAUSE), "rejected": said(NO)}, "roles are out of order: assistant"),
    "an empty turn": ({"chosen": said(("user", " "), BECAUSE), "rejected": said(WHY, NO)}, "an empty turn of the user"),
    "another role": ({"chosen": said(("tool", "x"), BECAUSE), "rejected": said(WHY, NO)}, "a message has the role 'tool'"),
    "no messages": ({"chosen": ["Because."], "rejected": ["No."]}, "a message is no object with 'role' and 'content'"),
    "a marker in a message": (
        {"chosen": said(WHY, ("assistant", "No.\n\nHuman: Yes?")), "rejected": said(WHY, NO)},
        "a turn of the assistant holds a Human or Assistant marker"),
    "a marker in a response": (
        {"prompt": "Why?", "chosen": "No.\n\nHuman: Yes?", "rejected": "No."}, "a response holds a Human or Assistant"),
    "messages written as a text": (
        {"prompt": "Why?", "chosen": str(said(WHY, BECAUSE)), "rejected": json.dumps(said(WHY, NO))},
        "its messages are written as one text: give lists"),
    "a number as prompt": ({"prompt": 5, "chosen": "Because.", "rejected": "No."}, "its user text is int, neither text nor"),
    "NaN as system": (
        {"system": float("nan"), "prompt": "Why?", "chosen": "Because.", "rejected": "No."}, "its system text is float"),
    "a prompt of the system alone": (
        {"prompt": said(("system", "Be kind.")), "chosen": "Because.", "rejected": "No."},
        "its prompt does not end with a turn of the user"),
    "a prompt that ends with an answer": (
        {"prompt": said(WHY, BECAUSE), "chosen": "Because.", "rejected": "No."},
        "its prompt does not end with a turn of the user"),
    "a prompt that goes on": (
        {"prompt": "\n\nHuman: a\n\nAssistant: b", "chosen": "c", "rejected": "d"}, "but does not end with the Assistant's"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_turned_into_a_pair_is_a_finding_with_the_reason(name):
    row, reason = WRONG[name]
    with pytest.raises(ShapeError, match=reason):
        as_hh(row)
    good = [SHAPES["HH text"][0] | {"chosen": f"{PAIR.prompt} {n}"} for n in range(40)]
    pairs, findings = parse_rows([*good, row])
    assert len(pairs) == 40
    assert [(f.index, f.action) for f in findings] == [(40, "dropped")]
    assert reason in findings[0].reason


def test_prompts_that_differ_stay_a_finding():
    row = {"chosen": said(WHY, BECAUSE), "rejected": said(("user", "When?"), NO)}
    assert parse_row(as_hh(row)[0]).reason == "prompts differ"


def test_a_response_that_ends_with_the_human_is_no_pair():
    row = {"chosen": said(WHY, BECAUSE, WHY), "rejected": said(WHY, NO)}
    assert "goes on with a Human turn" in parse_row(as_hh(row)[0]).reason


def rows(kind, n=30):
    if kind == "texts":
        return [{"prompt": f"Why {i}?", "chosen": "Because.", "rejected": 'No, "no",\nno.', "id": i} for i in range(n)]
    why = [("user", f"Why {i}?") for i in range(n)]
    return [{"chosen": said(w, BECAUSE), "rejected": said(w, NO), "id": 1} for w in why]


def written(folder, kind, end):
    import pandas as pd

    path, table = folder / f"pairs{end}", pd.DataFrame(rows(kind))
    if end == ".parquet":
        table.to_parquet(path)
    elif end == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=end == ".jsonl")
    return path


@pytest.mark.parametrize(
    ("kind", "end"),
    [(kind, end) for kind in ("texts", "messages") for end in (".jsonl", ".json", ".parquet")] + [("texts", ".csv")],
)
def test_files_of_every_kind(tmp_path, capsys, kind, end):
    path = written(tmp_path, kind, end)
    for place in (path, tmp_path):
        found = load_pairs(load_settings("mini", dataset=str(place), held_out_pairs=5))
        assert len(found.train) + len(found.held_out) == 30
        assert found.train[0].prompt.startswith("\n\nHuman: Why ")
        assert found.train[0].prompt.endswith("?\n\nAssistant:")
        assert {p.rejected for p in found.train} == {' No, "no",\nno.' if kind == "texts" else " No."}
        assert f"rows of {place.name}: prompts and responses as {kind}" in capsys.readouterr().out


def test_a_json_file_may_hold_a_row_a_line_and_notes_of_datasets_are_no_data(tmp_path):
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in rows("texts")))
    (tmp_path / "dataset_info.json").write_text("{}")
    found = load_pairs(load_settings("mini", dataset=str(tmp_path), held_out_pairs=5))
    assert len(found.train) + len(found.held_out) == 30


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "[{]"), ("a.csv", 'prompt,chosen\n"a'), ("a.json", '[{"a": 1}, ')]
)
def test_a_damaged_file_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}"):
        load_pairs(load_settings("mini", dataset=str(tmp_path / name)))


def test_bounds_hold_for_arrays_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_helpers.run.rows.MAX_ARRAY", 100)
    monkeypatch.setattr("dpo_helpers.run.rows.MAX_ROW", 100)
    (tmp_path / "a.json").write_text(json.dumps(rows("texts")))
    with pytest.raises(DataError, match=r"a\.json is longer than 100 bytes, and an array is read as a whole: make"):
        load_pairs(load_settings("mini", dataset=str(tmp_path / "a.json")))
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n" + "x" * 200)
    with pytest.raises(DataError, match=r"a\.csv: a line is longer than 100 bytes; is it a table"):
        load_pairs(load_settings("mini", dataset=str(tmp_path / "a.csv")))


def test_unpaired_rows_are_refused_by_name(tmp_path):
    path = tmp_path / "kto.jsonl"
    path.write_text("".join(json.dumps(WRONG["KTO"][0]) + "\n" for _ in range(30)))
    with pytest.raises(
        RowsError, match=r"30 of 30 rows cannot be used \(most often: single responses with a label, as"
    ):
        load_pairs(load_settings("mini", dataset=str(path)))


def test_beside_files_of_rows_other_kinds_are_notes(tmp_path, capsys):
    written(tmp_path, "texts", ".jsonl")
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "scores.csv").write_text("a,b\n1,2\n")
    assert len(load_pairs(load_settings("mini", dataset=str(tmp_path), held_out_pairs=5)).train) > 20
    assert "train: pairs.jsonl; held out: none; ignored: scores.csv, settings.json" in capsys.readouterr().out


def test_the_splits_of_ultrafeedback_that_hold_no_pairs_are_left_alone(tmp_path, capsys):
    """Its train_sft and train_gen hold the same answers in other columns; test_prefs is held out."""
    for name in ("train_prefs", "train_sft", "train_gen", "test_prefs", "test_sft"):
        part = rows("messages", 12 if name.startswith("train") else 4)
        (tmp_path / f"{name}-00000-of-00001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    found = load_pairs(load_settings("mini", dataset=str(tmp_path), held_out_pairs=50))
    assert len({p.prompt for p in found.train}) == len(found.train) == 8, "four prompts are held out"
    assert len(found.held_out) == 4
    assert "train: train_prefs-00000-of-00001.jsonl; held out: test_prefs-00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["train_prefs", "train_sft", "test_gen", "test_prefs"], {"train_sft", "test_gen"}),
        (["my_prefs.jsonl", "test.jsonl"], set()),
        (["train_prefs.jsonl", "dev.jsonl"], set()),
        (["train_a.jsonl", "train_b.jsonl", "test_a.jsonl"], set()),
    ],
)
def test_only_what_says_that_it_is_something_else_is_left_alone(names, others):
    assert without_pairs(names) == others


def test_a_line_of_a_table_with_more_fields_than_names_is_a_finding(tmp_path):
    """An unquoted comma would move what follows into another column."""
    table = "prompt,chosen,rejected\n" + "".join(f"Why {i}?,Because.,No.\n" for i in range(40))
    (tmp_path / "a.csv").write_text(table + "Why z?,Because, so it is,No\n")
    found = load_pairs(load_settings("mini", dataset=str(tmp_path / "a.csv"), held_out_pairs=5, allow_dropped=True))
    assert len(found.train) + len(found.held_out) == 40
    assert [(f.index, f.reason) for f in found.findings] == [
        (40, "line 42 of a.csv has more fields than the table has names")
    ]


def test_what_pandas_writes_for_a_missing_text_is_missing(tmp_path):
    """json.dumps writes a float NaN as NaN, which JSON does not have."""
    lines = [json.dumps(row | {"system": float("nan")}) for row in rows("texts")]
    assert "NaN" in lines[0]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text(f"[{','.join(lines)}]")
    for name in ("a.jsonl", "b.json"):
        found = load_pairs(load_settings("mini", dataset=str(tmp_path / name), held_out_pairs=5))
        assert len(found.train) + len(found.held_out) == 30
        assert found.train[0].prompt.startswith("\n\nHuman: Why")
