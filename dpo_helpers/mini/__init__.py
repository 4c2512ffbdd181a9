"""The embedded world: an offline GPT-2 and a preference data set whose true reward is known."""

from .world import (
    TOPICS,
    Features,
    Topic,
    best_possible_accuracy,
    features,
    find_topic,
    fingerprint,
    preference_rows,
    pretraining_texts,
    sampling_prompts,
    true_reward,
)

__all__ = [
    "TOPICS",
    "Features",
    "Topic",
    "best_possible_accuracy",
    "features",
    "find_topic",
    "fingerprint",
    "preference_rows",
    "pretraining_texts",
    "sampling_prompts",
    "true_reward",
]
