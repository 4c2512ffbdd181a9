"""Whether a tokenizer's chat template can be trained with, and whether it can render a pair: `tokens` does it then.

The course keeps dialogues as HH's text. With a template, `tokens.prompt_texts` renders a prompt up to where the answer
begins; the answer follows, then the one token that ends a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ModelError
from ..hh import ASSISTANT, HUMAN, Finding, Pair, as_messages
from ..tokens import TODAY, encode_texts, has_template, prompt_texts
from .sources import first_line

ANSWER = "An answer."
DIALOGUES = (
    f"{HUMAN} A question{ASSISTANT}",
    f"{HUMAN} A question{ASSISTANT} A first answer{HUMAN} Another{ASSISTANT}",
)


def end_of_turn(tokenizer: Any, name: str) -> str:
    """The token that the chat template ends an answer with: its text. Of a template that ends it with none, the eos.

    ModelError, which names the model, where the template cannot render a dialogue, renders a prompt otherwise once its
    answer follows, writes something of its own between them, or ends an answer with several tokens, or with none where
    the tokenizer has no end-of-text either.
    """
    end = ""
    for dialogue in DIALOGUES:
        try:
            prompt, whole = rendered(tokenizer, dialogue, ANSWER)
        except Exception as error:  # whatever a template raises, and what it is made of
            raise _refused(name, f"cannot be rendered ({first_line(error)})") from error
        if not whole.startswith(prompt):
            raise _refused(name, "renders a prompt otherwise once its answer follows")
        before, found, end = whole.removeprefix(prompt).partition(ANSWER)
        if before or not found:
            raise _refused(name, f"writes {before[:40]!r} between a prompt and its answer")
    if end.strip() and end[0].isspace():
        raise _refused(name, f"writes {end[:40]!r} behind an answer, blanks first")
    end = end.strip() or str(tokenizer.eos_token or "")
    if not end:
        raise _refused(name, "ends an answer with nothing, and the tokenizer has no end-of-text")
    if len(encode_texts(tokenizer, [end], special=True)[0]) > 1:
        raise _refused(name, f"ends an answer with {end[:40]!r}, which is more than one token")
    return end


def _refused(name: str, why: str) -> ModelError:
    return ModelError(f"the chat template of {name!r} {why}: train without it, --template none")


def rendered(tokenizer: Any, prompt: str, answer: str) -> tuple[str, str]:
    """A prompt in HH's text as the chat template renders it: alone, and with its answer."""
    (alone,) = prompt_texts(tokenizer, [prompt])
    messages = [*as_messages(prompt), {"role": "assistant", "content": answer.strip()}]
    template = TODAY + tokenizer.get_chat_template()
    return alone, str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))


def unrendered(tokenizer: Any, pairs: Sequence[Pair], split: str) -> list[Finding]:
    """The pairs that a chat template cannot render, and why; none without a template."""
    if not has_template(tokenizer):
        return []
    added, end = tokenizer.added_tokens_decoder.values(), tokenizer.eos_token
    special = [token.content for token in added if token.special or token.content == end]
    return [found for pair in pairs if (found := _unrendered(tokenizer, special, pair, split))]


def _unrendered(tokenizer: Any, special: Sequence[str], pair: Pair, split: str) -> Finding | None:
    for text in (pair.prompt, pair.chosen, pair.rejected):
        if held := next((token for token in special if token in text), None):
            return Finding(pair.index, f"holds {held}, which the chat template gives a meaning", split=split)
    for side in (pair.chosen, pair.rejected):
        try:
            prompt, whole = rendered(tokenizer, pair.prompt, side)
        except Exception as error:  # whatever a template raises: roles it does not know, or in an order of its own
            return Finding(pair.index, f"the chat template refuses it ({first_line(error)})", split=split)
        if not whole.startswith(prompt + side.strip()):
            return Finding(pair.index, "the chat template changes its texts", split=split)
    return None
