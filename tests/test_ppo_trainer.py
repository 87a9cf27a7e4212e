"""`PPOTrainer` on tiny models: what it computes, what it reports, and what it refuses."""

import csv
import itertools
import json
import logging
import math
import socket

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from ppo_fast import ControlConfig, log_probs_from_hidden
from ppo_fast.llm.config import RLHFConfig
from ppo_fast.llm.ppo_trainer import PPOTrainer, response_ids
from ppo_fast.llm.reward_model import RewardModel
from ppo_fast.llm.rewards import RewardError
from ppo_fast.llm.sampler import Responses

V, END, PAD, CONTEXT = 23, 3, 0, 32
PROMPTS = [[5], [6, 7], [8, 9, 10], [11, 4], [12, 5, 6, 7, 8], [13]]
TIMED = ("time/", "eps")


def config_of(**options):
    shape = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "num_labels": 1,
        "bos_token_id": 1,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return LlamaConfig(**(shape | options))


def llama(seed=0, kind=LlamaForCausalLM, **options):
    torch.manual_seed(seed)
    return kind(config_of(**options)).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=CONTEXT,
        initializer_range=0.2,
        eos_token_id=END,
        bos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


def fives(completion_ids):
    return [float(ids.count(5)) - 0.1 * len(ids) for ids in completion_ids]


def make(model=None, **options):
    settings = {
        "ref_model": "copy",
        "train_dataset": PROMPTS,
        "rollout_batch_size": 8,
        "total_episodes": 16,
        "response_length": 6,
        "learning_rate": 1e-3,
    }
    if "reward_model" not in options:
        settings["reward_fn"] = fives
    return PPOTrainer(model=llama() if model is None else model, **(settings | options))


def parameters(trainer):
    both = (trainer.policy.model, trainer.critic)
    return {
        f"{k}.{name}": p.detach().clone()
        for k, part in enumerate(both)
        for name, p in part.named_parameters()
    }


def joined(rows):
    return [*itertools.chain.from_iterable(rows)]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def untimed(metrics):
    return {name: x for name, x in metrics.items() if not name.startswith(TIMED)}


class Fixed:
    """A sampler that gives what it was given; what is past the ends is poison."""

    def __init__(self, responses, log_probs=None, length=6):
        self.responses, self.log_probs, self.length = responses, log_probs, length
        self.loads = 0

    def load_policy(self, model):
        self.loads += 1

    def __call__(self, prompts, *, max_new_tokens, temperature, seeds):
        chosen = [self.responses[i % len(self.responses)] for i in range(len(prompts))]
        tokens = torch.full((len(prompts), self.length), 10**6)
        log_probs = torch.full((len(prompts), self.length), math.nan)
        for row, ids in enumerate(chosen):
            tokens[row, : len(ids)] = torch.tensor(ids)
            given = self.log_probs[row] if self.log_probs else [-1.0] * len(ids)
            log_probs[row, : len(ids)] = torch.tensor(given)
        lengths = [len(ids) for ids in chosen]
        return Responses(tokens, log_probs, lengths, [ids[-1] == END for ids in chosen])


class Wrapped:
    """The trainer's own sampler, with its answer changed."""

    def __init__(self, change):
        self.change, self.inner = change, None

    def load_policy(self, model):
        self.inner.load_policy(model)

    def __call__(self, prompts, **options):
        return self.change(self.inner(prompts, **options))


def wrapped(change, **options):
    trainer = make(sampler=Wrapped(change), **options)
    trainer.sampler.inner = make(llama()).sampler.__class__(
        trainer.policy.model, trainer.stop_token_ids, trainer.pad_token_id
    )
    return trainer


def own_log_probs(model, prompt, response, temperature=1.0):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    table = (logits[len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
    return table[torch.arange(len(response)), torch.tensor(response)]


# The number of steps, and what a step does not depend on.


@pytest.mark.parametrize(
    ("epochs", "minibatches", "token_budget", "logits_mb"),
    [(1, 1, 8192, 256), (2, 3, 8192, 256), (4, 4, 1, 1), (3, 8, 20, 256), (1, 3, 7, 1)],
)
def test_an_update_takes_epochs_times_minibatches_steps(
    epochs, minibatches, token_budget, logits_mb
):
    trainer = make(
        update_epochs=epochs,
        num_minibatches=minibatches,
        token_budget=token_budget,
        logits_mb=logits_mb,
    )
    seen = []
    trainer.learn(lambda t: seen.append(t.metrics["val/optimizer_steps"]))
    assert seen == [epochs * minibatches] * 2
    steps = [t for name, t in trainer.optimizer.tensors("o").items() if name.endswith("step")]
    assert [int(step) for step in steps] == [2 * epochs * minibatches] * len(steps)


VARIANTS = [
    {"token_budget": 1},
    {"token_budget": 17},
    {"layout": "padded"},
    {"gradient_checkpointing": True},
    {"sample_batch_size": 3},
    {"sampler": "generate"},
]


@pytest.fixture(scope="module")
def plain_training():
    return trained_in_double()


def trained_in_double(**options):
    trainer = make(
        llama().double(),
        value_model=llama(7, LlamaForSequenceClassification).double(),
        num_minibatches=3,
        learning_rate=1e-4,
        **options,
    )
    before = parameters(trainer)
    trainer.learn()
    assert trainer.metrics["diag/ratio_dev_first"] < 1e-6
    after = parameters(trainer)
    assert all((after[n] - before[n]).abs().max() > 1e-5 for n in after if "embed" not in n)
    return after


@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: next(iter(v)) + str(next(iter(v.values())))
)
def test_the_result_does_not_depend_on_how_it_is_computed(variant, plain_training):
    found = trained_in_double(**variant)
    for name, expected in plain_training.items():
        assert (found[name] - expected).abs().max() < 1e-6, name


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"layout": "padded"}])
def test_the_ratio_is_one_on_the_first_minibatch(options):
    seen = []
    trainer = make(num_minibatches=2, total_episodes=24, **options)
    trainer.learn(lambda t: seen.append(t.metrics))
    assert len(seen) == 3
    assert max(metrics["diag/ratio_dev_first"] for metrics in seen) < 1e-5
    # The sampler's log-probs are of the same temperature, and of the same weights.
    assert max(metrics["sampler/mismatch_abs"] for metrics in seen) < 1e-5


