"""Artefacts are whole or absent, and damage is detected."""

import json
import math
import os
import random
import stat

import pytest
import torch
from safetensors.torch import save_file

from dpo_helpers.errors import ArtefactError
from dpo_helpers.run import disk
from dpo_helpers.run.checkpoints import Checkpoints
from dpo_helpers.run.disk import changed_keys, file_hash, load_manifest, set_aside, write_text, writing


def make(folder, text="hello", made_from=None):
    with writing(folder, made_from or {"beta": 0.5}) as draft:
        draft.about["note"] = 1
        (draft.folder / "a.txt").write_text(text)
        (draft.folder / "sub").mkdir()
        (draft.folder / "sub/b.bin").write_bytes(bytes(range(200)))


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


@pytest.mark.parametrize("name", ["a.txt", "sub/b.bin", "manifest.json", "manifest.sha256"])
def test_a_missing_file_is_named(tmp_path, name):
    make(tmp_path / "x")
    (tmp_path / "x" / name).unlink()
    with pytest.raises(ArtefactError, match=os.path.basename(name)):
        load_manifest(tmp_path / "x")


def test_an_error_while_writing_leaves_nothing(tmp_path):
    make(tmp_path / "x", "old")
    with pytest.raises(RuntimeError, match="boom"), writing(tmp_path / "x", {}) as draft:
        (draft.folder / "a.txt").write_text("half")
        raise RuntimeError("boom")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x/a.txt").read_text() == "old"


def test_a_full_disk_is_one_error_that_names_the_folder(tmp_path):
    with pytest.raises(ArtefactError, match=r"cannot write .*x: No space left on device"):
        with writing(tmp_path / "x", {}):
            raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("no number"), OSError(0, "not of the disk"), FileNotFoundError(2, "gone")])
def test_an_error_that_is_not_of_the_disk_is_not_called_a_full_one(tmp_path, error):
    with pytest.raises(ArtefactError, match=rf"making .*x failed: {type(error).__name__}: ") as caught:
        with writing(tmp_path / "x", {}):
            raise error
    assert "free space" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_is_laid_out_otherwise_still_opens(tmp_path):
    """An editor or a formatter changes indentation and the order of keys, at every level; the values say the same."""
    with writing(tmp_path / "x", {"beta": 0.5, "plan": {"epochs": 1, "rate": 1e-6}, "β": [1, 2]}) as draft:
        (draft.folder / "a.txt").write_text("hello")
        (draft.folder / "b.txt").write_text("")
    path = tmp_path / "x/manifest.json"
    manifest = json.loads(path.read_bytes())

    def turned(value):
        return {k: turned(v) for k, v in reversed(value.items())} if isinstance(value, dict) else value

    for text in (
        json.dumps(manifest), json.dumps(manifest, indent=4) + "\n\n", json.dumps(turned(manifest)),
        json.dumps(manifest, indent="\t", sort_keys=True, ensure_ascii=False).replace("\n", "\r\n"),
    ):  # fmt: skip
        assert text.encode() != path.read_bytes()
        path.write_bytes(text.encode())
        assert load_manifest(tmp_path / "x") == manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["made_from"].update(beta=0.1),
        lambda m: m["about"].update(note=2),
        lambda m: m["about"].update(more=None),
        lambda m: m["about"].pop("note"),
        lambda m: m["files"].pop("a.txt"),
        lambda m: m["files"].update({"a.txt": m["files"]["sub/b.bin"]}),
        lambda m: m.update(extra=1),
    ],
)  # fmt: skip
def test_a_manifest_with_another_value_does_not_open(tmp_path, change):
    make(tmp_path / "x")
    path = tmp_path / "x/manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest, indent=1))
    with pytest.raises(
        ArtefactError, match=r"manifest\.json is damaged: its content's sha256 is not that in manifest\."
    ):
        load_manifest(tmp_path / "x")


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
    assert changed_keys({"x": float("nan")}, {"x": float("nan")}) == [], "it is not another one at each call"
    assert changed_keys({"beta": 5.0, "betas": [1.0]}, {"beta": 5, "betas": (1,)}) == [], "the same training"


