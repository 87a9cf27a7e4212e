"""Loss, gradient and statistics of language models against plain loops over unpadded sequences.

The oracles are written from the papers' and other libraries' formulas, in float64, one token after
another, and share no code with what they judge.
"""

import dataclasses
import math
import random

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from ppo_fast.functional.whiten import masked_whiten
from ppo_fast.llm import head
from ppo_fast.llm.config import RLHFConfig
from ppo_fast.llm.loss import TokenLoss
from ppo_fast.llm.models import Policy, make_critic, make_reference
from ppo_fast.llm.packing import micro_batches
from ppo_fast.llm.rollout import Sequences, TokenRollout
from ppo_fast.llm.scoring import evaluate_tokens, importance_weights, make_rollout
from ppo_fast.results import PPO_STATS
from ppo_fast.update import FlatAdam

V = 23
LLAMA = LlamaConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.3,
    num_labels=1,
    pad_token_id=0,
)
AGGREGATIONS = ["token", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]


def llama(seed, kind=LlamaForCausalLM):
    torch.manual_seed(seed)
    return kind(LLAMA).double().eval()


def gpt2(seed):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).double().eval()


def texts(seed=0, count=8):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(V) for _ in range(rng.randint(low, high))]

    return [ids(1, 9) for _ in range(count)], [ids(1, 7) for _ in range(count)]


class Case:
    """A policy, its reference and critic, and a rollout whose old policy was another one."""

    def __init__(self, model=llama, layout="auto", shared=True, count=8, **settings):
        settings = {
            "response_length": 7,
            "rollout_batch_size": count,
            "norm_adv": "none",
        } | settings
        self.config = RLHFConfig(**settings)
        self.model, self.ref_model = model(0), model(1)
        self.policy = Policy(self.model, layout)
        self.reference = make_reference(self.policy, self.ref_model, layout)
        self.value_model = None if shared else llama(2, LlamaForSequenceClassification)
        torch.manual_seed(3)
        self.critic = make_critic(self.policy, self.value_model, layout).double()
        parameters = dict.fromkeys([*self.model.parameters(), *self.critic.parameters()])
        self.optimizer = FlatAdam(parameters, 1e-3)
        self.sequences = Sequences(*texts(count=count), "cpu")
        found = evaluate_tokens(
            self.policy, self.critic, self.reference, self.sequences, self.config
        )
        self.evaluation = found
        generator = torch.Generator().manual_seed(4)

        def noise(scale):
            size = self.sequences.num_tokens
            return scale * torch.randn(size, generator=generator, dtype=torch.float64)

        advantages = noise(1.0) + 0.3
        in_loss = self.config.kl_in == "loss" and self.config.kl_coef > 0
        self.rollout = TokenRollout(
            self.sequences,
            found.log_probs + noise(0.3),
            found.values.double() + noise(0.4),
            advantages,
            found.values.double() + noise(0.8),
            torch.tensor(2.5, dtype=torch.float64),
            found.ref_log_probs if in_loss else None,
        )

    def loss(self):
        config = self.config
        in_loss = config.kl_in == "loss" and config.kl_estimator != "full"
        options = {
            "clip_coef": config.clip_coef,
            "clip_coef_high": config.clip_coef_high,
            "dual_clip": config.dual_clip,
            "vf_coef": config.vf_coef,
            "vf_clip_coef": config.vf_clip_coef,
            "vf_clip": config.vf_clip,
            "ent_coef": config.ent_coef,
            "kl_coef": config.kl_coef if in_loss else 0.0,
            "kl_estimator": "k3" if config.kl_estimator == "full" else config.kl_estimator,
            "temperature": config.temperature,
        }
        return TokenLoss(
            self.policy,
            self.critic,
            self.optimizer,
            self.reference,
            config,
            lambda: options,
            lambda: config.kl_coef,
        )

    def gradients(self):
        named = [*self.model.named_parameters()]
        named += [(f"critic.{n}", p) for n, p in self.critic.named_parameters()]
        return {name: p.grad.clone() for name, p in named}

    def run(self):
        """Loss, stats by name, gradients by name."""
        self.optimizer.zero_grad()
        result = self.loss()(self.rollout)
        stats = dict(zip(PPO_STATS, result.stats.tolist(), strict=True))
        return float(result.loss), stats, self.gradients()

    def expected(self):
        """The same by autograd through each sequence alone."""
        self.optimizer.zero_grad()
        loss, stats = plain_loss(self, self.config)
        loss.backward()
        return float(loss.detach()), stats, self.gradients()


