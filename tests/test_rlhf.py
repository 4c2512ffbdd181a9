"""RLHF: the estimators by hand and by enumeration, TRL's losses and gradients, and what each piece must not do."""

import itertools
import json
import math

import pytest
import torch
from datasets import Dataset
from test_training import PLAN, pairs, plan
from test_trl_parity import WORDS, encode, models, rows, words  # noqa: F401  # fixtures

from benchmarks import rlhf as benchmark
from conftest import tiny_gpt2
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.logprobs import PlainScorer
from dpo_helpers.models import freeze, weights_hash
from dpo_helpers.run.measures import best_of, calibration
from dpo_helpers.run.rlhf import (
    BradleyTerry,
    OnPolicy,
    RewardModel,
    RewardScorer,
    Rloo,
    leave_one_out,
    on_policy_dpo,
    rloo_losses,
)
from dpo_helpers.run.sampled import true_score
from dpo_helpers.run.watch import Points
from dpo_helpers.show import rlhf as stored
from dpo_helpers.tokens import EncodedPair, collate
from dpo_helpers.training import train
from dpo_helpers.worlds import embedded, tabular

BETA = 0.3


# the reward model


def reward_model(seed=0):
    """A tiny one whose head is not 0 any more."""
    model = RewardModel(tiny_gpt2(seed))
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def test_a_score_is_read_at_the_last_token_whatever_pads_the_row():
    model = reward_model()
    data = [EncodedPair([3, 4], [5, 0], [6, 7, 8, 9, 0]), EncodedPair([3], [1, 2, 0], [0])]
    batch = collate(data, pad_id=0)
    with torch.no_grad():
        together = model(batch.ids, batch.attention_mask)
        texts = [p.prompt + p.chosen for p in data] + [p.prompt + p.rejected for p in data]
        alone = torch.cat([model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)) for ids in texts])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        other_padding = torch.where(batch.attention_mask.bool(), batch.ids, 9)
        torch.testing.assert_close(model(other_padding, batch.attention_mask), together)
        on_padding = model(batch.ids, torch.ones_like(batch.attention_mask))
    assert (on_padding - together)[batch.attention_mask[:, -1] == 0].abs().min() > 1e-3, "padding has another score"


def test_responses_are_scored_in_their_order():
    """40 responses: two batches, sorted by length and back."""
    model = reward_model()
    prompts = [[1 + i % 7] * (1 + i % 5) for i in range(40)]
    responses = [[2 + i % 11] * (1 + (i * 7) % 9) for i in range(40)]
    alone = torch.cat([model.score([p], [r]) for p, r in zip(prompts, responses, strict=True)])
    torch.testing.assert_close(model.score(prompts, responses), alone, atol=1e-5, rtol=1e-5)
    assert len(set(alone.tolist())) > 30


def test_the_loss_of_bradley_and_terry_by_hand():
    """Scores 3 and 2: -log σ(1) = 0.313262; 0 and 2: -log σ(-2) = 2.126928; equal ones: ln 2."""
    losses, metrics = BradleyTerry()(range(3), torch.tensor([3.0, 0.0, 1.0]), torch.tensor([2.0, 2.0, 1.0]))
    assert losses.tolist() == pytest.approx([0.313262, 2.126928, math.log(2)], abs=1e-6)
    assert metrics["margin"].tolist() == [1.0, -2.0, 0.0]
    assert metrics["accuracy"].tolist() == [1.0, 0.0, 0.0]


def test_a_reward_model_learns_with_the_one_loop_and_leaves_the_frozen_blocks(cpu):
    """Chosen responses hold a 7, rejected ones an 8; the first loss is ln 2, since the head starts at 0."""
    data = [EncodedPair([1 + i % 5], [7, 2 + i % 3, 0], [8, 2 + i % 3, 0]) for i in range(32)]
    policy = tiny_gpt2()
    freeze(policy, 1)
    model = RewardModel(policy)
    before = weights_hash(policy.transformer.h[0])
    logged = train(model, data, RewardScorer(data, 0), BradleyTerry(), plan(epochs=5, learning_rate=3e-3), cpu)
    assert logged[0]["loss"] == pytest.approx(math.log(2))
    assert logged[-1]["loss"] < 0.1
    assert weights_hash(policy.transformer.h[0]) == before
    scores = score_pairs(model, data, RewardScorer(data, 0), cpu)
    assert (scores.chosen > scores.rejected).all()
    torch.testing.assert_close(model.score([p.prompt for p in data], [p.chosen for p in data]), scores.chosen)


