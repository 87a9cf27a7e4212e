"""The update: what it draws, when it steps and stops, and that it matches a plain loop."""

import pytest
import torch
from torch import nn

from ppo_fast.config import PPOConfig
from ppo_fast.functional import ppo_loss_from_logits
from ppo_fast.results import PPO_STATS
from ppo_fast.rollout import Batch
from ppo_fast.update import FlatAdam, ppo_update

M, D, A = 64, 5, 3
KL = PPO_STATS.index("approx_kl")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(D, 16)
        self.actor, self.critic = nn.Linear(16, A), nn.Linear(16, 1)

    def forward(self, obs):
        hidden = self.body(obs).tanh()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def make_batch(net, seed=0):
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(M, D, generator=g)
    with torch.no_grad():
        logits, values = net(obs)
        actions = torch.multinomial(logits.softmax(-1), 1, generator=g).squeeze(-1)
        log_probs = logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    advantages = torch.randn(M, generator=g)
    return Batch(obs, actions, log_probs, values, advantages, values + advantages)


def make_net():
    torch.manual_seed(0)
    return Net()


def loss_of(net, seen=None, **options):
    def loss(batch):
        if seen is not None:
            seen.append(batch.inputs[:, 0].tolist())
        logits, values = net(batch.inputs)
        return ppo_loss_from_logits(
            logits,
            batch.actions,
            batch.log_probs,
            batch.advantages,
            clip_coef=0.2,
            values=values,
            old_values=batch.values,
            returns=batch.returns,
            **options,
        )

    return loss


def run(net, batch, learning_rate=1e-2, loss=None, **config):
    optimizer = FlatAdam(net.parameters(), learning_rate)
    generator = torch.Generator().manual_seed(7)
    stats = ppo_update(loss or loss_of(net), optimizer, batch, PPOConfig(**config), generator)
    return stats, optimizer


def test_every_epoch_sees_every_sample_once_in_a_new_order():
    net, seen = make_net(), []
    batch = make_batch(net)
    run(net, batch, loss=loss_of(net, seen), update_epochs=3, num_minibatches=4)
    epochs = [[x for part in seen[i : i + 4] for x in part] for i in range(0, 12, 4)]
    assert all(sorted(epoch) == sorted(batch.inputs[:, 0].tolist()) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_first_minibatch_has_ratio_one():
    net = make_net()
    stats, _ = run(net, make_batch(net))
    assert stats.first[PPO_STATS.index("ratio_deviation")] < 1e-6
    assert stats.first[KL].abs() < 1e-9


def test_equals_a_plain_loop_with_torch_adam_and_clip_grad_norm():
    ours, plain = make_net(), make_net()
    batch = make_batch(ours)
    stats, _ = run(ours, batch, update_epochs=2, num_minibatches=4)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, eps=1e-5)
    generator = torch.Generator().manual_seed(7)
    steps = 0
    for _ in range(2):
        for index in torch.randperm(M, generator=generator).chunk(4):
            adam.zero_grad()
            loss_of(plain)(batch.take(index)).loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            adam.step()
            steps += 1
    assert stats.steps == steps == 8
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_target_kl_stops_before_the_offending_step():
    net = make_net()
    batch = make_batch(net)
    stats, _ = run(net, batch, 0.3, update_epochs=4, target_kl=0.01)
    assert stats.stopped == 1 and stats.steps < 16
    kls, plain = [], make_net()
    adam = torch.optim.Adam(plain.parameters(), lr=0.3, eps=1e-5)
    generator = torch.Generator().manual_seed(7)
    for index in torch.randperm(M, generator=generator).chunk(4):
        adam.zero_grad()
        result = loss_of(plain)(batch.take(index))
        kls.append(float(result.approx_kl))
        if kls[-1] > 0.01:
            break
        result.loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adam.step()
    assert int(stats.steps) == len(kls) - 1
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_non_finite_gradients_are_skipped_and_counted():
    net = make_net()
    batch = make_batch(net)
    batch.advantages[3] = float("inf")
    before = [p.clone() for p in net.parameters()]
    stats, _ = run(net, batch, update_epochs=1, num_minibatches=1)
    assert stats.skipped == 1 and stats.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    stats, _ = run(net, batch, update_epochs=1, num_minibatches=4)
    assert stats.skipped == 1 and stats.steps == 3
    assert all(p.isfinite().all() for p in net.parameters())


