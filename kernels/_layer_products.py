"""The products of an MLP actor-critic layer by layer, with what stands around them fused in.

With h_0 = x the observations, f the activation and z the last layer's outputs,

    h_i = f(h_{i-1} W_i^T + b_i),   dW_i = g_i^T h_{i-1},   db_i = sum of g_i,
    g_{i-1} = (g_i W_i) f'(h_{i-1}),   g of the last layer = n d loss / d z.

All matrices are padded: widths to `pitch`, rows to whole tiles, with zeros in the weights and in the
observations. Every activation maps 0 to 0, so the padding stays 0 in the hidden layers and adds
nothing; only where tensors of the caller are read or written is there a mask. Operands are in
`matmul_dtype`, sums in float32. A second network of equal shapes lies a fixed number of entries
behind the first and is a second index of the grid.

Sums over the rows are cut into a fixed number of splits, which a program each adds up, block of rows
after block of rows; `gradients_kernel` adds the splits in their order. Nothing is atomic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ppo_fast.kernels._activations import activated, through
from ppo_fast.kernels._actor_critic_step import IN_INTERPRETER, LARGEST, OUT_OF_ROWS
from ppo_fast.kernels._launch import INTERPRETED
from ppo_fast.kernels._surrogate import ALL

PADDING = tl.constexpr(1024 if INTERPRETED else 256)
"""Parameters a program of `gradients_kernel` adds up; each layer's begin at a multiple of it."""


@triton.jit
def _moved(source, target, row, at, inside):
    if source is not None:
        tl.store(target + at, tl.load(source + row, mask=inside, other=0), mask=inside)


@triton.jit
def _moved_columns(
    source, target, row, at, inside, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr
):
    if source is not None:
        for start in range(0, COLUMNS, BC):
            column = (start + tl.arange(0, BC))[None, :]
            own = inside[:, None] & (column < COLUMNS)
            entries = tl.load(source + (row * STRIDE)[:, None] + column, mask=own, other=0)
            tl.store(target + (at * COLUMNS)[:, None] + column, entries, mask=own)


