"""Log-probs of a linear head by Liger's kernel for Hopper GPUs, where liger-kernel is installed.

`LigerFusedLinearScaledCrossEntropyFunction` (liger-kernel 0.8) multiplies and reduces in one kernel, at
nearly the full matrix rate. It rounds logits to float16 and entropies to bfloat16, where
`log_probs_from_hidden` keeps float32: use it for all log-probs of a ratio or for none.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ppo_fast.functional._linear_head import check_head

MODULE = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
KERNEL = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
FUNCTION = "LigerFusedLinearScaledCrossEntropyFunction"
INSTALL = "pip install 'liger-kernel[cutedsl]>=0.8'"

IGNORED = -100
"""Liger's mark of a row to leave out."""


def available(device: torch.device | None = None) -> str | None:
    """Why `liger_log_probs` cannot run on a device, or None where it can.

    Args:
        device: None is the current GPU.
    """
    return _no_device(device) or _no_module()


def _no_device(device: torch.device | None) -> str | None:
    if device is not None and device.type != "cuda":
        return f"the tensors are on {device}; the kernel needs a Hopper GPU"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "there is no CUDA GPU here"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        name = torch.cuda.get_device_name(device)
        return f"the {name} has compute capability {capability}; the kernel needs (9, 0), Hopper"
    return None


def _no_module() -> str | None:
    try:
        found = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return f"liger-kernel is not installed; {INSTALL}"
    for name in (MODULE, KERNEL):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            return f"liger-kernel {found} does not import {name} ({error}); {INSTALL}"
        if name == MODULE and not hasattr(module, FUNCTION):
            return f"liger-kernel {found} has no {FUNCTION}; {INSTALL}"
    return None


@overload
def liger_log_probs(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def liger_log_probs(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def liger_log_probs(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`log_probs_from_hidden` without gradient, by Liger's kernel; never anything else in its place.

    Liger checks the indices, for which the host waits; its LIGER_SCALED_CE_SM90_VALIDATE_TARGETS=0
    turns that off.

    Args:
        hidden: [..., D] bfloat16 on a Hopper GPU.
        weight: [V, D] bfloat16.
        index: [...] int64 or int32 in [0, V).
        temperature: > 0, a number.
        mask: [...] bool. Where False the outputs are 0.
        with_entropy: also return the entropy, in nats.

    Returns:
        log_probs [...] float32, or (log_probs, entropy), of which the entropy was rounded to bfloat16.

    Raises:
        RuntimeError: `available` says why it cannot run here; or a gradient is asked for.
        ValueError: shapes, dtypes or devices do not fit, temperature is not a positive number, or
            (Liger's) an unmasked index is outside [0, V).
    """
    op = "liger_log_probs"
    if isinstance(temperature, Tensor):
        raise ValueError(f"{op}: temperature is a tensor; expected a number, float(temperature)")
    check_head(op, hidden, weight, index, None, temperature, None, 1.0, mask, 1.0)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype is not torch.bfloat16:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype}; expected torch.bfloat16 (log_probs_from_hidden takes "
                "any floating dtype)"
            )
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        raise RuntimeError(
            f"{op}: hidden or weight requires a gradient, but this form has none; call it under "
            "torch.no_grad(), or log_probs_from_hidden"
        )
    reason = available(hidden.device)
    if reason is not None:
        raise RuntimeError(f"{op}: {reason} (log_probs_from_hidden runs everywhere)")
    log_probs, entropy = _call(hidden, weight, index, float(temperature), mask, with_entropy)
    if not with_entropy:
        return log_probs
    assert entropy is not None
    return log_probs, entropy


@torch.no_grad()
def _call(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    temperature: float,
    mask: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    if not index.numel():  # Liger refuses those
        empty = torch.zeros(index.shape, dtype=torch.float32, device=hidden.device)
        return empty, empty.clone() if with_entropy else None
    # An index that happens to be Liger's mark has to be refused, not left out.
    target = index.long().masked_fill(index == IGNORED, -1)
    if mask is not None:
        target = target.masked_fill(~mask, IGNORED)
    function: Any = getattr(importlib.import_module(MODULE), FUNCTION)
    rows = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        found = function.apply(
            rows, weight, target.reshape(-1), temperature, IGNORED, 1, with_entropy
        )
    nll, entropy = found if with_entropy else (found, None)
    outputs = [nll.float().neg().view(index.shape)]
    if entropy is not None:
        outputs.append(entropy.float().view(index.shape))
    if mask is not None:
        outputs = [out.masked_fill(~mask, 0.0) for out in outputs]
    return outputs[0], outputs[1] if with_entropy else None
