"""Draw from a categorical policy and report log-probability and entropy from the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.dispatch import accelerated
from ppo_fast.functional._rows import (
    Blocks,
    check_logits,
    check_mask,
    check_temperature,
    compute_dtype,
    concatenated,
    may_ask,
    shifted,
    softmax_stats,
)
from ppo_fast.results import Sample

SEGMENT = 512
"""Columns summed as one before the search: two short cumulative sums instead of one of length V."""


def _validate(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    uniform: Tensor | None = None,
) -> None:
    name = "sample_from_logits"
    check_logits(name, logits)
    if logits.dim() != 2:
        raise ValueError(
            f"{name}: logits are {list(logits.shape)}; expected [M, V], "
            "use logits.flatten(0, -2) and reshape the results"
        )
    check_mask(name, mask, logits.shape[:1])
    if uniform is not None:
        _check_uniform(name, logits, generator, uniform)
    with torch.no_grad():
        check_temperature(name, temperature)


def _check_uniform(
    name: str, logits: Tensor, generator: torch.Generator | None, uniform: Tensor
) -> None:
    if generator is not None:
        raise ValueError(
            f"{name}: both generator and uniform are given; expected one source of random numbers, "
            "drop the other"
        )
    rows = logits.shape[0]
    if uniform.dtype is not torch.float64 or uniform.shape != (rows, 2):
        raise ValueError(
            f"{name}: uniform is {list(uniform.shape)} {uniform.dtype}; expected [{rows}, 2] "
            "torch.float64, two numbers a row of logits"
        )
    if uniform.device != logits.device:
        raise ValueError(
            f"{name}: uniform is on {uniform.device}; expected {logits.device}, where the logits are"
        )
    if may_ask(uniform) and not ((uniform >= 0) & (uniform < 1)).all():
        raise ValueError(
            f"{name}: uniform holds numbers outside [0, 1) or NaN; expected what torch.rand or "
            "numpy's Generator.random draw"
        )


@accelerated(validate=_validate)
@torch.no_grad()
def sample_from_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Sample:
    """Draw one index per row from softmax(logits / temperature).

    Inverse transform in two steps: one uniform number picks a segment of 512 columns by its mass, a
    second one the column inside it, both by float64 cumulative sums. Two random numbers a row then
    serve any V, where Gumbel noise takes V. A logit of -inf is never drawn.

    Nothing is differentiated: `log_probs_from_logits` at the drawn actions gives the same
    log-probabilities with gradient.

    Args:
        logits: [M, V] floating point; leading stride free, one copy if the last dimension is not
            contiguous.
        temperature: T > 0, a number or a 0-d tensor (its sign is not checked).
        generator: source of the random numbers, on the device of the logits; None is PyTorch's
            global one. The draws depend on its state and on M, not on how the work is cut up.
        mask: [M] bool; the row mask, not an action mask (which is logits of -inf). Where False
            action, log-probability and entropy are 0, and what the logits hold does not matter.
        uniform: [M, 2] float64 in [0, 1) on the device of the logits: the random numbers themselves,
            in place of a generator's. A row's draw then depends on its logits and its two numbers
            only. The first one is read where V is over 512.

    Returns:
        `Sample(actions, log_probs, entropy)`, [M] each.

    Raises:
        NotImplementedError: called under a `torch.func` transform.
        ValueError: shapes, dtypes or devices do not fit, V is 0, temperature is not a positive
            number, generator and uniform are both given; on the CPU also if uniform leaves [0, 1), or
            an unmasked row is all -inf or holds NaN or +inf. A GPU is not asked: such rows come back
            with log-probability -inf or NaN.
    """
    _validate(logits, temperature=temperature, generator=generator, mask=mask, uniform=uniform)
    name = "sample_from_logits"
    divisor = check_temperature(name, temperature)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    dtype = compute_dtype(logits)
    if uniform is None:
        # In [0, 1), so that a target stays below its total and the search inside the row. Not by
        # torch.rand: with a generator argument torch.compile cannot give it a dynamic shape.
        uniform = torch.empty(logits.shape[0], 2, dtype=torch.float64, device=logits.device)
        uniform.uniform_(generator=generator)
    parts, picked = [], []
    for own, (block,), scratch in Blocks(2, dtype, logits):
        stats, e = softmax_stats(block, dtype, divisor, True, *scratch)
        parts.append(stats)
        picked.append(_pick(e, uniform[own]))
    maximum, total, weighted = concatenated(parts)
    actions = torch.cat(picked)
    if may_ask(logits):
        _check_rows(name, total, mask)

    total = total.clamp(min=1.0)
    log_total = total.log()
    target = shifted(logits.gather(1, actions).to(dtype), maximum, divisor, None)
    results = [actions, target - log_total, log_total - weighted / total]
    if mask is not None:
        hidden = ~mask.unsqueeze(1)
        results = [result.masked_fill_(hidden, 0) for result in results]
    return Sample(*(result.squeeze(1) for result in results))


def _pick(e: Tensor, uniform: Tensor) -> Tensor:
    """Draw a column per row in proportion to e, [R, V] >= 0, from two uniforms; [R, 1] int64."""
    width = e.shape[1]
    if width <= SEGMENT:
        return _search(e, uniform[:, 1:])
    whole = width // SEGMENT * SEGMENT
    mass = e[:, :whole].unflatten(1, (-1, SEGMENT)).sum(-1)
    if whole < width:
        mass = torch.cat([mass, e[:, whole:].sum(-1, keepdim=True)], 1)
    start = _search(mass, uniform[:, :1]) * SEGMENT
    columns = start + torch.arange(SEGMENT, device=e.device)
    inside = e.gather(1, columns.clamp(max=width - 1)).masked_fill_(columns >= width, 0.0)
    # The bound matters to rows without a distribution only.
    return (start + _search(inside, uniform[:, 1:])).clamp_(max=width - 1)


def _search(weights: Tensor, uniform: Tensor) -> Tensor:
    """First column whose cumulative weight exceeds uniform x total: its own weight is not 0."""
    cumulative = weights.cumsum(1, dtype=torch.float64)
    target = uniform * cumulative[:, -1:]
    # A row without a distribution has the search run off its end.
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[1] - 1)


def _check_rows(name: str, total: Tensor, mask: Tensor | None) -> None:
    bad = ~(total.squeeze(1) >= 1.0)
    if mask is not None:
        bad &= mask
    if bad.any():
        row = int(bad.int().argmax())
        what = "is all -inf" if total[row] == 0 else "holds NaN or +inf"
        raise ValueError(
            f"{name}: row {row} of the logits {what}, so there is nothing to draw from; "
            "leave one action legal or mask the row"
        )
