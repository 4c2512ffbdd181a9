"""The parts of a causal language model: its blocks, what is frozen, how much trains, and which weights it has."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from .errors import ModelError, SettingsError


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: all, and those that train."""

    total: int
    trainable: int


def blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks, first to last (GPT-2: transformer.h).

    They are the outermost list of as many modules as the configuration has layers: a longer list inside a block, such
    as the experts of a mixture, is not taken for them. Raises ModelError where not exactly one list fits.
    """
    layers = getattr(model.config, "num_hidden_layers", "no number of")
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    fitting = [name for name in outer if len(lists[name]) == layers]
    if len(fitting) != 1:
        raise ModelError(
            f"{type(model).__name__} has {layers} layers by its configuration, but its lists of modules are "
            + (", ".join(f"{name} ({len(lists[name])})" for name in outer) or "none")
            + ": which are the blocks to freeze cannot be told"
        )
    return lists[fitting[0]]


class _Reached(Exception): ...


def _run_to(model: Any, block: nn.Module) -> tuple[list[nn.Module], Tensor]:
    """Run one token up to a block: the modules that ran through, and the [1, 1, d] that the block would have read."""
    ran: list[nn.Module] = []
    read: list[Tensor] = []

    def _stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    to_block = block.register_forward_pre_hook(_stop, with_kwargs=True)
    hooks = (register_module_forward_hook(lambda m, *_: ran.append(m)), to_block)
    with suppress(_Reached):
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    for hook in hooks:
        hook.remove()
    return ran, read[0]


def embeddings(model: Any) -> list[nn.Module]:
    """What runs before the first block: embeddings of tokens and of learned positions, their norm or projection.

    GPT-2 ties its output head to the token embedding: one tensor, so freezing one freezes the other.
    """
    return _run_to(model, blocks(model)[0])[0]


def frozen_part(model: Any, first_blocks: int) -> nn.ModuleList:
    """The modules that `freeze` freezes: embeddings and the first blocks."""
    return nn.ModuleList([*embeddings(model), *blocks(model)[:first_blocks]])


def freeze(model: Any, first_blocks: int, freeze_embeddings: bool = True) -> ParameterCount:
    """Freeze blocks 0 … first_blocks-1 and, unless told otherwise, the embeddings; everything else trains.

    Returns the parameter counts. Raises SettingsError if the model has fewer blocks, ModelError if something that the
    first block that trains depends on is trained all the same.
    """
    stack = blocks(model)
    if not 0 <= first_blocks <= len(stack):
        raise SettingsError(f"freeze_layers is {first_blocks}, but the model has {len(stack)} blocks")
    model.requires_grad_(True)
    (frozen_part(model, first_blocks) if freeze_embeddings else stack[:first_blocks]).requires_grad_(False)
    if freeze_embeddings and first_blocks < len(stack) and _run_to(model, stack[first_blocks])[1].requires_grad:
        raise ModelError(f"{type(model).__name__}: something that block {first_blocks} reads from would go on training")
    return count_parameters(model)


def count_parameters(model: nn.Module) -> ParameterCount:
    """All parameters and the trainable ones; a tensor that two modules share counts once."""
    parameters = list(model.parameters())
    return ParameterCount(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and values of all weights: equal if and only if the weights are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