def test_trls_reward_trainer_has_the_same_loss_and_gradient(words, rows, tmp_path):  # noqa: F811
    """Its model reads the score at the last token that is not padding, which must not be end-of-text: another id pads."""
    trl = pytest.importorskip("trl", reason="TRL needs Python 3.11 or later")
    from transformers import GPT2ForSequenceClassification

    words.add_special_tokens({"pad_token": "<pad>"})
    base = tiny_gpt2(seed=3, vocab=len(words))
    theirs = GPT2ForSequenceClassification(base.config)
    theirs.config.pad_token_id, theirs.config.num_labels = words.pad_token_id, 1
    theirs.score = torch.nn.Linear(16, 1, bias=False)
    theirs.num_labels = 1
    theirs.transformer = base.transformer
    freeze(base, 1)
    mine = RewardModel(base)
    with torch.no_grad():
        mine.head.weight.copy_(theirs.score.weight)
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "max_length": None,
               "gradient_checkpointing": False, "disable_tqdm": True, "per_device_train_batch_size": len(rows)}  # fmt: skip
    texts = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in rows]
    trainer = trl.RewardTrainer(
        theirs, trl.RewardConfig(**options), train_dataset=Dataset.from_list(texts), processing_class=words
    )
    data = encode(words, rows)
    for ours, row in zip(data, trainer.train_dataset, strict=True):
        assert (ours.prompt + ours.chosen, ours.prompt + ours.rejected) == (row["chosen_ids"], row["rejected_ids"])
    trainer.model.eval()
    loss = trainer.compute_loss(theirs, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    of_head = theirs.score.weight.grad
    expected = {name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None}
    base.zero_grad()
    losses, _ = BradleyTerry()(range(len(data)), *RewardScorer(data, words.pad_token_id)(mine, range(len(data))))
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(loss.item(), abs=1e-6)
    assert abs(loss.item() - math.log(2)) > 0.01, "the head is not 0"
    assert (mine.head.weight.grad - of_head).norm() <= 1e-6 * max(1.0, of_head.norm())
    assert len(expected) > 10
    for name, p in base.named_parameters():
        if name in expected:
            assert (p.grad - expected[name]).norm() <= 1e-6 * max(1.0, expected[name].norm()), name


# the policy gradient


def test_the_baseline_leaves_the_sample_itself_out():
    """1, 2, 6: 1 - (2 + 6)/2 = -3, 2 - (1 + 6)/2 = -1.5, 6 - (1 + 2)/2 = 4.5; their sum is 0."""
    advantages = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))
    assert advantages.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


def test_losses_by_hand():
    """β 0.5, old - reference (1, -1), scores (2, 1): rewards 1.5 and 1.5, no advantage. Scores (3, 1): 2.5 and 1.5, so
    advantages 1 and -1; with ratios 2 and 1/2 the gain is (2 - 1/2)/2 = 0.75. Clipped at 0.2: min(2, 1.2) = 1.2 and
    min(-1/2, -0.8) = -0.8, so (1.2 - 0.8)/2 = 0.2."""
    old, reference = torch.tensor([[-4.0, -5.0]]), torch.tensor([[-5.0, -4.0]])
    logps = old + torch.tensor([[math.log(2), -math.log(2)]])
    assert rloo_losses(logps, old, reference, torch.tensor([[2.0, 1.0]]), 0.5).tolist() == [0.0]
    scores = torch.tensor([[3.0, 1.0]])
    assert rloo_losses(logps, old, reference, scores, 0.5).item() == pytest.approx(-0.75)
    assert rloo_losses(logps, old, reference, scores, 0.5, clip=0.2).item() == pytest.approx(-0.2)
    assert rloo_losses(old, old, reference, scores, 0.5).item() == 0.0, "without a step the loss is 0"


