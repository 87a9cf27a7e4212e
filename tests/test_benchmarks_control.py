"""The trainers' benchmark and its peers run, and count right; sizes are tiny, speeds mean nothing."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Import a script by name, with its results going to `tmp_path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("harness"), "RESULTS", tmp_path)
    return importlib.import_module


def read(folder, name):
    (file,) = folder.glob(f"{name}-*.json")
    record = json.loads(file.read_text())
    assert record["machine"]["cpu"]
    return file, record


def launch(script, case, key, timesteps, **config):
    """Train an arm in a process of its own, as the benchmark does."""
    bench = script("bench_control")
    case = bench.CASES[case]
    case = case._replace(
        config=dataclasses.replace(case.config, **config), timesteps=timesteps, recipes=None
    )
    arm = bench.ARMS[key]
    if (package := bench.absent(arm)) is not None:
        pytest.skip(f"no package {package}")
    job = bench.job_of(case, key, 1) | {"timesteps": timesteps}
    seen = bench.launch(arm, job, solve=False)
    assert isinstance(seen, dict), seen
    return seen


TRAINERS = [
    ("cartpole", "ours", {}),
    ("cartpole", "sb3", {}),
    ("cartpole", "cleanrl", {}),
    ("cartpole", "native", {}),
    ("cartpole", "envpool", {}),
    ("cartpole", "sbx", {}),
    ("cartpole", "torchrl", {}),
    ("cartpole", "jax", {}),
    ("cartpole-tensor", "tensor", {"num_envs": 8}),
    ("cartpole-tensor", "sbx-native", {"num_envs": 8}),
]


@pytest.mark.parametrize(("case", "key", "config"), TRAINERS, ids=[t[1] for t in TRAINERS])
def test_a_trainer_of_cartpole_runs_and_tells(script, case, key, config):
    seen = launch(script, case, key, 4096, **config)
    assert 4096 <= seen["steps"] < 6144
    steps = [mark[2] for mark in seen["marks"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == seen["steps"]
    clock = [mark[0] for mark in seen["marks"]]
    assert clock == sorted(clock)
    parts = ("start", "import", "build", "train")
    total = sum(seen[f"{part}_seconds"] for part in parts)
    assert total == pytest.approx(seen["total_seconds"], abs=0.01)
    # A random policy falls after 22 steps; the value clip keeps any of them from learning fast.
    assert len(seen["returns"]) == 100
    assert 15 < np.mean(seen["returns"]) < 200
    assert seen["marks"][-1][3] == pytest.approx(np.mean(seen["returns"]))


@pytest.mark.parametrize("key", ["ours", "sb3", "cleanrl"])
def test_a_trainer_of_pendulum_tells_returns_before_normalisation(script, key):
    seen = launch(script, "pendulum", key, 1024, num_steps=512, num_minibatches=8)
    assert len(seen["returns"]) in (5, 10)  # SB3 counts the last rollout's
    # Swinging at random; normalised rewards would give a sum near 0.
    assert all(-2000 < value < -500 for value in seen["returns"])


@pytest.mark.parametrize("key", ["tensor", "rsl_rl"])
def test_a_trainer_of_tensor_pendulum_runs(script, key):
    seen = launch(script, "pendulum-tensor", key, 16_384, num_envs=64)
    assert seen["steps"] == 16_384
    assert all(-2000 < value < -500 for value in seen["returns"])
    assert len(seen["returns"]) == 64  # after 200 of the 256 steps


@pytest.mark.parametrize("key", ["ours", "sb3-atari", "convolutions"])
def test_a_trainer_of_pong_runs(script, key):
    pytest.importorskip("ale_py")
    seen = launch(script, "pong", key, 64, num_envs=2, num_steps=32, update_epochs=1)
    assert seen["steps"] == 64
    assert len(seen["marks"]) == 1


def test_the_command_line_runs_until_it_has_the_return(script):
    bench = script("bench_control")
    case = bench.CASES["solved"]._replace(threshold=30.0)
    config = dataclasses.replace(case.config, stop_return=30.0)
    case = case._replace(recipes={"command": (config, 20_000)})
    seen = bench.launch(bench.ARMS["command"], bench.job_of(case, "command", 1), solve=True)
    assert 256 <= seen["steps"] < 20_000
    assert bench.reached(seen, 30.0) is not None


def test_jax_cartpole_is_gymnasiums(script):
    pytest.importorskip("jax")
    peer = script("peers.jax_loop")
    env = gym.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    draw = np.random.default_rng(0)
    states = draw.uniform([-2.5, -3, -0.25, -3], [2.5, 3, 0.25, 3], (500, 4)).astype(np.float32)
    actions = draw.integers(0, 2, 500)
    found, fallen = peer.cartpole_step(states, actions)
    ends = 0
    for state, action, after, ended in zip(states, actions, found, fallen, strict=True):
        env.state, env.steps_beyond_terminated = state.astype(float), None
        expected, _, terminated, _, _ = env.step(int(action))
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
        assert bool(ended) == terminated
        ends += terminated
    assert 50 < ends < 450


def small(**changes):
    config = {"num_envs": 4, "num_steps": 16, "num_minibatches": 1, "update_epochs": 1}
    config |= {"gamma": 0.99, "gae_lambda": 0.95, "norm_adv": "minibatch", "clip_coef": 0.2}
    config |= {"vf_coef": 0.5, "vf_clip_coef": 0.2, "ent_coef": 0.01, "max_grad_norm": 0.5}
    config |= {"adam_eps": 1e-5, "hidden_sizes": (8, 8), "activation": "tanh", "seed": 3}
    return SimpleNamespace(**config | changes)


@pytest.mark.parametrize("block_rows", [None, 16])
def test_a_jax_update_is_one_of_adam_on_our_loss(script, block_rows):
    """One minibatch from the peer's own rollout, against autograd, torch's Adam and our GAE."""
    jax = pytest.importorskip("jax")
    from ppo_fast.functional import gae, ppo_loss_from_logits

    peer, c = script("peers.jax_loop"), small()
    # Recorded through the step that the rollout calls.
    before = peer.initial(c)
    recorded = []
    plain_step = peer.cartpole_step

    def recording_step(state, action):
        following, fallen = plain_step(state, action)
        jax.debug.callback(lambda *seen: recorded.append(seen), state, action, following, fallen)
        return following, fallen

    peer.cartpole_step = recording_step
    try:
        iteration = peer.make_iteration(c, block_rows)
        after, (done, _) = jax.jit(iteration)(before, (np.float32(1e-3), np.float32(0.2)))
        jax.effects_barrier()
    finally:
        peer.cartpole_step = plain_step
    obs, actions, following, fallen = (
        torch.from_numpy(np.stack([np.asarray(seen[i]) for seen in recorded])) for i in range(4)
    )
    done = torch.from_numpy(np.array(done))

    def to_torch(layers):
        return [[torch.tensor(np.array(x), requires_grad=True) for x in pair] for pair in layers]

    nets = {name: to_torch(layers) for name, layers in before.params.items()}

    def forward(layers, x):
        for weight, bias in layers[:-1]:
            x = torch.tanh(x @ weight + bias)
        return x @ layers[-1][0] + layers[-1][1]

    with torch.no_grad():
        old = torch.log_softmax(forward(nets["actor"], obs), -1)
        old = old.gather(-1, actions.long()[..., None])[..., 0]
        values = forward(nets["critic"], obs)[..., 0]
        # A step that ends an episode without a fall does not occur in 16 steps.
        assert torch.equal(fallen, done)
        last = forward(nets["critic"], following[-1])[..., 0]
        estimate = gae(torch.ones_like(values), values, last, fallen, gamma=0.99, gae_lambda=0.95)
        advantages, returns = estimate[0], estimate[1]
        flat = advantages.reshape(-1)
        flat = (flat - flat.mean()) / (flat.std() + 1e-8)
    loss = ppo_loss_from_logits(
        forward(nets["actor"], obs).reshape(-1, 2),
        actions.reshape(-1).long(),
        old_log_probs=old.reshape(-1),
        advantages=flat,
        values=forward(nets["critic"], obs).reshape(-1),
        old_values=values.reshape(-1),
        returns=returns.reshape(-1),
        clip_coef=0.2,
        vf_clip_coef=0.2,
        vf_coef=0.5,
        ent_coef=0.01,
    ).loss
    parameters = [x for layers in nets.values() for pair in layers for x in pair]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-5)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    optimizer.step()
    got = [x for name in nets for pair in after.params[name] for x in pair]
    for mine, theirs in zip(parameters, got, strict=True):
        np.testing.assert_allclose(theirs, mine.detach().numpy(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", ["sync", "native", "envpool"])
def test_the_cleanrl_style_loop_counts_returns(script, backend):
    if backend == "envpool":
        pytest.importorskip("envpool")
    peer = script("peers.cleanrl_style")
    c = small(norm_obs=False, norm_reward=False)
    envs = peer.Environments("CartPole-v1", c, backend)
    assert envs.reset().shape == (4, 4)
    draw = np.random.default_rng(0)
    lengths, running, resetting = [], np.zeros(4), np.zeros(4, bool)
    for _ in range(300):
        _, _, done = envs.step(draw.integers(0, 2, 4).astype(np.int32))
        # Where a reset takes a step of its own, that step belongs to no episode.
        running += ~resetting
        lengths.extend(running[done].tolist())
        running[done] = 0
        resetting = np.zeros(4, bool) if backend == "sync" else done
    assert len(lengths) > 20
    assert sorted(envs.returns) == sorted(lengths[-100:])
    envs.envs.close()


def test_the_cleanrl_style_minibatch_has_the_gradient_of_our_loss(script):
    from ppo_fast.functional import ppo_loss_from_gaussian

    peer, c = script("peers.cleanrl_style"), small(learning_rate=1e-3, max_grad_norm=1e9)
    torch.manual_seed(0)
    agent = peer.Agent(3, 2, (8,), continuous=True)
    obs, noise = torch.randn(32, 3), torch.randn(6, 32)
    with torch.no_grad():
        actions, log_probs, _, values = agent.get_action_and_value(obs)
    log_probs, advantages = log_probs + 0.3 * noise[0], noise[1]
    returns, values = values + noise[2], values + 0.3 * noise[3]
    rows = peer.Rows(obs, actions, log_probs, advantages, returns, values)
    optimizer = peer.new_optimizer(agent, c)
    with torch.enable_grad():
        loss = ppo_loss_from_gaussian(
            agent.actor(obs),
            agent.log_std.reshape(-1),
            actions,
            old_log_probs=log_probs,
            advantages=(advantages - advantages.mean()) / (advantages.std() + 1e-8),
            values=agent.get_value(obs),
            old_values=values,
            returns=returns,
            clip_coef=0.2,
            vf_clip_coef=0.2,
            vf_coef=0.5,
            ent_coef=0.01,
        ).loss
    expected = torch.autograd.grad(loss, list(agent.parameters()))
    fraction = peer.minibatch(agent, optimizer, c, rows, np.arange(32))
    assert 0 < fraction < 1
    for parameter, gradient in zip(agent.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_sb3_has_our_constants(script):
    sb3 = pytest.importorskip("stable_baselines3")
    case = script("bench_control").CASES["cartpole"]
    train = script("peers.sb3").build(case.env_id, case.config)
    (model,) = (c.cell_contents for c in train.__closure__ if isinstance(c.cell_contents, sb3.PPO))
    # SB3's value loss has no 1/2: CleanRL's 0.5 is its 0.25.
    assert (model.vf_coef, model.ent_coef, model.max_grad_norm) == (0.25, 0.01, 0.5)
    assert (model.n_steps, model.batch_size, model.n_epochs, model.n_envs) == (128, 256, 4, 8)
    assert model.clip_range(1.0) == model.clip_range_vf(1.0) == 0.2
    assert model.lr_schedule(0.5) == 1.25e-4
    widths = [p.shape[0] for p in model.policy.mlp_extractor.parameters() if p.ndim == 2]
    assert widths == [64] * 4


def test_an_arm_imports_nothing_of_ours_before_its_own():
    code = (
        "import sys, control_arm, peers; assert not {'torch', 'numpy', 'ppo_fast'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True)


def seen(marks, **more):
    """What an arm might report: marks of (wall, processor time, steps, mean, episodes)."""
    base = dict.fromkeys(
        ["start_seconds", "import_seconds", "build_seconds", "compile_seconds"], 0.5
    )
    base |= {"train_seconds": 4.0, "train_cpu_seconds": 4.0, "total_seconds": 6.0, "peak_mb": 9.0}
    base |= {"steps": marks[-1][2], "returns": [10.0, 20.0], "phases": {}, "marks": marks}
    return base | more


def test_rates_and_ratios_leave_the_first_iteration_out(script):
    bench = script("bench_control")
    ours = seen([(5, 4, 100, 10.0, 100), (6, 5, 200, 100.0, 100)])
    slower = seen([(2, 2, 100, 99.0, 99), (6, 4, 300, None, 0)])
    case = bench.CASES["cartpole"]
    rows = bench.summarise("cartpole", case, {"ours": [ours] * 3, "sb3": [slower, ours, slower]})
    assert rows[0]["sps"] == [100, 100, 100]
    assert rows[1]["sps"] == [50, 100, 50]
    assert rows[1]["ours_times_by_round"] == [2, 1, 2]
    assert rows[1]["ours_times"] == 2
    assert rows[1]["ours_times_cpu_time"] == 1
    assert rows[0]["ours_times"] == 1
    # 200 steps in 4 seconds of training and half a second of compiling.
    assert rows[0]["sps_compile_counted"] == pytest.approx(200 / 4.5)
    assert rows[0]["threshold_seconds"] == 6
    assert rows[1]["threshold_reached"] == 1  # 99 episodes are not enough
    assert rows[0]["returns"] == [15.0] * 3


def test_time_to_solve_is_counted_from_the_start_of_the_process(script):
    bench = script("bench_control")
    marks = [(1, 1, 100, 475.0, 100)]
    ours, theirs = seen(marks, total_seconds=2.0), seen(marks, total_seconds=7.0)
    # A run that gives up early is no quick solution.
    gave_up = seen([(1, 1, 100, 474.0, 100)], total_seconds=1.0)
    found = {"ours": [ours, ours, gave_up], "sb3": [theirs, gave_up, theirs], "sbx": [gave_up] * 3}
    rows = bench.summarise("solved", bench.CASES["solved"], found)
    assert [row["ours_times"] for row in rows] == [1, 3.5, None]
    assert [row["threshold_reached"] for row in rows] == [2, 2, 0]
    assert [row["solved_seconds_by_round"] for row in rows] == [[2, 2], [7, 7], []]


def test_the_watcher_stops_when_solved_or_out_of_time(script):
    arm = script("control_arm")
    watcher = arm.Watcher(arm.time.monotonic(), solved=9.0, window=3, limit=100.0)
    assert not watcher(8, [])
    assert not watcher(16, [9.0, 9.0])
    assert not watcher(24, [9.0, 9.0, 8.0])
    assert watcher(32, [9.0, 9.0, 9.0])
    assert [mark[2:] for mark in watcher.marks] == [
        (8, None, 0),
        (16, 9.0, 2),
        (24, pytest.approx(26 / 3), 3),
        (32, 9.0, 3),
    ]
    assert arm.Watcher(arm.time.monotonic() - 5.0, None, 3, limit=4.0)(8, [])


def test_the_benchmark_writes_rows_and_a_picture(script, tmp_path, capsys):
    bench = script("bench_control")
    arguments = ["--rounds", "2", "--timesteps", "3072", "--json", "--only", "ours", "cleanrl"]
    bench.main(arguments)
    file, record = read(tmp_path, "control_cartpole")
    ours, cleanrl = record["rows"]
    assert [ours["arm"], cleanrl["arm"]] == ["ppo_fast", "CleanRL-style"]
    for row in (ours, cleanrl):
        assert row["steps"] >= 3072
        assert 0 < row["sps_min"] <= row["sps_median"] <= row["sps_max"]
        assert row["peak_mb"] > 50
        assert len(row["returns"]) == 2
    pairs = zip(ours["sps"], cleanrl["sps"], strict=True)
    assert cleanrl["ours_times_by_round"] == pytest.approx([a / b for a, b in pairs])
    assert 0.3 < sum(ours["phases"].values()) <= 1
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "ppo_fast spends: inference" in out
    assert "round 2 of 2: CleanRL-style" in out


def test_arms_that_are_absent_or_fail_leave_the_others_running(
    script, tmp_path, monkeypatch, capsys
):
    bench = script("bench_control")
    monkeypatch.setitem(bench.ARMS, "sb3", bench.Arm("gone", "sb3", ("no_such_package",)))
    monkeypatch.setitem(bench.ARMS, "sbx", bench.Arm("broken", "no_such_peer"))
    only = ["--only", "ours", "sb3", "sbx"]
    bench.main(["--rounds", "2", "--timesteps", "1024", "--json", *only])
    _, record = read(tmp_path, "control_cartpole")
    assert [row["arm"] for row in record["rows"]] == ["ppo_fast"]
    assert record["missing"] == {
        "gone": "absent: no package no_such_package",
        "broken": "failed: ModuleNotFoundError: No module named 'peers.no_such_peer'",
    }
    assert capsys.readouterr().out.count("No module named") == 1  # it is not tried again


def test_until_solved_stops_at_the_threshold_and_draws_curves(
    script, tmp_path, monkeypatch, capsys
):
    bench = script("bench_control")
    case = bench.CASES["solved"]._replace(threshold=40.0)
    monkeypatch.setitem(bench.CASES, "solved", case)
    bench.main(["--until-solved", "--rounds", "1", "--json", "--only", "ours"])
    file, record = read(tmp_path, "control_solved")
    (row,) = record["rows"]
    assert row["threshold_reached"] == 1
    assert row["steps"] == row["threshold_steps"] < 50_000
    assert 0 < row["threshold_seconds"] <= row["total_seconds"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "1 of 1" in capsys.readouterr().out


def test_ablations_train_alike(script, tmp_path):
    bench = script("bench_control")
    arguments = ["--case", "ablations", "--rounds", "1", "--timesteps", "2048", "--json"]
    bench.main(arguments)
    _, record = read(tmp_path, "control_ablations")
    assert record["missing"] == {}
    assert [row["arm"] for row in record["rows"][1:]] == [
        arm.name for arm in script("control_cases").ABLATIONS.values()
    ]
    by_name = {row["arm"]: row for row in record["rows"]}
    # The gradient is the same number by another way, so the episodes are nearly the same.
    assert by_name["gradient by autograd"]["returns"] == pytest.approx(
        by_name["ppo_fast"]["returns"], rel=0.2
    )


def test_the_autograd_arm_withholds_the_policys_type(script):
    ours = script("peers.ours")
    config = script("bench_control").CASES["cartpole"].config
    train = ours.build("CartPole-v1", config, gradient="autograd")
    (model,) = (c.cell_contents for c in train.__closure__ if isinstance(c.cell_contents, ours.PPO))
    assert type(model.policy) is ours.PlainPolicy


def test_the_update_phase_is_timed_alone(script):
    update = script("control_update")
    problem = update.Problem(16, 3, (8,), 2, True, 4, 16, 2)
    assert problem.label == "16 rows, 3-8-2, Gaussian"
    assert problem.minibatches == 8
    rows = update.measure(2, (problem,))
    assert [row["case"] for row in rows] == [update.OURS, update.AUTOGRAD, update.CLEANRL]
    for row in rows:
        assert 0 < row["min_us"] <= row["median_us"] <= row["max_us"]
    assert rows[0]["times ppo_fast"] == 1


def test_the_report_tells_each_case_from_its_own_file(script, tmp_path, monkeypatch):
    bench, report, harness = script("bench_control"), script("report"), script("harness")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    fast = seen([(1, 1, 100, 10.0, 100), (2, 2, 2100, 480.0, 100)])
    slow = seen([(1, 1, 100, 10.0, 100), (2, 2, 1100, 480.0, 100)])
    for name, (mine, other) in {
        "cartpole": ("ours", "sb3"),
        "cartpole-tensor": ("tensor", "jax"),
        "pong": ("ours", "convolutions"),
        "solved": ("ours", "sb3"),
        "ablations": ("ours", "two threads"),
    }.items():
        rows = bench.summarise(name, bench.CASES[name], {mine: [fast] * 2, other: [slow] * 2})
        missing = {"torchrl": "absent: no package torchrl"} if name == "cartpole" else {}
        file = f"control_{name.replace('-', '_')}"
        harness.write_results(file, rows, missing=missing, convolution_share=0.7)
    update = [
        {"problem": "256 rows", "case": case, "median_us": 300.0, "times ppo_fast": times}
        for case, times in (("ppo_fast", 1.0), ("CleanRL-style", 3.25))
    ]
    harness.write_results("control_update", update)
    report.main()
    page = report.README.read_text()
    assert "| ppo_fast | 2,000 (2,000 to 2,000) | 467 | 1.00 (1.00) | 15 (15 to 15) |" in page
    slower = "| stable-baselines3 | 1,000 (1,000 to 1,000) | 244 | 2.00 (2.00) | 15 (15 to 15)"
    assert f"{slower}, after 1,100 steps |" in page
    assert page.count("| ppo_fast, tensor envs |") == page.count("| jitted JAX loop |") == 1
    assert "cartpole: torchrl absent: no package torchrl." in page
    assert "the convolutions alone take 70% of our time" in page
    assert "| stable-baselines3 | 6.0 (6.0 to 6.0) | 2 of 2 | 1,100 | 0.5 | 0.5 |" in page
    assert "| two torch threads | 1,000 (1,000 to 1,000) | 2.00 (2.00) |" in page
    assert "| 256 rows | 300 | 3.25 |" in page
    assert "old" not in page.split(report.END)[0].split(report.BEGIN)[1].split()
