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
    if not leaves:
        raise ValueError(f"observation space {space} holds no leaf; expected at least one")
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
        ValueError: missing leaves, a shape that is neither one observation nor a batch of them, floats
            for integers, or what is no array at all.
    """
    flat = flatten_observation(obs)
    named = flat if isinstance(flat, dict) else {"": flat}
    # More groups than the space names are a robotics environment's; see `Environments`.
    if not set(leaves) <= set(named):
        came = sorted(named) if isinstance(flat, dict) else type(obs).__name__
        expected = "one array" if "" in leaves else f"leaves {sorted(leaves)}"
        raise ValueError(f"observation has {came}; expected {expected}")
    tensors: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    single = set()
    for path, space in leaves.items():
        name = f"observation{f' {path!r}' if path else ''}"
        shape, dtype = tuple(space.shape or ()), storage_dtype(space)
        leaf = _as_tensor(name, named[path])
        if tuple(leaf.shape) == shape:
            leaf = leaf.unsqueeze(0)
            single.add(True)
        elif tuple(leaf.shape[1:]) == shape and leaf.dim() == len(shape) + 1:
            single.add(False)
        else:
            raise ValueError(
                f"{name} has shape {tuple(leaf.shape)}; "
                f"expected {shape}, or a batch [{', '.join(map(str, ('M', *shape)))}]"
            )
        if leaf.is_floating_point() and not dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {leaf.dtype}; expected {space.dtype}")
        tensors[path] = leaf.to(device=device, dtype=dtype)
        rows[path] = len(leaf)
    if len(single) > 1:
        raise ValueError("observation mixes single and batched leaves")
    if len(set(rows.values())) > 1:
        raise ValueError(f"observation has leaves of unequal batches: {rows} rows")
    return (tensors[""] if "" in tensors else tensors), not single.pop()


def _as_tensor(name: str, leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    try:
        return torch.as_tensor(np.asarray(leaf))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is {type(leaf).__name__}; expected an array of numbers: {error}"
        ) from error


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
            whole = isinstance(values, list)
            numbers = [_number_from_json(v) for v in (values if whole else [values])]
            flat = np.asarray(numbers, dtype)
            return np.broadcast_to(flat.reshape(shape if whole else ()), shape).copy()

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


def _number_from_json(value: float | str) -> float:
    # Integers stay: a float would round those beyond 2^53.
    return value if isinstance(value, int) else float(value)