def test_the_gradient_goes_through_the_log_probabilities_alone():
    """d loss / d logps = -advantage/k where old is logps; neither the KL in the reward nor the scores pass one on."""
    logps = torch.tensor([[-4.0, -5.0]], requires_grad=True)
    scores = torch.tensor([[3.0, 1.0]], requires_grad=True)
    rloo_losses(logps, logps.detach(), torch.tensor([[-5.0, -4.0]]), scores, 0.5).sum().backward()
    assert logps.grad.tolist() == [[-0.5, 0.5]]
    assert scores.grad is None


def expected_loss(world, beta, k, losses=rloo_losses):
    """The mean of a loss over all k-tuples of responses, each with its probability (without gradient): log_policy -> scalar."""
    tuples = torch.tensor(list(itertools.product(range(len(world.reward)), repeat=k)))  # [K^k, k]

    def loss(log_policy):
        logps = log_policy[tuples]
        each = losses(logps, logps.detach(), world.reference.log()[tuples], world.reward[tuples], beta)
        return (logps.detach().sum(dim=1).exp() * each).sum()

    return loss


def gradient(loss, log_policy):
    logits = log_policy.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(logits.log_softmax(dim=0)), logits)
    return found


def objective(world, beta):
    """-J: the mean reward minus β KL, exactly."""
    return lambda log_p: -(log_p.exp() * (world.reward - beta * (log_p - world.reference.log()))).sum()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_estimator_is_unbiased(k):
    """Over all K^k tuples the gradient of the loss is that of -J. A baseline with the sample in it shrinks it by 1/k."""
    world = tabular.make_world(4, seed=1)
    at = torch.tensor([0.3, -0.5, 1.0, 0.1], dtype=torch.float64).log_softmax(dim=0)
    exact = gradient(objective(world, BETA), at)
    torch.testing.assert_close(gradient(expected_loss(world, BETA, k), at), exact)

    def with_itself(logps, old, reference, scores, beta):
        rewards = scores - beta * (old - reference)
        return -((logps - old).exp() * (rewards - rewards.mean(dim=1, keepdim=True))).mean(dim=1)

    torch.testing.assert_close(gradient(expected_loss(world, BETA, k, with_itself), at), exact * (k - 1) / k)

    def wrong_sign(logps, old, reference, scores, beta):
        return rloo_losses(logps, old, reference, scores, -beta)

    assert (gradient(expected_loss(world, BETA, k, wrong_sign), at) - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_descent_on_it_ends_at_the_optimum(beta):
    world = tabular.make_world(5, seed=2)
    history = tabular.follow(expected_loss(world, beta, 2), world.reference.log(), steps=4000, rate=1.0)
    assert tabular.total_variation(history[-1], tabular.dpo_optimum(world, beta)) < 1e-3
    assert tabular.total_variation(history[-1], tabular.dpo_optimum(world, 2 * beta)) > 0.02


def constant(value):
    """A reward function for TRL that gives fixed rewards, one per completion."""

    def reward(completions, **_):
        return value[: len(completions)]

    return reward


@pytest.mark.parametrize("moved", [False, True])
def test_trls_rloo_trainer_has_the_same_loss_and_gradient(words, rows, tmp_path, moved):  # noqa: F811
    """TRL samples and scores a batch; then the loss where the policy is still the sampling one, and after it moved."""
    trl = pytest.importorskip("trl", reason="TRL needs Python 3.11 or later")
    policy, reference = models(words)
    words.add_special_tokens({"pad_token": "<|endoftext|>"})
    scores, k = torch.randn(8, generator=torch.Generator().manual_seed(5)), 4
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "beta": BETA,
               "num_generations": k, "per_device_train_batch_size": 8, "max_completion_length": 6, "temperature": 1.0,
               "gradient_checkpointing": False, "disable_tqdm": True, "epsilon": 0.2, "top_k": 0}  # fmt: skip
    same_length = [
        p.prompt for p in (rows[0], rows[4])
    ]  # TRL pads on the left and lets GPT-2 count padding as positions
    texts = Dataset.from_list([{"prompt": prompt} for prompt in same_length])
    reference.save_pretrained(tmp_path / "reference")
    policy.config._name_or_path = str(tmp_path / "reference")  # where TRL takes π_ref from
    trainer = trl.RLOOTrainer(
        policy, constant(scores.tolist()), trl.RLOOConfig(**options), train_dataset=texts, processing_class=words
    )
    torch.manual_seed(0)
    trainer.model.train()
    policy.eval()  # no dropout, as ours
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in same_length for _ in range(k)])
    if moved:
        with torch.no_grad():
            for name, p in sorted(policy.named_parameters()):
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    policy.zero_grad()
    loss = trainer._compute_loss(policy, batch)
    loss.backward()
    theirs = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    responses = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    data = list(map(EncodedPair, prompts, responses, responses))
    plain = PlainScorer(data, 0)
    policy.zero_grad()
    (logps,) = plain(policy, range(8), ("chosen",))
    with torch.no_grad():
        (of_reference,) = plain(reference, range(8), ("chosen",))
    old = batch["old_logps"] if moved else logps.detach()
    given = (x.view(-1, k) for x in (logps, old, of_reference, scores))
    losses = rloo_losses(*given, BETA, clip=0.2)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(loss.item(), abs=1e-6)
    if moved:
        assert abs(loss.item()) > 1e-3
    assert len(theirs) > 10
    for name, p in policy.named_parameters():
        if name in theirs:
            assert theirs[name].norm() > 0
            assert (p.grad - theirs[name]).norm() <= 1e-6 * max(1.0, theirs[name].norm()), name


