"""PPO for language models against objectives summed over every possible response.

A vocabulary of four tokens, one of them the end, and at most three tokens a response: all responses
are enumerated, their probabilities and rewards known, so gradients and optimum are known exactly.
"""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("transformers")
from torch import multiprocessing as mp
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ppo_fast.llm.config import RLHFConfig
from ppo_fast.llm.loss import TokenLoss
from ppo_fast.llm.models import Policy, make_critic, make_reference
from ppo_fast.llm.ppo_trainer import PPOTrainer
from ppo_fast.llm.rollout import Sequences
from ppo_fast.llm.scoring import evaluate_tokens, make_rollout
from ppo_fast.update import FlatAdam

VOCABULARY, LENGTH, END, START = 4, 3, 3, 4
BETA = 0.3


def all_responses():
    """Every response that ends with END, or has LENGTH tokens without one."""
    found = []
    for length in range(1, LENGTH + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if END in tokens[:-1]:
                continue
            if tokens[-1] == END or length == LENGTH:
                found.append(list(tokens))
    return found


RESPONSES = all_responses()


def reward_table(seed):
    return torch.rand(len(RESPONSES), generator=torch.Generator().manual_seed(seed)).double()


def llama(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        initializer_range=0.3,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(seed):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY + 1,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=8,
        bos_token_id=START,
        eos_token_id=END,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).eval()


def log_prob_of(model, response):
    """Log-probability of each token of a response, by the model's own full forward."""
    return distributions(model, response)[torch.arange(len(response)), torch.tensor(response)]


def distributions(model, response):
    return model(input_ids=torch.tensor([[START, *response]])).logits[0, :-1].log_softmax(-1)


def objective(model, reference, rewards):
    """J = E[r - beta KL], by enumeration; differentiable."""
    total = 0.0
    for response, reward in zip(RESPONSES, rewards, strict=True):
        own = log_prob_of(model, response)
        with torch.no_grad():
            ref = log_prob_of(reference, response)
        total = total + own.sum().exp() * (reward - BETA * (own - ref).sum())
    return total


class HeadWithoutStart(torch.nn.Linear):
    """Gives START probability 0, so that the enumerated responses are all there are."""

    def forward(self, hidden):
        logits = super().forward(hidden)
        return logits.index_fill(-1, torch.tensor([START]), -torch.inf)


def no_start(model, head):
    """Forbid START in a way that the head's ops know ("fused"), or in one of the head's own."""
    if head == "logits":
        model.lm_head.__class__ = HeadWithoutStart
        return model
    words = model.lm_head.weight
    model.lm_head = torch.nn.Linear(words.shape[1], words.shape[0], dtype=words.dtype)
    with torch.no_grad():
        model.lm_head.weight.copy_(words)
        model.lm_head.bias.zero_()[START] = -torch.inf
    return model


class Setup:
    """A policy that has moved away from its reference, with a critic that is 0 everywhere."""

    def __init__(self, layout="packed", head="logits", **settings):
        self.config = RLHFConfig(
            response_length=LENGTH,
            gae_lambda=1.0,
            norm_adv="none",
            vf_coef=0.0,
            kl_coef=BETA,
            max_grad_norm=float("inf"),
            layout=layout,
            head=head,
            rollout_batch_size=len(RESPONSES),
            **settings,
        )
        self.model, self.ref_model = no_start(llama(0), head), no_start(llama(1), head)
        self.policy = Policy(self.model, layout, head=head)
        self.reference = make_reference(self.policy, self.ref_model, layout)
        self.critic = make_critic(self.policy, None, layout).double()
        with torch.no_grad():
            self.critic.head.weight.zero_()
        self.optimizer = FlatAdam([*self.model.parameters(), *self.critic.parameters()], 1e-3)

    def rollout(self, responses, rewards, weights):
        sequences = Sequences([[START]] * len(responses), responses, "cpu")
        evaluation = evaluate_tokens(
            self.policy, self.critic, self.reference, sequences, self.config
        )
        in_reward = BETA if self.config.kl_in == "reward" else 0.0
        rollout = make_rollout(
            sequences, evaluation, rewards.double(), in_reward, evaluation.log_probs, self.config
        )
        # The loss is homogeneous in the advantages, which thus carry the responses' probabilities.
        per_token = weights.repeat_interleave(torch.tensor(sequences.response_lengths))
        rollout.advantages = rollout.advantages * per_token
        return rollout

    def loss(self):
        options = {
            "clip_coef": 0.2,
            "vf_coef": 0.0,
            "kl_coef": 0.0,
            "temperature": self.config.temperature,
        }
        return TokenLoss(
            self.policy,
            self.critic,
            self.optimizer,
            self.reference,
            self.config,
            lambda: options,
            lambda: self.config.kl_coef,
        )

    def probabilities(self):
        with torch.no_grad():
            return torch.stack([log_prob_of(self.model, r).sum().exp() for r in RESPONSES])

    def gradient(self, rewards):
        """PPO's gradient of minus J, up to the aggregation's constant."""
        rollout = self.rollout(RESPONSES, rewards, self.probabilities())
        self.optimizer.zero_grad()
        self.loss()(rollout)
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def exact(self, rewards):
        self.optimizer.zero_grad()
        objective(self.model, self.ref_model, rewards).backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}


