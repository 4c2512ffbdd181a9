"""Fifteen things that go wrong in DPO runs, each with what one sees, why, what to do, and a small experiment.

They were collected from the issue trackers of TRL, Mitchell's code (EM), torchtune and others; the numbers in
`seen_in` are their threads. `experiment()` makes the thing happen in a second or so, on a CPU, and returns one
sentence with the numbers that it measured. `doctor` looks for the signs in a run of yours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..hh import Pair, parse_row
from ..logprobs import pair_logprobs, response_logprobs
from ..losses import dpo_loss
from ..run.loading import load_model, load_tokenizer
from ..settings import load_settings
from ..show.texts import distinct_n, ends_in_a_loop, repeated_share
from ..tokens import EncodedPair, collate, encode_pair, encode_pairs, encode_text, epoch_order
from ..uncertainty import bootstrap_mean
from ..worlds import embedded, tabular


@dataclass(frozen=True)
class Pain:
    """One thing that goes wrong: its number, what one sees, the cause, the remedy, where it was reported."""

    number: int
    symptom: str
    cause: str
    remedy: str
    seen_in: str
    experiment: Callable[[], str]


@cache
def _model() -> tuple[Any, Any]:
    settings = load_settings("mini", model="embedded")
    return load_model(settings), load_tokenizer(settings)


@cache
def _pairs() -> list[EncodedPair]:
    tokenizer = _model()[1]
    rows = embedded.preference_rows("train", 4)
    pairs = [pair for row in rows if isinstance(pair := parse_row(row), Pair)]
    return list(encode_pairs(tokenizer, pairs, max_length=256, max_prompt_length=128))


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def chosen_reward_falls() -> str:
    """Chosen and rejected share features, a third response does not: learning "not the rejected one" costs both."""
    features = _tensor(1.0, 2.0, 0.0)  # of chosen, rejected, and everything else that could be said
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    start = _tensor(0.05, 0.05, 0.9).log()
    for _ in range(50):
        log_p = (start + features * theta).log_softmax(dim=0)
        loss, chosen, rejected = dpo_loss(log_p[:1], log_p[1:2], start[:1], start[1:2], beta=0.5)
        (gradient,) = torch.autograd.grad(loss.sum(), theta)
        theta = (theta - 0.5 * gradient).detach().requires_grad_()
    return (
        f"after 50 updates the reward of the chosen response is {chosen.item():.2f}, of the rejected one "
        f"{rejected.item():.2f}; the margin is {(chosen - rejected).item():.2f}, the loss fell to {loss.item():.2f}"
    )


def beta_backwards() -> str:
    """The optimum's KL by β, in closed form, and the KL after 40 RMSprop updates, which hide β."""
    world, betas = tabular.make_world(), (0.1, 1.0, 5.0)
    optimum = [tabular.kl_divergence(tabular.dpo_optimum(world, b), world.reference) for b in betas]
    wins = tabular.infinite_preferences(world)
    short = [tabular.fit(world, wins, b, optimizer="rmsprop", steps=40, rate=1e-3).exp() for b in betas]
    after = [tabular.kl_divergence(p, world.reference) for p in short]
    return (
        "for β = 0.1, 1, 5 the optimum's KL is "
        + ", ".join(f"{x:.2f}" for x in optimum)
        + "; after 40 RMSprop updates "
        "it is " + ", ".join(f"{x:.4f}" for x in after)
    )


def stuck_at_ln_2() -> str:
    """The same batch, right, with an empty response mask, and with the policy as its own reference."""
    model, _ = _model()
    batch, norms, means = collate(_pairs(), 0), [], []
    empty = type(batch)(batch.ids, batch.attention_mask, torch.zeros_like(batch.response_mask), batch.rows)
    empty.response_mask[:, 1] = True  # one prompt token, the same on both sides
    for one, alias in ((batch, False), (empty, False), (batch, True)):
        model.zero_grad()
        logps = pair_logprobs(model, one)
        reference = logps if alias else tuple(x.detach() for x in logps)
        losses, *_ = dpo_loss(*logps, *reference, beta=0.5)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        means.append(round(losses.mean().item(), 4))
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
    return (
        f"the losses are {means[0]}, {means[1]} and {means[2]}; the gradient's norm is {norms[0]:.2f} as it should be, "
        f"{norms[1]:.4f} with no response token in the mask, {norms[2]:.4f} with the policy as its own reference"
    )


def rewards_not_zero_at_start() -> str:
    """Dropout on in the policy, off in the reference: equal weights, different log-probabilities."""
    model, _ = _model()
    batch = collate(_pairs(), 0)
    with torch.no_grad():
        reference = pair_logprobs(model, batch)
        torch.manual_seed(0)
        off = dpo_loss(*pair_logprobs(model, batch), *reference, beta=0.5)[1].abs().mean().item()
        on = dpo_loss(*pair_logprobs(_with_dropout(model), batch), *reference, beta=0.5)[1].abs().mean().item()
    model.eval()
    return f"mean |chosen reward| before any update: {off:.4f} with dropout off, {on:.2f} with dropout on"


