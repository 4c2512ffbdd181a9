"""Artefacts are whole or absent, and damage is detected."""

import json
import os
import random

import pytest

from dpo_helpers.checkpoints import changed_keys, file_hash, load_manifest, set_aside, write_text, writing
from dpo_helpers.errors import ArtefactError


def make(folder, text="hello", made_from=None):
    with writing(folder, made_from or {"beta": 0.5}, {"note": 1}) as temporary:
        (temporary / "a.txt").write_text(text)
        (temporary / "sub").mkdir()
        (temporary / "sub/b.bin").write_bytes(bytes(range(200)))


def test_manifest_holds_what_was_written(tmp_path):
    make(tmp_path / "x")
    manifest = load_manifest(tmp_path / "x")
    # sha256 of "hello", a published value
    assert manifest["files"]["a.txt"] == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert set(manifest["files"]) == {"a.txt", "sub/b.bin"}
    assert (manifest["made_from"], manifest["about"]) == ({"beta": 0.5}, {"note": 1})


def test_no_artefact_is_none(tmp_path):
    assert load_manifest(tmp_path / "none") is None


def test_every_flipped_bit_is_detected(tmp_path):
    make(tmp_path / "x")
    rng = random.Random(0)
    for name in ("a.txt", "sub/b.bin"):
        path = tmp_path / "x" / name
        good = path.read_bytes()
        for _ in range(100):
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(ArtefactError, match=rf"{os.path.basename(name)} is damaged"):
                load_manifest(tmp_path / "x")
        path.write_bytes(good)
    assert load_manifest(tmp_path / "x")


@pytest.mark.parametrize("name", ["a.txt", "sub/b.bin", "manifest.json"])
def test_a_missing_file_is_named(tmp_path, name):
    make(tmp_path / "x")
    (tmp_path / "x" / name).unlink()
    with pytest.raises(ArtefactError, match=os.path.basename(name)):
        load_manifest(tmp_path / "x")


def test_an_error_while_writing_leaves_nothing(tmp_path):
    make(tmp_path / "x", "old")
    with pytest.raises(RuntimeError, match="boom"), writing(tmp_path / "x", {}, {}) as temporary:
        (temporary / "a.txt").write_text("half")
        raise RuntimeError("boom")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x/a.txt").read_text() == "old"


def test_a_full_disk_is_one_error_that_names_the_folder(tmp_path):
    with pytest.raises(ArtefactError, match=r"cannot write .*x: No space left on device"):
        with writing(tmp_path / "x", {}, {}):
            raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_the_earlier_artefact_is_kept(tmp_path):
    for text in ("one", "two", "three"):
        make(tmp_path / "x", text)
    assert (tmp_path / "x/a.txt").read_text() == "three"
    assert {p.name: (p / "a.txt").read_text() for p in tmp_path.glob("x.old-*")} == {"x.old-1": "one", "x.old-2": "two"}
    set_aside(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_changed_keys_lists_exactly_what_differs():
    old = json.loads(json.dumps({"beta": 0.5, "plan": {"a": 1}, "gone": 1}))
    assert changed_keys(old, {"beta": 1.0, "plan": {"a": 1}, "new": (1, 2)}) == [
        "beta: 0.5 → 1.0", "gone: 1 → None", "new: None → [1, 2]",
    ]  # fmt: skip


def test_write_text_leaves_no_part(tmp_path):
    write_text(tmp_path / "r/report.html", "ä")
    assert (tmp_path / "r/report.html").read_text(encoding="utf-8") == "ä"
    assert len(list((tmp_path / "r").iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot write"):
        write_text(tmp_path / "file/report.html", "x")


def test_file_hash(tmp_path):
    (tmp_path / "e").write_bytes(b"")
    assert file_hash(tmp_path / "e") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
