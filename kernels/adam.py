"""Clipping by the global norm and Adam: one launch where the sums of squares are known, else two.

Every program adds the same partial sums of squares up in the same order, so all of them find the
same norm without waiting for each other. The count of steps is what all of them read: it is changed
by the program that comes last, as a ticket tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.kernels._launch import INTERPRETED, LOG2E, launch, number
from ppo_fast.kernels._library import opaque, pack, unpack
from ppo_fast.kernels._surrogate import excess

Scalar = float | Tensor

BLOCK = 1024
"""Parameters to a program."""


@triton.jit
def square_sums_kernel(gradients, square_sums, size, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gradients + at, mask=at < size, other=0.0)
    tl.store(square_sums + program, tl.sum(x * x, 0))


@triton.jit
def _bias_correction(log_beta, step):
    """1 - beta^step: as a difference it would keep four digits of 1 - 0.999."""
    x = step * log_beta
    return -(excess(x, tl.exp2(x * LOG2E)) + x)


@triton.jit(do_not_specialize=["parts", "programs"])
def clipped_adam_kernel(
    parameters,
    gradients,
    exp_avg,
    exp_avg_sq,
    steps,
    square_sums,  # [parts]
    loss,
    veto,
    lr,
    max_grad_norm,
    complement1,  # 1 - beta1
    log_beta1,
    complement2,
    log_beta2,
    eps,
    ticket,
    result,
    size,
    parts,
    programs,
    BLOCK: tl.constexpr,
):
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        squares += tl.load(square_sums + part, mask=part < parts, other=0.0)
    norm = tl.sqrt(tl.sum(squares, 0))
    height = norm
    if loss is not None:
        height += tl.abs(tl.load(loss).to(tl.float32))
    # 0 for NaN too.
    finite = tl.where(height < float("inf"), 1.0, 0.0)
    taken = finite
    if veto is not None:
        taken = tl.where(tl.load(veto), 0.0, finite)
    step = tl.load(steps) + taken

    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(taken > 0.0, size, 0)
    g = tl.load(gradients + at, mask=inside, other=0.0)
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    p = tl.load(parameters + at, mask=inside, other=0.0)
    g *= tl.minimum(number(max_grad_norm) / (norm + 1e-6), 1.0)
    m += (g - m) * number(complement1)
    v += (g * g - v) * number(complement2)
    step_size = number(lr) / _bias_correction(number(log_beta1), step)
    scale = tl.sqrt(_bias_correction(number(log_beta2), step))
    p -= step_size * m / (tl.sqrt(v) / scale + number(eps))
    tl.store(gradients + at, g, mask=inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(parameters + at, p, mask=inside)
    if program == 0:
        tl.store(result, norm)
        tl.store(result + 1, finite)
    # All lanes have to have read the count before one of them says so.
    tl.debug_barrier()
    drawn = tl.atomic_add(ticket, 1, sem="acq_rel")
    if drawn == programs - 1:
        tl.store(steps, step)
        tl.store(ticket, 0)


def _result(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    loss: Tensor | None,
    veto: Tensor | None,
    square_sums: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    return parameters.new_empty(2, dtype=torch.float32)


@opaque(_result, mutates=("parameters", "gradients", "exp_avg", "exp_avg_sq", "steps"))
def _clipped_adam(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    loss: Tensor | None,
    veto: Tensor | None,
    square_sums: Tensor | None,
    numbers: Sequence[float],  # lr, max_grad_norm
    tensors: Sequence[Tensor | None],
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    result = parameters.new_empty(2, dtype=torch.float32)
    size = parameters.numel()
    programs = max(1, triton.cdiv(size, BLOCK))
    if square_sums is None:
        square_sums = result.new_empty(programs)
        launch(
            square_sums_kernel, (programs,), gradients, square_sums, size, BLOCK=BLOCK, num_warps=8
        )
    launch(
        clipped_adam_kernel,
        (programs,),
        *(parameters, gradients, exp_avg, exp_avg_sq, steps, square_sums, loss, veto),
        *unpack(numbers, tensors),
        *(1.0 - beta1, _log(beta1), 1.0 - beta2, _log(beta2), eps),
        *(_ticket_of(steps), result, size, square_sums.numel(), programs),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return result


_tickets: dict[tuple[torch.device, int], Tensor] = {}


def _ticket_of(steps: Tensor) -> Tensor:
    """A zero that the programs of a launch count on; the last one sets it back to 0.

    One for each count of steps: calls with the same one follow each other anyway, in a captured graph
    too, which need not fill a new one then.
    """
    if INTERPRETED or not steps.is_cuda:
        return torch.zeros(1, dtype=torch.int32, device=steps.device)
    key = steps.device, steps.data_ptr()
    ticket = _tickets.get(key)
    if ticket is None:
        ticket = torch.zeros(1, dtype=torch.int32, device=steps.device)
        if not torch.cuda.is_current_stream_capturing():
            _tickets[key] = ticket  # otherwise it is memory of the graph
    return ticket


def _log(beta: float) -> float:
    # The logarithm of 0 stands for one whose powers are all 0.
    return math.log(beta) if beta > 0.0 else -1e4


def clipped_adam_(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: Scalar,
    *,
    max_grad_norm: Scalar,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-5,
    loss: Tensor | None = None,
    veto: Tensor | None = None,
    square_sums: Tensor | None = None,
) -> Tensor:
    """See `ppo_fast.functional.adam.clipped_adam_`."""
    return _clipped_adam(
        parameters.detach(),
        gradients,
        exp_avg,
        exp_avg_sq,
        steps,
        None if loss is None else loss.detach(),
        veto,
        None if square_sums is None else square_sums.contiguous(),
        *pack(lr, max_grad_norm),
        beta1,
        beta2,
        eps,
    )


def _unsupported(parameters: Tensor, *args: object, **kwargs: object) -> str | None:
    if parameters.dtype != torch.float32:
        return f"parameters of {parameters.dtype} run on the reference"
    return None


clipped_adam_.unsupported = _unsupported  # type: ignore[attr-defined]
