"""Untrusted text, files and settings: what is shown takes no effect, what can run code is refused, and lints keep it so.

The payloads are in payloads.py; that no script runs in a browser is test_browser.py.
"""

import ast
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import mistune
import nbformat
import payloads
import pytest
import torch
from huggingface_hub import ModelCard
from IPython.core.inputtransformer2 import TransformerManager
from matplotlib.text import Text
from payloads import ACTIVE, ALL, Page
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import ROOT, tiny_gpt2
from dpo_helpers import cli, errors
from dpo_helpers.errors import CourseError, ModelError
from dpo_helpers.evaluation import Evaluation
from dpo_helpers.generation import Response
from dpo_helpers.lesson.doctor import describe, examine, read_run
from dpo_helpers.models import weights_hash
from dpo_helpers.run.artefacts import read_jsonl, write_jsonl
from dpo_helpers.run.card import model_card
from dpo_helpers.run.course import notebooks_in
from dpo_helpers.run.disk import changed_keys, load_manifest, writing
from dpo_helpers.run.loading import _location, load_model, load_saved, load_tokenizer, model_identity, save_model
from dpo_helpers.run.sources import opening, source_of
from dpo_helpers.run.stages import get_data
from dpo_helpers.settings import GPT2_REVISION, load_settings
from dpo_helpers.show import figures, tables
from dpo_helpers.tokens import EncodedPair
from dpo_helpers.untrusted import one_line, visible

# --- text ---


def test_the_rule_literally():
    assert visible("a\x1b[31m\nb\u202e\tc\r é ß ‖ π \u00a0 🌹") == "a\\x1b[31m\nb\\u202e\tc\\x0d é ß ‖ π \u00a0 🌹"
    assert visible("\U000e0041 \ue000 \ud800 \u2028") == "\\U000e0041 \\ue000 \\ud800 \\u2028"
    assert one_line("a\nb\tc\x0b") == "a b c\\x0b"


def printed(show, *arguments):
    with redirect_stdout(io.StringIO()) as out:
        show(*arguments)
    return out.getvalue()


def masks(text):
    class Tokenizer:
        def decode(self, ids):
            return text

    return printed(tables.show_masks, EncodedPair([1], [2], [3]), Tokenizer())


def error_of(call, *arguments):
    """The error that a call raises; None where it returns."""
    try:
        call(*arguments)
    except Exception as error:
        return error
    return None


def raised(text):
    """What Python prints of an error that nobody catches."""
    try:
        raise errors.DataError(f"row 3 of {text} has no 'chosen'")
    except CourseError as error:
        return "".join(traceback.format_exception_only(error))


def a_run(folder, text):
    """A run's folder with the text wherever a number or a name is expected."""
    (folder / "dpo").mkdir(parents=True)
    rows = [{"step": step, "split": "train", "loss": text, "chosen_reward": text, text: text} for step in (0, 1, 2)]
    write_jsonl(folder / "dpo/metrics.jsonl", [*rows, {"step": 3, "split": "held_out", "reward_margin": text}])
    hostile = {"start": text, "beta": text, "loss_type": text, "settings": {"init_from": text}, "peak_memory_gb": text}
    for part in ("dpo", "reference"):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "manifest.json").write_text(
            json.dumps({"made_from": hostile, "about": hostile | {"weights_sha256": text + "!"}})
        )
    return folder


def doctor(text, folder):
    findings = examine(read_run(a_run(folder, text)))
    shown = describe(findings)
    assert shown.count("\n") + 1 == 15 + 2 * sum(finding.verdict == "applies" for finding in findings)
    return shown


def command(text, _, monkeypatch):
    """Both streams of a command that meets an error; it has to end in one line on standard error and status 2."""

    def read(folder):
        raise errors.DataError(f"row 3 of {text} has no 'chosen'")

    monkeypatch.setattr("dpo_helpers.lesson.doctor.read_run", read)
    result = CliRunner().invoke(cli.app, ["doctor", "x"])
    assert (result.exit_code, result.stderr.count("\n"), result.stderr[:7]) == (2, 1, "error: "), result.stderr
    return result.stdout + result.stderr


def generate(text, folder, monkeypatch):
    response = Response(f"\n\nHuman: {text}\n\nAssistant:", [1], text, True)
    monkeypatch.setattr(
        "dpo_helpers.run.outputs.get_generations", lambda settings: {text.replace("/", ""): [response] * 2}
    )
    monkeypatch.setattr("dpo_helpers.run.outputs.get_final_model", lambda settings: Path(text))
    monkeypatch.setenv("DPO_PROFILE", "mini")  # the command writes it
    result = CliRunner().invoke(cli.app, ["generate", "--runs-dir", str(folder)])
    assert result.exit_code == 0, result.output
    return result.stdout


TERMINAL = {
    "show_text": lambda text, *_: printed(tables.show_text, "title", text),
    "show_text's title": lambda text, *_: printed(tables.show_text, text, "text"),
    "show_masks": lambda text, *_: masks(text),
    "an error, uncaught": lambda text, *_: raised(text),
    "an error on the command line": command,
    "an error of a missing model": lambda text, *_: str(error_of(load_model, a_model(text))),
    "doctor": lambda text, folder, _: doctor(text, folder),
    "generate": generate,
    "a figure's summary": lambda text, *_: printed(figures.plot_lengths, {text: [1, 2]}),
}


