"""A minibatch of an MLP actor-critic in one kernel: forward, PPO loss and backward of both networks.

Programs (p, net) take tiles of BM rows in turn; nothing but partial sums leaves a multiprocessor.
With h_0 = x the observations, f the activation and z the last layer's outputs,

    h_i = f(h_{i-1} W_i^T + b_i),   dW_i = g_i^T h_{i-1},   db_i = sum of g_i,
    g_{i-1} = (g_i W_i) f'(h_{i-1}),   g of the last layer = n d loss / d z,

where the division by n waits until all is added up, so that 16-bit operands keep small gradients.

What the shapes here are owed to (measured by compiling, benchmarks/aot.py):

- Weights are read before the loop and stay in shared memory; their gradients stay in registers.
- A bias added as a row of numbers would stay in registers, broadcast to the layout of the products,
  at a quarter of a register a unit and layer. The first layer's is a column of ones in x instead;
  the others are read again for every tile, from an address that only we know to stay the same: the
  compiler would lift the load out, and would keep useless copies of a volatile one.
- A sum of g over the rows costs shuffles and barriers, a product with ones does not.
- An `if` on a runtime value around products inside the loop stops the compiler: the network is
  chosen outside of it, at the price of two copies of the code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ppo_fast.kernels._activations import activated, through
from ppo_fast.kernels._heads import HALF_LOG_2PI
from ppo_fast.kernels._launch import INTERPRETED, LN2, LOG2E, number
from ppo_fast.kernels._softmax import (
    entropy_of,
    log_prob_of,
    softmax_gradient,
    softmax_of_tile,
)
from ppo_fast.kernels._surrogate import (
    ALL,
    ILLEGAL,
    advantage_whitening,
    store_sums,
    surrogate,
    value_terms,
)

IN_INTERPRETER = tl.constexpr(INTERPRETED)

LARGEST = tl.constexpr(6.0e4)
"""Entries of n d loss / d z are held below this where products take float16, which ends at 65504."""

OUT_OF_HEAD, OUT_OF_ROWS = tl.constexpr(3), tl.constexpr(4)
"""Keys of `ppo_fast.device_errors.ERRORS`."""

VALUE, CATEGORICAL, GAUSSIAN, SQUASHED = (tl.constexpr(kind) for kind in range(4))
"""What a network's outputs are: the first is the critic's one."""

COLUMN_BY_COLUMN = tl.constexpr(16)
"""What belongs to so many outputs or fewer is read into the layout of the products column by column:
as a tile it takes one of its own, and barriers to change it, and so does all that follows."""

ONES = tl.constexpr(16)
"""Rows of ones whose product with g is its sum: the fewest that a product takes."""


@triton.jit
def _operand(x, DTYPE: tl.constexpr):
    if IN_INTERPRETER and tl.bfloat16 == DTYPE:
        # It has no arithmetic for bfloat16, and truncates where a GPU rounds to nearest.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + (((bits >> 16) & 1) + 0x7FFF)) & -65536
        y = bits.to(tl.float32, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def _categorical(
    z,
    at,
    keep,
    actions,
    action_mask,
    mark,
    HEADS: tl.constexpr,
    A: tl.constexpr,
    ACTION_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
):
    """`(log_prob, entropy)` [BM] of logits z [BM, W]; z, illegal ones -inf; and of each head more."""
    column = tl.arange(0, z.shape[1])
    if action_mask is not None:
        legal = action_mask + at * MASK_STRIDE
        if A <= COLUMN_BY_COLUMN:
            for i in tl.static_range(A):
                is_legal = tl.load(legal + i, mask=keep, other=True)
                z = tl.where((column == i)[None, :] & (is_legal == 0)[:, None], float("-inf"), z)
        else:
            entry = legal[:, None] + column[None, :]
            is_legal = tl.load(entry, mask=keep[:, None] & (column < A)[None, :], other=True)
            z = tl.where(is_legal, z, float("-inf"))
    log_probs = tl.zeros((z.shape[0],), tl.float32)
    entropy = tl.zeros((z.shape[0],), tl.float32)
    heads = ()
    for i in tl.static_range(len(HEADS)):
        own = (column >= HEADS[i][0]) & (column < HEADS[i][0] + HEADS[i][1])
        x = tl.where(own[None, :], z, float("-inf"))
        action = tl.load(actions + at * ACTION_STRIDE + i, mask=keep, other=0)
        known = (action >= 0) & (action < HEADS[i][1])
        tl.store(mark + tl.zeros_like(at), OUT_OF_HEAD, mask=keep & (known == 0))
        taken = HEADS[i][0] + action.to(tl.int32)
        m, l, s = softmax_of_tile(x, LOG2E, True)
        of_taken = tl.sum(tl.where(column[None, :] == taken[:, None], x, 0.0), 1)
        log_prob = tl.maximum(log_prob_of(of_taken, m, l, 1.0), ILLEGAL, propagate_nan=ALL)
        log_probs += tl.where(known, log_prob, float("nan"))
        entropy += entropy_of(l, s)
        heads += ((m, l, s, taken),)
    return log_probs, entropy, z, heads


@triton.jit
def _categorical_gradient(z, heads, g, bonus, HEADS: tl.constexpr, ENTROPY: tl.constexpr):
    """g d log p(action) / d z + bonus d (-H) / d z, [BM, W]; `bonus` counts with ENTROPY only."""
    column = tl.arange(0, z.shape[1])[None, :]
    dz = tl.zeros_like(z)
    for i in tl.static_range(len(HEADS)):
        m, l, s, taken = heads[i]
        inv_l = 1.0 / tl.where(l < 1.0, 1.0, l)
        slope = bonus * LN2 * inv_l
        offset = -(g + slope * s) * inv_l
        of_head = softmax_gradient(z, m[:, None], LOG2E, offset[:, None], slope[:, None], ENTROPY)
        of_head += tl.where(column == taken[:, None], g[:, None], 0.0)
        own = (column >= HEADS[i][0]) & (column < HEADS[i][0] + HEADS[i][1])
        dz = tl.where(own, of_head, dz)
    return dz


@triton.jit
def _gaussian(
    z,
    at,
    keep,
    actions,
    log_std,
    sum_log_std,
    A: tl.constexpr,
    ACTION_STRIDE: tl.constexpr,
    SQUASH: tl.constexpr,
):
    """`(log_prob, entropy)` [BM] of means z [BM, W], and (actions - z) / std and 1 / std."""
    column = tl.arange(0, z.shape[1])
    if A <= COLUMN_BY_COLUMN:
        u = tl.zeros_like(z)
        for i in tl.static_range(A):
            of_column = tl.load(actions + at * ACTION_STRIDE + i, mask=keep, other=0.0)
            u = tl.where((column == i)[None, :], of_column.to(tl.float32)[:, None], u)
    else:
        entry = actions + (at * ACTION_STRIDE)[:, None] + column[None, :]
        is_entry = keep[:, None] & (column < A)[None, :]
        u = tl.load(entry, mask=is_entry, other=0.0).to(tl.float32)
    s = tl.load(log_std + column, mask=column < A, other=0.0).to(tl.float32)
    inv_std = tl.exp2(-s * LOG2E)[None, :]
    # Columns beyond the last have z, u and s of 0.
    distance = (u - z) * inv_std
    total = -0.5 * distance * distance
    if SQUASH:
        # log (1 - tanh(u)^2) = 2 (log 2 - |u| - log(1 + exp(-2 |u|)))
        size = tl.abs(u)
        total += 2.0 * (size + tl.log(1.0 + tl.exp2(size * (-2.0 * LOG2E))) - LN2)
    log_probs = tl.sum(total, 1) - (sum_log_std + A * HALF_LOG_2PI)
    if SQUASH:
        entropy = -log_probs
    else:
        entropy = tl.zeros_like(log_probs) + (sum_log_std + A * (HALF_LOG_2PI + 0.5))
    return log_probs, entropy, distance, inv_std


@triton.jit
def _added(sums, terms, entropy, keep, ACTOR: tl.constexpr, COUNT: tl.constexpr):
    """A program's sums, row by row, with those of another tile; the other network's stay as they are.

    In the order that `store_sums` takes, then the entropy and, with COUNT, the number of rows.
    """
    count = sums[11]
    if COUNT:
        count += keep.to(tl.float32)
    if ACTOR:
        total = (
            sums[0] + terms[0],
            sums[1],
            sums[2],
            sums[3] + terms[3],
            sums[4] + terms[4],
            sums[5] + terms[5],
            sums[6] + terms[6],
            sums[7],
            sums[8] + terms[8],
            tl.maximum(sums[9], terms[9], propagate_nan=ALL),
            sums[10] + entropy,
            count,
        )
    else:
        total = (
            sums[0],
            sums[1] + terms[0],
            sums[2],
            sums[3],
            sums[4],
            sums[5],
            sums[6],
            sums[7] + terms[1],
            sums[8],
            sums[9],
            sums[10],
            sums[11],
        )
    return total


@triton.jit
def _weight(parameters, LAYERS: tl.constexpr, I: tl.constexpr):
    """A layer's weight [out, in], zeros around it; layers are as in `_network`."""
    out = tl.arange(0, LAYERS[I][3])[:, None]
    column = tl.arange(0, LAYERS[I][4])[None, :]
    inside = (out < LAYERS[I][1]) & (column < LAYERS[I][2])
    entry = parameters + LAYERS[I][0] + out * LAYERS[I][2] + column
    if LAYERS[I][5]:
        # The bias where x is 1.
        is_bias = (column == LAYERS[I][2]) & (out < LAYERS[I][1])
        entry = tl.where(
            is_bias, parameters + LAYERS[I][0] + LAYERS[I][1] * LAYERS[I][2] + out, entry
        )
        inside = inside | is_bias
    return tl.load(entry, mask=inside, other=0.0)