def plain_outputs(case, index):
    """Log-softmax [T, V] of policy and reference and values [T] of one sequence, no padding."""
    prompt, response = case.sequences.prompts[index], case.sequences.responses[index]
    ids = torch.tensor([[*prompt, *response]])
    chosen = slice(len(prompt) - 1, -1)
    temperature = case.config.temperature
    # The models' attention is set up for packing; without packed=... it is transformers' own.
    out = case.model(input_ids=ids, output_hidden_states=True)
    own = (out.logits[0, chosen] / temperature).log_softmax(-1)
    with torch.no_grad():
        ref = (case.ref_model(input_ids=ids).logits[0, chosen] / temperature).log_softmax(-1)
    if case.value_model is None:
        states = out.hidden_states[-1][0, chosen]
    else:
        states = case.critic.trunk(input_ids=ids).last_hidden_state[0, chosen]
    return own, ref, (states @ case.critic.head.weight[0] + bias_of(case.critic.head))


def bias_of(layer):
    return 0.0 if layer.bias is None else layer.bias[0]


def plain_loss(case, config):
    rollout, sequences = case.rollout, case.sequences
    advantages, scale = rollout.advantages, 2.5
    if config.norm_adv == "minibatch":
        mean = sum(advantages) / len(advantages)
        variance = sum((a - mean) ** 2 for a in advantages) / (len(advantages) - 1)
        scale = 1 / (float(variance.sqrt()) + 1e-8)
        advantages = (advantages - mean) * scale
    high = config.clip_coef if config.clip_coef_high is None else config.clip_coef_high
    losses, counted, place = [], [], 0
    for index, response in enumerate(sequences.responses):
        own, ref, values = plain_outputs(case, index)
        of_tokens = []
        for t, token in enumerate(response):
            old, advantage = rollout.log_probs[place], advantages[place]
            ratio = (own[t, token] - old).exp()
            surrogate = torch.minimum(
                ratio * advantage, ratio.clamp(1 - config.clip_coef, 1 + high) * advantage
            )
            if config.dual_clip is not None and advantage < 0:
                surrogate = torch.maximum(surrogate, config.dual_clip * advantage)
            error = (values[t] - rollout.returns[place]) ** 2
            moved = torch.zeros(())
            if config.vf_clip_coef is not None:
                old_value, limit = rollout.values[place], config.vf_clip_coef
                near = old_value + (values[t] - old_value).clamp(-limit, limit)
                within = (near - rollout.returns[place]) ** 2
                error = torch.maximum(error, within) if config.vf_clip == "max" else within
                moved = ((values[t] - old_value).abs() > limit).double()
            probabilities = own[t].exp()
            entropy = -(probabilities * own[t]).sum()
            difference = ref[t, token] - own[t, token]
            kl = {
                "k1": -difference,
                "k2": difference**2 / 2,
                "k3": difference.exp() - 1 - difference,
                "full": (probabilities * (own[t] - ref[t])).sum(),
            }[config.kl_estimator]
            term = -surrogate + config.vf_coef * error / 2 - config.ent_coef * entropy
            # The exact KL in the reward has its own gradient, in the whitened advantages' unit.
            if config.kl_in == "loss":
                term = term + config.kl_coef * kl
            elif config.kl_estimator == "full":
                term = term + config.kl_coef * scale * kl
            of_tokens.append(term)
            counted.append(
                {
                    "entropy": entropy,
                    "kl": kl,
                    "approx_kl": ratio - 1 - ratio.log(),
                    "old_approx_kl": -ratio.log(),
                    "clip_fraction": ((ratio < 1 - config.clip_coef) | (ratio > 1 + high)).double(),
                    "value_clip_fraction": moved,
                    "ratio_mean": ratio,
                }
            )
            place += 1
        losses.append(of_tokens)
    total = aggregated(losses, config)
    stats = {
        name: float(sum(token[name].detach() for token in counted)) / place for name in counted[0]
    }
    return total, stats