def test_adaptive_learning_rate_follows_rsl_rl():
    net = make_net()
    _, shrinking = run(net, make_batch(net), 9e-3, adaptive_lr_kl=1e-7)
    assert shrinking.lr < 9e-3
    net = make_net()
    _, growing = run(net, make_batch(net), 1e-4, adaptive_lr_kl=1.0, update_epochs=20)
    assert growing.lr == pytest.approx(1e-2)


def test_means_leave_out_minibatches_after_the_stop():
    net = make_net()
    stats, _ = run(net, make_batch(net), 0.3, update_epochs=4, target_kl=0.01)
    assert stats.means[PPO_STATS.index("count")] <= M / 4
    assert stats.means.isfinite().all() and stats.last_kl.isfinite()


def test_flat_parameters_stay_the_modules_own():
    net = make_net()
    names = dict(net.named_parameters())
    optimizer = FlatAdam(net.parameters(), 1e-3)
    assert dict(net.named_parameters()) == names
    net.load_state_dict({k: torch.full_like(v, 0.5) for k, v in net.state_dict().items()})
    optimizer.zero_grad()
    for parameter in net.parameters():
        assert (parameter == 0.5).all()
        assert parameter.grad is not None
        parameter.grad.fill_(1.0)
    optimizer.step(torch.tensor(1.0))
    assert all((p < 0.5).all() for p in net.parameters())


def test_mixed_dtypes_frozen_and_tied_parameters_are_taken():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    optimizer = FlatAdam(net.parameters(), 1e-3, max_grad_norm=float("inf"))
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad.fill_(2.0)
    norm, finite = optimizer.step(torch.tensor(1.0))
    count = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert finite and norm == pytest.approx(2 * count**0.5)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        FlatAdam(nn.Linear(2, 2).requires_grad_(False).parameters(), 1e-3)


def test_steps_decided_by_tensors_equal_those_decided_by_numbers():
    """On a GPU no number is read; the same arithmetic on CPU tensors stands in for it here."""
    by_numbers, by_tensors = make_net(), make_net()
    optimizers = [FlatAdam(net.parameters(), 1e-2) for net in (by_numbers, by_tensors)]
    optimizers[1].device = torch.device("cuda")
    calls = [
        (1.0, 1.0, None),
        (1.0, 100.0, False),  # clipped
        (1.0, 1.0, True),  # vetoed
        (float("nan"), 1.0, None),
        (1.0, float("inf"), None),
        (2.0, 0.01, False),
    ]
    moved = []
    for loss, scale, veto in calls:
        before = [p.clone() for p in by_tensors.parameters()]
        outcomes = []
        for net, optimizer in zip((by_numbers, by_tensors), optimizers, strict=True):
            for number, parameter in enumerate(net.parameters()):
                parameter.grad.fill_(scale * (number + 1))
            flag = None if veto is None else torch.tensor(veto)
            outcomes.append(optimizer.step(torch.tensor(loss), flag))
        (norm, finite), (norm_tensor, finite_tensor) = outcomes
        assert isinstance(norm_tensor, torch.Tensor) and bool(finite_tensor) == finite
        assert float(norm_tensor) == pytest.approx(norm) or norm == float("inf")
        for a, b in zip(by_numbers.parameters(), by_tensors.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        pairs = zip(before, by_tensors.parameters(), strict=True)
        moved.append(any(not torch.equal(a, b) for a, b in pairs))
    assert moved == [True, True, False, False, False, True]
