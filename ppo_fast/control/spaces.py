"""Gymnasium spaces as flat leaves, torch storage dtypes and JSON."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ppo_fast.tree import Tree


def space_leaves(space: spaces.Space, path: str = "") -> dict[str, spaces.Space]:
    """Flatten Dict and Tuple spaces to leaves by path ("camera", "pose/0"); a lone leaf has path "".

    Raises:
        ValueError: a leaf that is not Box, Discrete, MultiDiscrete or MultiBinary.
    """
    prefix = f"{path}/" if path else ""
    if isinstance(space, spaces.Dict):
        children = space.spaces.items()
    elif isinstance(space, spaces.Tuple):
        children = enumerate(space.spaces)  # type: ignore[assignment]
    else:
        if not isinstance(
            space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
        ):
            raise ValueError(
                f"observation space {space}{f' at {path!r}' if path else ''} is not supported; "
                "expected Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these"
            )
        return {path: space}
    leaves: dict[str, spaces.Space] = {}
    for name, child in children:
        leaves |= space_leaves(child, f"{prefix}{name}")
    return leaves


def flatten_observation(obs: Any, path: str = "") -> Any:
    """Flatten nested dicts and tuples of arrays as `space_leaves` flattens their space."""
    if hasattr(obs, "items"):  # dict, or tensordict.TensorDict
        children = list(obs.items())
    elif isinstance(obs, tuple):
        children = list(enumerate(obs))
    else:
        return obs if not path else {path: obs}
    prefix = f"{path}/" if path else ""
    leaves: dict[str, Any] = {}
    for name, child in children:
        leaves |= flatten_observation(child, f"{prefix}{name}")
    return leaves


def storage_dtype(space: spaces.Space) -> torch.dtype:
    """dtype a leaf is stored in: its own, but float64 as float32."""
    dtype = np.dtype(space.dtype)
    if dtype.kind == "f":
        return torch.float32
    return torch.from_numpy(np.zeros(0, dtype)).dtype


def allocate(leaves: dict[str, spaces.Space], lead: tuple[int, ...], device: torch.device) -> Tree:
    """Zeroed storage [*lead, *shape] for observations of the given leaves."""
    storage = {
        path: torch.zeros(*lead, *(space.shape or ()), dtype=storage_dtype(space), device=device)
        for path, space in leaves.items()
    }
    return storage[""] if "" in storage else storage


def as_batch(obs: Any, leaves: dict[str, spaces.Space], device: torch.device) -> tuple[Tree, bool]:
    """Turn one observation or a batch into tensors; say whether it was a batch.

    Raises:
        ValueError: missing leaves, or a shape that is neither one observation nor a batch of them.
    """
    flat = flatten_observation(obs)
    if isinstance(flat, dict) != ("" not in leaves) or (
        isinstance(flat, dict) and set(flat) != set(leaves)
    ):
        came = sorted(flat) if isinstance(flat, dict) else type(obs).__name__
        raise ValueError(f"observation has {came}; expected leaves {sorted(leaves)}")
    named = flat if isinstance(flat, dict) else {"": flat}
    tensors: dict[str, Tensor] = {}
    batched = set()
    for path, space in leaves.items():
        shape = tuple(space.shape or ())
        leaf = torch.as_tensor(
            named[path] if isinstance(named[path], Tensor) else np.asarray(named[path])
        )
        if tuple(leaf.shape) == shape:
            leaf = leaf.unsqueeze(0)
            batched.add(False)
        elif tuple(leaf.shape[1:]) == shape and leaf.dim() == len(shape) + 1:
            batched.add(True)
        else:
            raise ValueError(
                f"observation{f' {path!r}' if path else ''} has shape {tuple(leaf.shape)}; "
                f"expected {shape}, or a batch [M, {', '.join(map(str, shape))}]"
            )
        tensors[path] = leaf.to(device=device, dtype=storage_dtype(space))
    if len(batched) > 1:
        raise ValueError("observation mixes single and batched leaves")
    return (tensors[""] if "" in tensors else dict(tensors)), batched.pop()


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """Describe a space in JSON types; `space_from_json` reads it back.

    Raises:
        ValueError: a space outside the supported ones.
    """
    if isinstance(space, spaces.Box):

        def bound(values: np.ndarray) -> Any:
            flat = [_number_to_json(v) for v in values.reshape(-1).tolist()]
            return flat[0] if flat and all(v == flat[0] for v in flat) else flat

        return {
            "type": "Box",
            "low": bound(space.low),
            "high": bound(space.high),
            "shape": list(space.shape),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": space.start.tolist(),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": list(space.shape)}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {k: space_to_json(v) for k, v in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "spaces": [space_to_json(v) for v in space.spaces]}
    raise ValueError(f"space {space} is not supported")


def space_from_json(data: dict[str, Any]) -> spaces.Space:
    """Rebuild a space described by `space_to_json`.

    Raises:
        ValueError: an unknown type.
    """
    kind = data["type"]
    if kind == "Box":
        shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])

        def bound(values: Any) -> np.ndarray:
            numbers = [float(v) for v in values] if isinstance(values, list) else float(values)
            return np.broadcast_to(
                np.asarray(numbers).reshape(shape if isinstance(values, list) else ()), shape
            ).astype(dtype)

        return spaces.Box(bound(data["low"]), bound(data["high"]), dtype=dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(data["n"], start=data["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(
            np.asarray(data["nvec"]),
            dtype=np.dtype(data["dtype"]).type,
            start=np.asarray(data["start"]),
        )
    if kind == "MultiBinary":
        return spaces.MultiBinary(data["n"] if len(data["n"]) > 1 else data["n"][0])
    if kind == "Dict":
        return spaces.Dict({k: space_from_json(v) for k, v in data["spaces"].items()})
    if kind == "Tuple":
        return spaces.Tuple([space_from_json(v) for v in data["spaces"]])
    raise ValueError(f"unknown space type {kind!r}")


def _number_to_json(value: float) -> Any:
    # JSON has no infinities; float("inf") reads these words back.
    return value if math.isfinite(value) else str(value)
