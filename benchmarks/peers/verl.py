"""verl: log-prob and entropy from logits as its actors compute them, and its linear kernel."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable

import torch
from cases import Case, Inputs, Named, leaves_of, with_gradients

from peers import Prepare, need_cuda


def _without_ray() -> None:
    """Put a bare `verl` package in the place of one that does not import.

    Importing it starts with Ray and a tokenizer, none of which the kernels need.
    """
    try:
        import verl  # noqa: F401
    except ImportError:
        for name in ("verl", "verl.utils"):
            bare = types.ModuleType(name)
            spec = importlib.util.find_spec(name)
            assert spec is not None
            bare.__path__ = list(spec.submodule_search_locations or ())
            sys.modules[name] = bare


def arms(case: Case) -> dict[str, Prepare]:
    _without_ray()
    if case.label == "log_probs_from_logits":
        return {"verl": _log_probs}
    if case.label == "mean_nll_from_hidden":
        return {"verl": _linear}
    return {}


def _log_probs(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    logits, index, leaves = inputs["logits"], inputs["index"], leaves_of(inputs)

    def call() -> Named:
        with torch.set_grad_enabled(bool(upstream)):
            named = {"log_probs": logprobs_from_logits(logits, index, inplace_backward=False)}
            if inputs["with_entropy"]:
                named["entropy"] = entropy_from_logits(logits)
            return with_gradients(named, leaves, upstream)

    return call


def _linear(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    hidden, weight, index = (inputs[name] for name in ("hidden", "weight", "index"))
    need_cuda(hidden)
    leaves = leaves_of(inputs)

    def call() -> Named:
        with torch.set_grad_enabled(bool(upstream)):
            log_probs = linear_cross_entropy(hidden, weight, index, 1.0, "none")[0]
            return with_gradients({"loss": -log_probs.mean()}, leaves, upstream)

    return call
