"""What is measured: the model, the pairs, and the arithmetic that a DPO step on them cannot do without."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_helpers.device import Compute
from dpo_helpers.logprobs import PairScores, Scorer
from dpo_helpers.models import freeze
from dpo_helpers.run.gradients import InParts
from dpo_helpers.run.pairs import load_pairs
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import EncodedPair, encode_pairs
from dpo_helpers.training import DPOObjective, MetricsRow, TrainPlan, train

BETA = 0.1


@dataclass(frozen=True)
class Shape:
    """A model's blocks, how many of them are frozen (and the embeddings), and widths: of x, keys, and the MLP.

    gates: how many products lead up into the MLP.
    """

    name: str
    blocks: int
    frozen: int
    d: int
    keys: int
    hidden: int
    gates: int


VOCABULARY = 50257  # of both: the pairs are tokenised with GPT-2's tokenizer (SmolLM2's own has 49,152)
SHAPES = {
    "gpt2": Shape("GPT-2 124M", 12, 8, 768, 768, 3072, 1),
    "smollm2": Shape("SmolLM2-135M", 30, 20, 576, 192, 1536, 2),
}
FROZEN = SHAPES["gpt2"].frozen


@dataclass(frozen=True)
class Workload:
    """One comparison: where the pairs come from, how many, in what batches, for how many epochs, on what."""

    data: str
    tokenizer: str
    pairs: int
    batch_size: int
    epochs: int
    seed: int
    device: str
    precision: str
    model: str = "gpt2"

    @property
    def shape(self) -> Shape:
        """The model's."""
        return SHAPES[self.model]

    def plan(self, epochs: int | None = None) -> TrainPlan:
        """RMSprop at a constant rate, clipped: what both sides run."""
        return TrainPlan(
            epochs=epochs or self.epochs, batch_size=self.batch_size, micro_batch_size=self.batch_size,
            learning_rate=1e-6, optimizer="rmsprop", warmup_steps=0, schedule="constant", max_grad_norm=10.0,
            seed=self.seed,
        )  # fmt: skip


def make_model(shape: Shape = SHAPES["gpt2"]) -> Any:
    """A model of this shape with seeded random weights: its speed and memory do not depend on their values."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if shape.gates == 1:
        model = GPT2LMHeadModel(GPT2Config()).eval()
    else:
        heads = {"num_attention_heads": shape.d // 64, "num_key_value_heads": shape.keys // 64}
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=shape.d, intermediate_size=shape.hidden, num_hidden_layers=shape.blocks,
            max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=50256, bos_token_id=50256, **heads,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
    freeze(model, shape.frozen)
    return model


def train_dpo(
    model: Any, pairs: Sequence[EncodedPair], scorer: Scorer, reference: PairScores, beta: float, plan: TrainPlan,
    compute: Compute,
) -> list[MetricsRow]:  # fmt: skip
    """DPO with the course's loop, as its runs call it: the gradient in parts, which fit into memory and scale fp16."""
    parts = InParts(plan.micro_batch_size, compute, [p for p in model.parameters() if p.requires_grad])
    return train(model, pairs, scorer, DPOObjective(reference, beta), plan, compute, gradient=parts)


def load_tokenizer(name: str) -> Any:
    """From a folder with vocab.json and merges.txt, or from the Hub at the course's pinned commit."""
    from transformers import GPT2Tokenizer

    folder = Path(name)
    if folder.is_dir():
        return GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return GPT2Tokenizer.from_pretrained(name, revision=load_settings("gpt2").model_revision)


