"""Load and save causal language models and their tokenizers: safetensors and GGUF only, no code of a model's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..settings import Settings
from ..tokens import TODAY, has_template, start_ids
from .chat import end_of_turn
from .sources import UNSAFE, Source, fetched, first_line, opening, source_of

INDEX = "model.safetensors.index.json"
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # of a model on the Hub: no pickles, no code


@contextmanager
def _location(source: Source) -> Iterator[dict[str, Any]]:
    """Arguments of from_pretrained for a model: a folder on this machine that was looked at, and a file in it."""
    if source.kind == "embedded":
        with as_file(files("dpo_helpers.worlds").joinpath("mini/model")) as folder:
            yield {"pretrained_model_name_or_path": folder}
    elif source.kind == "file":
        _check_file(source.path)
        yield {"pretrained_model_name_or_path": source.path.parent, "gguf_file": source.path.name}
    else:
        folder = fetched(source, _WANTED) if source.kind == "hub" else source.path
        _check_folder(folder)
        yield {"pretrained_model_name_or_path": folder}


def _check_file(path: Path) -> None:
    if path.suffix.lower() != ".gguf":
        unsafe = path.suffix.lower() in UNSAFE
        why = "holds pickled weights, which can run code when opened" if unsafe else "is no model file"
        raise ModelError(f"{path} {why}: give --model a folder with model.safetensors and config.json, or a .gguf file")
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give --model an existing .gguf file")
    try:
        import gguf  # noqa: F401  # transformers reads GGUF through it
    except ModuleNotFoundError as error:
        raise ModelError("a .gguf model needs the gguf package: pip install 'dpo-helpers[gguf]'") from error
    _check_no_adapter(path.parent)


def _check_no_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds adapter_config.json, which names another model to be fetched: merge the adapter into that "
            "model first, or move it elsewhere"
        )


def _check_folder(folder: Path) -> None:
    """ModelError unless a folder's weights are safetensors in it: transformers would also follow an index elsewhere."""
    _check_no_adapter(folder)
    for name in _indexed(folder / INDEX):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder / INDEX} names {name!r}, which is refused: only .safetensors beside it are read")
    if not any(folder.glob("*.safetensors")):
        unsafe = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in UNSAFE)
        if unsafe:
            raise ModelError(
                f"{folder} holds {unsafe[0]}, which can run code when opened: convert it to safetensors first"
            )
        raise ModelError(f"{folder} holds no weights: it needs model.safetensors beside config.json")


def _indexed(index: Path) -> list[str]:
    """The files that an index of weights names; none where there is no index."""
    if not index.is_file():
        return []
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of weights ({type(error).__name__}): get the file again") from error


def _config(where: dict[str, Any]) -> Any:
    """The model's configuration without the names in it that transformers would follow to other weights or to code.

    They are a file of weights to take (which may be a pickled one) and kernels to fetch from the Hub.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(**where, trust_remote_code=False)  # a local folder: there is no revision
    config._attn_implementation = config._experts_implementation = None  # transformers' own choice
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights
    return config


def _opened(where: dict[str, Any]) -> tuple[Any, Any]:
    """(The model in float32 on the CPU, what transformers says of its weights) from a place that was looked at."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    safe = {} if "gguf_file" in where else {"use_safetensors": True}
    return AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]  # a local folder: there is no revision
        **where, **safe, config=_config(where), dtype=torch.float32, trust_remote_code=False,
        output_loading_info=True, ignore_mismatched_sizes=True,  # `_check_keys` names them
    )  # fmt: skip


@opening()
def load_model(settings: Settings) -> Any:
    """The settings' model in float32 on the CPU, dropout off, as transformers' AutoModelForCausalLM.

    Only safetensors and GGUF weights are read, and no code of a model's own is run. Raises ModelError where it
    cannot be loaded.
    """
    with _location(source_of(settings, "model")) as where:
        try:
            model, found = _opened(where)
        except Exception as error:  # from_pretrained has no common base for what can go wrong
            raise ModelError(
                f"cannot load model {settings.model!r} ({first_line(error)}); check --model, or use --profile mini"
            ) from error
    _check_keys(found, settings.model)
    return with_float32_head(_plain(model) if "gguf_file" in where else model).eval()


