"""3 Corruption and 4 missing parts: every damage is found, the file named, and the good one before it used."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_gpt2
from dpo_helpers.errors import ArtefactError
from dpo_helpers.run import disk
from dpo_helpers.run.checkpoints import Checkpoints, TrainState
from dpo_helpers.run.disk import MANIFEST, SEAL, load_manifest, writing
from dpo_helpers.run.loading import save_model

FLIPS = 100


def state(step):
    generator = torch.Generator().manual_seed(step)
    weights = {f"h.{n}.weight": torch.randn(24, 24, generator=generator) for n in range(2)}
    moments = {f"{name}/square_avg": tensor**2 for name, tensor in weights.items()}
    return TrainState(step, weights, moments, [{"step": s, "loss": 1 / s} for s in range(1, step + 1)], 8, {})


@pytest.fixture
def unfinished(tmp_path):
    found = Checkpoints(tmp_path / "dpo", {"beta": 0.5, "plan": {"epochs": 1, "learning_rate": 1e-06}})
    for step in (10, 20):
        found.save(state(step))
    return found


@pytest.fixture
def artefact(tmp_path, tokenizer):
    """A model as a stage stores one: weights, configuration, tokenizer, metrics."""
    folder = tmp_path / "sft"
    with writing(folder, {"reference": "0" * 64, "rate": 1e-06}) as draft:
        draft.about.update(weights_sha256="1" * 64, seconds=1.5)
        save_model(tiny_gpt2(), tokenizer, draft.folder)
        (draft.folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.69}\n')
    return folder


def damages(raw, seed, flips=FLIPS):
    """(what, damaged bytes): random bit flips, truncations, zeroed bytes, nothing at all."""
    rng = random.Random(seed)
    for _ in range(flips):
        bad = bytearray(raw)
        bad[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        yield "bit", bytes(bad)
    for _ in range(10):
        yield "truncation", raw[: rng.randrange(len(raw))]
        start = rng.randrange(len(raw))
        zeroed = raw[:start] + bytes(min(8, len(raw) - start)) + raw[start + 8 :]
        if zeroed != raw:
            yield "zeros", zeroed
    yield "empty", b""
    yield "longer", raw + b"\0"


def meaning(text):
    """What a JSON text says, however it is laid out; None where it is none."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return None


def is_harmless(name, raw, bad):
    """Whether another manifest says the same, such as 1E-06 for 1e-06: all other changed bytes are damage."""
    return name == MANIFEST and meaning(bad) == meaning(raw)


def names(folder, name, message):
    """Whether a message names a damaged file. Of a manifest and its hash it cannot tell which one is: it names both."""
    if str(name) == SEAL and f"{folder / MANIFEST} is damaged: " in message:
        return message.split("; ")[0].endswith(f" is not that in {SEAL}")
    return str(folder / name) in message


def is_named(folder, name):
    with pytest.raises(ArtefactError) as caught:
        load_manifest(folder)
    return names(folder, name, str(caught.value))


def count_found(folder, is_long):
    found = tried = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        raw = path.read_bytes()
        for _, bad in damages(raw, path.name, 10 * FLIPS if is_long else FLIPS):
            path.write_bytes(bad)
            if is_harmless(path.name, raw, bad):
                assert load_manifest(folder) == json.loads(raw)
                continue
            tried += 1
            found += is_named(folder, path.relative_to(folder))
        path.write_bytes(raw)
    assert load_manifest(folder), "undamaged again"
    return found, tried


def test_every_damage_to_a_checkpoint_is_found_and_named(unfinished, survived, is_long):
    found, tried = count_found(unfinished.folder / "step-000020", is_long)
    survived("3 damages to the 5 files of a checkpoint found and named", found, tried)


def test_every_damage_to_a_stored_model_is_found_and_named(artefact, survived, is_long):
    found, tried = count_found(artefact, is_long)
    files = sum(p.is_file() for p in artefact.rglob("*"))
    survived(f"3 damages to the {files} files of a stored model found and named", found, tried)


