"""Exercises of notebook 2: log-probabilities of responses, and what trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .core import Exercise, Mistake

_END = 0  # the id of end-of-text, and of padding, in the cases


def _pick(values: Tensor, ids: Tensor) -> Tensor:
    """values[t, ids[t]] for each t; [T, V] and [T] to [T]."""
    return values.gather(-1, ids[..., None]).squeeze(-1)


def _token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    return _pick(logits[:-1].log_softmax(dim=-1), ids[1:])


def _sequences() -> list[tuple[Tensor, Tensor]]:
    """Four positions, three tokens; then two positions, two tokens. No two logits of a position are equal."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.5, -0.5], [-1.0, 3.0, 1.0], [0.0, -2.0, 1.0]])
    return [
        (logits, torch.tensor([2, 0, 1, 2])),
        (torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([1, 0])),
    ]


def _each_token(logits: Tensor, ids: Tensor) -> Tensor:
    return _pick(logits[:, :-1].log_softmax(dim=-1), ids[:, 1:])


def _response_logps(logits: Tensor, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    return (_each_token(logits, ids) * response_mask[:, 1:]).sum(dim=-1)


def _logps_mean(logits: Tensor, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    return _response_logps(logits, ids, attention_mask, response_mask) / response_mask.sum(dim=-1)


def _logps_prompt(logits: Tensor, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    return _response_logps(logits, ids, attention_mask, attention_mask)


def _logps_everything(logits: Tensor, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    return _each_token(logits, ids).sum(dim=-1)


def _logps_no_end(logits: Tensor, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    return _response_logps(logits, ids, attention_mask, response_mask & (ids != _END))


def _logps_batch(logits: Tensor, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    return _response_logps(logits, ids, attention_mask, response_mask).sum()


def _logps_mask_unshifted(logits: Tensor, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    return (_each_token(logits, ids) * response_mask[:, :-1]).sum(dim=-1)


def _logps_unshifted(logits: Tensor, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    return (_pick(logits.log_softmax(dim=-1), ids) * response_mask).sum(dim=-1)


def _batches() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Two rows of five positions: prompt 2, response 2, padding 1; prompt 1, response 3, padding 1."""
    ids = torch.tensor([[1, 2, 1, _END, _END], [2, 2, 1, _END, _END]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    response_mask = torch.tensor([[False, False, True, True, False], [False, True, True, True, False]])
    logits = torch.tensor([
        [[0.5, 1.0, -1.0], [2.0, 0.0, 1.0], [-1.0, 0.5, 0.0], [1.5, -0.5, 0.0], [0.0, 1.0, 2.0]],
        [[-2.0, 0.0, 1.0], [0.0, 1.5, 0.5], [1.0, -1.0, 0.0], [0.0, 0.5, 2.5], [1.0, 0.0, -1.5]],
    ])  # fmt: skip
    return [(logits, ids, attention_mask, response_mask)]


# GPT-2: width, parameters of a block (attention 4d² + 4d, two-layer network 8d² + 5d, two layer norms 4d), of a norm
_D = 768
_BLOCK, _NORM = 12 * _D**2 + 13 * _D, 2 * _D
_TOKENS, _POSITIONS = 50_257 * _D, 1_024 * _D


def _block_of(name: str) -> int | None:
    """The block that a parameter of GPT-2 belongs to; None outside the blocks."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "h" else None


def _names_that_train(
    names: Sequence[str],
    frozen_blocks: int,
    *,
    frozen: Callable[[int, int], bool] = lambda block, k: block < k,
    outside: Sequence[str] = ("transformer.ln_f.",),
) -> list[str]:
    """The names that train; the keywords are what people do instead: which blocks freeze, what trains outside them."""
    found = []
    for name in names:
        block = _block_of(name)
        trains = name.startswith(tuple(outside)) if block is None else not frozen(block, frozen_blocks)
        found += [name] if trains else []
    return found


def _frozen_by_prefix(block: int, k: int) -> bool:
    return any(f"transformer.h.{block}".startswith(f"transformer.h.{i}") for i in range(k))


def _names() -> list[tuple[list[str], int]]:
    """Some of the names of a GPT-2 of 12 blocks, in its order, with the first 2 and the first 11 blocks frozen."""
    blocks = [f"transformer.h.{i}.ln_1.bias" for i in (0, 1, 2, 10, 11)]
    names = ["transformer.wte.weight", "transformer.wpe.weight", *blocks, "transformer.ln_f.bias", "lm_head.weight"]
    return [(names, 2), (names, 11)]


EXERCISES = (
    Exercise(
        "2.1", "The log-probability of each token", 2, 8, _token_logps,
        (
            Mistake("You did not shift",
                    "the logits at position t predict the token at t + 1; yours are of the token just read",
                    lambda logits, ids: _pick(logits[1:].log_softmax(dim=-1), ids[1:])),
            Mistake("You did not shift, and kept all T positions",
                    "the logits at position t predict the token at t + 1, so T tokens have T − 1 predictions",
                    lambda logits, ids: _pick(logits.log_softmax(dim=-1), ids)),
            Mistake("You shifted the other way",
                    "position t predicts the token after it, not the one before: logits[:-1] goes with ids[1:]",
                    lambda logits, ids: _pick(logits[1:].log_softmax(dim=-1), ids[:-1])),
            Mistake("Those are logits",
                    "a logit says nothing until it is compared with the others: take the log-softmax first",
                    lambda logits, ids: _pick(logits[:-1], ids[1:])),
            Mistake("Those are probabilities",
                    "take their logarithm: probabilities of tokens multiply, log-probabilities add up",
                    lambda logits, ids: _pick(logits[:-1].softmax(dim=-1), ids[1:])),
            Mistake("The softmax runs over positions",
                    "the probabilities of all V tokens at one position sum to 1, so the softmax goes over the last "
                    "dimension",
                    lambda logits, ids: _pick(logits[:-1].log_softmax(dim=0), ids[1:])),
            Mistake("You summed already",
                    "the result is one value a token, [T − 1]; which of them count comes later",
                    lambda logits, ids: _token_logps(logits, ids).sum()),
        ),
        cases=_sequences,
    ),
    Exercise(
        "2.2", "log p(response | prompt) of a batch", 2, 10, _response_logps,
        (
            Mistake("You averaged over tokens",
                    "the probability of a response is the product over its tokens, so its log is their sum",
                    _logps_mean),
            Mistake("The prompt is counted",
                    "attention_mask marks all real text; log p(response | prompt) takes response_mask",
                    _logps_prompt),
            Mistake("Prompt and padding are counted",
                    "multiply by the mask before you sum: only response tokens are asked for",
                    _logps_everything),
            Mistake("End-of-text is dropped",
                    "it is the last token of a response, and padding has its id too: use the mask, not the id",
                    _logps_no_end),
            Mistake("You summed over the whole batch",
                    "the result is one value a row, [N]: sum over the last dimension",
                    _logps_batch),
            Mistake("The mask is not shifted",
                    "token log-probabilities begin with the token at position 1, so the mask must too: "
                    "response_mask[:, 1:]",
                    _logps_mask_unshifted),
            Mistake("The logits are not shifted",
                    "the logits at position t predict the token at t + 1, as in exercise 2.1",
                    _logps_unshifted),
        ),
        cases=_batches,
    ),
    Exercise(
        "2.3", "What trains in GPT-2", 1, 5, 2 * _BLOCK + _NORM,
        (
            Mistake("The output head is counted",
                    "GPT-2's head is the token embedding, one tensor, which is frozen with the embeddings",
                    2 * _BLOCK + _NORM + _TOKENS),
            Mistake("The final layer norm is forgotten",
                    "it stands behind the last block and is not frozen: 2d more",
                    2 * _BLOCK),
            Mistake("The embeddings are counted",
                    "both stand before the first block and are frozen with it, of tokens and of positions",
                    2 * _BLOCK + _NORM + _TOKENS + _POSITIONS),
            Mistake("The position embeddings are counted",
                    "they stand before the first block and are frozen with it, as the token embeddings are",
                    2 * _BLOCK + _NORM + _POSITIONS),
            Mistake("That is what 10 blocks and the layer norm have",
                    "those blocks are frozen; the other 2 of 12 train",
                    10 * _BLOCK + _NORM),
            Mistake("Biases and layer norms of the blocks are forgotten",
                    "a block has 12d² weights in its matrices, and 13d more in its biases and its two layer norms",
                    2 * 12 * _D**2 + _NORM),
        ),
        tolerance=1e-9,  # the layer norm is one part in ten thousand
    ),
    Exercise(
        "2.4", "Which weights train, by name", 2, 10, _names_that_train,
        (
            Mistake("Blocks 10 and 11 are frozen with block 1",
                    "“transformer.h.1” is also how “transformer.h.10” begins; compare with the dot behind the number",
                    lambda names, k: _names_that_train(names, k, frozen=_frozen_by_prefix)),
            Mistake("One block too many is frozen",
                    "blocks count from 0: the first k are 0 … k − 1",
                    lambda names, k: _names_that_train(names, k, frozen=lambda block, k: block <= k)),
            Mistake("The last blocks are frozen",
                    "the first ones are to be frozen, next to the input; those next to the output train",
                    lambda names, k: _names_that_train(names, k, frozen=lambda block, k: block >= 12 - k)),
            Mistake("You listed the frozen blocks",
                    "the result is what trains: everything else of the blocks, and the final layer norm",
                    lambda names, k: _names_that_train(names, k, frozen=lambda block, k: block >= k)),
            Mistake("The output head is listed",
                    "lm_head.weight is the same tensor as transformer.wte.weight, which is frozen",
                    lambda names, k: _names_that_train(names, k, outside=("transformer.ln_f.", "lm_head."))),
            Mistake("The final layer norm is missing",
                    "transformer.ln_f stands behind the last block; nothing freezes it",
                    lambda names, k: _names_that_train(names, k, outside=())),
            Mistake("The embeddings are listed",
                    "wte and wpe stand before the first block and are frozen with it, and the head with wte",
                    lambda names, k: _names_that_train(names, k, outside=("transformer.", "lm_head."))),
        ),
        cases=_names,
    ),
)  # fmt: skip
