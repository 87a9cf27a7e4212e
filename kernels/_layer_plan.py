"""Where the layers of an MLP actor-critic lie, padded, for `_layerwise`, and the tiles they take.

Everything here is a pure function of the shapes, so that the same input gives the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.kernels import _layer_products as products
from ppo_fast.kernels._launch import INTERPRETED, next_power_of_2
from ppo_fast.results import ActorCriticSpec

BLOCK_BYTES = 1 << 17 if INTERPRETED else 1 << 26
"""Hidden layers of a block of rows, at most. The cache of an H100 or H200 has 50 MiB, in which a
block's last layers are still there when it goes backward; with less, launches gain in number what
they lose in bytes."""

FEWEST_ROWS = 128 if INTERPRETED else 2048
"""Rows of a block, unless there are fewer: launches of less would not fill a GPU."""

ROWS = 128
"""Rows of a block are padded to a multiple of this, and tiles divide it."""

PROGRAMS = 4 if INTERPRETED else 132
"""Of a launch that sums over rows, about; the number of splits is made to fit. The same on every
GPU, so that results are the same bits."""

FUSED_OUTPUTS = 32
"""Padded outputs up to which the last layers' gradients and that of the layer below are one launch:
with more, sums and operands do not fit a program's registers."""

MOST_OUTPUTS = 512
"""Actor's outputs beyond which the reference serves."""


class Layer(NamedTuple):
    """A layer as the products see it: padded, its place in every buffer."""

    out: int
    width: int
    weights: int
    """of its weights among the packed ones"""
    biases: int
    """of its biases among the packed ones"""
    partials: int
    """of its first split in the partial sums"""
    splits: int
    below: int | None
    """hidden units of a row before those it reads; None: it reads the observations"""
    above: int | None
    """hidden units of a row before those it writes, or before its g; None: a last layer whose g is
    not stored"""
    parts: tuple[tuple[int, int, int, int], ...]
    """what it is made of: its first row here, place in the flat parameters, out, width"""


class Plan(NamedTuple):
    """The layers of the networks, and the sizes of the buffers."""

    trunk: tuple[Layer, ...]
    nets: tuple[tuple[Layer, ...], ...]
    """actor and critic, each without its last layer; in equal shapes they are computed together"""
    heads: tuple[Layer, ...]
    """last layers of actor and critic; one where both read the same and nothing lies between"""
    is_paired: bool
    rows: int
    """of a block, padded"""
    units: int
    """hidden units of a row, and with them those of g that is stored of last layers"""
    weights: int
    packed: int
    """weights, then biases, then log_std, each layer's padded"""
    partials: int
    log_std_partials: int


class Tile(NamedTuple):
    """Sides of a product's tiles, its summed dimension last; and how it is run."""

    m: int
    n: int
    k: int
    options: dict[str, int]


def pitch_of(width: int) -> int:
    """`width` padded so that tiles of 16, 32 or a multiple of 64 fill it."""
    return next_power_of_2(max(width, 16)) if width <= 64 else triton.cdiv(width, 64) * 64


def side_of(pitch: int, most: int) -> int:
    """The largest power of two up to `most` that divides a pitch."""
    return min(most, math.gcd(pitch, most))


def layer_tile(out: int, width: int, kind: str) -> Tile:
    """Of a product [rows, width] @ [width, out]; with all of `width`, programs keep their weights."""
    if kind == "ieee":
        return Tile(64, side_of(out, 64), side_of(width, 16), {"num_warps": 4, "num_stages": 2})
    n = side_of(out, 64 if kind == "tf32" else 128)
    # With 256, a tile of the weights and two of the inputs fill the shared memory.
    k = side_of(width, {"half": 256, "small half": 64, "tf32": 32}[kind])
    if k < width:
        k = min(k, 64)
    return Tile(
        128, n, k, {"num_warps": 8 if n == 128 else 4, "num_stages": 2 if k == width else 3}
    )