# sampling inside the loop


def likes(token):
    """A score that counts a token."""
    return lambda prompts, responses: torch.tensor([float(response.count(token)) for response in responses])


def likes_large(prompts, responses):
    """A score that hardly ever ties: the mean id."""
    return torch.tensor([sum(response) / len(response) for response in responses])


def sampler(policy, reference, score=None, frozen=0, n=8):
    prompts = [[1 + i % 5, 2 + i % 3] for i in range(n)]
    return OnPolicy(prompts, reference, score or likes(7), eos=0, frozen=frozen, k=4, max_new_tokens=6)


def frozen_twins():
    policy, reference = tiny_gpt2(), tiny_gpt2()
    freeze(policy, 1)
    reference.requires_grad_(False)
    return policy, reference


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_a_sampler_gives(frozen):
    """At the start policy and reference agree, so all log-ratios are 0; the rest is recomputed sample by sample."""
    policy, reference = frozen_twins()
    samples = sampler(policy, reference, frozen=frozen)
    torch.manual_seed(3)
    logps, of_reference, scores, lengths = samples(policy, [0, 5, 2])
    assert logps.shape == of_reference.shape == scores.shape == lengths.shape == (3, 4)
    torch.testing.assert_close(logps, of_reference)
    assert logps.requires_grad
    assert not of_reference.requires_grad
    torch.manual_seed(3)
    drawn = samples.draw(policy, [samples.prompts[i] for i in (0, 5, 2)], 4)
    flat = [(p.prompt, side) for p in drawn for side in (p.chosen, p.rejected)]
    assert [prompt for prompt, _ in flat] == [samples.prompts[i] for i in (0, 5, 2) for _ in range(4)]
    assert lengths.flatten().tolist() == [len(response) for _, response in flat]
    assert scores.flatten().tolist() == [response.count(7) for _, response in flat]
    assert samples.tokens == 2 * lengths.sum()
    assert all(0 not in response[:-1] for _, response in flat), "nothing follows end-of-text"
    alone = [PlainScorer([EncodedPair(p, r, r)], 0)(policy, [0], ("chosen",))[0].item() for p, r in flat]
    assert logps.flatten().tolist() == pytest.approx(alone, abs=1e-4)


def test_plain_and_fast_path_train_alike(cpu):
    """The same samples and rewards, and the same gradients to rounding."""
    runs = []
    for frozen in (0, 1):
        policy, reference = frozen_twins()
        samples = sampler(policy, reference, frozen=frozen)
        runs.append(train(policy, pairs(8), samples, Rloo(0.1), plan(epochs=2, learning_rate=1e-3), cpu))
    for plain, fast in zip(*runs, strict=True):
        assert plain["score"] == fast["score"]
        assert plain["k1"] == pytest.approx(fast["k1"], abs=1e-3)
        assert plain["grad_norm"] == pytest.approx(fast["grad_norm"], rel=1e-3)


