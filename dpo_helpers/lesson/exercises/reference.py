"""Exercises of notebook 2, first part: log-probabilities of tokens and of responses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .core import Exercise, Mistake

_END = 0  # the id of end-of-text, and of padding, in the cases


def _pick(values: Tensor, ids: Tensor) -> Tensor:
    """values[t, ids[t]] for each t; [T, V] and [T] to [T], and the same with more dimensions in front."""
    return values.gather(-1, ids[..., None]).squeeze(-1)


# 2.1


def _token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    return _pick(logits[:-1].log_softmax(dim=-1), ids[1:])


def _sequences() -> list[tuple[Tensor, Tensor]]:
    """Four positions, three tokens; two positions, two tokens; and tokens of which the model is all but certain."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.5, -0.5], [-1.0, 3.0, 1.0], [0.0, -2.0, 1.0]])
    sure = torch.tensor([[200.0, 0.0, 50.0], [-150.0, 0.0, -1.0], [1.0, 0.0, 0.5]])
    return [
        (logits, torch.tensor([2, 0, 1, 2])),
        (torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([1, 0])),
        (sure, torch.tensor([0, 1, 0])),
    ]


# 2.2


def _each_token(logits: Tensor, ids: Tensor) -> Tensor:
    return _pick(logits[:, :-1].log_softmax(dim=-1), ids[:, 1:])


