"""What the tests of every kernel share: a call of an op, and how a kernel's answer is judged.

Each `cases_<file>.py` beside this lists calls of the ops of one kernel file by name. They are what
the kernel is held against its reference on, what opcheck and the graph tests run, and what each
mutant of the kernel has to fail on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.dispatch import Accelerated, _map_tensors, _tensors, backend


class Call(NamedTuple):
    """One call of an op."""

    op: Accelerated
    args: tuple
    kwargs: dict[str, Any]


Case = Callable[[], Call]
"""Makes its tensors on the current default device, from torch's global generator."""


class Mutant(NamedTuple):
    """A kernel with a fault: the text `old` of a file of kernels/ replaced by `new`."""

    file: str
    old: str
    new: str
    case: str
    """The case that has to fail under it."""


class Budget(NamedTuple):
    """What one kernel of a case may cost on sm_90; see `benchmarks/aot.py`. None: not promised."""

    case: str
    kernel: str
    """The @triton.jit function's name."""
    registers: int
    wide_loads: bool = False
    """Whether LDG.E.128 must be there."""
    quiet_loop: bool = False
    """Whether the hot loop must have neither barrier nor shuffle."""
    elements: int = 0
    """Elements a thread handles in one turn of the hot loop."""
    instructions: float | None = None
    """Instructions per element in the hot loop, at most."""
    tensor_cores: bool = False
    """Whether products must be on tensor cores, at most every second one waited for."""


def run(call: Call, name: str) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and gradients of a fixed mix of them, from the kernel ("triton") or the reference."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        new = tensor.detach().requires_grad_(tensor.requires_grad)
        if new.requires_grad:
            leaves.append(new)
        return new

    with backend(name):
        result = call.op(*_map_tensors(call.args, leaf), **_map_tensors(call.kwargs, leaf))
    outputs = list(_tensors(result))
    roots = [x for x in outputs if x.requires_grad]
    gradients: list[Tensor | None] = [None] * len(leaves)
    if roots and leaves:
        mix = [torch.cos(torch.arange(x.numel()) + 0.5).reshape(x.shape).to(x.dtype) for x in roots]
        gradients = list(torch.autograd.grad(roots, leaves, mix, allow_unused=True))
    return [x.detach() for x in outputs], gradients


def to_float64(call: Call) -> Call:
    """The same call with every floating tensor in float64."""

    def widen(x: Tensor) -> Tensor:
        wide = x.detach().double() if x.is_floating_point() else x
        return wide.requires_grad_(x.requires_grad) if x.requires_grad else wide

    return call._replace(
        args=_map_tensors(call.args, widen), kwargs=_map_tensors(call.kwargs, widen)
    )


def assert_agrees(call: Call) -> None:
    """Kernel and reference give the same outputs and gradients, dtypes and shapes."""
    with backend("check"):
        call.op(*call.args, **call.kwargs)


def assert_as_exact_as_torch(call: Call, floor: float = 2e-6) -> None:
    """The kernel's error against float64 is at most twice the reference's in the inputs' dtype.

    Errors are the largest of a tensor, relative to its largest entry; `floor` is added.
    """
    truth, eager, ours = (
        run(to_float64(call), "reference"),
        run(call, "reference"),
        run(call, "triton"),
    )
    rows = ((*outputs, *gradients) for outputs, gradients in (truth, eager, ours))
    for exact, theirs, mine in zip(*rows, strict=True):
        if exact is None or not exact.is_floating_point() or not exact.numel():
            continue
        finite = exact.isfinite()
        assert torch.equal(finite, mine.isfinite())
        exact = exact[finite]
        scale = float(exact.abs().max()) if exact.numel() else 0.0
        if scale == 0.0:
            assert not mine[finite].any()
            continue
        error = float((mine[finite].double() - exact).abs().max()) / scale
        eager_error = float((theirs[finite].double() - exact).abs().max()) / scale
        assert error <= 2 * eager_error + floor, (error, eager_error)
