"""The losses, pure: tensors in, per-example tensors out."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from .errors import SettingsError
from .settings import check_loss


def dpo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
    *, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss and the implicit rewards of each pair, for DPO and five of its relatives.

    The four inputs are log p(response | prompt), each [B]; beta > 0 weighs the KL to the reference. With the
    log-ratio margin h = (policy chosen - reference chosen) - (policy rejected - reference rejected):

    "sigmoid": -log σ(βh) (DPO, Rafailov et al. 2023, eq. 7); with label_smoothing ε, the share of labels taken
        to be wrong, -(1-ε) log σ(βh) - ε log σ(-βh) (conservative DPO, Mitchell 2023)
    "robust": [-(1-ε) log σ(βh) + ε log σ(-βh)] / (1-2ε), whose mean over labels flipped with probability ε is the
        loss of the clean ones (Chowdhury et al. 2024, "Provably Robust DPO")
    "hinge": max(0, 1 - βh) (SLiC, Zhao et al. 2023)
    "ipo": (h - 1/(2β))² (Azar et al. 2023, eq. 17). A squared margin would grow with the length of the responses; so
        with lengths, the numbers of tokens of the chosen and rejected responses, [B] each, h is of log-probabilities
        per token, as in TRL, whose authors had this confirmed by those of IPO
    "sigmoid_norm": -log σ(βh) with h per token, as for ipo (Lambert et al. 2024, "Tülu 3", eq. 6); needs lengths
    "apo_zero": σ(-chosen reward) + σ(rejected reward), each side by itself (D'Oosterlinck et al. 2024, eq. 7, plus 1)

    Names as in TRL. Returns (losses, chosen rewards, rejected rewards), each [B]; the rewards β × log-ratio are
    detached, in the units of the true reward, up to a constant of the prompt. Raises SettingsError for values out of
    range: none is ignored, but for the lengths, which other losses do not use.
    """
    check_loss(beta, loss_type, label_smoothing)
    if loss_type == "sigmoid_norm" and lengths is None:
        raise SettingsError("lengths is None, but loss_type 'sigmoid_norm' needs them")
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    h = chosen_logratios - rejected_logratios
    if lengths and loss_type in ("ipo", "sigmoid_norm"):
        h = chosen_logratios / lengths[0] - rejected_logratios / lengths[1]
    right, wrong = -logsigmoid(beta * h), -logsigmoid(-beta * h)
    if loss_type in ("sigmoid", "sigmoid_norm"):
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    elif loss_type == "robust":
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif loss_type == "hinge":
        losses = (1 - beta * h).relu()
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        losses = (-beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def sft_loss(chosen_logps: Tensor, chosen_tokens: Tensor) -> Tensor:
    """Supervised fine-tuning on chosen responses: negative log-likelihood per token of each response, [B].

    chosen_logps: log p(chosen | prompt), [B]; chosen_tokens: number of response tokens, [B].
    """
    return -chosen_logps / chosen_tokens