@pytest.mark.parametrize("letter", [b"e", b"E"])
def test_another_way_to_write_the_same_number_is_no_damage_and_another_number_is(artefact, letter):
    """One bit lies between 1e-06 and 1E-06, and one between 1e-06 and 1e-07."""
    path = artefact / MANIFEST
    raw = path.read_bytes()
    assert raw.count(b"1e-06") == 1
    path.write_bytes(raw.replace(b"1e-06", b"1" + letter + b"-06"))
    assert load_manifest(artefact) == json.loads(raw)
    path.write_bytes(raw.replace(b"1e-06", b"1" + letter + b"-07"))
    assert is_named(artefact, MANIFEST)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "metrics.jsonl", MANIFEST, SEAL])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(unfinished, name, capsys, survived):
    newest = unfinished.folder / "step-000020"
    raw, good, used, tried = (newest / name).read_bytes(), state(10), 0, 0
    for _, bad in [*list(damages(raw, 0))[:5], *list(damages(raw, 0))[FLIPS:]]:
        if is_harmless(name, raw, bad):
            continue
        (newest / name).write_bytes(bad)
        found, tried = unfinished.newest(), tried + 1
        said = capsys.readouterr().out
        used += (
            found.step == 10
            and names(newest, name, said)
            and "the checkpoint before it is used" in said
            and all(torch.equal(found.weights[key], good.weights[key]) for key in good.weights)
        )
    survived(f"3 damages to {name} after which the checkpoint before it was used", used, tried)


def test_a_flipped_bit_loads_silently_without_the_manifest(unfinished):
    """What the hash is for: safetensors itself notices nothing."""
    path = unfinished.folder / "step-000020/weights.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    tensors, good = load_file(path), state(20).weights
    assert tensors.keys() == good.keys()
    assert sum(not torch.equal(tensors[key], good[key]) for key in good) == 1


def test_each_missing_file_of_a_checkpoint_is_named_and_the_one_before_it_used(unfinished, capsys, survived):
    newest, good = unfinished.folder / "step-000020", 0
    files = sorted(p.name for p in newest.iterdir())
    for name in files:
        shutil.move(newest / name, unfinished.folder / "away")
        assert is_named(newest, name)
        good += unfinished.newest().step == 10 and f"{newest / name} is missing" in capsys.readouterr().out
        shutil.move(unfinished.folder / "away", newest / name)
    survived("4 missing files of a checkpoint named, the one before it used", good, len(files))


def test_each_missing_file_of_a_stored_model_is_named(artefact, survived):
    files = sorted(p.relative_to(artefact) for p in artefact.rglob("*") if p.is_file())
    good = 0
    for name in files:
        shutil.move(artefact / name, artefact.parent / "away")
        good += is_named(artefact, name)
        shutil.move(artefact.parent / "away", artefact / name)
    survived("4 missing files of a stored model named", good, len(files))


def test_with_no_whole_checkpoint_it_begins_again_and_keeps_what_is_left(unfinished, capsys):
    for step in (10, 20):
        (unfinished.folder / f"step-{step:06d}/weights.safetensors").unlink()
    assert unfinished.newest() is None
    assert (
        "no checkpoint in dpo.unfinished is whole: it begins again, dpo.unfinished.old-1 keeps"
        in capsys.readouterr().out
    )
    assert (unfinished.folder.parent / "dpo.unfinished.old-1/step-000020/optimizer.safetensors").is_file()


def test_only_the_two_newest_are_kept_and_the_older_ones_go_only_then(unfinished):
    unfinished.save(state(30))
    assert unfinished.steps() == [20, 30]


def test_saving_beside_a_damaged_newer_one_keeps_the_good_one_before(unfinished):
    """Gone on from 10 because 20 is damaged, and stopped at 15."""
    (unfinished.folder / "step-000020/weights.safetensors").write_bytes(b"")
    unfinished.save(state(15))
    assert unfinished.steps() == [10, 15, 20]
    assert unfinished.newest().step == 15


def test_a_disk_that_cannot_read_the_newest_checkpoint(unfinished, monkeypatch, capsys):
    real = disk.file_hash

    def failing(path):
        if "step-000020" in str(path):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(disk, "file_hash", failing)
    assert unfinished.newest().step == 10
    assert "cannot be read ([Errno 5] Input/output error); the checkpoint before it is used" in capsys.readouterr().out


def test_discarding_leaves_the_log_of_a_training_without_a_checkpoint(tmp_path):
    """Another process, or a failed run whose NaN is in the log, may be all there is."""
    other = Checkpoints(tmp_path / "dpo", {"beta": 1.0})
    other.begin_log([{"step": 1, "loss": float("nan")}])
    Checkpoints(tmp_path / "dpo", {"beta": 0.5}).discard()
    assert (other.folder / "metrics.jsonl").is_file()
