"""A minibatch of an MLP actor-critic in two launches: its step, and the sum of the programs' shares.

That is where both networks fit one multiprocessor: up to three hidden layers of 64 units. Others are
worked on layer by layer (`_layerwise`).

Every program of the step leaves its share of the gradients as a row of [programs, P] and of the sums
as two rows of [2 programs, 16]. The second launch adds both up, always in the same order, divides by
the number of rows and writes gradients, statistics and loss, with the sums of squares that the
gradient's norm takes. The whitening of advantages over the minibatch is one launch more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.device_errors import mark_of
from ppo_fast.kernels import _actor_critic_step as step
from ppo_fast.kernels._launch import INTERPRETED, as_rows, launch, next_power_of_2
from ppo_fast.kernels._layerwise import (
    beyond_layers,
    is_roomy,
    layerwise_loss_and_grads,
    takes_tf32,
)
from ppo_fast.kernels._library import opaque, unpack
from ppo_fast.kernels._surrogate import (
    Numbers,
    Rows,
    conclude,
    mean_scale,
    packed,
    whitening_kernel,
)
from ppo_fast.results import PPO_STATS, ActorCriticSpec, PPOLoss

Scalar = float | Tensor

PROGRAMS = 2 if INTERPRETED else 132
"""Of four warps for each network, at most: two of them run at once on each of 132 multiprocessors.
The same number on every GPU, so that results are the same bits."""

WIDEST_HIDDEN, MOST_HIDDEN, WIDEST_OBS, MOST_OUTPUTS = 64, 3, 64, 32
"""Beyond these the gradients of one network do not fit a multiprocessor's registers."""

WHITEN_IN_PLACE_ROWS = 2048
"""Up to here each program takes the advantages' moments itself, which saves a launch."""

WHITENING_BLOCK = 1024

REDUCED_AT_ONCE = 128
"""Parameters to a program of the second launch."""

SMALLEST = 16
"""Sides of a product's tiles, at least."""


@triton.jit(do_not_specialize=["count", "size", "programs", "pitch"])
def actor_critic_reduce_kernel(
    partials,
    sums,
    count,  # of rows, unless their masks are to be counted: then None
    numbers,
    gradients,
    square_sums,  # [programs of this kernel]
    loss,
    stats,
    size,
    programs,  # of the step, for each network
    pitch,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0)
    place, lane = tl.arange(0, 16), tl.arange(0, ROWS)
    total = tl.zeros((16,), tl.float32)
    largest = tl.zeros((16,), tl.float32)
    for start in range(0, 2 * programs, ROWS):
        row = (start + lane)[:, None]
        part = tl.load(sums + row * 16 + place[None, :], mask=row < 2 * programs, other=0.0)
        total += tl.sum(part, 0)
        largest = tl.maximum(largest, tl.max(part, 0))
    if count is not None:
        total = tl.where(place == 11, count.to(tl.float32), total)
    scale = mean_scale(tl.sum(tl.where(place == 11, total, 0.0), 0), numbers)
    if block == 0:
        conclude(total, largest, numbers, loss, stats)

    entry = block * BLOCK + tl.arange(0, BLOCK)
    is_entry = entry < size
    gradient = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + lane
        part = partials + row.to(tl.int64)[:, None] * pitch + entry[None, :]
        inside = (row < programs)[:, None] & is_entry[None, :]
        gradient += tl.sum(tl.load(part, mask=inside, other=0.0), 0)
    gradient *= scale
    tl.store(gradients + entry, gradient, mask=is_entry)
    tl.store(square_sums + block, tl.sum(gradient * gradient, 0))


def _padded(size: int) -> int:
    return max(SMALLEST, next_power_of_2(size))


