"""The command line as a user meets it, with good input and bad."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import ROOT, SMALL
from dpo_helpers.cli import app
from dpo_helpers.run import stages
from dpo_helpers.settings import Settings
from dpo_helpers.worlds.embedded import preference_rows


def run(*arguments, cwd=None, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("DPO_")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment}
    return subprocess.run(
        [sys.executable, "-m", "dpo_helpers", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def small_options():
    options = []
    for name, value in SMALL.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        options += [f"--{name.replace('_', '-')}", text]
    return options


@pytest.mark.slow
def test_all_on_a_small_run(tmp_path):
    result = run("all", *small_options(), "--runs-dir", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "24 training and 12 held-out pairs" in result.stdout
    for made in ("results.json", "report.html", "generations.json", "dpo_gpt2_model_final/model.safetensors"):
        assert (tmp_path / "mini" / made).is_file(), made
    assert {p.name for p in tmp_path.iterdir()} == {"mini"}


def test_fresh_moves_the_earlier_run_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_PROFILE", "mini")
    command = ["data", "--max-pairs", "16", "--held-out-pairs", "8", "--runs-dir", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 0
    before = (tmp_path / "mini/data/manifest.json").stat().st_mtime_ns
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (tmp_path / "mini/data/manifest.json").stat().st_mtime_ns == before, "used again"
    result = CliRunner().invoke(app, [*command, "--fresh"])
    assert result.exit_code == 0
    assert f"{tmp_path / 'mini'} is moved aside to {tmp_path / 'mini.old-1'}" in result.stdout
    assert (tmp_path / "mini.old-1/data/manifest.json").stat().st_mtime_ns == before
    assert (tmp_path / "mini/data/manifest.json").is_file()


def test_versions_lists_what_is_installed():
    result = CliRunner().invoke(app, ["versions"])
    assert result.exit_code == 0
    assert re.search(r"^transformers +5\.\S+ +wanted >=5\.5$", result.stdout, re.M)


def test_version_is_one_line_with_what_decides_the_numbers():
    result = CliRunner().invoke(app, ["--version"])
    names = ("dpo-helpers", "torch", "transformers", "datasets")
    assert (result.exit_code, result.stdout) == (0, ", ".join(f"{name} {version(name)}" for name in names) + "\n")


def test_version_where_the_course_is_not_installed_is_one_line_and_status_2(monkeypatch):
    monkeypatch.setattr("dpo_helpers.tools.versions.requires", lambda _: version("no-such-package"))
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 2
    assert re.fullmatch("error: dpo-helpers itself is not installed, .*: run make course, or pip .*\n", result.stderr)


def test_help_shows_the_settings_in_groups_and_a_commands_own_options_apart():
    parts = re.split(r"\n([A-Z].*):\n", run("course", "--help").stdout)
    groups = {
        name: re.findall(r"^  --([a-z-]+)", text, re.M) for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    assert groups.pop("Options") == ["in-place", "beyond", "fresh", "help"]
    ends = {name: (options[0], options[-1]) for name, options in groups.items()}
    assert ends == {
        "Model and data": ("profile", "template"),
        "Training": ("freeze-layers", "max-grad-norm"),
        "DPO": ("beta", "init-from"),
        "Evaluation": ("prompts", "curve-points"),
        "Run": ("trunk-gb", "runs-dir"),
    }
    assert [option for options in groups.values() for option in options] == [
        field.name.replace("_", "-") for field in fields(Settings)
    ]


def test_help_documents_every_setting_with_both_profiles():
    out = run("all", "--help").stdout
    for option in (
        "--model", "--dataset", "--max-pairs", "--epochs", "--batch-size", "--learning-rate", "--beta",
        "--freeze-layers", "--init-from", "--optimizer", "--seed", "--device", "--precision", "--runs-dir",
    ):  # fmt: skip
        assert option in out, option
    words = " ".join(out.split())
    assert "of DPO; study and paper: 1e-6 [mini: 0.0005; gpt2: 1e-06]" in words


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_drawn_in_a_terminal_and_not_into_a_log(tmp_path, terminal):
    import fcntl
    import struct
    import termios

    read, write = os.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("DPO_", "TQDM_"))}
    options = ["--max-pairs", "16", "--held-out-pairs", "8", "--runs-dir", str(tmp_path)]
    command = [sys.executable, "-m", "dpo_helpers", "reference", *options]
    with subprocess.Popen(command, env=env | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=write):
        os.close(write)
        said = ""
        with suppress(OSError), open(read, encoding="utf-8") as stream:  # Linux ends a terminal with an error
            for line in stream:
                said += line
    bars = re.findall(r"scoring held_out pairs: 100%.* 1/1 ", said)
    assert bool(bars) == terminal
    assert terminal or said == ""


def test_no_bar_asks_for_a_terminal_by_itself():
    """tqdm's disable=None would hide it in JupyterLab, whose standard error is no terminal."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "dpo_helpers").rglob("*.py")]
    assert sum("tqdm(" in source for source in sources) == 5
    assert not any(re.search(r"tqdm\(.*disable=", source) for source in sources)


