"""The whole of a PPO minibatch for an MLP actor-critic: forward, loss and gradients in one op.

Small networks spend more time in autograd's bookkeeping, in launches and in memory traffic than in
arithmetic. Here nothing is recorded and nothing is allocated: gradients are written out layer by
layer into one flat vector, which Adam then reads as one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.dispatch import accelerated
from ppo_fast.functional import _categorical, _gaussian
from ppo_fast.functional._rows import may_ask
from ppo_fast.functional._surrogate import Summands, Surrogate, assemble
from ppo_fast.functional._terms import (
    ROW_NAMES,
    Rows,
    Scalar,
    Terms,
    check_rows,
    check_terms,
    to_rows,
)
from ppo_fast.functional.mlp import (
    ACTIVATIONS,
    Hidden,
    Layer,
    hidden_backward,
    hidden_forward,
    store,
)
from ppo_fast.results import ActorCriticSpec, PPOLoss

OP = "actor_critic_loss_and_grads"

BLOCK_ROWS = 4096
"""Rows at a time on a CPU: activations and their gradients then stay in its caches."""


class Network(NamedTuple):
    """Views of the flat parameters and gradients."""

    log_std: Tensor | None
    """[A, 1]"""
    grad_log_std: Tensor | None
    """[A]"""
    trunk: list[Layer]
    actor: list[Layer]
    critic: list[Layer]

    @classmethod
    def of(cls, parameters: Tensor, gradients: Tensor, spec: ActorCriticSpec) -> Network:
        """Cut the vectors up."""
        offset = 0
        log_std = grad_log_std = None
        if spec.head_sizes is None:
            offset = spec.num_outputs
            log_std, grad_log_std = parameters[:offset].unsqueeze(1), gradients[:offset]
        nets = []
        for sizes in spec.layers:
            layers = []
            for out, width in sizes:
                middle = offset + out * width
                weights = slice(offset, middle)
                biases = slice(middle, middle + out)
                offset = middle + out
                layers.append(
                    Layer.of(
                        parameters[weights].view(out, width),
                        parameters[biases],
                        gradients[weights].view(out, width),
                        gradients[biases],
                    )
                )
            nets.append(layers)
        return cls(log_std, grad_log_std, *nets)


class Buffers(NamedTuple):
    """Memory for so many rows."""

    trunk: list[Hidden]
    actor: list[Hidden]
    critic: list[Hidden]
    outputs: Tensor
    """[A, M]"""
    values: Tensor
    """[1, M]"""
    summands: Summands

    @classmethod
    def empty(cls, rows: int, spec: ActorCriticSpec, like: Tensor) -> Buffers:
        """New buffers in the dtype of `like`."""
        trunk, actor, critic = (
            [Hidden.empty(rows, width, spec.activation, like) for width in sizes]
            for sizes in (spec.shared_sizes, spec.actor_sizes, spec.critic_sizes)
        )
        values = like.new_empty(1, rows)
        return cls(
            *(trunk, actor, critic),
            like.new_empty(spec.num_outputs, rows),
            values,
            Summands.empty(values[0]),
        )


class ActorCriticWorkspace:
    """What successive calls with the same parameters and gradients share: views and buffers.

    Args:
        parameters, gradients, spec: as in `actor_critic_loss_and_grads`.
    """

    def __init__(self, parameters: Tensor, gradients: Tensor, spec: ActorCriticSpec) -> None:
        _check_network(parameters, gradients, spec)
        self.parameters, self.gradients, self.spec = parameters, gradients, spec
        self.network = Network.of(parameters, gradients, spec)
        self.square_sums: Tensor | None = None  # of the gradients, as `clipped_adam_` takes them
        self._buffers: dict[int, Buffers] = {}

    def buffers(self, rows: int) -> Buffers:
        """Buffers for so many rows, kept."""
        found = self._buffers.get(rows)
        if found is None:
            if len(self._buffers) > 4:  # sizes that vary from call to call are not hoarded
                self._buffers.clear()
            found = self._buffers[rows] = Buffers.empty(rows, self.spec, self.parameters)
        return found


def _check_network(parameters: Tensor, gradients: Tensor, spec: ActorCriticSpec) -> None:
    if spec.activation not in ACTIVATIONS:
        raise ValueError(
            f"{OP}: spec.activation is {spec.activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    if spec.head_sizes is not None and sum(spec.head_sizes) != spec.num_outputs:
        raise ValueError(
            f"{OP}: spec.head_sizes is {spec.head_sizes}; expected sizes that add up to "
            f"num_outputs = {spec.num_outputs}"
        )
    size = spec.num_parameters
    for name, tensor in (("parameters", parameters), ("gradients", gradients)):
        if tensor.shape != (size,) or not tensor.is_contiguous():
            raise ValueError(
                f"{OP}: {name} is {list(tensor.shape)}; expected a contiguous [{size}] for {spec}"
            )
        if tensor.dtype != parameters.dtype or not tensor.is_floating_point():
            raise ValueError(f"{OP}: {name} is {tensor.dtype}; expected the dtype of parameters")
    compiling = torch.compiler.is_compiling()  # addresses cannot be asked for then
    if size and not compiling and parameters.data_ptr() == gradients.data_ptr():
        raise ValueError(f"{OP}: gradients is the same memory as parameters")


def _validate(
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
    action_mask: Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    workspace: ActorCriticWorkspace | None = None,
    **options: Any,
) -> None:
    t = Terms(
        old_log_probs,
        advantages,
        values=old_values,
        old_values=old_values,
        returns=returns,
        **options,
    )
    _check(parameters, gradients, spec, obs, actions, t, index, action_mask, workspace)


def _check(
    parameters: Tensor,
    gradients: Tensor,
    spec: ActorCriticSpec,
    obs: Tensor,
    actions: Tensor,
    t: Terms,
    index: Tensor | None,
    action_mask: Tensor | None,
    workspace: ActorCriticWorkspace | None,
) -> None:
    """Raise unless the arguments fit; in `t`, `old_values` stands in for the values yet to come."""
    if workspace is None:
        _check_network(parameters, gradients, spec)
    elif (
        workspace.parameters is not parameters
        or workspace.gradients is not gradients
        or workspace.spec != spec
    ):
        raise ValueError(f"{OP}: workspace was made for other parameters, gradients or spec")
    if obs.ndim != 2 or obs.shape[1] != spec.obs_size:
        raise ValueError(
            f"{OP}: obs is {list(obs.shape)}; expected [N, obs_size] = [N, {spec.obs_size}]"
        )
    number = obs.shape[:1]
    if obs.dtype != parameters.dtype:
        raise ValueError(f"{OP}: obs is {obs.dtype}; expected that of parameters")
    heads = () if spec.head_sizes is None or len(spec.head_sizes) == 1 else (len(spec.head_sizes),)
    expected = (*number, spec.num_outputs) if spec.head_sizes is None else (*number, *heads)
    if actions.shape != expected:
        raise ValueError(f"{OP}: actions is {list(actions.shape)}; expected {list(expected)}")
    if actions.is_floating_point() is not (spec.head_sizes is None) or actions.dtype is torch.bool:
        kind = "floats" if spec.head_sizes is None else "integers"
        raise ValueError(f"{OP}: actions is {actions.dtype}; expected {kind}")
    if action_mask is not None and (
        spec.head_sizes is None
        or action_mask.dtype is not torch.bool
        or action_mask.shape != (*number, spec.num_outputs)
    ):
        raise ValueError(
            f"{OP}: action_mask is {list(action_mask.shape)} {action_mask.dtype}; expected bool "
            f"{[*number, spec.num_outputs]}, and a categorical policy"
        )
    if index is not None and (index.ndim != 1 or index.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"{OP}: index is {list(index.shape)} {index.dtype}; expected [M] int32 or int64"
        )
    if t.old_values is not None and t.old_values.shape != number:  # named as what it is
        raise ValueError(f"{OP}: old_values is {list(t.old_values.shape)}; expected {list(number)}")
    check_terms(OP, t, entropy_given=True)
    check_rows(OP, t, number)


@accelerated(validate=_validate, mutates=("gradients",))
@torch.no_grad()
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
    workspace: ActorCriticWorkspace | None = None,
) -> PPOLoss:
    """PPO loss of an MLP actor-critic on a minibatch, and its gradient by every parameter.

    Equal to `ppo_loss_from_logits` or `ppo_loss_from_gaussian` of the networks' outputs, followed by
    autograd; but detached: the gradient is in `gradients` when it returns.

    Args:
        parameters: [P] float32 (or float64 on a CPU), laid out as `ActorCriticSpec` says.
        gradients: [P]; overwritten.
        spec: the architecture.
        obs: [N, D], in the dtype of `parameters`.
        actions: [N] or [N, heads] integers, or [N, A] floats for a Gaussian policy, before the tanh
            if `spec.squash`.
        old_log_probs, advantages, old_values, returns: [N].
        index: [M] int32 or int64, the rows of the minibatch, repeated ones counted as often; None
            takes all N. They are read where they lie: on a GPU no gathered copy is stored.
        clip_coef: as in `ppo_loss`, with the further arguments of the same names.
        action_mask: [N, A] bool, legal actions.
        mask, weights: [N].
        matmul_dtype: dtype of the products' operands on a GPU; sums stay float32. None means that of
            `parameters`, float16 has TF32's mantissa. The reference ignores it.
        workspace: made for these parameters and gradients; spares their views and buffers.

    Returns:
        PPOLoss: `loss`, detached; `stats`.

    Raises:
        ValueError: a misshapen argument or one of a wrong dtype; as `ppo_loss`.
        IndexError: an action out of range; on a GPU see `raise_device_errors`.
    """
    t = Terms(
        old_log_probs,
        advantages,
        clip_coef,
        clip_coef_high,
        dual_clip,
        old_values,  # stands in for the values, which `_block` computes
        old_values,
        returns,
        vf_coef,
        vf_clip_coef,
        vf_clip,
        ent_coef,
        old_kl_coef=old_kl_coef,
        mask=mask,
        weights=weights,
        norm_adv=norm_adv,
        advantage_moments=advantage_moments,
        normalizer=normalizer,
    )
    _check(parameters, gradients, spec, obs, actions, t, index, action_mask, workspace)
    if workspace is None:
        workspace = ActorCriticWorkspace(parameters, gradients, spec)
    workspace.square_sums = None  # the kernel's, which would be of other gradients
    if index is not None:
        obs = obs.index_select(0, index)
        actions = actions.index_select(0, index)
        action_mask = None if action_mask is None else action_mask[index]
        picked = {name: getattr(t, name) for name in ROW_NAMES if name != "values"}
        chosen = {name: row[index] for name, row in picked.items() if row is not None}
        t = t._replace(**chosen, values=chosen["old_values"])
    number = obs.shape[0]
    if number == 0:
        gradients.zero_()
    rows, count, inv_n = to_rows(OP, t, obs.shape[:1], parameters.dtype)
    if actions.ndim == 1:
        actions = actions.unsqueeze(1)
    if spec.head_sizes is not None:
        actions = actions.long()
    actions_t = actions.t()
    mask_t = None if action_mask is None else action_mask.t()
    step = BLOCK_ROWS if may_ask(obs) else max(number, 1)
    if number <= step:
        part = _block(workspace, spec, obs, actions_t, mask_t, rows, t, inv_n, False)
        return assemble(part, count, inv_n, t, ())
    parts = []
    for start in range(0, number, step):
        own = slice(start, start + step)
        block_mask = None if mask_t is None else mask_t[:, own]
        block = (obs[own], actions_t[:, own], block_mask, rows.slice(own))
        parts.append(_block(workspace, spec, *block, t, inv_n, start > 0))
    sums = torch.stack([part.sums for part in parts]).sum(0)
    deviation = torch.cat([part.ratio_deviation for part in parts]).amax(0, keepdim=True)
    return assemble(parts[-1]._replace(sums=sums, ratio_deviation=deviation), count, inv_n, t, ())


def _block(
    workspace: ActorCriticWorkspace,
    spec: ActorCriticSpec,
    obs: Tensor,
    actions: Tensor,
    action_mask: Tensor | None,
    rows: Rows,
    t: Terms,
    inv_n: Scalar,
    accumulate: bool,
) -> Surrogate:
    """The terms of some rows, and their share of the gradients. `actions`: [heads or A, M]."""
    net, buffers = workspace.network, workspace.buffers(obs.shape[0])
    activation = spec.activation
    hidden_forward(obs, net.trunk, buffers.trunk, activation)
    features = buffers.trunk[-1].outputs if buffers.trunk else obs
    outputs = _forward(features, net.actor, buffers.actor, buffers.outputs, activation)
    values = _forward(features, net.critic, buffers.critic, buffers.values, activation)
    values = values[0] if rows.drop is None else values[0].masked_fill(rows.drop, 0.0)
    rows = rows._replace(values=values)
    if spec.head_sizes is not None:
        policy = _categorical.Policy(
            outputs, actions, action_mask, spec.head_sizes, None, from_network=True
        )
        part, grad_outputs = _categorical.small_columns(policy, rows, t, True, buffers.summands)
        assert grad_outputs is not None
    else:
        assert net.log_std is not None and net.grad_log_std is not None
        part, grad_outputs, grad_log_std = _gaussian.columns(
            outputs, net.log_std, actions, spec.squash, rows, t, buffers.summands
        )
        grad_log_std.mul_(inv_n)
        if accumulate:
            net.grad_log_std.add_(grad_log_std)
        else:
            net.grad_log_std.copy_(grad_log_std)
    assert part.grad_values is not None
    grad_outputs.mul_(inv_n)
    grad_values = part.grad_values.mul_(inv_n).unsqueeze(0)
    _backward(features, net.actor, buffers.actor, grad_outputs, activation, accumulate)
    _backward(features, net.critic, buffers.critic, grad_values, activation, accumulate)
    if buffers.trunk:
        into = buffers.trunk[-1].gradient
        _to_features(net.actor, buffers.actor, grad_outputs, into, False)
        _to_features(net.critic, buffers.critic, grad_values, into, True)
        hidden_backward(obs, net.trunk, buffers.trunk, activation, accumulate)
    return part


def _forward(
    features: Tensor,
    layers: list[Layer],
    hidden: list[Hidden],
    outputs: Tensor,
    activation: str,
) -> Tensor:
    """The network's outputs [out, M], in `outputs`."""
    hidden_forward(features, layers[:-1], hidden, activation)
    last = hidden[-1].outputs_t if hidden else features.t()
    return torch.addmm(layers[-1].bias_column, layers[-1].weight, last, out=outputs)


def _backward(
    features: Tensor,
    layers: list[Layer],
    hidden: list[Hidden],
    grad_outputs: Tensor,
    activation: str,
    accumulate: bool,
) -> None:
    """Write the gradients of the layers, from that by the outputs [out, M]."""
    last = hidden[-1].outputs if hidden else features
    store(layers[-1], grad_outputs, last, grad_outputs, 1, accumulate)
    if hidden:
        torch.mm(grad_outputs.t(), layers[-1].weight, out=hidden[-1].gradient)
        hidden_backward(features, layers[:-1], hidden, activation, accumulate)


def _to_features(
    layers: list[Layer], hidden: list[Hidden], grad_outputs: Tensor, into: Tensor, add: bool
) -> None:
    """Put the gradient by the features [M, width] into `into`."""
    gradient = hidden[0].gradient if hidden else grad_outputs.t()
    if add:
        into.addmm_(gradient, layers[0].weight)
    else:
        torch.mm(gradient, layers[0].weight, out=into)
