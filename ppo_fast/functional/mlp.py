"""A multilayer perceptron forward and backward, without autograd and without allocating.

On small batches autograd's bookkeeping costs more than the products: an explicit backward of a
64 x 64 network on 256 rows takes less than half the time (benchmarks/bench_control.py). Inputs and
hidden layers are rows [M, width]; the output is laid out in columns [out, M], because products with
a narrow matrix run several times faster that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("tanh", "relu", "elu", "silu")

aten = torch.ops.aten


class Layer(NamedTuple):
    """One linear layer; weights are [out, in], as in `torch.nn.Linear`."""

    weight: Tensor
    transposed: Tensor
    """a view of `weight`, [in, out]: making one takes a third as long as a small product"""
    bias: Tensor
    bias_column: Tensor
    """a view of `bias`, [out, 1]"""
    grad_weight: Tensor
    grad_bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> Layer:
        """Add the views."""
        return cls(weight, weight.t(), bias, bias.unsqueeze(1), grad_weight, grad_bias)


class Hidden(NamedTuple):
    """Buffers of a hidden layer's outputs [M, width] and of the gradient by them."""

    outputs: Tensor
    outputs_t: Tensor
    before: Tensor
    """what went into the activation, where the derivative needs it; else `outputs`"""
    gradient: Tensor
    gradient_t: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, activation: str, like: Tensor) -> Hidden:
        """New buffers in the dtype of `like`."""
        outputs, gradient = like.new_empty(rows, width), like.new_empty(rows, width)
        before = like.new_empty(rows, width) if activation == "silu" else outputs
        return cls(outputs, outputs.t(), before, gradient, gradient.t())


def hidden_forward(
    inputs: Tensor, layers: Sequence[Layer], hidden: Sequence[Hidden], activation: str
) -> None:
    """Apply linear layers, an activation after each; fills `outputs` of every `hidden`.

    Args:
        inputs: [M, in].
        layers, hidden: of the same number; none is an identity.
        activation: one of `ACTIVATIONS`.
    """
    for layer, buffers in zip(layers, hidden, strict=True):
        torch.addmm(layer.bias, inputs, layer.transposed, out=buffers.before)
        inputs = buffers.outputs
        if activation == "tanh":
            inputs.tanh_()
        elif activation == "relu":
            inputs.relu_()
        elif activation == "elu":
            aten.elu_(inputs)
        else:
            aten.silu.out(buffers.before, out=inputs)


def hidden_backward(
    inputs: Tensor,
    layers: Sequence[Layer],
    hidden: Sequence[Hidden],
    activation: str,
    accumulate: bool,
) -> None:
    """Write the gradients of the layers, from that by the last one's outputs in its `gradient`.

    Args:
        inputs, layers, hidden, activation: as in `hidden_forward`.
        accumulate: add to what the layers' gradients hold, instead of replacing it.

    The gradient by `inputs` is left to the caller: `gradient` of the first of `hidden`, by then of
    what goes into its activation, times the first weight.
    """
    for number in range(len(layers) - 1, -1, -1):
        layer, own = layers[number], hidden[number]
        _through_activation(own, activation)
        below = inputs if number == 0 else hidden[number - 1].outputs
        store(layer, own.gradient_t, below, own.gradient, 0, accumulate)
        if number:
            torch.mm(own.gradient, layer.weight, out=hidden[number - 1].gradient)


def store(
    layer: Layer, left: Tensor, right: Tensor, outputs: Tensor, rows: int, accumulate: bool
) -> None:
    """Put `left @ right` and the sum of `outputs` over its dimension `rows` into the gradients."""
    if accumulate:
        layer.grad_weight.addmm_(left, right)
        layer.grad_bias.add_(outputs.sum(rows))
    else:
        torch.mm(left, right, out=layer.grad_weight)
        torch.sum(outputs, rows, out=layer.grad_bias)


def _through_activation(own: Hidden, activation: str) -> None:
    """Multiply `gradient` by the activation's derivative, in place."""
    gradient, outputs = own.gradient, own.outputs
    if activation == "tanh":
        aten.tanh_backward.grad_input(gradient, outputs, grad_input=gradient)
    elif activation == "relu":
        aten.threshold_backward.grad_input(gradient, outputs, 0, grad_input=gradient)
    elif activation == "elu":
        aten.elu_backward.grad_input(gradient, 1.0, 1.0, 1.0, True, outputs, grad_input=gradient)
    else:
        aten.silu_backward.grad_input(gradient, own.before, grad_input=gradient)
