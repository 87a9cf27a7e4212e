"""flash-attn's cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, Inputs, Named, leaves_of, with_gradients
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

from peers import Prepare, need_cuda


def arms(case: Case) -> dict[str, Prepare]:
    wanted = case.label == "log_probs_from_logits" and case.outputs == ("log_probs",)
    return {"flash-attn": _cross_entropy} if wanted else {}


def _cross_entropy(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    need_cuda(inputs["logits"])
    logits, index, leaves = inputs["logits"], inputs["index"], leaves_of(inputs)

    def call() -> Named:
        with torch.set_grad_enabled(bool(upstream)):
            losses, _ = cross_entropy_loss(logits, index)
            return with_gradients({"log_probs": -losses}, leaves, upstream)

    return call
