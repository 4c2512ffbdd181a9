"""Load, freeze, hash and save causal language models and their tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from . import mini
from .checkpoints import file_hash
from .errors import ModelError, SettingsError
from .hub import resolve_revision
from .settings import EMBEDDED, Settings

UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: all, and those that train."""

    total: int
    trainable: int


@contextmanager
def _location(settings: Settings) -> Iterator[dict[str, Any]]:
    """Arguments of from_pretrained for the settings' model: what to load, from where, pinned."""
    name = settings.model
    path = Path(name)
    suffix = path.suffix.lower()
    if name == EMBEDDED:
        with as_file(files("dpo_helpers").joinpath("mini/model")) as folder:
            yield {"pretrained_model_name_or_path": str(folder)}
    elif suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path}: no such file; give --model an existing .gguf file")
        try:
            import gguf  # noqa: F401  # transformers reads GGUF through it
        except ModuleNotFoundError as error:
            raise ModelError("a .gguf model needs the gguf package: pip install 'dpo-helpers[gguf]'") from error
        _check_no_adapter(path.parent)
        yield {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif os.path.isdir(name):
        _check_folder(path)
        yield {"pretrained_model_name_or_path": str(path)}
    elif os.path.isfile(name) or suffix in UNSAFE:
        why = "holds pickled weights, which can run code when opened" if suffix in UNSAFE else "is no model file"
        raise ModelError(f"{path} {why}: give --model a folder with model.safetensors and config.json, or a .gguf file")
    else:
        yield {
            "pretrained_model_name_or_path": name,
            "revision": resolve_revision(name, settings.model_revision, "model"),
        }


def _check_cached(name: str, revision: str) -> None:
    """ModelError naming the file, if weights in the Hub's cache are not what was downloaded.

    The cache names a large file by the sha256 of its content, and nothing else would notice a flipped bit.
    """
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    for file in Path(config).parent.glob("*.safetensors") if isinstance(config, str) else []:
        blob = file.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and file_hash(blob) != blob.name:
            raise ModelError(
                f"{blob} in the Hub's cache is damaged (its name is its sha256): delete it and run this again"
            )


def _check_no_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds adapter_config.json, which names another model to be fetched: merge the adapter into that "
            "model first, or move it elsewhere"
        )


def _check_folder(path: Path) -> None:
    _check_no_adapter(path)
    if any(path.glob("*.safetensors")):
        return
    unsafe = sorted(p.name for p in path.iterdir() if p.suffix.lower() in UNSAFE)
    if unsafe:
        raise ModelError(f"{path} holds {unsafe[0]}, which can run code when opened: convert it to safetensors first")
    raise ModelError(f"{path} holds no weights: it needs model.safetensors beside config.json")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


@contextmanager
def _nothing_pickled() -> Iterator[None]:
    """Within, torch.load refuses: transformers would call it for a .bin file that an index of safetensors names."""

    def _refuse(file: object, *_: object, **__: object) -> NoReturn:
        raise ModelError(f"{file} is pickled, which can run code when opened, and is refused: convert it first")

    with patch.object(torch, "load", _refuse):
        yield


def _config(where: dict[str, Any]) -> Any:
    """The model's configuration without the names in it that transformers would follow to other weights or to code.

    They are a file of weights to take (which may be a pickled one) and kernels to fetch from the Hub.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(**where, trust_remote_code=False)  # revision: in `where`
    config._attn_implementation = config._experts_implementation = None  # transformers' own choice
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights
    return config


def load_model(settings: Settings) -> Any:
    """The settings' model in float32 on the CPU, dropout off, as transformers' AutoModelForCausalLM.

    Only safetensors and GGUF weights are read, and no code of a model's own is run. Raises ModelError where it
    cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _location(settings) as where, _nothing_pickled():
        safe = {} if "gguf_file" in where else {"use_safetensors": True}
        try:
            if "revision" in where:
                _check_cached(where["pretrained_model_name_or_path"], where["revision"])
            # revision: in `where`, a commit, for a Hub model
            model = AutoModelForCausalLM.from_pretrained(
                **where, **safe, config=_config(where), dtype=torch.float32, trust_remote_code=False
            )
        except ModelError:
            raise
        except Exception as error:  # from_pretrained has no common base for what can go wrong
            raise ModelError(
                f"cannot load model {settings.model!r} ({_first_line(error)}); check --model, the network and "
                "HF_HUB_OFFLINE, or use --profile mini, which needs no network"
            ) from error
    return _with_float32_head(_plain(model) if "gguf_file" in where else model).eval()


