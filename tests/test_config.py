"""Settings: what is refused says so, and the remedies it names work."""

import dataclasses
import json
import math

import numpy as np
import pytest

from ppo_fast import PPO, ControlConfig
from ppo_fast.config import PPOConfig, check_minibatches, config_from_dict
from ppo_fast.control.recipes import RECIPES, recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate = 0.0; expected a number above 0"),
        ({"learning_rate": -1e-3}, "learning_rate = -0.001; expected a number above 0"),
        ({"learning_rate": math.inf}, "learning_rate = inf; expected a finite number"),
        ({"learning_rate": math.nan}, "learning_rate = nan; expected a number"),
        ({"learning_rate": "3e-4"}, "learning_rate = '3e-4'; expected a number"),
        ({"learning_rate": None}, "learning_rate = None; expected a number"),
        ({"adam_eps": 0.0}, "adam_eps = 0.0; expected a number above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm = 0.0; expected a number above 0"),
        ({"gamma": 1.01}, r"gamma = 1.01; expected a number in \[0, 1\]"),
        ({"gamma": True}, "gamma = True; expected a number"),
        ({"gae_lambda": -0.1}, r"gae_lambda = -0.1; expected a number in \[0, 1\]"),
        ({"update_epochs": 0}, "update_epochs = 0; expected an integer >= 1"),
        ({"update_epochs": 2.0}, "update_epochs = 2.0; expected an integer"),
        ({"num_minibatches": 0}, "num_minibatches = 0; expected an integer >= 1"),
        ({"clip_coef": 0.0}, "clip_coef = 0.0; expected a number above 0"),
        ({"clip_coef_high": -0.2}, "clip_coef_high = -0.2; expected a number above 0, or None"),
        ({"vf_clip_coef": 0.0}, "vf_clip_coef = 0.0; expected a number above 0, or None"),
        ({"vf_clip_coef": False}, "vf_clip_coef = False; expected a number or None"),
        ({"target_kl": 0.0}, "target_kl = 0.0; expected a number above 0, or None"),
        ({"adaptive_lr_kl": -1.0}, "adaptive_lr_kl = -1.0; expected a number above 0, or None"),
        ({"dual_clip": 1.0}, "dual_clip = 1.0; expected above 1, or None"),
        ({"vf_coef": -0.5}, "vf_coef = -0.5; expected a number >= 0"),
        ({"kl_coef": math.inf}, "kl_coef = inf; expected a number >= 0"),
        ({"ent_coef": math.inf}, "ent_coef = inf; expected a finite number"),
        ({"norm_adv": "rollout"}, "norm_adv = 'rollout'; expected one of minibatch, batch, none"),
        ({"vf_clip": "min"}, "vf_clip = 'min'; expected one of max, clipped"),
        ({"kl_controller": "pid"}, "kl_controller = 'pid'; expected one of fixed, paper, prop"),
        ({"kl_unit": "word"}, "kl_unit = 'word'; expected one of token, seq"),
        ({"kl_controller": "paper", "kl_coef": 1.0}, "kl_target = None; expected a number above 0"),
        (
            {"kl_controller": "paper", "kl_target": 0.01},
            "kl_coef = 0.0; expected above 0 to be adapted",
        ),
        ({"seed": -1}, "seed = -1; expected an integer >= 0"),
        ({"seed": None}, "seed = None; expected an integer"),
        ({"device": 0}, "device = 0; expected a string"),
        ({"anneal_lr": "yes"}, "anneal_lr = 'yes'; expected True or False"),
        ({"num_envs": 0}, "num_envs = 0; expected an integer >= 1, or None"),
        ({"num_envs": 2.5}, "num_envs = 2.5; expected an integer or None"),
        ({"num_steps": 0}, "num_steps = 0; expected an integer >= 1"),
        ({"torch_threads": 0}, "torch_threads = 0; expected an integer >= 1, or None"),
        ({"stats_window": 0}, "stats_window = 0; expected an integer >= 1"),
        ({"save_every": 0}, "save_every = 0; expected an integer >= 1"),
        ({"hidden_sizes": (64, 0)}, r"hidden_sizes = \(64, 0\); expected a tuple of integers >= 1"),
        ({"hidden_sizes": 64}, "hidden_sizes = 64; expected a tuple of integers >= 1"),
        ({"clip_obs": 0.0}, "clip_obs = 0.0; expected a number above 0"),
        ({"clip_reward": -1.0}, "clip_reward = -1.0; expected a number above 0"),
        ({"activation": "gelu"}, "activation = 'gelu'; expected one of tanh, relu, elu, silu"),
        (
            {"vectorization": "thread"},
            "vectorization = 'thread'; expected one of auto, tensor, native, sync, async",
        ),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ControlConfig(**settings)