def a_model(name):
    return load_settings("mini", model=name)


def test_no_text_acts_in_a_terminal_or_in_a_cells_output(tmp_path, monkeypatch, survived):
    acts = {}
    for place, show in TERMINAL.items():
        for number, (name, text) in enumerate(ALL.items()):
            with monkeypatch.context() as patch:
                shown = show(text, tmp_path / f"{place}-{number}", patch)
            if ACTIVE.search(shown):
                acts[place, name] = shown
    assert acts == {}
    count = len(TERMINAL) * len(ALL)
    survived(f"{len(ALL)} hostile texts in {len(TERMINAL)} places of a terminal", count - len(acts), count)


def test_every_kind_of_error_is_neutralised():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CourseError)]
    assert len(kinds) >= 6
    for kind in kinds:
        assert str(kind("\x1b[31m\u202e")) == "\\x1b[31m\\u202e", kind.__name__


def test_a_file_name_that_is_no_unicode_is_printed_by_a_process_of_its_own(tmp_path):
    name = os.fsencode(tmp_path) + b"/bad\xff\x1b[31m"
    os.mkdir(name)
    result = subprocess.run(
        [sys.executable, "-m", "dpo_helpers", "doctor", name], cwd=ROOT, capture_output=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (2, b"")
    assert rb"bad\udcff\x1b[31m holds no run" in result.stderr


def answers(text):
    return [Response("p", [1], text, True), Response("p", [1], text, False)]


def shown_as_html(monkeypatch, show, *arguments):
    pages = []
    monkeypatch.setattr(tables, "display", lambda page: pages.append(page.data))
    show(*arguments)
    return "".join(pages)


HTML = {
    "a cell": lambda text, _: tables.html_table([{"a": text}]),
    "a header": lambda text, _: tables.html_table([{text: 1.0}]),
    "a cell that is no text": lambda text, _: tables.html_table([{"a": [Path(text)]}]),
    "a prompt": lambda text, patch: shown_as_html(
        patch, tables.show_side_by_side, [text, "q"], {"dpo": answers("text")}
    ),
    "a response": lambda text, patch: shown_as_html(
        patch, tables.show_side_by_side, ["p", "q"], {"dpo": answers(text)}
    ),
    "a model's name": lambda text, patch: shown_as_html(
        patch, tables.show_side_by_side, ["p", "q"], {text: answers("text")}
    ),
}


def test_no_text_becomes_an_element_of_a_table(monkeypatch, survived):
    acts = {}
    for place, show in HTML.items():
        expected = Page(show("x", monkeypatch).replace("<br>", "")).elements
        for name, text in ALL.items():
            page = show(text, monkeypatch).replace("<br>", "")  # a line break of a cell
            if ACTIVE.search(page) or Page(page).elements != expected:
                acts[place, name] = page
    assert acts == {}
    count = len(HTML) * len(ALL)
    survived(f"{len(ALL)} hostile texts in {len(HTML)} places of a notebook's tables", count - len(acts), count)


def test_mathjax_leaves_tables_alone():
    """JupyterLab's and nbconvert's MathJax skip elements of these classes; a formula could be a link to anywhere."""
    table = Page(tables.html_table([{"a": 1}])).elements[0]
    assert table == "table class"
    classes = re.match('<table class="([^"]+)">', tables.html_table([{"a": 1}]))[1].split()
    assert {"mathjax_ignore", "tex2jax_ignore"} <= set(classes)


def test_no_name_is_rendered_in_the_model_card(survived):
    """As Markdown with HTML let through, as renderers do."""
    measured = {name: Evaluation(name, 0.5, {"kl": 0.1}, [], {}) for name in ("reference", "sft", "dpo")}
    render = mistune.create_markdown(escape=False, plugins=["table"])

    def rendered(card):
        return Page(render(card.partition("\n---\n")[2])).elements

    acts = {}
    for place in ("model", "source"):
        expected = None
        for name, text in {"": "x", **ALL}.items():
            settings = a_model(text) if place == "model" else load_settings("mini")
            card = model_card(settings, measured, text if place == "source" else "data", "0" * 64)
            expected = expected or rendered(card)
            known = set(ModelCard(card).data.to_dict()) <= {"base_model", "language", "library_name", "license",
                                                            "pipeline_tag", "tags"}  # fmt: skip
            if ACTIVE.search(card) or rendered(card) != expected or not known:
                acts[place, name] = card
    assert acts == {}
    survived(f"{len(ALL)} hostile names in 2 places of the model card", 2 * len(ALL) - len(acts), 2 * len(ALL))


@pytest.mark.filterwarnings("ignore:Tight layout")  # thirty names do not fit beside a figure
def test_no_label_is_read_as_a_formula(tmp_path):
    """A payload as the name of a curve is drawn, whatever it holds; matplotlib raises for a formula it cannot read."""
    measured = {
        "kl": 1.0, "kl_se": 0.1, "reward_margin": 1.0, "reward_margin_se": 0.1, "length": 3.0, "ended": 1.0,
        "repeated_3grams": 0.0, "looping": 0.0, "distinct_2": 0.5, "step": 1,
    }  # fmt: skip
    names = list({**payloads.TEMPLATES, **ALL}.values())  # of ten colours the first are for formulas
    evaluations = {name: Evaluation(name, 0.5, measured, [], {}) for name in names}
    figures.plot_lengths({name: [1, 2, 3] for name in names}, tmp_path)
    figures.plot_reward_kl(evaluations, tmp_path)
    figures.plot_text_measures(evaluations, tmp_path)
    figures.plot_frontier(
        {name: [measured] for name in names}, Evaluation("reference", 0.5, measured, [], {}), tmp_path
    )
    for file in ("01-lengths", "05-reward-kl", "07-text-measures", "06-frontier"):
        summary = Image.open(tmp_path / f"{file}.png").text["Description"]
        assert "{{7*7}}" in summary
        assert not ACTIVE.search(summary)


def test_a_label_shows_every_character_of_a_name():
    assert Text(0, 0)._preprocess_math("$x$") == ("$x$", True), "this is what matplotlib does without"
    for name in ("$x$", r"\$x$", "costs 5 $", "$", "$$", r"\alpha $\alpha$", "x"):
        assert Text(0, 0)._preprocess_math(figures.label(name)) == (name, False)
    assert figures.label("$" * 1000) == r"\$" * 39 + "…"


def test_json_files_hold_escapes_only(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{text: text} for text in ALL.values()])
    raw = (tmp_path / "rows.jsonl").read_bytes()
    assert raw.isascii()
    assert raw.count(b"\n") == len(ALL)
    assert read_jsonl(tmp_path / "rows.jsonl") == [{text: text} for text in ALL.values()]


