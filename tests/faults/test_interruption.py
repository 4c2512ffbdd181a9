"""Ctrl-C, SIGTERM, an interrupted cell, two processes at once, notebooks out of order: nothing lost, nothing mixed up."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager
from pressing import ctrl_c_in_update
from test_cli import small_options
from test_training import pairs, run, sft

from conftest import ROOT, SMALL
from dpo_helpers.errors import ArtefactError
from dpo_helpers.run import disk, stages, trained
from dpo_helpers.run.checkpoints import Checkpoints
from dpo_helpers.run.disk import holding, start_over, writing
from dpo_helpers.run.signals import Interrupted, finishing_first
from dpo_helpers.run.watch import RunWatch
from dpo_helpers.settings import load_settings

LONGER = {**SMALL, "max_pairs": 48, "epochs": 3, "batch_size": 4}  # 36 updates: time enough to press Ctrl-C


def environment():
    env = {k: v for k, v in os.environ.items() if not k.startswith("DPO_")}
    return env | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def options(folder):
    longer = {"--max-pairs": "48", "--epochs": "3", "--batch-size": "4", "--runs-dir": str(folder)}
    return [*small_options(), *(part for pair in longer.items() for part in pair)]


def wait_for_updates(run_dir, count=3, process=None, seconds=120):
    log, started = run_dir / "dpo.unfinished/metrics.jsonl", time.monotonic()
    while time.monotonic() - started < seconds:
        assert process is None or process.poll() is None, "it ended before it was interrupted"
        if log.is_file() and log.read_text().count('"train"') >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} updates within {seconds} s")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same training, never interrupted: hash of the weights, losses."""
    settings = load_settings("mini", runs_dir=str(tmp_path_factory.mktemp("whole")), **LONGER)
    code = f"import torch; torch.set_num_threads(1)\nfrom dpo_helpers import settings; from dpo_helpers.run import stages\n{asking(settings)}"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()[-1]


def asking(settings):
    """Source of a cell that trains and prints the hash of the weights."""
    values = {name: getattr(settings, name) for name in (*LONGER, "runs_dir")}
    return f"stage = stages.get_dpo(settings.load_settings('mini', **{values!r}))\nprint(stage.weights_sha256)"