@triton.jit(do_not_specialize=["N", "M"])
def gather_kernel(
    obs,  # [N, D], rows `stride` apart
    index,  # [M], or None: all rows in order
    rows,  # _surrogate.Rows of [N]; without an index only its mask is looked at
    actions,  # [N, ACTIONS], or None
    legal,  # [N, LEGAL], or None
    x,  # [padded M, WIDTH]
    rows_out,  # as `rows`, [M]
    actions_out,
    legal_out,
    mark,
    N,
    M,
    stride,
    ACTION_STRIDE: tl.constexpr,
    ACTIONS: tl.constexpr,
    LEGAL_STRIDE: tl.constexpr,
    LEGAL: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """A minibatch's observations as an operand, and with an index all else that it has by row.

    Masked rows and the padding are 0. A row out of range becomes NaN and leaves a mark.
    """
    at = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = at < M
    row = at
    known = inside
    if index is not None:
        row = tl.load(index + at, mask=inside, other=0).to(tl.int64)
        known = (row >= 0) & (row < N)
        tl.store(mark + tl.zeros_like(row).to(tl.int32), OUT_OF_ROWS, mask=known == 0)
        row = tl.where(known, row, 0)
    keep = inside
    if rows.mask is not None:
        keep = tl.load(rows.mask + row, mask=inside, other=False)
    for start in range(0, WIDTH, BC):
        column = (start + tl.arange(0, BC))[None, :]
        own = keep[:, None] & (column < D)
        entries = tl.load(obs + (row * stride)[:, None] + column, mask=own, other=0.0)
        if index is not None:
            entries = tl.where(known[:, None], entries, float("nan"))
        tl.store(x + (at * WIDTH)[:, None] + column, entries.to(x.dtype.element_ty))
    if index is not None:
        _moved(rows.old_log_probs, rows_out.old_log_probs, row, at, inside)
        _moved(rows.advantages, rows_out.advantages, row, at, inside)
        _moved(rows.old_values, rows_out.old_values, row, at, inside)
        _moved(rows.returns, rows_out.returns, row, at, inside)
        _moved(rows.mask, rows_out.mask, row, at, inside)
        _moved(rows.weights, rows_out.weights, row, at, inside)
        _moved_columns(actions, actions_out, row, at, inside, ACTION_STRIDE, ACTIONS, BC)
        _moved_columns(legal, legal_out, row, at, inside, LEGAL_STRIDE, LEGAL, BC)


@triton.jit(do_not_specialize=["weights_size", "size"])
def pack_kernel(
    parameters,
    flat_of,  # [size]: where in `parameters` an entry comes from; -1: nowhere, it is 0
    weights,  # [weights_size]
    biases,  # [size - weights_size] float32
    weights_size,
    size,
    BLOCK: tl.constexpr,
):
    """The parameters as the products read them: padded, the weights as operands."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    flat = tl.load(flat_of + at, mask=at < size, other=-1)
    entries = tl.load(parameters + flat, mask=flat >= 0, other=0.0)
    tl.store(weights + at, entries.to(weights.dtype.element_ty), mask=at < weights_size)
    tl.store(biases + (at - weights_size), entries, mask=(at >= weights_size) & (at < size))


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if IN_INTERPRETER:
        # It has no arithmetic for bfloat16; products of rounded numbers are the same in float32.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _times_transposed(
    inputs,  # [rows, K]
    weights,  # [N, K]
    row,
    column,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """Entries (row, column) of `inputs @ weights.T`."""
    inner = tl.arange(0, BK)[None, :]
    a = inputs + (row * K)[:, None] + inner
    b = weights + (column * K)[:, None] + inner
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for _ in range(0, K, BK):
        total = _dot(tl.load(a), tl.trans(tl.load(b)), total, PRECISION)
        a += BK
        b += BK
    return total


@triton.jit
def _store_activated(
    total, bias, outputs, derivatives, at, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr
):
    y, kept = activated(total + tl.load(bias)[None, :], ACTIVATION, APPROXIMATE)
    tl.store(outputs + at, y.to(outputs.dtype.element_ty))
    if derivatives is not None:
        tl.store(derivatives + at, kept.to(derivatives.dtype.element_ty))


@triton.jit(do_not_specialize=["turns", "tiles"])
def layer_forward_kernel(
    inputs,  # [rows, K]
    weights,  # [N, K]
    biases,  # [N] float32
    outputs,  # [rows, N]
    derivatives,  # [rows, N], what f' is taken from where the outputs do not say; or None
    inputs_net,  # entries from a network's to the next one's
    weights_net,
    biases_net,
    outputs_net,
    turns,  # tiles of rows to a program, which keeps its weights; 1 where BK is less than K
    tiles,
    K: tl.constexpr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """h = f(inputs W^T + b), for BN columns."""
    program, net = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TILES: tl.constexpr = N // BN
    first = (program // TILES) * turns
    row = first.to(tl.int64) * BM + tl.arange(0, BM)
    column = (program % TILES) * BN + tl.arange(0, BN)
    bias = biases + net * biases_net + column
    inputs += net * inputs_net
    weights += net * weights_net
    at = net * outputs_net + (row * N)[:, None] + column[None, :]
    if BK == K:
        inner = tl.arange(0, K)[None, :]
        w = tl.load(weights + (column * K)[:, None] + inner)
        a = inputs + (row * K)[:, None] + inner
        for _ in range(first, tl.minimum(first + turns, tiles)):
            total = tl.zeros((BM, BN), tl.float32)
            total = _dot(tl.load(a), tl.trans(w), total, PRECISION)
            _store_activated(total, bias, outputs, derivatives, at, ACTIVATION, APPROXIMATE)
            a += BM * K
            at += BM * N
    else:
        total = _times_transposed(inputs, weights, row, column, K, PRECISION, BK)
        _store_activated(total, bias, outputs, derivatives, at, ACTIVATION, APPROXIMATE)


@triton.jit(do_not_specialize=["first_net"])
def heads_forward_kernel(
    inputs,  # [rows, K]
    weights,  # [N, K]
    biases,  # [N] float32
    outputs,  # [rows, N] float32: the actor's
    values,  # [rows] float32: the critic's
    first_net,  # 0: the first network here is the actor, 1: the critic
    inputs_net,
    weights_net,
    biases_net,
    A: tl.constexpr,
    BOTH: tl.constexpr,  # one network: columns 0 to A - 1 are the actor's, column A the critic's
    K: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The last layers, kept in float32."""
    tile, net = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TILES: tl.constexpr = N // BN
    row = (tile // TILES).to(tl.int64) * BM + tl.arange(0, BM)
    column = (tile % TILES) * BN + tl.arange(0, BN)
    total = _times_transposed(
        inputs + net * inputs_net, weights + net * weights_net, row, column, K, PRECISION, BK
    )
    total += tl.load(biases + net * biases_net + column)[None, :]
    of_actor, critic = _columns_of(first_net + net, column, A, BOTH)
    everywhere = row[:, None] >= 0
    at = outputs + (row * N)[:, None] + column[None, :]
    tl.store(at, total, mask=everywhere & of_actor[None, :])
    at = values + row[:, None] + tl.zeros_like(column)[None, :]
    tl.store(at, total, mask=everywhere & (column == critic)[None, :])


@triton.jit
def _columns_of(net, column, A: tl.constexpr, BOTH: tl.constexpr):
    """Which columns of a network's last layer are the actor's, and which one is the critic's."""
    if BOTH:
        of_actor = column < A
        critic = A
    else:
        of_actor = (column < A) & (net == 0)
        critic = tl.where(net == 0, -1, 0)
    return of_actor, critic


@triton.jit
def _within_range(g, DTYPE: tl.constexpr):
    if DTYPE.is_fp16():
        g = tl.clamp(g, -LARGEST, LARGEST, propagate_nan=ALL)
    return g


@triton.jit
def _store_gradient(g, kept, out, others, at, ACTIVATION: tl.constexpr, RAW: tl.constexpr):
    """Write g, the gradient by a layer's outputs; times the derivative at `kept` unless RAW.

    `others`, where given, is what was written so for another network with these outputs.
    """
    if others is not None:
        g += tl.load(others + at)
    if RAW:
        tl.store(out + at, g)
    else:
        g = through(g, tl.load(kept + at), ACTIVATION)
        tl.store(out + at, _within_range(g, out.dtype.element_ty).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["turns", "tiles"])
def layer_backward_kernel(
    gradients,  # [rows, K]: g of the layer
    weights,  # [K, N]
    kept,  # [rows, N]: what f' of the layer below is taken from
    out,  # [rows, N]: g of the layer below; may be the memory of `kept`
    others,  # [rows, N] float32, or None
    gradients_net,
    weights_net,
    out_net,
    turns,  # as in `layer_forward_kernel`
    tiles,
    K: tl.constexpr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """g of the layer below, for BN columns."""
    program, net = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TILES: tl.constexpr = N // BN
    first = (program // TILES) * turns
    row = first.to(tl.int64) * BM + tl.arange(0, BM)
    column = (program % TILES) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    a = gradients + net * gradients_net + (row * K)[:, None] + inner[None, :]
    b = weights + net * weights_net + (inner * N)[:, None] + column[None, :]
    at = net * out_net + (row * N)[:, None] + column[None, :]
    if BK == K:
        w = tl.load(b)
        for _ in range(first, tl.minimum(first + turns, tiles)):
            total = _dot(tl.load(a), w, tl.zeros((BM, BN), tl.float32), PRECISION)
            _store_gradient(total, kept, out, others, at, ACTIVATION, RAW)
            a += BM * K
            at += BM * N
    else:
        total = tl.zeros((BM, BN), tl.float32)
        for _ in range(0, K, BK):
            total = _dot(tl.load(a), tl.load(b), total, PRECISION)
            a += BK
            b += BK * N
        _store_gradient(total, kept, out, others, at, ACTIVATION, RAW)


@triton.jit(do_not_specialize=["turns", "tiles", "accumulate"])
def layer_weights_kernel(
    gradients,  # [rows, OUT]: g of the layer
    inputs,  # [rows, IN]
    partials,  # [splits, OUT * IN + OUT] float32: dW, db
    gradients_net,
    inputs_net,
    partials_net,
    turns,  # tiles of rows in a split
    tiles,
    accumulate,  # 1: add to what `partials` holds
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    """A split's share of dW = g^T inputs and db, a tile of dW a program."""
    split, tile, net = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    TILES: tl.constexpr = IN // BI
    first = split * turns
    last = tl.minimum(first + turns, tiles)
    row = first.to(tl.int64) * BR + tl.arange(0, BR)
    out = (tile // TILES) * BO + tl.arange(0, BO)
    inner = (tile % TILES) * BI + tl.arange(0, BI)
    a = gradients + net * gradients_net + (row * OUT)[:, None] + out[None, :]
    b = inputs + net * inputs_net + (row * IN)[:, None] + inner[None, :]
    own = partials + net * partials_net + split.to(tl.int64) * (OUT * IN + OUT)
    of_weights = own + (out * IN)[:, None] + inner[None, :]
    of_biases = own + OUT * IN + out
    is_first = (out >= 0) & (tile % TILES == 0)
    total = tl.zeros((BO, BI), tl.float32)
    # Kept apart by row until the end. A product with ones, a second sum of products in flight, would
    # make the assembler wait for each product on its own.
    sums = tl.zeros((BR, BO), tl.float32)
    for _ in range(first, last):
        g = tl.load(a)
        sums += g.to(tl.float32)
        total = _dot(tl.trans(g), tl.load(b), total, PRECISION)
        a += BR * OUT
        b += BR * IN
    more = accumulate != 0
    total += tl.load(of_weights, mask=(out[:, None] >= 0) & more, other=0.0)
    tl.store(of_weights, total)
    bias_sums = tl.sum(sums, 0) + tl.load(of_biases, mask=is_first & more, other=0.0)
    tl.store(of_biases, bias_sums, mask=is_first)


@triton.jit(do_not_specialize=["first_net", "M", "turns", "tiles", "accumulate"])
def heads_backward_kernel(
    grad_outputs,  # [M, A] float32: n d loss / d the actor's outputs
    grad_values,  # [M] float32
    weights,  # [K, N]
    inputs,  # [rows, N]: the outputs of the layer below
    kept,  # [rows, N]: what f' of that layer is taken from
    out,  # [rows, N]: its g; may be the memory of `inputs`. None: no layer is below
    others,  # [rows, N] float32, or None
    partials,  # [splits, K * N + K] float32: dW, db
    first_net,  # as in `heads_forward_kernel`
    weights_net,
    inputs_net,
    partials_net,
    M,
    turns,
    tiles,
    accumulate,
    A: tl.constexpr,
    BOTH: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """A split's share of the last layers' dW and db, and g of the layer below in the same reading."""
    split, tile, net = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    output = tl.arange(0, K)
    column = tile * BN + tl.arange(0, BN)
    own = partials + net * partials_net + split.to(tl.int64) * (K * N + K)
    of_weights = own + (output * N)[None, :] + column[:, None]
    w = tl.load(weights + net * weights_net + (output * N)[:, None] + column[None, :])
    DTYPE: tl.constexpr = inputs.dtype.element_ty
    total = tl.zeros((BN, K), tl.float32)
    sums = tl.zeros((BM, K), tl.float32)
    first = split * turns
    row = first.to(tl.int64) * BM + tl.arange(0, BM)
    for _ in range(first, tl.minimum(first + turns, tiles)):
        g = _heads_gradient(grad_outputs, grad_values, row, output, first_net + net, M, A, BOTH)
        sums += g
        g = _within_range(g, DTYPE).to(DTYPE)
        at = net * inputs_net + (row * N)[:, None] + column[None, :]
        total = _dot(tl.trans(tl.load(inputs + at)), g, total, PRECISION)
        if out is not None:
            below = _dot(g, w, tl.zeros((BM, BN), tl.float32), PRECISION)
            _store_gradient(below, kept, out, others, at, ACTIVATION, False)
        row += BM
    more = accumulate != 0
    total += tl.load(of_weights, mask=(column[:, None] >= 0) & more, other=0.0)
    tl.store(of_weights, total)
    of_biases = own + K * N + output
    is_first = (output >= 0) & (tile == 0)
    bias_sums = tl.sum(sums, 0) + tl.load(of_biases, mask=is_first & more, other=0.0)
    tl.store(of_biases, bias_sums, mask=is_first)


@triton.jit(do_not_specialize=["first_net", "M"])
def heads_gradient_kernel(
    grad_outputs,  # [M, A] float32: n d loss / d the actor's outputs
    grad_values,  # [M] float32
    out,  # [rows, N]: g of the last layer
    first_net,  # as in `heads_forward_kernel`
    out_net,
    M,
    A: tl.constexpr,
    BOTH: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """g of last layers too wide for `heads_backward_kernel`, as an operand."""
    tile, net = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TILES: tl.constexpr = N // BN
    row = (tile // TILES).to(tl.int64) * BM + tl.arange(0, BM)
    column = (tile % TILES) * BN + tl.arange(0, BN)
    g = _heads_gradient(grad_outputs, grad_values, row, column, first_net + net, M, A, BOTH)
    g = _within_range(g, out.dtype.element_ty).to(out.dtype.element_ty)
    tl.store(out + net * out_net + (row * N)[:, None] + column[None, :], g)


@triton.jit
def _heads_gradient(
    grad_outputs, grad_values, row, column, net, M, A: tl.constexpr, BOTH: tl.constexpr
):
    """Entries (row, column) of a last layer's g; 0 in the padding."""
    of_actor, critic = _columns_of(net, column, A, BOTH)
    inside = (row < M)[:, None]
    at = grad_outputs + (row * A)[:, None] + column[None, :]
    g = tl.load(at, mask=inside & of_actor[None, :], other=0.0)
    at = grad_values + row[:, None] + tl.zeros_like(column)[None, :]
    return g + tl.load(at, mask=inside & (column == critic)[None, :], other=0.0)


@triton.jit
def gradients_kernel(
    partials,
    places,  # [programs, 3]: its entries' place in `partials`, from a split to the next, splits
    flat_of,  # [programs * PADDING]: where an entry lies in `gradients`; -1: nowhere
    inv_n,
    gradients,
    square_sums,  # [programs]
):
    """The sums of the splits over n, and the sum of their squares, PADDING parameters a program."""
    program = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, PADDING)
    flat = tl.load(flat_of + program * PADDING + offset)
    own = flat >= 0
    place = partials + tl.load(places + program * 3)
    step = tl.load(places + program * 3 + 1)
    splits = tl.load(places + program * 3 + 2).to(tl.int32)
    total = tl.zeros((PADDING,), tl.float32)
    for _ in range(splits):
        total += tl.load(place + offset, mask=own, other=0.0)
        place += step
    total *= tl.load(inv_n)
    tl.store(gradients + flat, total, mask=own)
    tl.store(square_sums + program, tl.sum(total * total, 0))