def test_a_terminal_without_utf_8_gets_the_numbers_of_what_it_lacks():
    said = run("all", "--help", PYTHONIOENCODING="cp1252")
    assert said.returncode == 0, said.stderr
    assert "more \\u03b2 for the frontier; paper: 0.05" in " ".join(said.stdout.split())
    assert "one rate, 1e-6" in said.stdout


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.skipif(os.name == "nt", reason="Windows has no /dev/full, and closes pipes differently")
@pytest.mark.parametrize("where", ["cp1252", "a closed pipe", "a full disk"])
def test_output_that_is_refused_ends_no_run(tmp_path, monkeypatch, where):
    """The second run says first that it makes the data again, with an arrow in it, and makes it then."""
    monkeypatch.setenv("DPO_PROFILE", "mini")
    options = ["--held-out-pairs", "8", "--runs-dir", str(tmp_path)]
    assert CliRunner().invoke(app, ["data", "--max-pairs", "16", *options]).exit_code == 0
    out = {"cp1252": lambda: os.open(tmp_path / "o.txt", os.O_CREAT | os.O_WRONLY), "a closed pipe": closed_pipe}.get(
        where, lambda: os.open("/dev/full", os.O_WRONLY)
    )()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "dpo_helpers", "data", "--max-pairs", "12", *options]
    done = subprocess.run(command, env=env, stdout=out, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(out)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "mini/data/manifest.json").read_text())["made_from"]["max_pairs"] == 12
    if where == "cp1252":
        assert "(max_pairs: 16 \\u2192 12)" in (tmp_path / "o.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--profile", "huge"], "error: unknown profile 'huge': use one of mini, gpt2"),
        (["data", "--dataset", "missing.jsonl"], "error: missing.jsonl: no such file; give --dataset"),
        (["data", "--dataset", "bad.jsonl"], "error: bad.jsonl: 1 of 3 rows cannot be used (most often: no 'chosen': every row needs"),
        (["data", "--dataset", "empty.jsonl"], "error: empty.jsonl is empty: it needs rows"),
        (["reference", "--model", "no-weights"], "error: no-weights holds no weights: it needs model.safetensors"),
        (["dpo", "--beta", "0"], "error: beta is 0.0, but must be from 1e-06 to 1,000,000"),
        (["dpo", "--beta", "strong"], "error: beta is 'strong', but must be of the form float"),
        (["dpo", "--device", "cuda"], "error: device is 'cuda', but torch sees no CUDA GPU"),
        (["dpo", "--freeze-layers", "13", "--max-pairs", "16", "--held-out-pairs", "8"],
         "error: freeze_layers is 13, but the model 'embedded' has 12 blocks"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, arguments, message):
    """In this process, through the same typer application; the test below does one in a process of its own."""
    if "cuda" in message:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA GPU")
    bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_PROFILE", "mini")  # the command writes it
    result = CliRunner().invoke(app, [*arguments, "--runs-dir", "runs"])
    check_bad(tmp_path, result.exit_code, result.stderr, message)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(28, "No space left on device", "/x/a\x1b[31m"), "OSError: [Errno 28] No space left on device: '/x/a\\x1b[31m'"),
        (MemoryError(), "MemoryError:"),
        (OverflowError("too\nlarge"), "OverflowError: too large"),
        (RuntimeError("a\x1b[31mb"), "RuntimeError: a\\x1b[31mb"),
    ],
)  # fmt: skip
def test_any_other_error_is_one_line_too_that_says_where_it_was(tmp_path, monkeypatch, raised, said):
    def _raise(settings):
        raise raised

    monkeypatch.setenv("DPO_PROFILE", "mini")
    monkeypatch.setattr(stages, "get_data", _raise)
    result = CliRunner().invoke(app, ["data", "--runs-dir", str(tmp_path)])
    assert result.exit_code == 2
    advice = "free disk or memory if one is full; else it is a fault of the course, to be reported with this line"
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(rf"error: {re.escape(said)} \(cli\.py, line \d+\); {advice}", line), line


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux keeps to a limit of the address space")
def test_too_little_address_space_is_one_line(tmp_path):
    """As `ulimit -v` sets it: torch cannot be mapped."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (400_000_000, 400_000_000))\n"
    code = (
        f"{limit}sys.argv = ['dpo', 'data', '--runs-dir', {str(tmp_path)!r}]\nfrom dpo_helpers.cli import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "free disk or memory if one is full" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reference", "--profile", "gpt2"], "error: cannot get model 'openai-community/gpt2'"),
        (
            ["data", "--dataset", "bad.jsonl"],
            "error: bad.jsonl: 1 of 3 rows cannot be used (most often: no 'chosen': every row needs",
        ),
    ],
)
def test_bad_input_in_a_process_of_its_own(tmp_path, arguments, message):
    bad_files(tmp_path)
    result = run(*arguments, "--runs-dir", "runs", cwd=tmp_path, HF_HOME=str(tmp_path / "hf"))
    check_bad(tmp_path, result.returncode, result.stderr, message)


def bad_files(folder):
    good = preference_rows("train", 3)
    rows = [good[0], {"rejected": good[1]["rejected"]}, good[2]]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text("")
    (folder / "no-weights").mkdir()
    (folder / "no-weights/config.json").write_text('{"model_type": "gpt2"}')


def check_bad(folder, status, stderr, message):
    errors = [line for line in stderr.splitlines() if line.strip()]
    assert status == 2, stderr
    assert errors[-1].startswith(message), stderr
    assert "Traceback" not in stderr
    assert sum(line.startswith("error:") for line in errors) == 1
    made = {p.name for p in (folder / "runs/mini").glob("*") if p.suffix != ".lock"} - {"rejected.jsonl"}
    assert made <= {"data", "reference"}, "something half-written is left"
    assert all((folder / "runs/mini" / name / "manifest.json").is_file() for name in made)


def test_the_doctor_on_the_command_line(tmp_path):
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path} holds no run: give a run of this course")
    history = [{"step": s, "loss": 0.6931, "rewards/chosen": 0.0, "rewards/margins": 0.0} for s in range(1, 20)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 19, "log_history": history}))
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout.startswith("APPLIES   3. the loss stays at 0.693")
    assert "cannot tell 14. accuracy jumps about: needs stored log-probabilities" in result.stdout


def test_an_unknown_option_is_a_usage_error():
    result = run("dpo", "--betta", "1")
    assert result.returncode == 2
    assert "No such option" in result.stderr


def test_the_shell_completes_the_command_but_not_python_m():
    command = Path(sys.executable).with_name("dpo-helpers")
    asked = {"_DPO_HELPERS_COMPLETE": "complete_bash", "COMP_WORDS": "dpo-helpers sw", "COMP_CWORD": "1"}
    found = subprocess.run([command], env={**os.environ, **asked}, capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == ["sweep"]
    assert "--install-completion" not in run("--help").stdout
