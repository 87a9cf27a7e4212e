"""Tensor environments, captured phases and the fused learner step, on a GPU.

Dry runs (TRITON_INTERPRET=1) rehearse the captures on the CPU with tests/rehearsal.py.
"""

import contextlib
import logging
import os

import learner_arms as learner
import pytest
import torch
from gymnasium import spaces
from rehearsal import Recorder
from torch import nn

from ppo_fast import PPO, capture
from ppo_fast.capture import Phase, record_cuda_graph, rehearsal
from ppo_fast.control.tensor_envs import TENSOR_ENVS, TensorCartPole, TensorPendulum
from ppo_fast.dispatch import backend
from ppo_fast.functional.adam import clipped_adam_
from ppo_fast.models import ActorCritic

DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
NEVER = 10**9
ITERATIONS = capture.EAGER_RUNS + 4
REPEATS = 3 if DRY else 100


@pytest.fixture(autouse=True)
def on_the_device():
    """In place of the folder's default device: a trainer places what it makes by itself."""
    torch.manual_seed(0)


def like_a_gpu():
    """Where phases are recorded."""
    return rehearsal(Recorder()) if DRY else contextlib.nullcontext()


def recorded(function, generators=()):
    """Record a function; (what replays it, its result), after it has run once."""
    if DRY:
        return Recorder()(function, generators)
    replay, result = record_cuda_graph(function, generators)
    replay()
    return replay, result


class Own(nn.Module):
    """A policy of the user's own; with `reads`, one that no graph can hold."""

    def __init__(self, reads=False):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 16), nn.Linear(16, 3)
        self.reads = reads

    def forward(self, obs):
        out = self.heads(self.body(obs).relu())
        if self.reads and out.sum().item() == 0:
            raise AssertionError
        return out[:, :2], out[:, 2]


class Plain(ActorCritic):
    """The default network as a module that PPO does not know: it takes the autograd path."""


def parameters_of(model):
    return torch.cat([p.detach().reshape(-1) for p in model.policy.parameters()]).clone()


