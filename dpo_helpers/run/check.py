"""Whether a model and its tokenizer are what the course's numbers rest on: looked at once, before any work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, SettingsError
from ..settings import Settings
from ..tokens import start_ids

NOISE = 1e-4  # of the spread of log-probabilities: rounding stays below 3e-5, and faults are far above
LAST_DIGITS = 1e-6  # of a log-probability itself: where all tokens are almost as likely, rounding is all the spread


def check_limits(config: Any, tokenizer: Any, settings: Settings) -> None:
    """ModelError unless the model knows every id of its tokenizer, SettingsError where it reads too few tokens.

    config: the model's. Special tokens count where the course writes them: text never becomes one.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {*tokenizer.get_vocab().values()} - special | {tokenizer.eos_token_id, *start_ids(tokenizer)}
    known, limit = config.get_text_config().vocab_size, getattr(config, "max_position_embeddings", None)
    if max(ids) >= known:
        raise ModelError(
            f"the tokenizer of {settings.model!r} has ids up to {max(ids)}, but the model knows {known} tokens: "
            "take the tokenizer that belongs to it"
        )
    sampled = settings.max_prompt_length + settings.max_new_tokens
    for name, wanted in (("max_length", settings.max_length), ("max_prompt_length + max_new_tokens", sampled)):
        if limit and wanted > limit:
            raise SettingsError(f"{name} is {wanted}, but the model {settings.model!r} reads {limit} tokens at most")


@torch.no_grad()
def check_model(model: Any, length: int) -> None:
    """ModelError unless the log-probabilities of a text depend on it alone, and each on what comes before it.

    Tried on random ids: a short row alone, beside one of `length` tokens, alone again, and with another last token.
    """
    known, short = model.config.get_text_config().vocab_size, min(8, length - 1)
    ids = torch.randint(known, (2, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, short:] = 0

    def _logps(rows: int, tokens: int) -> Tensor:  # of the short row, [short, V]
        run = {"input_ids": ids[:rows, :tokens], "attention_mask": mask[:rows, :tokens], "use_cache": False}
        logits: Tensor = model(**run).logits[0, :short]
        return logits.float().log_softmax(dim=-1)

    alone, beside, again = _logps(1, short), _logps(2, length), _logps(1, short)
    ids[0, short - 1] = (ids[0, short - 1] + 1) % known
    later = _logps(1, short)
    for one, other, what, why in (
        (alone, beside, "change with the texts beside it", "a dynamic RoPE does that: take another rope_type"),
        (alone, again, "change with the texts before it", "they cannot be compared"),
        (alone[:-1], later[:-1], "depend on what comes later", "only a causal language model writes responses"),
    ):
        apart = (one - other).abs().max().nan_to_num(torch.inf)
        if apart > NOISE * one.std() + LAST_DIGITS * one.abs().max():
            raise ModelError(f"{type(model).__name__}: log-probabilities of a text {what}, by {apart:.2g} nats; {why}")