@opening()
def load_config(settings: Settings) -> Any:
    """The configuration of the settings' model; ModelError where it cannot be read."""
    with _location(source_of(settings, "model")) as where:
        try:
            return _config(where)
        except Exception as error:
            raise ModelError(f"cannot read the configuration of {settings.model!r} ({first_line(error)})") from error


def _check_keys(found: dict[str, Any], name: str) -> None:
    """ModelError unless the file had all weights and no others: transformers fills what is missing by chance."""
    for what in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, found[f"{what}_keys"])):
            raise ModelError(
                f"the weights of {name!r} are not those of its configuration: {len(keys)} {what}, such as "
                f"{', '.join(keys[:3])}; get the model again, or save it with save_pretrained"
            )


def _plain(model: Any) -> Any:
    """A GGUF model without its quantisation record: its weights are float32 by now, but it refuses to be saved."""
    from transformers import AutoModelForCausalLM

    if hasattr(model.config, "quantization_config"):  # transformers 5.5.0 to 5.12.1 leave none
        del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    return plain


@opening()
def load_tokenizer(settings: Settings) -> Any:
    """The settings' tokenizer; it has an end-of-text token, or a ModelError is raised.

    template="none" takes its chat template away; otherwise that decides how prompts look and how a response ends.
    """
    from transformers import AutoTokenizer

    with _location(source_of(settings, "model")) as where:
        try:  # a local folder: there is no revision
            tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
            start_ids(tokenizer)  # some faults show with the first text
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ModelError(f"cannot load the tokenizer of {settings.model!r} ({first_line(error)})") from error
    if settings.template == "none":
        tokenizer.chat_template = None
    elif has_template(tokenizer):
        tokenizer.eos_token = end_of_turn(tokenizer, settings.model)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {settings.model!r} has no end-of-text token, which a response must end with"
        )
    # "<|endoftext|>" in a text is text: taken for the token, a row of the data could end responses where it likes.
    # A chat template needs its tokens; `chat.unrendered` refuses rows that hold one.
    tokenizer.split_special_tokens = not has_template(tokenizer)
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides a tokenizer's ids: its whole definition, or vocabulary and class where it has none."""
    if getattr(tokenizer, "is_fast", False):
        definition = tokenizer.backend_tokenizer.to_str()
    else:
        definition = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    template = f"{tokenizer.chat_template} " if has_template(tokenizer) else ""
    if "strftime_now" in template:
        template += TODAY
    return hashlib.sha256(f"{tokenizer.eos_token_id} {template}{definition}".encode()).hexdigest()


@opening()
def load_saved(folder: Path) -> Any:
    """A model that a stage saved, in float32 on the CPU, dropout off."""
    _check_folder(folder)
    model, found = _opened({"pretrained_model_name_or_path": folder})
    _check_keys(found, str(folder))
    return with_float32_head(model).eval()


@opening()
def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save weights (safetensors, float32), configuration and tokenizer so that from_pretrained opens them.

    Its `generate` then stops where the course's responses end: a chat template's end of turn may be another token.
    """
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_identity(settings: Settings) -> dict[str, Any]:
    """What decides the weights that `load_model` gives: name and commit, or the sha256 of each local file."""
    source, weights = source_of(settings, "model"), list[Path]()
    if source.kind == "folder":
        _check_folder(source.path)
        # an index says which of the files a tensor is taken from
        weights = sorted(file for name in ("*.safetensors", "config.json", INDEX) for file in source.path.glob(name))
    return source.identity(weights)


class Float32Head(nn.Linear):
    """An output head that autocast leaves in float32.

    A float32 log-softmax of logits that were rounded to 16 bits comes too late: between -128 and -64, where many of
    GPT-2's lie, bf16 has steps of 0.5 and fp16 of 0.06; early in training a policy differs from its reference by less.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[…, d] -> [V] logits each, float32 (float64 stays float64)."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def with_float32_head(model: Any) -> Any:
    """The same model, whose output head is a `Float32Head` from now on."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = Float32Head  # its weight may be tied to the embedding's: the module has to stay
    return model
