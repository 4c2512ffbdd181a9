"""8 Bad rows: twelve kinds with index and reason, no false alarm, and no text that changes on its way."""

import gzip
import json
from dataclasses import asdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

from conftest import SHARED
from dpo_helpers import hh
from dpo_helpers.errors import DataError
from dpo_helpers.hh import Finding, Pair, parse_row
from dpo_helpers.run import stages
from dpo_helpers.run.loading import load_model, load_tokenizer
from dpo_helpers.run.pairs import RowsError, load_pairs, parse_rows
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import encode_pair, encode_pairs, encode_text
from dpo_helpers.worlds.embedded import preference_rows

ASK = "\n\nHuman: Hi\n\nAssistant:"
GOOD, OTHER = ASK + " Hello!", ASK + " Go away."
LONG = "\n\nHuman: " + "Tell me more. " * 400 + "\n\nAssistant:"
BAD = {
    "None": ({"chosen": None, "rejected": OTHER}, "no 'chosen'", "dropped"),
    "missing key": ({"chosen": GOOD}, "no 'rejected'", "dropped"),
    "not a string": ({"chosen": 5, "rejected": OTHER}, "'chosen' is int, not text", "dropped"),
    "one side empty": ({"chosen": GOOD, "rejected": ASK}, "rejected response is empty", "dropped"),
    "both empty": ({"chosen": ASK, "rejected": ASK}, "chosen response is empty", "dropped"),
    "only blanks": ({"chosen": ASK + " \n\t", "rejected": OTHER}, "chosen response is empty", "dropped"),
    "identical": ({"chosen": GOOD, "rejected": GOOD}, "responses are identical", "dropped"),
    "contradictory duplicate, one way": ({"chosen": GOOD, "rejected": OTHER}, "contradicts row", "dropped"),
    "contradictory duplicate, the other way": ({"chosen": OTHER, "rejected": GOOD}, "contradicts row", "dropped"),
    "over-long prompt": ({"chosen": LONG + " Yes.", "rejected": LONG + " No."}, "longer than max_length 256", "cut"),
    "lone surrogate": ({"chosen": GOOD + "\ud800", "rejected": OTHER}, "chosen holds a NUL or a lone", "dropped"),
    "NUL": ({"chosen": GOOD, "rejected": OTHER + "\0"}, "rejected holds a NUL", "dropped"),
    "HTML": ({"chosen": GOOD + "<img src=x onerror=alert(1)>", "rejected": OTHER}, "holds HTML", "kept"),
}
CLEAN = preference_rows("train", 1000)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_each_kind_is_reported_with_index_and_reason_among_1000_clean_rows(tmp_path, survived):
    """Bad rows at 70, 140, …: `data/rejected.jsonl` has exactly these, and the pairs are the clean rows."""
    rows, places = list(CLEAN), {}
    for number, (kind, (row, *_)) in enumerate(BAD.items(), start=1):
        places[kind] = 70 * number
        rows.insert(70 * number, row)
    run = load_settings(
        "mini", dataset=write(tmp_path / "d.jsonl", rows), max_pairs=None, held_out_pairs=100, runs_dir=str(tmp_path)
    )
    data = stages.get_data(run)
    listed = {r["index"]: r for r in map(json.loads, (tmp_path / "mini/data/rejected.jsonl").read_text().splitlines())}
    reported = sum(
        listed[places[kind]]["reason"].startswith(reason) and listed[places[kind]]["action"] == action
        for kind, (_, reason, action) in BAD.items()
    )
    survived("8 bad rows reported with index and reason (12 kinds with the empty set)", reported, len(BAD))
    survived("8 clean rows without a false alarm", 1000 - len(set(listed) - set(places.values())), 1000)
    both = (*data.pairs.train, *data.pairs.held_out)
    assert len(both) == 1000 + 2, "with the two that are reported and not dropped"
    assert {p.index for p in both}.isdisjoint(places[k] for k, v in BAD.items() if v[2] == "dropped")
    contradiction = listed[places["contradictory duplicate, one way"]]["reason"]
    assert f"contradicts row {places['contradictory duplicate, the other way']}," in contradiction


