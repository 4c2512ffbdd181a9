"""The Hub path, end to end: from_pretrained and load_dataset at pinned commits, against a server on this machine."""

import json
import os
import subprocess
import sys
import threading

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


def run(tmp_path, script=SCRIPT, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DPO_"))}
    env |= {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
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
    """One flipped bit in the cached weights, a cached table that is cut short: each named, not loaded."""
    (blob,) = [p for p in (tmp_path / "home/hub").rglob("blobs/*") if len(p.name) == 64]
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)
    result = run(tmp_path, LOADED, HF_HUB_OFFLINE="1")
    assert f"ModelError: {blob} in the Hub's cache is damaged" in result.stderr
    assert "delete it and run this again" in result.stderr
    (table, *_) = (tmp_path / "home/datasets").rglob("*train.arrow")
    table.write_bytes(table.read_bytes()[:400])
    result = run(tmp_path, HF_HUB_OFFLINE="1")
    assert "DataError: cannot get data set 'Anthropic/hh-rlhf' from the Hub or its cache" in result.stderr
    assert "delete a damaged cache (HF_DATASETS_CACHE)" in result.stderr


@pytest.mark.slow
def test_a_model_without_a_commit_is_looked_up_once_and_the_commit_is_known(tmp_path, hub):
    result = run(tmp_path, LOOKED_UP, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-1] == GPT2_REVISION
    assert hub.RequestHandlerClass.log.count("GET /api/models/openai-community/gpt2") == 1