def assert_equal(gradient, exact, factor, tolerance=1e-6):
    largest = max(g.abs().max() for g in exact.values())
    for name, expected in exact.items():
        difference = (gradient[name] * factor + expected).abs().max() / largest
        assert difference < tolerance, f"{name}: {difference:.1e}"


def constant(aggregation):
    tokens = sum(map(len, RESPONSES))
    return {
        "token": tokens,
        "seq-mean-token-sum": len(RESPONSES),
        "constant": len(RESPONSES) * LENGTH,
    }[aggregation]


def test_enumerated_responses_have_probability_one():
    assert Setup().probabilities().sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("aggregation", ["token", "seq-mean-token-sum", "constant"])
@pytest.mark.parametrize("token_budget", [1, 7, 10_000])
@pytest.mark.parametrize("head", ["logits", "fused"])
def test_the_gradient_is_that_of_the_objective(layout, aggregation, token_budget, head):
    setup = Setup(layout, head, loss_aggregation=aggregation, token_budget=token_budget)
    assert (setup.policy.fused is None) == (head == "logits")
    rewards = reward_table(3)
    assert_equal(setup.gradient(rewards), setup.exact(rewards), constant(aggregation))


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("head", ["logits", "fused"])
def test_the_gradient_is_that_of_the_tempered_policy(temperature, head):
    setup = Setup(head=head, temperature=temperature)
    rewards = reward_table(5)
    sequences = Sequences([[START]] * len(RESPONSES), RESPONSES, "cpu")
    found = evaluate_tokens(setup.policy, None, setup.reference, sequences, setup.config)
    whole = torch.stack([part.sum() for part in found.log_probs.split([*map(len, RESPONSES)])])
    assert whole.exp().sum() == pytest.approx(1.0, abs=1e-9)
    setup.probabilities = lambda: whole.exp()
    gradient = setup.gradient(rewards)
    setup.optimizer.zero_grad()
    total = 0.0
    for response, reward in zip(RESPONSES, rewards, strict=True):
        place = (torch.arange(len(response)), torch.tensor(response))

        def tempered(model, response=response, place=place):
            return (distributions(model, response) / temperature).log_softmax(-1)[place]

        own, ref = tempered(setup.model), tempered(setup.ref_model).detach()
        total = total + own.sum().exp() * (reward - BETA * (own - ref).sum())
    total.backward()
    exact = {name: p.grad.clone() for name, p in setup.model.named_parameters()}
    assert_equal(gradient, exact, constant("token"))


def test_the_exact_kl_in_the_reward_has_the_gradient_of_the_objective():
    setup = Setup(kl_estimator="full")
    rewards = reward_table(4)
    exact = setup.exact(rewards)
    probabilities = setup.probabilities()
    rollout = setup.rollout(RESPONSES, rewards, probabilities)
    loss = setup.loss()
    minibatches = loss.minibatches(rollout, setup.config)
    # The state's own gradient is weighted by the probability of being there, as the advantages are.
    minibatches._weights = None
    minibatches.begin(0, torch.arange(len(RESPONSES)))
    setup.optimizer.zero_grad()
    minibatches.run(0)
    without_weights = {n: p.grad.clone() for n, p in setup.model.named_parameters()}
    setup.optimizer.zero_grad()
    loss.kl_coef = lambda: 0.0
    minibatches.run(0)
    policy_part = {n: p.grad.clone() for n, p in setup.model.named_parameters()}
    assert any((without_weights[n] - policy_part[n]).abs().max() > 1e-3 for n in policy_part)
    setup.optimizer.zero_grad()
    direct = 0.0
    for response, probability in zip(RESPONSES, probabilities, strict=True):
        own = distributions(setup.model, response)[:, :START]
        ref = distributions(setup.ref_model, response)[:, :START].detach()
        direct = direct + probability * (own.exp() * (own - ref)).sum()
    (BETA * direct).backward()
    tokens = constant("token")
    total = {n: policy_part[n] + p.grad / tokens for n, p in setup.model.named_parameters()}
    assert_equal(total, exact, tokens)


