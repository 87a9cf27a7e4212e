"""TRL's kernels: log-prob with entropy from logits, and from hidden states in chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, Inputs, Named, leaves_of, with_gradients
from trl.kernels import ChunkedLogProbFunction

from peers import NotHere, Prepare

CHUNK = 8192
"""Vocabulary entries a tile."""


def arms(case: Case) -> dict[str, Prepare]:
    if case.label == "log_probs_from_logits":
        return {"TRL": _log_probs}
    if case.label == "mean_nll_from_hidden":
        return {"TRL": _linear}
    return {}


def _log_probs(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    # Computes the entropy whether it is wanted or not.
    try:
        from trl.kernels import selective_log_softmax_and_entropy
    except ImportError:
        raise NotHere("this version has no log-prob kernel") from None
    logits, index, leaves = inputs["logits"], inputs["index"], leaves_of(inputs)

    def call() -> Named:
        with torch.set_grad_enabled(bool(upstream)):
            found = selective_log_softmax_and_entropy(logits, index)
            named = dict(zip(("log_probs", "entropy"), found, strict=True))
            return with_gradients(named, leaves, upstream)

    return call


def _linear(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    hidden, weight, index = (inputs[name] for name in ("hidden", "weight", "index"))
    leaves = leaves_of(inputs)

    def call() -> Named:
        with torch.set_grad_enabled(bool(upstream)):
            arguments = (hidden, weight, None, index, 1.0, CHUNK, None, 1.0, ())
            log_probs = ChunkedLogProbFunction.apply(*arguments)[0]
            return with_gradients({"loss": -log_probs.mean()}, leaves, upstream)

    return call
