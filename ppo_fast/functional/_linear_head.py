"""The arguments of the `_from_hidden` ops, checked, and the buffers their gradients go to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.functional._rows import check_mask, check_temperature
from ppo_fast.functional._terms import Scalar

MEGABYTE = 1 << 20

Upstream = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""From a range of rows, their log-probs and entropies to what the loss changes by with each."""


class Head(NamedTuple):
    """x = cap(scale (h W^T + b)), cap(x) = softcap tanh(x / softcap); the policy is softmax(x / T)."""

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    """[V]"""
    temperature: Scalar
    softcap: float | None
    scale: float

    @property
    def divisor(self) -> Scalar | None:
        """The temperature; None for exactly 1."""
        plain = not isinstance(self.temperature, Tensor) and self.temperature == 1.0
        return None if plain else self.temperature


class Job(NamedTuple):
    """Rows to be worked on, without a graph."""

    hidden: Tensor
    """[M, D]"""
    taken: Tensor
    """[M] int64: the index of each row"""
    chosen: Tensor | None
    """[K] int64: the only rows to look at; None for all."""
    mask: Tensor | None
    """[M] bool, where rows are not chosen but masked on the way."""
    head: Head
    dtype: torch.dtype
    """of the logits, the results and the accumulators"""
    workspace: int
    """bytes"""

    @property
    def number(self) -> int:
        """How many rows results have."""
        return len(self.hidden) if self.chosen is None else len(self.chosen)


class Sinks(NamedTuple):
    """Where gradients go; None is not wanted."""

    hidden: Tensor | None
    """[M, D] in the job's dtype; rows that are not looked at keep what they hold."""
    weight: Tensor | None
    """[V, D], added to"""
    bias: Tensor | None
    """[V], added to"""
    scale: Scalar = 1.0
    """Multiplies all gradients."""
    fresh: bool = False
    """Whether `weight` is yet unwritten, and there are rows: the first of them overwrite it."""


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    temperature: Scalar,
    softcap: float | None,
    logit_scale: float,
    mask: Tensor | None,
    workspace_mb: float,
) -> None:
    """Raise unless the arguments fit together."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{op}: torch.func transforms (vmap, grad, jvp) are not supported; the op takes any "
            "number of leading dimensions, so call it on the whole batch"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} is {tensor.dtype}; expected a floating-point dtype")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: weight is {list(weight.shape)}; expected [V, D] with V at least 1, as "
            "torch.nn.Linear keeps it"
        )
    size, width = weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != width:
        raise ValueError(
            f"{op}: hidden is {list(hidden.shape)}, weight {list(weight.shape)}; expected [..., {width}]"
            " for hidden (a weight laid out [D, V] goes in as weight.t())"
        )
    if index.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: index is {list(index.shape)}, hidden {list(hidden.shape)}; "
            f"index must be {list(hidden.shape[:-1])}, one entry a row of hidden"
        )
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: index is {index.dtype}; expected int64 or int32")
    if bias is not None and bias.shape != (size,):
        raise ValueError(f"{op}: bias is {list(bias.shape)}; expected [{size}], one entry a logit")
    check_mask(op, mask, index.shape)
    for name, tensor in (("weight", weight), ("index", index), ("bias", bias), ("mask", mask)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, hidden on {hidden.device}")
    check_temperature(op, temperature)
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{op}: {name} is {value}; expected a positive finite number")
    if not 0.0 < workspace_mb < math.inf:
        raise ValueError(
            f"{op}: workspace_mb is {workspace_mb}; expected a positive number of megabytes"
        )


def check_indices(op: str, index: Tensor, size: int) -> None:
    """Raise where an index has no logit; reads it, so not on a GPU."""
    if not index.numel():
        return
    low, high = map(int, index.aminmax())
    if low < 0 or high >= size:
        raise IndexError(
            f"{op}: index runs from {low} to {high}, but there are {size} logits a row; expected 0 "
            f"to {size - 1} (mask the rows that have no index)"
        )


def check_buffer(op: str, name: str, buffer: Tensor, like: Tensor) -> None:
    """Raise unless a gradient of `like` can be added to `buffer`."""
    if buffer.shape != like.shape or buffer.device != like.device:
        raise ValueError(
            f"{op}: {name} is {list(buffer.shape)} on {buffer.device}; expected {list(like.shape)} on "
            f"{like.device}, the shape of what it is the gradient of"
        )
    if not buffer.is_floating_point():
        raise ValueError(f"{op}: {name} is {buffer.dtype}; expected float32 (or another floating)")
    if buffer.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} requires a gradient; expected a plain buffer, pass .detach()"
        )
