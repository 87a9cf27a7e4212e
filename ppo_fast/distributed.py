"""Data parallelism by `torch.distributed`: sums over processes, nothing where there is one.

Start processes with torchrun; each takes its share of the prompts. Losses divide by counts over all
processes, so summed gradients are those of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group of more than one process is there."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Processes; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_distributed() else 0


def all_sum_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over processes."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_max_(tensor: Tensor) -> None:
    """Replace a tensor by its largest over processes, element by element."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """An error of the block in one process ends it in all; else the others would wait for ever.

    Raises:
        RuntimeError: another process failed.
    """
    try:
        yield
    except Exception:
        if is_distributed():
            all_max_(torch.ones((), device=device))
        raise
    if is_distributed():
        failed = torch.zeros((), device=device)
        all_max_(failed)
        if failed:
            raise RuntimeError("another process failed; its error says why")


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by process 0's."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def all_moments(moments: Tensor) -> Tensor:
    """[3] count, mean and sum of squared deviations of all processes' values, from each one's."""
    if not is_distributed():
        return moments
    count, mean, squares = moments.double().unbind()
    sums = torch.stack([count, count * mean])
    dist.all_reduce(sums)
    total = sums[0].clamp(min=1)
    overall = sums[1] / total
    # Around the common mean, not the difference of two large sums.
    around = squares + count * (mean - overall).square()
    dist.all_reduce(around)
    return torch.stack([sums[0], overall, around]).to(moments.dtype)