@triton.jit
def _no_gradients(LAYERS: tl.constexpr, I: tl.constexpr):
    """Zeros for a layer's weight [in, out], and for ONES rows of its bias."""
    IN: tl.constexpr = LAYERS[I][4]
    OUT: tl.constexpr = LAYERS[I][3]
    return tl.zeros((IN, OUT), tl.float32), tl.zeros((ONES, OUT), tl.float32)


@triton.jit
def _store_weight(partials, dw, LAYERS: tl.constexpr, I: tl.constexpr):
    """Write a gradient [in, out] where the layer's weight lies."""
    column = tl.arange(0, LAYERS[I][4])[:, None]
    out = tl.arange(0, LAYERS[I][3])[None, :]
    inside = (out < LAYERS[I][1]) & (column < LAYERS[I][2])
    entry = partials + LAYERS[I][0] + out * LAYERS[I][2] + column
    if LAYERS[I][5]:
        is_bias = (column == LAYERS[I][2]) & (out < LAYERS[I][1])
        entry = tl.where(
            is_bias, partials + LAYERS[I][0] + LAYERS[I][1] * LAYERS[I][2] + out, entry
        )
        inside = inside | is_bias
    tl.store(entry, dw, mask=inside)


@triton.jit
def _bias(parameters, LAYERS: tl.constexpr, I: tl.constexpr):
    """A layer's bias [out], zeros behind it."""
    column = tl.arange(0, LAYERS[I][3])
    entry = parameters + LAYERS[I][0] + LAYERS[I][1] * LAYERS[I][2] + column
    return tl.load(entry, mask=column < LAYERS[I][1], other=0.0)


