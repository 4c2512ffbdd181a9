"""What is measured in 16 bits, and what the KL costs: `python -m benchmarks.kl --model FILE --data FILE`, an hour.

Samples, their KL and the rewards of held-out pairs are float32's, whatever the precision of the training. For the KL
`run.sampled` takes the policy's logits as they were when it sampled, and runs only the reference once more. This holds
both against 16 bits, and the KL against a pass of its own over both models.

- *kl* and *rewards*: a pre-trained model as reference, and policies whose last third of blocks is off by a little
  noise; the same responses for all, 40 tokens at most, after the first prompts of the data; and the first pairs.
- *seconds*: GPT-2 124M's size with random weights, 80 prompts of 30 to 128 tokens, 64 new ones, in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.dpo_vs_trl import RESULTS, _machine
from benchmarks.workload import make_model
from dpo_helpers.device import Compute
from dpo_helpers.evaluation import score_pairs, sequence_kl
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.generation import continued, row_uniforms
from dpo_helpers.hh import Pair
from dpo_helpers.models import blocks, freeze
from dpo_helpers.run.loading import load_model, load_tokenizer
from dpo_helpers.run.pairs import load_pairs
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import encode_pairs, encode_prompts, padded

NOISE = (0.0, 0.003, 0.006, 0.012, 0.024)  # in standard deviations of a weight matrix
ROWS = 16  # responses in a pass, as in `run.sampled`
COMPUTE = {precision: Compute(torch.device("cpu"), precision) for precision in ("fp32", "fp16", "bf16")}


def joined(prompts: list[list[int]], drawn: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """(ids, mask) of prompts, padded on the left, with responses [N, S] behind them: [N, T + S] each."""
    (ids, mask), ended = padded(prompts, side="left"), drawn == eos
    return torch.cat([ids, drawn], dim=1), torch.cat([mask, (ended.cumsum(-1) == ended.long()).long()], dim=1)


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


def policies(reference: Any) -> Iterator[tuple[float, Any]]:
    """Copies of the reference whose last third of blocks is off by noise of some size."""
    for noise in NOISE:
        policy = copy.deepcopy(reference)
        torch.manual_seed(0)
        for block in list(blocks(policy))[frozen(policy) :]:
            for weight in (p for p in block.parameters() if p.dim() == 2):
                weight.add_(noise * weight.std() * torch.randn_like(weight))
        yield noise, policy


def frozen(model: Any) -> int:
    """How many of its blocks are frozen in a course's run: two thirds."""
    return 2 * len(blocks(model)) // 3


def kl(reference: Any, tokenizer: Any, pairs: Sequence[Pair]) -> Iterator[dict[str, float]]:
    """Mean KL of the same 48 responses, in nats, by precision and by the passes over the policy."""
    texts = list(dict.fromkeys(pair.prompt for pair in pairs))[:48]
    prompts, eos, steps = encode_prompts(tokenizer, texts, 128), tokenizer.eos_token_id, 40
    uniforms = torch.stack([row_uniforms(i, steps, 0) for i in range(len(prompts))])
    for noise, policy in policies(reference):
        ids, mask = joined(prompts, continued(policy, prompts, uniforms, eos, 1.0), eos)
        row = {"noise": noise}
        for precision, compute in COMPUTE.items():
            with compute.autocast():
                of_reference = at_once(reference, ids, mask, steps)
                of_policy = {"own pass": at_once(policy, ids, mask, steps)}
                of_policy["sampling's logits"] = by_token(policy, ids, mask, steps)
            for way, logits in of_policy.items():
                last = (ids[:, -steps - 1 :], mask[:, -steps - 1 :].bool())
                row[f"{precision}, {way}"] = sequence_kl(logits, of_reference, *last)["kl"].mean().item()
        yield row


def rewards(reference: Any, tokenizer: Any, pairs: Sequence[Pair]) -> Iterator[dict[str, float]]:
    """Of the margins of 120 pairs over β: their standard deviation; of the error in 16 bits the same, and wrong signs.

    Policy and reference are in the same precision, and share the frozen blocks' output, as on the fast path.
    """
    encoded = list(encode_pairs(tokenizer, pairs[:120], max_length=256, max_prompt_length=128))

    def margins(policy: Any) -> dict[str, Tensor]:
        found = {}
        for precision, compute in COMPUTE.items():
            scorer = FastScorer(policy, encoded, frozen(policy))
            scores = score_pairs(policy, encoded, scorer, compute)
            found[precision] = scores.chosen - scores.rejected
        return found

    of_reference = margins(reference)
    for noise, policy in list(policies(reference))[1:]:
        found = {precision: values - of_reference[precision] for precision, values in margins(policy).items()}
        exact = found.pop("fp32")
        row = {"noise": noise, "margin": exact.std().item()}
        for precision, values in found.items():
            row[f"error in {precision}"] = (values - exact).std().item()
            row[f"wrong signs in {precision}"] = ((values > 0) != (exact > 0)).float().mean().item()
        yield row


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
            logits_of(model, *joined(prompts[i : i + rows], drawn[i : i + rows], -1), steps)

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
    """Measure, print, and write results/kl.json; what an earlier call measured stays in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pre-trained: a Hub id, a folder or a .gguf file")
    parser.add_argument("--data", required=True, help="pairs of HH-RLHF: a Hub id, a folder or a file")
    parser.add_argument("--parts", default="kl,rewards,seconds")
    arguments = parser.parse_args()
    settings = load_settings("gpt2", model=arguments.model, dataset=arguments.data, device="cpu", allow_dropped=True)
    tokenizer, reference = load_tokenizer(settings), load_model(settings).eval()
    freeze(reference, frozen(reference))
    pairs, path = load_pairs(settings).held_out, RESULTS / "kl.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in arguments.parts.split(","):
        if part == "seconds":
            found: Any = seconds()
        else:
            found = []
            for row in {"kl": kl, "rewards": rewards}[part](reference, tokenizer, pairs):
                print(json.dumps(row), flush=True)
                found.append(row)
        result[part] = {"machine": _machine("cpu"), "model": Path(arguments.model).name, "found": found}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