def test_recurrent_policies_are_announced_with_a_way_around():
    with pytest.raises(NotImplementedError, match=r"recurrent = True: .* not available yet; stack"):
        PPO("CartPole-v1", recurrent=True)


def test_an_unknown_setting_is_named_with_the_known_ones():
    with pytest.raises(TypeError, match=r"unknown setting n_steps; ControlConfig has .*num_steps"):
        PPO("CartPole-v1", n_steps=128)
    with pytest.raises(ValueError, match="PPOConfig has no field num_steps; fields are adam_eps"):
        config_from_dict(PPOConfig, {"num_steps": 128})


@pytest.mark.parametrize(
    ("value", "want"), [(True, "minibatch"), (False, "none"), ("batch", "batch")]
)
def test_norm_adv_takes_cleanrls_booleans(value, want):
    assert ControlConfig(norm_adv=value).norm_adv == want


def test_numbers_of_numpy_and_whole_floats_become_plain_numbers():
    config = ControlConfig(
        num_envs=np.int64(4), learning_rate=np.float32(0.5), clip_coef=1, hidden_sizes=[3, 4]
    )
    assert type(config.num_envs) is int and type(config.learning_rate) is float
    assert type(config.clip_coef) is float and config.hidden_sizes == (3, 4)
    json.dumps(dataclasses.asdict(config))


def test_no_clipping_of_gradients_and_observations_is_inf():
    ControlConfig(max_grad_norm=math.inf, clip_obs=math.inf, clip_reward=math.inf)


def test_settings_cannot_be_changed_and_survive_json():
    config = ControlConfig(num_steps=7, target_kl=0.02, hidden_sizes=(3,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_steps = 8
    data = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from_dict(ControlConfig, data) == config


@pytest.mark.parametrize(
    ("num_steps", "num_envs", "num_minibatches"),
    [(128, 3, 5), (7, 1, 4), (10, 4, 64), (1, 1, 2), (5, 8, 3), (2047, 1, 32)],
)
def test_the_remedies_for_unequal_minibatches_work(num_steps, num_envs, num_minibatches):
    with pytest.raises(ValueError, match="is not divisible by") as error:
        check_minibatches(num_steps, num_envs, num_minibatches)
    message = str(error.value)
    assert f"{num_envs} * {num_steps} = {num_envs * num_steps}" in message
    minibatches, steps = (
        int(part.split(" = ")[-1]) for part in message.split("; use ")[1].split(" or ")
    )
    check_minibatches(num_steps, num_envs, minibatches)
    check_minibatches(steps, num_envs, num_minibatches)
    assert minibatches < num_minibatches and steps > num_steps


def test_unequal_minibatches_are_refused_when_the_trainer_is_made():
    with pytest.raises(ValueError, match="3 \\* 128 = 384 is not divisible by num_minibatches = 5"):
        PPO("CartPole-v1", num_envs=3, num_minibatches=5)


@pytest.mark.parametrize("env_id", RECIPES)
def test_recipes_are_valid_and_divide_their_rollouts(env_id):
    config = recipe(env_id)
    check_minibatches(config.num_steps, config.num_envs, config.num_minibatches)


def test_an_environment_without_a_recipe_has_the_defaults():
    assert recipe("Nothing-v0") == ControlConfig()


def test_every_field_is_documented():
    import ast
    import inspect

    import ppo_fast.config

    tree = ast.parse(inspect.getsource(ppo_fast.config))
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for field, following in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(following, ast.Expr)
                    assert documented, field.target.id
