"""What `bench_control.py` compares: arms, cases with one recipe for all, ablations."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, NamedTuple

from ppo_fast import recipe
from ppo_fast.config import ControlConfig


class Arm(NamedTuple):
    """One way to train."""

    name: str
    module: str
    """under peers/, with `build`"""
    needs: tuple[str, ...] = ()
    """packages without which it is absent"""
    options: dict[str, Any] | None = None
    """keyword arguments of `build`; for ours also fields of the config"""
    share: float = 1.0
    """of the case's steps: less for what would take minutes"""
    cores: int = 1
    """processors it may use, torch threads included"""


OURS = "ppo_fast"
ARMS = {
    "ours": Arm(OURS, "ours"),
    "ours-native": Arm(f"{OURS}, native envs", "ours", options={"vectorization": "native"}),
    "bf16": Arm(f"{OURS}, bf16", "ours", options={"precision": "bf16"}),
    "tensor": Arm(f"{OURS}, tensor envs", "ours", options={"vectorization": "tensor"}),
    "sb3": Arm("stable-baselines3", "sb3", ("stable_baselines3",)),
    "sb3-atari": Arm("stable-baselines3", "sb3", ("stable_baselines3", "ale_py", "cv2")),
    "cleanrl": Arm("CleanRL-style", "cleanrl_style"),
    "native": Arm("CleanRL-style, native envs", "cleanrl_style", options={"backend": "native"}),
    "envpool": Arm(
        "CleanRL-style, EnvPool", "cleanrl_style", ("envpool",), options={"backend": "envpool"}
    ),
    "sbx": Arm("SBX (JAX)", "sbx", ("sbx", "jax")),
    "sbx-native": Arm(
        "SBX (JAX), native envs", "sbx", ("sbx", "jax"), options={"backend": "native"}
    ),
    "torchrl": Arm("torchrl", "torchrl_ppo", ("torchrl",), share=0.15),
    "rsl_rl": Arm("rsl_rl", "rsl_rl", ("rsl_rl", "tensordict", "git")),
    "jax": Arm("jitted JAX loop", "jax_loop", ("jax",)),
    "jax-blocks": Arm(
        "jitted JAX loop, in blocks", "jax_loop", ("jax",), options={"block_rows": 1024}
    ),
    "convolutions": Arm("convolutions alone", "convolutions"),
    "command": Arm("ppo-fast train", "command_line"),
}

ABLATIONS: dict[str, Arm] = {
    "no tensor envs": Arm("gymnasium's native envs", "ours", options={"vectorization": "native"}),
    "no native envs": Arm("environments one by one", "ours", options={"vectorization": "sync"}),
    "no explicit gradient": Arm("gradient by autograd", "ours", options={"gradient": "autograd"}),
    "no lean minibatches": Arm(
        "the op a minibatch", "ours", options={"without": "lean minibatches"}
    ),
    "no lean actor": Arm("actor by its module", "ours", options={"without": "lean actor"}),
    # Where another process is busy the two wait for each other, which takes minutes.
    "two threads": Arm(
        "two torch threads", "ours", options={"torch_threads": 2}, share=0.2, cores=2
    ),
}
"""Ours with one thing off. `options` are fields of the config, or arguments of `peers.ours.build`."""
HOST_ABLATIONS: dict[str, Arm] = {
    "no lean host envs": Arm(
        "gymnasium's SyncVectorEnv", "ours", options={"without": "lean host envs"}
    ),
    "no host statistics": Arm(
        "statistics by torch", "ours", options={"without": "host statistics"}
    ),
    "no lean minibatches": ABLATIONS["no lean minibatches"],
    "no explicit gradient": ABLATIONS["no explicit gradient"],
}
"""The same on environments of the host, with normalisation."""
IMAGE_ABLATIONS: dict[str, Arm] = {
    "no scores by the actor": Arm(
        "rows scored afterwards", "ours", options={"without": "scores by the actor"}
    ),
}
ARMS |= ABLATIONS | HOST_ABLATIONS | IMAGE_ABLATIONS


class Case(NamedTuple):
    env_id: str
    config: ControlConfig
    timesteps: int
    arms: tuple[str, ...]
    """the first is ours, to which the others are set in relation"""
    threshold: float | None = None
    """mean return of the last `WINDOW` training episodes to which the time is told"""
    solve: bool = False
    """train until the threshold, each arm by its own recipe, from process start, unpinned"""
    recipes: dict[str, tuple[ControlConfig, int]] | None = None
    """config and steps of the arms that have their own"""

    def recipe(self, arm: str) -> tuple[ControlConfig, int]:
        return (self.recipes or {}).get(arm, (self.config, self.timesteps))