@triton.jit
def _network(
    parameters,
    obs,
    actions,
    action_mask,
    index,
    rows,
    numbers,
    shift,
    scale,
    mark,
    partials,  # this program's row of the partial gradients
    sums_out,  # [2 programs, 16]
    N,
    M,
    tiles,
    zero,
    LAYERS: tl.constexpr,  # of each: (offset, out, in, out and in padded, whether x has ones)
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    READ: tl.constexpr,  # columns of obs that are there: D, or up to the next multiple of 4
    OBS_STRIDE: tl.constexpr,
    ACTION_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    VF_CLIPPED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BM: tl.constexpr,
):
    """One network on the program's tiles of rows."""
    L: tl.constexpr = len(LAYERS) - 1
    D: tl.constexpr = LAYERS[0][2]
    A: tl.constexpr = LAYERS[L][1]
    W: tl.constexpr = LAYERS[L][3]
    program, programs = tl.program_id(0), tl.num_programs(0)
    feature = tl.arange(0, LAYERS[0][4])[None, :]
    place = tl.arange(0, W)
    ones = tl.full((ONES, BM), 1.0, tl.float32)
    ones = _operand(ones, DTYPE)

    ws, dws, dbs = (), (), ()  # of the gradients the last layer's comes first
    for i in tl.static_range(L + 1):
        ws += (_operand(_weight(parameters, LAYERS, i), DTYPE),)
        no_dw, _ = _no_gradients(LAYERS, L - i)
        dws += (no_dw,)
        if i < L:
            _, no_db = _no_gradients(LAYERS, L - 1 - i)
            dbs += (no_db,)
    # Of few outputs each thread adds up its own rows: that takes no barrier.
    PER_ROW: tl.constexpr = W == 16
    R: tl.constexpr = BM if PER_ROW else ONES
    db = tl.zeros((R, W), tl.float32)
    d_log_std = tl.zeros((R, W), tl.float32)
    sums = (tl.zeros((BM,), tl.float32),) * 12
    if KIND >= GAUSSIAN:
        sum_log_std = tl.sum(tl.load(parameters + place, mask=place < A, other=0.0), 0)

    for tile in range(tiles):
        again = parameters + tile * zero
        position = (program + tile * programs) * BM + tl.arange(0, BM)
        inside = position < M
        at = position.to(tl.int64)
        exists = inside
        if index is not None:
            at = tl.load(index + position, mask=inside, other=0).to(tl.int64)
            # Negative ones are the largest of all without a sign.
            exists = inside & (at.to(tl.uint64) < tl.cast(N, tl.uint64))
            tl.store(mark + tl.zeros_like(at), OUT_OF_ROWS, mask=inside & (exists == 0))
        keep = inside
        if rows.mask is not None:
            keep = inside & tl.load(rows.mask + at, mask=exists, other=True)
        # What a masked row holds is not read: 0 times NaN would be NaN.
        is_entry = (keep & exists)[:, None] & (feature < READ)
        x = tl.load(obs + (at * OBS_STRIDE)[:, None] + feature, mask=is_entry, other=0.0)
        if READ > D:
            x = tl.where(feature < D, x, 0.0)
        if LAYERS[0][5]:
            x = tl.where(feature == D, 1.0, x)
        h = _operand(x, DTYPE)
        inputs, kepts = (h,), ()
        for i in tl.static_range(L):
            a = tl.dot(h, tl.trans(ws[i]), input_precision=PRECISION)
            if not LAYERS[i][5]:
                a += _bias(again, LAYERS, i)[None, :]
            y, kept = activated(a, ACTIVATION, APPROXIMATE)
            h = _operand(y, DTYPE)
            inputs += (h,)
            kepts += (_operand(kept, DTYPE),)
        z = tl.dot(h, tl.trans(ws[L]), input_precision=PRECISION)
        z += _bias(again, LAYERS, L)[None, :]

        if KIND == VALUE:
            value = tl.sum(tl.where((place == 0)[None, :], z, 0.0), 1)
            value = tl.where(exists | (inside == 0), value, float("nan"))
            terms = value_terms(value, at, exists, keep, rows, numbers, VF_CLIPPED)
            g = terms[2]
            dz = tl.where((place == 0)[None, :], g[:, None], 0.0)
            entropy = g
        else:
            if KIND == CATEGORICAL:
                log_probs, entropy, z, heads = _categorical(
                    z,
                    at,
                    keep & exists,
                    actions,
                    action_mask,
                    mark,
                    HEADS,
                    A,
                    ACTION_STRIDE,
                    MASK_STRIDE,
                )
            else:
                log_probs, entropy, distance, inv_std = _gaussian(
                    z,
                    at,
                    keep & exists,
                    actions,
                    again,
                    sum_log_std,
                    A,
                    ACTION_STRIDE,
                    KIND == SQUASHED,
                )
            log_probs = tl.where(exists | (inside == 0), log_probs, float("nan"))
            terms = surrogate(
                log_probs, at, exists, keep, rows, numbers, shift, scale, VF_CLIPPED, 3
            )
            g = terms[10]
            entropy = tl.where(keep, entropy, 0.0) * terms[12]
            bonus = tl.zeros_like(g)
            if numbers.ent_coef is not None:
                bonus = number(numbers.ent_coef) * terms[12]
            if KIND == CATEGORICAL:
                dz = _categorical_gradient(z, heads, g, bonus, HEADS, numbers.ent_coef is not None)
            else:
                if KIND == SQUASHED:
                    # The entropy is minus the log-prob.
                    g += bonus
                    bonus = tl.zeros_like(g)
                dz = g[:, None] * distance * inv_std
                pull = (distance * distance - 1.0) * g[:, None] - bonus[:, None]
                if PER_ROW:
                    d_log_std += pull
                else:
                    pull = _operand(pull, DTYPE)
                    d_log_std = tl.dot(ones, pull, d_log_std, input_precision=PRECISION)
        sums = _added(sums, terms, entropy, keep, KIND != VALUE, rows.mask is not None)
        if tl.float16 == DTYPE:
            dz = tl.clamp(dz, -LARGEST, LARGEST, propagate_nan=ALL)
        g = _operand(dz, DTYPE)
        if PER_ROW:
            db += dz
        else:
            db = tl.dot(ones, g, db, input_precision=PRECISION)
        new_dws = (tl.dot(tl.trans(h), g, dws[0], input_precision=PRECISION),)
        new_dbs = ()
        for k in tl.static_range(L):
            below = tl.dot(g, ws[L - k], input_precision=PRECISION)
            g = _operand(through(below, kepts[L - 1 - k], ACTIVATION), DTYPE)
            inputs_t = tl.trans(inputs[L - 1 - k])
            new_dws += (tl.dot(inputs_t, g, dws[k + 1], input_precision=PRECISION),)
            if LAYERS[L - 1 - k][5]:
                new_dbs += (dbs[k],)
            else:
                new_dbs += (tl.dot(ones, g, dbs[k], input_precision=PRECISION),)
        dws, dbs = new_dws, new_dbs

    for i in tl.static_range(L + 1):
        _store_weight(partials, dws[L - i], LAYERS, i)
        if i < L:
            if not LAYERS[i][5]:
                # All its rows are alike.
                column = tl.arange(0, LAYERS[i][3])
                sum_g = tl.sum(dbs[L - 1 - i], 0) * (1.0 / ONES)
                bias = partials + LAYERS[i][0] + LAYERS[i][1] * LAYERS[i][2] + column
                tl.store(bias, sum_g, mask=column < LAYERS[i][1])
    share: tl.constexpr = 1.0 if PER_ROW else 1.0 / ONES
    bias = partials + LAYERS[L][0] + LAYERS[L][1] * LAYERS[L][2] + place
    tl.store(bias, tl.sum(db, 0) * share, mask=place < A)
    if KIND >= GAUSSIAN:
        tl.store(partials + place, tl.sum(d_log_std, 0) * share, mask=place < A)
    if KIND == VALUE:
        program += programs
    store_sums(sums_out, program, sums, sums[10], sums[11], rows, numbers)