def _with_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model.train()


def wrong_reference() -> str:
    """Training goes on from an SFT model, but the reference is reloaded by name and is the base model."""
    sft_chosen, sft_rejected = _tensor(-20, -31), _tensor(-25, -36)
    base_chosen, base_rejected = _tensor(-26, -33), _tensor(-27, -39)
    right = dpo_loss(sft_chosen, sft_rejected, sft_chosen, sft_rejected, beta=0.5)[0].mean().item()
    wrong = dpo_loss(sft_chosen, sft_rejected, base_chosen, base_rejected, beta=0.5)[0].mean().item()
    return f"first loss {right:.4f} against the model itself (ln 2 = 0.6931), {wrong:.4f} against another one"


def boundary_tokens_merge() -> str:
    """A prompt that ends with a space: tokenised jointly, it merges with the first word of the response."""
    tokenizer = _model()[1]
    prompt, response = "\n\nHuman: How can I grow roses?\n\nAssistant: ", "You can water them."
    apart = encode_text(tokenizer, prompt)
    joint = encode_text(tokenizer, prompt + response)[: len(apart)]
    shared = sum(1 for a, b in zip(apart, joint, strict=False) if a == b)
    return f"a prompt of {len(apart)} tokens shares its first {shared} with prompt + response tokenised together"


def never_stops() -> str:
    """GPT-2 pads with end-of-text: masking by id masks the real end too, so ending is never learned."""
    batch, eos = collate(_pairs(), 0), 0
    ends = batch.ids.eq(eos) & batch.response_mask
    by_id = ends & batch.ids.ne(eos)
    rows, right, wrong = len(batch.ids), int(ends.sum()), int(by_id.sum())
    return f"end-of-text tokens that are learned in {rows} rows: {right} by position, {wrong} by id"


def truncation_empties_responses() -> str:
    """A long prompt under a limit: keeping the start of the row leaves no response to learn from."""
    tokenizer = _model()[1]
    long = Pair("\n\nHuman: " + "How can I grow roses? " * 12 + "\n\nAssistant:", " Water them.", " It depends.")
    prompt = encode_text(tokenizer, long.prompt)
    kept = max(0, 64 - len(prompt))
    ours = encode_pair(tokenizer, long, max_length=64, max_prompt_length=48)
    return (
        f"prompt of {len(prompt)} tokens, limit 64: keeping the row's start leaves {kept} response tokens, keeping "
        f"the prompt's end leaves {len(ours.chosen)} and {len(ours.rejected)}"
    )


def fp16_not_a_number() -> str:
    """Sixteen bits: small gradients vanish, large numbers overflow; what helps is float32 and a scaler."""
    small = torch.tensor(1e-8)
    log_p = torch.tensor(-1061.7)
    overflow = (torch.tensor(300.0, dtype=torch.float16) ** 2).item()
    return (
        f"in fp16 a gradient of 1e-8 is {small.half().item():.0f} (times 65536: {(small * 65536).half().item():.6f}), "
        f"300² is {overflow}, and a log-probability of {log_p.item():.1f} is stored as {log_p.half().item():.1f}"
    )


def out_of_memory() -> str:
    """The logits of a whole paired batch at GPT-2's vocabulary, against those of the response positions."""
    pairs, length, response, vocabulary = 8, 512, 80, 50257
    whole, kept = (2 * pairs * n * vocabulary * 4 / 1e9 for n in (length, response))
    return (
        f"{pairs} pairs of {length} tokens: {whole:.1f} GB for all logits in float32, {kept:.1f} GB for {response} "
        "response positions"
    )


def degenerate_text() -> str:
    """Two answers, one of which loops, and the three measures that notice."""
    good, bad = "You can plant them in a sunny bed and water them.", "Also, water them. " * 6
    values = [(repeated_share(x), distinct_n([x], 2), ends_in_a_loop(x.strip())) for x in (good, bad)]
    return "; ".join(f"repeated 3-grams {r:.2f}, distinct-2 {d:.2f}, ends in a loop: {loop}" for r, d, loop in values)


def mean_instead_of_sum() -> str:
    """Dividing by the length divides β by it, differently for each side of each pair."""
    n_chosen, n_rejected = 40, 10
    log_ratios = _tensor(4.0), _tensor(-1.0)
    zero = _tensor(0.0)
    summed = dpo_loss(*log_ratios, zero, zero, beta=0.5)
    meaned = dpo_loss(log_ratios[0] / n_chosen, log_ratios[1] / n_rejected, zero, zero, beta=0.5)
    return (
        f"log-ratios 4 over {n_chosen} tokens and -1 over {n_rejected}: margin {(summed[1] - summed[2]).item():.2f} "
        f"from sums, {(meaned[1] - meaned[2]).item():.2f} from means, as if β were {0.5 / n_chosen:.4f} and "
        f"{0.5 / n_rejected:.2f}"
    )


