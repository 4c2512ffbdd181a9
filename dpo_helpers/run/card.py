"""The model card of the final model: what it is, what it was made from, what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData

from ..evaluation import Evaluation
from ..settings import EMBEDDED, Settings
from ..untrusted import one_line
from .sources import source_of

LICENSES = {EMBEDDED: "mit", "openai-community/gpt2": "mit"}  # of the two GPT-2 of the course
MEASURED = {
    "kl": "KL(π_θ‖π_ref), nats per response",
    "true_reward": "true reward of sampled answers",
    "reward_accuracy": "reward accuracy, held-out pairs",
    "reward_margin": "reward margin, held-out pairs",
    "chosen_logratio": "chosen log-ratio",
    "length": "length of sampled answers, tokens",
    "ended": "share that ended by itself",
    "looping": "share that ended in a loop",
}


def _code(text: str) -> str:
    """A name for Markdown: nothing in it is rendered."""
    return "`" + one_line(text).replace("`", "'") + "`"


MARKERS = 'Prompts have the form `"\\n\\nHuman: …\\n\\nAssistant:"`; `tokenizer(prompt)` begins them as in training.'
TEMPLATE = (
    "Prompts are messages, rendered by the tokenizer's chat template as in training: "
    "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`, but with the date of 26 July 2024 where it "
    "prints today's."
)


def model_card(
    settings: Settings, comparison: Mapping[str, Evaluation], source: str, weights_sha256: str, *, is_chat: bool = False
) -> str:
    """The card as Markdown with the Hub's metadata block.

    comparison: the three models, measured. source: of the data, as `get_data` names it. is_chat: whether prompts were
    rendered by a chat template. The metadata names model and data set only where they are the Hub's, since a local name
    could be taken for somebody else's repository, and licence and language only where the course knows them.
    """
    base, dataset = source_of(settings, "model"), source_of(settings, "dataset").hub_id
    data = ModelCardData(
        language="en" if settings.dataset == EMBEDDED or dataset == "Anthropic/hh-rlhf" else None,
        license=LICENSES.get(settings.model),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "preference-optimization", "course"],
        base_model=base.hub_id,
        datasets=[dataset] if dataset else None,
    )
    names = list(comparison)
    rows = [
        f"| {title} | " + " | ".join(_value(comparison[n].metrics, key) for n in names) + " |"
        for key, title in MEASURED.items()
        if all(key in comparison[n].metrics for n in names)
    ]
    table = "\n".join([f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *rows])
    text = f"""---
{data.to_yaml()}
---

# {"A GPT-2" if settings.model in LICENSES else "A model"} trained with DPO, in a course

{_code(base.label)} trained with Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290) on
{_code(source)}: β = {settings.beta:g}, loss {settings.loss_type}, {settings.optimizer}, learning rate
{settings.learning_rate:g}, {settings.epochs} epoch(s), batches of {settings.batch_size} pairs, the first
{settings.freeze_layers} blocks frozen. It was made to learn DPO, not to be used, and may say anything.

## Measured

Means with standard errors; KL and text on the model's own samples at temperature 1, rewards on held-out pairs,
against the model that DPO started from: its own rewards are 0, and its accuracy says nothing.

{table}

## Open it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "dpo_gpt2_model_final"  # a folder of yours, which has no revision
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
```

{TEMPLATE if is_chat else MARKERS}
sha256 of names and values of the weights:
`{weights_sha256}`.
"""
    return str(ModelCard(text))


def _value(metrics: Mapping[str, float], key: str) -> str:
    error = metrics.get(f"{key}_se")
    return f"{metrics[key]:.2f}" + (f" ± {error:.2f}" if error is not None else "")
