"""Parity with TRL's DPOTrainer on the same tiny GPT-2 and rows, and with a plain float64 two-row oracle."""

import math
import random

import pytest
import torch
from datasets import Dataset
from test_training import scored, train_in_parts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from conftest import tiny_gpt2
from dpo_helpers.device import Compute
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.hh import Pair
from dpo_helpers.logprobs import PairScores, pair_logprobs
from dpo_helpers.losses import dpo_loss
from dpo_helpers.models import freeze
from dpo_helpers.tokens import collate, encode_pair
from dpo_helpers.training import DPOObjective, TrainPlan

BETA, ROWS, UPDATES = 0.3, 8, 20
KINDS = [("sigmoid", 0.0), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.2), ("sigmoid_norm", 0.0), ("apo_zero", 0.0)]


WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t"]


@pytest.fixture
def words():
    """A tokenizer of 20 words. Few words and short responses keep log-probabilities near -10, where float32 steps
    by 1e-6; at -100 it steps by 8e-6, and no two implementations could agree to 1e-6."""
    vocabulary = {"<|endoftext|>": 0} | {word: i + 1 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def rows():
    rng = random.Random(0)

    def text(n):
        return "".join(f" {rng.choice(WORDS)}" for _ in range(n))

    return [Pair(text(2 + i % 4).strip(), text(1 + i % 3), text(1 + i % 2), i) for i in range(ROWS)]


def models(tokenizer):
    """A policy that has moved away from its reference, so that no log-ratio is 0."""
    policy, reference = (tiny_gpt2(seed=3, vocab=len(tokenizer)) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    freeze(policy, 1)
    return policy, reference


def trl_trainer(policy, reference, tokenizer, rows, folder, kind=("sigmoid", 0.0), **arguments):
    trl = pytest.importorskip("trl", reason="TRL needs Python 3.11 or later")

    class Recorder(trl.DPOTrainer):
        losses: list[float] = []

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

    Recorder.losses = []
    options = {
        "output_dir": str(folder), "beta": BETA, "loss_type": [kind[0]], "label_smoothing": kind[1], "max_length": None,
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "per_device_train_batch_size": len(rows), "disable_tqdm": True, **arguments,
    }  # fmt: skip
    texts = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in rows]
    return Recorder(
        policy, reference, trl.DPOConfig(**options), train_dataset=Dataset.from_list(texts), processing_class=tokenizer
    )


def encode(tokenizer, rows):
    return [encode_pair(tokenizer, pair, max_length=32, max_prompt_length=16) for pair in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_losses_rewards_and_gradients(kind, words, rows, tmp_path):
    policy, reference = models(words)
    trainer = trl_trainer(policy, reference, words, rows, tmp_path, kind)
    encoded = encode(words, rows)
    for ours, theirs in zip(encoded, trainer.train_dataset, strict=True):
        assert (ours.prompt, ours.chosen, ours.rejected) == tuple(
            theirs[f"{k}_ids"] for k in ("prompt", "chosen", "rejected")
        )

    trainer.model.eval()
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))]))
    loss = trainer._compute_loss(policy, inputs, return_outputs=False)
    loss.backward()
    theirs = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    logged = {key: values[-1] for key, values in trainer._metrics["eval"].items()}

    policy.zero_grad()
    batch = collate(encoded, 0)
    chosen, rejected = pair_logprobs(policy, batch)
    with torch.no_grad():
        reference_logps = pair_logprobs(reference, batch)
    tokens = batch.response_mask.sum(dim=-1).chunk(2)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, *reference_logps, beta=BETA, loss_type=kind[0], label_smoothing=kind[1], lengths=tokens
    )
    losses.mean().backward()

    def close(ours, other, what):
        assert ours == pytest.approx(other, rel=1e-6, abs=1e-6), what

    assert abs(chosen_rewards.mean().item()) > 0.01, "the policy is not its reference"
    close(losses.mean().item(), loss.item(), "loss")
    close(chosen.mean().item(), logged["logps/chosen"], "log-probability of chosen")
    close(rejected.mean().item(), logged["logps/rejected"], "log-probability of rejected")
    close(chosen_rewards.mean().item(), logged["rewards/chosen"], "chosen reward")
    close(rejected_rewards.mean().item(), logged["rewards/rejected"], "rejected reward")
    close((chosen_rewards - rejected_rewards).mean().item(), logged["rewards/margins"], "margin")
    close((chosen_rewards > rejected_rewards).float().mean().item(), logged["rewards/accuracies"], "accuracy")
    ours = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs) != set()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-6 * max(1.0, grad.norm()), name


