"""How fast responses are sampled: `python -m benchmarks.sampling`, five minutes.

`generation.continued` against bare transformers (`generate` with sampling and no filter), on the same prompts in the
same batch, taking turns in one process: tokens of responses per second, end-of-text included, medians. On the embedded
model (its 240 prompts, in batches of 80), and at GPT-2 124M's size with random weights (16 prompts of 64 tokens, 48
new ones). The floor is the time of the bare matrix products of the passes that `continued` makes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.dpo_vs_trl import RESULTS, _machine
from benchmarks.workload import _time_product, make_model
from dpo_helpers.generation import continued, row_uniforms
from dpo_helpers.run.loading import load_model, load_tokenizer
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import encode_prompts
from dpo_helpers.worlds import embedded

REPEATS = 5
CPU = torch.device("cpu")


def ours(model: Any, prompts: Sequence[list[int]], steps: int, eos: int) -> int:
    """Sample with the package; returns the number of tokens."""
    uniforms = torch.stack([row_uniforms(i, steps, 0) for i in range(len(prompts))])
    return count(continued(model, prompts, uniforms, eos, 1.0), eos)


def theirs(model: Any, prompts: Sequence[list[int]], steps: int, eos: int) -> int:
    """Sample with transformers; returns the number of tokens."""
    length = max(map(len, prompts))
    ids = torch.tensor([[eos] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    how = GenerationConfig(
        max_new_tokens=steps, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=eos, pad_token_id=eos
    )
    return count(model.generate(ids, attention_mask=mask, generation_config=how)[:, length:], eos)


def count(drawn: torch.Tensor, eos: int) -> int:
    """Tokens of responses up to end-of-text, which counts; what fills up the rows after it does not."""
    ended = (drawn == eos).long().cumsum(dim=1)
    return int((ended == 0).sum() + (ended[:, -1] > 0).sum())


def floor_seconds(model: Any, batches: Sequence[Any]) -> float:
    """Bare matrix products of the passes that `continued` makes for these batches, on their own shapes."""
    passes: list[tuple[int, int]] = []  # rows, tokens
    hook = model.register_forward_pre_hook(
        lambda _, __, given: passes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    for prompts, steps, eos in batches:
        ours(model, prompts, steps, eos)
    hook.remove()
    d, blocks, known = (getattr(model.config, key) for key in ("n_embd", "n_layer", "vocab_size"))
    seconds: dict[tuple[int, int, int], float] = {}
    total = 0.0
    for rows, tokens in passes:
        n = rows * tokens
        block = [(n, d, 3 * d), (n, d, d), (n, d, 4 * d), (n, 4 * d, d)]
        for shape, times in [*((shape, blocks) for shape in block), ((rows, d, known), 1)]:
            if shape not in seconds:
                seconds[shape] = _time_product(shape, CPU, torch.float32)
            total += times * seconds[shape]
    return total


def compare(name: str, model: Any, batches: Sequence[Any]) -> dict[str, Any]:
    """Both in turn, and the floor."""
    found: dict[str, list[float]] = {"ours": [], "generate": []}
    sides: dict[str, Callable[..., int]] = {"ours": ours, "generate": theirs}
    for repeat in range(REPEATS + 1):
        for side, run in sides.items():
            torch.manual_seed(repeat)
            started = time.perf_counter()
            tokens = sum(run(model, *batch) for batch in batches)
            if repeat:  # the first turn warms up
                found[side].append(tokens / (time.perf_counter() - started))
            if side == "ours":
                mine = tokens
    rate = {side: median(values) for side, values in found.items()}
    floor = floor_seconds(model, batches)
    print(
        f"| {name} | {rate['ours']:.0f} | {rate['generate']:.0f} | {rate['ours'] / rate['generate']:.2f} "
        f"| {floor * rate['ours'] / mine:.2f} |", flush=True,
    )  # fmt: skip
    return {"tokens_per_s": found, "ratio": rate["ours"] / rate["generate"], "floor_s": floor, "tokens": mine}


@torch.no_grad()
def main() -> None:
    """Measure, print the table and write results/sampling.json."""
    settings = load_settings("mini")
    tokenizer, model = load_tokenizer(settings), load_model(settings).eval()
    prompts = encode_prompts(tokenizer, embedded.sampling_prompts(240), settings.max_prompt_length)
    prompts.sort(key=len)
    eos, steps = tokenizer.eos_token_id, settings.max_new_tokens
    batches = [(prompts[start : start + 80], steps, eos) for start in range(0, len(prompts), 80)]
    generator = torch.Generator().manual_seed(0)
    large = [(torch.randint(50256, (16, 64), generator=generator).tolist(), 48, 50256)]
    result: dict[str, Any] = {"machine": _machine("cpu")}
    print("| model, threads | tokens/s | generate's | ratio | matrix products / time |\n|---|---|---|---|---|")
    gpt2 = make_model()
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        result[f"embedded, {threads}"] = compare(f"embedded, {threads}", model, batches)
        result[f"GPT-2 124M, {threads}"] = compare(f"GPT-2 124M, {threads}", gpt2, large)
    (RESULTS / "sampling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
