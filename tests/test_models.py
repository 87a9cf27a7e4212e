"""Networks for every pair of spaces, and the action distributions over their outputs."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

from ppo_fast.control.spaces import as_batch, space_leaves
from ppo_fast.distributions import distribution_for
from ppo_fast.models import ActorCritic, ImageEncoder, actor_of, critic_of, is_image

CPU = torch.device("cpu")
ROWS = 5
OBSERVATIONS = {
    "vector": spaces.Box(-1, 1, (3,), np.float32),
    "scalar": spaces.Box(-1, 1, (), np.float64),
    "matrix": spaces.Box(-1, 1, (2, 3), np.float32),
    "bytes": spaces.Box(0, 255, (128,), np.uint8),
    "image": spaces.Box(0, 255, (40, 36, 3), np.uint8),
    "discrete": spaces.Discrete(4, start=2),
    "multi-discrete": spaces.MultiDiscrete([2, 5], start=[1, -3]),
    "multi-discrete matrix": spaces.MultiDiscrete([[2, 3], [4, 5]]),
    "multi-binary": spaces.MultiBinary([2, 2]),
    "dict": spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (3, 9, 9), np.uint8),
            "pose": spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Discrete(3))),
        }
    ),
}
ACTIONS = {
    "discrete": spaces.Discrete(3, start=-1),
    "multi-discrete": spaces.MultiDiscrete([2, 5, 3]),
    "multi-discrete matrix": spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, 7]]),
    "multi-binary": spaces.MultiBinary([2, 3]),
    "box": spaces.Box(-0.5, 2.0, (2,), np.float32),
    "box matrix": spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
}


def build(observation_space, action_space, **options):
    torch.manual_seed(0)
    leaves = space_leaves(observation_space)
    distribution = distribution_for(action_space)
    return ActorCritic(leaves, distribution, (16,), **options), distribution, leaves


def observations(space, rows=ROWS):
    space.seed(0)
    sampled = [space.sample() for _ in range(rows)]
    if isinstance(space, spaces.Dict):
        return {k: observations(child, rows) for k, child in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(observations(child, rows) for child in space.spaces)
    return np.stack(sampled)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_every_pair_of_spaces_builds_acts_and_evaluates(observation, action):
    space = ACTIONS[action]
    policy, distribution, leaves = build(OBSERVATIONS[observation], space)
    obs, _ = as_batch(observations(OBSERVATIONS[observation]), leaves, CPU)
    parameters, values = policy(obs)
    assert values.shape == (ROWS,) and values.dtype == torch.float32
    noise = distribution.noise((ROWS,), CPU, generator())
    for actions in (
        distribution.sample(parameters, noise, None),
        distribution.mode(parameters, None),
    ):
        assert actions.shape == (ROWS, *distribution.action_shape)
        assert distribution.log_probs(parameters, actions, None).shape == (ROWS,)
        for row in distribution.to_env(actions.detach()).numpy():
            assert space.contains(row if row.shape else row[()])
    torch.testing.assert_close(actor_of(policy, obs), parameters)
    torch.testing.assert_close(critic_of(policy, obs), values)


@pytest.mark.parametrize("action", ACTIONS)
def test_the_loss_reaches_every_parameter(action):
    policy, distribution, leaves = build(OBSERVATIONS["dict"], ACTIONS[action], ortho_init=False)
    obs, _ = as_batch(observations(OBSERVATIONS["dict"], 16), leaves, CPU)
    parameters, values = policy(obs)
    noise = distribution.noise((16,), CPU, generator())
    actions = distribution.sample(parameters, noise, None).detach()
    old = distribution.log_probs(parameters, actions, None).detach()
    advantages = torch.randn(16, generator=generator())
    result = distribution.loss(
        parameters, actions, old, advantages, None, clip_coef=0.2, values=values, returns=advantages
    )
    result.loss.backward()
    assert result.ratio_deviation < 1e-5
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# Encoders


def test_images_are_uint8_of_rank_three():
    assert is_image(spaces.Box(0, 255, (8, 8, 3), np.uint8))
    assert not is_image(spaces.Box(0, 255, (8, 8), np.uint8))
    assert not is_image(spaces.Box(0, 1, (8, 8, 3), np.float32))


def test_channels_first_and_last_give_the_same_features():
    last, first = ImageEncoder((40, 44, 3), True), ImageEncoder((3, 40, 44), True)
    assert last.channels_last and not first.channels_last
    first.load_state_dict(last.state_dict())
    image = torch.randint(0, 256, (2, 40, 44, 3), dtype=torch.uint8, generator=generator())
    torch.testing.assert_close(last(image), first(image.movedim(-1, 1)))


def test_images_of_36_pixels_and_more_get_the_convolutions_of_mnih_et_al():
    shapes = [tuple(p.shape) for p in ImageEncoder((4, 84, 84), True).parameters() if p.dim() > 1]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]
    assert ImageEncoder((36, 36, 1), True)(torch.zeros(2, 36, 36, 1)).shape == (2, 512)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 7, 3), (3, 35, 90), (35, 35, 4)])
def test_small_images_get_small_convolutions(shape):
    encoder = ImageEncoder(shape, True)
    assert encoder(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, 512)
    assert sum(p.numel() for p in encoder.parameters()) < 8e6


def test_bytes_are_scaled_to_one():
    encoder = ImageEncoder((3, 40, 36), True)
    white = encoder(torch.full((1, 3, 40, 36), 255, dtype=torch.uint8))
    want = encoder.head(encoder.convolutions(torch.ones(1, 3, 40, 36)))
    torch.testing.assert_close(white, want)
    policy, _, _ = build(OBSERVATIONS["bytes"], ACTIONS["discrete"])
    features = policy.encoder(torch.full((1, 128), 255, dtype=torch.uint8))
    torch.testing.assert_close(features, torch.ones(1, 128))


def test_integers_become_one_hot_vectors():
    policy, _, _ = build(OBSERVATIONS["discrete"], ACTIONS["discrete"])
    assert policy.encoder(torch.tensor([2, 5])).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    policy, _, _ = build(OBSERVATIONS["multi-discrete"], ACTIONS["discrete"])
    assert policy.encoder(torch.tensor([[2, -3]])).tolist() == [[0, 1, 1, 0, 0, 0, 0]]


def test_leaves_are_concatenated_by_path_whatever_their_order_in_the_observation():
    policy, _, leaves = build(OBSERVATIONS["dict"], ACTIONS["discrete"])
    obs, _ = as_batch(observations(OBSERVATIONS["dict"]), leaves, CPU)
    shuffled = dict(reversed(obs.items()))
    torch.testing.assert_close(policy.encoder(obs), policy.encoder(shuffled))


# Initialisation


def singular_values(layer):
    return torch.linalg.svdvals(layer.weight.detach().flatten(1))


def test_orthogonal_gains_are_sqrt_two_and_those_of_the_heads():
    policy, _, _ = build(OBSERVATIONS["vector"], ACTIONS["discrete"])
    gains = {"actor_net": (math.sqrt(2), 0.01), "critic_net": (math.sqrt(2), 1.0)}
    for name, wanted in gains.items():
        layers = [layer for layer in getattr(policy, name) if isinstance(layer, nn.Linear)]
        for layer, gain in zip(layers, wanted, strict=True):
            want = torch.full((min(layer.weight.shape),), gain)
            torch.testing.assert_close(singular_values(layer), want, rtol=1e-4, atol=1e-6)
            assert (layer.bias == 0).all()
    for layer in ImageEncoder((3, 36, 36), True).convolutions:
        if isinstance(layer, nn.Conv2d):
            want = torch.full((layer.out_channels,), math.sqrt(2))
            torch.testing.assert_close(singular_values(layer), want, rtol=1e-4, atol=1e-6)


def test_without_orthogonal_init_torchs_own_stays():
    torch.manual_seed(0)
    want = nn.Linear(3, 16).weight
    torch.manual_seed(0)
    leaves = space_leaves(OBSERVATIONS["vector"])
    policy = ActorCritic(leaves, distribution_for(ACTIONS["discrete"]), (16,), ortho_init=False)
    assert torch.equal(policy.actor_net[0].weight, want)


def test_hidden_sizes_activation_and_log_std_are_the_configs():
    leaves = space_leaves(OBSERVATIONS["vector"])
    distribution = distribution_for(ACTIONS["box"])
    policy = ActorCritic(leaves, distribution, (7, 5, 3), "silu", log_std_init=-1.5)
    widths = [layer.out_features for layer in policy.actor_net if isinstance(layer, nn.Linear)]
    assert widths == [7, 5, 3, 2] and isinstance(policy.critic_net[1], nn.SiLU)
    assert policy.log_std.tolist() == [-1.5, -1.5]
    assert ActorCritic(leaves, distribution, ())(torch.zeros(2, 3))[1].shape == (2,)


def test_a_module_with_forward_alone_is_a_policy():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 4)

        def forward(self, obs):
            out = self.net(obs)
            return out[:, :3], out[:, 3:]  # values [M, 1]

    policy, obs = Own(), torch.randn(ROWS, 3, generator=generator())
    assert torch.equal(actor_of(policy, obs), policy(obs)[0])
    assert critic_of(policy, obs).shape == (ROWS,)


# Distributions


LOGITS = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0, -3.0, 0.7, 0.1, 1.1, -1.0])
HEADS = (2, 5, 3)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def draw(distribution, parameters, rows, mask=None):
    noise = distribution.noise((rows,), CPU, generator())
    parameters = parameters.expand(rows, -1) if isinstance(parameters, torch.Tensor) else parameters
    return distribution.sample(parameters, noise, mask)


def test_discrete_samples_follow_the_softmax():
    distribution = distribution_for(spaces.Discrete(10))
    counts = draw(distribution, LOGITS, 100_000).bincount(minlength=10)
    assert chi_square(counts, LOGITS.softmax(-1)) < 27.9  # 0.999 quantile, 9 degrees of freedom


def test_the_heads_of_a_multi_discrete_action_are_independent():
    distribution = distribution_for(spaces.MultiDiscrete(HEADS))
    actions = draw(distribution, LOGITS, 200_000)
    joint = (actions[:, 0] * 5 + actions[:, 1]) * 3 + actions[:, 2]
    a, b, c = (head.softmax(-1) for head in LOGITS.split(HEADS))
    probabilities = (a[:, None, None] * b[:, None] * c).flatten()
    assert chi_square(joint.bincount(minlength=30), probabilities) < 58.3  # 29 degrees of freedom


def test_gaussian_samples_have_mean_and_standard_deviation():
    distribution = distribution_for(spaces.Box(-9, 9, (2,)))
    mean, log_std = torch.tensor([[1.0, -2.0]]), torch.tensor([0.5, -1.0])
    actions = draw(distribution, (mean.expand(100_000, -1), log_std), 100_000)
    torch.testing.assert_close(actions.mean(0), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(actions.std(0), log_std.exp(), atol=0.02, rtol=0)


def test_log_probs_of_categoricals_equal_torchs():
    logits = torch.randn(ROWS, 10, generator=generator())
    discrete = distribution_for(spaces.Discrete(10))
    actions = torch.tensor([0, 3, 9, 9, 1])
    want = Categorical(logits=logits).log_prob(actions)
    torch.testing.assert_close(discrete.log_probs(logits, actions, None), want)

    multi = distribution_for(spaces.MultiDiscrete(HEADS))
    actions = torch.tensor([[0, 4, 2], [1, 0, 0], [1, 3, 1], [0, 0, 0], [1, 2, 2]])
    heads = zip(logits.split(HEADS, -1), actions.unbind(-1), strict=True)
    want = sum(Categorical(logits=head).log_prob(action) for head, action in heads)
    torch.testing.assert_close(multi.log_probs(logits, actions, None), want)


def test_a_multi_binary_action_is_a_choice_of_two_per_bit():
    distribution = distribution_for(spaces.MultiBinary(2))
    logits = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    actions = torch.tensor([[1, 1]])
    want = torch.sigmoid(torch.tensor(1.0)).log() + torch.sigmoid(torch.tensor(-2.0)).log()
    torch.testing.assert_close(distribution.log_probs(logits, actions, None), want[None])
    assert distribution.mode(logits, None).tolist() == [[1, 0]]
    assert distribution.to_env(actions).dtype == torch.int8


def test_modes_are_the_likeliest_actions_and_means():
    multi = distribution_for(spaces.MultiDiscrete(HEADS))
    assert multi.mode(LOGITS[None], None).tolist() == [[0, 1, 1]]
    box = distribution_for(ACTIONS["box"])
    mean = torch.tensor([[0.3, 5.0]])
    assert torch.equal(box.mode((mean, torch.zeros(2)), None), mean)


def test_masked_choices_are_never_taken_and_have_no_probability():
    distribution = distribution_for(spaces.MultiDiscrete(HEADS))
    mask = torch.tensor([True, False, False, True, False, True, True, False, True, False])
    logits = LOGITS.masked_fill(~mask, 100.0)
    many = mask.expand(20_000, -1)
    actions = draw(distribution, logits, 20_000, many)
    legal = [set(part.nonzero()[:, 0].tolist()) for part in mask.split(HEADS)]
    assert [set(actions[:, i].tolist()) for i in range(3)] == legal
    assert distribution.mode(logits[None], mask[None]).tolist() == [[0, 1, 1]]
    masked = LOGITS.masked_fill(~mask, -math.inf)
    want = sum(
        Categorical(logits=head, validate_args=False).log_prob(action)
        for head, action in zip(masked.split(HEADS), actions[:50].unbind(-1), strict=True)
    )
    got = distribution.log_probs(logits.expand(50, -1), actions[:50], many[:50])
    torch.testing.assert_close(got, want)


def test_masks_are_checked():
    distribution = distribution_for(spaces.MultiDiscrete([2, 3]))
    good = torch.tensor([[True, False, False, False, True]])
    assert distribution.checked_mask(good, 1) is good
    with pytest.raises(ValueError, match=r"shape \(1, 5\); expected .*\(4, 5\)"):
        distribution.checked_mask(good, 4)
    with pytest.raises(ValueError, match="forbids every choice"):
        distribution.checked_mask(torch.tensor([[False, False, True, True, True]]), 1)
    with pytest.raises(ValueError, match="actions are continuous"):
        distribution_for(ACTIONS["box"]).checked_mask(good, 1)


def test_discrete_actions_begin_at_the_spaces_start():
    distribution = distribution_for(spaces.Discrete(3, start=-1))
    assert distribution.to_env(torch.tensor([0, 2])).tolist() == [-1, 1]
    matrix = distribution_for(ACTIONS["multi-discrete matrix"])
    assert matrix.to_env(torch.tensor([[0, 1, 2, 3]])).tolist() == [[[1, 1], [2, 10]]]


def test_box_actions_are_clipped_for_the_environment_alone():
    distribution = distribution_for(
        spaces.Box(np.array([-1, 0]), np.array([0.1, 9]), dtype=np.float64)
    )
    parameters = torch.tensor([[5.0, -5.0]]), torch.zeros(2)
    stored = distribution.sample(parameters, torch.zeros(1, 2), None)
    assert stored.tolist() == [[5.0, -5.0]]
    env = distribution.to_env(stored)
    assert env.dtype == torch.float64 and env.tolist() == [[0.1, 0.0]]
    want = Normal(*parameters[:1], 1.0).log_prob(stored).sum(-1)
    torch.testing.assert_close(distribution.log_probs(parameters, stored, None), want)


def test_log_probs_of_a_squashed_gaussian_equal_torchs_transformed_normal():
    distribution = distribution_for(spaces.Box(-1, 1, (3,)), squash=True)
    mean = torch.randn(ROWS, 3, generator=generator())
    log_std = torch.tensor([-1.0, 0.0, 0.3])
    u = distribution.sample((mean, log_std), distribution.noise((ROWS,), CPU, generator()), None)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    want = squashed.log_prob(u.tanh()).sum(-1)
    got = distribution.log_probs((mean, log_std), u, None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(distribution.to_env(u), u.tanh())


def test_squashed_actions_fill_the_bounds_and_never_leave_them():
    low, high = np.array([-0.3, 2.0], np.float32), np.array([0.7, 2.1], np.float32)
    distribution = distribution_for(spaces.Box(low, high), squash=True)
    u = torch.linspace(-30, 30, 1001)[:, None].expand(-1, 2)
    actions = distribution.to_env(u).numpy()
    assert (actions >= low).all() and (actions <= high).all()
    np.testing.assert_array_equal(actions[[0, -1]], np.stack([low, high]))
    scale = AffineTransform(torch.tensor(low), torch.tensor(high - low))
    torch.testing.assert_close(torch.tensor(actions), scale((u.tanh() + 1) / 2))


def test_squash_needs_bounds():
    with pytest.raises(ValueError, match="squash = True needs finite bounds"):
        distribution_for(ACTIONS["box matrix"], squash=True)


def test_other_action_spaces_are_refused():
    with pytest.raises(
        ValueError, match=r"action space Text.* is not supported; expected Discrete"
    ):
        distribution_for(spaces.Text(3))