def test_k3_in_the_reward_is_not_the_gradient_of_the_kl():
    setup = Setup(kl_estimator="k3")
    rewards = reward_table(3)
    with pytest.raises(AssertionError):
        assert_equal(setup.gradient(rewards), setup.exact(rewards), constant("token"), 1e-2)


@pytest.mark.parametrize("head", ["logits", "fused"])
def test_responses_weigh_alike_in_the_mean_of_their_means(head):
    setup = Setup(
        head=head, loss_aggregation="seq-mean-token-mean", kl_in="loss", kl_estimator="k2"
    )
    setup.config = dataclasses.replace(setup.config, kl_coef=0.0)
    rewards, probabilities = reward_table(6), setup.probabilities()
    gradient = setup.gradient(rewards)
    setup.optimizer.zero_grad()
    total = 0.0
    for response, reward, probability in zip(RESPONSES, rewards, probabilities, strict=True):
        total = total + probability * reward * log_prob_of(setup.model, response).mean()
    total.backward()
    exact = {name: p.grad.clone() for name, p in setup.model.named_parameters()}
    assert_equal(gradient, exact, len(RESPONSES))


def run_rank(rank, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    setup = Setup()
    # Unequal shares: a mean of means would show.
    share = slice(0, 10) if rank == 0 else slice(10, None)
    rollout = setup.rollout(RESPONSES[share], reward_table(3)[share], setup.probabilities()[share])
    setup.optimizer.zero_grad()
    result = setup.loss()(rollout)
    if rank == 0:
        torch.save((setup.optimizer.gradients()[0], result.stats), results)
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path, unused_port):
    results = tmp_path / "gradient.pt"
    mp.spawn(run_rank, args=(unused_port, str(results)), nprocs=2)
    gradient, stats = torch.load(results)
    setup = Setup()
    rollout = setup.rollout(RESPONSES, reward_table(3), setup.probabilities())
    setup.optimizer.zero_grad()
    alone = setup.loss()(rollout)
    expected = setup.optimizer.gradients()[0]
    assert (gradient - expected).abs().max() < 1e-8 * expected.abs().max()
    torch.testing.assert_close(stats, alone.stats, rtol=1e-6, atol=1e-9)


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "estimator", "head"),
    [(0, "k1", "logits"), (1, "k1", "fused"), (2, "k1", "fused"), (0, "full", "logits")],
)
def test_training_comes_within_five_percent_of_the_optimum(seed, estimator, head):
    """J* = beta log sum pi_ref exp(r / beta), of the best policy there is; J0 of the reference."""
    beta, table = 0.5, reward_table(100 + seed)
    rewards = {tuple(r): float(x) for r, x in zip(RESPONSES, table, strict=True)}
    model = no_start(gpt2(seed), head)

    def log_probs():
        with torch.no_grad():
            return torch.stack([log_prob_of(model, r).sum() for r in RESPONSES]).double()

    ref = log_probs()
    best = beta * torch.logsumexp(ref + table / beta, 0)
    first = (ref.exp() * table).sum()
    trainer = PPOTrainer(
        RLHFConfig(
            total_episodes=128 * 150,
            rollout_batch_size=128,
            response_length=LENGTH,
            kl_coef=beta,
            kl_estimator=estimator,
            learning_rate=2e-3,
            seed=seed,
            head=head,
        ),
        model=model,
        ref_model="copy",
        train_dataset=[[START]],
        reward_fn=lambda completion_ids: [rewards[tuple(ids)] for ids in completion_ids],
    )
    trainer.learn()
    now = log_probs()
    reached = (now.exp() * (table - beta * (now - ref))).sum()
    assert (reached - first) / (best - first) > 0.95