def small(env, policy=None, **settings):
    """A trainer on few environments."""
    torch.manual_seed(0)
    settings = {"num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "seed": 1, **settings}
    return PPO(env(64 if DRY else 1024, device=DEVICE), policy, device=str(DEVICE), **settings)


def trained(env, policy=None, callback=None, iterations=ITERATIONS, **settings):
    model = small(env, policy, **settings)
    with like_a_gpu():
        model.learn(iterations * 16 * model.num_envs, callback)
    return model


# --- tensor environments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("env_id", TENSOR_ENVS)
def test_a_step_is_the_cpus(env_id, dtype):
    number, steps = 256, 40 if DRY else 300
    here = TENSOR_ENVS[env_id](number, dtype=dtype, max_episode_steps=100)
    there = TENSOR_ENVS[env_id](number, dtype=dtype, max_episode_steps=100, device=DEVICE)
    here.reset(seed=0)
    there.reset(seed=0)
    space = here.single_action_space
    ended = differing = 0
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {}
    for _ in range(steps):
        # The same state: each device draws resets of its own, and sines differ in the last bit.
        there.load_state_dict(here.state_dict())
        if isinstance(space, spaces.Discrete):
            actions = torch.randint(int(space.n), (number,))
        else:
            actions = torch.empty(number, 1).uniform_(-3, 3)
        obs, reward, over, cut, info = here.step(actions)
        theirs = [x.cpu() for x in there.step(actions.to(DEVICE))[:4]]
        done = info["_final_obs"]
        # A number on the other side of a limit by its last bit ends an episode elsewhere.
        same = (over == theirs[2]) & (cut == theirs[3])
        differing += int((~same).sum())
        ended += int(done.sum())
        going = same & ~done
        torch.testing.assert_close(theirs[0][going], obs[going], **tolerance)
        torch.testing.assert_close(theirs[1][same], reward[same], **tolerance)
        final = there._final_obs.cpu()
        torch.testing.assert_close(final[same], info["final_obs"][same], **tolerance)
    assert ended > 0 or not steps > 100
    assert differing <= (2 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("env_id", TENSOR_ENVS)
def test_captured_steps_are_the_eager_ones(env_id):
    number, steps, replays = 64, 20, 5

    def made():
        env = TENSOR_ENVS[env_id](number, device=DEVICE, max_episode_steps=15)
        env.reset(seed=7)
        space = env.single_action_space
        draw = torch.Generator(DEVICE).manual_seed(1)
        if isinstance(space, spaces.Discrete):
            shape = (steps, number)
            actions = torch.randint(int(space.n), shape, device=DEVICE, generator=draw)
        else:
            actions = torch.randn(steps, number, 1, device=DEVICE, generator=draw)
        seen = torch.empty(steps, *env._obs.shape, device=DEVICE)
        ends = torch.zeros(steps, number, dtype=torch.bool, device=DEVICE)

        def run():
            env.begin_sequence()
            for t in range(steps):
                obs, _, over, cut, _ = env.step(actions[t])
                seen[t].copy_(obs)
                torch.logical_or(over, cut, out=ends[t])

        return env, run, seen, ends

    _, warm_up, _, _ = made()
    warm_up()
    _, eagerly, expected, _ = made()
    wanted = []
    for _ in range(replays):
        eagerly()
        wanted.append(expected.clone())
    env, run, seen, ends = made()
    replay, _ = recorded(run, [env.generator])
    number_ended = 0
    for turn in range(replays):
        if turn:
            replay()
        assert torch.equal(seen, wanted[turn])
        number_ended += int(ends.sum())
    assert number_ended >= number  # every replay resets, by draws of its own
    assert not torch.equal(wanted[0], wanted[1])


def test_captured_permutations_follow_the_generator():
    def drawn(generator):
        return torch.randperm(5000, generator=generator, device=DEVICE)

    eager = torch.Generator(DEVICE).manual_seed(3)
    drawn(torch.Generator(DEVICE))
    wanted = [drawn(eager).clone() for _ in range(4)]
    generator = torch.Generator(DEVICE).manual_seed(3)
    replay, order = recorded(lambda: drawn(generator), [generator])
    for turn in range(4):
        if turn:
            replay()
        assert torch.equal(order, wanted[turn])
        assert torch.equal(order.sort().values, torch.arange(5000, device=DEVICE))


# --- captured phases of the trainer

CASES = {
    "explicit": (TensorCartPole, None, {}),
    "explicit, fp16": (TensorCartPole, None, {"precision": "fp16"}),
    "explicit, bf16": (TensorCartPole, None, {"precision": "bf16"}),
    "wide, fp16": (TensorPendulum, None, {"hidden_sizes": (128, 128), "precision": "fp16"}),
    "gaussian, normalised": (TensorPendulum, None, {"norm_obs": True, "norm_reward": True}),
    "target KL": (TensorCartPole, None, {"target_kl": 0.002, "learning_rate": 0.01}),
    "adaptive rate": (TensorCartPole, None, {"adaptive_lr_kl": 0.01}),
    "batch whitening": (TensorCartPole, None, {"norm_adv": "batch"}),
    "a module of one's own": (TensorCartPole, Own, {}),
    "the same under autocast": (TensorCartPole, Own, {"precision": "bf16"}),
}


# Bitwise, and not within a tolerance: the graph holds the same kernels on the same shapes in the same
# order, each of them deterministic, and replays draw the numbers an eager run would draw. One bit more
# or less could turn an action, after which nothing would be alike any more.
@pytest.mark.parametrize("name", CASES)
def test_replayed_training_is_the_eager_one(name, monkeypatch):
    env, policy, settings = CASES[name]
    if DRY and settings.get("precision", "fp32") != "fp32":
        pytest.skip("a CPU has one precision of its own")
    # Every scalar that may change does: a replay that had frozen one would drift off.
    schedules = {"clip_coef": lambda left: 0.1 + 0.2 * left, "ent_coef": lambda left: 0.02 * left}
    if not {"adaptive_lr_kl", "learning_rate"} & set(settings):
        schedules["learning_rate"] = lambda left: 0.005 * left
    settings = {**settings, **schedules}
    metrics = []

    def keep(model):
        numbers = {k: v for k, v in model.metrics.items() if not k.startswith("time/")}
        metrics.append({k: v for k, v in numbers.items() if v == v})

    replayed = trained(env, policy and policy(), keep, **settings)
    assert replayed._phase.recorded, replayed._phase.why_eager
    rollout = replayed.collector._phase
    assert rollout.recorded, rollout.why_eager
    monkeypatch.setattr(capture, "EAGER_RUNS", NEVER)
    eager = trained(env, policy and policy(), keep, **settings)
    assert not eager._phase.recorded
    assert metrics[:ITERATIONS] == metrics[ITERATIONS:]
    assert torch.equal(parameters_of(replayed), parameters_of(eager))
    assert len({m["train/policy_loss"] for m in metrics}) == ITERATIONS


@pytest.mark.parametrize("name", CASES)
def test_a_phase_neither_waits_for_the_device_nor_allocates(gpu, name):
    env, policy, settings = CASES[name]
    model = trained(env, policy and policy(), **settings)
    phases = [model.collector._phase, model._phase]
    assert all(phase.recorded for phase in phases)
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.device(0):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for phase in phases:
                for _ in range(3):
                    phase()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    # As it runs where nothing is recorded.
    try:
        for phase, grad in zip(phases, (False, True), strict=True):
            with torch.set_grad_enabled(grad):
                torch.cuda.set_sync_debug_mode("error")
                phase.function()
                torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_module_that_reads_falls_back_and_leaves_the_device_usable(caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, "ppo_fast"):
        model = trained(TensorCartPole, Own(reads=True))
    said = [r.getMessage() for r in caplog.records if "without a CUDA graph" in r.getMessage()]
    assert len(said) == 2, said  # the rollout's and the update's
    assert sorted(message.split()[0] for message in said) == ["rollout", "update"]
    assert not model._phase.recorded
    if not DRY:
        # What a failed recording is known to leave behind.
        default = torch.cuda.default_stream()
        assert torch.cuda.current_stream() == default
        assert not torch.cuda.is_current_stream_capturing()
        torch.randn(8, device=DEVICE)
        torch.randn(8, device=DEVICE, generator=model.generator)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    # It draws what it would have drawn, and what is recorded afterwards is right.
    again = trained(TensorCartPole, Own())
    assert again._phase.recorded, again._phase.why_eager
    assert torch.equal(parameters_of(again), parameters_of(model))
    monkeypatch.setattr(capture, "EAGER_RUNS", NEVER)
    eager = trained(TensorCartPole, Own(reads=True))
    assert torch.equal(parameters_of(eager), parameters_of(model))


def test_a_phase_that_failed_to_record_has_drawn_nothing():
    generator = torch.Generator(DEVICE).manual_seed(5)
    other = torch.Generator(DEVICE).manual_seed(5)
    x = torch.zeros(4, device=DEVICE)

    def draw(from_generator):
        return torch.rand(4, device=DEVICE, generator=from_generator)

    def phase():
        x.copy_(draw(generator))
        return float(x.sum())

    with like_a_gpu():
        failing = Phase("it", phase, DEVICE, [generator])
        for _ in range(capture.EAGER_RUNS + 3):
            failing()
            assert torch.equal(x, draw(other))
    assert failing.why_eager is not None
    assert "previous error" not in failing.why_eager  # the cause, not what followed from it


def test_it_trains_on_a_device_that_is_not_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")

    def there(device):
        torch.manual_seed(0)
        settings = {"num_steps": 16, "num_minibatches": 2, "seed": 1, "device": device}
        model = PPO(TensorCartPole(256, device=device), **settings)
        model.learn(ITERATIONS * 16 * 256)
        assert model._phase.recorded
        return parameters_of(model).cpu()

    assert torch.equal(there("cuda:1"), there("cuda:0"))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_run_goes_on_bitwise(tmp_path, precision):
    pytest.importorskip("safetensors")
    if DRY and precision != "fp32":
        pytest.skip("a CPU has one precision of its own")
    settings = {"precision": precision, "anneal_clip": True}
    whole = trained(TensorCartPole, **settings)
    cut = trained(
        TensorCartPole,
        callback=lambda model: model.iteration < capture.EAGER_RUNS + 2,
        **settings,
    )
    assert 0 < cut.learn_done < cut.learn_total
    cut.save(tmp_path / "it.safetensors")
    env = TensorCartPole(cut.num_envs, device=DEVICE)
    resumed = PPO.load(tmp_path / "it.safetensors", env)
    assert resumed.device.type == DEVICE.type
    with like_a_gpu():
        resumed.resume()
    assert resumed.num_timesteps == whole.num_timesteps
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    assert torch.equal(resumed.generator.get_state(), whole.generator.get_state())
    assert torch.equal(resumed.envs.env.generator.get_state(), whole.envs.env.generator.get_state())


# --- the fused learner step

ROWS = 64 if DRY else 8192
NETWORKS = {
    "cartpole": learner.CARTPOLE,
    "narrow": learner.NARROW,
    "wide": learner.PUFFER,
    "locomotion": learner.LOCOMOTION,
    "three layers": learner.CARTPOLE._replace(hidden=(64, 64, 64), activation="relu"),
    "silu": learner.NARROW._replace(activation="silu"),
}
LARGEST_ERROR = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 2e-2}
"""Of the gradient, relative, in the Euclidean norm."""


def problem_of(network):
    if DRY:  # the interpreter takes its time
        return network._replace(num_envs=ROWS, num_steps=2, minibatches=2)
    return network._replace(num_envs=ROWS, num_steps=4, minibatches=4)


def by_kernels():
    return backend("triton") if DRY else contextlib.nullcontext()


@pytest.mark.parametrize("dtype", LARGEST_ERROR)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_fused_gradient_is_float64_autograds(name, dtype):
    problem = problem_of(NETWORKS[name])
    if DRY and name in ("wide", "locomotion", "three layers"):
        pytest.skip("tests/kernels does it in the interpreter")
    start = learner.start_of(problem)
    exact = learner.true_gradient(start, problem.config)
    arm = learner.our_arm(start, problem.config, f"ppo_fast {dtype}, eager")
    with by_kernels():
        error = learner.relative_error(arm.gradient(), exact)
    assert error <= LARGEST_ERROR[dtype]
    # A product in 16 bits shows in the digits: what ran was no fp32 reference.
    assert dtype == "fp32" or error > 1e-6


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["cartpole", "narrow", "wide"])
def test_a_fused_step_is_the_same_in_every_run(name, dtype):
    if DRY and name != "cartpole":
        pytest.skip("tests/kernels does it in the interpreter")
    problem = problem_of(NETWORKS[name])
    start = learner.start_of(problem)
    policy, options = start.policy, learner.options_of(problem.config)
    optimizer = learner.FlatAdam(policy.parameters(), 1e-3)
    loss = learner.ExplicitLoss(
        policy, start.distribution, lambda: options, optimizer, learner.DTYPES[dtype]
    )
    (group,) = optimizer._groups
    state = [group.parameters, group.exp_avg, group.exp_avg_sq, group.steps]
    before = [x.clone() for x in state]
    first = None
    for _ in range(REPEATS):
        for x, old in zip(state, before, strict=True):
            x.copy_(old)
        with by_kernels():
            result = loss(start.batch, start.index)
            gradient = group.gradients.clone()
            norm = clipped_adam_(
                group.parameters,
                group.gradients,
                group.exp_avg,
                group.exp_avg_sq,
                group.steps,
                optimizer.lr,
                max_grad_norm=0.5,
                loss=result.loss,
                square_sums=loss.workspace.square_sums,
            )
        found = [x.clone() for x in (gradient, result.loss, result.stats, norm, *state)]
        first = first or found
        for mine, theirs in zip(found, first, strict=True):
            assert torch.equal(mine, theirs)
    assert float(group.steps) == 1
    assert not torch.equal(group.parameters, before[0])


LEARNERS = {"autograd": "fp32", "fused": "fp32", "fused, fp16": "fp16"}


@pytest.mark.parametrize("name", LEARNERS)
def test_it_learns_as_well_in_every_precision(gpu, name):
    def made(policy=None):
        return PPO(
            TensorCartPole(256, device=DEVICE),
            policy,
            num_steps=128,
            learning_rate=2e-3,
            precision=LEARNERS[name],
            device=str(DEVICE),
        )

    model = made()
    if name == "autograd":
        policy = model.policy
        policy.__class__ = Plain
        model = made(policy)
    returns = []
    # On a CPU seeds 1 to 4 were there after 15 to 21.
    model.learn(48 * 128 * 256, lambda m: returns.append(m.metrics["rollout/ep_rew_mean"]))
    assert model._phase.recorded
    assert isinstance(model._loss, learner.AutogradLoss) is (name == "autograd")
    assert max(returns) >= 400, returns
