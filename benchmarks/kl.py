"""The KL in 16 bits, and from the logits that sampling made: `python -m benchmarks.kl --model FILE --data FILE`.

`run.sampled` measures the KL of sampled responses by a pass of its own over both models, in float32. This holds it
against what would be cheaper: the same pass in 16 bits, and the policy's logits as they were when it sampled, which are
the run's precision and come token by token.

- *Numbers*: a pre-trained model as reference, and policies whose last third of blocks is off by a little noise; the
  same responses for all, 40 tokens at most, after the first prompts of the data.
- *Seconds*: GPT-2 124M's size with random weights, 80 prompts of 30 to 128 tokens, 64 new ones, in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from benchmarks.dpo_vs_trl import RESULTS, _machine
from benchmarks.workload import make_model
from dpo_helpers.device import Compute
from dpo_helpers.evaluation import sequence_kl
from dpo_helpers.generation import continued, row_uniforms
from dpo_helpers.models import blocks
from dpo_helpers.run.loading import load_model, load_tokenizer
from dpo_helpers.run.pairs import load_pairs
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import encode_prompts

NOISE = (0.0, 0.003, 0.006, 0.012, 0.024)  # in standard deviations of a weight matrix
ROWS = 16  # responses in a pass, as in `run.sampled`
COMPUTE = {precision: Compute(torch.device("cpu"), precision) for precision in ("fp32", "fp16", "bf16")}


def padded(prompts: list[list[int]], drawn: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """(ids, mask) of prompts, padded on the left, with responses [N, S] behind them: [N, T + S] each."""
    ids, ones = ([torch.tensor(row) for row in rows] for rows in (prompts, [[1] * len(p) for p in prompts]))
    left, mask = (pad_sequence(rows, batch_first=True, padding_side="left") for rows in (ids, ones))
    ended = drawn == eos
    return torch.cat([left, drawn], dim=1), torch.cat([mask, (ended.cumsum(-1) == ended.long()).long()], dim=1)


def at_once(model: Any, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Logits of the last steps + 1 places, [N, steps + 1, V], by one pass."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    run = {"position_ids": positions, "logits_to_keep": steps + 1, "use_cache": False}
    return model(input_ids=ids, attention_mask=mask, **run).logits  # type: ignore[no-any-return]


def by_token(model: Any, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """The same by the passes that sampling makes: the prompt, then one token at a time."""
    cache, read, logits = DynamicCache(config=model.config), 0, list[Tensor]()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for end in range(ids.shape[1] - steps, ids.shape[1] + 1):
        run = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        now = slice(read, end)
        logits.append(model(ids[:, now], attention_mask=mask[:, :end], position_ids=positions[:, now], **run).logits)
        read = end
    return torch.cat(logits, dim=1)


def numbers(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Mean KL of the same responses, in nats, by precision and by the passes over the policy."""
    settings = load_settings("gpt2", model=arguments.model, dataset=arguments.data, device="cpu", allow_dropped=True)
    tokenizer, reference = load_tokenizer(settings), load_model(settings).eval()
    texts = list(dict.fromkeys(pair.prompt for pair in load_pairs(settings).held_out))[: arguments.prompts]
    prompts, eos, steps = encode_prompts(tokenizer, texts, 128), tokenizer.eos_token_id, 40
    uniforms = torch.stack([row_uniforms(i, steps, 0) for i in range(len(prompts))])
    rows = []
    for noise in NOISE:
        policy = copy.deepcopy(reference)
        torch.manual_seed(0)
        for block in list(blocks(policy))[2 * len(blocks(policy)) // 3 :]:
            for weight in (p for p in block.parameters() if p.dim() == 2):
                weight.add_(noise * weight.std() * torch.randn_like(weight))
        drawn = continued(policy, prompts, uniforms, eos, 1.0)
        ids, mask = padded(prompts, drawn, eos)
        row = {"noise": noise}
        for precision, compute in COMPUTE.items():
            with compute.autocast():
                of_reference = at_once(reference, ids, mask, steps)
                of_policy = {"own pass": at_once(policy, ids, mask, steps)}
                of_policy["sampling's logits"] = by_token(policy, ids, mask, steps)
            for way, logits in of_policy.items():
                last = (ids[:, -steps - 1 :], mask[:, -steps - 1 :].bool())
                row[f"{precision}, {way}"] = sequence_kl(logits, of_reference, *last)["kl"].mean().item()
        print("| " + " | ".join(f"{value:.5f}" for value in row.values()) + " |", flush=True)
        rows.append(row)
    return rows


def seconds() -> dict[str, float]:
    """Of sampling in batches of 80 and 32, of a pass over one model, and of one model token by token."""
    model, steps, draws = make_model(), 64, random.Random(0)
    prompts = sorted(([draws.randrange(50256) for _ in range(draws.randrange(30, 128))] for _ in range(80)), key=len)
    uniforms = torch.stack([row_uniforms(i, steps, 0) for i in range(80)])

    def sampled(rows: int) -> Tensor:
        starts = range(0, 80, rows)
        return torch.cat([continued(model, prompts[i : i + rows], uniforms[i : i + rows], -1, 1.0) for i in starts])

    def scored(logits_of: Callable[..., Tensor], rows: int) -> None:
        for i in range(0, 80, rows):
            logits_of(model, *padded(prompts[i : i + rows], drawn[i : i + rows], -1), steps)

    drawn, found = sampled(80), dict[str, float]()
    ways: dict[str, Callable[[], Any]] = {
        "sampling, 80 rows": lambda: sampled(80),
        "sampling, 32 rows": lambda: sampled(32),
        "one model at once": lambda: scored(at_once, ROWS),
        "one model token by token, 32 rows": lambda: scored(by_token, 32),
    }
    for name, run in ways.items():
        started = time.perf_counter()
        run()
        found[name] = time.perf_counter() - started
        print(f"{name}: {found[name]:.1f} s", flush=True)
    return found


@torch.no_grad()
def main() -> None:
    """Measure, print, and write results/kl.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pre-trained: a Hub id, a folder or a .gguf file")
    parser.add_argument("--data", required=True, help="pairs of HH-RLHF: a Hub id, a folder or a file")
    parser.add_argument("--prompts", type=int, default=48)
    arguments = parser.parse_args()
    result = {"machine": _machine("cpu"), "model": Path(arguments.model).name, "prompts": arguments.prompts}
    result |= {"numbers": numbers(arguments), "seconds": seconds()}
    (RESULTS / "kl.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
