"""Categorical policies for `ppo_loss_from_logits`: log-probs, entropies and d loss / d logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.functional._surrogate import Surrogate, surrogate
from ppo_fast.functional._terms import Rows, Scalar, Terms, plus, row_ent_coef

ILLEGAL = -1e9
"""Stands for log 0. Finite, so that probability 0 times it is 0 and not NaN."""

FEATURE_MAJOR_BELOW = 64
"""Heads smaller than this are laid out [A, M]: on a CPU, reductions over a short last dimension are
5 to 15 times slower than over the first (log_softmax of 4096 x 4: 196 us against 13)."""

BLOCK_ELEMENTS = 1 << 19
"""A block of rows holds at most so many logits (2 MiB in fp32), so that its temporaries stay in the
cache; fresh memory as large as the logits costs more than the arithmetic."""


class Policy(NamedTuple):
    """Checked arguments: `logits`, `action_mask` [M, A], `actions` [M, heads]."""

    logits: Tensor
    actions: Tensor
    action_mask: Tensor | None
    head_sizes: tuple[int, ...]
    temperature: Scalar


class Head(NamedTuple):
    """One distribution a row; matrices keep the layout of the logits, [A, M] or [M, A]."""

    probs: Tensor
    probs_log_probs: Tensor
    """p log p, whose sum is minus the entropy."""
    taken: Tensor
    """The action taken, [1, M] or [M, 1]."""
    log_probs: Tensor
    """[M], of the actions taken."""
    neg_entropy: Tensor
    """[M]."""


def check(
    op: str,
    logits: Tensor,
    actions: Tensor,
    head_sizes: tuple[int, ...] | None,
    action_mask: Tensor | None,
    temperature: Scalar,
) -> Policy:
    if logits.ndim == 0:
        raise ValueError(f"{op}: logits is 0-d; expected [..., A]")
    size = logits.shape[-1]
    leading = logits.shape[:-1]
    expected = leading if head_sizes is None else (*leading, len(head_sizes))
    if actions.shape != expected:
        raise ValueError(
            f"{op}: actions is {list(actions.shape)}; expected {list(expected)} for logits "
            f"{list(logits.shape)} and head_sizes {head_sizes}"
        )
    if actions.is_floating_point() or actions.is_complex() or actions.dtype == torch.bool:
        raise ValueError(f"{op}: actions is {actions.dtype}; expected integers, use actions.long()")
    if head_sizes is not None and (sum(head_sizes) != size or min(head_sizes, default=0) < 1):
        raise ValueError(
            f"{op}: head_sizes is {tuple(head_sizes)}, logits {list(logits.shape)}; expected "
            f"positive sizes that add up to {size}"
        )
    if action_mask is not None:
        if action_mask.dtype != torch.bool:
            raise ValueError(
                f"{op}: action_mask is {action_mask.dtype}; expected torch.bool, True where legal"
            )
        if action_mask.shape != logits.shape:
            raise ValueError(
                f"{op}: action_mask is {list(action_mask.shape)}; expected the shape of the "
                f"logits, {list(logits.shape)}"
            )
        action_mask = action_mask.reshape(-1, size)
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"{op}: temperature is {temperature}; expected a number > 0")
    sizes = (size,) if head_sizes is None else tuple(head_sizes)
    return Policy(
        logits if logits.ndim == 2 else logits.reshape(-1, size),
        actions.reshape(-1, len(sizes)).to(torch.int64),
        action_mask,
        sizes,
        temperature,
    )


def sweep(
    policy: Policy, rows: Rows, t: Terms, dtype: torch.dtype, wants_gradient: bool
) -> tuple[Surrogate, Tensor | None]:
    """The loss's terms and, if wanted, n d loss / d logits in their dtype; block by block."""
    number, size = policy.logits.shape
    step = max(1, BLOCK_ELEMENTS // max(1, size))
    if number <= step:
        part, gradient = _block(policy, rows, t, dtype, wants_gradient)
        return part, gradient if gradient is None else gradient.to(policy.logits.dtype)
    whole = torch.empty_like(policy.logits) if wants_gradient else None
    parts = []
    for start in range(0, number, step):
        stop = min(start + step, number)
        block = policy._replace(
            logits=policy.logits[start:stop],
            actions=policy.actions[start:stop],
            action_mask=None if policy.action_mask is None else policy.action_mask[start:stop],
        )
        part, gradient = _block(block, rows.slice(start, stop), t, dtype, wants_gradient)
        if whole is not None and gradient is not None:
            whole[start:stop] = gradient
        parts.append(part)
    return _combine(parts), whole


def _combine(parts: list[Surrogate]) -> Surrogate:
    values = [part.grad_values for part in parts if part.grad_values is not None]
    return Surrogate(
        sums=torch.stack([part.sums for part in parts]).sum(0),
        ratio_deviation=torch.cat([part.ratio_deviation for part in parts]).amax(0, keepdim=True),
        grad_log_probs=torch.cat([part.grad_log_probs for part in parts]),
        grad_values=torch.cat(values) if values else None,
    )


def _block(
    policy: Policy, rows: Rows, t: Terms, dtype: torch.dtype, wants_gradient: bool
) -> tuple[Surrogate, Tensor | None]:
    dim = 0 if max(policy.head_sizes) < FEATURE_MAJOR_BELOW else 1
    logits = _lay_out(policy, rows.drop, dtype, dim)
    actions = policy.actions if dim == 1 else policy.actions.t()
    if rows.drop is not None:
        actions = actions.masked_fill(rows.drop.unsqueeze(dim), 0)
    if len(policy.head_sizes) == 1:
        heads = [_head(logits, actions, dim)]
    else:
        parts = zip(logits.split(policy.head_sizes, dim), actions.split(1, dim), strict=True)
        heads = [_head(*part, dim) for part in parts]
    log_probs, neg_entropy = heads[0].log_probs, heads[0].neg_entropy
    for head in heads[1:]:
        log_probs = log_probs + head.log_probs
        neg_entropy = neg_entropy + head.neg_entropy
    part = surrogate(log_probs, -neg_entropy, rows, t)
    if not wants_gradient:
        return part, None
    grad_log_probs, ent_coef = part.grad_log_probs, row_ent_coef(rows, t)
    if isinstance(policy.temperature, Tensor) or policy.temperature != 1.0:
        grad_log_probs, ent_coef = (
            grad_log_probs / policy.temperature,
            ent_coef / policy.temperature,
        )
    gradients = [_head_gradient(head, grad_log_probs, ent_coef, dim) for head in heads]
    gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients, dim)
    return part, gradient.t() if dim == 0 else gradient