def test_sixteen_bits_are_no_worse_than_theirs(words, rows, tmp_path, cpu):
    """bf16 inside autocast against float32's truth: the plain and the fast path, and TRL's own log-probabilities."""
    policy, reference = models(words)
    trainer = trl_trainer(policy, reference, words, rows, tmp_path)
    encoded = encode(words, rows)
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))]))
    half = Compute(torch.device("cpu"), "bf16")

    def error(scores):
        return (torch.cat([scores.chosen, scores.rejected]) - truth).pow(2).mean().sqrt().item()

    exact = scored(policy, encoded, cpu)
    truth = torch.cat([exact.chosen, exact.rejected])
    with half.autocast():
        theirs = torch.cat(trainer.compute_ref_log_probs(policy.eval(), inputs)).float()
    bound = (theirs - truth).pow(2).mean().sqrt().item()
    assert bound > 0
    assert error(scored(policy, encoded, half)) <= 1.1 * bound
    assert error(scored(policy, encoded, half, FastScorer(policy, encoded, 1))) <= 1.1 * bound


def test_a_training_run_of_20_updates(words, rows, tmp_path, cpu):
    """Full batches, RMSprop at a constant rate, clipped, dropout off: the losses of both at every update."""
    policy, reference = models(words)
    start = {name: p.clone() for name, p in policy.named_parameters()}
    arguments = {
        "max_steps": UPDATES,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "rmsprop",
        "max_grad_norm": 1.0,
    }
    trainer = trl_trainer(policy, reference, words, rows, tmp_path, **arguments)
    trainer.train()
    end = {name: p.clone() for name, p in policy.named_parameters()}

    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(start[name])
    encoded = encode(words, rows)
    batch = collate(encoded, 0)
    with torch.no_grad():
        of_reference = PairScores(*pair_logprobs(reference, batch), *batch.response_mask.sum(dim=-1).chunk(2))
    plan = TrainPlan(
        epochs=UPDATES, batch_size=len(encoded), micro_batch_size=3, learning_rate=1e-4, optimizer="rmsprop",
        warmup_steps=0, schedule="constant", max_grad_norm=1.0, seed=5,
    )  # fmt: skip
    logged = train_in_parts(policy, encoded, DPOObjective(of_reference, BETA), plan, cpu)
    ours = [row["loss"] for row in logged]
    assert len(trainer.losses) == len(ours) == UPDATES
    assert ours[0] - ours[-1] > 0.1, "it learned"
    assert max(abs(a - b) for a, b in zip(ours, trainer.losses, strict=True)) <= 1e-5
    for name, parameter in policy.named_parameters():
        assert (parameter - end[name]).abs().max() <= 1e-3, name  # RMSprop's first steps are 1e-3 long


def oracle(policy, reference, pair, beta):
    """One pair, two rows, no batch, no padding: the loss and the two rewards, in the models' precision."""

    def logp(model, response):
        logits = model(torch.tensor([pair.prompt + response])).logits[0]
        total = logits.new_zeros(())
        for i, token in enumerate(response):
            scores = logits[len(pair.prompt) + i - 1]
            total = total + scores[token] - torch.logsumexp(scores, dim=-1)
        return total

    chosen = logp(policy, pair.chosen) - logp(reference, pair.chosen).detach()
    rejected = logp(policy, pair.rejected) - logp(reference, pair.rejected).detach()
    loss = torch.log1p(torch.exp(-beta * (chosen - rejected)))
    return loss, beta * chosen.item(), beta * rejected.item()


def test_float64_against_the_two_row_oracle(words, rows):
    """Losses, rewards and every gradient tensor to 1e-12 relative, through padding, masks and batches."""
    policy, reference = (model.double() for model in models(words))
    encoded = encode(words, rows)
    losses, rewards = [], []
    for pair in encoded:
        loss, chosen, rejected = oracle(policy, reference, pair, BETA)
        (loss / len(encoded)).backward()
        losses.append(loss.item())
        rewards.append((chosen, rejected))
    expected = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    policy.zero_grad()
    batch = collate(encoded, 0)
    with torch.no_grad():
        reference_logps = pair_logprobs(reference, batch)
    tokens = batch.response_mask.sum(dim=-1).chunk(2)
    ours, chosen, rejected = dpo_loss(*pair_logprobs(policy, batch), *reference_logps, beta=BETA, lengths=tokens)
    ours.mean().backward()
    assert ours.dtype == torch.float64
    assert ours.tolist() == pytest.approx(losses, rel=1e-12)
    assert torch.stack([chosen, rejected], dim=1).flatten().tolist() == pytest.approx(
        [value for pair in rewards for value in pair], rel=1e-12, abs=1e-12
    )
    assert math.isclose(losses[0], math.log(2)) is False
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - expected[name]).norm() <= 1e-12 * expected[name].norm(), name
