"""Actor-critic networks for every supported observation space.

A policy is any `nn.Module` with

    forward(obs) -> (parameters, values [M])

where `parameters` are what its action distribution takes: logits [M, A] for discrete spaces, or
(mean [M, A], log_std [A] or [M, A]) for continuous ones. Two methods are used where they exist and
save work: `actor(obs) -> parameters` and `critic(obs) -> values [M]`. `obs` is a tensor [M, *shape],
or for Dict and Tuple spaces a flat dict of tensors by path ("camera", "pose/0").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from ppo_fast.distributions import Categorical, DiagGaussian, Parameters
from ppo_fast.tree import Tree

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
}


def _layer(linear: nn.Linear | nn.Conv2d, gain: float, ortho: bool) -> nn.Module:
    if ortho:
        nn.init.orthogonal_(linear.weight, gain)
        assert linear.bias is not None
        nn.init.zeros_(linear.bias)
    return linear


def mlp(
    inputs: int, hidden: Sequence[int], outputs: int, activation: str, gain: float, ortho: bool
) -> nn.Sequential:
    """Stack linear layers with an activation between them; `gain` scales the last layer's weights."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [_layer(nn.Linear(inputs, width), math.sqrt(2), ortho), ACTIVATIONS[activation]()]
        inputs = width
    layers.append(_layer(nn.Linear(inputs, outputs), gain, ortho))
    return nn.Sequential(*layers)


def is_image(space: spaces.Space) -> bool:
    """Whether a leaf space holds uint8 images [H, W, C] or [C, H, W]."""
    return isinstance(space, spaces.Box) and space.dtype == "uint8" and len(space.shape) == 3


class ImageEncoder(nn.Module):
    """uint8 images to 512 features by the convolutions of Mnih et al. 2015 (Nature 518).

    The smaller of the first and last axis is taken for the channels. Images below 36 pixels, where
    those kernels do not fit, get two 3x3 convolutions of stride 2 instead.
    """

    def __init__(self, shape: tuple[int, ...], ortho: bool) -> None:
        super().__init__()
        self.channels_last = shape[-1] < shape[0]
        channels, *size = (shape[2], *shape[:2]) if self.channels_last else shape
        kernels = (
            [(32, 8, 4), (64, 4, 2), (64, 3, 1)] if min(size) >= 36 else [(32, 3, 2), (64, 3, 2)]
        )
        layers: list[nn.Module] = []
        for width, kernel, stride in kernels:
            padding = 1 if min(size) < 36 else 0
            convolution = nn.Conv2d(channels, width, kernel, stride, padding)
            layers += [_layer(convolution, math.sqrt(2), ortho), nn.ReLU()]
            channels = width
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, *self._channels_first(shape))).shape[1]
        self.head = nn.Sequential(_layer(nn.Linear(flat, 512), math.sqrt(2), ortho), nn.ReLU())
        self.num_features = 512

    def _channels_first(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[2], shape[0], shape[1]) if self.channels_last else shape

    def forward(self, obs: Tensor) -> Tensor:
        """[M, H, W, C] or [M, C, H, W] uint8 to [M, 512] float32."""
        if self.channels_last:
            obs = obs.movedim(-1, 1)
        first, *others = self.convolutions
        assert isinstance(first, nn.Conv2d)
        # The first weights are scaled instead of the images, which are a thousand times as large.
        x = F.conv2d(obs.float(), first.weight / 255, first.bias, first.stride, first.padding)
        for module in others:
            x = module(x)
        return self.head(x)


class VectorEncoder(nn.Module):
    """Numbers of any shape, flattened to float32; uint8 is scaled to [0, 1]."""

    def __init__(self, shape: tuple[int, ...], scale: float, is_plain: bool) -> None:
        super().__init__()
        self.num_features = math.prod(shape)
        self.scale = scale
        self.is_plain = is_plain
        """whether the features are the stored observations themselves"""

    def forward(self, obs: Tensor) -> Tensor:
        """[M, *shape] to [M, prod(shape)] float32."""
        features = obs.flatten(1) if obs.dim() > 2 else obs.reshape(obs.shape[0], self.num_features)
        features = features.float()
        return features if self.scale == 1 else features * self.scale


