"""Settings of PPO for language models: every one is checked when it is made."""

import math

import pytest

from ppo_fast.llm.config import CHOICES, RLHFConfig
from ppo_fast.llm.trl_names import TRL_IGNORED, TRL_NAMES, PPOConfig


@pytest.mark.parametrize("field", CHOICES)
def test_a_wrong_word_is_refused_with_the_right_ones(field):
    with pytest.raises(ValueError, match=field) as error:
        RLHFConfig(**{field: "wrong"})
    assert all(word in str(error.value) for word in CHOICES[field])


@pytest.mark.parametrize("field", CHOICES)
def test_every_word_on_offer_is_taken(field):
    for word in CHOICES[field]:
        others = {"kl_estimator": "k2"} if field == "kl_in" else {}
        assert getattr(RLHFConfig(**{field: word}, **others), field) == word


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rollout_batch_size", 0),
        ("response_length", 0),
        ("token_budget", 0),
        ("logits_mb", 0),
        ("save_every", 0),
        ("eval_every", 0),
        ("sample_batch_size", 0),
        ("total_episodes", 0),
        ("torch_threads", 0),
        ("critic_learning_rate", 0.0),
        ("clip_scores", 0.0),
        ("clip_scores", -1.0),
        ("temperature", 0.0),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("importance_cap", 0.0),
        ("missing_eos_score", math.inf),
        ("missing_eos_penalty", math.inf),
        ("missing_eos_penalty", -1.0),
        ("learning_rate", -1.0),
        ("gamma", 1.5),
        ("gae_lambda", -0.1),
        ("kl_coef", -0.1),
        ("kl_unit", "word"),
        ("kl_controller", "adaptive"),
        ("norm_adv", "yes"),
        ("rollout_batch_size", 8.0),
        ("token_budget", "8192"),
        ("gradient_checkpointing", 1),
        ("stop_token_ids", 3),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("</s>",)),
        ("adaptive_lr_kl", 0.01),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} = "):
        RLHFConfig(**{field: value})


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="batch_size"):
        RLHFConfig(batch_size=8)


def test_k1_in_the_loss_is_refused_as_its_gradient_is_nothing():
    with pytest.raises(ValueError, match=r"kl_estimator = 'k1'.*k2, k3 or full"):
        RLHFConfig(kl_in="loss", kl_estimator="k1")
    assert RLHFConfig(kl_in="loss", kl_estimator="k1", kl_coef=0.0).kl_in == "loss"


@pytest.mark.parametrize("rule", ["paper", "proportional"])
@pytest.mark.parametrize("target", [None, 0.0, -1.0])
def test_an_adaptive_kl_needs_a_target_above_zero(rule, target):
    with pytest.raises(ValueError, match="kl_target = "):
        RLHFConfig(kl_controller=rule, kl_target=target)


def test_an_adaptive_kl_needs_a_coefficient_to_start_from():
    with pytest.raises(ValueError, match="kl_coef = "):
        RLHFConfig(kl_controller="proportional", kl_target=6.0, kl_coef=0.0)


def test_a_horizon_that_one_update_would_overrun_is_refused_before_it():
    with pytest.raises(ValueError, match="kl_horizon = "):
        RLHFConfig(
            kl_controller="proportional", kl_target=6.0, rollout_batch_size=64, kl_horizon=12.8
        )


def test_a_missing_eos_is_penalised_or_replaced_but_not_both():
    with pytest.raises(ValueError, match="missing_eos_score"):
        RLHFConfig(missing_eos_penalty=1.0, missing_eos_score=-1.0)


def test_more_minibatches_than_responses_are_refused():
    with pytest.raises(ValueError, match="num_minibatches = 9"):
        RLHFConfig(rollout_batch_size=8, num_minibatches=9)


def test_a_target_that_nothing_aims_at_is_refused():
    with pytest.raises(ValueError, match="kl_target"):
        RLHFConfig(kl_target=6.0)


def test_a_run_folder_may_be_a_path(tmp_path):
    assert RLHFConfig(run_dir=tmp_path).run_dir == str(tmp_path)


def test_lists_become_tuples():
    assert RLHFConfig(stop_token_ids=[1, 2]).stop_token_ids == (1, 2)


def test_a_config_of_trl_has_its_defaults_here():
    config = PPOConfig()
    assert config.rollout_batch_size == 8
    assert config.temperature == 0.7
    assert config.adam_eps == 1e-8
    assert (config.num_epochs, config.seed) == (3.0, 42)
    assert (config.learning_rate, config.response_length, config.kl_coef) == (3e-6, 53, 0.05)
    assert (config.update_epochs, config.num_minibatches) == (4, 1)
    assert (config.clip_coef, config.vf_clip_coef, config.vf_coef) == (0.2, 0.2, 0.1)
    assert (config.gamma, config.gae_lambda, config.norm_adv) == (1.0, 0.95, "batch")
    assert config.anneal_lr and config.max_grad_norm == 1.0 and config.kl_estimator == "k1"


TRANSLATED = {
    "num_ppo_epochs": ("update_epochs", 2),
    "num_mini_batches": ("num_minibatches", 2),
    "cliprange": ("clip_coef", 0.1),
    "cliprange_value": ("vf_clip_coef", 0.3),
    "lam": ("gae_lambda", 0.9),
    "output_dir": ("run_dir", "runs/a"),
    "adam_epsilon": ("adam_eps", 1e-6),
    "num_train_epochs": ("num_epochs", 2.0),
    "bf16": ("precision", "bf16"),
    "stop_token_id": ("stop_token_ids", (7,)),
    "lr_scheduler_type": ("anneal_lr", False),
}
GIVEN = {"bf16": True, "stop_token_id": 7, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_field_of_trl_is_translated(name):
    ours, expected = TRANSLATED[name]
    assert getattr(PPOConfig(**{name: GIVEN.get(name, expected)}), ours) == expected


def test_all_renamed_fields_are_tested():
    assert set(TRL_NAMES) <= set(TRANSLATED)


def test_the_rollout_is_the_product_of_trls_batch_sizes():
    config = PPOConfig(per_device_train_batch_size=6, gradient_accumulation_steps=4)
    assert config.rollout_batch_size == 24
    assert PPOConfig(gradient_accumulation_steps=4).rollout_batch_size == 32
    assert PPOConfig(rollout_batch_size=5).rollout_batch_size == 5


@pytest.mark.parametrize("name", TRL_IGNORED)
def test_fields_without_an_effect_here_are_taken(name):
    assert PPOConfig(**{name: 1}) == PPOConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deepspeed", "zero3.json"),
        ("stop_token", "</s>"),
        ("lr_scheduler_type", "cosine"),
        ("learning_rat", 1e-5),
    ],
)
def test_fields_that_cannot_be_kept_are_refused_by_name(name, value):
    with pytest.raises(TypeError, match=name):
        PPOConfig(**{name: value})


def test_the_stop_token_of_trl_is_the_eos():
    assert PPOConfig(stop_token="eos").stop_token_ids is None
    assert PPOConfig(stop_token=None, stop_token_id=None).stop_token_ids is None


def test_values_of_trl_are_checked_as_ours():
    with pytest.raises(ValueError, match="kl_estimator"):
        PPOConfig(kl_estimator="k4")
