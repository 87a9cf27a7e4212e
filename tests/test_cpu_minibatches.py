"""`CPUMinibatches` against `actor_critic_loss_and_grads`, minibatch by minibatch."""

import dataclasses

import pytest
import torch

from ppo_fast.control import cpu_minibatches
from ppo_fast.control.cpu_minibatches import CPUMinibatches, why_not_here
from ppo_fast.functional.actor_critic import actor_critic_loss_and_grads
from ppo_fast.results import ActorCriticSpec
from ppo_fast.rollout import Batch

D = 5
OPTIONS = {
    "clip_coef": 0.2,
    "clip_coef_high": 0.3,
    "dual_clip": None,
    "vf_coef": 0.7,
    "vf_clip_coef": 0.1,
    "vf_clip": "max",
    "ent_coef": 0.02,
    "old_kl_coef": 0.0,
    "norm_adv": True,
}
SPECS = {
    "discrete": ActorCriticSpec(D, (), (16, 8), (16, 8), 3, "tanh", (3,)),
    "two": ActorCriticSpec(D, (), (8,), (8,), 2, "relu", (2,)),
    "multi": ActorCriticSpec(D, (), (16, 12, 8), (16, 12, 8), 6, "elu", (1, 3, 2)),
    "gaussian": ActorCriticSpec(D, (), (16, 8), (16, 8), 3, "tanh", None),
}


def make(spec, rows, seed=0):
    torch.manual_seed(seed)
    parameters = 0.4 * torch.randn(spec.num_parameters)
    if spec.head_sizes is None:
        actions = torch.randn(rows, spec.num_outputs)
    else:
        heads = [torch.randint(size, (rows,)) for size in spec.head_sizes]
        actions = heads[0] if len(heads) == 1 else torch.stack(heads, 1)
    batch = Batch(
        inputs=torch.randn(rows, D),
        actions=actions,
        log_probs=-1.5 + 0.5 * torch.randn(rows),
        values=torch.randn(rows),
        advantages=torch.randn(rows),
        returns=torch.randn(rows),
    )
    return parameters, batch


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_adv": False, "ent_coef": 0.0}, {"vf_clip_coef": None, "clip_coef_high": None}],
    ids=["all", "few", "no value clip"],
)
@pytest.mark.parametrize("block", [1 << 16, 16 * 4])
@pytest.mark.parametrize("rows", [40, 43])
@pytest.mark.parametrize("name", SPECS)
def test_gradients_and_stats_equal_the_ops(name, rows, block, options, monkeypatch):
    monkeypatch.setattr(cpu_minibatches, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(cpu_minibatches, "STATS_ROWS", 25)  # two minibatches at a time
    spec, options = SPECS[name], {**OPTIONS, **options}
    parameters, batch = make(spec, rows)
    gradients = torch.full_like(parameters, float("nan"))
    small = CPUMinibatches(parameters, gradients, spec)
    generator = torch.Generator().manual_seed(3)
    small.prepare(batch, batch.inputs, options, epochs=2, k=4)
    expected = []
    for epoch in range(2):
        order = torch.randperm(rows, generator=generator)
        small.begin(epoch, order)
        for part, index in enumerate(order.tensor_split(4)):
            b = batch.take(index)
            wanted = torch.empty_like(parameters)
            result = actor_critic_loss_and_grads(
                *(parameters, wanted, spec, b.inputs, b.actions, b.log_probs),
                *(b.advantages, b.values, b.returns),
                **options,
            )
            small.run(4 * epoch + part)
            error = (gradients - wanted).norm() / wanted.norm()
            assert error < 3e-6
            torch.testing.assert_close(small.approx_kl(), result.approx_kl, rtol=1e-5, atol=1e-6)
            expected.append(result.stats)
            parameters.add_(0.01 * torch.randn_like(parameters))
    torch.testing.assert_close(small.stats(), torch.stack(expected), rtol=2e-5, atol=2e-6)


def test_it_serves_update_after_update():
    spec = SPECS["discrete"]
    parameters, _ = make(spec, 8)
    gradients = torch.empty_like(parameters)
    kept = CPUMinibatches(parameters, gradients, spec)
    for seed, rows in enumerate((40, 40, 38, 41, 40)):
        _, batch = make(spec, rows, seed)
        order = torch.randperm(rows)
        found = []
        for small in (kept, CPUMinibatches(parameters, gradients, spec)):
            small.prepare(batch, batch.inputs, OPTIONS, epochs=1, k=3)
            small.begin(0, order)
            for part in range(3):
                small.run(part)
                found.append(gradients.clone())
            found.append(small.stats())
        for own, fresh in zip(found[:4], found[4:], strict=True):
            assert torch.equal(own, fresh)


def test_stats_of_an_update_that_stopped_early():
    spec = SPECS["gaussian"]
    parameters, batch = make(spec, 40)
    small = CPUMinibatches(parameters, torch.empty_like(parameters), spec)
    small.prepare(batch, batch.inputs, OPTIONS, epochs=3, k=4)
    small.begin(0, torch.arange(40))
    small.run(0)
    small.run(1)
    stats = small.stats()
    assert stats.shape == (2, 12)
    assert stats.isfinite().all()


def test_equal_advantages_are_whitened_to_zero():
    spec = SPECS["discrete"]
    parameters, batch = make(spec, 40)
    batch = dataclasses.replace(batch, advantages=torch.full((40,), 0.1))
    small = CPUMinibatches(parameters, torch.empty_like(parameters), spec)
    small.prepare(batch, batch.inputs, OPTIONS, epochs=1, k=4)
    small.begin(0, torch.arange(40))
    assert (torch.stack(small.neg_advantages) == 0).all()


def test_a_nan_shows_in_the_gradient():
    spec = SPECS["discrete"]
    for field in ("log_probs", "returns", "advantages"):
        parameters, batch = make(spec, 40)
        getattr(batch, field)[7] = float("nan")
        gradients = torch.zeros_like(parameters)
        small = CPUMinibatches(parameters, gradients, spec)
        small.prepare(batch, batch.inputs, OPTIONS, epochs=1, k=1)
        small.begin(0, torch.arange(40))
        small.run(0)
        assert not gradients.isfinite().all()


@pytest.mark.parametrize(
    ("change", "rows", "message"),
    [
        ({}, 1, "1 rows"),
        ({"spec": {"actor_sizes": (8,)}}, 10, "differ in their hidden layers"),
        ({"spec": {"shared_sizes": (8,)}}, 10, "differ in their hidden layers"),
        ({"spec": {"activation": "silu"}}, 10, "silu"),
        ({"batch": {"mask": torch.ones(40, dtype=torch.bool)}}, 10, "masked"),
        ({"options": {"dual_clip": 3.0}}, 10, "more terms"),
        ({"options": {"old_kl_coef": 0.1}}, 10, "more terms"),
        ({"options": {"vf_clip": "clipped"}}, 10, "clipped otherwise"),
    ],
)
def test_what_it_does_not_do_is_said(change, rows, message):
    spec = SPECS["discrete"]._replace(**change.get("spec", {}))
    _, batch = make(SPECS["discrete"], 40)
    batch = dataclasses.replace(batch, **change.get("batch", {}))
    assert message in why_not_here(spec, batch, rows, {**OPTIONS, **change.get("options", {})})
    assert why_not_here(SPECS["discrete"], make(spec, 40)[1], 10, OPTIONS) == ""