def aggregated(losses, config):
    """DAPO's token mean; the mean of responses' means (GRPO) or sums; Dr. GRPO's constant."""
    tokens = sum(map(len, losses))
    if config.loss_aggregation == "token":
        return sum(map(sum, losses)) / tokens
    if config.loss_aggregation == "seq-mean-token-mean":
        return sum(sum(of) / len(of) for of in losses) / len(losses)
    if config.loss_aggregation == "seq-mean-token-sum":
        return sum(map(sum, losses)) / len(losses)
    return sum(map(sum, losses)) / (len(losses) * config.response_length)


def assert_close(found, expected, tolerance=2e-6):
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        difference = float((found[name] - gradient).abs().max()) / largest
        assert difference < tolerance, f"{name}: {difference:.1e} of the largest"


OBJECTIVES = {
    "clipped": {},
    "asymmetric and dual clip": {"clip_coef_high": 0.4, "dual_clip": 1.2},
    "value unclipped": {"vf_clip_coef": None, "vf_coef": 0.7},
    "value clipped as SB3": {"vf_clip": "clipped", "vf_coef": 0.7},
    "entropy, temperature": {"ent_coef": 0.05, "temperature": 0.7},
    "k2 in loss": {"kl_in": "loss", "kl_estimator": "k2", "kl_coef": 0.4},
    "k3 in loss": {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.4, "temperature": 1.3},
    "full in loss": {"kl_in": "loss", "kl_estimator": "full", "kl_coef": 0.4, "temperature": 1.3},
    "full in reward": {"kl_estimator": "full", "kl_coef": 0.4},
    "minibatch whitening": {"norm_adv": "minibatch"},
    "full in reward, minibatch whitening": {
        "kl_estimator": "full",
        "kl_coef": 0.4,
        "norm_adv": "minibatch",
    },
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_and_gradient_are_those_of_loops_over_sequences(objective, aggregation):
    case = Case(loss_aggregation=aggregation, token_budget=20, **OBJECTIVES[objective])
    loss, _, gradients = case.run()
    expected, _, exact = case.expected()
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert_close(gradients, exact)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("model", [llama, gpt2])
def test_every_kind_of_model_and_critic_has_the_gradient_of_the_loops(model, shared):
    case = Case(model, shared=shared, vf_coef=0.5, token_budget=25)
    _, _, gradients = case.run()
    _, _, exact = case.expected()
    assert_close(gradients, exact)
    assert any(name.startswith("critic.") for name in gradients)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_stats_are_means_over_real_tokens(aggregation):
    settings = {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.1}
    case = Case(loss_aggregation=aggregation, token_budget=20, **settings)
    _, stats, _ = case.run()
    _, expected, _ = case.expected()
    counted = set(expected)
    if aggregation == "seq-mean-token-mean":
        counted -= {"entropy", "kl", "approx_kl"}
    for name in counted:
        assert stats[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
    assert 0 < stats["clip_fraction"] < 1
    assert 0 < stats["value_clip_fraction"] < 1


def test_entropy_and_kl_of_the_mean_of_means_are_means_of_means():
    case = Case(loss_aggregation="seq-mean-token-mean", token_budget=20)
    _, stats, _ = case.run()
    means = []
    for index in range(len(case.sequences)):
        own, _, _ = plain_outputs(case, index)
        means.append(-(own.exp() * own).sum(-1).mean())
    assert stats["entropy"] == pytest.approx(float(sum(means)) / len(means), rel=1e-6)


CUTS = [{"token_budget": 1}, {"token_budget": 13}, {"token_budget": 40}, {"token_budget": 10_000}]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("norm_adv", ["none", "minibatch"])
def test_the_gradient_does_not_depend_on_the_cut_into_micro_batches(aggregation, norm_adv):
    fixed = {"loss_aggregation": aggregation, "norm_adv": norm_adv, "kl_estimator": "full"}
    results = [Case(**cut, **fixed).run() for cut in CUTS]
    assert len(micro_batches(Case(token_budget=13).sequences.lengths, 13)) > 3
    for loss, stats, gradients in results[:-1]:
        assert loss == pytest.approx(results[-1][0], rel=1e-6)
        assert stats == pytest.approx(results[-1][1], rel=1e-5, abs=1e-9)
        assert_close(gradients, results[-1][2], 1e-6)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("settings", [{}, OBJECTIVES["full in loss"]])
def test_the_gradient_does_not_depend_on_the_blocks_of_logits(monkeypatch, rows, settings):
    expected = Case(**settings).run()

    def blocks(hidden, vocabulary, megabytes):
        return [slice(start, start + rows) for start in range(0, len(hidden), rows)]

    monkeypatch.setattr(head, "row_blocks", blocks)
    loss, stats, gradients = Case(**settings).run()
    assert loss == pytest.approx(expected[0], rel=1e-9)
    assert stats == pytest.approx(expected[1], rel=1e-6, abs=1e-9)
    assert_close(gradients, expected[2], 1e-9)


@pytest.mark.parametrize(("megabytes", "most"), [(1, 1), (7, 7), (None, head.CPU_MEGABYTES)])
def test_blocks_of_logits_keep_to_their_megabytes(megabytes, most):
    hidden = torch.empty(1000, 1)
    blocks = list(head.row_blocks(hidden, 50_000, megabytes))
    assert torch.cat([hidden[own] for own in blocks]).shape == hidden.shape
    assert all((b.stop - b.start) * 50_000 * 4 <= most << 20 for b in blocks)
    assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]]
    # A row is the least there is.
    assert len(list(head.row_blocks(hidden[:3], 10**9, 1))) == 3


