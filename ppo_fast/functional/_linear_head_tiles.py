"""The head on a CPU: tiles of logits that never leave the cache.

Rows are taken some hundreds at a time, enough for products to run at full speed, and the vocabulary
a tile at a time. A first sweep over the tiles reduces each row to its softmax's maximum, sum and mean
as they grow; a second one, with these known, turns each tile into its gradient and multiplies that
with the weights and the hidden states at once. A tile is multiplied out anew in the second sweep,
unless there is memory to keep it: a fourth product from the cache costs less than three through
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ppo_fast.functional._linear_head import Job, Sinks, Upstream
from ppo_fast.functional._rows import LOWEST, shifted

R = TypeVar("R")

ROWS = 512
"""A product reads all weights: below 256 rows that shows (128 rows: a fifth slower, 64: a half)."""

TILE_ELEMENTS = 1 << 19
"""2 MiB of fp32, a core's L2 cache."""

NARROWEST_TILE, WIDEST_TILE = 256, 4096

TILES_OF_A_THREAD = 4
"""A thread is started for no fewer."""

KEPT_SHARE = 0.25
"""Of all rows' logits, at most this much is kept: with the gradients, a third of what autograd holds."""


class RowStats(NamedTuple):
    """What the gradient of rows needs of them; [K, 1] each, as in `log_probs._Rows`."""

    maximum: Tensor
    total: Tensor
    mean: Tensor
    """Sum of p t, with t = (x - maximum) / T; 0 where the entropy was not asked for."""
    target: Tensor
    """The logit at the index."""

    def slice(self, own: slice) -> RowStats:
        """Some of the rows, as views."""
        return RowStats._make(row[own] for row in self)

    def log_probs(self, divisor: float | Tensor | None) -> Tensor:
        """Of the indices, [K]."""
        t = shifted(self.target, self.maximum, divisor, None)
        return t.sub_(self.total.log()).squeeze(1)

    def entropy(self) -> Tensor:
        """In nats, [K]."""
        return self.total.log().sub_(self.mean).squeeze(1)


class _Tile(NamedTuple):
    number: int
    columns: slice
    weight: Tensor
    """[columns, D] in the arithmetic's dtype"""
    bias: Tensor | None
    rows: Tensor
    """Rows of the chunk whose index falls in this tile"""
    at: Tensor
    """and where in it."""


class _Worker:
    """A thread's share of the vocabulary, every n-th tile, and its scratch memory."""

    def __init__(self, sweep: Sweep, first: int) -> None:
        job = sweep.job
        self.sweep, self.first = sweep, first
        like = job.hidden.new_empty(0, dtype=job.dtype)
        self._buffers = like.new_empty(3, sweep.rows * sweep.width)
        self._weight = like
        if job.head.weight.dtype is not job.dtype:
            self._weight = like.new_empty(sweep.width, job.head.weight.shape[1])

    def tiles(self, chunk: _Chunk) -> Iterator[_Tile]:
        sweep, head = self.sweep, self.sweep.job.head
        for number in range(self.first, sweep.tiles, sweep.threads):
            start = number * sweep.width
            columns = slice(start, min(start + sweep.width, sweep.vocabulary))
            weight = head.weight[columns]
            if weight.dtype is not sweep.job.dtype:
                weight = self._weight[: len(weight)].copy_(weight)
            bias = None
            if head.bias is not None:
                bias = head.bias[columns].to(sweep.job.dtype) * head.scale
            here = slice(chunk.bounds[number], chunk.bounds[number + 1])
            yield _Tile(number, columns, weight, bias, chunk.order[here], chunk.index[here] - start)

    def buffer(self, number: int, rows: int, columns: slice) -> Tensor:
        """One of three tiles of scratch."""
        width = columns.stop - columns.start
        return self._buffers[number, : rows * width].view(rows, width)