WINDOW = 100

# CleanRL's ppo.py, with 8 environments; ControlConfig's defaults are the rest of it.
DISCRETE = ControlConfig(num_envs=8)
# CleanRL's ppo_continuous_action.py.
CONTINUOUS = ControlConfig(
    num_envs=1,
    num_steps=2048,
    num_minibatches=32,
    update_epochs=10,
    learning_rate=3e-4,
    ent_coef=0.0,
    norm_obs=True,
    norm_reward=True,
)
# What rsl_rl can do too: no annealed learning rate, no value clip, which it does by clip_coef.
TENSOR_PENDULUM = ControlConfig(
    num_envs=1024,
    num_steps=32,
    num_minibatches=16,
    update_epochs=5,
    learning_rate=2e-3,
    anneal_lr=False,
    gamma=0.9,
    ent_coef=0.0,
    vf_coef=1.0,
    vf_clip_coef=None,
    # Beyond what gradients reach: rsl_rl clips those of actor and critic apart.
    max_grad_norm=100.0,
)
# Schulman et al. 2017 as CleanRL's ppo_atari.py has it.
ATARI = ControlConfig(num_envs=8, clip_coef=0.1, vf_clip_coef=0.1)
# rl-zoo3's hyperparams/ppo.yml; vf_coef is twice SB3's 0.5.
ZOO_CARTPOLE = ControlConfig(
    num_envs=8,
    num_steps=32,
    num_minibatches=1,
    update_epochs=20,
    learning_rate=1e-3,
    gae_lambda=0.8,
    gamma=0.98,
    ent_coef=0.0,
    vf_coef=1.0,
    vf_clip_coef=None,
    anneal_clip=True,
)
# CleanRL's ppo.py and purejaxrl's ppo.py have the same constants.
CLEANRL_CARTPOLE = ControlConfig(num_envs=4)
SOLVED = 475.0

CASES = {
    "cartpole": Case(
        "CartPole-v1",
        DISCRETE,
        51_200,
        ("ours", "ours-native", "sb3", "cleanrl", "envpool", "sbx", "torchrl", "jax"),
        threshold=100.0,
    ),
    "cartpole-tensor": Case(
        "CartPole-v1",
        dataclasses.replace(DISCRETE, num_envs=1024),
        786_432,
        ("tensor", "native", "sbx-native", "jax", "jax-blocks"),
        threshold=100.0,
    ),
    "pendulum": Case("Pendulum-v1", CONTINUOUS, 8_192, ("ours", "sb3", "cleanrl")),
    "halfcheetah": Case("HalfCheetah-v5", CONTINUOUS, 8_192, ("ours", "sb3", "cleanrl")),
    "pendulum-tensor": Case(
        "Pendulum-v1", TENSOR_PENDULUM, 983_040, ("tensor", "rsl_rl"), threshold=-400.0
    ),
    "pong": Case(
        "PongNoFrameskip-v4",
        ATARI,
        2_048,
        ("ours", "bf16", *IMAGE_ABLATIONS, "sb3-atari", "convolutions"),
    ),
    "ablations-host": Case("HalfCheetah-v5", CONTINUOUS, 8_192, ("ours", *HOST_ABLATIONS)),
    "ablations": Case("CartPole-v1", DISCRETE, 51_200, ("ours", *ABLATIONS), threshold=100.0),
    "solved": Case(
        "CartPole-v1",
        recipe("CartPole-v1"),
        100_000,
        ("ours", "command", "sb3", "cleanrl", "sbx", "jax"),
        threshold=SOLVED,
        solve=True,
        recipes={
            "command": (dataclasses.replace(recipe("CartPole-v1"), stop_return=SOLVED), 100_000),
            "sb3": (ZOO_CARTPOLE, 100_000),
            "sbx": (ZOO_CARTPOLE, 100_000),
            "cleanrl": (CLEANRL_CARTPOLE, 500_000),
            # It solves with purejaxrl's own constants, which are CleanRL's, too, but later.
            "jax": (recipe("CartPole-v1"), 100_000),
        },
    ),
}


def absent(arm: Arm) -> str | None:
    """Name the first package that an arm needs and that is not here."""
    return next((name for name in arm.needs if importlib.util.find_spec(name) is None), None)