@pytest.mark.parametrize("shared", [True, False])
def test_layouts_and_gradient_checkpointing_have_one_gradient(shared):
    expected = Case(layout="packed", shared=shared).run()[2]
    assert_close(Case(layout="padded", shared=shared).run()[2], expected, 1e-6)
    for layout in ("packed", "padded"):
        case = Case(layout=layout, shared=shared)
        for part in (case.model, case.critic.trunk):
            if part is not None:
                part.gradient_checkpointing_enable({"use_reentrant": False})
                part.train()
        assert_close(case.run()[2], expected, 1e-6)


def test_minibatches_have_every_response_once_and_their_own_denominators():
    case = Case(num_minibatches=3, loss_aggregation="token")
    minibatches = case.loss().minibatches(case.rollout, case.config)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    minibatches.begin(0, order)
    assert sorted(i for part in minibatches._cut for i in part) == list(range(8))
    assert sorted(map(len, minibatches._cut)) == [2, 3, 3]
    for number, part in enumerate(minibatches._cut):
        minibatches.run(number)
        found = case.gradients()
        alone = Case(count=8)
        alone.sequences = Sequences(
            [case.sequences.prompts[i] for i in part],
            [case.sequences.responses[i] for i in part],
            "cpu",
        )
        _, rows = case.sequences.take(part)
        fields = ("log_probs", "values", "advantages", "returns")
        alone.rollout = dataclasses.replace(
            case.rollout,
            sequences=alone.sequences,
            **{name: getattr(case.rollout, name)[rows] for name in fields},
        )
        assert_close(found, alone.expected()[2])


