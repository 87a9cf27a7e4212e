"""Apple's cut cross-entropy: the linear head and the loss without the logits in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, Inputs, Named, leaves_of, with_gradients
from cut_cross_entropy import linear_cross_entropy

from peers import Prepare, need_cuda


def arms(case: Case) -> dict[str, Prepare]:
    return {"cut-cross-entropy": _linear} if case.label == "mean_nll_from_hidden" else {}


def _linear(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    hidden, weight, index = (inputs[name] for name in ("hidden", "weight", "index"))
    need_cuda(hidden)
    leaves = leaves_of(inputs)

    def call() -> Named:
        with torch.set_grad_enabled(bool(upstream)):
            return with_gradients(
                {"loss": linear_cross_entropy(hidden, weight, index)}, leaves, upstream
            )

    return call