@pytest.mark.slow(30)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_update_saves_and_says_how_to_go_on(tmp_path, whole, survived, number, status):
    command = [sys.executable, "-m", "dpo_helpers", "dpo", *options(tmp_path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_updates(tmp_path / "mini", process=process)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == status, said
    assert "finishing this update, then saving; once more stops at once" in said
    assert "dpo: interrupted after update " in said
    assert "of 36, saved in" in said
    assert "run the same again to go on" in said
    assert "Traceback" not in said
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "dpo.unfinished: goes on after update" in again.stdout
    manifest = json.loads((tmp_path / "mini/dpo/manifest.json").read_text())
    same = manifest["about"]["weights_sha256"] == whole
    survived(f"interrupted by {signal.Signals(number).name}, went on to the same model", int(same), 1)


@pytest.mark.slow
def test_an_interrupted_cell_can_be_run_again(tmp_path, whole, survived):
    """A real kernel, interrupted as JupyterLab's stop button does it."""
    settings = load_settings("mini", runs_dir=str(tmp_path), **LONGER)
    manager = KernelManager()
    manager.start_kernel(env=environment())
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        client.execute_interactive(
            "from dpo_helpers import settings; from dpo_helpers.run import stages",
            timeout=120,
            output_hook=lambda m: None,
        )
        cell = client.execute(asking(settings))
        wait_for_updates(tmp_path / "mini")
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=120)
        while reply["parent_header"].get("msg_id") != cell:
            reply = client.get_shell_msg(timeout=120)
        assert reply["content"]["status"] == "error"
        assert reply["content"]["ename"] == "Interrupted"
        assert "run the same again to go on" in reply["content"]["evalue"]
        time.sleep(1)  # the kernel drops what is asked of it right after an error
        printed = []
        hook = lambda m: printed.append(m["content"].get("text", ""))  # noqa: E731
        again = client.execute_interactive(asking(settings), timeout=300, output_hook=hook)
        assert again["content"]["status"] == "ok", again["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    survived("interrupted cell run again, the same model", int("".join(printed).split()[-1] == whole), 1)


def test_a_second_signal_stops_at_once_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped at once"), finishing_first() as asked:
        assert asked() == 0
        signal.raise_signal(signal.SIGTERM)
        assert asked() == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_while_the_last_checkpoint_is_written_is_not_swallowed(cpu, tmp_path, monkeypatch):
    real = Checkpoints.save

    def saving(self, state):
        if state.step == 6:
            signal.raise_signal(signal.SIGTERM)
        real(self, state)

    monkeypatch.setattr(Checkpoints, "save", saving)
    with pytest.raises(Interrupted, match="x: interrupted after update 6 of 6") as caught, finishing_first() as asked:
        run(cpu, sft(pairs()), watch=RunWatch("x", Checkpoints(tmp_path / "x", {}), asked))
    assert caught.value.signal == signal.SIGTERM


def test_an_out_of_memory_training_may_go_on_in_smaller_parts(small):
    """As the message to several processes advises; the half training must not be refused for it."""
    with ctrl_c_in_update(2), pytest.raises(Interrupted):
        stages.get_dpo(small)
    stage = stages.get_dpo(replace(small, micro_batch_size=2))
    assert [row["step"] for row in stage.metrics if row["split"] == "train"] == [1, 2, 3]


def test_outside_the_main_thread_signals_are_left_alone():
    import threading

    seen = []

    def inside():
        with finishing_first() as asked:
            seen.append((asked(), signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


def test_interrupted_passes_what_catches_exceptions():
    assert not issubclass(Interrupted, Exception)


HOLD = """
import sys, time
from pathlib import Path
from dpo_helpers.run.disk import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(small):
    """Another process that is making dpo/."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(small.run_dir / "dpo")], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_says_who_holds_it(small, holder, monkeypatch, survived):
    monkeypatch.setattr(disk, "WAIT_SECONDS", 0.1)
    with pytest.raises(ArtefactError) as caught:
        stages.get_dpo(small)
    said = str(caught.value)
    named = f"mini/dpo is being made by process {holder.pid} on " in said and "(-c " in said and ", since 20" in said
    survived("second process told who holds the run", int(named and "wait until it is done" in said), 1)
    assert {p.name for p in small.run_dir.iterdir() if p.name[0] != "."} == {"data", "reference"}, "the rest was made"


def test_a_second_process_does_not_take_the_inputs_of_a_training_away(small, holder, monkeypatch, capsys):
    """Another length makes data and reference again, while dpo/ is being trained on them."""
    monkeypatch.setattr(disk, "WAIT_SECONDS", 0.1)
    before = stages.get_data(small).sha256, stages.get_base(small).weights_sha256
    other = replace(small, max_length=64, max_prompt_length=32)
    with pytest.raises(
        ArtefactError, match=f"mini/dpo is being made by process {holder.pid} on .*: wait until it is done"
    ):
        stages.get_base(other)
    assert {p.name for p in small.run_dir.iterdir() if p.name[0] != "."} == {"data", "reference"}, "nothing set aside"
    assert (stages.get_data(small).sha256, stages.get_base(small).weights_sha256) == before
    holder.kill()
    holder.wait()
    assert stages.get_base(other).manifest["made_from"]["max_length"] == 64
    assert (small.run_dir / "reference.old-1").is_dir()
    assert capsys.readouterr().out.count("data: made again") == 1, "it is not said of what was not done"


def test_a_killed_holder_holds_nothing(small, holder, monkeypatch):
    monkeypatch.setattr(disk, "WAIT_SECONDS", 0.1)
    holder.kill()
    holder.wait()
    half = small.run_dir / ".dpo-abcd1234"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    stages.get_dpo(small)
    assert not half.exists(), "what a killed process left half-written is removed"


def test_fresh_moves_the_run_aside_whole_and_not_while_it_is_held(small, holder, monkeypatch, capsys):
    monkeypatch.setattr(disk, "WAIT_SECONDS", 0.1)
    made = stages.get_data(small).sha256
    with pytest.raises(ArtefactError, match=f"process {holder.pid}"):
        start_over(small.run_dir)
    holder.kill()
    holder.wait()
    monkeypatch.setattr(trained, "_FAST", {})
    stages.get_base(small)
    assert (small.run_dir / disk.FROZEN).is_dir()
    start_over(small.run_dir)
    assert not small.run_dir.exists()
    aside = small.run_dir.with_name("mini.old-1")
    assert f"{small.run_dir} is moved aside to {aside}" in capsys.readouterr().out
    assert (aside / "data/train.jsonl").is_file()
    assert not (aside / disk.FROZEN).exists(), "gigabytes that nothing reads any more"
    assert stages.get_data(small).sha256 == made
    start_over(small.run_dir.with_name("none"))


def test_a_run_directory_that_cannot_be_written_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    for what in (lambda: holding(tmp_path / "file/dpo"), lambda: writing(tmp_path / "file/dpo", {})):
        with pytest.raises(
            ArtefactError, match=r"cannot write .*file/dpo: (Not a directory|File exists); free space or use another"
        ):
            with what():
                pass


@pytest.mark.slow(60)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the notebooks run in forks of one process")
def test_notebooks_out_of_order_and_twice_give_the_same_results(tmp_path, survived, is_long):
    names = "01 02 03 04 05 06 07" if is_long else "03 05"
    worker = Path(__file__).with_name("order_worker.py")
    command = [sys.executable, str(worker), str(tmp_path), names]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    forward, backward, twice = found["forward"], found["backward"], found["twice"]
    assert {"data", "reference", "sft", "dpo"} <= set(forward)
    same = sum(forward[name] == backward.get(name) == twice.get(name) for name in forward)
    survived("artefacts equal after notebooks in order, backwards, and twice", same, len(forward))
    assert found["made_again"] == [], "the second time nothing is made"
