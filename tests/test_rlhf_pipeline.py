"""`run_pipeline`: what it leaves, that it goes on where it stopped, and that RLHF works in it."""

import dataclasses
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
from safetensors.torch import load_file

from ppo_fast.llm.pipeline import Pipeline, run_pipeline
from ppo_fast.llm.plots import plot_overoptimization, plot_training
from ppo_fast.llm.ppo_trainer import PPOTrainer
from ppo_fast.llm.preferences import read_preferences
from ppo_fast.llm.stories import gold_reward
from ppo_fast.logger import RunLogger, read_metrics

TINY = Pipeline(
    stories=200,
    eval_prompts=20,
    layers=1,
    hidden_size=16,
    sft_steps=60,
    pairs=60,
    updates=6,
    rollout_batch_size=8,
    processes=1,
    progress_bar=False,
)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "out"
    return out, run_pipeline(dataclasses.replace(TINY, out=str(out)))


def test_everything_promised_is_in_the_folder(tiny):
    out, found = tiny
    names = {path.name for path in out.iterdir()}
    assert {"sft", "reward_model", "policy", "policy-no-kl", "ppo", "ppo-no-kl"} <= names
    assert {"preferences.jsonl", "samples.jsonl", "results.md", "results.json"} <= names
    assert not any(name.endswith(".part") for name in names)
    for picture in ("training.png", "overoptimization.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"
    page = (out / "results.md").read_text(encoding="utf-8")
    for policy, title in (
        ("sft", "SFT"),
        ("policy", "PPO"),
        ("policy-no-kl", "PPO without KL penalty"),
    ):
        row = found[policy]
        rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
        (cells,) = [[*map(float, r[2:-1])] for r in rows if r[1:2] == [title]]
        names = ("score", "gold", "kl", "eos_rate", "length")
        assert cells == pytest.approx([row[name] for name in names], abs=0.006)
    assert json.loads((out / "results.json").read_text())["policies"] == found


def test_the_table_is_the_mean_of_the_samples(tiny):
    out, found = tiny
    rows = lines(out / "samples.jsonl")
    assert len(rows) == 3 * 20
    for policy, summary in found.items():
        own = [row for row in rows if row["policy"] == policy]
        golds = [gold_reward(row["prompt"], row["response"]) for row in own]
        assert [row["gold"] for row in own] == golds
        assert summary["gold"] == pytest.approx(sum(golds) / 20)
        assert summary["score"] == pytest.approx(sum(row["score"] for row in own) / 20, abs=1e-3)
        ended = [row["response"].endswith("<eos>") for row in own]
        assert summary["eos_rate"] == pytest.approx(sum(ended) / 20)
    assert found["sft"]["kl"] == 0
    assert found["policy-no-kl"]["kl"] != 0


def test_held_out_prompts_are_in_no_training_data(tiny):
    out, _ = tiny
    held_out = {row["prompt"] for row in lines(out / "held_out_prompts.jsonl")}
    assert len(held_out) == 20
    for name in ("prompts.jsonl", "stories.jsonl", "preferences.jsonl"):
        assert held_out.isdisjoint(row["prompt"] for row in lines(out / name))


def test_preferences_are_drawn_with_the_probability_that_gold_gives(tiny):
    out, _ = tiny
    for pair in read_preferences(out / "preferences.jsonl"):
        golds = [gold_reward(pair.prompt, f"{text} <eos>") for text in (pair.chosen, pair.rejected)]
        odds = torch.sigmoid(torch.tensor(golds[0] - golds[1], dtype=torch.float64))
        assert pair.p == pytest.approx(float(odds), abs=1e-9)


def test_what_is_done_is_not_done_again(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(tiny[0], out)

    def not_again(*_, **__):
        raise AssertionError("trained again")

    for name in ("train_sft_model", "write_preferences_file", "train_scorer"):
        monkeypatch.setattr(f"ppo_fast.llm.pipeline_steps.{name}", not_again)
    monkeypatch.setattr("ppo_fast.llm.pipeline._train_policy", not_again)
    found = run_pipeline(dataclasses.replace(TINY, out=str(out)))
    assert found == tiny[1]
    assert capsys.readouterr().out.count("done before") == 5


@pytest.mark.parametrize("stopped_in", ["sample", "update"])
def test_a_pipeline_that_was_stopped_goes_on_as_if_it_had_not_been(
    stopped_in, tiny, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    whole = getattr(PPOTrainer, stopped_in)

    def stopped(self, *given):
        if self.iteration == 3:
            raise KeyboardInterrupt
        return whole(self, *given)

    settings = dataclasses.replace(TINY, out=str(out))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PPOTrainer, stopped_in, stopped)
        run_pipeline(settings)
    assert (out / "reward_model").exists()
    assert not (out / "policy").exists()
    found = run_pipeline(settings)
    assert found == tiny[1]
    for policy in ("policy", "policy-no-kl"):
        assert same(weights(out / policy), weights(tiny[0] / policy))
    assert read_metrics(out / "ppo")["step"] == [8, 16, 24, 32, 40, 48]


def test_what_a_step_left_half_done_is_done_anew(tiny, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tiny[0], out)
    shutil.rmtree(out / "policy")
    (out / "policy.part").mkdir()
    (out / "policy.part" / "model.safetensors").write_bytes(b"half")
    # A run that was killed before its first checkpoint.
    (out / "ppo" / "checkpoint.safetensors").unlink()
    assert run_pipeline(dataclasses.replace(TINY, out=str(out))) == tiny[1]
    assert not (out / "policy.part").exists()


def test_two_processes_train_what_one_does(tiny, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tiny[0], out)
    for name in ("ppo", "ppo-no-kl", "policy", "policy-no-kl"):
        shutil.rmtree(out / name)
    assert run_pipeline(dataclasses.replace(TINY, out=str(out), processes=2)) == tiny[1]


def test_a_failure_in_the_other_process_is_an_error(tiny, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(tiny[0], out)
    for name in ("ppo", "policy", "policy-no-kl"):
        shutil.rmtree(out / name)
    (out / "ppo-no-kl" / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(RuntimeError, match="without KL penalty failed"):
        run_pipeline(dataclasses.replace(TINY, out=str(out), processes=2))
    assert "CheckpointError" in capfd.readouterr().err
    # The other training is not lost.
    assert same(weights(out / "policy"), weights(tiny[0] / "policy"))


def drawn(monkeypatch):
    """Lines of the next picture by title of the panel and label."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved = []

    def save(self, *_, **__):
        saved.append(
            {
                ax.get_title(loc="left"): {line.get_label(): line for line in ax.get_lines()}
                for ax in self.axes
            }
        )

    monkeypatch.setattr(figure, "savefig", save)
    return saved


def write_run(folder, rows):
    with RunLogger(folder, tensorboard=False) as logger:
        for step, row in enumerate(rows, 1):
            logger.log(8 * step, row)
    return folder


def test_overoptimization_is_drawn_in_deviations_of_the_start_against_sqrt_kl(
    tmp_path, monkeypatch
):
    rows = [
        {"eval/kl": -0.01, "eval/scores/reward_model": 1.0, "eval/scores/gold": 3.0},
        {"objective/kl": 2.0},
        {"eval/kl": 9.0, "eval/scores/reward_model": 2.5, "eval/scores/gold": -1.0},
    ]
    run = write_run(tmp_path / "run", rows)
    start = {"score": 0.5, "score_std": 0.5, "gold": 1.0, "gold_std": 2.0}
    saved = drawn(monkeypatch)
    plot_overoptimization({"free": run}, start, tmp_path / "a.png")
    proxy, gold = (saved[0]["free"][name] for name in ("reward model (proxy)", "gold reward"))
    assert proxy.get_xdata().tolist() == gold.get_xdata().tolist() == [0, 0, 3]
    assert proxy.get_ydata().tolist() == [0, 1, 4]
    assert gold.get_ydata().tolist() == [0, 1, -1]


def test_what_is_not_reported_is_not_drawn(tmp_path, monkeypatch):
    rows = [{"objective/scores": 1.0, "objective/kl": 1.0, "eval/scores": 2.0, "eval/kl": 4.0}]
    runs = {"one": write_run(tmp_path / "run", rows)}
    saved = drawn(monkeypatch)
    plot_training(runs, tmp_path / "a.png", kl_target=3.0)
    plot_overoptimization(runs, {"score": 0.0, "score_std": 1.0}, tmp_path / "b.png")
    assert [*saved[0]] == ["reward-model score", "KL to reference"]
    assert [*saved[0]["KL to reference"]] == ["one", "target"]
    line = saved[1]["one"]["reward model (proxy)"]
    assert line.get_ydata().tolist() == [0, 2]
    assert "gold reward" not in saved[1]["one"]


def test_a_folder_of_other_settings_or_other_things_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"updates = 6, now 7; give the same flags"):
        run_pipeline(dataclasses.replace(TINY, out=str(tiny[0]), updates=7))
    (tmp_path / "thesis.txt").write_text("a life's work")
    with pytest.raises(FileExistsError, match="is not empty"):
        run_pipeline(dataclasses.replace(TINY, out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "p.jsonl"}, "prompts is given and model is not"),
        ({"judge": "m"}, "judge is given and model is not"),
        ({"model": "m"}, "prompts is None"),
        ({"model": "m", "prompts": "p.jsonl"}, "either preferences"),
        (
            {"model": "m", "prompts": "p.jsonl", "judge": "j", "preferences": "x.jsonl"},
            "either preferences",
        ),
        ({"principle": " "}, "principle is empty"),
        ({"pairs": 0}, "pairs is 0"),
        ({"processes": 0}, "processes is 0"),
        ({"sft_steps": 0}, "sft_steps is 0"),
        ({"updates": 0}, "updates is 0"),
        ({"sft_learning_rate": -1.0}, "sft_learning_rate is -1.0"),
        ({"hidden_size": 20}, "multiple of 8"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"kl_target": 0.0}, "kl_target"),
        ({"rollout_batch_size": 1}, "num_minibatches"),
        ({"kl_coef": 0.0}, "kl_coef"),
        ({"response_length": 0}, "response_length"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(**options)


# RLHF itself: over three seeds, with and without KL penalty.

SMALL = Pipeline(
    stories=6000,
    eval_prompts=200,
    hidden_size=64,
    sft_steps=900,
    pairs=3000,
    updates=40,
    rollout_batch_size=64,
    kl_horizon=150,
    without_kl=False,
    processes=1,
    progress_bar=False,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders by seed of PPO, all from one SFT and one reward model, and their results."""
    first = tmp_path_factory.mktemp("small") / "1"
    found = {1: (first, run_pipeline(dataclasses.replace(SMALL, out=str(first), without_kl=True)))}
    for seed in (2, 3):
        out = first.parent / str(seed)
        shutil.copytree(
            first, out, ignore=shutil.ignore_patterns("ppo*", "policy*", "results*", "samples*")
        )
        settings = json.loads((out / "pipeline.json").read_text())
        changed = settings | {"seed": seed, "without_kl": False}
        (out / "pipeline.json").write_text(json.dumps(changed))
        found[seed] = out, run_pipeline(dataclasses.replace(SMALL, out=str(out), seed=seed))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ppo_raises_score_and_gold_and_holds_its_kl(seed, small):
    out, found = small[seed]
    before, after = found["sft"], found["policy"]
    assert after["score"] - before["score"] >= 1.5 * before["score_std"]
    assert after["gold"] - before["gold"] >= 1.0
    assert after["eos_rate"] >= 0.95
    kl = read_metrics(out / "ppo")["objective/kl"]
    last_third = kl[-(len(kl) // 3) :]
    mean = sum(last_third) / len(last_third)
    assert 0.7 * SMALL.kl_target <= mean <= 1.3 * SMALL.kl_target


@pytest.mark.slow
def test_without_a_kl_penalty_the_proxy_rises_and_gold_falls(small):
    out, found = small[1]
    free, held, before = found["policy-no-kl"], found["policy"], found["sft"]
    assert free["score"] > held["score"]
    assert free["gold"] < before["gold"] - 0.5
    assert free["gold"] < held["gold"] - 2.0
    assert free["kl"] > 2 * held["kl"]
    metrics = read_metrics(out / "ppo-no-kl")
    gold, proxy = metrics["objective/scores/gold"], metrics["objective/scores"]
    peak = max(range(len(gold)), key=gold.__getitem__)
    # First both rise, then only the proxy does.
    assert gold[peak] > gold[0] + 0.5
    assert gold[-1] < gold[peak] - 1.5
    assert proxy[-1] > proxy[peak]
