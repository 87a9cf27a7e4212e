"""The benchmark scripts run, and write what they promise; sizes are tiny, figures mean nothing."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Import a script by name, with its results going to `tmp_path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("harness"), "RESULTS", tmp_path)

    def load(name):
        if not (BENCHMARKS / f"{name}.py").exists():
            pytest.skip(f"no benchmarks/{name}.py")
        return importlib.import_module(name)

    return load


def read(folder, pattern):
    (file,) = folder.glob(pattern)
    record = json.loads(file.read_text())
    assert record["machine"]["cpu"]
    return file, record["rows"]


def test_bench_control_compares_trainers(script, tmp_path, capsys):
    bench = script("bench_control")
    arguments = ["--rounds", "1", "--timesteps", "2048", "--json", "--only"]
    bench.main([*arguments, "ours", "sync", "cleanrl"])
    file, rows = read(tmp_path, "control-*.json")
    assert [row["arm"] for row in rows] == ["ppo_fast", "ppo_fast, sync", "CleanRL-style"]
    for row in rows:
        assert row["steps"] >= 2048
        assert 0 < row["sps_min"] <= row["sps_median"] <= row["sps_max"]
        assert 8 < row["return_median"] < 100, row["arm"]
    assert 0.5 < sum(rows[0]["phases"].values()) <= 1
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "ppo_fast spends: inference" in capsys.readouterr().out


def test_bench_control_takes_ratios_to_sb3_round_by_round(script, tmp_path, capsys):
    pytest.importorskip("stable_baselines3")
    bench = script("bench_control")
    bench.main(["--rounds", "2", "--timesteps", "512", "--json", "--only", "ours", "sb3"])
    _, (ours, sb3) = read(tmp_path, "control-*.json")
    assert sb3["times_sb3_by_round"] == [1, 1]
    pairs = zip(ours["sps"], sb3["sps"], strict=True)
    assert ours["times_sb3_by_round"] == pytest.approx([mine / theirs for mine, theirs in pairs])
    assert ours["steps"] == pytest.approx(sb3["steps"], rel=0.1)


def test_sb3_peer_has_our_constants(script):
    sb3 = pytest.importorskip("stable_baselines3")
    case = script("bench_control").CASES["cartpole"]
    train = importlib.import_module("peers.sb3").build(case.env_id, case.config)
    (model,) = (c.cell_contents for c in train.__closure__ if isinstance(c.cell_contents, sb3.PPO))
    # SB3's value loss has no 1/2: CleanRL's 0.5 is its 0.25.
    assert (model.vf_coef, model.ent_coef, model.max_grad_norm) == (0.25, 0.01, 0.5)
    assert (model.n_steps, model.batch_size, model.n_epochs, model.n_envs) == (128, 256, 4, 8)
    assert model.clip_range(1.0) == model.clip_range_vf(1.0) == 0.2
    assert model.lr_schedule(0.5) == 1.25e-4
    widths = [p.shape[0] for p in model.policy.mlp_extractor.parameters() if p.ndim == 2]
    assert widths == [64] * 4


def test_learn_writes_rows_table_and_picture_and_trains_nothing_twice(
    script, tmp_path, monkeypatch, capsys
):
    learn = script("learn")
    monkeypatch.setattr(learn, "code_version", lambda: "1")  # the source may be under edit
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{learn.BEGIN}\nold table\n{learn.END}\nafter\n")
    monkeypatch.setitem(learn.TARGETS, "CartPole-v1", learn.Target(512, 5, 475.0))
    arguments = ["--env", "CartPole-v1", "--seeds", "1", "--jobs", "1", "--readme", str(readme)]
    learn.main(arguments)
    file, (row,) = read(tmp_path, "learn-*.json")
    assert (row["env"], row["seed"], row["timesteps"]) == ("CartPole-v1", 1, 512)
    assert row["steps"] >= 512
    assert row["passed"] is False
    assert 8 < row["eval_return"] <= 500
    assert row["curve"][-1][0] == row["steps"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = readme.read_text()
    assert page.startswith(f"before\n{learn.BEGIN}\n| environment |")
    assert page.endswith(f"]({file.with_suffix('.png').name})\n{learn.END}\nafter\n")
    assert "| CartPole-v1 | 512 | 475 | 0 of 1 seeds |" in page
    assert "old table" not in page

    capsys.readouterr()
    learn.main(arguments)
    assert "1 of 1 runs are in" in capsys.readouterr().out
    assert read(tmp_path, "learn-*.json") == (file, [row])


def test_learn_keeps_finished_rows_when_a_run_fails(script, tmp_path, monkeypatch, capsys):
    learn = script("learn")
    row = dict.fromkeys(["train_return", "gate", "passed", "gate_steps", "gate_seconds"])
    row |= {"env": "Acrobot-v1", "seed": 1, "timesteps": 9, "steps": 9, "seconds": 1.0, "sps": 9.0}
    row |= {"eval_return": -500.0, "eval_std": 0.0, "curve": [], "code": learn.code_version()}
    row["config"] = learn.settings("Acrobot-v1", 1)

    def run_jobs(jobs, workers, done):
        done(row)
        return ["Acrobot-v1 seed 2: it broke"]

    monkeypatch.setattr(learn, "run_jobs", run_jobs)
    monkeypatch.setitem(learn.TARGETS, "Acrobot-v1", learn.Target(9, 2, -100.0))
    with pytest.raises(SystemExit, match="Acrobot-v1 seed 2: it broke"):
        learn.main(["--env", "Acrobot-v1", "--readme", str(tmp_path / "none.md")])
    assert read(tmp_path, "learn-*.json")[1] == [row]
    out = capsys.readouterr().out
    assert "none.md has no <!-- learn:begin -->" in out
    assert "| Acrobot-v1 | 9 |" in out


@pytest.mark.parametrize("op", ["gae", "log_probs"])
def test_bench_of_an_op_runs(script, tmp_path, monkeypatch, capsys, op):
    bench = script(f"bench_{op}")
    sizes = {"gae": ((16, 2),), "log_probs": ("8x5",)}
    monkeypatch.setattr(bench, "SHAPES", sizes[op])
    monkeypatch.setattr(sys, "argv", [bench.__name__, "--rounds", "1", "--json"])
    bench.main()
    _, rows = read(tmp_path, f"{op}-*.json")
    assert all(row["median_us"] > 0 for row in rows if "median_us" in row)
    assert len(rows) >= 4