@pytest.mark.parametrize("options", [{}, {"head_fp32": True}, {"kl_estimator": "full"}])
def test_a_run_in_bf16_is_finite_and_reports_its_ratio(options):
    trainer = make(
        precision="bf16", value_model=llama(7, LlamaForSequenceClassification), **options
    ).learn()
    assert all(p.dtype == torch.float32 for p in parameters(trainer).values())
    assert all(p.isfinite().all() for p in parameters(trainer).values())
    assert all(math.isfinite(x) for x in trainer.metrics.values())
    assert 0 <= trainer.metrics["diag/ratio_dev_first"] < 0.1
    # Sampled in float32, learnt in bfloat16: a mismatch, and reported as one.
    assert trainer.metrics["sampler/mismatch_abs"] > 0
    assert trainer.metrics["val/optimizer_steps"] == 4


def test_bf16_does_not_depend_on_the_blocks_of_logits(monkeypatch):
    from ppo_fast.llm import head

    def run():
        return parameters(make(precision="bf16", learning_rate=1e-5, total_episodes=8).learn())

    expected = run()
    monkeypatch.setattr(
        head, "row_blocks", lambda rows, *_: [slice(a, a + 3) for a in range(0, len(rows), 3)]
    )
    found = run()
    assert all((found[name] - expected[name]).abs().max() < 5e-5 for name in expected)


# What the sampler gives.


def test_values_beyond_a_response_never_enter():
    def poison(responses):
        tokens, log_probs = responses.tokens.clone(), responses.log_probs.clone()
        for row, length in enumerate(responses.lengths):
            tokens[row, length:] = 10**9
            log_probs[row, length:] = math.nan
        return responses._replace(tokens=tokens, log_probs=log_probs)

    settings = {"importance_sampling": "token", "response_length": 20, "train_dataset": PROMPTS[:4]}
    clean = wrapped(lambda responses: responses, **settings).learn()
    poisoned = wrapped(poison, **settings).learn()
    assert any(n < 20 for n in poisoned.responses.lengths)
    assert same(parameters(clean), parameters(poisoned))
    assert untimed(clean.metrics) == untimed(poisoned.metrics)


def test_an_own_sampler_gets_the_policy_before_every_use():
    sampler = Fixed([[4, 5, END], [5, 5, 5, 5, 5, 5]])
    trainer = make(sampler=sampler, eval_dataset=PROMPTS[:2], eval_every=2)
    trainer.learn()
    assert sampler.loads == 3
    trainer.generate(PROMPTS[:2])
    assert sampler.loads == 4


class Bad(Fixed):
    def __init__(self, change):
        super().__init__(RESPONSES)
        self.change = change

    def __call__(self, prompts, **options):
        return self.change(super().__call__(prompts, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: Responses(*(part[:3] for part in r)), r"tokens \[3, 6\]"),
        (lambda r: r._replace(log_probs=r.log_probs[:, :3]), r"log_probs \[8, 3\]"),
        (lambda r: r._replace(ended=r.ended[:2]), "2 ended"),
        (lambda r: r._replace(lengths=[0, *r.lengths[1:]]), "response 0 the length 0"),
        (lambda r: r._replace(lengths=[*r.lengths[:-1], 7]), "response 7 the length 7"),
        (lambda r: r._replace(tokens=r.tokens * 0 + V), f"token id {V}"),
    ],
)
def test_an_own_sampler_that_breaks_its_contract_is_named(change, message):
    with pytest.raises(ValueError, match=f"the sampler gave.*{message}"):
        make(sampler=Bad(change)).learn()


@pytest.mark.parametrize("word", ["auto", "cached", "generate"])
def test_a_sampler_may_be_given_by_its_word(word):
    assert make(sampler=word, total_episodes=8).learn().config.sampler == word


def test_large_seeds_are_as_good_as_small_ones():
    trainer = make(seed=20_261_123, total_episodes=8).learn()
    assert trainer.num_episodes == 8
    assert trainer.generate(PROMPTS[:1], seed=2**40)


def test_responses_of_different_seeds_differ():
    first, second = make(seed=1), make(seed=2)
    prompts = first.next_prompts()
    assert response_ids(first.sample(prompts)) != response_ids(second.sample(prompts))
    assert response_ids(first.sample(prompts)) == response_ids(first.sample(prompts))


# Rewards.

RESPONSES = [[4, 5, END], [5, 5, 5, 5, 5, 5], [END], [9, 8, 7, 6, 5, END]]
SCORES = [2.0, -1.0, 0.5, 4.0]


