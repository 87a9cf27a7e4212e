"""How every kernel here is launched, and how its arguments reach it.

A twin never calls `kernel[grid](...)` itself: `launch` puts the call on the tensors' device, mends
the interpreter's gaps, and can record calls instead of running them, which is how the
ahead-of-time checks (`benchmarks/aot.py`) see the very configurations that ship.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when this file was imported."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""A maximum of nothing: the lowest finite number. Not -inf: the difference of two of those is NaN."""


class Launch(NamedTuple):
    """One recorded call of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorded: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block instead of running them; outputs stay unwritten."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` on `grid` programs, on the device of its first tensor; an empty grid is no call.

    Args:
        kernel: a `@triton.jit` function.
        grid: number of programs along up to three axes. Rows belong on the first: the other two
            end at 65535.
        args: its positional arguments: tensors, ints, floats (read them by `number`), None, and
            named tuples of those.
        meta: its constexpr arguments by name, and `num_warps`, `num_stages`, `maxnreg`.
    """
    if 0 in grid:
        return
    if torch.version.hip is not None:
        meta.pop("maxnreg", None)  # an option of NVIDIA's assembler
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
        return
    if INTERPRETED:
        # The interpreter hands floats over as Python's, which have no dtype to ask for.
        kernel[grid](*map(_as_tensor, args), **meta)
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.index == torch.cuda.current_device():
        kernel[grid](*args, **meta)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)


def _as_tensor(x: Any) -> Any:
    if isinstance(x, tuple):
        return type(x)(*map(_as_tensor, x))
    return torch.tensor(x, device="cpu") if isinstance(x, float) else x


@triton.jit
def number(x):
    """Read a hyper-parameter in a kernel: a float argument, or a pointer to a 0-d tensor's one."""
    if x.dtype.is_ptr():
        value = tl.load(x).to(tl.float32)
    else:
        value = x.to(tl.float32)
    return value


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """[..., V] as a view [M, V] with a contiguous last dimension, or as one copy where none exists."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() != 2 else x


def check_grad_once(op: str) -> None:
    """Raise in a backward that is itself recorded (`create_graph=True`)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{op}: its gradient is not differentiable, but create_graph=True asks for that; "
            "use ppo_fast.backend('reference') or write it in torch operations"
        )


def _take_runtime_loop_bounds() -> None:
    """Let the interpreter take runtime loop bounds: up to triton 3.6 it fails on them with numpy 2.4.

    Later versions squeeze the one-element array themselves (triton pull request 9172).
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)

        def index(self: Any) -> int:
            return int(self.handle.data.item())

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched


def _take_scalar_conditions() -> None:
    """Let the interpreter take masks such as `vector & (scalar < scalar)`.

    It types a comparison of scalars as an integer, and from triton 3.8 on refuses masks of integers.
    """
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    load, store = builder.create_masked_load, builder.create_masked_store

    def as_mask(mask: Any) -> Any:
        return handle(mask.data.astype(bool), tl.int1)

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        return load(self, ptrs, as_mask(mask), *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, ptrs, value, as_mask(mask), *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store


if INTERPRETED and triton.__version__.startswith(("3.4.", "3.5.", "3.6.")):
    _take_runtime_loop_bounds()
elif INTERPRETED and not triton.__version__.startswith("3.7."):
    _take_scalar_conditions()
