"""Errors that a kernel meets on the device, kept there until somebody asks.

Reading a tensor back stalls a GPU, so a kernel that meets an index out of range writes NaN for that
row and leaves a mark here. `raise_device_errors` is the one place that waits for the device; the
trainers call it where they copy their metrics anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

ERRORS = {
    1: "log_probs_from_logits: an index lies outside [0, V); its log-prob is NaN",
    2: "ppo_loss_from_logits: an action lies outside its head; the loss is NaN",
    3: "actor_critic_loss_and_grads: an action lies outside its head; the loss is NaN",
    4: "actor_critic_loss_and_grads: an entry of index lies outside [0, N); the loss is NaN",
}

_marks: dict[torch.device, Tensor] = {}


def mark_of(device: torch.device) -> Tensor:
    """Return the [1] int32 tensor on `device` that a kernel stores a key of `ERRORS` in."""
    if device.type == "meta":
        return torch.zeros(1, dtype=torch.int32, device=device)  # nothing runs there
    mark = _marks.get(device)
    if mark is None:
        # It outlives an inference mode that its first use may fall into.
        with torch.inference_mode(False):
            mark = _marks[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return mark


def raise_device_errors() -> None:
    """Raise the last error a kernel has met since the last call; waits for the devices asked.

    Raises:
        IndexError: an index or action was out of range; the mark is cleared.
    """
    for mark in _marks.values():
        if code := int(mark):
            mark.zero_()
            raise IndexError(ERRORS[code])