def _response_logps(logits: Tensor, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    return (_each_token(logits, ids) * response_mask[:, 1:]).sum(dim=-1)


def _scored(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The sum over the response of something else than the log-softmax: change(logits), [N, T − 1, V]."""
    return lambda logits, ids, attention, mask: (_pick(change(logits[:, :-1]), ids[:, 1:]) * mask[:, 1:]).sum(dim=-1)


def _summed(where: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The sum over a mask, [N, T], that is made of (ids, attention mask, response mask)."""
    return lambda logits, ids, attention, mask: _response_logps(logits, ids, attention, where(ids, attention, mask))


def _taken(take: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """What is made of the tokens' log-probabilities and the shifted response mask, [N, T − 1] each."""
    return lambda logits, ids, attention, mask: take(_each_token(logits, ids), mask[:, 1:])


def _batches() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Two rows: prompt 2, response 2, padding 1; prompt 1, response 3, padding 1. Then three, the first one cut."""
    ids = torch.tensor([[1, 2, 1, _END, _END], [2, 2, 1, _END, _END]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    response_mask = torch.tensor([[False, False, True, True, False], [False, True, True, True, False]])
    logits = torch.tensor([
        [[0.5, 1.0, -1.0], [2.0, 0.0, 1.0], [-1.0, 0.5, 0.0], [1.5, -0.5, 0.0], [0.0, 1.0, 2.0]],
        [[-2.0, 0.0, 1.0], [0.0, 1.5, 0.5], [1.0, -1.0, 0.0], [0.0, 0.5, 2.5], [1.0, 0.0, -1.5]],
    ])  # fmt: skip
    more = torch.tensor([[3, 1, 2, 3], [1, 3, _END, _END], [2, 3, 1, _END]])
    more_logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    more_logits[2, 1] = torch.tensor([0.0, -150.0, 1.0, 2.0])  # the next token is all but impossible
    in_response = torch.tensor([[False, False, True, True], [False, True, True, False], [False, False, True, True]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    return [(logits, ids, attention_mask, response_mask), (more_logits, more, real, in_response)]


EXERCISES = (
    Exercise(
        "2.1", "The log-probability of each token", 2, 8, _token_logps,
        (
            Mistake("You did not shift",
                    "the logits at position t predict the token at t + 1; yours are of the token just read",
                    lambda logits, ids: _pick(logits[1:].log_softmax(dim=-1), ids[1:]),
                    (lambda logits, ids: _pick(logits[:-1].log_softmax(dim=-1), ids[:-1]),)),
            Mistake("You did not shift, and kept all T positions",
                    "the logits at position t predict the token at t + 1, so T tokens have T − 1 predictions",
                    lambda logits, ids: _pick(logits.log_softmax(dim=-1), ids)),
            Mistake("You shifted the other way",
                    "position t predicts the token after it, not the one before: logits[:-1] goes with ids[1:]",
                    lambda logits, ids: _pick(logits[1:].log_softmax(dim=-1), ids[:-1])),
            Mistake("There is a place too many",
                    "T tokens have T − 1 predictions: none for the first token, and none after the last",
                    lambda logits, ids: _pick(logits.log_softmax(dim=-1), ids.roll(-1)),
                    (lambda logits, ids: torch.cat([torch.zeros(1), _token_logps(logits, ids)]),
                     lambda logits, ids: torch.cat([_token_logps(logits, ids), torch.zeros(1)]))),
            Mistake("Those are logits",
                    "a logit says nothing until it is compared with the others: take the log-softmax first",
                    lambda logits, ids: _pick(logits[:-1], ids[1:])),
            Mistake("Those are probabilities",
                    "take their logarithm: probabilities of tokens multiply, log-probabilities add up",
                    lambda logits, ids: _pick(logits[:-1].softmax(dim=-1), ids[1:])),
            Mistake("The softmax is taken first and its logarithm after",
                    "a small probability becomes 0 in 32 bits, and its logarithm −∞; log_softmax keeps it",
                    lambda logits, ids: _pick(logits[:-1].softmax(dim=-1).log(), ids[1:])),
            Mistake("The softmax runs over positions",
                    "the probabilities of all V tokens at one position sum to 1, so the softmax goes over the last "
                    "dimension",
                    lambda logits, ids: _pick(logits[:-1].log_softmax(dim=0), ids[1:]),
                    (lambda logits, ids: _pick(logits.log_softmax(dim=0)[:-1], ids[1:]),)),
            Mistake("You summed already",
                    "the result is one value per token, [T − 1]; which of them count comes later",
                    lambda logits, ids: _token_logps(logits, ids).sum(),
                    (lambda logits, ids: _token_logps(logits, ids).mean(),)),
            Mistake("That is a loss",
                    "a cross-entropy is minus the log-probability, and by default the mean of all; asked for are the "
                    "log-probabilities themselves",
                    lambda logits, ids: -_token_logps(logits, ids),
                    (lambda logits, ids: -_token_logps(logits, ids).mean(),
                     lambda logits, ids: -_token_logps(logits, ids).sum())),
            Mistake("You kept all V tokens",
                    "at each position pick the one token that comes next: gather with ids[1:]",
                    lambda logits, ids: logits[:-1].log_softmax(dim=-1),
                    (lambda logits, ids: logits.log_softmax(dim=-1),)),
            Mistake("Every position is combined with every token",
                    "log_p[:, ids] takes these columns of all rows; gather takes one of each row",
                    lambda logits, ids: logits[:-1].log_softmax(dim=-1)[:, ids[1:]]),
            Mistake("That is the likeliest token",
                    "asked for is the token that stands in ids, however unlikely it is",
                    lambda logits, ids: logits[:-1].log_softmax(dim=-1).max(dim=-1).values),
        ),
        cases=_sequences,
    ),
    Exercise(
        "2.2", "log p(response | prompt) of a batch", 2, 10, _response_logps,
        (
            Mistake("You averaged over tokens",
                    "the probability of a response is the product over its tokens, so its log is their sum",
                    _taken(lambda logps, mask: (logps * mask).sum(dim=-1) / mask.sum(dim=-1)),
                    (_taken(lambda logps, mask: (logps * mask).mean(dim=-1)),)),
            Mistake("The prompt is counted",
                    "attention_mask marks all real text; log p(response | prompt) takes response_mask",
                    _summed(lambda ids, attention, mask: attention)),
            Mistake("Prompt and padding are counted",
                    "multiply by the mask before you sum: only response tokens are asked for",
                    _taken(lambda logps, mask: logps.sum(dim=-1))),
            Mistake("End-of-text is dropped",
                    "it is the last token of a response, and padding has its id too: use the mask, not the id",
                    _summed(lambda ids, attention, mask: mask & (ids != _END))),
            Mistake("You went by the id of padding",
                    "end-of-text has it too, and prompts have none of it: response_mask says what counts",
                    _summed(lambda ids, attention, mask: ids != _END)),
            Mistake("A token of each response is dropped",
                    "shift once: response_mask[:, 1:] begins where the log-probabilities begin, and is True on all "
                    "response tokens",
                    _taken(lambda logps, mask: (logps[:, 1:] * mask[:, :-1] * mask[:, 1:]).sum(dim=-1)),
                    (_taken(lambda logps, mask: (logps[:, :-1] * mask[:, :-1] * mask[:, 1:]).sum(dim=-1)),)),
            Mistake("You summed over the whole batch",
                    "the result is one value per row, [N]: sum over the last dimension",
                    _taken(lambda logps, mask: (logps * mask).sum()),
                    (_taken(lambda logps, mask: logps[mask].mean()),)),
            Mistake("You summed over the rows",
                    "rows are different texts; sum over the tokens of each, the last dimension",
                    _taken(lambda logps, mask: (logps * mask).sum(dim=0))),
            Mistake("You did not sum",
                    "the log-probability of a response is the sum over its tokens: one value per row, [N]",
                    _taken(lambda logps, mask: logps * mask),
                    (_taken(lambda logps, mask: logps[mask]), _taken(lambda logps, mask: logps))),
            Mistake("The mask is not shifted",
                    "token log-probabilities begin with the token at position 1, so the mask must too: "
                    "response_mask[:, 1:]",
                    lambda logits, ids, attention, mask: (_each_token(logits, ids) * mask[:, :-1]).sum(dim=-1)),
            Mistake("The logits are not shifted",
                    "the logits at position t predict the token at t + 1, as in exercise 2.1",
                    lambda logits, ids, attention, mask: (_pick(logits.log_softmax(dim=-1), ids) * mask).sum(dim=-1),
                    (lambda logits, ids, attention, mask: _response_logps(
                        torch.cat([logits[:, 1:], logits[:, :1]], dim=1), ids, attention, mask),
                     lambda logits, ids, attention, mask: (
                         _pick(logits[:, :-1].log_softmax(dim=-1), ids[:, :-1]) * mask[:, 1:]).sum(dim=-1))),
            Mistake("Those are logits",
                    "a logit says nothing until it is compared with the others: take the log-softmax first",
                    _scored(lambda logits: logits)),
            Mistake("Probabilities are added",
                    "probabilities of tokens multiply; what adds up are their logarithms",
                    _scored(lambda logits: logits.softmax(dim=-1)),
                    (lambda *batch: _scored(lambda logits: logits.softmax(dim=-1))(*batch).log(),)),
            Mistake("The mask makes the product 0",
                    "a probability of 0 stands for every token that does not count, and the product is 0; in a sum of "
                    "logarithms the same mask only leaves them out",
                    lambda logits, ids, attention, mask: (_each_token(logits, ids).exp() * mask[:, 1:]).prod(dim=-1)),
            Mistake("The softmax is taken first and its logarithm after",
                    "a small probability becomes 0 in 32 bits, and its logarithm −∞; log_softmax keeps it",
                    _scored(lambda logits: logits.softmax(dim=-1).log())),
            Mistake("The softmax runs over the wrong dimension",
                    "the probabilities of all V tokens at one position sum to 1: dim=-1",
                    _scored(lambda logits: logits.log_softmax(dim=1)),
                    (_scored(lambda logits: logits.log_softmax(dim=0)),)),
        ),
        cases=_batches,
    ),
)  # fmt: skip
