"""From hidden states to log-probs and to the loss, a bounded number of logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.functional._terms import Terms
from ppo_fast.functional.kl import kl_from_logits
from ppo_fast.functional.liger_head import liger_log_probs
from ppo_fast.functional.linear_head import (
    WORKSPACE_MB,
    hidden_gradients,
    log_probs_from_hidden,
)
from ppo_fast.functional.log_probs import log_probs_from_logits
from ppo_fast.functional.ppo_loss import ppo_loss_from_logits
from ppo_fast.llm.models import Policy
from ppo_fast.results import PPO_STATS

KL = PPO_STATS.index("kl")
RATIO_DEVIATION = PPO_STATS.index("ratio_deviation")

CPU_MEGABYTES, GPU_MEGABYTES = 32, 512


class TokenLogProbs(NamedTuple):
    """Of response tokens; [M] float32 each."""

    log_probs: Tensor
    entropy: Tensor
    ref_log_probs: Tensor | None
    kl: Tensor | None
    """exact KL(policy || reference) over the vocabulary, if it was asked for"""


def row_blocks(hidden: Tensor, vocab_size: int, megabytes: int | None) -> Iterator[slice]:
    """Slices of the rows of `hidden` whose float32 logits take at most so many megabytes."""
    if megabytes is None:
        megabytes = CPU_MEGABYTES if hidden.device.type == "cpu" else GPU_MEGABYTES
    step = max(1, (megabytes << 20) // (4 * vocab_size))
    for start in range(0, len(hidden), step):
        yield slice(start, start + step)


@torch.no_grad()
def token_log_probs(
    policy: Policy,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    megabytes: int | None,
    reference: Policy | None = None,
    ref_hidden: Tensor | None = None,
    full_kl: bool = False,
) -> TokenLogProbs:
    """Log-probs of the targets [M] under the policy and the reference, from hidden states [M, D]."""
    if policy.fused is not None and not full_kl:
        log_probs, entropy = _fused_log_probs(policy, hidden, targets, temperature, megabytes)
        ref = None
        if reference is not None and ref_hidden is not None:
            with reference.active():
                ref, _ = _fused_log_probs(reference, ref_hidden, targets, temperature, megabytes)
        return TokenLogProbs(log_probs, entropy, ref, None)
    found: list[tuple[Tensor, ...]] = []
    for own in row_blocks(hidden, policy.vocab_size, megabytes):
        index = targets[own]
        logits = policy.logits(hidden[own])
        block: tuple[Tensor, ...] = log_probs_from_logits(
            logits, index, temperature=temperature, with_entropy=True
        )
        if reference is not None and ref_hidden is not None:
            with reference.active():
                ref_logits = reference.logits(ref_hidden[own])
            block += (log_probs_from_logits(ref_logits, index, temperature=temperature),)
            if full_kl:
                block += (kl_from_logits(logits / temperature, ref_logits / temperature),)
        found.append(block)
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    return TokenLogProbs(*columns, *[None] * (4 - len(columns)))


def _fused_log_probs(
    policy: Policy, hidden: Tensor, targets: Tensor, temperature: float, megabytes: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [M] without logits."""
    assert policy.fused is not None
    hidden, weight = _operands(policy, hidden, policy.fused.weight)
    if policy.liger:
        return liger_log_probs(hidden, weight, targets, temperature=temperature, with_entropy=True)
    with torch.autocast(hidden.device.type, enabled=False):
        return log_probs_from_hidden(
            hidden,
            weight,
            targets,
            bias=policy.fused.bias,
            temperature=temperature,
            softcap=policy.fused.softcap,
            logit_scale=policy.fused.logit_scale,
            with_entropy=True,
            workspace_mb=megabytes or WORKSPACE_MB,
        )


