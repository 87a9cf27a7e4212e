"""Attention of packed sequences for Hugging Face models, registered with transformers.

A model whose attention implementation is "ppo_fast" takes a `packed` argument in its forward: its
linear layers then see only real tokens, and attention stays inside each sequence. Without the
argument (generation, padded batches) it is transformers' own "sdpa".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ppo_fast.extras import require
from ppo_fast.llm.packing import Packed

NAME = "ppo_fast"

# Arguments of attention functions that change nothing here when they are given.
HARMLESS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
HARMLESS |= {"position_ids", "use_cache", "output_attentions", "layer_idx", "cache_position"}


def register() -> None:
    """Make the attention implementation known to transformers; a second call changes nothing."""
    utils = require("transformers.modeling_utils", "llm", "PPO for language models")
    masks = require("transformers.masking_utils", "llm", "PPO for language models")
    utils.AttentionInterface.register(NAME, packed_attention)
    masks.AttentionMaskInterface.register(NAME, masks.sdpa_mask)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each of the packed sequences.

    Args:
        module: the attention layer.
        query: [1, heads, L, head size].
        key, value: [1, key heads, L, head size].
        attention_mask: of one element where `packed` is given: it says nothing.
        packed: the layout of L.
        scaling: of the scores; None is 1 / sqrt(head size).
        dropout: must be 0: the policy that acted and the one in training have to be one function.
        sliding_window: a token attends to so many, itself included; None to all before it.
        is_causal: must not be False, of the layer neither.
        **options: what else transformers passes on.

    Returns:
        [1, L, heads, head size], and None in place of the attention weights.

    Raises:
        NotImplementedError: the layer wants something that this function does not compute.
    """
    if packed is None:
        sdpa = require("transformers.integrations.sdpa_attention", "llm", "attention")
        return sdpa.sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            is_causal=is_causal,
            **options,
        )
    wanted = sorted(k for k, v in options.items() if v is not None and k not in HARMLESS)
    if dropout:
        wanted.append("dropout")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        wanted.append("attention to later tokens")
    if attention_mask is not None and attention_mask.numel() > 1:
        wanted.append("a mask or bias of the model's own")
    if sliding_window is None and _has_window(module):
        wanted.append("a window or chunks that come by the mask only")
    if wanted:
        raise NotImplementedError(f"packed attention does not compute {', '.join(wanted)}")
    q, k, v = (_to_rows(part[0].transpose(0, 1), packed) for part in (query, key, value))
    longest = packed.max_length
    band = None
    if sliding_window is not None and sliding_window < longest:
        place = torch.arange(longest, device=query.device)
        distance = place[:, None] - place[None]
        band = (distance >= 0) & (distance < sliding_window)
    groups = query.shape[1] // key.shape[1]
    # On a GPU, fused kernels share key heads in 16 bits and without a mask only.
    shared = band is None and query.dtype in (torch.bfloat16, torch.float16)
    if groups > 1 and not shared:
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    result = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=band,
        is_causal=band is None,
        scale=scaling,
        enable_gqa=groups > 1 and shared,
    ).transpose(1, 2)
    flat = result.reshape(-1, *result.shape[2:])
    if len(flat) != len(packed.slots):
        flat = flat.index_select(0, packed.slots)
    return flat.unsqueeze(0), None


def _has_window(module: nn.Module) -> bool:
    """Whether the layer's config limits how far back its tokens attend."""
    config = getattr(module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and index is not None:
        return kinds[index] in ("sliding_attention", "chunked_attention")
    return getattr(config, "sliding_window", None) is not None


def _to_rows(part: Tensor, packed: Packed) -> Tensor:
    """[L, heads, size] -> [S, heads, max_length, size]; places past an end repeat its last token.

    Such places come after every real one, which therefore never attends to them.
    """
    if len(part) != len(packed.sources):
        part = part.index_select(0, packed.sources)
    return part.unflatten(0, (len(packed.lengths), packed.max_length)).transpose(1, 2)
