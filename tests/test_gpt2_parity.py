"""GPT-2's real size, one identical batch: the fast path against the plain one, and against TRL's DPOTrainer."""

import pytest
import torch
from test_engine import losses_and_gradients
from test_training import scored
from test_trl_parity import BETA, trl_trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.hh import Pair
from dpo_helpers.logprobs import PlainScorer
from dpo_helpers.models import freeze
from dpo_helpers.tokens import EncodedPair
from dpo_helpers.training import DPOObjective

FROZEN = 8
LENGTHS = [(60, 20, 9), (12, 30, 44), (33, 5, 1), (90, 12, 25)]  # prompt, chosen, rejected


@pytest.fixture(scope="module")
def setting():
    """(pairs, policy, reference): random weights, the policy's last blocks moved away from the reference's."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(0, 50256, (n,), generator=generator).tolist()

    pairs = [EncodedPair(ids(p), ids(c), ids(r), i) for i, (p, c, r) in enumerate(LENGTHS)]
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config()).eval()
    reference = GPT2LMHeadModel(policy.config).eval()
    reference.load_state_dict(policy.state_dict())
    freeze(policy, FROZEN)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return pairs, policy, reference


@pytest.fixture(scope="module")
def plain(setting, cpu):
    """Log-probabilities, objective, losses and gradients of the plain path."""
    pairs, policy, reference = setting
    objective = DPOObjective(scored(reference, pairs, cpu), BETA)
    found = scored(policy, pairs, cpu)
    return found, objective, *losses_and_gradients(policy, objective, PlainScorer(pairs, 0), range(len(pairs)))


@pytest.mark.slow
def test_the_stored_output_is_that_of_the_frozen_blocks(setting, cpu):
    """hidden_states[8] on every real position of both rows of each pair, to 1e-5 relative."""
    pairs, policy, _ = setting
    fast = FastScorer(policy, pairs, FROZEN)
    scored(policy, pairs, cpu, fast)
    for i, pair in enumerate(pairs):
        stored = fast.store.get(i, len(pair.prompt) + len(pair.chosen) + len(pair.rejected) - 2)
        p, c = len(pair.prompt), len(pair.chosen) - 1
        for response, own in ((pair.chosen, stored[p : p + c]), (pair.rejected, stored[p + c :])):
            with torch.no_grad():
                hidden = policy(torch.tensor([pair.prompt + response]), output_hidden_states=True).hidden_states[FROZEN]
            rows = torch.cat([stored[:p], own])
            assert (rows - hidden[0, :-1]).norm() <= 1e-5 * hidden.norm()


@pytest.mark.slow
def test_the_fast_path_is_the_plain_path(setting, plain, cpu):
    pairs, policy, _ = setting
    scores, objective, losses, gradients = plain
    fast = FastScorer(policy, pairs, FROZEN)
    found = scored(policy, pairs, cpu, fast)
    assert (found.chosen - scores.chosen).abs().max() <= 1e-3
    assert (found.rejected - scores.rejected).abs().max() <= 1e-3
    own_losses, own_gradients = losses_and_gradients(policy, objective, fast, range(len(pairs)))
    assert abs(own_losses.mean() - losses.mean()) <= 1e-5
    assert losses.mean() < 0.69 or losses.mean() > 0.7, "the policy is not its reference"
    assert set(own_gradients) == set(gradients) != set()
    for name, gradient in gradients.items():
        assert (own_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.slow
def test_trl_gives_the_same(setting, plain, tmp_path):
    pairs, policy, reference = setting
    scores, _, losses, gradients = plain
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<|endoftext|>": 0})), eos_token="<|endoftext|>"
    )
    a_text = [Pair("", "", "")]  # the trainer wants one; the ids below are what it runs
    trainer = trl_trainer(policy, reference, tokenizer, a_text, tmp_path)
    inputs = trainer._prepare_inputs(trainer.data_collator([
        {"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs
    ]))  # fmt: skip
    trainer.model.eval()
    policy.zero_grad()
    loss = trainer._compute_loss(policy, inputs, return_outputs=False)
    loss.backward()
    logged = {key: values[-1] for key, values in trainer._metrics["eval"].items()}
    assert abs(loss.item() - losses.mean().item()) <= 1e-5
    assert logged["logps/chosen"] == pytest.approx(scores.chosen.mean().item(), abs=1e-3)
    assert logged["logps/rejected"] == pytest.approx(scores.rejected.mean().item(), abs=1e-3)
    for name, gradient in gradients.items():
        assert (policy.get_parameter(name).grad - gradient).norm() <= 1e-4 * gradient.norm(), name
