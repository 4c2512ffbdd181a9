"""Figures. Each is drawn from data, saved as PNG, and described in one printed sentence."""

from .canvas import COLOURS, MODEL_COLOUR, MODEL_MARKER, label
from .ideas import (
    plot_batch_layout,
    plot_next_tokens,
    plot_one_pair,
    plot_pair_mask,
    plot_token_logprobs,
    plot_token_logratios,
)
from .rlhf import plot_calibration, plot_parting, plot_rlhf_plane, plot_rlhf_run
from .runs import (
    plot_dpo,
    plot_frontier,
    plot_lengths,
    plot_reward_kl,
    plot_sft,
    plot_study,
    plot_sweep,
    plot_tabular,
    plot_text_measures,
)
from .worlds import (
    explore_loss,
    plot_gradient_weight,
    plot_loss_and_weight,
    plot_mass,
    plot_optimum_frontier,
    plot_plane_filling,
    plot_puzzles,
    plot_win_rates,
)

__all__ = [
    "COLOURS",
    "MODEL_COLOUR",
    "MODEL_MARKER",
    "explore_loss",
    "label",
    "plot_batch_layout",
    "plot_calibration",
    "plot_dpo",
    "plot_frontier",
    "plot_gradient_weight",
    "plot_lengths",
    "plot_loss_and_weight",
    "plot_mass",
    "plot_next_tokens",
    "plot_one_pair",
    "plot_optimum_frontier",
    "plot_pair_mask",
    "plot_parting",
    "plot_plane_filling",
    "plot_puzzles",
    "plot_reward_kl",
    "plot_rlhf_plane",
    "plot_rlhf_run",
    "plot_sft",
    "plot_study",
    "plot_sweep",
    "plot_tabular",
    "plot_text_measures",
    "plot_token_logprobs",
    "plot_token_logratios",
    "plot_win_rates",
]