class OneHotEncoder(nn.Module):
    """Integers to concatenated one-hot vectors, one per head."""

    def __init__(self, sizes: Sequence[int], start: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.num_features = sum(self.sizes)
        self.start: Tensor
        self.register_buffer("start", torch.tensor(start), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """[M] or [M, heads...] integers to [M, sum(sizes)] float32."""
        index = obs.reshape(obs.shape[0], -1).long() - self.start
        heads = zip(index.unbind(1), self.sizes, strict=True)
        return torch.cat([F.one_hot(head, size) for head, size in heads], 1).float()


def _encoder_for(space: spaces.Space, ortho: bool) -> ImageEncoder | VectorEncoder | OneHotEncoder:
    if is_image(space):
        assert space.shape is not None
        return ImageEncoder(space.shape, ortho)
    if isinstance(space, spaces.Box):
        is_plain = space.dtype.kind == "f" and len(space.shape) == 1
        return VectorEncoder(space.shape, 1 / 255 if space.dtype == "uint8" else 1.0, is_plain)
    if isinstance(space, spaces.MultiBinary):
        return VectorEncoder(space.shape, 1.0, False)
    if isinstance(space, spaces.Discrete):
        return OneHotEncoder([int(space.n)], [int(space.start)])
    if isinstance(space, spaces.MultiDiscrete):
        return OneHotEncoder(space.nvec.reshape(-1).tolist(), space.start.reshape(-1).tolist())
    raise ValueError(
        f"observation space {space} is not supported; expected Box, Discrete, MultiDiscrete, "
        "MultiBinary, or Dict and Tuple of these"
    )


class Encoder(nn.Module):
    """Any supported observation to one feature vector: leaves encoded apart, then concatenated."""

    def __init__(self, leaves: dict[str, spaces.Space], ortho: bool) -> None:
        super().__init__()
        self.paths = list(leaves)
        encoders = [_encoder_for(space, ortho) for space in leaves.values()]
        self.encoders = nn.ModuleList(encoders)
        self.num_features = sum(encoder.num_features for encoder in encoders)

    def forward(self, obs: Tree) -> Tensor:
        """A leaf or a dict of leaves to [M, num_features] float32."""
        if isinstance(obs, Tensor):
            return self.encoders[0](obs)
        features = [
            encoder(obs[path]) for path, encoder in zip(self.paths, self.encoders, strict=True)
        ]
        return torch.cat(features, 1)


class ActorCritic(nn.Module):
    """The default policy: an encoder, a trunk if asked for, then separate actor and critic networks.

    On a lone image both are a single linear layer over the shared convolutional features (CleanRL's
    and SB3's layout); otherwise both are MLPs of `hidden_sizes`. Continuous actions have a
    state-independent log standard deviation.
    """

    def __init__(
        self,
        leaves: dict[str, spaces.Space],
        distribution: Categorical | DiagGaussian,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        ortho_init: bool = True,
        log_std_init: float = 0.0,
        shared_sizes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.encoder = Encoder(leaves, ortho_init)
        self.activation = activation
        features = self.encoder.num_features
        trunk: list[nn.Module] = []
        for width in shared_sizes:
            linear = _layer(nn.Linear(features, width), math.sqrt(2), ortho_init)
            trunk += [linear, ACTIVATIONS[activation]()]
            features = width
        self.trunk = nn.Sequential(*trunk)
        if len(leaves) == 1 and is_image(next(iter(leaves.values()))):
            hidden_sizes = ()
        outputs = distribution.num_outputs
        self.actor_net = mlp(features, hidden_sizes, outputs, activation, 0.01, ortho_init)
        self.critic_net = mlp(features, hidden_sizes, 1, activation, 1.0, ortho_init)
        self.log_std: nn.Parameter | None = None
        if isinstance(distribution, DiagGaussian):
            self.log_std = nn.Parameter(torch.full((outputs,), float(log_std_init)))

    def _parameters_of(self, features: Tensor) -> Parameters:
        outputs = self.actor_net(features)
        return outputs if self.log_std is None else (outputs, self.log_std)

    def actor(self, obs: Tree) -> Parameters:
        """Distribution parameters [M, num_outputs]."""
        return self._parameters_of(self.trunk(self.encoder(obs)))

    def critic(self, obs: Tree) -> Tensor:
        """Values [M]."""
        return self.critic_net(self.trunk(self.encoder(obs))).squeeze(-1)

    def forward(self, obs: Tree) -> tuple[Parameters, Tensor]:
        """Distribution parameters and values, encoder and trunk run once."""
        features = self.trunk(self.encoder(obs))
        return self._parameters_of(features), self.critic_net(features).squeeze(-1)


def actor_of(policy: Any, obs: Tree) -> Parameters:
    """Distribution parameters of any policy module, by the cheapest way it offers."""
    actor: Any = getattr(policy, "actor", None)
    return policy(obs)[0] if actor is None else actor(obs)


def critic_of(policy: Any, obs: Tree) -> Tensor:
    """Values [M] of any policy module, by the cheapest way it offers."""
    critic: Any = getattr(policy, "critic", None)
    return (policy(obs)[1] if critic is None else critic(obs)).reshape(-1)
