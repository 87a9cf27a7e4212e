"""Spaces as leaves, as storage and as JSON."""

import json

import numpy as np
import pytest
import torch
from gymnasium import spaces

from ppo_fast.control.spaces import (
    allocate,
    as_batch,
    flatten_observation,
    space_from_json,
    space_leaves,
    space_to_json,
    storage_dtype,
)

CPU = torch.device("cpu")
NESTED = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (4, 4, 3), np.uint8),
        "pose": spaces.Tuple((spaces.Box(-1, 1, (2,), np.float64), spaces.Discrete(3, start=-1))),
        "arm": spaces.Dict({"on": spaces.MultiBinary(2), "gear": spaces.MultiDiscrete([2, 5])}),
    }
)
PATHS = {"camera", "pose/0", "pose/1", "arm/on", "arm/gear"}

SPACES = {
    "box": spaces.Box(-1, 1, (3,), np.float32),
    "scalar box": spaces.Box(-1, 1, (), np.float32),
    "float64 box": spaces.Box(-0.1, 0.3, (2, 2), np.float64),
    "unbounded box": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "half bounded box": spaces.Box(
        np.array([0, -np.inf]), np.array([np.inf, 1.5]), dtype=np.float64
    ),
    "box with a bound per element": spaces.Box(
        np.array([[0.1, -2], [3, 4]], np.float32), np.array([[1, 2], [3, 4.7]], np.float32)
    ),
    "image": spaces.Box(0, 255, (2, 3, 1), np.uint8),
    "int64 box": spaces.Box(-(2**40), 2**40, (2,), np.int64),
    "whole int64 box": spaces.Box(-np.inf, np.inf, (2,), np.int64),
    "bool box": spaces.Box(0, 1, (2,), np.bool_),
    "discrete": spaces.Discrete(5),
    "discrete with start": spaces.Discrete(5, start=-2),
    "multi-discrete": spaces.MultiDiscrete([2, 3, 4]),
    "multi-discrete with start": spaces.MultiDiscrete([2, 3], start=[-1, 4]),
    "multi-discrete matrix": spaces.MultiDiscrete([[2, 3], [4, 5]], dtype=np.int32),
    "multi-binary": spaces.MultiBinary(4),
    "multi-binary matrix": spaces.MultiBinary([2, 3]),
    "nested": NESTED,
}


def test_leaves_are_found_by_path():
    assert set(space_leaves(NESTED)) == PATHS
    assert space_leaves(NESTED)["pose/1"] == spaces.Discrete(3, start=-1)
    lone = spaces.Discrete(2)
    assert space_leaves(lone) == {"": lone}


def test_observations_flatten_as_their_space_does():
    flat = flatten_observation(NESTED.sample())
    assert set(flat) == PATHS
    assert flatten_observation(flat) == flat
    array = np.zeros(3)
    assert flatten_observation(array) is array


@pytest.mark.parametrize("leaf", [spaces.Text(3), spaces.Sequence(spaces.Discrete(2))])
def test_a_leaf_without_support_is_named_with_its_path(leaf):
    with pytest.raises(
        ValueError, match=r"observation space .* at 'a/1' is not supported; expected"
    ):
        space_leaves(spaces.Dict({"a": spaces.Tuple((spaces.Discrete(2), leaf))}))
    with pytest.raises(ValueError, match=r"^observation space [^']* is not supported"):
        space_leaves(leaf)


def test_a_space_without_leaves_is_refused():
    with pytest.raises(ValueError, match="holds no leaf"):
        space_leaves(spaces.Dict({}))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (np.float64, torch.float32),
        (np.float32, torch.float32),
        (np.float16, torch.float32),
        (np.uint8, torch.uint8),
        (np.int8, torch.int8),
        (np.int32, torch.int32),
        (np.int64, torch.int64),
    ],
)
def test_integers_keep_their_dtype_and_floats_become_float32(dtype, stored):
    assert storage_dtype(spaces.Box(0, 1, (2,), dtype)) == stored


