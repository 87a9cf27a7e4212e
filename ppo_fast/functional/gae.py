"""Generalized Advantage Estimation: dense [T, N] rollouts and packed sequences.

`gae` and `gae_packed` differ only in which value follows a row; the equation is in `_finish`, the
recursion in `_scan.py`.

On a CPU a pass over memory costs more than its arithmetic, so two buffers hold every intermediate
and become the outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.dispatch import accelerated
from ppo_fast.functional._scan import reverse_linear_scan_
from ppo_fast.functional.whiten import moments


def _validate(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    ratios: Tensor | None = None,
    rho_clip: float | Tensor = 1.0,
    c_clip: float | Tensor = 1.0,
    with_moments: bool = False,
) -> None:
    if rewards.ndim != 2:
        raise ValueError(f"gae: rewards is {list(rewards.shape)}; it must be [T, N], time first")
    _check(
        "gae",
        rewards,
        "[T, N]",
        {"values": values, "bootstrap_values": bootstrap_values, "ratios": ratios},
        {"terminated": terminated, "truncated": truncated, "mask": mask},
        {"gamma": gamma, "gae_lambda": gae_lambda},
        {"rho_clip": rho_clip, "c_clip": c_clip},
        rewards.shape[1],
    )
    _check_next_value("gae", next_value, rewards, rewards.shape[1], "N")


@accelerated(validate=_validate)
def gae(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    ratios: Tensor | None = None,
    rho_clip: float | Tensor = 1.0,
    c_clip: float | Tensor = 1.0,
    with_moments: bool = False,
) -> tuple[Tensor, ...]:
    """Generalized Advantage Estimation (Schulman et al. 2016, eq. 16, arXiv:1506.02438).

        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1},   done = terminated or truncated

    `s'_t` is the state the action of row t led to, before any reset. Its value is
    `bootstrap_values[t]` where truncated, else the value of the next row, or `next_value` after the
    last row. A row whose `mask` is False is no transition (an autoreset row, padding): the result
    is what one gets with the row removed, and 0 in the row itself.

    Flags belong to the row whose action ended the episode (Gymnasium, torchrl); libraries that mark
    the row an episode *starts* with (Stable-Baselines3, CleanRL) have them one row later.

    Args:
        rewards: [T, N] floating, any strides.
        values: [T, N] floating; V(s_t).
        next_value: [N] floating, finite; the value of the state after the last row.
        terminated: [T, N] bool; the action of row t reached a terminal state, whose value is 0.
        truncated: [T, N] bool; the episode was cut after row t without ending. Where both flags
            are set the row is terminated.
        bootstrap_values: [T, N] floating; the value of the state the episode was cut in. Given
            together with `truncated`, read only where it decides.
        mask: [T, N] bool; False where a row is to be skipped. None skips no row. Skipped rows of
            the other arguments are never read.
        gamma: discount in [0, 1]; float or 0-d tensor.
        gae_lambda: in [0, 1]; float, 0-d tensor, or [N] tensor with one lambda a column.
        ratios: [T, N] floating, pi(a|s) / mu(a|s) of the policy learnt over the one that acted:
            the V-trace correction (Espeholt et al. 2018, eq. 1, arXiv:1802.01561), which multiplies
            delta_t by min(ratio_t, rho_clip) and the lambda of row t by min(ratio_t, c_clip).
            `returns` are then v_s. None takes all as 1.
        rho_clip, c_clip: positive; float or 0-d tensor.
        with_moments: also return what whitening needs, from the same pass.

    Returns:
        advantages, returns: [T, N] float32, or float64 where an input is; returns = advantages +
        values. A NaN or infinity that is read spreads to the earlier rows of its column.
        With `with_moments` also [3]: count, mean and sum of squared deviations of the unmasked
        advantages, as `masked_whiten` and the `ppo_loss` ops take them.

    Raises:
        ValueError: a shape, dtype, device or range that is not as above; one of `truncated` and
            `bootstrap_values` without the other; an input that requires grad in grad mode, as
            advantages are constants of the PPO loss.
    """
    _validate(
        *(rewards, values, next_value, terminated, truncated, bootstrap_values, mask),
        gamma=gamma,
        gae_lambda=gae_lambda,
        ratios=ratios,
        rho_clip=rho_clip,
        c_clip=c_clip,
    )
    dtype = _result_dtype(rewards, values, next_value, bootstrap_values, ratios)
    if rewards.numel() == 0:
        return _nothing(rewards, dtype, with_moments)
    rewards, values, next_value = rewards.to(dtype), values.to(dtype), next_value.to(dtype)
    deltas, discounts = _two_like(values)
    _set_discounts_(discounts, terminated, gamma)
    if mask is None and truncated is None:
        # What follows a row is the row below it, read where it lies.
        torch.addcmul(rewards[:-1], discounts[:-1], values[1:], out=deltas[:-1])
        torch.addcmul(rewards[-1], discounts[-1], next_value, out=deltas[-1])
    else:
        next_values = deltas
        next_values[:-1], next_values[-1] = values[1:], next_value
        if mask is not None:
            is_known = torch.cat((mask[1:], torch.ones_like(mask[:1])))
            _skip_unknown_(next_values, is_known)
        truncated = _put_bootstrap_(next_values, terminated, truncated, bootstrap_values)
        torch.addcmul(rewards, discounts, next_values, out=deltas)
    clipped = None if ratios is None else _clipped(ratios.to(dtype), rho_clip, c_clip)
    results = _finish(deltas, discounts, values, truncated, mask, gae_lambda, clipped)
    return (*results, moments(results[0], mask)) if with_moments else results


def _validate_packed(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    cu_seqlens: Tensor,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    ratios: Tensor | None = None,
    rho_clip: float | Tensor = 1.0,
    c_clip: float | Tensor = 1.0,
    with_moments: bool = False,
) -> None:
    if rewards.ndim != 1:
        raise ValueError(
            f"gae_packed: rewards is {list(rewards.shape)}; it must be [total], the tokens of all "
            "sequences end to end (use gae for [T, N])"
        )
    _check_cu_seqlens(cu_seqlens, rewards)
    _check(
        "gae_packed",
        rewards,
        "[total]",
        {"values": values, "bootstrap_values": bootstrap_values, "ratios": ratios},
        {"terminated": terminated, "truncated": truncated, "mask": mask},
        {"gamma": gamma, "gae_lambda": gae_lambda},
        {"rho_clip": rho_clip, "c_clip": c_clip},
        cu_seqlens.shape[0] - 1,
    )
    _check_next_value("gae_packed", next_value, rewards, cu_seqlens.shape[0] - 1, "num_seqs")


@accelerated(validate=_validate_packed)
def gae_packed(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    cu_seqlens: Tensor,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    ratios: Tensor | None = None,
    rho_clip: float | Tensor = 1.0,
    c_clip: float | Tensor = 1.0,
    with_moments: bool = False,
) -> tuple[Tensor, ...]:
    """`gae` over sequences of different lengths laid end to end; no sum crosses their boundaries.

    Sequence i holds the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1`; it may be empty. Padding
    the sequences into the columns of a [T, N] batch and masking the padding gives the same numbers.

    Args:
        rewards: [total] floating, any stride.
        values: [total] floating; V(s_t).
        next_value: [num_seqs] floating, finite; the value after the last token of each sequence.
        terminated: [total] bool; the token ends its episode (an end-of-sequence token).
        cu_seqlens: [num_seqs + 1] int32 or int64, ascending from 0 to total. Its contents are
            checked on the CPU only: reading them on a GPU would stall it.
        truncated: [total] bool, as in `gae`.
        bootstrap_values: [total] floating, as in `gae`.
        mask: [total] bool; False where a token is skipped (a prompt's, a tool's).
        gamma: discount in [0, 1]; float or 0-d tensor.
        gae_lambda: in [0, 1]; float, 0-d tensor, or [num_seqs] tensor with one a sequence (VAPO
            lets it grow with the length, arXiv:2504.05118).
        ratios, rho_clip, c_clip, with_moments: as in `gae`; ratios is [total].

    Returns:
        advantages, returns: [total] float32, or float64 where an input is; returns = advantages +
        values. A NaN or infinity that is read spreads to earlier tokens, how far is not defined.
        With `with_moments` also [3], as in `gae`.

    Raises:
        ValueError: as `gae`; `cu_seqlens` is not as above.
    """
    _validate_packed(
        *(rewards, values, next_value, terminated, cu_seqlens, truncated, bootstrap_values, mask),
        gamma=gamma,
        gae_lambda=gae_lambda,
        ratios=ratios,
        rho_clip=rho_clip,
        c_clip=c_clip,
    )
    total = rewards.shape[0]
    dtype = _result_dtype(rewards, values, next_value, bootstrap_values, ratios)
    if total == 0:
        return _nothing(rewards, dtype, with_moments)
    values = values.to(dtype)

    # An empty sequence has no last token: its entry goes to a spare slot behind all tokens.
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    last = torch.where(ends > starts, ends - 1, total).long()  # [num_seqs]
    is_last = values.new_zeros(total + 1, dtype=torch.bool).index_fill_(0, last, True)[:total]
    next_values = torch.cat((values[1:], values.new_zeros(2)))
    next_values = next_values.index_copy_(0, last, next_value.to(dtype))[:total]
    if mask is not None:
        _skip_unknown_(next_values, is_last | mask.roll(-1))
    truncated = _put_bootstrap_(next_values, terminated, truncated, bootstrap_values)
    discounts = torch.empty_like(values)
    _set_discounts_(discounts, terminated, gamma)
    deltas = torch.addcmul(rewards.to(dtype), discounts, next_values, out=next_values)
    if isinstance(gae_lambda, Tensor) and gae_lambda.ndim == 1:
        owner = torch.bucketize(torch.arange(total, device=rewards.device), ends, right=True)
        gae_lambda = gae_lambda[owner]
    clipped = None if ratios is None else _clipped(ratios.to(dtype), rho_clip, c_clip)
    results = _finish(deltas, discounts, values, truncated, mask, gae_lambda, clipped, is_last)
    return (*results, moments(results[0], mask)) if with_moments else results


def _nothing(rewards: Tensor, dtype: torch.dtype, with_moments: bool) -> tuple[Tensor, ...]:
    empty = torch.empty_like(rewards, dtype=dtype), torch.empty_like(rewards, dtype=dtype)
    return (*empty, empty[0].new_zeros(3)) if with_moments else empty


def _clipped(
    ratios: Tensor, rho_clip: float | Tensor, c_clip: float | Tensor
) -> tuple[Tensor, Tensor]:
    return ratios.clamp(max=rho_clip), ratios.clamp(max=c_clip)


def _two_like(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two uninitialised tensors with the layout of `values`: mixed layouts double the time.

    One allocation where possible: two of this size, freed together by every caller, make glibc
    hand the pages back and fault them in again (bench_gae.py: 1.6 times the time at [128, 1024]).
    """
    if values.is_contiguous():
        first, second = values.new_empty(2, *values.shape).unbind(0)
        return first, second
    return torch.empty_like(values), torch.empty_like(values)


def _set_discounts_(discounts: Tensor, terminated: Tensor, gamma: float | Tensor) -> None:
    """Write gamma (1 - terminated)."""
    discounts.copy_(_bytes(~terminated)).mul_(gamma)


def _put_bootstrap_(
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
) -> Tensor | None:
    """Write the bootstrap values where they decide; return where that is."""
    if truncated is None or bootstrap_values is None:
        return None
    truncated = truncated & ~terminated
    bootstrap_values = bootstrap_values.to(next_values.dtype)
    torch.where(truncated, bootstrap_values, next_values, out=next_values)
    return truncated


def _finish(
    deltas: Tensor,
    discounts: Tensor,
    values: Tensor,
    truncated: Tensor | None,
    mask: Tensor | None,
    gae_lambda: float | Tensor,
    clipped: tuple[Tensor, Tensor] | None = None,
    is_last: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn r_t + gamma (1 - terminated_t) V(s'_t) and its discounts into advantages and returns.

    `clipped` are the ratios under V-trace's rho and c. `is_last` marks rows after which another
    sequence begins; the last row of all needs no mark. `deltas` and `discounts` are overwritten and
    become the outputs.
    """
    deltas.sub_(values)
    decays = discounts.mul_(gae_lambda)
    if truncated is not None:
        decays.mul_(_bytes(~truncated))
    if clipped is not None:
        deltas.mul_(clipped[0])
        decays.mul_(clipped[1])
    skipped = None if mask is None else ~mask
    if skipped is not None:
        # A skipped row hands on, undiscounted, what comes after it.
        deltas.masked_fill_(skipped, 0.0)
        decays.masked_fill_(skipped, 1.0)
    if is_last is not None:
        decays.masked_fill_(is_last, 0.0)

    reverse_linear_scan_(deltas, decays)
    advantages, returns = deltas, torch.add(deltas, values, out=decays)
    if skipped is not None:
        advantages.masked_fill_(skipped, 0.0)
        returns.masked_fill_(skipped, 0.0)
    return advantages, returns


def _bytes(flag: Tensor) -> Tensor:
    # Bytes convert five times faster than bools, whose conversion is not vectorised on a CPU.
    return flag.view(torch.uint8)


def _skip_unknown_(next_values: Tensor, is_known: Tensor) -> None:
    """Overwrite each entry that is not known with the next one along dim 0 that is."""
    is_unknown = ~is_known
    next_values.masked_fill_(is_unknown, 0.0)
    reverse_linear_scan_(next_values, torch.empty_like(next_values).copy_(_bytes(is_unknown)))


def _result_dtype(*tensors: Tensor | None) -> torch.dtype:
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _check(
    op: str,
    rewards: Tensor,
    layout: str,
    floats: dict[str, Tensor | None],
    flags: dict[str, Tensor | None],
    scalars: dict[str, float | Tensor],
    limits: dict[str, float | Tensor],
    columns: int,
) -> None:
    """Raise ValueError unless the arguments that share the shape of `rewards` fit together."""
    _check_floating(op, "rewards", rewards, rewards)
    for name, tensor in (*floats.items(), *flags.items()):
        if tensor is not None and tensor.shape != rewards.shape:
            raise ValueError(
                f"{op}: {name} is {list(tensor.shape)}, rewards is {list(rewards.shape)}; both "
                f"must be {layout}"
            )
    for name, tensor in floats.items():
        if tensor is not None:
            _check_floating(op, name, tensor, rewards)
    for name, flag in flags.items():
        if flag is not None and flag.dtype != torch.bool:
            raise ValueError(f"{op}: {name} is {flag.dtype}; it must be bool, use {name}.bool()")
        if flag is not None and flag.device != rewards.device:
            _raise_device(op, name, flag, rewards)
    for name, scalar in scalars.items():
        if isinstance(scalar, Tensor):
            _check_scalar(op, name, scalar, columns if name == "gae_lambda" else None)
        elif not 0.0 <= scalar <= 1.0:
            raise ValueError(f"{op}: {name} is {scalar}; it must lie in [0, 1]")
    for name, limit in limits.items():
        if isinstance(limit, Tensor):
            _check_scalar(op, name, limit, None)
        elif not limit > 0.0:
            raise ValueError(f"{op}: {name} is {limit}; it must be positive")
    if floats["bootstrap_values"] is None and flags["truncated"] is not None:
        raise ValueError(
            f"{op}: truncated is given without bootstrap_values; pass the values of the states the "
            "episodes were cut in (values of the final observations)"
        )
    if floats["bootstrap_values"] is not None and flags["truncated"] is None:
        raise ValueError(
            f"{op}: bootstrap_values is given without truncated; pass both, or neither where no "
            "episode was cut"
        )


def _check_scalar(op: str, name: str, scalar: Tensor, columns: int | None) -> None:
    if scalar.ndim != 0 and (columns is None or scalar.shape != (columns,)):
        per_column = "" if columns is None else f" or [{columns}], one a column"
        raise ValueError(
            f"{op}: {name} is a tensor of shape {list(scalar.shape)}; it must be a float or a 0-d "
            f"tensor{per_column}"
        )
    _check_no_grad(op, name, scalar)


def _check_next_value(op: str, next_value: Tensor, rewards: Tensor, count: int, name: str) -> None:
    if next_value.shape != (count,):
        raise ValueError(
            f"{op}: next_value is {list(next_value.shape)}; it must be [{name}], here [{count}]"
        )
    _check_floating(op, "next_value", next_value, rewards)


def _check_cu_seqlens(cu_seqlens: Tensor, rewards: Tensor) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        raise ValueError(
            f"gae_packed: cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; it must be "
            "int32 or int64 [num_seqs + 1]"
        )
    if cu_seqlens.device != rewards.device:
        _raise_device("gae_packed", "cu_seqlens", cu_seqlens, rewards)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("gae_packed: cu_seqlens is empty; it must hold at least the leading 0")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    total = rewards.shape[0]
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total:
        raise ValueError(
            f"gae_packed: cu_seqlens runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}; it "
            f"must run from 0 to the number of tokens, {total}"
        )
    if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError("gae_packed: cu_seqlens descends; it must hold cumulative lengths")


def _check_floating(op: str, name: str, tensor: Tensor, rewards: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} is {tensor.dtype}; it must be floating, use {name}.float()")
    if tensor.device != rewards.device:
        _raise_device(op, name, tensor, rewards)
    _check_no_grad(op, name, tensor)


def _check_no_grad(op: str, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} requires grad, but advantages are constants of the loss; pass "
            f"{name}.detach() or call under torch.no_grad()"
        )


def _raise_device(op: str, name: str, tensor: Tensor, rewards: Tensor) -> None:
    raise ValueError(
        f"{op}: {name} is on {tensor.device}, rewards is on {rewards.device}; move one of them"
    )