def labels_unshifted() -> str:
    """Scoring at position t the token at t, which the model has already read."""
    model, _ = _model()
    batch = collate(_pairs(), 0)
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits
    right = response_logprobs(logits, batch.ids, batch.response_mask).mean().item()
    same = logits.log_softmax(dim=-1).gather(-1, batch.ids[..., None]).squeeze(-1)
    wrong = (same * batch.response_mask).sum(dim=-1).mean().item()
    return f"mean log-probability of a response: {right:.1f} shifted by one, {wrong:.1f} unshifted"


def noisy_accuracy() -> str:
    """The same true accuracy of 0.65, measured on 256 pairs, drawn four times."""
    generator = torch.Generator().manual_seed(0)
    draws = [(torch.rand(256, generator=generator) < 0.65).double() for _ in range(4)]
    return "accuracy 0.65, seen on 256 pairs: " + ", ".join(str(bootstrap_mean(d)) for d in draws)


def inexact_resume() -> str:
    """After a restart: order drawn from a generator's state, and order as a function of (seed, epoch)."""
    torch.manual_seed(0)
    torch.randperm(8)  # the first epoch, then the process dies
    second = torch.randperm(8).tolist()
    torch.manual_seed(0)
    same = second == torch.randperm(8).tolist()
    exact = epoch_order(8, 0, 1) == epoch_order(8, 0, 1)
    return f"second epoch after a restart is the same: {same} from a generator's state, {exact} from (seed, epoch)"


LN_2 = math.log(2)
PAINS: tuple[Pain, ...] = (
    Pain(1, "the mean chosen reward falls while the margin grows", "the loss sees the margin only",
          "plot both rewards; lower the rate, raise β, or add an SFT term if the fall hurts the text",
          "EM #8, #32, #36; TRL #800", chosen_reward_falls),
    Pain(2, "KL does not fall as β grows",
          "β pulls to the reference at the optimum; a short RMSprop run need not show it",
          "measure KL, train longer, and do not read β from a short run", "EM #4", beta_backwards),
    Pain(3, "the loss stays at 0.693", "no response token in the mask, or the reference is the policy",
          "check that masks are not empty, the gradient is not 0, and no tensor is shared with the reference",
          "TRL #1311, #1962; OpenRLHF #364", stuck_at_ln_2),
    Pain(4, "rewards are not 0 at the start", "dropout is on, or the reference runs in another precision",
          "model.eval() for every log-probability; the same precision for both", "EM #34; TRL #744",
          rewards_not_zero_at_start),
    Pain(5, "the reference is another model", "it was loaded by name again instead of kept",
          "hash the reference before and after; start the policy from it", "TRL #872, #1193, #1365", wrong_reference),
    Pain(6, "prompt tokens change with the response", "prompt and response were tokenised together",
          "tokenise them apart and join the ids", "TRL #2054, #6079, #6472", boundary_tokens_merge),
    Pain(7, "answers never stop", "end-of-text is masked by id, because padding has the same one",
          "mask by position", "TRL #734, #1623, #3091", never_stops),
    Pain(8, "responses are cut or empty", "the limit keeps the start of the row",
          "cut the prompt from its start; count and report", "TRL #3382, #5826, #6548", truncation_empties_responses),
    Pain(9, "NaN in fp16", "16 bits overflow and underflow",
          "float32 log-softmax, a GradScaler, bf16 where it is native", "TRL #878", fp16_not_a_number),
    Pain(10, "out of memory", "two models, a paired batch, logits at every position",
          "score the reference once, keep the logits of responses only, smaller micro-batches", "TRL #3168",
          out_of_memory),
    Pain(11, "degenerate text", "the policy went far from the reference", "lower the rate, raise β, stop earlier",
          "TRL #1025; EM #35", degenerate_text),
    Pain(12, "log-probabilities are means", "they were divided by the length", "sum them: DPO's β is for sums",
          "EM #40, #48, #68; TRL #1095", mean_instead_of_sum),
    Pain(13, "an offline score differs from the logged one", "labels are not shifted, or other rows are scored",
          "compare with a slow loop over tokens", "LLaMA-Factory #1447", labels_unshifted),
    Pain(14, "accuracy jumps about", "too few held-out pairs", "more pairs; an interval beside every accuracy",
          "TRL #2371", noisy_accuracy),
    Pain(15, "a resumed run is another run", "the data order lived in a generator's state",
          "make order a function of (seed, epoch)", "transformers #11323, #17032", inexact_resume),
)  # fmt: skip