def test_rloo_raises_the_score_and_beta_holds_it(cpu):
    """60 updates towards a token: without a price the score rises most; the reference stays as it is."""
    ends = {}
    for beta in (0.0, 5.0):
        policy, reference = frozen_twins()
        before = weights_hash(reference)
        samples = sampler(policy, reference, n=40)
        how = plan(epochs=6, learning_rate=5e-3, optimizer="adamw", batch_size=4, warmup_steps=0)
        logged = train(policy, pairs(40), samples, Rloo(beta), how, cpu)
        assert weights_hash(reference) == before
        assert logged[0]["loss"] == pytest.approx(0.0, abs=1e-6)
        assert logged[0]["k1"] == pytest.approx(0.0, abs=1e-5)
        assert logged[0]["grad_norm"] > 1e-3
        ends[beta] = [sum(row[key] for row in logged[-10:]) / 10 for key in ("score", "k1")]
    assert ends[0.0][0] > ends[5.0][0] + 1
    assert ends[0.0][1] > ends[5.0][1] + 1


def test_samples_depend_on_seed_and_step_alone(cpu):
    """Whatever random numbers came before, the run is the same; another seed, another run."""
    runs = []
    for noise, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(noise)
        policy, reference = frozen_twins()
        logged = train(policy, pairs(8), sampler(policy, reference), Rloo(0.1), plan(seed=seed), cpu)
        runs.append([row["score"] for row in logged])
    assert runs[0] == runs[1] != runs[2]


def test_labels_by_hand():
    """Scores are numbers of 7s. Without noise the better one is chosen; equal responses are no pair."""
    samples = sampler(None, None)
    drawn = [EncodedPair([1], [7, 0], [8, 0]), EncodedPair([1], [8, 0], [7, 7, 0]), EncodedPair([2], [9, 0], [9, 0])]
    assert samples.scores(drawn).tolist() == [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    assert samples.labelled(drawn, noisy=False) == [drawn[0], EncodedPair([1], [7, 7, 0], [8, 0])]
    torch.manual_seed(0)
    many = samples.labelled([drawn[1]] * 2000, noisy=True)
    share = sum(pair.chosen == [7, 7, 0] for pair in many) / 2000
    assert share == pytest.approx(1 / (1 + math.exp(-2)), abs=0.03), "σ(2) = 0.881"


def test_on_policy_dpo_raises_the_score_from_its_own_samples(cpu):
    policy, reference = frozen_twins()
    samples, before = sampler(policy, reference, likes_large, n=96), weights_hash(reference)
    logged = on_policy_dpo(policy, samples, 0.1, plan(epochs=1, learning_rate=3e-3), cpu, rounds=3, noisy=False)
    assert weights_hash(reference) == before
    assert sum(row["step"] == 1 for row in logged) == 3, "three trainings"
    torch.manual_seed(9)
    of_policy, of_reference = (samples.scores(samples.draw(m, samples.prompts, 4)).mean() for m in (policy, reference))
    assert of_policy > of_reference + 3
    assert logged[0]["loss"] == pytest.approx(math.log(2)), "the policy starts at its reference"
    later = next(row for i, row in enumerate(logged) if i and row["step"] == 1)
    assert abs(later["loss"] - math.log(2)) > 1e-3, "the reference stays where it was"


# what is measured


def test_the_best_of_n_by_hand():
    """Scores 1 5 2 3, values 10 20 30 40: best of 1 is the mean, 25; of 2 (20 + 40)/2; of 4 20."""
    scores, values = torch.tensor([[1.0, 5.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    assert [best_of(scores, values, n).tolist() for n in (1, 2, 4)] == [[25.0], [30.0], [20.0]]
    with pytest.raises(RuntimeError):
        best_of(scores, values, 3)


def test_the_kl_of_the_best_of_n_is_below_its_bound():
    """Exactly, in a table: P(best is y) = F(y)^n - F(before y)^n by rising reward. With many fine steps it is the bound."""
    for responses, close in ((5, False), (20_000, True)):
        reference = torch.full((responses,), 1 / responses, dtype=torch.float64)
        for n in (2, 4, 16):
            up_to = reference.cumsum(dim=0)
            best = up_to**n - (up_to - reference) ** n
            kl, bound = tabular.kl_divergence(best, reference), math.log(n) - (n - 1) / n
            assert best.sum().item() == pytest.approx(1.0)
            assert kl < bound
            assert (kl == pytest.approx(bound, abs=1e-3)) is close


def test_calibration_by_hand():
    """Margins ln 3, -ln 3 and ln 3 expect to agree with probability 3/4 and do so in 2 of 3; ln 19: 0.95, always."""
    margins = torch.tensor([math.log(3), -math.log(3), math.log(3), math.log(19), math.log(19)])
    low, high = calibration(margins, (0.5, 0.8, 0.9, 1.0))
    assert (low["pairs"], high["pairs"]) == (3, 2)
    assert low["predicted"] == pytest.approx(0.75)
    assert low["observed"] == pytest.approx(2 / 3)
    assert low["observed_se"] == pytest.approx(1 / 3)
    assert high["predicted"] == pytest.approx(0.95)
    assert high["observed"] == 1.0
    assert sum(row["pairs"] for row in calibration(torch.tensor([100.0, 0.0]), (0.5, 1.0))) == 2, "0.5 and 1 are inside"


def test_the_true_reward_as_a_score(tokenizer):
    prompt = embedded.sampling_prompts(1)[0]
    texts = [" I am happy to help. Good luck!", " It depends."]
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    found = true_score(tokenizer)([tokenizer.encode(prompt)] * 2, ids)
    assert found.tolist() == pytest.approx([embedded.true_reward(prompt, text) for text in texts])
    assert found[0] > found[1] + 1


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4, 6]), (4, [0, 4, 6])])
def test_points_are_measured_before_on_the_way_and_at_the_end(cpu, every, steps):
    policy, reference = frozen_twins()
    seen = []

    def evaluate(model, step):
        seen.append((model is policy, step))
        return {"kl": float(step)}

    data = pairs(10)
    logged = train(policy, data, sampler(policy, reference, n=10), Rloo(0.1), PLAN, cpu, watch=Points(evaluate, every))
    held_out = [row for row in logged if row["split"] == "held_out"]
    assert [(row["step"], row["kl"]) for row in held_out] == [(step, float(step)) for step in steps]
    assert seen == [(True, step) for step in steps]


