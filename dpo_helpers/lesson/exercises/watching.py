"""What a DPO step of a learner does to a model, watched over a few updates (exercises 5.4 and 5.5).

The model is a GPT-2 of two tiny blocks. Its dropout drops all that a block adds, so that a policy in training mode
shows, and always in the same way: no random number has a say in what is recognised. It computes in float64, where
RMSprop does not make something of a gradient that is 0 but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...logprobs import pair_logprobs
from ...tokens import EncodedPair, PairBatch, collate

KEYS = ("loss", "reward_margin", "grad_norm", "learning_rate")
WARMUP = 2


@cache
def _made(seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3, resid_pdrop=1.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).double().eval()


def _model(seed: int) -> Any:
    """A model that depends on the seed alone, in eval mode."""
    return deepcopy(_made(seed))


def _policy(kind: str, learning_rate: float) -> tuple[Any, torch.optim.Optimizer]:
    """A policy whose embeddings and first block are frozen, with its optimizer, in two groups of parameters."""
    policy = _model(1)
    for frozen in (policy.transformer.wte, policy.transformer.wpe, policy.transformer.h[0]):
        frozen.requires_grad_(False)
    groups = [{"params": list(part.parameters())} for part in (policy.transformer.h[1], policy.transformer.ln_f)]
    make = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}[kind]
    return policy, make(groups, lr=learning_rate)


def _batches(updates: int) -> Iterator[PairBatch]:
    """So many batches of two or three pairs, all of different lengths."""
    pairs = [
        EncodedPair([1 + i, 5, 2][: 1 + i % 3], [3 + i, 9, 7, 0][i % 2 :], [11, 4 + i, 0][i % 3 :] or [0], i)
        for i in range(5)
    ]
    for number in range(updates):
        yield collate([pairs[(2 * number + i) % 5] for i in range(2 + number % 2)], 0)


def _weights(model: Any) -> Tensor:
    """All of them in a row, those next to the output first: what a message shows of them does train."""
    return torch.cat([parameter.detach().flatten() for parameter in reversed(list(model.parameters()))])


def _hangs(value: Any) -> bool:
    values = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(item, Tensor) and item.requires_grad for item in values)


def watch_step(step: Callable[..., Any], kind: str, rate: float, beta: float, limit: float) -> dict[str, Any]:
    """Three updates: what is returned, and what becomes of the policy."""
    (policy, optimizer), other = _policy(kind, rate), _model(2)
    mode, graph = "whether the policy is in training mode", "whether a returned tensor still hangs on its graph"
    seen: dict[str, Any] = {mode: False, graph: False}
    for number, batch in enumerate(_batches(3), start=1):
        with torch.no_grad():
            reference = pair_logprobs(other, batch)
        before = _weights(policy)
        loss = step(policy, optimizer, batch, *reference, beta, limit)
        seen |= {mode: seen[mode] or policy.training, graph: seen[graph] or _hangs(loss)}
        seen[f"the loss that update {number} returns"] = loss.detach() if isinstance(loss, Tensor) else loss
        seen[f"how far update {number} moves the weights"] = (_weights(policy) - before).norm().item()
        seen[f"the weights after update {number}"] = _weights(policy)
    return seen


def watch_update(update: Callable[..., Any], kind: str, rate: float, beta: float, limit: float) -> dict[str, Any]:
    """Four updates, of which two are the warm-up: the rows, and what happens to both models."""
    (policy, optimizer), reference = _policy(kind, rate), _model(2)
    mode, graph = "whether a model is in training mode", "whether something returned still hangs on its graph"
    gradients, moved = "whether the reference got gradients", "whether the reference has changed"
    seen: dict[str, Any] = {mode: False, graph: False, gradients: False, moved: False, "the type of a row": "dict"}
    start = _weights(reference)
    for step, batch in enumerate(_batches(4)):
        before = _weights(policy)
        row = update(step, policy, optimizer, batch, reference, beta, rate, WARMUP, limit)
        seen |= {mode: seen[mode] or policy.training or reference.training, graph: seen[graph] or _hangs(row)}
        nothing = row is None or row is ...
        seen["the type of a row"] = "dict" if isinstance(row, Mapping) else None if nothing else type(row).__name__
        for key in KEYS:
            value = row.get(key) if isinstance(row, Mapping) else None
            seen[f'"{key}" of step {step}'] = value.detach() if isinstance(value, Tensor) else value
        seen[f"how far step {step} moves the weights"] = (_weights(policy) - before).norm().item()
        seen[f"the weights after step {step}"] = _weights(policy)
    seen[gradients] = any(parameter.grad is not None for parameter in reference.parameters())
    seen[moved] = not torch.equal(_weights(reference), start)
    return seen


def cases() -> list[tuple[str, float, float, float]]:
    """(optimizer, learning rate, β, largest norm): clipped, hardly clipped, and with the course's optimizer."""
    return [("sgd", 0.5, 0.5, 0.1), ("sgd", 0.1, 0.5, 100.0), ("rmsprop", 1e-3, 0.1, 0.02)]