def test_an_empty_set_is_an_error(tmp_path):
    for name, text in (("empty.jsonl", ""), ("blank.jsonl", "\n\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=f"{name}.* needs rows with 'chosen' and 'rejected' texts"):
            load_pairs(load_settings("mini", dataset=str(tmp_path / name)))


def test_more_than_5_percent_stops_with_all_of_them_listed_unless_allowed(tmp_path):
    rows = [*CLEAN[:90], *[{"chosen": GOOD, "rejected": GOOD}] * 6]
    options = {"dataset": write(tmp_path / "d.jsonl", rows), "max_pairs": None, "held_out_pairs": 10}
    run = load_settings("mini", runs_dir=str(tmp_path), **options)
    with pytest.raises(DataError, match=r"6 of 96 rows .*identical; 6 rows, first row 90\).*--allow-dropped") as caught:
        stages.get_data(run)
    listed = tmp_path / "mini/rejected.jsonl"
    assert str(listed) in str(caught.value)
    assert [json.loads(line)["index"] for line in listed.read_text().splitlines()] == [90, 91, 92, 93, 94, 95]
    assert not (tmp_path / "mini/data").exists()
    data = stages.get_data(load_settings("mini", runs_dir=str(tmp_path), allow_dropped=True, **options))
    assert len(data.pairs.dropped) == 6
    with pytest.raises(DataError, match="6 of 96 rows"):
        stages.get_data(run)


def test_pairs_that_differ_only_in_what_is_cut_off_are_dropped(tmp_path):
    """Nothing is left to prefer; TRL trains on such a pair at loss 0.6931."""
    same = ASK + " word" * 40
    rows = [*CLEAN[:60], {"chosen": same + " good", "rejected": same + " bad"}]
    run = load_settings(
        "mini", dataset=write(tmp_path / "d.jsonl", rows), max_pairs=None, held_out_pairs=1, runs_dir=str(tmp_path),
        max_length=40, max_prompt_length=20,
    )  # fmt: skip
    findings = {f.index: f for f in stages.get_data(run).pairs.findings if f.action == "dropped"}
    assert findings[60].reason == "responses are identical in the tokens that fit into max_length 40"


def test_lines_that_are_no_json_are_rows_with_a_reason(tmp_path):
    lines = [json.dumps(row) for row in CLEAN[:100]]
    lines[7], lines[50], lines[60] = "{half", "[" * 100_000, '"text"'
    (tmp_path / "d.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    found = load_pairs(load_settings("mini", dataset=str(tmp_path / "d.jsonl"), max_pairs=None, held_out_pairs=10))
    assert {f.index: f.reason for f in found.findings} == {
        7: "line 8 of d.jsonl is no JSON (JSONDecodeError)",
        50: "line 51 of d.jsonl is no JSON (RecursionError)",
        60: "it is str, not an object with 'chosen' and 'rejected'",
        100: "line 101 of d.jsonl is no JSON (UnicodeDecodeError)",
    }


def test_an_array_that_is_nested_too_deep_is_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "d.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"d\.json cannot be read: maximum recursion depth"):
        load_pairs(load_settings("mini", dataset=str(tmp_path / "d.json")))


# --- no crash, no silent change of text -----------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8,
)  # fmt: skip
pieces = st.sampled_from(
    [hh.HUMAN, hh.ASSISTANT, "\n\n", " ", "\0", "\ud800", "<|endoftext|>", "Hi", "<b>", "\x1b[31m"]
)
dialogues = st.lists(pieces | st.text(max_size=8), max_size=8).map("".join)
rows = st.fixed_dictionaries({"chosen": dialogues, "rejected": dialogues}) | st.fixed_dictionaries(
    {}, optional={"chosen": json_values, "rejected": json_values, "other": json_values}
)
many = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(st.one_of(rows, json_values), st.integers(0, 10**6))
def test_any_row_is_a_pair_that_reproduces_it_or_a_finding_that_names_it(row, index):
    found = parse_row(row, index)
    assert found.index == index
    if isinstance(found, Pair):
        assert found.prompt + found.chosen == row["chosen"]
        assert found.prompt + found.rejected == row["rejected"]
        assert found.prompt.endswith(hh.ASSISTANT)
        assert found.chosen.strip()
        assert found.chosen != found.rejected
        asdict(found)["chosen"].encode()  # can be written
    else:
        assert isinstance(found, Finding)
        assert found.reason


@many
@given(st.lists(rows, min_size=1, max_size=6))
def test_every_row_is_kept_or_reported(found_rows):
    try:
        pairs, findings = parse_rows(found_rows, allow_dropped=True)
    except RowsError as error:
        pairs, findings = [], error.findings
    dropped = [f.index for f in findings if f.action == "dropped"]
    assert sorted([p.index for p in pairs] + dropped) == list(range(len(found_rows)))


def gpt2_tokenizer(folder):
    if not folder.is_dir():
        pytest.skip("GPT-2's own tokenizer is not beside this checkout (../shared/data/gpt2-tokenizer)")
    tokenizer = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.split_special_tokens = True  # as loading.load_tokenizer does
    return tokenizer


@pytest.fixture(scope="module", params=["embedded", "GPT-2's"])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "embedded" else gpt2_tokenizer(SHARED / "data/gpt2-tokenizer")


texts = st.lists(pieces.filter(lambda p: p != "\ud800") | st.text(st.characters(exclude_categories=["Cs"])), max_size=6)


@many
@given(prompt=texts.map("".join), response=texts.map("".join))
def test_ids_decode_to_the_text_and_never_hold_an_end_of_text_from_it(any_tokenizer, prompt, response):
    """A row that says "<|endoftext|>" must not end its response there."""
    pair = Pair(prompt, response, response + "!", 0)
    found = encode_pair(any_tokenizer, pair, max_length=10**6, max_prompt_length=10)
    any_tokenizer.backend_tokenizer.encode_special_tokens = False  # as in a tokenizer that was just loaded
    (batched,) = encode_pairs(any_tokenizer, [pair], max_length=10**6, max_prompt_length=10)
    assert batched == found
    eos = any_tokenizer.eos_token_id
    assert any_tokenizer.decode(found.prompt + found.chosen[:-1]) == prompt + response
    assert any_tokenizer.decode(found.rejected[:-1]) == response + "!"
    assert eos not in found.prompt
    assert found.chosen.index(eos) == len(found.chosen) - 1
    # the ids of the prompt are a prefix of those of prompt + response, whatever the boundary
    assert (found.prompt + found.chosen)[: len(found.prompt)] == encode_text(any_tokenizer, prompt)


def test_no_text_of_the_real_slice_changes(hh_slice, survived):
    tokenizer = gpt2_tokenizer(SHARED / "data/gpt2-tokenizer")
    with gzip.open(hh_slice, "rt", encoding="utf-8") as lines:
        real = [json.loads(line) for line in lines]
    pairs, findings = parse_rows(real)
    encoded = encode_pairs(tokenizer, pairs, max_length=10**6, max_prompt_length=10**5)
    same = sum(
        tokenizer.decode(ids.prompt + ids.chosen[:-1]) == real[pair.index]["chosen"]
        and tokenizer.decode(ids.prompt + ids.rejected[:-1]) == real[pair.index]["rejected"]
        for pair, ids in zip(pairs, encoded, strict=True)
    )
    survived("8 real HH-RLHF rows whose text comes back from its ids, both sides", same, 1538)
    assert len(findings) == 6


def test_a_saved_tokenizer_and_the_model_beside_it_open_as_before(tmp_path, tokenizer):
    """The safe reading of special tokens is a habit of this course, not a change to the tokenizer's files."""
    from dpo_helpers.run.loading import save_model

    save_model(load_model(load_settings("mini")), tokenizer, tmp_path)
    again = load_tokenizer(load_settings("mini", model=str(tmp_path)))
    assert again.encode("a<|endoftext|>b", add_special_tokens=False) == encode_text(tokenizer, "a<|endoftext|>b")
    assert "split_special_tokens" not in (tmp_path / "tokenizer_config.json").read_text()