# the stored results


def test_what_the_notebook_shows_is_what_the_benchmark_stored():
    """The package's file is the summary of benchmarks/results/rlhf.json: no number was written by hand."""
    results = json.loads(benchmark.OUT.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(benchmark.summary(results))) == stored.stored()
    assert {row["family"] for row in stored.stored()["methods"]} == set(benchmark.SETTINGS)
    for row in stored.stored()["methods"]:
        assert all(math.isfinite(row[key]) for key in ("kl", "kl_se", "true_reward", "true_reward_se", "cpu_s"))
    assert len(stored.stored()["seeds"]["DPO"]) == len(stored.stored()["seeds"]["RLOO"]) == 10


def test_reading_the_stored_results(monkeypatch):
    """Of three seeds one ended below the start; RLOO's objective by hand: 1.5 - 0.5 · 2 = 0.5."""
    assert benchmark.objective({"metrics": {"score_4000": 1.5, "kl": 2.0}}, 0.5) == pytest.approx(0.5)
    seeds = {"start": {"true_reward": 0.0}, "DPO": [{"true_reward": x} for x in (-0.1, 0.0, 1.0)]}
    row = {"name": "DPO", "family": "DPO", "cpu_s": 12.4, "reward_model_s": 0.0, "tokens": 1200, "peak_mb": 600.2,
           "settings": ["β", "rate"], "true_reward": 1.234, "true_reward_se": 0.1}  # fmt: skip
    monkeypatch.setattr(stored, "stored", lambda: {"seeds": seeds, "methods": [row]})
    assert stored.worse_seeds("DPO") == (1, 3)
    assert stored.method("DPO") is row
    with pytest.raises(KeyError, match="no method 'PPO'; there are DPO"):
        stored.method("PPO")
    (shown,) = stored.cost_rows()
    assert list(shown.values()) == ["DPO", 12, "–", "1,200", 600, 2, "1.23 ± 0.10"]
