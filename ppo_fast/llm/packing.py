"""Sequences of different lengths laid end to end, and cut into micro-batches by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Packed(NamedTuple):
    """S prompts with their responses, end to end; the last token of each is a target only.

    The hidden state at a token predicts the token after it, so the last token of a response needs
    no forward. L tokens go into the model, M come out as predictions of response tokens.
    """

    tokens: Tensor
    """[L] int64"""
    position_ids: Tensor
    """[L] int64, from 0 in every sequence"""
    predict: Tensor
    """[M] int64, places in L whose hidden state predicts a response token"""
    targets: Tensor
    """[M] int64, the response tokens"""
    slots: Tensor
    """[L] int64, the place of every token in S rows of `max_length`"""
    sources: Tensor
    """[S * max_length] int64, the token of every such place; padding repeats a sequence's last"""
    cu_seqlens: Tensor
    """[S + 1] int32, where sequences begin in L"""
    lengths: list[int]
    """of the sequences in L"""

    @property
    def max_length(self) -> int:
        """The longest of `lengths`."""
        return max(self.lengths)


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
) -> Packed:
    """Lay sequences end to end and say where their responses are predicted.

    Args:
        prompts: S lists of token ids, none empty.
        responses: S lists of token ids, none empty.
        device: of the tensors; they are copied there without a wait.

    Raises:
        ValueError: no sequence, lists of different number, an empty prompt or response.
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(
            f"pack: {len(prompts)} prompts and {len(responses)} responses; expected as many of each, "
            "and at least one"
        )
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not len(prompt) or not len(response):
            what = "prompt" if not len(prompt) else "response"
            raise ValueError(f"pack: {what} {index} is empty; expected at least one token")
    before = np.array([len(prompt) for prompt in prompts])
    answered = np.array([len(response) for response in responses])
    lengths = before + answered - 1
    longest = int(lengths.max())
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate(
        [part for pair in zip(prompts, responses, strict=True) for part in (pair[0], pair[1][:-1])]
    ).astype(np.int64)
    targets = np.concatenate([np.asarray(response) for response in responses]).astype(np.int64)
    positions = _counting(lengths)
    predict = np.repeat(starts[:-1] + before - 1, answered) + _counting(answered)
    slots = np.repeat(np.arange(len(lengths)) * longest, lengths) + positions
    within = np.minimum(np.arange(longest)[None], lengths[:, None] - 1)
    sources = (starts[:-1, None] + within).reshape(-1)
    parts = (tokens, positions, predict, targets, slots, sources)
    # One copy to the device for all of them.
    together = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
    tensors = together.split([len(part) for part in parts])
    cu_seqlens = torch.from_numpy(starts.astype(np.int32)).to(device, non_blocking=True)
    return Packed._make((*tensors, cu_seqlens, lengths.tolist()))


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group sequences of similar length so that no group has more than `token_budget` tokens.

    A group counts as its longest sequence times its number, which is what a padded forward
    computes; a sequence longer than the budget is a group of its own.

    Args:
        lengths: tokens of each sequence.
        token_budget: at least 1.

    Returns:
        Lists of indices into `lengths`, longest sequences first: what does not fit into memory
        shows at once, not at the end.
    """
    if token_budget < 1:
        raise ValueError(f"micro_batches: token_budget = {token_budget}; expected at least 1")
    # Stable, so that equal lengths keep their order and a split is reproducible.
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _counting(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ..., n - 1 for every n in `lengths`, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
