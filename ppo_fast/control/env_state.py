"""Saving and restoring the state of environments that allow it.

Supported: an environment with `state_dict()` and `load_state_dict(state)`; Gymnasium's classic
control, toy text and MuJoCo environments; each of them alone, under Gymnasium's stateless or
counting wrappers, in `SyncVectorEnv`, and Gymnasium's native vector CartPole. Everything else gives
None: such a run resumes with new episodes.

Only what an episode changes is saved. Physical constants, maps and rendering stay those of the
environment that is restored into.
"""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor

from ppo_fast.control.sync_envs import SyncEnvs

# What an episode changes in Gymnasium's own classes, beside the random generator. Subclasses may
# add state, so only these very classes count.
EPISODE_STATE: dict[str, tuple[str, ...]] = {
    "gymnasium.envs.classic_control.acrobot.AcrobotEnv": ("state",),
    "gymnasium.envs.classic_control.cartpole.CartPoleEnv": ("state", "steps_beyond_terminated"),
    "gymnasium.envs.classic_control.cartpole.CartPoleVectorEnv": (
        "state",
        "steps",
        "prev_done",
        "steps_beyond_terminated",
        "low",
        "high",
    ),
    "gymnasium.envs.classic_control.continuous_mountain_car.Continuous_MountainCarEnv": ("state",),
    "gymnasium.envs.classic_control.mountain_car.MountainCarEnv": ("state",),
    "gymnasium.envs.classic_control.pendulum.PendulumEnv": ("state", "last_u"),
    "gymnasium.envs.toy_text.blackjack.BlackjackEnv": (
        "player",
        "dealer",
        "dealer_top_card_suit",
        "dealer_top_card_value_str",
    ),
    "gymnasium.envs.toy_text.cliffwalking.CliffWalkingEnv": ("s", "lastaction"),
    "gymnasium.envs.toy_text.frozen_lake.FrozenLakeEnv": ("s", "lastaction"),
    "gymnasium.envs.toy_text.taxi.TaxiEnv": ("s", "lastaction", "fickle_step", "taxi_orientation"),
    "gymnasium.wrappers.common.OrderEnforcing": ("_has_reset",),
    "gymnasium.wrappers.common.PassiveEnvChecker": (),
    "gymnasium.wrappers.common.RecordEpisodeStatistics": (
        "episode_count",
        "episode_returns",
        "episode_lengths",
        "return_queue",
        "length_queue",
        "time_queue",
    ),
    "gymnasium.wrappers.common.TimeLimit": ("_elapsed_steps",),
}

# Their classes have no state but, in the Transform* ones, what a user's function may hide.
STATELESS_WRAPPERS = (
    "gymnasium.wrappers.transform_action",
    "gymnasium.wrappers.transform_observation",
    "gymnasium.wrappers.transform_reward",
)

MUJOCO = "gymnasium.envs.mujoco."
# Derived from the state one substep late; Ant and Humanoid read them before they step.
MUJOCO_DERIVED = ("xipos", "xpos")

GENERATOR = "_np_random"

State = dict[str, Any]
"""JSON data in which arrays stand as {"tensor": name}, random generators as {"generator": ...}."""


def capture_state(env: Any) -> tuple[State, dict[str, Tensor]] | None:
    """Capture an environment's state as JSON data and named tensors; None where it offers none."""
    tensors: dict[str, Tensor] = {}
    try:
        state = _capture(env, "env_state", tensors)
    except _NotPlainError as error:
        warnings.warn(
            f"the environment's state is not saved, a resumed run starts new episodes: {error}; "
            "state_dict() may hold None, numbers, strings, arrays, tensors, numpy generators, and "
            "lists, tuples and dicts of these",
            stacklevel=2,
        )
        return None
    return None if state is None else (state, tensors)


def restore_state(env: Any, state: State, tensors: dict[str, Tensor]) -> None:
    """Put an environment, already reset once, into a captured state.

    Raises:
        ValueError: the state is of another kind of environment.
    """
    kind, of = state["kind"], state["of"]
    name = _class_name(env)
    if kind == "state_dict" and _has_state_dict(env):
        env.load_state_dict(_unpack(state["data"], tensors))
        return
    if of != name or (kind == "sync" and state["mode"] != env.autoreset_mode.value):
        mode = f" ({state['mode']})" if kind == "sync" else ""
        raise ValueError(
            f"the saved environment state is of a {of}{mode} and does not fit {name}; resume with "
            "the environment the run was started with"
        )
    if kind == "sync":
        if len(env.envs) != len(state["envs"]):
            raise ValueError(
                f"the saved state is of {len(state['envs'])} environments, these are "
                f"{len(env.envs)}; resume with as many"
            )
        for child, saved in zip(env.envs, state["envs"], strict=True):
            restore_state(child, saved, tensors)
        env._autoreset_envs = _unpack(state["autoreset"], tensors)
        return
    if kind == "wrapper":
        restore_state(env.env, state["env"], tensors)
    for attribute, value in state["own"].items():
        setattr(env, attribute, _unpack(value, tensors))
    if kind == "mujoco":
        _set_mujoco_state(env, _unpack(state["data"], tensors))


