"""The explicit gradient equals autograd's, for every head, activation and option."""

import pytest
import torch
from gymnasium import spaces

from ppo_fast.control.actor import MLPActor, ModuleActor, make_actor
from ppo_fast.control.explicit import why_not_explicit
from ppo_fast.control.loss import AutogradLoss, ExplicitLoss, make_loss
from ppo_fast.dispatch import backend
from ppo_fast.distributions import distribution_for
from ppo_fast.models import ActorCritic
from ppo_fast.rollout import Batch, Rollout
from ppo_fast.update import FlatAdam

M = 48
OBSERVATIONS = spaces.Box(-1, 1, (5,), dtype="float32")
ACTIONS = {
    "discrete": spaces.Discrete(4),
    "multi": spaces.MultiDiscrete([2, 3, 4]),
    "box": spaces.Box(-1, 1, (3,), dtype="float32"),
}
OPTIONS = {
    "clip_coef": 0.2,
    "clip_coef_high": 0.3,
    "dual_clip": 3.0,
    "vf_coef": 0.7,
    "vf_clip_coef": 0.1,
    "vf_clip": "max",
    "ent_coef": 0.02,
    "old_kl_coef": 0.1,
    "norm_adv": True,
}


def setup(action="discrete", activation="tanh", hidden=(16, 8), squash=False, masked=False, seed=0):
    torch.manual_seed(seed)
    distribution = distribution_for(ACTIONS[action], squash)
    policy = ActorCritic({"": OBSERVATIONS}, distribution, hidden, activation)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    optimizer = FlatAdam(policy.parameters(), 1e-3)
    obs = torch.randn(M, 5)
    generator = torch.Generator().manual_seed(seed)
    action_mask = None
    if masked and action != "box":
        action_mask = torch.rand(M, distribution.num_outputs) < 0.7
        for head in action_mask.split(distribution.head_sizes, 1):
            head[:, 0] = True
    with torch.no_grad():
        parameters, values = policy(obs)
        noise = distribution.noise((M,), torch.device("cpu"), generator)
        actions = distribution.sample(parameters, noise, action_mask)
        log_probs = distribution.log_probs(parameters, actions, action_mask)
    batch = Batch(
        inputs=obs,
        actions=actions,
        log_probs=log_probs + 0.3 * torch.randn(M),
        values=values + 0.2 * torch.randn(M),
        advantages=torch.randn(M),
        returns=values + torch.randn(M),
        mask=torch.rand(M) < 0.8 if masked else None,
        weights=torch.rand(M) if masked else None,
        action_mask=action_mask,
    )
    return policy, distribution, optimizer, batch


def rollout_of(batch, steps):
    """An empty rollout of as many environments as the batch has rows."""
    flags = torch.zeros(3, steps, M, dtype=torch.bool)
    return Rollout(
        inputs=torch.zeros(steps + 1, M, 5),
        actions=torch.zeros(steps, *batch.actions.shape, dtype=batch.actions.dtype),
        rewards=torch.zeros(steps, M),
        terminated=flags[0],
        truncated=flags[1],
        mask=flags[2],
        values=torch.zeros(steps + 1, M),
        bootstrap_values=torch.zeros(steps, M),
        log_probs=torch.zeros(steps, M),
    )


def gradient_of(policy):
    return torch.cat([p.grad.reshape(-1) for p in policy.parameters()]).clone()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("action", "activation", "hidden", "squash"),
    [
        ("discrete", "tanh", (16, 8), False),
        ("discrete", "relu", (16,), False),
        ("discrete", "elu", (16, 8, 8), False),
        ("discrete", "silu", (16, 8), False),
        ("discrete", "tanh", (), False),
        ("multi", "tanh", (16, 8), False),
        ("box", "tanh", (16, 8), False),
        ("box", "elu", (16,), True),
    ],
)
def test_explicit_gradient_equals_autograd(action, activation, hidden, squash, masked):
    policy, distribution, optimizer, batch = setup(action, activation, hidden, squash, masked)
    optimizer.zero_grad()
    expected = AutogradLoss(policy, distribution, lambda: OPTIONS)(batch)
    expected.loss.backward()
    gradient = gradient_of(policy)
    for parameter in policy.parameters():  # whatever was there must be overwritten
        parameter.grad.fill_(float("nan"))
    result = ExplicitLoss(policy, distribution, lambda: OPTIONS, optimizer)(batch)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, expected.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.stats, expected.stats, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of(policy), gradient, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-3


def test_an_index_picks_the_rows():
    policy, distribution, optimizer, batch = setup()
    loss = ExplicitLoss(policy, distribution, lambda: OPTIONS, optimizer)
    index = torch.tensor([3, 1, 40, 3])
    picked = loss(batch, index)
    gradient = gradient_of(policy)
    rows = loss(batch.take(index))
    assert torch.equal(picked.stats, rows.stats)
    assert torch.equal(gradient, gradient_of(policy))


def test_a_forced_backend_goes_through_the_op():
    policy, distribution, optimizer, batch = setup()
    loss = ExplicitLoss(policy, distribution, lambda: OPTIONS, optimizer)
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match="actor_critic_loss_and_grads: backend 'triton'"),
    ):
        loss(batch)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("action", ACTIONS)
def test_both_actors_of_a_rollout_choose_the_same(action, masked):
    policy, distribution, _, batch = setup(action, masked=masked)
    if masked and batch.action_mask is None:
        return
    noise = distribution.noise((3, M), torch.device("cpu"), torch.Generator().manual_seed(0))
    chosen = []
    for kind in (MLPActor, ModuleActor):
        rollout = rollout_of(batch, 3)
        actions = rollout.actions
        actor = kind(policy, distribution, rollout)
        actor.begin(noise.clone())
        with torch.no_grad():
            for t in range(3):
                row = actor.act(t, batch.inputs, batch.action_mask)
                assert row.data_ptr() == actions[t].data_ptr()
        chosen.append(actions)
    torch.testing.assert_close(*chosen)
    assert not torch.equal(chosen[0][0], chosen[0][1])


def test_it_follows_loaded_parameters():
    policy, distribution, _, batch = setup("box")
    actor = make_actor(policy, distribution, rollout_of(batch, 1))
    policy.load_state_dict({k: torch.zeros_like(v) for k, v in policy.state_dict().items()})
    actor.begin(torch.ones(1, *batch.actions.shape))
    with torch.no_grad():
        assert (actor.act(0, batch.inputs, None) == 1).all()


def test_policies_it_does_not_fit_take_autograd():
    policy, distribution, optimizer, _ = setup()
    assert isinstance(make_loss(policy, distribution, dict, optimizer), ExplicitLoss)

    class Own(ActorCritic):
        pass

    own = Own({"": OBSERVATIONS}, distribution)
    assert "module of the user's own" in why_not_explicit(own)
    images = {"": spaces.Box(0, 255, (36, 36, 3), dtype="uint8")}
    assert "encoder has parameters" in why_not_explicit(ActorCritic(images, distribution))
    policy.actor_net[0].weight.requires_grad_(False)
    assert "frozen" in why_not_explicit(policy)
    policy.actor_net[0].weight.requires_grad_(True)
    handle = policy.critic_net.register_forward_hook(lambda *_: None)
    assert "hooks" in why_not_explicit(policy)
    handle.remove()
    assert isinstance(make_loss(policy, distribution, dict, optimizer), ExplicitLoss)
