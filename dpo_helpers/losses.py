"""The losses, pure: tensors in, per-example tensors out."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from .errors import SettingsError
from .settings import LOSS_TYPES, SMOOTHED


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the implicit rewards of each pair, for DPO and three of its relatives.

    The four inputs are log p(response | prompt), each [B]; beta > 0 weighs the KL to the reference. With the
    log-ratio margin h = (policy chosen - reference chosen) - (policy rejected - reference rejected):

    "sigmoid": -log σ(βh) (DPO, Rafailov et al. 2023, eq. 7); with label_smoothing ε, the share of labels taken
        to be wrong, -(1-ε) log σ(βh) - ε log σ(-βh) (conservative DPO, Mitchell 2023)
    "robust": [-(1-ε) log σ(βh) + ε log σ(-βh)] / (1-2ε), whose mean over labels flipped with probability ε is the
        loss of the clean ones (Chowdhury et al. 2024, "Provably Robust DPO")
    "hinge": max(0, 1 - βh) (SLiC, Zhao et al. 2023)
    "ipo": (h - 1/(2β))² (Azar et al. 2023, eq. 17); `pair_losses` gives it log-probabilities a token, as TRL does

    Names as in TRL's `DPOConfig.loss_type`. Returns (losses, chosen rewards, rejected rewards), each [B]; the
    rewards β × log-ratio are detached, in the units of the true reward, up to a constant of the prompt. Raises
    SettingsError for values out of range: no value is ignored.
    """
    check_loss(beta, loss_type, label_smoothing)
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    h = chosen_logratios - rejected_logratios
    right, wrong = -logsigmoid(beta * h), -logsigmoid(-beta * h)
    if loss_type == "sigmoid":
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    elif loss_type == "robust":
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif loss_type == "hinge":
        losses = (1 - beta * h).relu()
    else:
        losses = (h - 1 / (2 * beta)) ** 2
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def check_loss(beta: float, loss_type: str, label_smoothing: float) -> None:
    """SettingsError, naming the value, unless `dpo_loss` can be computed with these."""
    if not beta > 0:
        raise SettingsError(f"beta is {beta!r}, but must be a positive number")
    if loss_type not in LOSS_TYPES:
        raise SettingsError(f"loss_type is {loss_type!r}, but must be one of {', '.join(LOSS_TYPES)}")
    if not 0 <= label_smoothing < 0.5:
        raise SettingsError(f"label_smoothing is {label_smoothing!r}, but must be in [0, 0.5)")
    if label_smoothing and loss_type not in SMOOTHED:
        raise SettingsError(
            f"label_smoothing is {label_smoothing!r}, but loss_type {loss_type!r} has none: use 0, or one of "
            + ", ".join(SMOOTHED)
        )


def pair_losses(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dpo_loss` for responses of different lengths: what training and evaluation call.

    The log-probabilities are sums over chosen_tokens and rejected_tokens tokens, all [B]. IPO squares a margin, which
    would make its loss grow with the length; so its loss (not its rewards) gets log-probabilities a token, as in
    TRL, whose authors had this confirmed by those of IPO.
    """
    sums = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        *sums, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing
    )
    if loss_type == "ipo":
        counts = (chosen_tokens, rejected_tokens, chosen_tokens, rejected_tokens)
        means = (logps / count for logps, count in zip(sums, counts, strict=True))
        losses, *_ = dpo_loss(*means, beta=beta, loss_type=loss_type)
    return losses, chosen_rewards, rejected_rewards


def sft_loss(chosen_logps: Tensor, chosen_tokens: Tensor) -> Tensor:
    """Supervised fine-tuning on chosen responses: negative log-likelihood a token of each response, [B].

    chosen_logps: log p(chosen | prompt), [B]; chosen_tokens: number of response tokens, [B].
    """
    return -chosen_logps / chosen_tokens