def _capture(env: Any, path: str, tensors: dict[str, Tensor]) -> State | None:
    state: State = {"of": _class_name(env)}
    if _has_state_dict(env):
        return {**state, "kind": "state_dict", "data": _pack(env.state_dict(), path, tensors)}
    if type(env) in (SyncVectorEnv, SyncEnvs):
        children = [_capture(child, f"{path}.{i}", tensors) for i, child in enumerate(env.envs)]
        if any(child is None for child in children):
            return None
        flags = _pack(env._autoreset_envs, f"{path}.autoreset", tensors)
        mode = env.autoreset_mode.value
        return {**state, "kind": "sync", "mode": mode, "envs": children, "autoreset": flags}
    attributes = _episode_state(env)
    if attributes is None:
        return None
    own = {
        name: _pack(getattr(env, name), f"{path}.{name}", tensors)
        for name in attributes
        if hasattr(env, name)
    }
    state["own"] = own
    if isinstance(env, gym.Wrapper):
        inner = _capture(env.env, f"{path}.env", tensors)
        return None if inner is None else {**state, "kind": "wrapper", "env": inner}
    if _is_mujoco(env):
        data = _pack(_mujoco_state(env), f"{path}.data", tensors)
        return {**state, "kind": "mujoco", "data": data}
    return {**state, "kind": "plain"}


def _class_name(env: Any) -> str:
    if type(env) is SyncEnvs:
        return _class_name_of(SyncVectorEnv)  # their states are the same
    return _class_name_of(type(env))


def _class_name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _has_state_dict(env: Any) -> bool:
    return hasattr(env, "state_dict") and hasattr(env, "load_state_dict")


def _is_mujoco(env: Any) -> bool:
    return type(env).__module__.startswith(MUJOCO) and hasattr(env, "data")


def _episode_state(env: Any) -> tuple[str, ...] | None:
    """Attributes that an episode changes, or None where we do not know them."""
    if isinstance(env, gym.Wrapper):
        module, _, name = _class_name(env).rpartition(".")
        if module in STATELESS_WRAPPERS and not name.startswith("Transform"):
            return ()
        return EPISODE_STATE.get(_class_name(env))
    if _is_mujoco(env):
        return (GENERATOR,)
    known = EPISODE_STATE.get(_class_name(env))
    return None if known is None else (GENERATOR, *known)


def _mujoco_state(env: Any) -> dict[str, np.ndarray]:
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(env.model, spec))
    mujoco.mj_getState(env.model, env.data, integration, spec)
    return {
        "integration": integration,
        **{name: getattr(env.data, name) for name in MUJOCO_DERIVED},
    }


def _set_mujoco_state(env: Any, data: dict[str, np.ndarray]) -> None:
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(env.model, env.data, data["integration"], spec)
    for name in MUJOCO_DERIVED:
        getattr(env.data, name)[:] = data[name]


class _NotPlainError(TypeError):
    """Something that JSON and tensors cannot hold."""


# Named here so that a checkpoint can choose among these and call nothing else.
BIT_GENERATORS = {
    name: getattr(np.random, name) for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
}


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    # A numpy scalar first: np.float64 is a float too, but promotes float32 arrays.
    if isinstance(value, np.bool_ | np.integer | np.floating) and value.dtype.itemsize <= 8:
        return {"scalar": value.item(), "dtype": str(value.dtype)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        return {"tensor": _name(_from_numpy(value, path), path, tensors), "numpy": True}
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return {"tensor": _name(value.detach().clone(), path, tensors), "numpy": False}
    if isinstance(value, np.random.Generator):
        kind = type(value.bit_generator).__name__
        if kind in BIT_GENERATORS:
            return {"generator": kind, "state": _json_ints(value.bit_generator.state)}
    if isinstance(value, tuple | list | deque):
        items = [_pack(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        packed: State = {"items": items, "as": type(value).__name__}
        if type(value) is deque:
            packed["maxlen"] = value.maxlen
        if type(value) in (tuple, list, deque):
            return packed
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {k: _pack(v, f"{path}.{k}", tensors) for k, v in value.items()}}
    raise _NotPlainError(f"{path} is a {type(value).__name__}")


def _from_numpy(value: np.ndarray, path: str) -> Tensor:
    try:
        if value.dtype.kind in "biuf":
            return torch.from_numpy(value.copy())
    except (TypeError, ValueError):
        pass  # a width or a byte order torch does not have
    raise _NotPlainError(f"{path} is an array of {value.dtype}")


def _name(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    # A key with a dot in it may spell the path of another value.
    while path in tensors:
        path += "_"
    tensors[path] = tensor
    return path


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]].clone()
        return tensor.numpy() if value["numpy"] else tensor
    if "scalar" in value:
        return np.dtype(value["dtype"]).type(value["scalar"])
    if "generator" in value:
        bits = BIT_GENERATORS[value["generator"]]()
        bits.state = _from_json_ints(value["state"])
        return np.random.Generator(bits)
    if "items" in value:
        items = [_unpack(item, tensors) for item in value["items"]]
        if value["as"] == "deque":
            return deque(items, value["maxlen"])
        return tuple(items) if value["as"] == "tuple" else items
    return {key: _unpack(item, tensors) for key, item in value["dict"].items()}


def _json_ints(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _json_ints(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"array": state.tolist(), "dtype": str(state.dtype)}
    return int(state) if isinstance(state, np.integer) else state


def _from_json_ints(state: Any) -> Any:
    if isinstance(state, dict):
        if set(state) == {"array", "dtype"}:
            return np.asarray(state["array"], dtype=state["dtype"])
        return {key: _from_json_ints(value) for key, value in state.items()}
    return state