def test_old_and_reference_log_probs_do_not_depend_on_the_batch():
    """In float32, where another order of additions would show in the seventh digit."""
    config = RLHFConfig(response_length=7)
    model, ref_model = llama(0).float(), llama(1).float()
    policy = Policy(model)
    reference = make_reference(policy, ref_model, "auto")
    critic = make_critic(policy, None, "auto")
    prompts, responses = texts()
    together = evaluate_tokens(
        policy, critic, reference, Sequences(prompts, responses, "cpu"), config
    )
    place = 0
    for prompt, response in zip(prompts, responses, strict=True):
        alone = evaluate_tokens(
            policy, critic, reference, Sequences([prompt], [response], "cpu"), config
        )
        own = slice(place, place + len(response))
        for name in ("log_probs", "ref_log_probs", "values", "entropy", "kl"):
            difference = (getattr(alone, name) - getattr(together, name)[own]).abs().max()
            assert difference < 2e-6, name
        place += len(response)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_kl_estimates_are_schulmans(estimator):
    case = Case(kl_estimator=estimator, temperature=0.8)
    place = 0
    for index, response in enumerate(case.sequences.responses):
        own, ref, _ = plain_outputs(case, index)
        for t, token in enumerate(response):
            log_ratio = float(own[t, token] - ref[t, token])
            expected = {
                "k1": log_ratio,
                "k2": 0.5 * log_ratio**2,
                "k3": math.exp(-log_ratio) + log_ratio - 1,
                "full": float((own[t].exp() * (own[t] - ref[t])).sum()),
            }[estimator]
            assert float(case.evaluation.kl[place]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
            place += 1


def verl_gae(rewards, values, mask, gamma, gae_lambda):
    """GAE over padded rows: places where the mask is 0 hand on what comes after them."""
    advantages = [[0.0] * len(row) for row in rewards]
    for row in range(len(rewards)):
        next_value, carried = 0.0, 0.0
        for t in reversed(range(len(rewards[row]))):
            delta = rewards[row][t] + gamma * next_value - values[row][t]
            candidate = delta + gamma * gae_lambda * carried
            if mask[row][t]:
                next_value, carried = values[row][t], candidate
            advantages[row][t] = carried
    return advantages


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0)])
def test_advantages_are_those_of_padded_rows(gamma, gae_lambda):
    case = Case(gamma=gamma, gae_lambda=gae_lambda)
    scores = torch.randn(8, generator=torch.Generator().manual_seed(1))
    coefficient = 0.3
    found = make_rollout(
        case.sequences, case.evaluation, scores, coefficient, case.evaluation.log_probs, case.config
    )
    lengths = case.sequences.response_lengths
    rewards, values, mask, place = [], [], [], 0
    for length, score in zip(lengths, scores.tolist(), strict=True):
        own = slice(place, place + length)
        reward = [-coefficient * kl for kl in case.evaluation.kl[own].tolist()]
        reward[-1] += score
        pad = max(lengths) - length
        # Padding holds numbers that would be seen.
        rewards.append(reward + [77.0] * pad)
        values.append(case.evaluation.values[own].tolist() + [-99.0] * pad)
        mask.append([1] * length + [0] * pad)
        place += length
    advantages = verl_gae(rewards, values, mask, gamma, gae_lambda)
    flat = [a for row, n in zip(advantages, lengths, strict=True) for a in row[:n]]
    torch.testing.assert_close(
        found.advantages, torch.tensor(flat, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(found.returns, found.advantages + found.values)


def test_whitening_is_trls_unbiased_and_not_openrlhfs_biased_one():
    case = Case(norm_adv="batch")
    scores = torch.randn(8, generator=torch.Generator().manual_seed(1))
    arguments = (case.sequences, case.evaluation, scores, 0.1, case.evaluation.log_probs)
    found = make_rollout(*arguments, case.config)
    raw = make_rollout(*arguments, dataclasses.replace(case.config, norm_adv="none"))
    x = raw.advantages.double()
    n, mean = len(x), float(sum(x)) / len(x)
    squares = sum((float(a) - mean) ** 2 for a in x)
    trl = (x - mean) * (squares / (n - 1) + 1e-8) ** -0.5
    torch.testing.assert_close(found.advantages.double(), trl, rtol=1e-5, atol=1e-6)
    biased = (x - mean) / math.sqrt(squares / n)
    torch.testing.assert_close(biased, trl * math.sqrt(n / (n - 1)), rtol=1e-5, atol=1e-6)
    assert (found.advantages - biased).abs().max() > 1e-3
    assert float(found.advantage_scale) == pytest.approx((squares / (n - 1)) ** -0.5, rel=1e-5)
    # Returns are targets in reward units; whitening must not reach them.
    assert torch.equal(found.returns, raw.returns)


def test_masked_whitening_of_padded_rows_is_that_of_the_real_tokens():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.tensor([[1.0, 4.0, math.nan], [2.5, math.nan, 7.0]])
    whole = masked_whiten(x, mask)
    real = torch.tensor([1.0, 4.0, 2.5])
    expected = (real - real.mean()) / real.std()
    torch.testing.assert_close(whole[mask], expected)
    assert (whole[~mask] == 0).all()


def test_whitened_rewards_keep_their_mean_and_have_deviation_one():
    case = Case(gae_lambda=0.0, gamma=1.0)
    evaluation = case.evaluation._replace(values=torch.zeros_like(case.evaluation.values))
    scores = torch.randn(8, generator=torch.Generator().manual_seed(1))
    arguments = (case.sequences, evaluation, scores, 0.4, evaluation.log_probs)
    raw = make_rollout(*arguments, case.config).advantages.double()
    config = dataclasses.replace(case.config, whiten_rewards=True)
    whitened = make_rollout(*arguments, config).advantages.double()
    mean = raw.mean()
    torch.testing.assert_close(whitened, (raw - mean) / raw.std() + mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "seq"])
def test_importance_weights_are_truncated_ratios(level):
    sequences = Sequences([[1], [2]], [[1, 2, 3], [4, 5]], "cpu")
    policy = torch.tensor([-1.0, -2.0, -1.5, -0.5, -3.0])
    sampler = torch.tensor([-1.2, -1.7, -3.0, -0.4, -2.8])
    config = RLHFConfig(importance_sampling=level, importance_cap=1.5)
    found = importance_weights(policy, sampler, sequences, config)
    token = [math.exp(0.2), math.exp(-0.3), math.exp(1.5), math.exp(-0.1), math.exp(-0.2)]
    seq = [math.exp(0.2 - 0.3 + 1.5)] * 3 + [math.exp(-0.3)] * 2
    expected = [min(w, 1.5) for w in (token if level == "token" else seq)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_importance_weights_reach_the_policy_and_not_the_value_loss():
    scores = torch.randn(8, generator=torch.Generator().manual_seed(1))
    case = Case(importance_sampling="token", importance_cap=1.3)
    shift = torch.linspace(-0.5, 0.5, case.sequences.num_tokens, dtype=torch.float64)
    sampled = case.evaluation.log_probs - shift
    weighted = make_rollout(case.sequences, case.evaluation, scores, 0.1, sampled, case.config)
    config = dataclasses.replace(case.config, importance_sampling="none")
    plain = make_rollout(case.sequences, case.evaluation, scores, 0.1, sampled, config)
    torch.testing.assert_close(
        weighted.advantages, plain.advantages * shift.exp().clamp(max=1.3), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(weighted.returns, plain.returns)
