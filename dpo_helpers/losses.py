"""The losses, pure: tensors in, per-example tensors out."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from .errors import SettingsError


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The DPO loss and the implicit rewards of each pair (Rafailov et al. 2023, eq. 7 and section 5.1).

    The four inputs are log p(response | prompt), each [B]; beta > 0 weighs the KL to the reference.
    label_smoothing in [0, 0.5) is the share of labels taken to be wrong (conservative DPO, Mitchell 2023).
    Returns (losses, chosen rewards, rejected rewards), each [B]; the rewards are detached and in the units
    of the true reward, up to a constant of the prompt. Raises SettingsError for values out of range.
    """
    if not beta > 0:
        raise SettingsError(f"beta is {beta!r}, but must be a positive number")
    if not 0 <= label_smoothing < 0.5:
        raise SettingsError(f"label_smoothing is {label_smoothing!r}, but must be in [0, 0.5)")
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def sft_loss(chosen_logps: Tensor, chosen_tokens: Tensor) -> Tensor:
    """Supervised fine-tuning on chosen responses: negative log-likelihood a token of each response, [B].

    chosen_logps: log p(chosen | prompt), [B]; chosen_tokens: number of response tokens, [B].
    """
    return -chosen_logps / chosen_tokens