def token_rewards(**options):
    """Rewards by token, lists: with lambda 0 and V = 0 they are the advantages."""
    settings = {
        "gae_lambda": 0.0,
        "norm_adv": "none",
        "kl_coef": 0.0,
        "rollout_batch_size": 4,
        "reward_fn": lambda completion_ids: SCORES,
        "sampler": Fixed(RESPONSES),
    }
    trainer = make(**(settings | options))
    with torch.no_grad():
        trainer.critic.head.weight.zero_()
    prompts = trainer.next_prompts()
    rollout = trainer.score(prompts, trainer.sample(prompts))
    lengths = [len(r) for r in RESPONSES]
    return [part.tolist() for part in rollout.advantages.split(lengths)], trainer, prompts


def at_the_ends(scores):
    return [[0.0] * (len(r) - 1) + [s] for r, s in zip(RESPONSES, scores, strict=True)]


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, SCORES),
        ({"missing_eos_penalty": 1.5}, [2.0, -2.5, 0.5, 4.0]),
        ({"missing_eos_score": -9.0}, [2.0, -9.0, 0.5, 4.0]),
        ({"clip_scores": 1.0}, [1.0, -1.0, 0.5, 1.0]),
        ({"missing_eos_score": -9.0, "clip_scores": 3.0}, [2.0, -3.0, 0.5, 3.0]),
    ],
)
def test_a_score_is_the_reward_of_the_last_real_token(options, scores):
    found, _, _ = token_rewards(**options)
    assert found == at_the_ends(scores)


def test_whitened_scores_have_mean_zero_and_deviation_one():
    found, _, _ = token_rewards(whiten_scores=True, missing_eos_score=-9.0)
    scores = torch.tensor([2.0, -9.0, 0.5, 4.0])
    expected = at_the_ends(((scores - scores.mean()) / scores.std()).tolist())
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-5)


def test_whitened_rewards_are_scaled_and_not_moved():
    found, _, _ = token_rewards(whiten_rewards=True)
    raw = torch.tensor(joined(at_the_ends(SCORES)))
    expected = (raw - raw.mean()) / raw.std() + raw.mean()
    assert joined(found) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_kl_of_every_token_is_subtracted_and_reported_per_response(temperature):
    model, ref_model = llama(0), llama(1)
    found, trainer, prompts = token_rewards(
        model=model, ref_model=ref_model, kl_coef=0.2, temperature=temperature
    )
    sums = []
    for prompt, response, row, score in zip(prompts.ids, RESPONSES, found, SCORES, strict=True):
        kl = own_log_probs(model, prompt, response, temperature)
        kl = kl - own_log_probs(ref_model, prompt, response, temperature)
        expected = -0.2 * kl
        expected[-1] += score
        assert row == pytest.approx(expected.tolist(), abs=1e-5)
        sums.append(float(kl.sum()))
    items = trainer._of_rollout
    metrics = items.means({name: float(x) for name, x in items.items.items()})
    mean = sum(sums) / 4
    assert metrics["objective/kl"] == pytest.approx(mean, rel=1e-4)
    assert metrics["objective/kl_per_seq"] == pytest.approx(mean, rel=1e-4)
    assert metrics["objective/kl_per_token"] == pytest.approx(4 * mean / 16, rel=1e-4)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.2 * mean, rel=1e-4)
    assert metrics["objective/scores"] == pytest.approx(sum(SCORES) / 4)
    assert metrics["objective/rlhf_reward"] == pytest.approx(sum(SCORES) / 4 - 0.2 * mean, rel=1e-4)
    assert metrics["val/num_eos_tokens"] == 3 / 4
    assert metrics["val/response_length"] == 4


def test_the_deviation_of_scores_far_from_zero_is_not_rounding():
    scores = [10_000.0, 10_001.0, 10_002.0, 10_003.0]
    metrics = (
        make(
            rollout_batch_size=4,
            total_episodes=4,
            reward_fn=lambda completion_ids: scores,
            sampler=Fixed(RESPONSES),
        )
        .learn()
        .metrics
    )
    assert metrics["objective/scores_std"] == pytest.approx(math.sqrt(1.25), rel=1e-4)


def test_a_reward_model_and_functions_add_up_by_weight():
    reward_model = llama(5, LlamaForSequenceClassification)
    trainer = make(
        reward_model=reward_model,
        reward_fn=[fives, lambda completion_ids: [1.0] * len(completion_ids)],
        reward_weights=[2.0, 0.0, 0.5],
        total_episodes=8,
    ).learn()
    parts = trainer.scores.parts
    assert [*parts] == ["fives", "reward_fn", "reward_model"]
    expected = 2 * parts["fives"] + 0.5 * parts["reward_model"]
    torch.testing.assert_close(trainer.scores.total, expected)
    ids = response_ids(trainer.responses)
    for k, (prompt, response) in enumerate(zip(trainer.prompts.ids, ids, strict=True)):
        with torch.no_grad():
            whole = torch.tensor([[*prompt, *response]])
            hidden = reward_model.model(input_ids=whole).last_hidden_state[0, -1]
            own = float(reward_model.score(hidden))
        assert float(parts["reward_model"][k]) == pytest.approx(own, abs=1e-5)
    assert trainer.metrics["objective/scores/reward_model"] == pytest.approx(
        float(parts["reward_model"].mean()), abs=1e-5
    )


