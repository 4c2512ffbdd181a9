"""The Hub path, end to end: from_pretrained and load_dataset at pinned commits, against a server on this machine."""

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import start

from conftest import ROOT, tiny_gpt2
from dpo_helpers.run.loading import save_model
from dpo_helpers.settings import GPT2_REVISION, HH_REVISION
from dpo_helpers.worlds.embedded import preference_rows

SCRIPT = """
import json, sys
from dpo_helpers.settings import load_settings
from dpo_helpers.models import weights_hash
from dpo_helpers.run.loading import load_model, load_tokenizer
from dpo_helpers.run.pairs import load_pairs
settings = load_settings("gpt2", max_pairs=20, held_out_pairs=8)
data = load_pairs(settings)
print(json.dumps({"weights": weights_hash(load_model(settings)), "tokens": len(load_tokenizer(settings)),
                  "train": len(data.train), "held_out": len(data.held_out), "source": data.source}))
"""


LOOKED_UP = """
from dpo_helpers.settings import load_settings
from dpo_helpers.run.loading import load_model
from dpo_helpers.run.sources import source_of
settings = load_settings("gpt2", model="openai-community/gpt2", model_revision=None)
load_model(settings)
print(source_of(settings, "model").commit())
"""


LOADED = """
from dpo_helpers.settings import load_settings
from dpo_helpers.run.loading import load_model
load_model(load_settings("gpt2"))
"""


