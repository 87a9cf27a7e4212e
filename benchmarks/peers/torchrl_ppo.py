"""torchrl's PPO as its sota-implementations put it together: Collector, GAE, replay buffer, loss.

Discrete actions only. The advantages are estimated once a rollout, where their script for MuJoCo
does it again before every epoch.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import RewardSum, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.libs.gym import GymEnv
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.advantages import GAE

from peers import NotHere, Trained, Trainer, Watch

if TYPE_CHECKING:
    from ppo_fast.config import ControlConfig

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def _initialised(net: MLP, gain: float) -> MLP:
    linears = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    for layer in linears:
        nn.init.orthogonal_(layer.weight, gain if layer is linears[-1] else 2**0.5)
        nn.init.zeros_(layer.bias)
    return net


def build(env_id: str, config: ControlConfig) -> Trainer:
    """Make the collector and its loop on a `SerialEnv`.

    Raises:
        NotHere: continuous actions.
    """
    c = config
    num_envs = c.num_envs or 8
    torch.manual_seed(c.seed)
    batch_size = num_envs * c.num_steps

    def one() -> GymEnv:
        return GymEnv(env_id, categorical_action_encoding=True)

    envs = TransformedEnv(SerialEnv(num_envs, one), RewardSum())
    envs.append_transform(StepCounter())
    envs.set_seed(c.seed)
    if not hasattr(envs.action_spec, "n"):
        raise NotHere("is written for discrete actions")
    obs_size = envs.observation_spec["observation"].shape[-1]
    cells, activation = list(c.hidden_sizes), ACTIVATIONS[c.activation]
    choices = int(envs.action_spec.space.n)
    net = MLP(
        in_features=obs_size, out_features=choices, num_cells=cells, activation_class=activation
    )
    actor = ProbabilisticActor(
        TensorDictModule(_initialised(net, 0.01), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        spec=envs.action_spec,
        distribution_class=Categorical,
        return_log_prob=True,
    )
    value_net = MLP(
        in_features=obs_size, out_features=1, num_cells=cells, activation_class=activation
    )
    critic = ValueOperator(_initialised(value_net, 1.0), in_keys=["observation"])
    advantage = GAE(gamma=c.gamma, lmbda=c.gae_lambda, value_network=critic, average_gae=False)
    loss_module = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=c.clip_coef,
        entropy_coeff=c.ent_coef,
        # Its value loss has no 1/2.
        critic_coeff=c.vf_coef / 2,
        loss_critic_type="l2",
        normalize_advantage=c.norm_adv == "minibatch",
        clip_value=c.vf_clip_coef if c.vf_clip_coef is not None else False,
    )
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=c.learning_rate, eps=c.adam_eps)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(batch_size),
        sampler=SamplerWithoutReplacement(),
        batch_size=batch_size // c.num_minibatches,
    )

    def train(total_timesteps: int, watch: Watch) -> Trained:
        iterations = -(-total_timesteps // batch_size)
        collector = Collector(
            envs,
            actor,
            frames_per_batch=batch_size,
            total_frames=iterations * batch_size,
            device="cpu",
        )
        returns: deque[float] = deque(maxlen=100)
        steps = 0
        for iteration, data in enumerate(collector):
            ended = data["next", "done"]
            returns.extend(data["next", "episode_reward"][ended].tolist())
            if c.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - iteration / iterations) * c.learning_rate
            with torch.no_grad():
                data = advantage(data)
            for _ in range(c.update_epochs):
                buffer.extend(data.reshape(-1))
                for rows in buffer:
                    losses = loss_module(rows)
                    total = (
                        losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]
                    )
                    optimizer.zero_grad()
                    total.backward()
                    nn.utils.clip_grad_norm_(loss_module.parameters(), c.max_grad_norm)
                    optimizer.step()
            collector.update_policy_weights_()
            steps += batch_size
            if watch(steps, returns):
                break
        collector.shutdown()
        return Trained(steps, list(returns), {})

    return train
