"""A minibatch of an MLP actor-critic layer by layer: for networks that no single kernel holds.

Rows go through all layers in blocks, forward and backward, so that most of a block's hidden layers
are still in the second-level cache when they are needed again. With actor and critic of equal shapes
and L hidden layers a block takes 3 L + 2 launches: L forward, one for the last layers, one for the
loss (`_heads`), one backward through the last layers, L for the other weights and L - 1 for the
other hidden layers. Networks of unequal shapes take those of each, and a trunk adds its own. Around
the blocks stand three: the parameters and the minibatch are laid out as operands, and the splits of
the gradients are added up; and two that whiten advantages, if that spans several blocks.

A hidden unit's bytes, a row, in 16 bits: 2 written and 2 read by the next layer; 2 read for its
weights' gradient, 2 for the derivative, over which 2 of g are written; 2 or 4 of g read, by the
products of its layer. That is 12 to 14, where eager autograd has 60 in float32. What multiprocessors
read of the cache is more, as each tile of a product reads its operands anew: by counting, 60-256-256-8
on 131072 rows reads and writes 2.6 GB there for 127 GFLOP, and 256-512-256-128-32 on 65536 rows
3.7 GB for 201 GFLOP; that is what bounds the time, and why weights are kept by a program for many
tiles of rows where the shared memory holds them.

The observations are gathered into a copy. Of D of them, 4 D bytes are read at random and 2 D written,
and then 2 D read four times, in rows that lie aligned; gathered within the four products it would be
16 D at random, converted each time, and where D is odd in loads of single numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.device_errors import mark_of
from ppo_fast.kernels import _heads
from ppo_fast.kernels import _layer_products as products
from ppo_fast.kernels._launch import INTERPRETED, as_rows, launch
from ppo_fast.kernels._layer_plan import (
    MOST_OUTPUTS,
    Layer,
    Plan,
    heads_tile,
    layer_tile,
    pitch_of,
    plan_of,
    side_of,
    tables_of,
    turns_of,
    weights_tile,
)
from ppo_fast.kernels._library import opaque
from ppo_fast.kernels._surrogate import ADVANTAGE_EPS, Prepared, Rows, packed, prepared, ticket_for
from ppo_fast.kernels.whiten import masked_whiten
from ppo_fast.results import PPO_STATS, ActorCriticSpec, PPOLoss

Scalar = float | Tensor


class Arithmetic(NamedTuple):
    """How products are computed."""

    dtype: torch.dtype
    precision: str
    approximate: int
    """as in `_activations`"""

    is_roomy: bool
    """whether a program may have 224 KiB of shared memory"""

    @property
    def kind(self) -> str:
        """What the tiles depend on: "half", "small half", "tf32" or "ieee"."""
        if self.dtype.itemsize > 2:
            return self.precision
        return "half" if self.is_roomy else "small half"


class Buffers(NamedTuple):
    """Memory of one call; rows are those of a block unless said."""

    x: Tensor
    """[all rows, padded observations]"""
    weights: Tensor
    biases: Tensor
    hidden: Tensor
    """every hidden layer [rows, width] one behind the other; in the end g takes their place"""
    derivatives: Tensor | None
    """likewise, what f' is taken from where it is not the outputs"""
    raw: Tensor | None
    """[rows, features] float32: gradient of the shared features by one network"""
    outputs: Tensor
    """[rows, padded outputs] float32"""
    values: Tensor
    grad_outputs: Tensor
    """[rows, A] float32"""
    grad_values: Tensor
    partials: Tensor
    """float32"""


class Pass(NamedTuple):
    """What the launches over one block of rows share."""

    spec: ActorCriticSpec
    plan: Plan
    arithmetic: Arithmetic
    buffers: Buffers
    x: Tensor
    """[rows, padded observations]"""
    M: int
    """rows without the padding"""
    accumulate: bool

    def outputs_of(self, layer: Layer) -> Tensor:
        """Where a hidden layer's outputs begin."""
        assert layer.above is not None
        return self.buffers.hidden[layer.above * self.plan.rows :]

    def inputs_of(self, layer: Layer) -> Tensor:
        """Where what a layer reads begins."""
        if layer.below is None:
            return self.x
        return self.buffers.hidden[layer.below * self.plan.rows :]

    def kept_of(self, units: int) -> Tensor:
        """Where what f' of a hidden layer is taken from begins."""
        buffers = self.buffers
        kept = buffers.hidden if buffers.derivatives is None else buffers.derivatives
        return kept[units * self.plan.rows :]

    def gap(self, one: int | None, other: int | None) -> int:
        """Entries from a network's hidden layer to the next network's."""
        return 0 if one is None or other is None else (other - one) * self.plan.rows

    @property
    def meta(self) -> dict[str, Any]:
        """Of every product."""
        return {"PRECISION": self.arithmetic.precision}