def _operands(policy: Policy, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the head multiplies, in one dtype: autocast's, or with head_fp32 the weight's."""
    dtype = hidden.dtype
    if policy.head_fp32:
        dtype = weight.dtype
    elif torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype)


def loss_and_grads(
    policy: Policy,
    hidden: Tensor,
    targets: Tensor,
    rows: dict[str, Tensor | None],
    values: Tensor,
    options: dict[str, Any],
    megabytes: int | None,
    reference: Policy | None = None,
    ref_hidden: Tensor | None = None,
    full_kl_coef: Tensor | float = 0.0,
) -> Tensor:
    """PPO's loss of response tokens, and the gradients of head, hidden states and values.

    Logits exist for a block of rows at a time; each block's loss is differentiated at once, so that
    none of them is alive in the backward of the trunk, which the caller runs.

    Args:
        policy: its head's gradient is added to the parameters' `grad`.
        hidden: [M, D], a leaf; its `grad` is set.
        targets: [M] int64.
        rows: further [M] arguments of `ppo_loss_from_logits` by name.
        values: [M], a leaf; its `grad` is set.
        options: its coefficients; with "normalizer".
        megabytes: most of logits at a time.
        reference, ref_hidden, full_kl_coef: for a KL over the whole vocabulary in the loss.

    Returns:
        [1 + len(PPO_STATS)] float32: the loss and its stats, sums over blocks divided by the
        normalizer.
    """
    if policy.fused is not None and reference is None:
        return _fused_loss_and_grads(policy, hidden, targets, rows, values, options, megabytes)
    grad_hidden, grad_values = torch.empty_like(hidden), torch.empty_like(values)
    parts: list[Tensor] = []
    for own in row_blocks(hidden, policy.vocab_size, megabytes):
        h = hidden.detach()[own].requires_grad_()
        v = values.detach()[own].requires_grad_()
        logits = policy.logits(h)
        result = ppo_loss_from_logits(
            logits,
            targets[own],
            values=v,
            **{name: None if row is None else row[own] for name, row in rows.items()},  # type: ignore[arg-type]
            **options,
        )
        loss, stats = result.loss, result.stats
        if reference is not None and ref_hidden is not None:
            with torch.no_grad(), reference.active():
                ref_logits = reference.logits(ref_hidden[own]) / options["temperature"]
            exact = kl_from_logits(logits / options["temperature"], ref_logits)
            weights = rows["weights"]
            exact = exact if weights is None else exact * weights[own]
            exact = exact.sum() / options["normalizer"]
            loss = loss + full_kl_coef * exact
            stats = stats.clone()
            stats[KL] = exact.detach()
        loss.backward()
        assert h.grad is not None
        assert v.grad is not None
        grad_hidden[own], grad_values[own] = h.grad, v.grad
        parts.append(torch.cat([loss.detach().reshape(1), stats]))
    hidden.grad, values.grad = grad_hidden, grad_values
    return added(torch.stack(parts))


def _fused_loss_and_grads(
    policy: Policy,
    hidden: Tensor,
    targets: Tensor,
    rows: dict[str, Tensor | None],
    values: Tensor,
    options: dict[str, Any],
    megabytes: int | None,
) -> Tensor:
    """`loss_and_grads` without logits; the head's gradient goes straight into its `grad`."""
    head = policy.fused
    assert head is not None
    states, weight = _operands(policy, hidden, head.weight.detach())
    coefficients = {name: value for name, value in options.items() if name != "temperature"}
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        result, grad_hidden, grad_values = hidden_gradients(
            states,
            weight,
            targets,
            Terms(values=values, **rows, **coefficients),  # type: ignore[arg-type]
            bias=None if head.bias is None else head.bias.detach(),
            temperature=options["temperature"],
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            weight_grad=_gradient_of(head.weight),
            bias_grad=None if head.bias is None else _gradient_of(head.bias),
            workspace_mb=megabytes or WORKSPACE_MB,
        )
    assert grad_values is not None
    hidden.grad, values.grad = grad_hidden.to(hidden.dtype), grad_values
    return torch.cat([result.loss.reshape(1), result.stats])


def _gradient_of(parameter: Tensor) -> Tensor | None:
    """The buffer its gradient is added to; None of a frozen one."""
    if not parameter.requires_grad:
        return None
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def added(parts: Tensor) -> Tensor:
    """Results of parts of a batch, [K, 1 + len(PPO_STATS)], as one of the batch."""
    total = parts.sum(0)
    total[1 + RATIO_DEVIATION] = parts[:, 1 + RATIO_DEVIATION].amax(0)
    return total