@pytest.mark.parametrize("level", ["token", "seq"])
def test_importance_weights_follow_the_samplers_log_probs(level):
    shifts = [[0.1, 0.2, -0.3], [0.5] * 6, [-0.4], [2.0, 0.1, -0.1, 0.3, 0.0, -0.2]]
    model = llama()
    probe = make(rollout_batch_size=4, sampler=Fixed(RESPONSES))
    prompts = probe.next_prompts()
    sampled = [
        (own_log_probs(model, p, r) - torch.tensor(s)).tolist()
        for p, r, s in zip(prompts.ids, RESPONSES, shifts, strict=True)
    ]

    def scored(**options):
        trainer = make(
            rollout_batch_size=4,
            total_episodes=4,
            importance_cap=1.5,
            sampler=Fixed(RESPONSES, sampled),
            **options,
        )
        rollout = trainer.score(prompts, trainer.sample(prompts))
        return rollout, trainer

    weighted, trainer = scored(importance_sampling=level)
    plain, _ = scored()
    ratios = [[math.exp(s if level == "token" else sum(row)) for s in row] for row in shifts]
    weights = [min(ratio, 1.5) for ratio in joined(ratios)]
    torch.testing.assert_close(
        weighted.advantages, plain.advantages * torch.tensor(weights), rtol=1e-4, atol=1e-5
    )
    metrics = trainer.learn().metrics
    flat = joined(shifts)
    assert metrics["sampler/mismatch_abs"] == pytest.approx(sum(map(abs, flat)) / 16, rel=1e-4)
    # KL(sampler || policy) by k3 with the ratio policy / sampler.
    k3 = sum(math.exp(s) - 1 - s for s in flat) / 16
    assert metrics["sampler/mismatch_kl"] == pytest.approx(k3, rel=1e-3)


# The KL's coefficient.


@pytest.mark.parametrize(
    ("rule", "unit"), [("proportional", "seq"), ("proportional", "token"), ("paper", "seq")]
)
def test_the_kl_coefficient_moves_as_by_hand_and_is_logged(rule, unit, tmp_path):
    target = 0.05
    trainer = make(
        ref_model=llama(1),
        kl_controller=rule,
        kl_target=target,
        kl_unit=unit,
        kl_horizon=100,
        kl_coef=0.1,
        total_episodes=32,
        run_dir=str(tmp_path / "run"),
    )
    seen = []
    trainer.learn(lambda t: seen.append((t.metrics, t.kl_controller.coef)))
    expected = 0.1
    for metrics, after in seen:
        assert metrics["objective/kl_coef"] == expected
        kl = metrics["objective/kl" if unit == "seq" else "objective/kl_per_token"]
        if rule == "proportional":
            expected *= 1 + min(max(kl / target - 1, -0.2), 0.2) * 8 / 100
        elif kl > 1.5 * target:
            expected *= 2
        elif kl < target / 1.5:
            expected /= 2
        assert after == pytest.approx(expected, rel=1e-12)
        expected = after
    assert expected != 0.1
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    logged = [float(row["objective/kl_coef"]) for row in rows]
    assert logged == pytest.approx([metrics["objective/kl_coef"] for metrics, _ in seen])
    resumed = make(
        ref_model=llama(1),
        kl_controller=rule,
        kl_target=target,
        kl_unit=unit,
        kl_horizon=100,
        kl_coef=0.1,
        total_episodes=32,
    ).load(tmp_path / "run")
    assert resumed.kl_controller.coef == expected


# Models.


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_estimator": "full"},
        {"kl_in": "loss", "kl_estimator": "k3"},
        {"kl_in": "loss", "kl_estimator": "full"},
        {"gradient_checkpointing": True},
        {"layout": "padded"},
    ],
    ids=str,
)
def test_lora_trains_its_adapters_and_nothing_else(options):
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make(
        model, ref_model=None, peft_config=lora(lora_dropout=0.5), total_episodes=24, **options
    )
    assert trainer.reference is not None
    start = parameters(trainer)
    first = []
    trainer.learn(lambda t: first.append((t.metrics["objective/kl"], t.metrics)))
    base = {
        name.replace(".base_layer", ""): p
        for name, p in trainer.policy.model.get_base_model().named_parameters()
        if "lora_" not in name
    }
    assert same(before, {name: p.detach() for name, p in base.items()})
    after = parameters(trainer)
    adapters = [name for name in after if "lora_" in name]
    assert len(adapters) == 8
    assert all(not torch.equal(after[name], start[name]) for name in adapters)
    # Adapters begin at 0, so policy and reference are one at first.
    assert abs(first[0][0]) < 1e-5
    assert abs(first[-1][0]) > 1e-5
    assert first[0][1]["diag/ratio_dev_first"] < 1e-5
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("options", [{}, {"kl_in": "loss", "kl_estimator": "full"}], ids=str)
def test_adapters_off_are_the_reference_that_the_base_model_is(options):
    off = make(ref_model=None, peft_config=lora(), **options).learn()
    beside = make(ref_model=llama(), peft_config=lora(), **options).learn()
    assert off.reference.model is off.policy.model
    assert beside.reference.model is not beside.policy.model
    theirs = parameters(beside)
    for name, found in parameters(off).items():
        torch.testing.assert_close(found, theirs[name], rtol=0, atol=1e-6)
    assert off.metrics["objective/kl"] == pytest.approx(beside.metrics["objective/kl"], abs=1e-6)