def test_storage_has_a_tensor_a_leaf():
    storage = allocate(space_leaves(NESTED), (6, 2), CPU)
    assert {path: tuple(leaf.shape) for path, leaf in storage.items()} == {
        "camera": (6, 2, 4, 4, 3),
        "pose/0": (6, 2, 2),
        "pose/1": (6, 2),
        "arm/on": (6, 2, 2),
        "arm/gear": (6, 2, 2),
    }
    assert storage["camera"].dtype == torch.uint8 and storage["pose/1"].dtype == torch.int64
    assert isinstance(allocate(space_leaves(spaces.Discrete(3)), (6, 2), CPU), torch.Tensor)


@pytest.mark.parametrize("name", SPACES)
def test_json_gives_the_same_space_back(name):
    space = SPACES[name]
    text = json.dumps(space_to_json(space), allow_nan=False)
    again = space_from_json(json.loads(text))
    assert again == space and again.dtype == space.dtype and again.shape == space.shape


def test_json_of_large_equal_bounds_is_short():
    assert len(json.dumps(space_to_json(spaces.Box(0, 255, (84, 84, 4), np.uint8)))) < 120


def test_json_of_other_spaces_is_refused():
    with pytest.raises(ValueError, match=r"Text.* is not supported"):
        space_to_json(spaces.Text(3))
    with pytest.raises(ValueError, match="unknown space type 'Text'"):
        space_from_json({"type": "Text"})


def batch_of(space, rows):
    sampled = [space.sample() for _ in range(rows)]
    if isinstance(space, spaces.Dict):
        return {key: batch_of(child, rows) for key, child in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(batch_of(child, rows) for child in space.spaces)
    return np.stack(sampled)


@pytest.mark.parametrize("name", SPACES)
def test_one_observation_and_a_batch_are_told_apart(name):
    space = SPACES[name]
    leaves = space_leaves(space)
    for obs, rows, want in ((space.sample(), 1, False), (batch_of(space, 5), 5, True)):
        tree, batched = as_batch(obs, leaves, CPU)
        assert batched == want
        named = tree if isinstance(tree, dict) else {"": tree}
        for path, leaf in named.items():
            assert leaf.shape == (rows, *leaves[path].shape)
            assert leaf.dtype == storage_dtype(leaves[path])


def test_lists_numbers_and_tensors_are_observations_too():
    box, discrete = space_leaves(SPACES["box"]), space_leaves(SPACES["discrete"])
    for obs in ([0.1, 0.2, 0.3], torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)):
        tree, batched = as_batch(obs, box, CPU)
        torch.testing.assert_close(tree, torch.tensor([[0.1, 0.2, 0.3]]))
        assert not batched
    assert as_batch(3, discrete, CPU)[0].tolist() == [3]
    assert as_batch([3, 1], discrete, CPU)[0].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("space", "obs", "message"),
    [
        ("box", np.zeros(4), r"observation has shape \(4,\); expected \(3,\), or a batch \[M, 3\]"),
        ("box", np.zeros((2, 2, 3)), r"observation has shape \(2, 2, 3\)"),
        ("scalar box", np.zeros((2, 2)), r"expected \(\), or a batch \[M\]"),
        (
            "image",
            np.zeros((2, 3, 1), np.float32),
            "observation has dtype .*float32; expected uint8",
        ),
        ("discrete", 1.5, "observation has dtype .*float64; expected int64"),
        ("box", {"a": np.zeros(3)}, r"observation has \['a'\]; expected one array"),
        ("box", None, "observation is NoneType"),
        ("box", ["a", "b", "c"], "observation is list"),
        ("nested", np.zeros(3), "observation has ndarray; expected leaves"),
        (
            "nested",
            {"camera": np.zeros((4, 4, 3), np.uint8)},
            r"observation has \['camera'\]; expected",
        ),
    ],
)
def test_what_is_no_observation_is_refused(space, obs, message):
    with pytest.raises(ValueError, match=message):
        as_batch(obs, space_leaves(SPACES[space]), CPU)


def test_single_and_batched_leaves_do_not_mix():
    space = spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Discrete(2)})
    with pytest.raises(ValueError, match="mixes single and batched leaves"):
        as_batch({"a": 1, "b": [1, 0]}, space_leaves(space), CPU)
    with pytest.raises(ValueError, match=r"unequal batches: .*'a': 2, 'b': 3"):
        as_batch({"a": [1, 0], "b": [1, 0, 1]}, space_leaves(space), CPU)
