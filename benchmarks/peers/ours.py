"""ppo_fast itself, by its public interface alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import gymnasium as gym

from peers import Trained, Trainer, Watch
from ppo_fast import PPO
from ppo_fast.config import ControlConfig
from ppo_fast.models import ActorCritic

# The top-level ones add up to the time of an iteration; a rollout's parts are named below it.
PHASES = ("inference", "environment", "storing", "gae", "update", "log")


class PlainPolicy(ActorCritic):
    """The same network as a module that PPO does not know: it takes the autograd path."""


def environment(env_id: str, num_envs: int | None) -> str | gym.vector.VectorEnv:
    """Return the id, or for an Atari game in SB3's setting ALE's own vector environment.

    ALE's registered id has sticky actions, which the AtariWrapper of SB3 has not.
    """
    if not env_id.endswith("NoFrameskip-v4"):
        return env_id
    from ale_py.vector_env import AtariVectorEnv

    return AtariVectorEnv(
        env_id.removesuffix("NoFrameskip-v4").lower(),
        num_envs or 8,
        num_threads=1,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
        episodic_life=True,
    )


def _no_lean_minibatches() -> None:
    from ppo_fast.control import loss

    loss.why_not_here = lambda *_: "an ablation"


def _no_lean_actor() -> None:
    from ppo_fast.control import collect
    from ppo_fast.control.actor import ModuleActor

    collect.make_actor = ModuleActor  # type: ignore[assignment]


def _no_lean_host_envs() -> None:
    from ppo_fast.control import make_envs

    def sync(makers: Any) -> gym.vector.SyncVectorEnv:
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

    make_envs._sync = sync


def _no_host_statistics() -> None:
    from ppo_fast.control.normalize import ObservationNormalizer

    ObservationNormalizer.step_on_host = lambda *_: False  # type: ignore[method-assign]


SWITCHES = {
    "lean minibatches": _no_lean_minibatches,
    "lean actor": _no_lean_actor,
    "lean host envs": _no_lean_host_envs,
    "host statistics": _no_host_statistics,
    # On images its actor also scores the rows, which saves a pass through the convolutions.
    "scores by the actor": _no_lean_actor,
}


def build(
    env_id: str,
    config: ControlConfig,
    *,
    gradient: str = "explicit",
    without: str = "",
    **changes: Any,
) -> Trainer:
    """Make the trainer.

    Args:
        env_id: what `PPO` takes, or an Atari id ending in NoFrameskip-v4.
        config: a `ControlConfig`, or something with its fields.
        gradient: "explicit", or "autograd" to withhold the policy's type.
        without: one of `SWITCHES`, an optimisation to turn off in this process.
        changes: fields of the config to replace.
    """
    if not isinstance(config, ControlConfig):
        config = ControlConfig(**{**vars(config), **changes})
        changes = {}
    if without:
        SWITCHES[without]()
    policy = None
    if gradient == "autograd":
        policy = _plain(env_id, config)
    model = PPO(environment(env_id, config.num_envs), policy, config=config, **changes)

    def train(total_timesteps: int, watch: Watch) -> Trained:
        phases: dict[str, float] = defaultdict(float)

        def after_iteration(model: PPO) -> bool:
            for name in PHASES:
                # An iteration's log is reported by the next one.
                phases[name] += model.metrics.get(f"time/{name}_seconds", 0.0)
            return not watch(model.num_timesteps, model.episodes.returns)

        model.learn(total_timesteps, after_iteration)
        model.close()
        return Trained(model.num_timesteps, list(model.episodes.returns), dict(phases))

    return train


def _plain(env_id: str, config: ControlConfig) -> PlainPolicy:
    """The default policy under a type of its own, with the weights the default would start from."""
    model = PPO(environment(env_id, config.num_envs), config=config)
    policy = model.policy
    assert type(policy) is ActorCritic
    policy.__class__ = PlainPolicy
    model.close()
    return policy