def _layers(spec: ActorCriticSpec) -> list[tuple[tuple[int, ...], ...]]:
    """Of the actor and of the critic, what `_network` is told of each layer."""
    offset = spec.num_outputs if spec.head_sizes is None else 0
    networks = []
    for sizes in spec.layers[1:]:
        layers = []
        for number, (out, width) in enumerate(sizes):
            has_ones = number == 0 and width < _padded(width)
            layers.append((offset, out, width, _padded(out), _padded(width), has_ones))
            offset += out * (width + 1)
        networks.append(tuple(layers))
    return networks


def _tile(
    networks: Sequence[Sequence[Sequence[int]]],
    activation: str,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, int]:
    """Rows at a time, and warps that share them; a pure function of shape and kind of GPU."""
    deepest = max(len(layers) for layers in networks) - 1
    if not is_roomy(device) or (dtype == torch.float32 and deepest > 2):
        return {"BM": 32, "num_warps": 4}
    # Registers of each of 128 threads: gradients, and what of a tile of 64 rows lives at its widest.
    gradients = max(sum(layer[3] * layer[4] for layer in layers) // 128 for layers in networks)
    alive = networks[0][0][4] // 2 + 2 * (networks[0][-1][3] - SMALLEST)
    alive += (32 if activation == "silu" else 0) + 8 * max(0, heads - 1)
    if dtype == torch.float32 or gradients + alive <= 72:
        return {"BM": 64, "num_warps": 4}
    return {"BM": 128, "num_warps": 8}


def _columns_there(obs: Tensor) -> int:
    """Columns that may be read of each row: beyond the last, where padding makes loads of 16 bytes."""
    N, D = obs.shape
    padded = triton.cdiv(D, 4) * 4
    end = obs.storage_offset() + (N - 1) * obs.stride(0) + padded
    is_padded = obs.stride(0) % 4 == 0 and obs.stride(0) >= padded
    if N and is_padded and end * obs.element_size() <= obs.untyped_storage().nbytes():
        return padded
    return D


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """How products are computed; `APPROXIMATE` as in `_tanh`."""
    nvidia = not INTERPRETED and torch.version.hip is None
    if dtype != torch.float32:
        types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        return {"DTYPE": types[dtype], "PRECISION": "ieee", "APPROXIMATE": 2 * nvidia}
    if takes_tf32():
        return {"DTYPE": tl.float32, "PRECISION": "tf32", "APPROXIMATE": 2 * nvidia}
    # Three TF32 products carry the digits of one in fp32, which tensor cores do not have.
    precision = "tf32x3" if nvidia else "ieee"
    return {"DTYPE": tl.float32, "PRECISION": precision, "APPROXIMATE": int(nvidia)}


def _outputs(
    parameters: Tensor,
    gradients: Tensor,
    obs_size: int,
    actor_sizes: Sequence[int],
    critic_sizes: Sequence[int],
    num_outputs: int,
    activation: str,
    head_sizes: Sequence[int],
    squash: bool,
    obs: Tensor,
    actions: Tensor,
    action_mask: Tensor | None,
    index: Tensor | None,
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    norm_adv: bool,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = parameters.new_empty((), dtype=torch.float32)
    blocks = triton.cdiv(parameters.numel(), REDUCED_AT_ONCE)
    return loss, loss.new_empty(len(PPO_STATS)), loss.new_empty(blocks)


@opaque(_outputs, mutates=("gradients",))
def _actor_critic_loss_and_grads(
    parameters: Tensor,
    gradients: Tensor,
    obs_size: int,
    actor_sizes: Sequence[int],
    critic_sizes: Sequence[int],
    num_outputs: int,
    activation: str,
    head_sizes: Sequence[int],  # empty for a Gaussian policy
    squash: bool,
    obs: Tensor,
    actions: Tensor,
    action_mask: Tensor | None,
    index: Tensor | None,
    rows: Sequence[Tensor | None],
    moments: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    vf_clipped: bool,
    norm_adv: bool,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and sums of squares of the gradients; fills `gradients`."""
    spec = ActorCriticSpec(
        *(obs_size, (), tuple(actor_sizes), tuple(critic_sizes), num_outputs, activation),
        tuple(head_sizes) or None,
        squash,
    )
    size = parameters.numel()
    loss = parameters.new_empty((), dtype=torch.float32)
    stats = loss.new_empty(len(PPO_STATS))
    square_sums = loss.new_empty(triton.cdiv(size, REDUCED_AT_ONCE))
    named, coefficients = Rows(*rows), Numbers(*unpack(numbers, tensors))
    N, M = obs.shape[0], obs.shape[0] if index is None else index.shape[0]
    networks = _layers(spec)
    tile = _tile(networks, activation, len(head_sizes), matmul_dtype, obs.device)
    tiles = triton.cdiv(M, tile["BM"])
    each = max(1, triton.cdiv(tiles, PROGRAMS * 4 // tile["num_warps"]))
    programs = max(1, triton.cdiv(tiles, each))

    parts, norm = 1, 0
    if moments is not None:
        norm = 3
        moments = moments.float().contiguous()
    elif norm_adv and M <= WHITEN_IN_PLACE_ROWS:
        norm = 1
    elif norm_adv:
        norm = 2
        parts = triton.cdiv(M, WHITENING_BLOCK)
        moments = loss.new_empty(parts, 3)
        of_advantages = named.advantages, named.mask, index, moments, N, M
        launch(whitening_kernel, (parts,), *of_advantages, BLOCK=WHITENING_BLOCK, num_warps=4)

    heads = []
    for head in head_sizes:
        heads.append((sum(part[1] for part in heads), head))
    kind = step.CATEGORICAL if heads else step.SQUASHED if squash else step.GAUSSIAN
    pitch = triton.cdiv(size, 4) * 4
    partials, sums = loss.new_empty(programs, pitch), loss.new_empty(2 * programs, 16)
    launch(
        step.actor_critic_step_kernel,
        (programs, 2),
        *(parameters, obs, actions, action_mask, index, named, moments, parts, coefficients),
        *(mark_of(obs.device), partials, sums, N, M, each, pitch, 0),
        ACTOR=networks[0],
        CRITIC=networks[1],
        KIND=kind.value,
        HEADS=tuple(heads),
        ACTIVATION=activation,
        READ=_columns_there(obs),
        OBS_STRIDE=obs.stride(0),
        ACTION_STRIDE=actions.stride(0),
        MASK_STRIDE=0 if action_mask is None else action_mask.stride(0),
        NORM=norm,
        VF_CLIPPED=vf_clipped,
        num_stages=1,
        **tile,
        **_arithmetic(matmul_dtype),
    )
    launch(
        actor_critic_reduce_kernel,
        (square_sums.numel(),),
        *(partials, sums, M if named.mask is None else None, coefficients),
        *(gradients, square_sums, loss, stats),
        *(size, programs, pitch),
        BLOCK=REDUCED_AT_ONCE,
        ROWS=16,
        num_warps=4,
    )
    return loss, stats, square_sums


def actor_critic_loss_and_grads(
    parameters: Tensor,
    gradients: Tensor,
    spec: ActorCriticSpec,
    obs: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    old_values: Tensor,
    returns: Tensor,
    index: Tensor | None = None,
    *,
    clip_coef: Scalar,
    clip_coef_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
    vf_coef: Scalar = 0.5,
    vf_clip_coef: Scalar | None = None,
    vf_clip: str = "max",
    ent_coef: Scalar = 0.0,
    old_kl_coef: Scalar = 0.0,
    action_mask: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    norm_adv: bool = False,
    advantage_moments: Tensor | None = None,
    normalizer: Scalar | None = None,
    matmul_dtype: torch.dtype | None = None,
    workspace: Any = None,
) -> PPOLoss:
    """See `ppo_fast.functional.actor_critic.actor_critic_loss_and_grads`.

    The gradient's sums of squares are left as `workspace.square_sums`, for `clipped_adam_`.
    """
    if not _fits(spec, matmul_dtype or torch.float32, obs.device):
        return layerwise_loss_and_grads(
            parameters,
            gradients,
            spec,
            obs,
            actions,
            old_log_probs,
            advantages,
            old_values,
            returns,
            index,
            clip_coef=clip_coef,
            clip_coef_high=clip_coef_high,
            dual_clip=dual_clip,
            vf_coef=vf_coef,
            vf_clip_coef=vf_clip_coef,
            vf_clip=vf_clip,
            ent_coef=ent_coef,
            old_kl_coef=old_kl_coef,
            action_mask=action_mask,
            mask=mask,
            weights=weights,
            norm_adv=norm_adv,
            advantage_moments=advantage_moments,
            normalizer=normalizer,
            matmul_dtype=matmul_dtype,
            workspace=workspace,
        )
    terms = packed(
        old_log_probs=old_log_probs,
        advantages=advantages,
        values=old_values,  # stands in for the values, which the kernel computes
        old_values=old_values,
        returns=returns,
        ref_log_probs=None,
        mask=mask,
        weights=weights,
        clip_coef=clip_coef,
        clip_coef_high=clip_coef_high,
        dual_clip=dual_clip,
        vf_coef=vf_coef,
        vf_clip_coef=vf_clip_coef,
        vf_clip=vf_clip,
        ent_coef=ent_coef,
        kl_coef=0.0,
        kl_estimator="k3",
        old_kl_coef=old_kl_coef,
        norm_adv=norm_adv,
        advantage_moments=advantage_moments,
        normalizer=normalizer,
    )
    rows = [None if row is terms.rows[2] else row for row in terms.rows]
    loss, stats, square_sums = _actor_critic_loss_and_grads(
        parameters.detach(),
        gradients,
        spec.obs_size,
        list(spec.actor_sizes),
        list(spec.critic_sizes),
        spec.num_outputs,
        spec.activation,
        list(spec.head_sizes or ()),
        spec.squash,
        as_rows(obs.detach()),
        actions.unsqueeze(1) if actions.ndim == 1 else as_rows(actions.detach()),
        None if action_mask is None else as_rows(action_mask),
        None if index is None else index.contiguous(),
        rows,
        terms.moments,
        terms.numbers,
        terms.tensors,
        terms.vf_clipped,
        norm_adv,
        matmul_dtype or torch.float32,
    )
    if workspace is not None:
        workspace.square_sums = square_sums
    return PPOLoss(loss, stats)


def _fits(spec: ActorCriticSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a multiprocessor holds both networks and their gradients; `dtype`: of the operands."""
    sizes = spec.actor_sizes, spec.critic_sizes
    deepest = max(map(len, sizes))
    if spec.shared_sizes or not all(sizes) or deepest > MOST_HIDDEN:
        return False
    if max(*spec.actor_sizes, *spec.critic_sizes) > WIDEST_HIDDEN:
        return False
    if not 1 <= spec.obs_size <= WIDEST_OBS or not 1 <= spec.num_outputs <= MOST_OUTPUTS:
        return False
    if dtype != torch.float32:
        return True
    # Exact products are three on tensor cores, which keep their operands three times.
    return is_roomy(device) and (deepest <= 2 or takes_tf32() or INTERPRETED)


def _unsupported(
    parameters: Tensor,
    gradients: Tensor,
    spec: ActorCriticSpec,
    *args: Any,
    matmul_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> str | None:
    if parameters.dtype != torch.float32:
        return f"parameters of {parameters.dtype} run on the reference"
    if matmul_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        return f"products of {matmul_dtype} have no kernel"
    if _fits(spec, matmul_dtype or torch.float32, parameters.device):
        return None
    return beyond_layers(spec)


actor_critic_loss_and_grads.unsupported = _unsupported  # type: ignore[attr-defined]