class _Chunk:
    """Some rows of a job."""

    def __init__(self, sweep: Sweep, own: slice) -> None:
        job = sweep.job
        self.sweep, self.own = sweep, own
        self.rows = own if job.chosen is None else job.chosen[own]
        hidden = job.hidden[self.rows].to(job.dtype)
        # Scaling hidden states rather than logits scales the weight's gradient along with them.
        self.hidden = hidden if job.head.scale == 1.0 else hidden * job.head.scale
        self.size = len(hidden)
        self.index, self.order = job.taken[self.rows].sort()
        edges = torch.arange(0, sweep.vocabulary + sweep.width, sweep.width)
        self.bounds = torch.searchsorted(self.index, edges).tolist()

    def logits(self, tile: _Tile, out: Tensor) -> Tensor:
        """The tile's logits, written to `out`."""
        if tile.bias is None:
            torch.mm(self.hidden, tile.weight.t(), out=out)
        else:
            torch.addmm(tile.bias, self.hidden, tile.weight.t(), out=out)
        cap = self.sweep.job.head.softcap
        return out if cap is None else out.div_(cap).tanh_().mul_(cap)


class Sweep:
    """Sizes, memory and threads for the chunks of a job.

    Threads share the vocabulary and meet twice a chunk. Inside each operation, as torch does it, they
    would meet some thousand times, each time waiting for one that another process holds up.

    Args:
        job: what to work on.
        keep: whether logits of the first sweep are wanted again.
    """

    def __init__(self, job: Job, keep: bool = False) -> None:
        self.job = job
        self.vocabulary = job.head.weight.shape[0]
        chunks = max(1, math.ceil(job.number / ROWS))
        self.rows = max(1, math.ceil(job.number / chunks))
        self.width = min(
            max(TILE_ELEMENTS // self.rows, NARROWEST_TILE), WIDEST_TILE, self.vocabulary
        )
        self.tiles = math.ceil(self.vocabulary / self.width)
        self.threads = max(1, min(torch.get_num_threads(), self.tiles // TILES_OF_A_THREAD))
        itemsize = torch.empty(0, dtype=job.dtype).element_size()
        tile_bytes = itemsize * self.rows * self.width
        self.kept = 0
        if keep:
            all_logits = itemsize * job.number * self.vocabulary
            spare = job.workspace - 3 * self.threads * tile_bytes
            budget = min(spare, int(KEPT_SHARE * all_logits))
            self.kept = min(max(0, budget // tile_bytes), self.tiles)
        shape = (self.kept, self.rows * self.width)
        self._kept = job.hidden.new_empty(shape, dtype=job.dtype)
        self._workers = [_Worker(self, first) for first in range(self.threads)]

    def __iter__(self) -> Iterator[_Chunk]:
        for start in range(0, self.job.number, self.rows):
            yield _Chunk(self, slice(start, min(start + self.rows, self.job.number)))

    def kept_tile(self, number: int, rows: int, columns: slice) -> Tensor | None:
        """Memory of a tile that is kept between the sweeps, or None."""
        if number >= self.kept:
            return None
        width = columns.stop - columns.start
        return self._kept[number, : rows * width].view(rows, width)

    def shared(self, function: Callable[[_Worker], R]) -> list[R]:
        """Run `function` for every worker at once."""
        if self.threads == 1:
            return [function(self._workers[0])]
        inference = torch.is_inference_mode_enabled()

        def alone(worker: _Worker) -> R:
            torch.set_num_threads(1)
            # Modes are a thread's own.
            with torch.inference_mode(inference), torch.no_grad():
                return function(worker)

        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.threads - 1) as pool:
                others = [pool.submit(alone, worker) for worker in self._workers[1:]]
                return [alone(self._workers[0]), *(other.result() for other in others)]
        finally:
            torch.set_num_threads(threads)


def _stats(chunk: _Chunk, with_entropy: bool) -> RowStats:
    """Reduce the rows of a chunk."""
    parts = chunk.sweep.shared(lambda worker: _partial_stats(chunk, worker, with_entropy))
    return merged(parts, chunk.sweep.job.head.divisor)


def merged(parts: Sequence[RowStats], divisor: float | Tensor | None) -> RowStats:
    """The stats of rows from those of shares of the vocabulary, whose `mean` is yet a sum of e t."""
    maximum, total, weighted, target = parts[0]
    for other in parts[1:]:
        larger = torch.maximum(maximum, other.maximum)
        moved = []
        for top, ones, sums in ((maximum, total, weighted), other[:3]):
            decay = shifted(top, larger, divisor, None).clamp_(min=LOWEST)
            factor = decay.exp()
            moved.append((ones * factor, (sums + decay * ones) * factor))
        maximum = larger
        total, weighted = moved[0][0] + moved[1][0], moved[0][1] + moved[1][1]
        target = target + other.target  # 0 where the index is another's
    # Only a row all -inf is below 1; with 1 it needs no case of its own from here on.
    total = total.clamp(min=1.0)
    return RowStats(maximum, total, weighted / total, target)


def _partial_stats(chunk: _Chunk, worker: _Worker, with_entropy: bool) -> RowStats:
    """Of a worker's tiles: sums move along whenever the maximum does; `mean` is not yet divided."""
    sweep, divisor = chunk.sweep, chunk.sweep.job.head.divisor
    zeros = chunk.hidden.new_zeros(chunk.size, 1)
    maximum = zeros + torch.finfo(zeros.dtype).min
    total, weighted, target = zeros, zeros, zeros.clone()
    for tile in worker.tiles(chunk):
        own = chunk.size, tile.columns
        kept = sweep.kept_tile(tile.number, *own)
        x = chunk.logits(tile, worker.buffer(0, *own) if kept is None else kept)
        target[tile.rows, 0] = x[tile.rows, tile.at]
        larger = torch.maximum(maximum, x.amax(1, keepdim=True))
        decay = shifted(maximum, larger, divisor, None).clamp_(min=LOWEST)
        factor, maximum = decay.exp(), larger
        t = shifted(x, maximum, divisor, worker.buffer(0, *own))
        if with_entropy:
            e = torch.exp(t.clamp_(min=LOWEST), out=worker.buffer(1, *own))
            weighted = decay.mul_(total).add_(weighted).mul_(factor)
            weighted += t.mul_(e).sum(1, keepdim=True)
            t = e
        else:
            t.exp_()
        total = factor.mul_(total).add_(t.sum(1, keepdim=True))
    return RowStats(maximum, total, weighted, target)


class _Slopes(NamedTuple):
    """The gradient by a logit: e (offset + slope t), plus g at the index; [K, 1] each."""

    g: Tensor | None
    slope: Tensor | None
    offset: Tensor
    unread: Tensor | None
    """Rows to be 0 whatever they hold."""


def _slopes(
    stats: RowStats, divisor: float | Tensor | None, g: Tensor | None, h: Tensor | None
) -> _Slopes:
    total = stats.total
    slope, offset, active = None, torch.zeros_like(total), torch.zeros_like(total, dtype=torch.bool)
    if g is not None:
        g = g.unsqueeze(1).masked_fill(stats.target == -math.inf, 0.0)
        g = g if divisor is None else g / divisor
        offset, active = -g / total, g != 0
    if h is not None:
        h = h.unsqueeze(1)
        h = h if divisor is None else h / divisor
        slope = -h / total
        offset, active = offset - slope * stats.mean, active | (h != 0)
    # A row without upstream gradient comes out 0 by itself, unless it is NaN.
    return _Slopes(g, slope, offset, ~active if bool(total.isnan().any()) else None)


def _gradient(
    chunk: _Chunk, stats: RowStats, g: Tensor | None, h: Tensor | None, sinks: Sinks
) -> None:
    """Add what upstream gradients g of the log-probs and h of the entropies, [K], come to."""
    head = chunk.sweep.job.head
    slopes = _slopes(stats, head.divisor, g, h)
    hidden = chunk.hidden
    if sinks.weight is not None and not _is_one(sinks.scale):
        hidden = hidden * sinks.scale
    parts = chunk.sweep.shared(
        lambda worker: _partial_gradient(chunk, worker, stats.maximum, slopes, hidden, sinks)
    )
    if sinks.hidden is not None:
        whole = parts[0]
        for part in parts[1:]:
            assert whole is not None
            assert part is not None
            whole += part
        assert whole is not None
        sinks.hidden[chunk.rows] = whole.mul_(head.scale).mul_(sinks.scale)


def _partial_gradient(
    chunk: _Chunk,
    worker: _Worker,
    maximum: Tensor,
    slopes: _Slopes,
    hidden: Tensor,
    sinks: Sinks,
) -> Tensor | None:
    """Of a worker's tiles; returns their part of the hidden states' gradient."""
    sweep, head = chunk.sweep, chunk.sweep.job.head
    g, slope, offset, unread = slopes
    grad_hidden = None if sinks.hidden is None else torch.zeros_like(chunk.hidden)
    beta = 0.0 if sinks.fresh and chunk.own.start == 0 else 1.0
    for tile in worker.tiles(chunk):
        own = chunk.size, tile.columns
        x = sweep.kept_tile(tile.number, *own)
        if x is None:
            x = chunk.logits(tile, worker.buffer(0, *own))
        uncapped = None
        if head.softcap is not None:
            uncapped = torch.div(x, head.softcap, out=worker.buffer(2, *own))
            uncapped.square_().neg_().add_(1.0)
        t = shifted(x, maximum, head.divisor, x)
        if slope is None:
            d = t.exp_().mul_(offset)
        else:
            d = torch.exp(t.clamp_(min=LOWEST), out=worker.buffer(1, *own))
            d.mul_(t.mul_(slope).add_(offset))
        if g is not None:
            d[tile.rows, tile.at] += g[tile.rows, 0]
        if uncapped is not None:
            d.mul_(uncapped)
        if unread is not None:
            d.masked_fill_(unread, 0.0)
        if grad_hidden is not None:
            grad_hidden.addmm_(d, tile.weight)
        if sinks.weight is not None:
            into = sinks.weight[tile.columns]
            if into.dtype is d.dtype:
                into.addmm_(d.t(), hidden, beta=beta)
            else:
                into.add_(d.t() @ hidden)
        if sinks.bias is not None:
            sinks.bias[tile.columns] += d.sum(0).mul_(head.scale).mul_(sinks.scale)
    return grad_hidden


def _is_one(scale: float | Tensor) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0


def forward(job: Job, with_entropy: bool) -> RowStats:
    """The stats of all rows of a job."""
    parts = [_stats(chunk, with_entropy) for chunk in Sweep(job)]
    if not parts:
        return RowStats._make(job.hidden.new_zeros(4, 0, 1, dtype=job.dtype))
    return parts[0] if len(parts) == 1 else RowStats._make(map(torch.cat, zip(*parts, strict=True)))


def backward(job: Job, stats: RowStats, g: Tensor | None, h: Tensor | None, sinks: Sinks) -> None:
    """Add the gradients of upstream g, h [K] into the sinks."""
    for chunk in Sweep(job):
        own = chunk.own
        upstream = (None if g is None else g[own], None if h is None else h[own])
        _gradient(chunk, stats.slice(own), *upstream, sinks)


def fused(job: Job, upstream: Upstream, sinks: Sinks) -> None:
    """Log-probs and entropies of all rows, handed to `upstream`; the gradient of what it makes."""
    for chunk in Sweep(job, keep=True):
        stats = _stats(chunk, with_entropy=True)
        g, h = upstream(chunk.own, stats.log_probs(job.head.divisor), stats.entropy())
        _gradient(chunk, stats, g, h, sinks)
