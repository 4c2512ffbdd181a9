"""What a run gives away: the same prompts through the three models, and the final model with its card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..generation import Response, sample
from ..hh import single_turn
from ..settings import Settings
from ..tokens import has_template
from .artefacts import open_artefact
from .card import model_card
from .loading import save_model
from .machine import compute_of
from .measures import get_comparison
from .stages import get_base, get_data, get_dpo, get_sft

FINAL_MODEL = "dpo_gpt2_model_final"
STUDY_PROMPTS = (
    "What are some fun things to do in Paris?",
    "How can I learn to code for free?",
    "What is the meaning of life?",
)
WORLD_PROMPTS = (
    "How can I grow roses?",
    "Can you help me make new friends?",
    "What is a good way to wake up early?",
    "Do you have any advice on making pizza?",
    "I want to adopt a cat. Where do I start?",
)


def get_generations(settings: Settings) -> dict[str, list[Response]]:
    """Stage 7: the study's and the embedded world's prompts through the three models, sampled and greedy.

    Artefact: generations/. Keys: "<model>" (temperature 1) and "<model>/greedy".
    """
    data = get_data(settings)
    models = (get_base(settings), get_sft(settings), get_dpo(settings))
    prompts = [single_turn(question) for question in (*STUDY_PROMPTS, *WORLD_PROMPTS)]
    made_from = {
        "tokenizer": data.tokenizer_sha256,
        "models": {model.name: model.weights_sha256 for model in models},
        "prompts": prompts,
        **{k: getattr(settings, k) for k in ("max_new_tokens", "max_prompt_length", "seed")},
    }
    with open_artefact(settings, "generations", made_from) as artefact:
        if artefact.mine:
            compute, out = compute_of(settings), {}
            for each in models:
                model = each.load(compute)
                for key, temperature in ((each.name, 1.0), (f"{each.name}/greedy", 0.0)):
                    responses = sample(
                        model, data.tokenizer, prompts, max_new_tokens=settings.max_new_tokens,
                        max_prompt_length=settings.max_prompt_length, seed=settings.seed, temperature=temperature,
                        name=f"generating: {key}",
                    )  # fmt: skip
                    out[key] = [asdict(response) for response in responses]
            (artefact.folder / "generations.json").write_text(json.dumps(out, indent=1), encoding="utf-8")
    found = json.loads((artefact.folder / "generations.json").read_text(encoding="utf-8"))
    return {key: [Response(**row) for row in rows] for key, rows in found.items()}


def get_final_model(settings: Settings) -> Path:
    """The DPO model in a folder that `GPT2LMHeadModel.from_pretrained` opens, with tokenizer and model card."""
    model, data, comparison = get_dpo(settings), get_data(settings), get_comparison(settings)
    made_from = {
        "tokenizer": data.tokenizer_sha256,
        "model": model.weights_sha256,
        "measured": {name: e.metrics for name, e in comparison.items()},
    }
    with open_artefact(settings, FINAL_MODEL, made_from) as artefact:
        if artefact.mine:
            save_model(model.load(), data.tokenizer, artefact.folder)
            card = model_card(
                settings, comparison, data.pairs.source, model.weights_sha256, is_chat=has_template(data.tokenizer)
            )
            (artefact.folder / "README.md").write_text(card, encoding="utf-8")
            artefact.about["weights_sha256"] = model.weights_sha256
    return artefact.folder