def turns_of(rows: int, tile: Tile, columns: int, width: int) -> tuple[int, int, int]:
    """Programs for each of `columns` tiles, tiles of rows to a program, and in all."""
    tiles = rows // tile.m
    if tile.k < width:
        return tiles, 1, tiles
    turns = triton.cdiv(tiles, max(1, min(PROGRAMS // columns, tiles)))
    return triton.cdiv(tiles, turns), turns, tiles


def weights_tile(out: int, width: int, kind: str) -> Tile:
    """Of a product [out, rows] @ [rows, width]."""
    if kind == "ieee":
        return Tile(side_of(out, 64), side_of(width, 64), 16, {"num_warps": 4, "num_stages": 2})
    if kind == "tf32":
        return Tile(side_of(out, 64), side_of(width, 64), 32, {"num_warps": 4, "num_stages": 3})
    m, n = side_of(out, 128), side_of(width, 128)
    # Of 64 rows, tiles of 128 x 128 compile to products that wait for one another on sm_90.
    k = 128 if m * n == 128 * 128 and kind == "half" else 64
    return Tile(m, n, k, {"num_warps": 8 if m == 128 else 4, "num_stages": 3})


def heads_tile(out: int, width: int, kind: str) -> Tile:
    """Rows, columns of the layer below, outputs: of the backward pass through the last layers."""
    m, n = {"half": (64, 128), "small half": (64, 128), "tf32": (32, 64), "ieee": (32, 32)}[kind]
    n = side_of(width, n)
    return Tile(m, n, out, {"num_warps": 4, "num_stages": 2})


def _splits(tiles: int, turns: int, programs: int) -> int:
    """Into how many parts a sum of `turns` tiles of rows is cut, by `tiles` programs each."""
    each = triton.cdiv(turns, max(1, min(programs // tiles, turns)))
    return triton.cdiv(turns, each)


def _most_rows(units: int, itemsize: int) -> int:
    """Rows of a block, at most."""
    rows = BLOCK_BYTES // max(1, units * itemsize) // ROWS * ROWS
    return max(rows, FEWEST_ROWS)


@functools.lru_cache(maxsize=16)
def plan_of(spec: ActorCriticSpec, M: int, kind: str) -> Plan:
    """The layers for blocks of M rows; a pure function of the shapes."""
    flat = spec.num_outputs if spec.head_sizes is None else 0
    sizes: list[list[tuple[int, int, int]]] = []
    for net in spec.layers:
        sizes.append([])
        for out, width in net:
            sizes[-1].append((flat, out, width))
            flat += out * (width + 1)
    (*actor, actor_head), (*critic, critic_head) = sizes[1], sizes[2]
    is_both = not actor and not critic
    is_paired = bool(actor) and spec.actor_sizes == spec.critic_sizes
    outputs = pitch_of(spec.num_outputs + is_both)
    is_fused = outputs <= FUSED_OUTPUTS

    units = sum(
        pitch_of(out) for out in (*spec.shared_sizes, *spec.actor_sizes, *spec.critic_sizes)
    )
    kept = 2 if spec.activation == "silu" else 1
    blocks = triton.cdiv(M, _most_rows(units, kept * (4 if kind in ("tf32", "ieee") else 2)))
    rows = max(1, triton.cdiv(M, max(1, blocks) * ROWS)) * ROWS

    weights = biases = partials = hidden = 0

    def layer(
        out: int, below: int | None, width: int, parts: Sequence[tuple[int, int, int, int]]
    ) -> Layer:
        nonlocal weights, biases, partials, hidden
        together = 2 if is_paired and parts[0][1] >= first_own else 1
        is_last = out == 0
        out = out or outputs
        if is_last and is_fused:
            tile = heads_tile(out, width, kind)
            tiles, turns = width // tile.n * together, rows // tile.m
            splits = _splits(tiles, turns, 2 * PROGRAMS)
        else:
            tile = weights_tile(out, width, kind)
            tiles = out // tile.m * (width // tile.n) * together
            splits = _splits(tiles, rows // tile.k, PROGRAMS)
        above = None if is_last and is_fused else hidden
        made = Layer(
            *(out, width, weights, biases, partials, splits, below, above, tuple(parts)),
        )
        weights += _padded(out * width)
        biases += _padded(out)
        partials += _padded(splits * (out * width + out))
        hidden += 0 if above is None else out
        return made

    first_own = sizes[1][0][0]

    def hidden_layers(
        own: Sequence[tuple[int, int, int]], below: int | None, width: int
    ) -> tuple[tuple[Layer, ...], int | None, int]:
        layers = []
        for offset, out, true_width in own:
            layers.append(layer(pitch_of(out), below, width, [(0, offset, out, true_width)]))
            below, width = layers[-1].above, layers[-1].out
        return tuple(layers), below, width

    trunk, *features = hidden_layers(sizes[0], None, pitch_of(spec.obs_size))
    nets, heads = [], []
    ends = []
    for own in (actor, critic):
        layers, *end = hidden_layers(own, *features)
        nets.append(layers)
        ends.append(end)
    last = [(0, *actor_head)], [(0, *critic_head)]
    if is_both:
        heads.append(layer(0, *features, [(0, *actor_head), (spec.num_outputs, *critic_head)]))
    else:
        heads += [layer(0, *end, parts) for end, parts in zip(ends, last, strict=True)]
    log_std = spec.num_outputs if spec.head_sizes is None else 0
    return Plan(
        *(trunk, tuple(nets), tuple(heads), is_paired, rows, hidden, weights),
        weights + biases + _padded(log_std),
        partials + _padded(log_std),
        partials,
    )


def _padded(size: int) -> int:
    padding = products.PADDING.value
    return triton.cdiv(size, padding) * padding


@functools.lru_cache(maxsize=16)
def tables_of(spec: ActorCriticSpec, plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """`flat_of` and `places` of `gradients_kernel`, for all packed parameters."""
    flat_of = torch.full((plan.packed,), -1, dtype=torch.int32, device="cpu")
    padding = products.PADDING.value
    places = torch.zeros(plan.packed // padding, 3, dtype=torch.int64, device="cpu")
    layers = (*plan.trunk, *plan.nets[0], *plan.nets[1], *plan.heads)
    for layer in layers:
        size = layer.out * layer.width
        own = flat_of[layer.weights : layer.weights + size].view(layer.out, layer.width)
        of_biases = flat_of[plan.weights + layer.biases :]
        for row, flat, out, width in layer.parts:
            end = flat + out * width
            counted = torch.arange(flat, end + out, dtype=torch.int32, device="cpu")
            own[row : row + out, :width] = counted[: out * width].view(out, width)
            of_biases[row : row + out] = counted[out * width :]
        step = size + layer.out
        _note(places, layer.weights, size, (layer.partials, step, layer.splits))
        start = plan.weights + layer.biases
        _note(places, start, layer.out, (layer.partials + size, step, layer.splits))
    if spec.head_sizes is None:
        start = plan.packed - _padded(spec.num_outputs)
        flat_of[start : start + spec.num_outputs] = torch.arange(spec.num_outputs, device="cpu")
        _note(places, start, spec.num_outputs, (plan.log_std_partials, 0, 1))
    return flat_of.to(device), places.to(device)


def _note(places: Tensor, start: int, length: int, place: tuple[int, int, int]) -> None:
    """Write what `gradients_kernel` is told of the packed parameters from `start` on."""
    padding = products.PADDING.value
    own = places[start // padding : (start + _padded(length)) // padding]
    own[:] = torch.tensor(place, device="cpu")
    own[:, 0] += padding * torch.arange(len(own), device="cpu")
