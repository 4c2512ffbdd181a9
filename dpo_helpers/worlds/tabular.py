"""A laboratory for preference losses: one prompt, a table of responses, a known reward, and the exact optimum.

A policy is a vector of log-probabilities. With infinitely many preferences the expected loss can be written
down, so whatever gradient descent finds is the loss's own doing: no sampling, no network, no luck.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingsError
from ..losses import dpo_loss


@dataclass(frozen=True)
class TabularWorld:
    """K possible responses to one prompt: their true reward r and the reference's probabilities π_ref, [K] float64."""

    reward: Tensor
    reference: Tensor


def make_world(responses: int = 20, seed: int = 0) -> TabularWorld:
    """A world with rewards from a standard normal and an uneven reference that does not know them."""
    generator = torch.Generator().manual_seed(seed)
    reward, logits = torch.randn(2, responses, generator=generator, dtype=torch.float64)
    return TabularWorld(reward, logits.softmax(dim=0))


def win_probabilities(world: TabularWorld) -> Tensor:
    """p(i ≻ j) = σ(r_i - r_j) (Bradley-Terry), [K, K]."""
    return torch.sigmoid(world.reward[:, None] - world.reward[None, :])


def infinite_preferences(world: TabularWorld) -> Tensor:
    """Share of comparisons that i wins against j, [K, K], sum 1: two different responses at random, all equally."""
    wins = win_probabilities(world).fill_diagonal_(0)
    return wins / wins.sum()


def finite_preferences(world: TabularWorld, n: int, seed: int = 0) -> Tensor:
    """The same from n comparisons that were really drawn: counts of "i beat j" over n, [K, K]."""
    generator = torch.Generator().manual_seed(seed)
    expected = infinite_preferences(world).flatten()
    drawn = torch.multinomial(expected, n, replacement=True, generator=generator)
    return torch.bincount(drawn, minlength=len(expected)).double().reshape(len(world.reward), -1) / n


def dpo_optimum(world: TabularWorld, beta: float) -> Tensor:
    """π* ∝ π_ref · exp(r/β), [K]: the maximum of E[r] - β·KL(π‖π_ref) (Rafailov et al. 2023, eq. 4)."""
    return (world.reference.log() + world.reward / beta).softmax(dim=0)


def ipo_optimum(world: TabularWorld, beta: float) -> Tensor:
    """π ∝ π_ref · exp(P/β), [K], where P_i is how often i beats a response drawn like those of the pairs.

    IPO has the win rate P where DPO has the reward (Azar et al. 2023, section 5): P lies in [0, 1], so no preference,
    however certain, can drive a probability to 0. Here a response also meets itself, as in the closed form: P_ii = ½.
    """
    return (world.reference.log() + win_probabilities(world).mean(dim=1) / beta).softmax(dim=0)


def expected_loss(
    world: TabularWorld,
    log_policy: Tensor,
    wins: Tensor,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean loss over comparisons: wins [K, K] as `infinite_preferences` gives them; log_policy [K]. A scalar."""
    chosen, rejected = wins.nonzero(as_tuple=True)
    reference = world.reference.log()
    logps = log_policy[chosen], log_policy[rejected], reference[chosen], reference[rejected]
    losses, *_ = dpo_loss(*logps, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing)
    return (wins[chosen, rejected] * losses).sum()


def fit(
    world: TabularWorld,
    wins: Tensor,
    beta: float,
    *,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    optimizer: str = "descent",
    steps: int = 3000,
    rate: float | None = None,
) -> Tensor:
    """Minimise `expected_loss` from π_ref on; returns the policy's log-probabilities, [K].

    optimizer: "descent", plain gradient descent, by default at the rate 1 / (largest possible curvature), under which
    the loss of "sigmoid", "robust" and "ipo" falls at every step ("hinge" has a kink, and "apo_zero", which is no
    function of the margin, bends more where β is small: give a smaller rate); or "rmsprop", as in the course, which
    needs a rate. A table knows no lengths: "sigmoid_norm" is a SettingsError.
    """
    if rate is None:
        if optimizer != "descent":
            raise SettingsError(f"rate is None, but optimizer {optimizer!r} needs one")
        # d²loss/dh² is at most 2 (squared) or β²/4 (logistic, robust, where smoothing takes none of it away); a logit
        # takes part in 2 of K comparisons
        rate = len(world.reward) / 4 / (2.0 if loss_type == "ipo" else beta**2 / 4)

    def loss(log_policy: Tensor) -> Tensor:
        return expected_loss(world, log_policy, wins, beta, loss_type, label_smoothing)

    (log_policy,) = deque(_descend(loss, world.reference.log(), steps, rate, optimizer), maxlen=1)
    return log_policy


def follow(
    loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float, optimizer: str = "descent"
) -> Tensor:
    """Probabilities of the K responses while a loss is minimised: [steps + 1, K], the first row those of the start.

    loss: from log-probabilities [K] to a scalar; start: log-probabilities [K]; optimizer: "descent" or "rmsprop", as
    in `fit`. Updates move the logits of one softmax, so no response can change alone.
    """
    return torch.stack([log_policy.exp() for log_policy in _descend(loss, start, steps, rate, optimizer)])


def _descend(
    loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float, optimizer: str
) -> Iterator[Tensor]:
    """Log-probabilities [K] at the start and after each update. SettingsError on an unknown optimizer."""
    kinds = {"descent": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}
    if optimizer not in kinds:
        raise SettingsError(f"optimizer is {optimizer!r}, but must be one of {', '.join(kinds)}")
    logits = start.detach().clone().requires_grad_()
    updates = kinds[optimizer]([logits], lr=rate)
    for _ in range(steps):
        log_policy = logits.log_softmax(dim=0)
        yield log_policy.detach()
        updates.zero_grad()
        loss(log_policy).backward()  # type: ignore[no-untyped-call]
        updates.step()
    yield logits.detach().log_softmax(dim=0)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of all |p − q| of two distributions, 0 … 1: the largest difference in any event's probability."""
    return 0.5 * (p - q).abs().sum().item()


def kl_divergence(p: Tensor, q: Tensor) -> float:
    """KL(p‖q) = Σ p log(p/q) in nats, of two distributions without zeros."""
    return (p * (p / q).log()).sum().item()