# --- formats and code of models ---

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".BIN")
UNKNOWN = (".zip", ".tar.gz", ".py", ".h5", ".onnx", ".safetensors", "")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "something-ran"


@pytest.fixture
def model(tmp_path, tokenizer):
    """A model's folder that opens."""
    save_model(tiny_gpt2(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def unpickling(monkeypatch):
    """What torch.load is asked to open, which reads pickles: it opens nothing here."""
    asked = []
    monkeypatch.setattr(torch, "load", lambda file, *_, **__: asked.append(Path(file).name) or {})
    return asked


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(path):
    """The one line with which model and tokenizer are both refused."""
    of_model, of_tokenizer = (error_of(load, a_model(str(path))) for load in (load_model, load_tokenizer))
    assert isinstance(of_model, ModelError)
    assert str(of_model) == str(of_tokenizer)
    assert "\n" not in str(of_model)
    return str(of_model)


ACTS = "\x1b[31mACTS\x07"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
}
QUOTED = {
    "model type": {"model_type": ACTS},
    "quantisation": {"quantization_config": {"quant_method": ACTS}},
    "rope": {**LLAMA, "rope_parameters": {"rope_type": ACTS, "rope_theta": 10000.0}},
    "rope's keys": {**LLAMA, "rope_parameters": {"rope_type": "linear", ACTS: 1, "factor": 2.0, "rope_theta": 10000.0}},
}
LOAD = """
import sys
from dpo_helpers.run.loading import load_config, load_model, load_saved, load_tokenizer
from dpo_helpers.settings import load_settings
saved = lambda settings: load_saved(__import__("pathlib").Path(settings.model))
for folder in sys.argv[1:]:
    print("---", flush=True)
    print("---", file=sys.stderr, flush=True)
    for load in (load_config, load_tokenizer, load_model, saved):
        try:
            load(load_settings("mini", model=folder))
        except Exception as error:
            pass
"""


def test_what_a_library_says_of_a_models_files_takes_no_effect(model, tmp_path):
    """A process of its own, since the library's log goes to its standard error: five files that it quotes there."""
    folders = {name: tmp_path / f"quoted-{n}" for n, name in enumerate([*QUOTED, "a tensor's name"])}
    for name, folder in folders.items():
        shutil.copytree(model, folder)
        edit(folder / "config.json", **QUOTED.get(name, {}))
    file = folders["a tensor's name"] / "model.safetensors"
    save_file(load_file(file) | {ACTS: torch.zeros(2)}, file, metadata={"format": "pt"})
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *folders.values()], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name, said in zip(folders, done.stderr.split("---\n")[1:], strict=True):
        assert "ACTS" in said, f"{name}: the library says nothing of it any more"
        assert "\\x1b[31mACTS\\x07" in said, name
    assert not ACTIVE.search(done.stderr + done.stdout)


