"""Responses on their way to an update: tokens on the host, what belongs to them end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ppo_fast.llm.packing import Packed, pack
from ppo_fast.llm.sampler import Responses


def check_responses(responses: Responses, count: int, most: int) -> None:
    """Refuse what is no answer to `count` prompts of at most `most` tokens each.

    Raises:
        ValueError: shapes, or lengths out of range.
    """
    tokens, log_probs, lengths, ended = responses
    rows, width = [len(lengths), len(ended)], min(most, tokens.shape[-1])
    if tokens.ndim != 2 or tokens.shape != log_probs.shape or {len(tokens), *rows} != {count}:
        raise ValueError(
            f"the sampler gave tokens {list(tokens.shape)}, log_probs {list(log_probs.shape)}, "
            f"{rows[0]} lengths and {rows[1]} ended; expected [{count}, T] twice and {count} of each"
        )
    for index, length in enumerate(lengths):
        if not 1 <= length <= width:
            raise ValueError(
                f"the sampler gave response {index} the length {length}; expected 1 to {width}"
            )


class Sequences:
    """B prompts with their responses; the M response tokens have places in order.

    Args:
        prompts, responses: lists of token ids, none empty.
        device: where packed tensors go.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        device: torch.device | str,
    ) -> None:
        self.prompts, self.responses, self.device = prompts, responses, device
        self.response_lengths = [len(response) for response in responses]
        self.lengths = [
            len(prompt) + len(response) - 1
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        self.starts = [0, *accumulate(self.response_lengths)]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.starts[-1]

    def cu_seqlens(self) -> Tensor:
        """[B + 1] int32, where responses begin in M."""
        return torch.tensor(self.starts, dtype=torch.int32).to(self.device)

    def last_tokens(self) -> Tensor:
        """[B] int64, the place of every response's last token in M."""
        return torch.tensor(self.starts[1:]).sub_(1).to(self.device)

    def take(self, indices: Sequence[int]) -> tuple[Packed, Tensor]:
        """Some of the sequences packed, and the places [m] of their response tokens in M."""
        packed = pack(
            [self.prompts[i] for i in indices], [self.responses[i] for i in indices], self.device
        )
        rows = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in indices])
        return packed, torch.from_numpy(rows).to(self.device, non_blocking=True)


@dataclass
class TokenRollout:
    """What an update of a language model learns from; [M] float32, one entry a response token."""

    sequences: Sequences
    log_probs: Tensor
    """under the policy as it was"""
    values: Tensor
    advantages: Tensor
    returns: Tensor
    advantage_scale: Tensor
    """0-d, what whitening multiplied the advantages by; 1 without"""
    ref_log_probs: Tensor | None = None
    """under the reference; needed by a KL in the loss"""

    def __len__(self) -> int:
        return len(self.sequences)


def whitening_scale(moments: Tensor) -> Tensor:
    """0-d: what whitening by these moments ([3] count, mean, squared deviations) multiplies by."""
    count, _, squares = moments.unbind()
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    return torch.where(count < 2, 1.0, 1 / (deviation + 1e-8))
