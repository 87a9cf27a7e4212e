"""The floor of training on Atari: the convolutions of the NatureCNN and nothing else.

As many rows pass forwards and backwards as in an iteration of PPO: one forward pass a step to act,
one over the rollout for values is left out (SB3 has the values from acting), then a forward and a
backward pass for every minibatch. No environment, no linear layer, no loss, no optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from peers import NotHere, Trained, Trainer, Watch

if TYPE_CHECKING:
    from ppo_fast.config import ControlConfig


def convolutions() -> nn.Sequential:
    """Mnih et al. 2015 (Nature 518): 84 x 84 frames, four stacked."""
    return nn.Sequential(
        *(nn.Conv2d(4, 32, 8, 4), nn.ReLU()),
        *(nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, 1), nn.ReLU()),
    )


def build(env_id: str, config: ControlConfig) -> Trainer:
    if not env_id.endswith("NoFrameskip-v4"):
        raise NotHere("belongs to Atari")
    c = config
    num_envs = c.num_envs or 8
    batch_size = num_envs * c.num_steps
    torch.manual_seed(c.seed)
    net = convolutions()
    rollout = torch.rand(num_envs, 4, 84, 84)
    rows = torch.rand(batch_size // c.num_minibatches, 4, 84, 84)
    upstream = torch.rand_like(net(rows))

    def train(total_timesteps: int, watch: Watch) -> Trained:
        steps = 0
        while steps < total_timesteps:
            with torch.no_grad():
                for _ in range(c.num_steps):
                    net(rollout)
            for _ in range(c.update_epochs * c.num_minibatches):
                net.zero_grad()
                net(rows).backward(upstream)
            steps += batch_size
            if watch(steps, []):
                break
        return Trained(steps, [], {})

    return train