def test_files_are_opened_with_standard_output_closed_too(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with opening():
        print("nowhere")
    assert sys.stdout is None


def test_logs_warnings_and_prints_are_shown_as_text_while_files_are_opened_and_as_before_afterwards(capsys, caplog):
    log, warned = logging.getLogger("a library"), []
    factory, form = logging.getLogRecordFactory(), warnings.formatwarning
    with opening():
        log.warning("tensor %s of %d", ACTS, 3)
        print(ACTS)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda *found, **_: warned.append(warnings.formatwarning(*found[:4]))
            warnings.warn(ACTS, stacklevel=1)
    assert caplog.messages == ["tensor \\x1b[31mACTS\\x07 of 3"]
    assert capsys.readouterr().out == "\\x1b[31mACTS\\x07\n"
    assert "UserWarning: \\x1b[31mACTS\\x07" in warned[0]
    assert (logging.getLogRecordFactory(), warnings.formatwarning) == (factory, form)
    print(ACTS)
    assert capsys.readouterr().out == ACTS + "\n"


def test_the_pickle_of_these_tests_runs_when_it_is_opened(marker):
    pickle.loads(pickle.dumps(Evil(marker))).close()
    assert marker.exists()


@pytest.mark.parametrize("suffix", PICKLED)
def test_a_file_of_pickled_weights_is_refused(suffix, tmp_path, marker):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(pickle.dumps(Evil(marker)))
    expected = f"{file} holds pickled weights, which can run code when opened: give --model a folder with "
    assert refused(file).startswith(expected + "model.safetensors")
    file.unlink()
    assert refused(file).startswith(expected), "without the file too: its name must not be looked up on the Hub"
    assert not marker.exists()


@pytest.mark.parametrize("suffix", UNKNOWN)
def test_another_file_is_refused(suffix, tmp_path):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"x")
    assert refused(file).startswith(f"{file} is no model file: give --model a folder with model.safetensors")


@pytest.mark.parametrize("suffix", PICKLED)
def test_a_folder_of_pickled_weights_is_refused(suffix, model, marker):
    (model / "model.safetensors").unlink()
    (model / f"pytorch_model{suffix}").write_bytes(pickle.dumps(Evil(marker)))
    assert refused(model) == (
        f"{model} holds pytorch_model{suffix}, which can run code when opened: convert it to safetensors first"
    )
    assert not marker.exists()


def test_beside_safetensors_a_pickled_file_is_not_read(model, marker):
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Evil(marker)))
    assert weights_hash(load_model(a_model(str(model)))) == weights_hash(tiny_gpt2())
    assert weights_hash(load_saved(model)) == weights_hash(tiny_gpt2())
    assert not marker.exists()


def with_transformers_alone(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)


def test_a_configuration_cannot_name_a_pickled_file_as_the_weights(model, unpickling):
    """With transformers alone, `transformers_weights` gets adapter_model.bin opened in spite of use_safetensors."""
    torch.save(tiny_gpt2(seed=1).state_dict(), model / "adapter_model.bin")
    edit(model / "config.json", transformers_weights="adapter_model.bin")
    assert weights_hash(load_model(a_model(str(model)))) == weights_hash(tiny_gpt2())
    assert weights_hash(load_saved(model)) == weights_hash(tiny_gpt2())
    assert unpickling == []
    with_transformers_alone(model)
    assert unpickling == ["adapter_model.bin"]


def test_an_index_cannot_name_a_pickled_file_as_a_part(model, unpickling):
    """With transformers alone, an index of safetensors gets a .bin file opened in spite of use_safetensors."""
    weights = tiny_gpt2().state_dict()
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"index.json names 'pytorch_model.bin', which is refused: only {SAFE}" in refused(model)
    for load, where in ((model_identity, a_model(str(model))), (load_saved, model)):
        with pytest.raises(ModelError, match=r"names 'pytorch_model\.bin', which is refused"):
            load(where)
    assert unpickling == []
    error_of(with_transformers_alone, model)
    assert unpickling == ["pytorch_model.bin"]


