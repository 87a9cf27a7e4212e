"""A multilayer perceptron forward and backward, without autograd.

On small batches autograd's bookkeeping costs more than the products: an explicit backward of a
64 x 64 network on 256 rows takes less than half the time (benchmarks/bench_control.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("tanh", "relu", "elu")
"""Activations whose derivative follows from their output."""


class Layer(NamedTuple):
    """One linear layer; weights are [out, in], as in `torch.nn.Linear`."""

    weight: Tensor
    transposed: Tensor
    """a view of `weight`, [in, out]: making one takes a third as long as a small product"""
    bias: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def mlp_forward(inputs: Tensor, layers: Sequence[Layer], activation: str) -> list[Tensor]:
    """Apply linear layers with an activation between them.

    Args:
        inputs: [M, in].
        layers: at least one.
        activation: "tanh", "relu" or "elu".

    Returns:
        The input of every layer, then the output [M, out] of the last.
    """
    values = [inputs]
    for number, layer in enumerate(layers):
        if number:
            values[-1] = _activate_(values[-1], activation)
        values.append(torch.addmm(layer.bias, values[-1], layer.transposed))
    return values


def mlp_backward(
    grad_output: Tensor, values: Sequence[Tensor], layers: Sequence[Layer], activation: str
) -> None:
    """Write the gradients of every layer over what `grad_weight` and `grad_bias` held.

    Args:
        grad_output: [M, out], of the loss by the output.
        values: what `mlp_forward` returned.
        layers, activation: what it was given.
    """
    gradient = grad_output
    for number in range(len(layers) - 1, -1, -1):
        layer, value = layers[number], values[number]
        torch.mm(gradient.t(), value, out=layer.grad_weight)
        torch.sum(gradient, 0, out=layer.grad_bias)
        if number:
            gradient = _through_activation(gradient @ layer.weight, value, activation)


def _activate_(x: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return x.tanh_()
    return x.relu_() if activation == "relu" else torch.nn.functional.elu_(x)


def _through_activation(gradient: Tensor, output: Tensor, activation: str) -> Tensor:
    """Multiply by the activation's derivative, told from its output."""
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(gradient, output)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(gradient, output, 0)
    return torch.ops.aten.elu_backward(gradient, 1.0, 1.0, 1.0, True, output)