def test_the_adapters_of_lora_are_saved_and_load(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = make(llama(), ref_model=None, peft_config=lora()).learn()
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits for m in (trainer.policy.model, again))
        plain = llama()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours - plain).abs().max() > 1e-4


def test_a_lora_critic_trains_its_adapters_and_its_head():
    peft = pytest.importorskip("peft")
    classifier = llama(7, LlamaForSequenceClassification)
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    value_model = peft.get_peft_model(classifier, lora(task_type="SEQ_CLS"))
    trainer = make(value_model=value_model).learn()
    trained = {name for name, p in trainer.critic.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in trained)
    assert any("head" in name for name in trained)
    for name, p in value_model.get_base_model().named_parameters():
        own = name.replace(".base_layer", "").replace(".original_module", "")
        if own in before and "modules_to_save" not in name:
            assert torch.equal(before[own], p), name


@pytest.mark.parametrize("kind", ["classifier", "causal LM", "reward model", "other family"])
def test_a_critic_of_its_own_is_trained_in_place(kind):
    value_model = {
        "classifier": lambda: AutoModelForSequenceClassification.from_config(config_of()),
        "causal LM": lambda: llama(7),
        "reward model": lambda: RewardModel.from_causal_lm(llama(7)),
        "other family": lambda: gpt2(7),
    }[kind]()
    trainer = make(value_model=value_model, total_episodes=8)
    before = {name: p.detach().clone() for name, p in value_model.named_parameters()}
    policy = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}
    values = trainer.critic.head.weight.detach().clone()
    if kind == "classifier":
        assert trainer.critic.head is value_model.score
    trainer.learn()
    changed = {n for n, p in value_model.named_parameters() if not torch.equal(p, before[n])}
    # The head over the vocabulary is no part of a critic.
    assert {n for n in before if "lm_head" not in n and "wpe" not in n} - changed <= {
        n for n in before if "embed" in n
    }
    assert not torch.equal(values, trainer.critic.head.weight)
    assert not same(policy, dict(trainer.policy.model.named_parameters()))


def test_the_critics_learning_rate_changes_only_the_critics_step():
    def first_step(rate):
        trainer = make(
            value_model=llama(7, LlamaForSequenceClassification),
            critic_learning_rate=rate,
            total_episodes=8,
            update_epochs=1,
            anneal_lr=False,
            max_grad_norm=math.inf,
        )
        before = parameters(trainer)
        trainer.learn()
        return before, parameters(trainer)

    before, same_rate = first_step(None)
    _, tripled = first_step(3e-3)
    for name, old in before.items():
        if name.startswith("0."):
            torch.testing.assert_close(same_rate[name], tripled[name], rtol=0, atol=1e-7)
        else:
            torch.testing.assert_close(
                tripled[name] - old, 3 * (same_rate[name] - old), rtol=1e-3, atol=1e-6
            )
            assert (same_rate[name] - old).abs().max() > 5e-4


@pytest.mark.parametrize("model", [gpt2, lambda: llama(tie_word_embeddings=True), llama])
def test_a_saved_model_has_the_logits_of_the_trained_one(model, tmp_path):
    trainer = make(model()).learn()
    trained = trainer.policy.model
    trainer.save_model(tmp_path / "model")
    again = type(trained).from_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trained(input_ids=ids).logits)
        assert not torch.equal(again(input_ids=ids).logits, model()(input_ids=ids).logits)
    tied = trained.get_input_embeddings().weight is trained.get_output_embeddings().weight
    assert tied == (again.get_input_embeddings().weight is again.get_output_embeddings().weight)
    assert "ppo_fast" not in (tmp_path / "model" / "config.json").read_text()


def test_dropout_is_off_in_every_role():
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=CONTEXT,
            resid_pdrop=0.5,
            embd_pdrop=0.5,
            attn_pdrop=0.5,
            eos_token_id=END,
        )
    ).train()
    trainer = make(model, gradient_checkpointing=True).learn()
    assert trainer.metrics["diag/ratio_dev_first"] < 1e-5
    assert trainer.metrics["sampler/mismatch_abs"] < 1e-5


# The run.


