"""Opaque `torch.library` ops around the launching functions, for `torch.compile(fullgraph=True)`.

In eager mode a launching function is called straight: an op's dispatch costs more than the kernel.
While a graph is traced the same function stands there as one opaque node, launched as in eager mode
when the graph runs. Opaque rather than `triton_op`: Inductor, which sees into those, turns float
arguments into float64 and trips over annotations in the kernels (Liger-Kernel issues 1350, 1364).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = __name__.partition(".")[0]
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

OPS: dict[str, Any] = {}
"""Every op defined here, by name; `tests/kernels/test_library_kernel.py` holds each to opcheck."""


def opaque(
    fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a launching function an opaque op, called in its place while a graph is traced.

    The op's schema is read off the function's annotations: tensors, optional tensors, ints, floats,
    bools and sequences of them. It returns a tensor or a tuple of a fixed number of tensors.

    Args:
        fake: takes the same arguments and returns unwritten tensors of the results' shape and dtype.
        mutates: names of the tensors that the function writes to.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.lstrip("_")
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        op = OPS[name] = getattr(getattr(torch.ops, NAMESPACE), name).default

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return op(*args)
            return function(*args)

        return call

    return decorate


ABSENT = -1.7976931348623157e308
"""Stands for what is None or a tensor among numbers. Not NaN, which a coefficient may become."""


def pack(*scalars: float | Tensor | None) -> tuple[list[float], list[Tensor | None]]:
    """Numbers and 0-d tensors as a schema can hold them."""
    numbers = [ABSENT if x is None or isinstance(x, Tensor) else float(x) for x in scalars]
    return numbers, [x if isinstance(x, Tensor) else None for x in scalars]


def unpack(
    numbers: Sequence[float], tensors: Sequence[Tensor | None]
) -> list[float | Tensor | None]:
    """Undo `pack`; the numbers come back as floats, which `_launch.number` reads."""
    return [
        tensor if tensor is not None else None if number == ABSENT else number
        for number, tensor in zip(numbers, tensors, strict=True)
    ]
