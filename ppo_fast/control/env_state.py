"""Saving and restoring the state of environments that allow it.

Supported: an environment with `state_dict()` and `load_state_dict(state)`; Gymnasium's classic
control and toy text environments, whose whole state is in plain attributes; MuJoCo environments;
each of them alone, under Gymnasium's stateless or counting wrappers, in `SyncVectorEnv`, and
Gymnasium's native vector CartPole. Everything else gives None: such a run resumes with new episodes.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor

# Environments and wrappers whose state is exactly their plain attributes and random generators.
PLAIN_STATE = (
    "gymnasium.envs.classic_control",
    "gymnasium.envs.toy_text",
    "gymnasium.wrappers.common",
    "gymnasium.wrappers.atari_preprocessing",
)

State = dict[str, Any]
"""JSON data in which arrays stand as {"tensor": name}, random generators as {"generator": ...}."""


def capture_state(env: Any) -> tuple[State, dict[str, Tensor]] | None:
    """Capture an environment's state as JSON data and named tensors; None where it offers none."""
    tensors: dict[str, Tensor] = {}
    state = _capture(env, "env_state", tensors)
    return None if state is None else (state, tensors)


def restore_state(env: Any, state: State, tensors: dict[str, Tensor]) -> None:
    """Put an environment, already reset once, into a captured state.

    Raises:
        ValueError: the state is of another kind of environment.
    """
    _restore(env, state, tensors)


def _capture(env: Any, path: str, tensors: dict[str, Tensor]) -> State | None:
    if hasattr(env, "state_dict") and hasattr(env, "load_state_dict"):
        return {"kind": "state_dict", "data": _pack(env.state_dict(), path, tensors)}
    if isinstance(env, SyncVectorEnv):
        children = [_capture(child, f"{path}.{i}", tensors) for i, child in enumerate(env.envs)]
        if any(child is None for child in children):
            return None
        flags = _pack(env._autoreset_envs, f"{path}.autoreset", tensors)
        return {"kind": "sync", "envs": children, "autoreset": flags}
    if isinstance(env, gym.Wrapper | gym.vector.VectorWrapper):
        inner = _capture(env.env, f"{path}.env", tensors)
        if inner is None or not _is_plain(env):
            return None
        own = {k: v for k, v in vars(env).items() if k != "env"}
        return {"kind": "wrapper", "own": _pack_plain(own, path, tensors), "env": inner}
    if _is_mujoco(env):
        own = _pack_plain(vars(env), f"{path}.attributes", tensors)
        return {"kind": "mujoco", "own": own, "data": _pack(_mujoco_state(env), path, tensors)}
    if _is_plain(env):
        return {"kind": "plain", "own": _pack_plain(vars(env), path, tensors)}
    return None


def _restore(env: Any, state: State, tensors: dict[str, Tensor]) -> None:
    kind = state["kind"]
    if kind == "state_dict" and hasattr(env, "load_state_dict"):
        env.load_state_dict(_unpack(state["data"], tensors))
    elif kind == "sync" and isinstance(env, SyncVectorEnv) and len(env.envs) == len(state["envs"]):
        for child, saved in zip(env.envs, state["envs"], strict=True):
            _restore(child, saved, tensors)
        env._autoreset_envs = _unpack(state["autoreset"], tensors)
    elif kind == "wrapper" and isinstance(env, gym.Wrapper | gym.vector.VectorWrapper):
        _restore(env.env, state["env"], tensors)
        _set_plain(env, state["own"], tensors)
    elif kind == "mujoco" and _is_mujoco(env):
        import mujoco

        _set_plain(env, state["own"], tensors)
        data = _unpack(state["data"], tensors)
        mujoco.mj_setState(env.model, env.data, data, mujoco.mjtState.mjSTATE_INTEGRATION)
    elif kind == "plain" and _is_plain(env):
        _set_plain(env, state["own"], tensors)
    else:
        raise ValueError(
            f"the saved environment state is of kind {kind!r} and does not fit {type(env).__name__}; "
            "resume with the environment the run was started with"
        )


def _is_plain(env: Any) -> bool:
    return type(env).__module__.startswith(PLAIN_STATE)


def _is_mujoco(env: Any) -> bool:
    return type(env).__module__.startswith("gymnasium.envs.mujoco") and hasattr(env, "data")


def _mujoco_state(env: Any) -> np.ndarray:
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.model, spec))
    mujoco.mj_getState(env.model, env.data, state, spec)
    return state


def _pack_plain(attributes: dict[str, Any], path: str, tensors: dict[str, Tensor]) -> State:
    packed = {}
    for name, value in attributes.items():
        try:
            packed[name] = _pack(value, f"{path}.{name}", tensors)
        except TypeError:
            continue  # spaces, renderers, surfaces: not state
    return packed


def _set_plain(env: Any, state: State, tensors: dict[str, Tensor]) -> None:
    for name, value in state.items():
        setattr(env, name, _unpack(value, tensors))


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return {"scalar": value.item(), "dtype": str(value.dtype)}
    if isinstance(value, np.ndarray) and value.dtype != object:
        tensors[path] = torch.from_numpy(value.copy())
        return {"tensor": path, "numpy": True}
    if isinstance(value, Tensor):
        tensors[path] = value.detach().clone()
        return {"tensor": path, "numpy": False}
    if isinstance(value, np.random.Generator):
        state = value.bit_generator.state
        return {"generator": type(value.bit_generator).__name__, "state": _json_ints(state)}
    if isinstance(value, tuple | list):
        items = [_pack(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return {"items": items, "tuple": isinstance(value, tuple)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {k: _pack(v, f"{path}.{k}", tensors) for k, v in value.items()}}
    raise TypeError(f"{path}: {type(value).__name__} is not plain data")


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


# Named here so that a checkpoint can choose among these and call nothing else.
BIT_GENERATORS = {
    name: getattr(np.random, name) for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
}


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
        return tuple(items) if value["tuple"] else items
    return {key: _unpack(item, tensors) for key, item in value["dict"].items()}