def _forward(run: Pass, layers: Sequence[Layer]) -> None:
    """One hidden layer, of one network or of two of equal shapes."""
    one, other = layers[0], layers[-1]
    tile = layer_tile(one.out, one.width, run.arithmetic.kind)
    derivatives = None
    if run.buffers.derivatives is not None:
        assert one.above is not None
        derivatives = run.kept_of(one.above)
    columns = one.out // tile.n
    programs, *turns = turns_of(run.plan.rows, tile, columns * len(layers), one.width)
    launch(
        products.layer_forward_kernel,
        (programs * columns, len(layers)),
        *(run.inputs_of(one), run.buffers.weights[one.weights :]),
        *(run.buffers.biases[one.biases :], run.outputs_of(one), derivatives),
        *(run.gap(one.below, other.below), other.weights - one.weights),
        *(other.biases - one.biases, run.gap(one.above, other.above), *turns),
        K=one.width,
        N=one.out,
        ACTIVATION=run.spec.activation,
        APPROXIMATE=run.arithmetic.approximate,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        **run.meta,
        **tile.options,
    )


def _heads_forward(run: Pass, layers: Sequence[Layer], first_net: int) -> None:
    one, other = layers[0], layers[-1]
    tile = layer_tile(one.out, one.width, run.arithmetic.kind)
    k = min(tile.k, 64)
    launch(
        products.heads_forward_kernel,
        (run.plan.rows // tile.m * (one.out // tile.n), len(layers)),
        *(run.inputs_of(one), run.buffers.weights[one.weights :]),
        *(run.buffers.biases[one.biases :], run.buffers.outputs, run.buffers.values, first_net),
        *(run.gap(one.below, other.below), other.weights - one.weights),
        other.biases - one.biases,
        A=run.spec.num_outputs,
        BOTH=len(run.plan.heads) == 1,
        K=one.width,
        N=one.out,
        BM=tile.m,
        BN=tile.n,
        BK=k,
        **run.meta,
        **tile.options | {"num_stages": 3},
    )


def _heads_backward(
    run: Pass, layers: Sequence[Layer], first_net: int, others: Tensor | None
) -> None:
    """The last layers' gradients, and g of the layer below in its place."""
    one, other = layers[0], layers[-1]
    if one.above is not None:
        tile = 64, side_of(one.out, 64)
        launch(
            products.heads_gradient_kernel,
            (run.plan.rows // tile[0] * (one.out // tile[1]), len(layers)),
            *(run.buffers.grad_outputs, run.buffers.grad_values, run.outputs_of(one), first_net),
            *(run.gap(one.above, other.above), run.M),
            A=run.spec.num_outputs,
            BOTH=len(run.plan.heads) == 1,
            N=one.out,
            BM=tile[0],
            BN=tile[1],
            num_warps=4,
        )
        _weights(run, layers)
        if one.below is not None:
            _backward(run, layers, False, others)
        return
    tile = heads_tile(one.out, one.width, run.arithmetic.kind)
    tiles = run.plan.rows // tile.m
    inputs = run.inputs_of(one)
    has_below = one.below is not None
    launch(
        products.heads_backward_kernel,
        (one.splits, one.width // tile.n, len(layers)),
        *(run.buffers.grad_outputs, run.buffers.grad_values),
        *(run.buffers.weights[one.weights :], inputs),
        *((run.kept_of(one.below or 0), inputs) if has_below else (None, None)),
        *(others, run.buffers.partials[one.partials :], first_net),
        *(other.weights - one.weights, run.gap(one.below, other.below)),
        *(other.partials - one.partials, run.M, triton.cdiv(tiles, one.splits), tiles),
        int(run.accumulate),
        A=run.spec.num_outputs,
        BOTH=len(run.plan.heads) == 1,
        K=one.out,
        N=one.width,
        ACTIVATION=run.spec.activation,
        BM=tile.m,
        BN=tile.n,
        **run.meta,
        **tile.options,
    )


def _weights(run: Pass, layers: Sequence[Layer]) -> None:
    """The gradient of a hidden layer's weights and biases."""
    one, other = layers[0], layers[-1]
    tile = weights_tile(one.out, one.width, run.arithmetic.kind)
    tiles = run.plan.rows // tile.k
    launch(
        products.layer_weights_kernel,
        (one.splits, one.out // tile.m * (one.width // tile.n), len(layers)),
        *(run.outputs_of(one), run.inputs_of(one), run.buffers.partials[one.partials :]),
        *(run.gap(one.above, other.above), run.gap(one.below, other.below)),
        *(other.partials - one.partials, triton.cdiv(tiles, one.splits), tiles),
        int(run.accumulate),
        OUT=one.out,
        IN=one.width,
        BR=tile.k,
        BO=tile.m,
        BI=tile.n,
        **run.meta,
        **tile.options,
    )


def _backward(run: Pass, layers: Sequence[Layer], raw: bool, others: Tensor | None) -> None:
    """g of what a hidden layer reads, in its place; or into `raw`."""
    one, other = layers[0], layers[-1]
    assert one.below is not None
    tile = layer_tile(one.width, one.out, run.arithmetic.kind)
    columns = one.width // tile.n
    programs, *turns = turns_of(run.plan.rows, tile, columns * len(layers), one.out)
    launch(
        products.layer_backward_kernel,
        (programs * columns, len(layers)),
        *(run.outputs_of(one), run.buffers.weights[one.weights :], run.kept_of(one.below)),
        *(run.buffers.raw if raw else run.inputs_of(one), others),
        *(run.gap(one.above, other.above), other.weights - one.weights),
        *(run.gap(one.below, other.below), *turns),
        K=one.out,
        N=one.width,
        ACTIVATION=run.spec.activation,
        RAW=raw,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        **run.meta,
        **tile.options,
    )


def _networks_forward(run: Pass) -> None:
    plan = run.plan
    for layer in plan.trunk:
        _forward(run, [layer])
    if plan.is_paired:
        for pair in zip(*plan.nets, strict=True):
            _forward(run, pair)
        _heads_forward(run, plan.heads, 0)
        return
    for net in plan.nets:
        for layer in net:
            _forward(run, [layer])
    for number, head in enumerate(plan.heads):
        _heads_forward(run, [head], number)


def _networks_backward(run: Pass) -> None:
    plan, raw = run.plan, run.buffers.raw
    if plan.is_paired:
        _heads_backward(run, plan.heads, 0, None)
        pairs = tuple(zip(*plan.nets, strict=True))
        for number in range(len(pairs) - 1, -1, -1):
            _weights(run, pairs[number])
            if number:
                _backward(run, pairs[number], False, None)
        if plan.trunk:
            _backward(run, plan.nets[0][:1], True, None)
            _backward(run, plan.nets[1][:1], False, raw)
    elif len(plan.heads) == 1:
        _heads_backward(run, plan.heads, 0, None)
    else:
        # A last layer that reads the shared features itself comes after the other network.
        order = sorted((0, 1), key=lambda net: not plan.nets[net])
        for turn, net in enumerate(order):
            others = raw if turn else None
            layers = plan.nets[net]
            is_direct = not layers
            _heads_backward(run, [plan.heads[net]], net, others if is_direct else None)
            for number in range(len(layers) - 1, -1, -1):
                _weights(run, [layers[number]])
                if number:
                    _backward(run, [layers[number]], False, None)
                elif plan.trunk:
                    _backward(run, [layers[0]], turn == 0, others)
    for number in range(len(plan.trunk) - 1, -1, -1):
        _weights(run, [plan.trunk[number]])
        if number:
            _backward(run, [plan.trunk[number]], False, None)


def _gathered(
    x: Tensor,
    obs: Tensor,
    index: Tensor | None,
    M: int,
    rows: Rows,
    actions: Tensor,
    legal: Tensor | None,
) -> tuple[Rows, Tensor, Tensor | None]:
    """Fill `x`; return the other tensors by row, of the minibatch's rows only."""
    N, D = obs.shape
    WIDTH, BM = x.shape[1], 64
    sources, targets = Rows(*[None] * len(rows))._replace(mask=rows.mask), Rows(*[None] * len(rows))
    moved, moved_legal = actions, legal
    if index is not None:
        sources = rows._replace(new_values=None)
        targets = Rows(*(None if row is None else row.new_empty(M) for row in sources))
        moved = actions.new_empty(M, actions.shape[1])
        moved_legal = None if legal is None else legal.new_empty(M, legal.shape[1])
    launch(
        products.gather_kernel,
        (x.shape[0] // BM,),
        *(obs, index, sources, None if index is None else actions),
        *(None if index is None else legal, x, targets, None if index is None else moved),
        *(None if index is None else moved_legal, mark_of(obs.device), N, M, obs.stride(0)),
        ACTION_STRIDE=actions.stride(0),
        ACTIONS=actions.shape[1],
        LEGAL_STRIDE=0 if legal is None else legal.stride(0),
        LEGAL=0 if legal is None else legal.shape[1],
        D=D,
        WIDTH=WIDTH,
        BM=BM,
        BC=side_of(WIDTH, 64),
        num_warps=4,
    )
    return (rows if index is None else targets), moved, moved_legal


def _outputs(
    parameters: Tensor,
    gradients: Tensor,
    obs_size: int,
    shared_sizes: Sequence[int],
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
    sizes = (obs_size, shared_sizes, actor_sizes, critic_sizes, num_outputs, activation, head_sizes)
    packed = plan_of(_spec(*sizes, squash), 1, "ieee").packed
    square_sums = loss.new_empty(packed // products.PADDING.value)
    return loss, loss.new_empty(len(PPO_STATS)), square_sums


def _spec(
    obs_size: int,
    shared_sizes: Sequence[int],
    actor_sizes: Sequence[int],
    critic_sizes: Sequence[int],
    num_outputs: int,
    activation: str,
    head_sizes: Sequence[int],
    squash: bool,
) -> ActorCriticSpec:
    hidden = tuple(shared_sizes), tuple(actor_sizes), tuple(critic_sizes)
    heads = tuple(head_sizes) or None
    return ActorCriticSpec(obs_size, *hidden, num_outputs, activation, heads, squash)


def _arithmetic(dtype: torch.dtype, device: torch.device) -> Arithmetic:
    is_half = dtype.itemsize == 2
    in_tf32 = not is_half and takes_tf32()
    is_nvidia = not INTERPRETED and torch.version.hip is None
    approximate = 2 if (is_half or in_tf32) and is_nvidia else 0
    return Arithmetic(dtype, "tf32" if in_tf32 else "ieee", approximate, is_roomy(device))


def takes_tf32() -> bool:
    """Whether torch computes products of float32 so."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        # Once this is set, torch 2.9 and later refuse to read the older flag.
        return str(matmul.fp32_precision) == "tf32"
    return bool(matmul.allow_tf32)


@functools.lru_cache
def is_roomy(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


@opaque(_outputs, mutates=("gradients",))
def _layerwise_loss_and_grads(
    parameters: Tensor,
    gradients: Tensor,
    obs_size: int,
    shared_sizes: Sequence[int],
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
    sizes = (obs_size, shared_sizes, actor_sizes, critic_sizes, num_outputs, activation, head_sizes)
    spec = _spec(*sizes, squash)
    arithmetic = _arithmetic(matmul_dtype, obs.device)
    M, A = obs.shape[0] if index is None else index.shape[0], num_outputs
    p = plan_of(spec, M, arithmetic.kind)
    blocks = triton.cdiv(M, p.rows)
    loss = parameters.new_empty((), dtype=torch.float32)
    stats, inv_n = loss.new_empty(len(PPO_STATS)), loss.new_empty(())
    programs = p.packed // products.PADDING.value
    square_sums = loss.new_empty(programs)
    buffers = Buffers(
        x=loss.new_empty(blocks * p.rows, pitch_of(obs_size), dtype=matmul_dtype),
        weights=loss.new_empty(p.weights, dtype=matmul_dtype),
        biases=loss.new_empty(p.packed - p.weights),
        hidden=loss.new_empty(p.units * p.rows, dtype=matmul_dtype),
        derivatives=loss.new_empty(p.units * p.rows, dtype=matmul_dtype)
        if activation == "silu"
        else None,
        raw=loss.new_empty(p.rows, p.trunk[-1].out) if p.trunk and len(p.heads) == 2 else None,
        outputs=loss.new_empty(p.rows, p.heads[0].out),
        values=loss.new_empty(p.rows),
        grad_outputs=loss.new_empty(p.rows, A),
        grad_values=loss.new_empty(p.rows),
        partials=loss.new_empty(p.partials),
    )
    flat_of, places = tables_of(spec, p, obs.device)
    BLOCK = 1024
    launch(
        products.pack_kernel,
        (triton.cdiv(p.packed, BLOCK),),
        *(parameters, flat_of, buffers.weights, buffers.biases, p.weights, p.packed),
        BLOCK=BLOCK,
        num_warps=4,
    )
    named, actions, legal = _gathered(buffers.x, obs, index, M, Rows(*rows), actions, action_mask)
    if norm_adv and moments is None and blocks > 1:
        whitened = masked_whiten(named.advantages, named.mask, eps=ADVANTAGE_EPS.value)
        named, norm_adv = named._replace(advantages=whitened), False
    options = moments, numbers, tensors, vf_clipped, 3, norm_adv
    terms = prepared(named._replace(new_values=buffers.values), *options)

    counts = [min(p.rows, M - start) for start in range(0, max(M, 1), p.rows)]
    if head_sizes:
        shares = [_heads.tiles_of_heads(count, head_sizes).programs for count in counts]
    else:
        shares = [_heads.tiles_of_gaussian(count, A).programs for count in counts]
    totals = _heads.Totals(
        partials=loss.new_empty(sum(shares), 16),
        log_std_partials=None if head_sizes else loss.new_empty(sum(shares), A),
        ticket=ticket_for(loss),
        loss=loss,
        stats=stats,
        inv_n=inv_n,
        programs=sum(shares),
    )
    log_std = None if head_sizes else parameters[:A]
    # From the last block to the first, which is what `Totals` asks for.
    for number in range(len(counts) - 1, -1, -1):
        start, count = number * p.rows, counts[number]
        run = Pass(
            *(spec, p, arithmetic, buffers, buffers.x[start : start + p.rows], count),
            accumulate=number < len(counts) - 1,
        )
        if count:
            _networks_forward(run)
        own = slice(start, start + count)
        _loss(run, terms, own, actions, legal, log_std, _share(totals, sum(shares[:number])))
        if count:
            _networks_backward(run)
    if M == 0:
        gradients.zero_()
        square_sums.zero_()
        return loss, stats, square_sums
    launch(
        products.gradients_kernel,
        (programs,),
        *(buffers.partials, places, flat_of, inv_n, gradients, square_sums),
        num_warps=4,
    )
    return loss, stats, square_sums


def _share(totals: _heads.Totals, first: int) -> _heads.Totals:
    log_std_partials = totals.log_std_partials
    if log_std_partials is not None:
        log_std_partials = log_std_partials[first:]
    return totals._replace(partials=totals.partials[first:], log_std_partials=log_std_partials)


def _loss(
    run: Pass,
    terms: Prepared,
    own: slice,
    actions: Tensor,
    legal: Tensor | None,
    log_std: Tensor | None,
    totals: _heads.Totals,
) -> None:
    """n d loss / d outputs and values of a block of rows, and its share of the sums."""
    buffers, A, count = run.buffers, run.spec.num_outputs, own.stop - own.start
    values = buffers.values[:count]
    of_rows = Rows(*(None if row is None else row[own] for row in terms.rows))
    terms = terms._replace(rows=of_rows._replace(new_values=values))
    outputs, grads = buffers.outputs[:count, :A], (buffers.grad_outputs, buffers.grad_values)
    if log_std is None:
        assert run.spec.head_sizes is not None
        block_legal = None if legal is None else legal[own]
        options = run.spec.head_sizes, 1.0, terms, *grads, totals
        _heads.launch_categorical(outputs, actions[own], block_legal, *options)
    else:
        grad_log_std = buffers.partials[run.plan.log_std_partials :]
        options = run.spec.squash, terms, grads[0], grad_log_std, grads[1], totals
        _heads.launch_gaussian(outputs, log_std, actions[own], *options)


def layerwise_loss_and_grads(
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

    Observations of masked rows are never read. The gradient's sums of squares are left as
    `workspace.square_sums`.
    """
    terms = packed(
        old_log_probs=old_log_probs,
        advantages=advantages,
        values=old_values,  # stands in for the values, which come block by block
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
    rows = list(terms.rows)
    rows[Rows._fields.index("new_values")] = None
    loss, stats, square_sums = _layerwise_loss_and_grads(
        parameters.detach(),
        gradients,
        spec.obs_size,
        list(spec.shared_sizes),
        list(spec.actor_sizes),
        list(spec.critic_sizes),
        spec.num_outputs,
        spec.activation,
        list(spec.head_sizes or ()),
        spec.squash,
        as_rows(obs.detach()),
        (actions.unsqueeze(1) if actions.ndim == 1 else as_rows(actions.detach())).contiguous(),
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


def beyond_layers(spec: ActorCriticSpec) -> str | None:
    """Say why the networks cannot be computed here, or None if they can."""
    if spec.obs_size < 1:
        return "observations without numbers have no kernel"
    if not 1 <= spec.num_outputs < MOST_OUTPUTS:
        return f"{spec.num_outputs} outputs have no kernel; {MOST_OUTPUTS - 1} are the most"
    return None