def _lay_out(policy: Policy, drop: Tensor | None, dtype: torch.dtype, dim: int) -> Tensor:
    """Logits over temperature, [A, M] or [M, A]: -inf where illegal, 0 in masked rows."""
    logits, action_mask = policy.logits, policy.action_mask
    if logits.dtype is not dtype:
        logits = logits.to(dtype)
    if dim == 0:
        logits = logits.t().contiguous()
        action_mask = None if action_mask is None else action_mask.t()
    if isinstance(policy.temperature, Tensor) or policy.temperature != 1.0:
        logits = logits / policy.temperature
    if action_mask is not None:
        logits = logits.masked_fill(~action_mask, -torch.inf)
    return logits if drop is None else logits.masked_fill(drop.unsqueeze(dim), 0.0)


def _head(logits: Tensor, taken: Tensor, dim: int) -> Head:
    """Evaluate one head; `dim` is the dimension of `logits` that runs over actions.

    `taken` is [1, M] or [M, 1], as `dim` is 0 or 1.
    """
    log_probs = torch.log_softmax(logits, dim)
    # By the logits, not by what came out: a row of -inf alone comes out as NaN.
    log_probs.masked_fill_(torch.isneginf(logits), ILLEGAL)
    probs = log_probs.exp()
    probs_log_probs = probs * log_probs
    of_taken = log_probs.gather(dim, taken).squeeze(dim)
    return Head(probs, probs_log_probs, taken, of_taken, probs_log_probs.sum(dim))


def _head_gradient(head: Head, grad_log_probs: Tensor, ent_coef: Scalar, dim: int) -> Tensor:
    """Derivative of `sum(grad_log_probs log p(action) - ent_coef H)` by the logits; consumes `head`.

    With g the row's `grad_log_probs` and c its `ent_coef` (a number, 0-d or [M]):
    d_j = g (1[j = action] - p_j) + c p_j (log p_j + H).
    """
    if isinstance(ent_coef, Tensor) or ent_coef:
        pull = plus(grad_log_probs, head.neg_entropy, ent_coef)
        if isinstance(ent_coef, Tensor) and ent_coef.ndim:
            ent_coef = ent_coef.unsqueeze(dim)
        gradient = head.probs_log_probs.mul_(ent_coef)
        gradient.addcmul_(head.probs, pull.unsqueeze(dim), value=-1)
    else:
        gradient = head.probs.mul_(grad_log_probs.neg().unsqueeze(dim))
    return gradient.scatter_add_(dim, head.taken, grad_log_probs.unsqueeze(dim))