class Float32Head(nn.Linear):
    """An output head that autocast leaves in float32.

    A float32 log-softmax of logits that were rounded to 16 bits comes too late: between -128 and -64, where many of
    GPT-2's lie, bf16 has steps of 0.5 and fp16 of 0.06; early in training a policy differs from its reference by less.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[…, d] -> [V] logits each, float32 (float64 stays float64)."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def _with_float32_head(model: Any) -> Any:
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = Float32Head  # its weight may be tied to the embedding's: the module has to stay
    return model


def _plain(model: Any) -> Any:
    """A GGUF model without its quantisation record: its weights are float32 by now, but it refuses to be saved."""
    from transformers import AutoModelForCausalLM

    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    return plain


def load_tokenizer(settings: Settings) -> Any:
    """The settings' tokenizer; it has an end-of-text token, or a ModelError is raised."""
    from transformers import AutoTokenizer

    with _location(settings) as where:
        try:  # revision: in `where`, a commit, for a Hub model
            tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        except Exception as error:
            raise ModelError(f"cannot load the tokenizer of {settings.model!r} ({_first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {settings.model!r} has no end-of-text token, which a response must end with"
        )
    # "<|endoftext|>" in a text is text: taken for the token, a row of the data could end responses where it likes
    tokenizer.split_special_tokens = True
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides a tokenizer's ids: its whole definition, or vocabulary and class where it has none."""
    if getattr(tokenizer, "is_fast", False):
        definition = tokenizer.backend_tokenizer.to_str()
    else:
        definition = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    return hashlib.sha256(f"{tokenizer.eos_token_id} {definition}".encode()).hexdigest()


def load_saved(folder: Path) -> Any:
    """A model that a step saved, in float32 on the CPU, dropout off. A local folder: there is no revision."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _nothing_pickled():
        model = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
        )
    return _with_float32_head(model).eval()


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save weights (safetensors, float32), configuration and tokenizer so that from_pretrained opens them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks, first to last: the longest list of modules in the model (GPT-2: transformer.h)."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of transformer blocks to freeze")
    return max(lists, key=len)


def embeddings(model: Any) -> list[nn.Module]:
    """The embeddings that the first block reads: of tokens and, where they are learned, of positions.

    GPT-2 ties its output head to the token embedding: one tensor, so freezing one freezes the other.
    """
    return [module for module in model.base_model.children() if isinstance(module, nn.Embedding)]


def freeze(model: Any, first_blocks: int, freeze_embeddings: bool = True) -> ParameterCount:
    """Freeze blocks 0 … first_blocks-1 and, unless told otherwise, the embeddings; everything else trains.

    Raises SettingsError if the model has fewer blocks. Returns the parameter counts.
    """
    stack = blocks(model)
    if not 0 <= first_blocks <= len(stack):
        raise SettingsError(f"freeze_layers is {first_blocks}, but the model has {len(stack)} blocks")
    model.requires_grad_(True)
    (frozen_part(model, first_blocks) if freeze_embeddings else stack[:first_blocks]).requires_grad_(False)
    return count_parameters(model)


def frozen_part(model: Any, first_blocks: int) -> nn.ModuleList:
    """The modules that `freeze` freezes: embeddings and the first blocks."""
    return nn.ModuleList([*embeddings(model), *blocks(model)[:first_blocks]])


def count_parameters(model: nn.Module) -> ParameterCount:
    """All parameters and the trainable ones; a tensor that two modules share counts once."""
    parameters = list(model.parameters())
    return ParameterCount(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))


def model_identity(settings: Settings) -> dict[str, Any]:
    """What decides the weights that `load_model` gives: name and commit, or the sha256 of each local file."""
    path = Path(settings.model)
    if settings.model == EMBEDDED:
        return {"name": EMBEDDED, "sha256": mini.fingerprint()}
    if os.path.isfile(path):
        return {"name": path.name, "sha256": file_hash(path)}
    if os.path.isdir(path):
        _check_folder(path)
        files = sorted([*path.glob("*.safetensors"), *path.glob("config.json")])
        return {"name": path.name, "sha256": {file.name: file_hash(file) for file in files}}
    return {"name": settings.model, "revision": settings.model_revision}


def model_commit(settings: Settings) -> str | None:
    """The commit that `load_model` loads from the Hub; None for a model that is not from there."""
    if settings.model == EMBEDDED or os.path.exists(settings.model):
        return None
    return resolve_revision(settings.model, settings.model_revision, "model")


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and values of all weights: equal if and only if the weights are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