def draw_pairs(work: Workload) -> list[EncodedPair]:
    """Pairs over the whole length range: sorted by length, cut into as many parts as wanted, one drawn from each."""
    settings = load_settings("gpt2", dataset=work.data, max_pairs=None, held_out_pairs=1, seed=work.seed)
    tokenizer = load_tokenizer(work.tokenizer)
    encoded = list(encode_pairs(tokenizer, load_pairs(settings).train, max_length=512, max_prompt_length=256))
    encoded.sort(key=lambda p: len(p.prompt) + len(p.chosen) + len(p.rejected))
    rng, n = random.Random(work.seed), work.pairs
    if n > len(encoded):
        raise SystemExit(f"error: {work.data} has {len(encoded)} usable pairs, but --pairs is {n}")
    drawn = [encoded[rng.randrange(i * len(encoded) // n, (i + 1) * len(encoded) // n)] for i in range(n)]
    rng.shuffle(drawn)
    return drawn


def products(pairs: Sequence[EncodedPair], shape: Shape = SHAPES["gpt2"]) -> dict[str, Any]:
    """The matrix products that one update on these pairs needs, as (m, k, n) with how often each is computed.

    "first": the frozen blocks once, and the trainable ones forward with half of the head, for the reference.
    "later": trainable blocks forward, and backward for inputs and weights; the head forward and for its input.
    attention: multiply-adds × 2 of visible (query, key) places, which count at the products' rate.
    """
    prompts = [len(p.prompt) for p in pairs]
    sides = [(len(p.chosen), len(p.rejected)) for p in pairs]
    tokens = sum(p + c + r - 2 for p, (c, r) in zip(prompts, sides, strict=True))
    scored, heads = sum(c + r - 1 for c, r in sides), sum(c + r for c, r in sides)
    # (query, key) places: of the responses' tokens, and with the prompts' among themselves
    responses = sum((n - 1) * p + (n - 1) * n / 2 for p, side in zip(prompts, sides, strict=True) for n in side)
    visible = responses + sum(p * (p + 1) / 2 for p in prompts)
    visible_last = responses + sum(prompts)  # the last block asks from scored places only
    d, keys, up, hidden = shape.d, shape.keys, shape.gates * shape.hidden, shape.hidden
    whole = [(tokens, d, d + 2 * keys), (tokens, d, d), (tokens, d, up), (tokens, hidden, d)]
    last = [(tokens, d, 2 * keys), (scored, d, d), (scored, d, d), (scored, d, up), (scored, hidden, d)]
    trainable = shape.blocks - shape.frozen
    forward = [(size, trainable - 1) for size in whole] + [(size, 1) for size in last]
    return {
        "first": [(size, shape.frozen) for size in whole] + forward + [((heads, d, VOCABULARY), 1)],
        "first_attention": 4 * d * (visible * (shape.blocks - 1) + visible_last),
        "forward": forward,
        "head": [((heads, d, VOCABULARY), 1), ((heads, VOCABULARY, d), 1)],
        "later_attention": 3 * 4 * d * (visible * (trainable - 1) + visible_last),
    }


def floor_seconds(
    pairs: Sequence[EncodedPair], shape: Shape, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Time of those products alone, measured here and now on their own shapes: a floor for "first" and "later".

    Also rate, in FLOP/s, of the later ones, and flop_first, flop_later.
    """
    work = products(pairs, shape)
    times: dict[tuple[int, int, int], float] = {}

    def seconds(shape: tuple[int, int, int]) -> float:
        if shape not in times:
            times[shape] = _time_product(shape, device, dtype)
        return times[shape]

    def flop(listed: list[tuple[tuple[int, int, int], int]]) -> float:
        return sum(2.0 * m * k * n * count for (m, k, n), count in listed)

    first = sum(seconds(shape) * count for shape, count in work["first"])
    # forward [m,k]·[k,n]; for inputs [m,n]·[n,k]; for weights [k,m]·[m,n]
    backward = [(s, c) for (m, k, n), c in work["forward"] for s in ((m, n, k), (k, m, n))]
    later_products = work["forward"] + backward + work["head"]
    later = sum(seconds(shape) * count for shape, count in later_products)
    rate_first, rate = flop(work["first"]) / first, flop(later_products) / later
    return {
        "first_s": first + work["first_attention"] / rate_first,
        "later_s": later + work["later_attention"] / rate,
        "rate": rate,
        "flop_first": flop(work["first"]) + work["first_attention"],
        "flop_later": flop(later_products) + work["later_attention"],
    }


def _time_product(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Median seconds of one product (m, k, n) of 7, after one for warming up."""
    m, k, n = shape
    a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    found = []
    for _ in range(8):
        synchronise(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronise(device)
        found.append(time.perf_counter() - started)
    return sorted(found[1:])[3]


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batches(pairs: Sequence[EncodedPair], order: Sequence[int], size: int) -> Iterator[list[EncodedPair]]:
    """The pairs in this order, `size` at a time."""
    for start in range(0, len(order), size):
        yield [pairs[i] for i in order[start : start + size]]