def test_every_epoch_has_every_prompt_once():
    trainer = make(train_dataset=[[k] for k in range(4, 14)], rollout_batch_size=4)
    seen = []
    for _ in range(15):
        seen += [ids[0] for ids in trainer.next_prompts().ids]
        trainer.num_episodes += 4
    epochs = [seen[k : k + 10] for k in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(4, 14)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_rollout_larger_than_the_data_repeats_prompts_with_other_responses():
    trainer = make(train_dataset=[[5]], rollout_batch_size=8)
    ids = response_ids(trainer.sample(trainer.next_prompts()))
    assert len({tuple(row) for row in ids}) > 1


@pytest.mark.parametrize(("asked", "done"), [(None, 8), (8, 8), (9, 16), (1, 8)])
def test_episodes_are_rounded_up_to_whole_updates(asked, done):
    trainer = make(total_episodes=asked)
    assert trainer.total_episodes == done
    trainer.learn()
    assert trainer.num_episodes == done
    assert trainer.metrics["episode"] == done


def test_callbacks_are_all_called_and_any_of_them_stops():
    calls = []
    trainer = make(
        total_episodes=80,
        callbacks=[
            lambda t: calls.append("a"),
            lambda t: False if t.iteration == 2 else None,
            lambda t: calls.append("b"),
        ],
    )
    trainer.learn()
    assert trainer.iteration == 2
    assert calls == ["a", "b"] * 2
    trainer.learn(lambda t: t.iteration < 4)
    assert trainer.iteration == 4
    assert calls == ["a", "b"] * 4


def test_the_learning_rate_goes_down_to_zero_linearly():
    seen = []
    make(total_episodes=32).learn(lambda t: seen.append(t.metrics["lr"]))
    assert seen == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_an_update_stops_at_the_target_kl():
    trainer = make(learning_rate=0.1, target_kl=1e-3, total_episodes=8, max_grad_norm=math.inf)
    metrics = trainer.learn().metrics
    assert metrics["val/stopped_by_target_kl"] == 1
    assert metrics["val/optimizer_steps"] == 1


def test_evaluation_does_not_disturb_training(tmp_path):
    plain = make(total_episodes=24).learn()
    evaluated = make(
        total_episodes=24, eval_dataset=PROMPTS[:3], eval_every=1, run_dir=str(tmp_path / "run")
    )
    evaluated.learn(lambda t: t.evaluate(PROMPTS[:1]) and None)
    assert same(parameters(plain), parameters(evaluated))
    own = {n: x for n, x in untimed(evaluated.metrics).items() if not n.startswith("eval/")}
    assert own == untimed(plain.metrics)
    # An evaluation of the user's leaves the run's samples alone.
    files = [*(tmp_path / "run" / "samples").iterdir()]
    assert [len(path.read_text().splitlines()) for path in files] == [3] * 3


def test_a_run_folder_has_config_metrics_events_samples_and_checkpoint(tmp_path):
    folder = tmp_path / "run"
    make(total_episodes=24, eval_dataset=PROMPTS[:3], eval_every=2, run_dir=str(folder)).learn()
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.csv", "checkpoint.safetensors", "samples"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [8, 16, 24]
    assert [bool(row["eval/scores"]) for row in rows] == [False, True, False]
    assert json.loads((folder / "config.json").read_text())["response_length"] == 6
    samples = [*(folder / "samples").iterdir()]
    assert [path.name for path in samples] == ["update-000002.jsonl"]
    lines = [json.loads(line) for line in samples[0].read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS[:3]
    assert all(line["score"] == pytest.approx(fives([line["response"]])[0]) for line in lines)
    assert float(rows[1]["eval/scores"]) == pytest.approx(
        sum(line["score"] for line in lines) / 3, abs=1e-3
    )


def test_evaluate_reports_the_kl_of_a_response():
    model, ref_model = llama(0), llama(1)
    trainer = make(model, ref_model=ref_model, sampler=Fixed(RESPONSES))
    found = trainer.evaluate(PROMPTS[:4])
    expected = sum(
        float((own_log_probs(model, p, r) - own_log_probs(ref_model, p, r)).sum())
        for p, r in zip(PROMPTS, RESPONSES, strict=False)
    )
    assert found["eval/kl"] == pytest.approx(expected / 4, rel=1e-4)
    assert found["eval/eos_rate"] == 0.75
    assert found["eval/length"] == 4
    assert found["eval/scores"] == pytest.approx(sum(fives(RESPONSES)) / 4)


def train_rank(rank, world, port, result):
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
        )
    trainer = make(
        llama().double(),
        ref_model=llama(1).double(),
        value_model=llama(7, LlamaForSequenceClassification).double(),
        whiten_rewards=True,
        whiten_scores=True,
        kl_controller="proportional",
        kl_target=0.05,
        kl_horizon=50,
        train_dataset=PROMPTS[:5],
        learning_rate=1e-4,
        total_episodes=24,
    ).learn()
    if rank == 0:
        torch.save((parameters(trainer), untimed(trainer.metrics)), result)
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_does(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    paths = [str(tmp_path / name) for name in ("two.pt", "one.pt")]
    torch.multiprocessing.spawn(train_rank, args=(2, port, paths[0]), nprocs=2)
    train_rank(0, 1, port, paths[1])
    (found, metrics), (expected, alone) = map(torch.load, paths)
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-6, name
    # Of this process's share only.
    metrics.pop("val/explained_variance"), alone.pop("val/explained_variance")
    assert metrics == pytest.approx(alone, rel=1e-4, abs=1e-6)


# Texts.

WORDS = ["<s>", "<e>", "good", "bad", "cat", "dog", "sat", "ran", "the", "a"]


def tokenizer(**options):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="<e>", **options
    )


@pytest.mark.parametrize("pad", [None, "<e>", "<s>"])
def test_texts_are_trained_on_whatever_the_padding_token(pad):
    seen = []

    def goods(prompts, completions, completion_ids, topic):
        seen.append((prompts, completions, completion_ids, topic))
        return [text.count("good") for text in completions]

    trainer = PPOTrainer(
        RLHFConfig(total_episodes=8, rollout_batch_size=4, response_length=5, learning_rate=1e-3),
        tokenizer(**({} if pad is None else {"pad_token": pad})),
        llama(vocab_size=len(WORDS), pad_token_id=None),
        "copy",
        train_dataset=[
            {"prompt": "the cat", "topic": "cats"},
            {"prompt": "a dog ran", "topic": "dogs"},
        ],
        reward_fn=goods,
    )
    assert trainer.stop_token_ids == (1,)
    trainer.learn()
    prompts, completions, _, topics = seen[0]
    assert set(prompts) == {"the cat", "a dog ran"}
    assert all(("cat" in p) == (t == "cats") for p, t in zip(prompts, topics, strict=True))
    assert not any("<e>" in text for text in completions)
    # An EOS inside a response ends it, and it is part of what is learnt.
    for row, ended in zip(response_ids(trainer.responses), trainer.responses.ended, strict=True):
        assert (row[-1] == 1) == ended
        assert 1 not in row[:-1]
        assert ended or len(row) == 5
    assert isinstance(trainer.generate(["the dog"])[0], str)


def test_a_tokenizers_eos_gives_way_to_the_stop_tokens_asked_for():
    def stops(ids):
        return make(
            llama(vocab_size=len(WORDS), pad_token_id=None),
            processing_class=tokenizer(),
            train_dataset=["the cat"],
            stop_token_ids=ids,
        ).stop_token_ids

    assert stops(None) == (1,)
    assert stops((4, 5)) == (4, 5)
    assert stops(()) == ()


# What is refused.

BAD = {
    "model None": (lambda: {"model": None}, "model is None"),
    "model without head": (lambda: {"model": llama(kind=LlamaModel)}, "causal LM"),
    "model that is none": (lambda: {"model": torch.nn.Linear(3, 3)}, "causal LM"),
    "model by name": (lambda: {"model": "gpt2"}, "causal LM"),
    "no reference": (lambda: {"ref_model": None}, "ref_model is None, but kl_coef = 0.05"),
    "reference by name": (lambda: {"ref_model": "gpt2"}, "'copy'"),
    "reference of another vocabulary": (
        lambda: {"ref_model": llama(vocab_size=V + 1)},
        f"vocabulary of {V + 1}",
    ),
    "reward model of another vocabulary": (
        lambda: {"reward_model": llama(5, LlamaForSequenceClassification, vocab_size=V - 5)},
        f"vocabulary of {V - 5}",
    ),
    "reward model with two labels": (
        lambda: {"reward_model": llama(5, LlamaForSequenceClassification, num_labels=2)},
        "2",
    ),
    "critic of another vocabulary": (
        lambda: {"value_model": llama(vocab_size=V + 1)},
        f"vocabulary of {V + 1}",
    ),
    "critic with two labels": (
        lambda: {"value_model": llama(5, LlamaForSequenceClassification, num_labels=2)},
        "num_labels=1",
    ),
    "no data": (lambda: {"train_dataset": None}, "train_dataset is None"),
    "empty data": (lambda: {"train_dataset": []}, "no prompts"),
    "empty prompt": (lambda: {"train_dataset": [[5], []]}, "prompt 1 is empty"),
    "empty eval data": (lambda: {"eval_dataset": []}, "no prompts"),
    "prompt beyond the context": (
        lambda: {"train_dataset": [[5], [4] * (CONTEXT - 5)]},
        f"prompt 1 has {CONTEXT - 5} tokens",
    ),
    "reference of a shorter context": (
        lambda: {"ref_model": llama(1, max_position_embeddings=10)},
        "ref_model has a context of 10 tokens",
    ),
    "critic of a shorter context": (
        lambda: {"value_model": llama(1, max_position_embeddings=10)},
        "value_model has a context of 10 tokens",
    ),
    "reward model of a shorter context": (
        lambda: {
            "reward_model": llama(1, LlamaForSequenceClassification, max_position_embeddings=10)
        },
        "reward_model has a context of 10 tokens",
    ),
    "response beyond the context": (lambda: {"response_length": CONTEXT}, "no room for a prompt"),
    "token beyond the vocabulary": (lambda: {"train_dataset": [[V]]}, f"token id {V}"),
    "negative token": (lambda: {"train_dataset": [[-1]]}, "token id -1"),
    "text without tokenizer": (lambda: {"train_dataset": ["the"]}, "tokenizer is None"),
    "stop token beyond the vocabulary": (lambda: {"stop_token_ids": (V,)}, "stop_token_ids"),
    "second stop token beyond it": (
        lambda: {
            "stop_token_ids": (1, V + 9),
            "processing_class": tokenizer(),
            "train_dataset": ["the"],
            "sampler": Fixed(RESPONSES),
        },
        "stop_token_ids",
    ),
    "no reward": (lambda: {"reward_fn": None}, "neither reward_fn nor reward_model"),
    "too many minibatches": (lambda: {"num_minibatches": 9}, "num_minibatches = 9"),
    "nothing to train": (
        lambda: {"model": llama().requires_grad_(False)},
        "no parameter of model requires a gradient",
    ),
    "a column that eval data lack": (
        lambda: {
            "train_dataset": [{"input_ids": [5], "topic": "a"}],
            "eval_dataset": [[5]],
            "reward_fn": lambda completion_ids, topic: [0.0] * len(topic),
        },
        "eval_dataset has no column 'topic'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_trained_on_is_refused_at_construction(case):
    options, message = BAD[case]
    settings = {
        "model": llama(),
        "ref_model": "copy",
        "train_dataset": PROMPTS,
        "reward_fn": fives,
        "rollout_batch_size": 8,
        "response_length": 6,
    }
    with pytest.raises((ValueError, TypeError)) as error:
        PPOTrainer(**(settings | options()))
    assert message in str(error.value)


def test_a_model_in_two_roles_is_refused():
    model, other = llama(0), llama(1)
    with pytest.raises(ValueError, match="ref_model is model"):
        make(model, ref_model=model)
    sharing = llama(2)
    sharing.model.embed_tokens.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="shares parameters"):
        make(model, ref_model=sharing)
    assert model.model.embed_tokens.weight.requires_grad
    with pytest.raises(ValueError, match="value_model is model"):
        make(model, value_model=model)
    with pytest.raises(ValueError, match="value_model shares parameters with ref_model"):
        make(model, ref_model=other, value_model=other)
    twice = RewardModel.from_causal_lm(llama(3))
    with pytest.raises(ValueError, match="reward_model shares parameters"):
        make(llama(0), reward_model=twice, value_model=twice)


def test_a_classifier_that_is_critic_too_gives_its_scores_as_it_began():
    twice = llama(3, LlamaForSequenceClassification)
    trainer = make(
        llama(0), reward_model=twice, value_model=twice, reward_fn=None, learning_rate=1e-2
    )
    prompts = trainer.next_prompts()
    responses = trainer.sample(prompts)
    trainer.score(prompts, responses)
    before, values = trainer.scores.total, trainer.critic.head.weight.clone()
    trainer.learn()
    trainer.score(prompts, responses)
    assert not torch.equal(trainer.critic.head.weight, values)
    assert torch.equal(trainer.scores.total, before)


def test_ligers_head_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="head = 'liger': the tensors are on cpu"):
        make(head="liger", precision="bf16")


def test_ligers_head_scores_rollouts_where_it_runs(monkeypatch):
    calls = []

    def in_its_place(hidden, weight, index, *, temperature, with_entropy):
        calls.append((hidden.dtype, weight.dtype))
        return log_probs_from_hidden(
            hidden, weight, index, temperature=temperature, with_entropy=with_entropy
        )

    monkeypatch.setattr("ppo_fast.llm.given.available", lambda device: None)
    monkeypatch.setattr("ppo_fast.llm.head.liger_log_probs", in_its_place)
    with pytest.raises(ValueError, match="bfloat16"):
        make(head="liger")
    trainer = make(head="liger", precision="bf16")
    prompts = trainer.next_prompts()
    own = trainer.score(prompts, trainer.sample(prompts))
    assert calls == [(torch.bfloat16, torch.bfloat16)] * 2  # policy and reference
    fused = make(head="fused", precision="bf16").score(prompts, trainer.responses)
    assert torch.equal(own.log_probs, fused.log_probs)
    assert trainer.learn().metrics["val/skipped_steps"] == 0


def test_an_optimizer_of_the_users_own_is_refused():
    with pytest.raises(TypeError, match="optimizers is not None"):
        make(optimizers=(torch.optim.SGD(llama().parameters(), 0.1), None))
    make(optimizers=(None, None))


def test_settings_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="ControlConfig; expected an RLHFConfig"):
        PPOTrainer(ControlConfig(), model=llama(), train_dataset=PROMPTS, reward_fn=fives)
    with pytest.raises(TypeError, match="batch_size"):
        make(batch_size=8)


