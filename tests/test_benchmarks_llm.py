"""The language models' benchmark and its peer run, and count right; sizes are tiny, speeds mean nothing."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Import a script by name, with its results going to `tmp_path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("harness"), "RESULTS", tmp_path)
    return importlib.import_module


@pytest.fixture
def cases(script):
    return script("llm_cases")


def tiny(cases, **changes):
    model = {"model_type": "llama", "vocab_size": 37, "hidden_size": 32, "intermediate_size": 48}
    model |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    values = {
        "label": "tiny",
        "model": model,
        "batch": 6,
        "prompt_lengths": (2, 5),
        "response_length": 7,
        "eos_probability": 0.2,
        "config": {**cases.CONFIG, "learning_rate": 1e-3},
    }
    return cases.Case(**values | changes)


def loop_of(script, case, **changes):
    peer, cases = script("peers.trl_ppo_style"), script("llm_cases")
    models = cases.make_models(case)
    fields = {**case.config, "response_length": case.response_length, "seed": 1}
    fields |= {name: changes.pop(name) for name in list(changes) if name in fields}
    ids = {"pad": cases.PAD, "eos": cases.EOS}
    loop = peer.TRLStylePPO(
        SimpleNamespace(**fields),
        *(models.policy, models.ref, models.value, models.reward),
        **ids | changes,
    )
    return loop, models


def sequences(sampled, pad):
    """Prompts and responses without padding."""
    rows = [
        ([t for t in row[: sampled.prompt_width] if t != pad], row[sampled.prompt_width :])
        for row in sampled.tokens.tolist()
    ]
    return [(prompt, [t for t in response if t != pad]) for prompt, response in rows]


def by_itself(model, tokens, first):
    """Log-softmax over the vocabulary at each token from `first` on; no padding."""
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0, first - 1 : -1], -1)


def score_at(model, tokens):
    states = model.model(torch.tensor([tokens])).last_hidden_state[0]
    return model.score(states).squeeze(-1)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("probability", [0.0, 0.05, 0.3])
def test_responses_end_with_the_probability_of_the_case(cases, family, probability):
    case = tiny(cases, eos_probability=probability)
    tied = {"model_type": family, "tie_word_embeddings": family == "qwen2"}
    case = case._replace(model={**case.model, **tied, "vocab_size": 211})
    policy = cases.make_models(case).policy
    tokens = torch.randint(2, 211, (8, 20))
    with torch.no_grad():
        found = policy(tokens).logits.softmax(-1)[..., [cases.EOS, cases.PAD]].mean((0, 1))
    assert found[1] < 1e-6
    assert found[0].item() == pytest.approx(probability, rel=0.15, abs=1e-6)
    lengths = [
        len(row) for seed in range(200) for row in cases.make_responses(case, seed)
    ]  # E = sum over t < T of (1 - p)^t
    expected = sum((1 - probability) ** t for t in range(case.response_length))
    assert sum(lengths) / len(lengths) == pytest.approx(expected, rel=0.05)


def test_teacher_forcing_gives_the_logits_of_each_sequence_alone(cases):
    case = tiny(cases)
    policy = cases.make_models(case).policy
    prompts, responses = cases.make_prompts(case, 0), cases.make_responses(case, 0)
    found = cases.teacher_forced(policy, prompts, responses, 9)
    for row, prompt, response in zip(found, prompts, responses, strict=True):
        alone = by_itself(policy, prompt + response, len(prompt))
        torch.testing.assert_close(row[: len(response)].log_softmax(-1), alone)
        assert not row[len(response) :].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [64, 4])
def test_the_peer_scores_as_each_sequence_alone_would(script, cases, temperature, chunk):
    case = tiny(cases)
    loop, models = loop_of(script, case, temperature=temperature, rollout_batch_size=chunk)
    torch.manual_seed(0)
    with torch.no_grad():  # a reference of its own
        models.ref.lm_head.weight.mul_(1.5)
    sampled = loop.sample(cases.make_prompts(case, 0))
    assert sampled.scores.shape == (6, sampled.tokens.shape[1] - sampled.prompt_width, 37)
    scored = loop.score(sampled)
    lengths = set()
    with torch.no_grad():
        for row, (prompt, response) in enumerate(sequences(sampled, loop.pad)):
            n = len(response)
            lengths.add(n)
            assert loop.eos not in response[:-1]
            assert scored.padding[row].tolist() == [False] * n + [True] * (
                scored.padding.shape[1] - n
            )
            for name, model in (("log_probs", models.policy), ("ref_log_probs", models.ref)):
                logits = by_itself(model, prompt + response, len(prompt)) / temperature
                expected = logits.log_softmax(-1)[torch.arange(n), response]
                torch.testing.assert_close(getattr(scored, name)[row, :n], expected)
                assert (getattr(scored, name)[row, n:] == 1).all()
            values = score_at(models.value, prompt + response)[len(prompt) - 1 :]
            kept = min(n + 1, scored.values.shape[1])
            torch.testing.assert_close(scored.values[row, :n], values[:n])
            assert not scored.values[row, kept:].any()
            reward = score_at(models.reward, prompt + response)[-1]
            torch.testing.assert_close(scored.scores[row], reward)
    assert len(lengths) > 2


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_the_peers_advantages_are_discounted_sums_of_errors(
    script, cases, estimator, whiten_rewards
):
    config = {"kl_estimator": estimator, "whiten_rewards": whiten_rewards, "gamma": 0.9}
    loop, models = loop_of(script, tiny(cases), missing_eos_penalty=2.0, **config)
    torch.manual_seed(1)
    with torch.no_grad():
        models.ref.lm_head.weight.mul_(3)
    scored = loop.score(loop.sample(cases.make_prompts(tiny(cases), 3)))
    ended = (scored.tokens[:, scored.prompt_width :] == loop.eos).any(1)
    assert ended.any()
    assert not ended.all()
    found = loop.advantages(scored)
    width = scored.values.shape[1]
    rewards = torch.zeros(6, width, dtype=torch.float64)
    for row in range(6):
        n = int((~scored.padding[row]).sum())
        for t in range(n):
            log_ratio = (scored.ref_log_probs[row, t] - scored.log_probs[row, t]).double()
            kl = -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio
            rewards[row, t] = -0.05 * kl
        rewards[row, min(n, width - 1)] += scored.scores[row].double()
    if whiten_rewards:
        kept = rewards[~scored.padding_after_end]
        spread = (kept.var() + 1e-8) ** 0.5
        rewards = (rewards - kept.mean()) / spread + kept.mean()
        rewards[scored.padding_after_end] = 0
    values = torch.cat([scored.values.double(), torch.zeros(6, 1)], 1)
    errors = rewards + 0.9 * values[:, 1:] - values[:, :-1]
    advantages = torch.stack(
        [sum((0.9 * 0.95) ** k * errors[:, t + k] for k in range(width - t)) for t in range(width)],
        1,
    )
    torch.testing.assert_close(found.returns.double(), advantages + values[:, :-1])
    kept = advantages[~scored.padding]
    white = ((advantages - kept.mean()) / (kept.var() + 1e-8) ** 0.5) * ~scored.padding
    torch.testing.assert_close(found.advantages.double(), white, rtol=1e-4, atol=1e-5)


def test_missing_eos_costs_the_penalty(script, cases):
    case = tiny(cases)
    plain, _ = loop_of(script, case)
    torch.manual_seed(1)
    sampled = plain.sample(cases.make_prompts(case, 3))
    penal, _ = loop_of(script, case, missing_eos_penalty=2.0)
    taken = plain.score(sampled).scores - penal.score(sampled).scores
    ended = (sampled.tokens[:, sampled.prompt_width :] == plain.eos).any(1)
    torch.testing.assert_close(taken, 2.0 * ~ended)


def test_the_peers_gradient_is_that_of_each_sequence_alone(script, cases):
    case = tiny(cases)
    loop, models = loop_of(script, case, temperature=0.8)
    torch.manual_seed(0)
    sampled = loop.sample(cases.make_prompts(case, 0))
    rollout = loop.advantages(loop.score(sampled))
    moved = rollout.scored._replace(
        log_probs=rollout.scored.log_probs + 0.3 * torch.randn(rollout.kl.shape),
        values=rollout.scored.values + 0.3 * torch.randn(rollout.kl.shape),
    )
    rollout = rollout._replace(scored=moved)
    loss, stats, _ = loop.losses(rollout, torch.arange(6))
    loss.backward()
    parameters = [*models.policy.parameters(), *models.value.parameters()]
    got = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None

    gains, errors, clipped = [], [], 0
    width = moved.values.shape[1]
    for row, (prompt, response) in enumerate(sequences(sampled, loop.pad)):
        n = len(response)
        kept = min(n + 1, width)
        # The state after the end is read from the token there, which is padding: id 0, masked.
        mask = torch.tensor([[1] * len(prompt + response) + [0] * (kept - n)])
        ids = torch.tensor([prompt + response + [0] * (kept - n)])
        positions = (mask.cumsum(1) - mask.long()).clamp(min=0)
        states = models.value.model(
            input_ids=ids, attention_mask=mask, position_ids=positions
        ).last_hidden_state
        values = models.value.score(states)[0, len(prompt) - 1 :, 0][:kept]
        old, target = moved.values[row, :kept], rollout.returns[row, :kept]
        near = old + (values - old).clamp(-0.2, 0.2)
        errors += torch.maximum((values - target) ** 2, (near - target) ** 2)
        log_probs = (by_itself(models.policy, prompt + response, len(prompt)) / 0.8).log_softmax(-1)
        ratio = (log_probs[torch.arange(n), response] - moved.log_probs[row, :n]).exp()
        advantages = rollout.advantages[row, :n]
        gains += torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        clipped += (ratio.clamp(0.8, 1.2) * advantages < ratio * advantages).sum()
    policy_loss, value_loss = -torch.stack(gains).mean(), 0.5 * torch.stack(errors).mean()
    expected = torch.autograd.grad(policy_loss + 0.1 * value_loss, parameters, allow_unused=True)
    torch.testing.assert_close(stats["loss/policy_avg"], policy_loss.detach())
    torch.testing.assert_close(stats["loss/value_avg"], value_loss.detach())
    assert 0 < stats["policy/clipfrac_avg"] < 1
    torch.testing.assert_close(stats["policy/clipfrac_avg"], clipped / len(gains))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("minibatches", "micro"), [(1, None), (1, 2), (2, 1), (3, 2)])
def test_the_peer_takes_a_step_a_minibatch(script, cases, minibatches, micro):
    case = tiny(cases)
    loop, _ = loop_of(script, case, num_minibatches=minibatches, micro_batch_size=micro)
    steps = []
    loop.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    metrics = loop.update(loop.advantages(loop.score(loop.sample(cases.make_prompts(case, 0)))))
    assert len(steps) == 4 * minibatches
    assert metrics["objective/kl"] == 0.0 or abs(metrics["objective/kl"]) < 1e-4
    assert metrics["policy/approxkl_avg"] > 0
    assert all(map(torch.isfinite, map(torch.tensor, metrics.values())))


def test_the_first_minibatch_of_the_peer_has_ratio_one(script, cases):
    case = tiny(cases)
    loop, _ = loop_of(script, case, update_epochs=1)
    prompts, responses = cases.make_prompts(case, 0), cases.make_responses(case, 0)
    stages = script("peers.trl_ppo_style").build(case, cases.make_models(case))
    forced = stages.forced(prompts, responses)
    assert sequences(forced, cases.PAD) == list(zip(prompts, responses, strict=True))
    assert stages.count(forced) == sum(map(len, responses))
    rollout = loop.advantages(loop.score(forced))
    _, stats, _ = loop.losses(rollout, torch.arange(6))
    assert float(stats["policy/approxkl_avg"]) < 1e-12
    assert float(stats["policy/clipfrac_avg"]) == 0


@pytest.mark.parametrize(("peers", "ours"), [(None, None), (None, 2), (3, None)])
def test_both_arms_learn_the_same_where_nothing_is_padded(script, cases, peers, ours):
    case = tiny(cases, eos_probability=0.0, prompt_lengths=(4, 4))
    case = case._replace(config={**case.config, "temperature": 0.8})
    prompts, responses = cases.make_prompts(case, 0), cases.make_responses(case, 0)
    trained, found = [], []
    for name, rows in (("trl_ppo_style", peers), ("ours_llm", ours)):
        models = cases.make_models(case)
        with torch.no_grad():
            models.ref.lm_head.weight.mul_(1.5)
        before = [p.clone() for p in models.policy.parameters()]
        stages = script(f"peers.{name}").build(case, models, micro_batch_size=rows)
        found.append(stages.update(stages.score(stages.forced(prompts, responses))))
        parameters = [*models.policy.parameters(), *models.value.parameters()]
        trained.append([p.detach().clone() for p in parameters])
        pairs = zip(before, trained[-1], strict=False)
        moved = max(float((a.detach() - b).abs().max()) for a, b in pairs)
        assert moved > 1e-3
    peer, own = found
    for metric in ("loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "val/ratio"):
        assert own[metric] == pytest.approx(peer[metric], rel=1e-3, abs=1e-5), metric
    assert own["val/optimizer_steps"] == 4
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["trl_ppo_style", "ours_llm"])
def test_an_arm_runs_in_the_dtype_and_shape_of_the_gpu_case(script, cases, name):
    case = cases.CASES["qwen"]
    small = {"vocab_size": 211, "hidden_size": 56, "intermediate_size": 64}
    case = case._replace(
        device="cpu",
        batch=6,
        response_length=8,
        prompt_lengths=(3, 5),
        eos_probability=0.1,
        model={**case.model, **small, "num_hidden_layers": 2},
    )
    models = cases.make_models(case)
    stages = script(f"peers.{name}").build(case, models, micro_batch_size=2)
    assert next(models.policy.parameters()).dtype == torch.bfloat16
    assert 6 <= stages.count(stages.sample(cases.make_prompts(case, 0))) <= 48
    forced = stages.forced(cases.make_prompts(case, 0), cases.make_responses(case, 0))
    metrics = stages.update(stages.score(forced))
    assert metrics["loss/value_avg"] > 0
    assert all(map(torch.isfinite, map(torch.tensor, metrics.values())))


def test_equal_ids_for_padding_and_end_are_refused(script, cases):
    with pytest.raises(ValueError, match="pad = eos = 1"):
        loop_of(script, tiny(cases), pad=1)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_peaks_are_those_of_the_phase(script):
    memory = script("llm_arm").Memory("cpu")
    memory.reset()
    before = memory.now()
    big = torch.ones(25_000_000)
    assert memory.peak() - before == pytest.approx(100, abs=8)
    del big
    memory.reset()
    assert memory.peak() - before < 20


def seen(scale=1.0, tokens=100, peak=30.0):
    """What an arm might report of two updates."""
    seconds = {"sample": [2.0, 4.0], "score": [1.0, 1.0], "update": [8.0, 8.0], "garbage": [0, 0]}
    seconds = {name: [scale * value for value in values] for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "cpu_seconds": seconds,
        "sampled_tokens": [tokens, 2 * tokens],
        "fixed_tokens": [tokens, tokens],
        "loaded_mb": 10.0,
        "peak_mb": {"sample": peak, "score": 12.0, "update": 2 * peak},
    }


def test_rates_are_of_response_tokens_and_memory_of_what_is_beyond_the_models(script, cases):
    bench = script("bench_llm")
    slow = seen(3.0, peak=50.0)
    slow["seconds"]["garbage"] = [4.0, 4.0]
    found = {"ours": [seen(), seen(), seen()], "trl": [slow, seen(), slow]}
    rows = bench.summarise("small", tiny(cases), found)
    by = {(row["arm"], row["phase"]): row for row in rows}
    ours, peer = cases.ARMS["ours"].name, cases.ARMS["trl"].name
    assert by[ours, "sample"]["tokens_per_s"] == pytest.approx(50)
    assert by[ours, "update"]["tokens_per_s"] == pytest.approx(12.5)
    assert by[peer, "update"]["ours_times_by_round"] == pytest.approx([3, 1, 3])
    assert by[peer, "update"]["ours_times"] == pytest.approx(3)
    # .02 + .01 + .08 seconds a token, and of the other three times that and .04 of garbage.
    assert by[ours, "whole"]["tokens_per_s"] == pytest.approx(1 / 0.11)
    assert by[peer, "whole"]["ours_times"] == pytest.approx(0.37 / 0.11)
    assert by[ours, "update"]["peak_mb"] == pytest.approx(50)
    assert by[peer, "update"]["peak_mb"] == pytest.approx(90)
    assert by[peer, "update"]["memory_times"] == pytest.approx(1.8)
    assert by[peer, "whole"]["memory_times"] == pytest.approx(1.8)


def test_a_case_of_a_gpu_is_skipped_without_one(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script("bench_llm").main(["--case", "qwen"])
    assert "qwen: not run: needs a GPU" in capsys.readouterr().out


def test_the_gpu_case_has_the_shape_of_qwen(cases):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**cases.QWEN_HALF_B))
    # The 494 million parameters its model card tells.
    assert sum(p.numel() for p in model.parameters()) == 494_032_768


def test_the_benchmark_writes_a_row_an_arm_and_phase(script, cases, monkeypatch, tmp_path, capsys):
    bench = script("bench_llm")
    monkeypatch.setitem(bench.CASES, "small", tiny(cases, arms=("ours", "trl", "trl-8")))
    monkeypatch.setitem(bench.ARMS, "trl-8", cases.Arm("broken", "no_such_peer", {}))
    bench.main(["--case", "small", "--rounds", "1", "--updates", "1", "--json"])
    (file,) = tmp_path.glob("llm_small-*.json")
    record = json.loads(file.read_text())
    assert record["missing"] == {
        "broken": "failed: ModuleNotFoundError: No module named 'peers.no_such_peer'"
    }
    arms = [cases.ARMS[key].name for key in ("ours", "trl")]
    phases = ["sample", "score", "update", "whole"]
    assert [(row["arm"], row["phase"]) for row in record["rows"]] == [
        (arm, phase) for arm in arms for phase in phases
    ]
    for row in record["rows"]:
        assert row["tokens_per_s"] > 0
        assert row["ours_times"] > 0
        if sys.platform == "linux":
            assert row["peak_mb"] > 0
    assert "round 1 of 1: TRL-1.10-style" in capsys.readouterr().out


def test_the_report_has_a_line_an_arm(script, cases, monkeypatch, tmp_path):
    bench, report, harness = script("bench_llm"), script("report"), script("harness")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    found = {"ours": [seen()] * 2, "trl": [seen(2.5, peak=50.0)] * 2}
    rows = bench.summarise("v50k", tiny(cases), found)
    missing = {"TRL-1.10-style, 8 rows at once": "failed: out of memory"}
    harness.write_results("llm_v50k", rows, title="V = 50,257", missing=missing)
    report.main()
    page = report.README.read_text()
    assert "| **V = 50,257** | | | | | | | |" in page
    assert "| ppo_fast | 50 | 100 | 12 | 9 | 20 | 2 | 50 |" in page
    peer = "| TRL-1.10-style | 20 (2.50) | 40 (2.50) | 5 (2.50) | 4 (2.50) | 40 (2.00) | 2 (1.00) "
    assert peer + "| 90 (1.80) |" in page
    assert "TRL-1.10-style, 8 rows at once failed: out of memory." in page
