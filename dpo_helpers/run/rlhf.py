"""RLHF beside DPO: a reward model, a policy gradient with a KL price, best-of-n, and DPO on the policy's own samples.

Every training here is `training.train`: a scorer says what a model makes of a batch, an objective turns that into
losses. A response is a list of token ids, with end-of-text where it ended; a `Score` rates responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..device import Compute
from ..evaluation import score_pairs
from ..fast.engine import FastScorer
from ..generation import continued
from ..logprobs import BOTH, PlainScorer, Scorer
from ..tokens import EncodedPair, collate, padded
from ..training import DPOObjective, MetricsRow, TrainPlan, train

# token ids of N prompts and of N responses -> how good each response is, [N] float32 on the CPU
Score = Callable[[Sequence[list[int]], Sequence[list[int]]], Tensor]


class RewardModel(nn.Module):
    """A causal language model without its output head, and a number instead: how good the text before it is.

    model: one of transformers, with its first blocks frozen by `models.freeze`; its weights are trained in place. The
    head starts at 0, so all scores do, and the first loss is ln 2.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.base = model.base_model
        self.head = nn.Linear(model.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.to(model.device)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The score of each row, [N], read at its last token, which is never padding. ids, attention_mask: [N, T]."""
        hidden = self.base(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # [N, T, d]
        last = attention_mask.sum(dim=-1) - 1  # rows are padded on the right, [N]
        return self.head(hidden[torch.arange(len(ids), device=ids.device), last]).squeeze(-1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def score(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        """As `Score`."""
        order, scores = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i])), []
        for start in range(0, len(order), 32):
            rows = padded([[*prompts[i], *responses[i]] for i in order[start : start + 32]])
            scores.append(self(*(each.to(self.base.device) for each in rows)).float().cpu())
        return torch.cat(scores)[torch.tensor(order).argsort()]


@dataclass(frozen=True)
class RewardScorer:
    """Scores of both responses of pairs under a `RewardModel`, as a `logprobs.Scorer`."""

    pairs: Sequence[EncodedPair]
    pad_id: int

    def __call__(self, model: Any, at: Sequence[int], sides: Sequence[str] = BOTH) -> tuple[Tensor, ...]:
        """(Scores of the chosen responses, of the rejected ones), [B] each."""
        batch = collate([self.pairs[i] for i in at], self.pad_id).to(model.base.device)
        return tuple(model(batch.ids, batch.attention_mask).chunk(2))


@dataclass(frozen=True)
class BradleyTerry:
    """-log σ(score of the chosen - score of the rejected) (Ouyang et al. 2022, eq. 1, with one pair per prompt)."""

    sides: ClassVar[tuple[str, ...]] = BOTH

    def __call__(self, at: Sequence[int], chosen: Tensor, rejected: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses; the metrics are the margin of the scores, and whether it is above 0; [B] each."""
        margin = chosen - rejected
        return -nn.functional.logsigmoid(margin), {"margin": margin.detach(), "accuracy": (margin > 0).float()}


def leave_one_out(rewards: Tensor) -> Tensor:
    """Reward of each sample minus the mean reward of the other k - 1 of its prompt: [B, k], k at least 2."""
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def rloo_losses(
    logps: Tensor, old: Tensor, reference: Tensor, scores: Tensor, beta: float, clip: float | None = None
) -> Tensor:
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740): a loss per prompt.

    Tensors are [B, k], of k samples for each of B prompts: log-probabilities under the policy (logps, with gradient),
    the policy that sampled (old) and π_ref, and scores of any reward. beta: price of a nat of KL. Returns [B].
    With old = logps.detach(), as where each sample serves one update, all losses are 0: their gradient is what counts.
    clip: PPO's ε: no gradient where the policy left the sampling one by more (Schulman et al. 2017, eq. 7).
    """
    rewards = scores - beta * (old - reference)
    advantages = leave_one_out(rewards).detach()
    ratio = (logps - old).exp()
    gain = ratio * advantages
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain.mean(dim=1)


@dataclass(frozen=True)
class Rloo:
    """`rloo_losses` where each sample serves one update, so that the policy that sampled is the one that trains."""

    sides: ClassVar[tuple[str, ...]] = ("policy",)
    beta: float

    def __call__(
        self, at: Sequence[int], logps: Tensor, reference: Tensor, scores: Tensor, lengths: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses; the metrics are means over the samples of a prompt: score, k1 in nats (estimates the KL), length."""
        losses = rloo_losses(logps, logps.detach(), reference, scores, self.beta)
        k1 = (logps.detach() - reference).mean(dim=1)
        return losses, {"score": scores.mean(dim=1), "k1": k1, "length": lengths.mean(dim=1)}