def test_weights_too_coarse_for_the_steps_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="ppo_fast"):
        make(llama().bfloat16())
    assert "torch.bfloat16" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ppo_fast"):
        make(llama().bfloat16(), ref_model=None, peft_config=lora())
    assert not caplog.text


def test_without_a_kl_no_reference_is_needed():
    trainer = make(ref_model=None, kl_coef=0.0).learn()
    assert trainer.reference is None
    assert not any("objective/kl_per" in name for name in trainer.metrics)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda n: [math.nan] * n, "nan"),
        (lambda n: [1.0] * (n - 1), r"\[7\] for 8 responses"),
        (lambda n: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_reward_that_fails_later_loses_nothing_before_it(fault, message, tmp_path, caplog):
    calls = []

    def flaky(completion_ids):
        calls.append(1)
        return fault(len(completion_ids)) if len(calls) == 2 else fives(completion_ids)

    settings = {"total_episodes": 32, "save_every": 100}
    trainer = make(reward_fn=flaky, run_dir=str(tmp_path / "run"), **settings)
    with caplog.at_level(logging.ERROR), pytest.raises(RewardError, match=message):
        trainer.learn()
    assert "checkpoint" in caplog.text
    expected = make(reward_fn=fives, **settings).learn()
    resumed = make(reward_fn=fives, run_dir=str(tmp_path / "run"), **settings)
    resumed.load(tmp_path / "run")
    assert resumed.num_episodes == 8
    resumed.learn()
    assert same(parameters(expected), parameters(resumed))
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [8, 16, 24, 32]


def test_a_reward_that_fails_in_an_evaluation_loses_nothing_before_it(tmp_path):
    def flaky(completion_ids):
        if len(completion_ids) == 3:
            raise RuntimeError("judge unreachable")
        return fives(completion_ids)

    settings = {"total_episodes": 32, "eval_every": 2, "eval_dataset": PROMPTS[:3]}
    trainer = make(reward_fn=flaky, run_dir=str(tmp_path / "run"), save_every=100, **settings)
    with pytest.raises(RewardError, match="judge unreachable"):
        trainer.learn()
    expected = make(reward_fn=fives, **settings).learn()
    resumed = make(reward_fn=fives, run_dir=str(tmp_path / "run"), **settings)
    resumed.load(tmp_path / "run")
    assert resumed.num_episodes == 16
    resumed.learn()
    assert same(parameters(expected), parameters(resumed))
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [8, 16, 24, 32]


def test_an_update_without_a_finite_gradient_is_an_error():
    trainer = make(total_episodes=8)
    with torch.no_grad():
        trainer.critic.head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="update 1"):
        trainer.learn()