SAFE = ".safetensors beside it are read"


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "sub/x.safetensors", "/etc/x.safetensors", "x.bin.safetensors.pt"]
)
def test_an_index_leads_to_files_beside_it_only(name, model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": name}}))
    assert refused(model).endswith(f"names {name!r}, which is refused: only {SAFE}")


def test_an_index_of_safetensors_beside_it_is_followed(model):
    """Weights in parts, as large models have them."""
    load_saved(model).save_pretrained(model / "parts", max_shard_size=4000)
    assert len(list((model / "parts").glob("model-*.safetensors"))) > 1
    assert weights_hash(load_model(a_model(str(model / "parts")))) == weights_hash(tiny_gpt2())


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_configuration_cannot_name_a_kernel_to_fetch(key, model):
    """With transformers alone, this is code from the Hub where the kernels package is installed."""
    edit(model / "config.json", **{key: "somebody/kernel"})
    for loaded in (load_model(a_model(str(model))), load_saved(model)):
        assert weights_hash(loaded) == weights_hash(tiny_gpt2())
        assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("beside", ["a model", "a .gguf file"])
def test_an_adapter_cannot_name_the_model_to_fetch(beside, model):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    (model / "x.gguf").write_bytes(b"GGUF")
    assert "holds adapter_config.json" in refused(model if beside == "a model" else model / "x.gguf")


BROKEN = {"empty": b"", "short": b"\x08\0\0\0", "garbage": bytes(range(256)) * 40, "a pickle": b"\x80\x04N.",
          "a huge header": b"\xff" * 7 + b"\x7f" + b"{}"}  # fmt: skip


@pytest.mark.parametrize("kind", [*BROKEN, "cut"])
def test_weights_that_are_no_safetensors(kind, model):
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(BROKEN.get(kind, whole[:-7]))
    with pytest.raises(ModelError, match=f"^cannot load model '{re.escape(str(model))}' .*; check --model") as caught:
        load_model(a_model(str(model)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [*BROKEN, "cut"])
def test_weights_that_are_no_gguf(kind, tmp_path):
    pytest.importorskip("gguf")
    file = tmp_path / "x.gguf"
    file.write_bytes(BROKEN.get(kind, b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\xff\xff"))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=rf"^cannot load .*{re.escape(str(file))}") as caught:
            load(a_model(str(file)))
        assert "\n" not in str(caught.value)


@pytest.fixture
def with_code(model, marker, monkeypatch, tmp_path):
    """A model's folder with a module of its own, which leaves the marker when imported from wherever it is copied to."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(model)
    for name in ("hostile_module", "modeling_hostile", "configuration_hostile", "tokenization_hostile"):
        (model / f"{name}.py").write_text(payloads.module(marker))
    return model


def test_a_models_code_would_run_if_it_were_trusted(with_code, marker):
    from transformers import AutoModelForCausalLM

    edit(with_code / "config.json", auto_map={"AutoModelForCausalLM": "modeling_hostile.Hostile"})
    with pytest.raises(Exception, match="Hostile"):  # it is no model, but that is seen too late
        AutoModelForCausalLM.from_pretrained(with_code, trust_remote_code=True)
    assert marker.exists()


CUSTOM = {
    "config.json": [
        {"auto_map": {"AutoModelForCausalLM": "modeling_hostile.Hostile"}},
        {"auto_map": {"AutoConfig": "configuration_hostile.Hostile"}, "model_type": "hostile"},
        {"auto_map": {"AutoModelForCausalLM": "somebody/model--modeling_hostile.Hostile"}},
        {"architectures": ["hostile_module.Hostile"], "tokenizer_class": "hostile_module.Hostile"},
    ],
    "tokenizer_config.json": [
        {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["tokenization_hostile.Hostile", None]}},
        {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": [None, "tokenization_hostile.Hostile"]}},
        {"tokenizer_class": "hostile_module.Hostile"},
    ],
}


@pytest.mark.parametrize(("file", "values"), [(file, values) for file, all_of in CUSTOM.items() for values in all_of])
def test_no_code_of_a_model_is_run(file, values, with_code, marker, monkeypatch):
    """It opens as what it is without its code, or is refused."""
    edit(with_code / file, **values)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run the code"))
    settings = a_model(str(with_code))
    for load, where in ((load_model, settings), (load_tokenizer, settings), (load_saved, with_code)):
        error = error_of(load, where)
        assert error is None or "custom code" in str(error)
        assert error is None or load is load_saved or isinstance(error, ModelError)
    assert not marker.exists()


# --- settings and manifests ---


@pytest.fixture
def hostile(tmp_path, marker, monkeypatch):
    """Values that would leave the marker, and a module that would too; first seen to do so."""
    (tmp_path / "hostile_module.py").write_text(payloads.module(marker))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    values = payloads.code(marker)
    for run in (lambda: eval(values["expression"]), lambda: __import__(values["module"])):
        run()
        assert marker.exists()
        marker.unlink()
    sys.modules.pop("hostile_module")
    return values


def test_a_manifest_is_read_as_json_only(hostile, marker, tmp_path, small):
    with writing(tmp_path / "a", hostile) as draft:
        (draft.folder / "x").write_text("x")
        draft.about.update(hostile)
    manifest = load_manifest(tmp_path / "a")
    assert (manifest["made_from"], manifest["about"]) == (hostile, hostile)
    assert len(changed_keys(hostile, {})) == len(hostile)

    with writing(small.run_dir / "data", hostile) as draft:
        (draft.folder / "train.jsonl").write_text(json.dumps(hostile))
        draft.about.update(hostile)
    assert len(get_data(small).train) == small.max_pairs, "made again"

    run = a_run(tmp_path / "run", "x")
    (run / "dpo/manifest.json").write_text(json.dumps({"made_from": hostile, "about": hostile}))
    write_jsonl(run / "dpo/metrics.jsonl", [{"step": 1, "split": "train", **hostile}])
    assert len(examine(read_run(run))) == 15
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl/trainer_state.json").write_text(json.dumps({"log_history": [hostile], "global_step": hostile}))
    assert len(examine(read_run(tmp_path / "trl"))) == 15
    assert not marker.exists()
    assert "hostile_module" not in sys.modules


def test_a_setting_is_read_as_text_only(hostile, marker, monkeypatch):
    """From the environment, as notebooks and the command line do."""
    for value in (text for text in hostile.values() if isinstance(text, str)):
        for name in (
            "BETA",
            "BETAS",
            "EPOCHS",
            "MAX_PAIRS",
            "FREEZE_EMBEDDINGS",
            "OPTIMIZER",
            "DEVICE",
            "MODEL_REVISION",
        ):
            with monkeypatch.context() as patch:
                patch.setenv(f"DPO_{name}", value)
                error = error_of(load_settings, "mini")
                assert name == "MODEL_REVISION" or (isinstance(error, CourseError) and name.lower() in str(error))
    assert not marker.exists()


@pytest.mark.parametrize("text", ["[" * 200_000, '{"made_from": ' * 50_000, "[1, 2]", "null", "\x1b[31m", '{"a": 1'])
def test_strange_json_is_one_error(text, tmp_path):
    for name in ("dpo/metrics.jsonl", "dpo/manifest.json", "reference/manifest.json", "trainer_state.json"):
        run = tmp_path / str(len(os.listdir(tmp_path)))
        if name.startswith("trainer"):
            run.mkdir()
        else:
            a_run(run, "x")
        (run / name).write_text(text)
        error = error_of(lambda folder: examine(read_run(folder)), run)
        assert error is None or (isinstance(error, errors.ArtefactError) and str(run) in str(error))


# --- lints: on the syntax tree of the package, the benchmarks and the notebooks' code cells ---

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "builtins", "os.system", "os.popen", "os.exec", "os.spawn", "runpy",
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle",
    "torch.load", "torch.jit.load", "torch.hub", "torch.package", "pandas.read_pickle", "safetensors.torch.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader",
    "IPython.display.Markdown", "IPython.display.Javascript", "IPython.display.Latex", "IPython.display.SVG",
    "IPython.display.IFrame", "IPython.display.display_html", "IPython.display.display_markdown",
    "get_ipython.system",
}  # fmt: skip
ONLY = {"trust_remote_code": False, "shell": False, "allow_pickle": False, "weights_only": True, "autoescape": True}
HUB = {"load_dataset", "hf_hub_download", "snapshot_download", "cached_file", "from_pretrained"}
# calls that need no revision, and why: (file, first argument)
LOCAL = {
    ("loading.py", "where"): "what loading._location gives, or a folder that a stage has written: on this machine",
    ("07_generations.ipynb", "final"): "the folder that the stage has just written",
    ("pairs.py", "str(folder)"): "what sources.fetched gives: a checked folder on this machine, at its commit",
}


def names_of(tree):
    """What each imported name stands for: {"load": "torch.load"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                      for a in node.names}  # fmt: skip
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def dotted(node, names):
    """The full name of an expression such as `t.jit.load`; "" for one that is no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    if isinstance(node, ast.Call) and dotted(node.func, names) == "get_ipython":
        return "get_ipython"
    return ""


def is_forbidden(name):
    return any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN)


def lint(source, file="x.py", used=None):
    """What is wrong with a file, as sentences. used: gets the keys of LOCAL that were needed."""
    tree = ast.parse(source)
    names = names_of(tree)
    found = []
    for node in ast.walk(tree):
        line = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            of = [a.name for a in node.names] if isinstance(node, ast.Import) else names_of(node).values()
            found += [f"{line}: imports {name}" for name in of if is_forbidden(name)]
        elif isinstance(node, (ast.Name, ast.Attribute)) and is_forbidden(dotted(node, names)):
            found.append(f"{line}: uses {dotted(node, names)}")
        elif isinstance(node, ast.Dict):
            given = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True)
                     if isinstance(key, ast.Constant)]  # fmt: skip
            found += wrong_values(given, line)
        elif isinstance(node, ast.Call):
            found += wrong_values([(k.arg, k.value) for k in node.keywords], line) + lint_call(node, names, file, used)
    return found


def wrong_values(given, line):
    return [
        f"{line}: {name} is not {ONLY[name]}"
        for name, value in given
        if name in ONLY and not (isinstance(value, ast.Constant) and value.value is ONLY[name])
    ]


def lint_call(node, names, file, used):
    name, line = dotted(node.func, names), f"{file}:{node.lineno}"
    keywords = {k.arg for k in node.keywords}
    last = name.rpartition(".")[2] or getattr(node.func, "attr", "")
    first = node.args[0] if node.args else next((k.value for k in node.keywords if k.arg is None), None)
    found = []
    if name == "importlib.import_module" and not isinstance(first, ast.Constant):
        found.append(f"{line}: imports a module by a name that is not written there")
    if name == "jinja2.Environment" and "autoescape" not in keywords:
        found.append(f"{line}: a template without autoescape")
    if name in ("markupsafe.Markup", "jinja2.Markup"):
        found.append(f"{line}: text is called safe")
    if name == "IPython.display.HTML" and file != "tables.py":
        found.append(f"{line}: HTML outside tables.py")
    if last in HUB:
        key = file, first.value if isinstance(first, ast.Constant) else ast.unparse(first) if first else ""
        if key in LOCAL and used is not None:
            used.add(key)
        elif "revision" not in keywords:
            found.append(f"{line}: {last} without a revision")
        if file in STRICT and "Auto" in name and "trust_remote_code" not in keywords:
            found.append(f"{line}: {name} does not say trust_remote_code=False")
    return found


def code_of(notebook):
    """The code cells of a notebook from the second on, as Python; the first is the same in all and installs."""
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    return "\n".join(TransformerManager().transform_cell(cell.source) for cell in cells[1:])


PACKAGE = sorted((ROOT / "dpo_helpers").rglob("*.py"))
NOTEBOOKS = notebooks_in(ROOT / "notebooks", beyond=True)
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
STRICT = {path.name for path in PACKAGE}


def test_nothing_is_evaluated_unpickled_unpinned_or_rendered():
    assert len(PACKAGE) >= 40
    assert len(NOTEBOOKS) >= 9
    used, found = set(), []
    for path in (*PACKAGE, *BENCHMARKS, *NOTEBOOKS):
        found += lint(code_of(path) if path in NOTEBOOKS else path.read_text(encoding="utf-8"), path.name, used)
    assert found == []
    assert used == set(LOCAL), "an exception that nothing needs any more"


BAD = {
    "eval(x)": "uses eval",
    "run = exec": "uses exec",
    "compile('x', '', 'eval')": "uses compile",
    "__import__(name)": "uses __import__",
    "import builtins": "imports builtins",
    "import pickle": "imports pickle",
    "import pickle as p; p.load(f)": "imports pickle",
    "from marshal import loads": "imports marshal.loads",
    "import shelve": "imports shelve",
    "import joblib": "imports joblib",
    "import torch; torch.load(f)": "uses torch.load",
    "import torch as t; t.load(f)": "uses torch.load",
    "from torch import load": "imports torch.load",
    "import torch; read = torch.load": "uses torch.load",
    "torch.load(f, weights_only=False)": "weights_only is not True",
    "import torch; torch.hub.load('a/b', 'c')": "uses torch.hub",
    "import numpy as np; np.load(f, allow_pickle=True)": "allow_pickle is not False",
    "import pandas as pd; pd.read_pickle(f)": "uses pandas.read_pickle",
    "import yaml; yaml.load(f)": "uses yaml.load",
    "import yaml; yaml.load(f, yaml.Loader)": "uses yaml.Loader",
    "from yaml import unsafe_load": "imports yaml.unsafe_load",
    "import importlib; importlib.import_module(manifest['module'])": "imports a module by a name",
    "from importlib import import_module; import_module(f'{x}')": "imports a module by a name",
    "import os; os.system(x)": "uses os.system",
    "import subprocess; subprocess.run(x, shell=True)": "shell is not False",
    "import subprocess; subprocess.run(x, shell=y)": "shell is not False",
    "run(**{'shell': True})": "shell is not False",
    "AutoModel.from_pretrained(x, revision=r, trust_remote_code=True)": "trust_remote_code is not False",
    "AutoModel.from_pretrained(x, revision=r, trust_remote_code=t)": "trust_remote_code is not False",
    "options = {'trust_remote_code': True}": "trust_remote_code is not False",
    "AutoModel.from_pretrained('gpt2')": "from_pretrained without a revision",
    "GPT2LMHeadModel.from_pretrained(name, use_safetensors=True)": "from_pretrained without a revision",
    "load_dataset('Anthropic/hh-rlhf', split='train')": "load_dataset without a revision",
    "load_dataset('parquet', data_files=x)": "load_dataset without a revision",
    "huggingface_hub.snapshot_download('gpt2')": "snapshot_download without a revision",
    "import jinja2; jinja2.Environment()": "a template without autoescape",
    "import jinja2; jinja2.Environment(autoescape=False)": "autoescape is not True",
    "from markupsafe import Markup; Markup(text)": "text is called safe",
    "from IPython.display import HTML; HTML(text)": "HTML outside tables.py",
    "from IPython.display import Markdown": "imports IPython.display.Markdown",
    "import IPython.display as d; d.Javascript(text)": "uses IPython.display.Javascript",
    TransformerManager().transform_cell("!rm -r {folder}"): "uses get_ipython.system",
}
GOOD = [
    "model.eval(); re.compile('x'); torch.compile(model); self.load(x); json.load(f); load_file(f)",
    "import importlib; importlib.import_module('json')",
    "import subprocess; subprocess.run(['ls'])",
    "import yaml; yaml.safe_load(f)",
    "AutoModel.from_pretrained(name, revision=commit, trust_remote_code=False)",
    "load_dataset(name, revision=commit)",
    "from .torch import load",
    "jinja2.Environment(autoescape=True)",
]


@pytest.mark.parametrize(("source", "problem"), BAD.items())
def test_the_lint_finds(source, problem):
    assert any(problem in found for found in lint(source)), lint(source)


@pytest.mark.parametrize("source", GOOD)
def test_the_lint_lets_pass(source):
    assert lint(source) == []


def test_the_package_has_to_say_that_it_trusts_no_code():
    source = "from transformers import AutoModel\nAutoModel.from_pretrained(x, revision=r)"
    (problem,) = lint(source, "loading.py")
    assert problem.endswith("AutoModel.from_pretrained does not say trust_remote_code=False")


def test_what_is_loaded_from_the_hub_has_a_commit(model, monkeypatch):
    """Of LOCAL's `where`: a folder; of a model of the Hub the one that was fetched by 40 hex digits, never by a branch."""
    asked = []

    def fetch(name, *, repo_type, revision, allow_patterns):
        assert repo_type == "model"
        asked.append((name, revision, allow_patterns))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for profile in ("gpt2", "mini"):
        with _location(source_of(load_settings(profile), "model")) as where:
            assert set(where) == {"pretrained_model_name_or_path"}
            assert Path(where["pretrained_model_name_or_path"]).is_dir()
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("openai-community/gpt2", GPT2_REVISION)
    assert re.fullmatch("[0-9a-f]{40}", revision)
    assert not [pattern for pattern in patterns if pattern.endswith((".py", "*", *PICKLED))]


TEMPLATE = {
    "a value called safe": r"\|\s*safe\b|autoescape|Markup",
    "a script": r"<script|javascript:|\son\w+\s*=",
    "an attribute without quotes": r"\w=\{\{",
    "something from the network": r"https?://|//\w+\.",
}
LEAKS = {
    "a token of the Hub": r"HF_TOKEN|HUGGING_FACE_HUB_TOKEN|hf_[A-Za-z0-9]{20,}",
    "a server for every address": r"--ip[= ]['\"]?(0\.0\.0\.0|\*|::)|\.ip\s*=\s*['\"]?(0\.0\.0\.0|\*|::)",
    "an empty token": r"(?i)\btoken\s*=\s*(''|\"\"|(?=\s|\\n|\\?\"|$))",
    "an empty password": r"(?i)\bpassword\s*=\s*(''|\"\"|(?=\s|\\n|\\?\"|$))",
    "requests from every page": r"disable_check_xsrf\s*=\s*True|allow_origin\s*=\s*['\"]?\*",
}
FILES = ["Makefile", "README.md", "CONTRIBUTING.md", "environment.yml", "pyproject.toml", "benchmarks/README.md",
         *(path.relative_to(ROOT).as_posix() for path in (*NOTEBOOKS, *sorted((ROOT / "docs").glob("*.md"))))]  # fmt: skip


def matches(patterns, text):
    return [name for name, pattern in patterns.items() if re.search(pattern, text, re.MULTILINE)]


@pytest.mark.parametrize("file", FILES)
def test_no_file_opens_jupyter_to_others_or_holds_a_token(file):
    assert matches(LEAKS, (ROOT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("bad", "name"), [
    ("export HF_TOKEN=x", "a token of the Hub"), ("hf_" + "a" * 30, "a token of the Hub"),
    ("jupyter lab --ip=0.0.0.0", "a server for every address"), ("jupyter lab --ip '*'", "a server for every address"),
    ("c.ServerApp.ip = '0.0.0.0'", "a server for every address"),
    ("jupyter lab --NotebookApp.token=''", "an empty token"), ("jupyter lab --ServerApp.token= notebooks", "an empty token"),
    ("jupyter lab --IdentityProvider.token=", "an empty token"), ('"!jupyter lab --ServerApp.token=\\n",', "an empty token"),
    ("c.ServerApp.password = ''", "an empty password"), ("--ServerApp.allow_origin='*'", "requests from every page"),
])  # fmt: skip
def test_the_text_lint_finds(bad, name):
    assert matches(LEAKS, bad) == [name]


def test_the_reports_template_calls_nothing_safe():
    assert matches(TEMPLATE, (ROOT / "dpo_helpers/run/report.html.jinja").read_text(encoding="utf-8")) == []
    for bad in ("{{ x|safe }}", "<script>", "<b onclick='x'>", "<img alt={{ x }}>", "<img src='https://x.org/y'>"):
        assert len(matches(TEMPLATE, bad)) == 1, bad


# --- JupyterLab ---


@pytest.mark.slow
def test_make_lab_serves_this_machine_only_and_asks_for_the_token(tmp_path):
    """The Makefile's own command, with an empty home and a free port."""
    recipe = re.search(r"^lab:.*\n\t\$\(BIN\)/jupyter (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")} | {"HOME": str(tmp_path)}
    env |= {"JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    command = [Path(sys.executable).with_name("jupyter"), *recipe.split(), "--no-browser", "--ServerApp.port=0"]
    as_root = ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([*command, *as_root], cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        facts = wait_for_server(server, tmp_path)
        assert re.match(r"http://(127\.0\.0\.1|localhost):\d+/$", facts["url"])
        assert re.fullmatch("[0-9a-f]{48}", facts["token"])
        address = f"http://127.0.0.1:{facts['port']}/api/contents"
        for header in ({}, {"Authorization": "token "}, {"Authorization": "token " + "0" * 48}):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(urllib.request.Request(address, headers=header), timeout=30)
        right = urllib.request.Request(address, headers={"Authorization": f"token {facts['token']}"})
        assert urllib.request.urlopen(right, timeout=30).status == 200
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_for_server(server, folder):
    """What the server wrote about itself: address, port and token."""
    for _ in range(600):
        for path in (folder / "runtime").glob("jpserver-*.json"):
            if text := path.read_text():
                return json.loads(text)
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(0.1)
    raise AssertionError((folder / "log").read_text())