@dataclass
class OnPolicy:
    """A scorer that samples: k responses of the model itself to each prompt, with all that `Rloo` needs of them.

    prompts: token ids. reference: π_ref. score: the reward. frozen: how many first blocks the model shares with π_ref,
    for the fast path; with 0 it is the plain one. k: even. tokens: counts the sampled ones.
    """

    prompts: Sequence[list[int]]
    reference: Any
    score: Score
    eos: int
    frozen: int = 0
    k: int = 4
    max_new_tokens: int = 64
    tokens: int = 0

    def scorer(self, pairs: Sequence[EncodedPair]) -> Scorer:
        """Where log-probabilities of pairs come from."""
        if not self.frozen:
            return PlainScorer(pairs, self.eos)
        return FastScorer(self.reference, pairs, self.frozen)

    @torch.no_grad()
    def draw(self, model: Any, prompts: Sequence[list[int]], k: int) -> list[EncodedPair]:
        """k responses to each of P prompts at temperature 1, from torch's seed: k/2 pairs per prompt, side by side."""
        prompts = [prompt for prompt in prompts for _ in range(k)]
        uniforms = torch.rand(len(prompts), self.max_new_tokens, dtype=torch.float64).to(model.device)
        drawn = continued(model, prompts, uniforms, self.eos, temperature=1.0).tolist()
        responses = [row[: row.index(self.eos) + 1] if self.eos in row else row for row in drawn]
        self.tokens += sum(map(len, responses))
        return list(map(EncodedPair, prompts[::2], responses[::2], responses[1::2]))

    def scores(self, pairs: Sequence[EncodedPair]) -> Tensor:
        """The score of both responses of n pairs, [n, 2]."""
        prompts, sides = [p.prompt for p in pairs], ([p.chosen for p in pairs], [p.rejected for p in pairs])
        return torch.stack([self.score(prompts, side) for side in sides], dim=1)

    def __call__(self, model: Any, at: Sequence[int], sides: Sequence[str] = ()) -> tuple[Tensor, ...]:
        """Log-probabilities under the model, with gradient, and under π_ref; scores; lengths in tokens: [B, k] each."""
        pairs = self.draw(model, [self.prompts[i] for i in at], self.k)
        scorer, every = self.scorer(pairs), range(len(pairs))
        logps = torch.stack(scorer(model, every), dim=1)  # [B·k/2, 2]
        with torch.no_grad():
            reference = torch.stack(scorer(self.reference, every), dim=1)
        lengths = torch.tensor([[float(len(pair.chosen)), float(len(pair.rejected))] for pair in pairs])
        found = logps, reference, self.scores(pairs), lengths
        return tuple(values.to(logps.device).view(-1, self.k) for values in found)

    def labelled(self, pairs: Sequence[EncodedPair], noisy: bool) -> list[EncodedPair]:
        """Pairs whose better scored response is chosen; those of equal responses are left out.

        noisy: chosen with the probability of Bradley-Terry, σ(difference of the scores), from torch's seed.
        """
        margin = self.scores(pairs).diff(dim=1).squeeze(1).neg()
        wins = torch.rand(len(margin)) < margin.sigmoid() if noisy else margin > 0
        sides = [(p.chosen, p.rejected) if win else (p.rejected, p.chosen) for p, win in zip(pairs, wins, strict=True)]
        return [EncodedPair(p.prompt, *both) for p, both in zip(pairs, sides, strict=True) if both[0] != both[1]]


def on_policy_dpo(
    model: Any, sampler: OnPolicy, beta: float, plan: TrainPlan, compute: Compute, *, rounds: int, noisy: bool
) -> list[MetricsRow]:
    """Rounds of: two samples of the model per prompt, labelled by the sampler's score, one DPO training on the pairs.

    Each round takes its own share of the prompts; π_ref stays the sampler's. Returns the rows of all rounds.
    """
    rows: list[MetricsRow] = []
    for number in range(rounds):
        prompts = sampler.prompts[number::rounds]
        with torch.random.fork_rng([compute.device] if compute.device.type == "cuda" else []):
            torch.manual_seed(plan.seed * 1_000_003 + number)
            pairs = sampler.labelled(sampler.draw(model, prompts, 2), noisy)
        scorer, seeded = sampler.scorer(pairs), replace(plan, seed=plan.seed + number)
        objective = DPOObjective(score_pairs(sampler.reference, pairs, scorer, compute), beta)
        rows += train(model, pairs, scorer, objective, seeded, compute, name=f"round {number + 1}")
    return rows
