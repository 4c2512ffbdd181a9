"""Whether a model and its tokenizer are what the course's numbers rest on: looked at once, before any work."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from ..errors import ModelError, SettingsError
from ..generation import continued
from ..hh import single_turn
from ..settings import Settings
from ..tokens import encode_prompts
from .sources import first_line

NOISE = 1e-4  # of the spread of log-probabilities: rounding stays below 3e-5, and faults are far above
LAST_DIGITS = 1e-6  # of a log-probability itself: where all tokens are almost as likely, rounding is all the spread


def check_limits(config: Any, tokenizer: Any, settings: Settings) -> None:
    """ModelError unless the model knows its tokenizer's ids, SettingsError where it has too few tokens or blocks.

    config: the model's. Special tokens count where the course writes them: text never becomes one.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    (written,) = encode_prompts(tokenizer, [single_turn("a")], settings.max_prompt_length)
    ids = {*tokenizer.get_vocab().values()} - special | {tokenizer.eos_token_id, *written}
    text = config.get_text_config()
    if max(ids) >= text.vocab_size:
        raise ModelError(
            f"the tokenizer of {settings.model!r} has ids up to {max(ids)}, but the model knows {text.vocab_size} "
            "tokens: take the tokenizer that belongs to it"
        )
    sampled = settings.max_prompt_length + settings.max_new_tokens
    reads, has = "reads {} tokens at most", "has {} blocks"
    for name, wanted, limit, most in (
        ("max_length", settings.max_length, "max_position_embeddings", reads),
        ("max_prompt_length + max_new_tokens", sampled, "max_position_embeddings", reads),
        ("freeze_layers", settings.freeze_layers, "num_hidden_layers", has),
    ):
        allowed = getattr(text, limit, None)
        if allowed and wanted > allowed:
            raise SettingsError(f"{name} is {wanted}, but the model {settings.model!r} {most.format(allowed)}")


@torch.no_grad()
def check_model(model: Any, length: int) -> None:
    """ModelError unless the log-probabilities of a text depend on it alone, and each on what comes before it.

    Tried on random ids: a short row alone, beside one of `length` tokens, alone again, with another last token, and as
    `generation.sample` reads it, with padding on its left and a cache. ModelError too where it cannot read so many.
    """
    _check_reads(model, length)
    length = max(length, 3)  # to change a token that has one before it
    known, short = model.config.get_text_config().vocab_size, min(8, length - 1)
    ids = torch.randint(known, (2, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, short:] = 0

    def _logps(ids: Tensor, tokens: int) -> Tensor:  # of the first row's first tokens, [tokens, V]
        run = {"input_ids": ids, "attention_mask": mask[: len(ids), : ids.shape[1]], "use_cache": False}
        logits: Tensor = model(**run).logits[0, :tokens]
        return logits.float().log_softmax(dim=-1)

    alone, beside, again = _logps(ids[:1, :short], short), _logps(ids, short), _logps(ids[:1, :short], short)
    sampled, continued = _sample(model, ids[:, : length - 1], short)
    mask[0, short] = 1
    scored = _logps(continued, short + 1)[-2:]
    ids[0, short - 1] = (ids[0, short - 1] + 1) % known
    later = _logps(ids[:1, :short], short)
    for one, other, what, why in (
        (alone, beside, "change with the texts beside it", "a dynamic RoPE does that: take another rope_type"),
        (alone, again, "change with the texts before it", "they cannot be compared"),
        (alone[:-1], later[:-1], "depend on what comes later", "only a causal language model writes responses"),
        (scored, sampled, "change where it is sampled in a batch", "samples would be of another distribution"),
    ):
        apart = (one - other).abs().max().nan_to_num(torch.inf)
        if apart > NOISE * one.std() + LAST_DIGITS * one.abs().max():
            raise ModelError(f"{type(model).__name__}: log-probabilities of a text {what}, by {apart:.2g} nats; {why}")


def _check_reads(model: Any, length: int) -> None:
    """ModelError, with the number of tokens that it reads, where a model cannot read `length`: not all say a limit."""

    token = model.config.get_text_config().vocab_size - 1

    def _refusal(tokens: int) -> Exception | None:
        try:
            model(input_ids=torch.full((1, tokens), token, device=model.device), use_cache=False)
        except Exception as error:  # each family has its own
            if should_reduce_batch_size(error):
                raise
            return error
        return None

    if error := _refusal(length):
        most = bisect_left(range(1, length), True, key=lambda tokens: _refusal(tokens) is not None)
        raise ModelError(
            f"{type(model).__name__} reads {most} tokens at most, but max_length or max_prompt_length + max_new_tokens "
            f"is {length} ({first_line(error)})"
        )


def _sample(model: Any, ids: Tensor, short: int) -> tuple[Tensor, Tensor]:
    """Two tokens after the first row's first ones: their log-probabilities, [2, 2, V], and the row with one of them.

    As in a run, the prompt comes twice and is run once, beside one that ends at its first token and leaves the batch.
    """
    first, seen = ids[0, :short].tolist(), list[Tensor]()
    uniforms = torch.tensor([[0.0, 0.0], *[[0.5, 0.0]] * 2], device=model.device)  # the first token, one in the middle
    drawn = continued(model, [ids[1].tolist(), first, first], uniforms, eos=0, temperature=1000, seen=seen)
    logps = torch.stack(seen, dim=1)[1:].float().log_softmax(dim=-1)
    return logps, torch.cat([ids[:1, :short], drawn[1:2, :1]], dim=1)