@triton.jit(do_not_specialize=["N", "M", "tiles", "parts", "pitch", "zero"])
def actor_critic_step_kernel(
    parameters,
    obs,
    actions,
    action_mask,
    index,
    rows,
    moments,
    parts,
    numbers,
    mark,
    partials,  # [programs, pitch]: gradients times n, laid out as the parameters
    sums,  # [2 programs, 16]: the actors' `store_sums`, then the critics'
    N,
    M,
    tiles,
    pitch,
    zero,
    ACTOR: tl.constexpr,  # LAYERS of `_network`
    CRITIC: tl.constexpr,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    READ: tl.constexpr,
    OBS_STRIDE: tl.constexpr,
    ACTION_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    NORM: tl.constexpr,
    VF_CLIPPED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BM: tl.constexpr,
):
    own = partials + tl.program_id(0).to(tl.int64) * pitch
    if tl.program_id(1) == 0:
        shift, scale = advantage_whitening(rows, moments, parts, M, NORM, 1024, index, N)
        _network(
            parameters,
            obs,
            actions,
            action_mask,
            index,
            rows,
            numbers,
            shift,
            scale,
            mark,
            own,
            sums,
            N,
            M,
            tiles,
            zero,
            ACTOR,
            KIND,
            HEADS,
            ACTIVATION,
            READ,
            OBS_STRIDE,
            ACTION_STRIDE,
            MASK_STRIDE,
            VF_CLIPPED,
            DTYPE,
            PRECISION,
            APPROXIMATE,
            BM,
        )
    else:
        _network(
            parameters,
            obs,
            actions,
            action_mask,
            index,
            rows,
            numbers,
            (0.0, 0.0),
            1.0,
            mark,
            own,
            sums,
            N,
            M,
            tiles,
            zero,
            CRITIC,
            VALUE,
            HEADS,
            ACTIVATION,
            READ,
            OBS_STRIDE,
            ACTION_STRIDE,
            MASK_STRIDE,
            VF_CLIPPED,
            DTYPE,
            PRECISION,
            APPROXIMATE,
            BM,
        )
