"""Liger-Kernel: cross-entropy, selective log-softmax, GRPO's loss, fused linear cross-entropy.

Its cross-entropy writes the gradient over the logits, so it gets a copy of them, and from its second
call on finds that gradient there: it takes as long.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, Inputs, Named, leaves_of, with_gradients
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from liger_kernel.ops.grpo_loss import GrpoLossFunction, fused_selective_log_softmax

from peers import Prepare


def arms(case: Case) -> dict[str, Prepare]:
    if case.label == "log_probs_from_logits" and case.outputs == ("log_probs",):
        found = {"Liger cross-entropy": _cross_entropy}
        return found if case.gradient else found | {"Liger log-softmax": _selective}
    if case.label == "ppo_loss_from_logits" and "bf16" in case.name:
        return {"Liger GRPO": _grpo}
    if case.label == "mean_nll_from_hidden":
        return {"Liger": _linear}
    return {}


def _cross_entropy(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    logits = inputs["logits"].detach().clone().requires_grad_(bool(upstream))
    index, leaves = inputs["index"], {"logits": logits} if upstream else {}

    def call() -> Named:
        with torch.set_grad_enabled(bool(upstream)):
            arguments = (None, -100, 0.0, 0.0, "none")
            losses = LigerCrossEntropyFunction.apply(logits, index, *arguments)[0]
            return with_gradients({"log_probs": -losses}, leaves, upstream)

    return call


def _padded(x: torch.Tensor) -> torch.Tensor:
    """[B, L, V] with the row after the last token that Liger expects and skips."""
    return torch.cat((x, torch.zeros_like(x[:, :1])), 1)


def _selective(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    logits, index = _padded(inputs["logits"][None]), inputs["index"][None]

    def call() -> Named:
        return {"log_probs": fused_selective_log_softmax(logits, index, temperature=1.0)[0]}

    return call


def _grpo(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    # Its advantages belong to sequences.
    sequences = max(1, len(inputs["actions"]) // 1024)
    rows = [inputs[name].unflatten(0, (sequences, -1)) for name in ("actions", "old_log_probs")]
    logits = _padded(inputs["logits"].detach().unflatten(0, (sequences, -1))).requires_grad_()
    advantages = inputs["advantages"].unflatten(0, (sequences, -1))[:, 0].contiguous()
    ids, old, clip = rows[0].contiguous(), rows[1].contiguous(), inputs["clip_coef"]

    def ours(gradient: torch.Tensor) -> torch.Tensor:
        return gradient[:, :-1].flatten(0, 1)

    def call() -> Named:
        arguments = (logits, old, None, ids, advantages, None, 1.0, 0.0, clip, clip, False, "bnpo")
        loss = GrpoLossFunction.apply(*arguments)[0]
        return with_gradients({"loss": loss}, {"logits": logits}, upstream, ours)

    return call


def _linear(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    hidden, weight, index = (inputs[name] for name in ("hidden", "weight", "index"))
    leaves = leaves_of(inputs)

    def call() -> Named:
        with torch.set_grad_enabled(bool(upstream)):
            loss = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, index)[0]
            return with_gradients({"loss": loss}, leaves, upstream)

    return call
