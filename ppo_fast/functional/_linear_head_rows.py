"""The head by whole rows of logits: on a GPU, where a kernel reads a row at once.

A chunk of rows at a time goes through the library's matrix product and `log_probs_from_logits`,
whose backward leaves the gradient in the logits' place; two more products carry it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppo_fast.dispatch import current_backend
from ppo_fast.functional._linear_head import Job, Sinks, Upstream
from ppo_fast.functional.log_probs import log_probs_from_logits

ROUND = 128
"""Rows of a chunk are a multiple of the products' tiles, where they are more than one."""

CAST_COLUMNS = 8192
"""Logits' gradients are cast to the products' dtype so many columns at a time."""


class _Opened(torch.autograd.Function):
    """A buffer as an intermediate of a graph: forward(anchor, buffer), the anchor requiring grad."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise AssertionError("only the gradient by the buffer is asked for")


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b accumulated, and returned, in float32 at least."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    exact = torch.mm(a, b, out_dtype=torch.float32)
    return exact if out is None else out.copy_(exact)


class _Chunk:
    """Some rows of a job: their logits and what is multiplied with them."""

    def __init__(self, job: Job, own: slice, logits: Tensor, cap_gradient: Tensor | None) -> None:
        self.job, self.own = job, own
        self.mask = None if job.mask is None else job.mask[own]
        self.hidden = job.hidden[own]
        self.taken = job.taken[own]
        if self.mask is not None:
            self.hidden = self.hidden.masked_fill(~self.mask.unsqueeze(1), 0.0)
        self.logits, self.cap_gradient = logits, cap_gradient
        head = job.head
        for columns in self._columns():
            part = logits[:, columns]
            product(self.hidden, self._weight(columns).t(), out=part)
        if head.bias is not None:
            logits.add_(head.bias)
        if head.scale != 1.0:
            logits.mul_(head.scale)
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_()
            if cap_gradient is not None:
                torch.mul(logits, logits, out=cap_gradient).neg_().add_(1.0)
            logits.mul_(head.softcap)

    def _columns(self) -> Iterator[slice]:
        """The vocabulary, in parts where a cast has to be made."""
        weight, dtype = self.job.head.weight, self.job.hidden.dtype
        whole = weight.dtype is dtype and dtype is self.job.dtype
        step = weight.shape[0] if whole else CAST_COLUMNS
        for start in range(0, weight.shape[0], step):
            yield slice(start, min(start + step, weight.shape[0]))

    def _weight(self, columns: slice) -> Tensor:
        return self.job.head.weight[columns].to(self.hidden.dtype)

    def log_probs(self, with_entropy: bool, graph: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The logits as a tensor with or without a graph; their log-probs (and entropies)."""
        with torch.set_grad_enabled(graph):
            x = self.logits
            if graph:
                x = _Opened.apply(x.new_zeros((), requires_grad=True), x)
            options: dict[str, Any] = {
                "temperature": self.job.head.temperature,
                "mask": self.mask,
                # The backend "check" runs the op twice.
                "inplace_backward": graph and current_backend() != "check",
            }
            if with_entropy:
                return x, log_probs_from_logits(x, self.taken, with_entropy=True, **options)
            return x, (log_probs_from_logits(x, self.taken, **options),)

    def carry_on(self, gradient: Tensor, sinks: Sinks) -> None:
        """Multiply the gradient by the logits with the weights and the hidden states."""
        head, dtype = self.job.head, self.hidden.dtype
        factor = head.scale * sinks.scale
        if self.cap_gradient is not None:
            gradient.mul_(self.cap_gradient)
        grad_hidden = None
        for columns in self._columns():
            d = gradient[:, columns]
            if sinks.bias is not None:
                sinks.bias[columns] += d.sum(0) * factor
            d = d.to(dtype)
            if sinks.hidden is not None:
                part = product(d, self._weight(columns))
                grad_hidden = part if grad_hidden is None else grad_hidden.add_(part)
            if sinks.weight is not None:
                into = sinks.weight[columns]
                if dtype is into.dtype and dtype is self.job.dtype:
                    beta = 0.0 if sinks.fresh and self.own.start == 0 else 1.0
                    into.addmm_(d.t(), self.hidden * factor, beta=beta)
                else:
                    part = product(d.t(), self.hidden).mul_(factor)
                    into.copy_(part) if sinks.fresh and self.own.start == 0 else into.add_(part)
        if grad_hidden is not None:
            assert sinks.hidden is not None
            grad_hidden.mul_(factor)
            if self.mask is not None:
                grad_hidden.masked_fill_(~self.mask.unsqueeze(1), 0.0)
            sinks.hidden[self.own] = grad_hidden


def _chunks(job: Job, with_gradient: bool) -> Iterator[_Chunk]:
    vocabulary = job.head.weight.shape[0]
    with_factor = with_gradient and job.head.softcap is not None
    buffers = 1 + with_factor
    itemsize = torch.empty(0, dtype=job.dtype).element_size()
    rows = max(1, job.workspace // (buffers * itemsize * vocabulary))
    rows = min(rows, max(1, job.number))
    if rows < job.number and rows > ROUND:
        rows -= rows % ROUND
    memory = job.hidden.new_empty((buffers, rows, vocabulary), dtype=job.dtype)
    for start in range(0, job.number, rows):
        own = slice(start, min(start + rows, job.number))
        part = memory[:, : own.stop - own.start]
        yield _Chunk(job, own, part[0], part[1] if with_factor else None)


def forward(job: Job, with_entropy: bool) -> tuple[Tensor, ...]:
    """Log-probs [M], and entropies if asked for."""
    parts = [chunk.log_probs(with_entropy, graph=False)[1] for chunk in _chunks(job, False)]
    if not parts:
        return tuple(job.hidden.new_zeros(1 + with_entropy, 0, dtype=job.dtype).unbind())
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _propagate(
    chunk: _Chunk,
    x: Tensor,
    outputs: tuple[Tensor, ...],
    upstream: tuple[Tensor | None, Tensor | None],
    sinks: Sinks,
) -> None:
    pairs = [(out, up) for out, up in zip(outputs, upstream, strict=False) if up is not None]
    roots, given = zip(*pairs, strict=True)
    (gradient,) = torch.autograd.grad(roots, x, given)
    chunk.carry_on(gradient, sinks)


def backward(job: Job, g: Tensor | None, h: Tensor | None, sinks: Sinks) -> None:
    """Add the gradients of upstream g, h [M] into the sinks."""
    for chunk in _chunks(job, True):
        x, outputs = chunk.log_probs(h is not None, graph=True)
        own = chunk.own
        upstream = (None if g is None else g[own], None if h is None else h[own])
        _propagate(chunk, x, outputs, upstream, sinks)


def fused(job: Job, upstream: Upstream, sinks: Sinks) -> None:
    """Log-probs and entropies of all rows, handed to `upstream`; the gradient of what it makes."""
    for chunk in _chunks(job, True):
        x, outputs = chunk.log_probs(True, graph=True)
        found = upstream(chunk.own, outputs[0].detach(), outputs[1].detach())
        _propagate(chunk, x, outputs, found, sinks)