@pytest.fixture
def hub(tmp_path, tokenizer):
    save_model(tiny_gpt2(), tokenizer, tmp_path / "model")
    (tmp_path / "data").mkdir()
    for part, split, n in (("train", "train", 40), ("test", "test", 12)):
        rows = preference_rows(split, n)
        (tmp_path / f"data/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = start({
        ("models", "openai-community/gpt2"): (GPT2_REVISION, tmp_path / "model"),
        ("datasets", "Anthropic/hh-rlhf"): (HH_REVISION, tmp_path / "data"),
    })  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run(tmp_path, script=SCRIPT, *arguments, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DPO_"))}
    env |= {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_the_gpt2_profile_against_a_local_endpoint_then_offline_from_the_cache(tmp_path, hub):
    from dpo_helpers.models import weights_hash

    result = run(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert result.returncode == 0, result.stderr[-2000:]
    got = json.loads(result.stdout.splitlines()[-1])
    assert got["weights"] == weights_hash(tiny_gpt2())
    assert (got["train"], got["held_out"]) == (20, 8)
    assert got["source"] == f"Anthropic/hh-rlhf@{HH_REVISION}"
    downloads = [line for line in hub.RequestHandlerClass.log if "/resolve/" in line]
    assert downloads
    assert all(f"/resolve/{GPT2_REVISION}/" in line or f"/resolve/{HH_REVISION}/" in line for line in downloads)

    hub.shutdown()
    offline = run(tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr[-2000:]
    assert json.loads(offline.stdout.splitlines()[-1]) == got
    check_damaged_caches(tmp_path)


def check_damaged_caches(tmp_path):
    """One flipped bit in the cached weights, one in the cached rows: each named, not loaded."""
    blobs = list((tmp_path / "home/hub").rglob("blobs/*"))
    (weights,) = [blob for blob in blobs if len(blob.name) == 64]
    (rows,) = [blob for blob in blobs if blob.read_bytes() == (tmp_path / "data/test.jsonl").read_bytes()]
    for blob, script, kind in ((weights, LOADED, "ModelError"), (rows, SCRIPT, "DataError")):
        whole = blob.read_bytes()
        blob.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        result = run(tmp_path, script, HF_HUB_OFFLINE="1")
        assert f"{kind}: {blob} in the Hub's cache is damaged" in result.stderr
        assert "delete it and run this again" in result.stderr
        blob.write_bytes(whole)


@pytest.mark.slow(20)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train.jsonl", "DataError"), ("test.jsonl", "DataError"), ("more.jsonl.gz", "DataError"),
        ("model.safetensors", "ModelError"), ("tokenizer.json", "ModelError"),
    ],
)  # fmt: skip
def test_a_flipped_bit_in_a_first_download_is_found_and_a_second_one_that_is_whole_is_used(tmp_path, hub, name, kind):
    """The Hub's cache takes what comes, and names it by the hash of what should have come."""
    lines = (tmp_path / "data/train.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "data/train.jsonl").write_bytes(b"".join(lines[:30]))
    (tmp_path / "data/train").mkdir()
    (tmp_path / "data/train/more.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[30:])))
    hub.RequestHandlerClass.damaged = {name}
    address = f"http://127.0.0.1:{hub.server_port}"
    result = run(tmp_path, HF_ENDPOINT=address)
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(rf".*{kind}: .*blobs/\S+ in the Hub's cache is damaged .* delete it and run this again", last)
    hub.RequestHandlerClass.damaged = set()
    Path(re.search(r": (\S+) in the Hub's", last)[1]).unlink()
    result = run(tmp_path, HF_ENDPOINT=address)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1])["held_out"] == 8


ROWS = """
from dpo_helpers.errors import CourseError
from dpo_helpers.run.pairs import load_pairs
from dpo_helpers.settings import load_settings
try:
    found = load_pairs(load_settings("gpt2", held_out_pairs=100))
    print(sorted(p.prompt for p in found.train), sorted(p.prompt for p in found.held_out), sep=chr(10))
except CourseError as error:
    print(f"{type(error).__name__}: {error}")
"""
CARDS = {
    "no card": None,
    "a card without metadata": "# Preferences",
    "a card with one data set": "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [train.jsonl]\n"
    "  - split: test\n    path: [dev.jsonl, test.jsonl]\n---\n",
    "a card with other names": "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_prefs\n    path: [train.jsonl]\n"
    "  - split: dev_prefs\n    path: [dev.jsonl]\n  - split: test_prefs\n    path: [test.jsonl]\n  - split: train_sft\n    path: [other.jsonl]\n---\n",
    "a card with two": "---\nconfigs:\n- config_name: helpful\n- config_name: harmless\n---\n",
    "no card's metadata": "---\n[: {\n---\n",
}


@pytest.mark.slow(20)
@pytest.mark.parametrize("card", CARDS)
def test_a_data_set_of_the_hub_is_read_as_a_folder_of_one_data_set(tmp_path, hub, card):
    """What is named as held out is, and no prompt of it is in training; two data sets are not mixed into one."""

    def row(n, more=""):
        return json.dumps({s: f"\n\nHuman: {n}\n\nAssistant: {s}{more}" for s in ("chosen", "rejected")}) + "\n"

    for old in (tmp_path / "data").iterdir():
        old.unlink()
    for name, numbers in (("train.jsonl", "abcde"), ("dev.jsonl", "xy"), ("test.jsonl", "zc"), ("other.jsonl", "o")):
        (tmp_path / "data" / name).write_text("".join(row(n, name) for n in numbers))
    if CARDS[card]:
        (tmp_path / "data/README.md").write_text(CARDS[card])
    result = run(tmp_path, ROWS, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert result.returncode == 0, result.stderr[-2000:]
    *said, last = result.stdout.splitlines()
    if card in ("a card with two", "no card's metadata"):
        assert re.match(
            r"DataError: cannot read data set 'Anthropic/hh-rlhf' \(.+\); give --dataset a folder with", last
        )
    elif card in ("a card with one data set", "a card with other names"):  # which map files to splits by themselves
        names = ("train", "test") if card == "a card with one data set" else ("train_prefs", "dev_prefs, test_prefs")
        ignored = "none" if card == "a card with one data set" else "train_sft"
        splits = f"train: {names[0]}; held out: {names[1]}; ignored: {ignored}"
        assert said[-2] == f"splits of Anthropic/hh-rlhf: {splits}"
        assert said[-1] == str([f"\n\nHuman: {n}\n\nAssistant:" for n in "abde"])
        assert last == str([f"\n\nHuman: {n}\n\nAssistant:" for n in "cxyz"])
    else:
        ignored = "README.md, other.jsonl" if CARDS[card] else "other.jsonl"
        assert said == [
            f"files of Anthropic/hh-rlhf: train: train.jsonl; held out: dev.jsonl, test.jsonl; ignored: {ignored}",
            str([f"\n\nHuman: {n}\n\nAssistant:" for n in "abde"]),
        ]
        assert last == str([f"\n\nHuman: {n}\n\nAssistant:" for n in "cxyz"])


IMPATIENT = """
import sys
from dpo_helpers.run import sources
from dpo_helpers.run.loading import load_model, load_tokenizer
from dpo_helpers.run.pairs import load_pairs
from dpo_helpers.settings import load_settings
sources.SILENCE, sources.PATIENCE = 1.0, 0.2
what, revision = sys.argv[1:]
changed = {"dataset": "a/b", "model": "a/b"} if revision == "newest" else {}
try:
    {"data": load_pairs, "model": load_model, "tokenizer": load_tokenizer}[what](load_settings("gpt2", **changed))
except sources.CourseError as error:
    print(f"{type(error).__name__}: {error}")
"""


def impatient(tmp_path, port, what, revision):
    result = run(tmp_path, IMPATIENT, what, revision, HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert not result.stderr
    waiting, error = result.stdout.splitlines()
    thing = "dataset" if what == "data" else "model"
    name = "a/b" if revision == "newest" else "Anthropic/hh-rlhf" if what == "data" else "openai-community/gpt2"
    assert waiting == f"waiting for the Hub: {thing} {name}; it is given up when nothing comes for 1 seconds"
    return error


@pytest.mark.slow(30)
@pytest.mark.parametrize("what", ["data", "model", "tokenizer"])
def test_a_hub_that_takes_the_connection_and_never_answers_is_given_up(tmp_path, what):
    """One line while it is waited for, one at the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system takes the connection
        port = server.getsockname()[1]
        name = "data set 'Anthropic/hh-rlhf'" if what == "data" else "model 'openai-community/gpt2'"
        assert f"cannot get {name} from the Hub or its cache (it sent nothing for 1 seconds); check --" in impatient(
            tmp_path, port, what, "pinned"
        )
        if what != "tokenizer":
            thing = "dataset" if what == "data" else "model"
            assert re.match(
                rf"CourseError: cannot look up {thing} 'a/b' on the Hub \((it sent nothing for 1 seconds|.*timed out)\); check",
                impatient(tmp_path, port, what, "newest"),
            )


@pytest.mark.slow(30)
@pytest.mark.parametrize("stalls", ["/resolve/", "body:/resolve/"])
@pytest.mark.parametrize("what", ["data", "model"])
def test_a_hub_that_falls_silent_later_is_given_up_too(tmp_path, hub, what, stalls):
    """At the files, or in the middle of one."""
    hub.RequestHandlerClass.stalls = stalls
    assert "(it sent nothing for 1 seconds)" in impatient(tmp_path, hub.server_port, what, "pinned")


BUSY = """
import sys, time
from huggingface_hub.utils import http_backoff
from dpo_helpers.run.sources import _asking
started = time.monotonic()
try:
    with _asking("model", "a/b"):
        http_backoff("GET", sys.argv[1], max_retries=1, base_wait_time=0.1).raise_for_status()
except Exception as error:
    print("429" in str(error), time.monotonic() - started < 20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("header", [{"Retry-After": "40"}, {"RateLimit": '"api";r=0;t=40'}])
def test_a_hub_that_asks_to_wait_is_not_waited_for(tmp_path, hub, header):
    """40 seconds here, an hour as well: the library sleeps as long as it is told."""
    hub.RequestHandlerClass.later = header
    result = run(tmp_path, BUSY, f"http://127.0.0.1:{hub.server_port}/api/models/a/b")
    assert result.stdout.split("\n")[-2] == "True True", result.stderr[-2000:]


@pytest.mark.slow
def test_a_model_without_a_commit_is_looked_up_once_and_the_commit_is_known(tmp_path, hub):
    result = run(tmp_path, LOOKED_UP, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-1] == GPT2_REVISION
    assert hub.RequestHandlerClass.log.count("GET /api/models/openai-community/gpt2") == 1