def test_what_a_killed_process_left_of_a_checkpoint_goes(tmp_path):
    halves = [tmp_path / f"dpo.unfinished/.step-{step:06d}-abcd1234" for step in (5, 50, 1250)]
    for half in halves:
        half.mkdir(parents=True)
    assert Checkpoints(tmp_path / "dpo", {}).newest() is None
    assert not any(half.exists() for half in halves)


def test_write_text_leaves_no_part(tmp_path):
    write_text(tmp_path / "r/report.html", "ä")
    assert (tmp_path / "r/report.html").read_text(encoding="utf-8") == "ä"
    assert len(list((tmp_path / "r").iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot write"):
        write_text(tmp_path / "file/report.html", "x")


def test_two_writers_of_one_file_do_not_touch_each_others_half(tmp_path, monkeypatch):
    """The second one begins and ends while the first is at its last step: two reports of one run."""
    path, real, writers = tmp_path / "generations.json", os.replace, ["second"]

    def replace(source, target):
        if writers:
            write_text(path, writers.pop())
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_text(path, "first")
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["generations.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("mask", "of_folder", "of_file"), [(0o002, 0o775, 0o664), (0o027, 0o750, 0o640)])
def test_what_is_written_is_open_to_whom_the_umask_says(tmp_path, mask, of_folder, of_file):
    before = os.umask(mask)
    try:
        with writing(tmp_path / "dpo", {}) as draft:
            save_file({"a": torch.zeros(1)}, draft.folder / "model.safetensors")
        write_text(tmp_path / "results.json", "{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "dpo").stat().st_mode) == of_folder
    for name in ("dpo/model.safetensors", "dpo/manifest.json", "results.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == of_file, name


def test_file_hash(tmp_path):
    (tmp_path / "e").write_bytes(b"")
    assert file_hash(tmp_path / "e") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def reads(monkeypatch):
    """The files that `file_hash` reads, in order; they count as settled, however new they are."""
    found, open_file = [], type(disk.Path()).open

    def counting(self, *arguments, **more):
        found.append(self.name)
        return open_file(self, *arguments, **more)

    monkeypatch.setattr(disk.Path, "open", counting)
    monkeypatch.setattr(disk, "SETTLED", -math.inf)
    monkeypatch.setattr(disk, "_HASHES", {})
    return found


HASHES = {
    "one": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed",
    "two": "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3",
}


def test_a_settled_file_is_read_once_and_again_after_a_change(tmp_path, reads):
    path = tmp_path / "weights"
    path.write_text("one")
    os.utime(path, (1e9, 1e9))
    reads.clear()
    assert [file_hash(path) for _ in range(3)] == [HASHES["one"]] * 3
    assert reads == ["weights"]
    path.write_text("two")
    os.utime(path, (1e9, 1e9))
    reads.clear()
    assert [file_hash(path) for _ in range(3)] == [HASHES["two"]] * 3
    assert reads == ["weights"], "of the same length and with the same date of its content, but changed"


def test_a_file_that_takes_its_place_is_read_too(tmp_path, reads):
    """Renamed over it, as every writer here does: the same name, length and date."""
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1e9, 1e9))
    assert file_hash(tmp_path / "one") == HASHES["one"]
    os.replace(tmp_path / "two", tmp_path / "one")
    assert file_hash(tmp_path / "one") == HASHES["two"]


def test_a_file_that_was_just_written_is_not_believed(tmp_path, reads, monkeypatch):
    """Two writings within one tick of the file system's clock leave the same dates: what was read between them is the
    first one's content, and must not be remembered until the file has settled."""
    path = tmp_path / "weights"
    path.write_text("one")
    found = path.stat()
    monkeypatch.setattr(disk.Path, "stat", lambda self, **more: found)
    monkeypatch.setattr(disk, "SETTLED", math.inf)
    assert [file_hash(path), file_hash(path)] == [HASHES["one"]] * 2
    path.write_text("two")
    monkeypatch.setattr(disk, "SETTLED", -math.inf)
    assert file_hash(path) == HASHES["two"]


def test_opening_an_artefact_again_reads_its_files_once(tmp_path, reads):
    make(tmp_path / "x")
    disk._HASHES.clear()
    reads.clear()
    for _ in range(5):
        assert load_manifest(tmp_path / "x")
    assert sorted(name for name in reads if name in ("a.txt", "b.bin")) == ["a.txt", "b.bin"]
