"""The reward model: Bradley-Terry by hand, scores by length only, learning, calibration, files."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

from ppo_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_fast.llm import reward_model as module
from ppo_fast.llm.reward_model import (
    FILE,
    RewardModel,
    TokenPair,
    as_reward_model,
    evaluate_reward_model,
    expected_calibration_error,
    preference_losses,
    train_reward_model,
)

transformers = pytest.importorskip("transformers")

PAD, EOS, VOCAB = 0, 1, 20


def config(**settings):
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    return transformers.LlamaConfig(**options | settings)


def llama(seed=0, **settings):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config(**settings))


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32,
            bos_token_id=EOS, eos_token_id=EOS,
        )
    )  # fmt: skip


def sequences(count, seed=0, low=2):
    rng = random.Random(seed)
    return [
        [rng.randrange(low, VOCAB) for _ in range(rng.randint(1, 12))] + [EOS] for _ in range(count)
    ]


def alone(model, sequence):
    """The score of one sequence by the trunk's own forward."""
    hidden = model.trunk(input_ids=torch.tensor([sequence]), use_cache=False).last_hidden_state
    return (hidden[0, -1] * model.head.weight[0]).sum() + model.head.bias[0]


def test_bradley_terry_loss_by_hand():
    chosen = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    margins = torch.tensor([0.0, 0.0, 0.5], dtype=torch.float64)
    losses = preference_losses(chosen, rejected, margins)
    # log(1 + exp(-x)) at x = 1.5, 0 and -4.5
    expected = [0.20141327798275246, 0.6931471805599453, 4.511047744848594]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    losses.sum().backward()
    # -sigmoid(-x), and its opposite
    slopes = [-1 / (1 + math.exp(x)) for x in (1.5, 0.0, -4.5)]
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert rejected.grad.tolist() == pytest.approx([-slope for slope in slopes], rel=1e-12)


def test_centering_by_hand():
    chosen = torch.tensor([2.0], requires_grad=True)
    rejected = torch.tensor([1.0], requires_grad=True)
    loss = preference_losses(chosen, rejected, torch.zeros(1), center_rewards_coefficient=0.1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)) + 0.1 * 9, rel=1e-6)
    loss.sum().backward()
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.e) + 0.1 * 2 * 3, rel=1e-6)
    assert rejected.grad.item() == pytest.approx(1 / (1 + math.e) + 0.1 * 2 * 3, rel=1e-6)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_scores_are_those_of_the_last_token_whatever_the_batch(make, layout):
    model = RewardModel.from_causal_lm(make())
    assert model.layout == "packed"
    model.layout = layout
    batch = sequences(9)
    with torch.no_grad():
        expected = torch.stack([alone(model, sequence) for sequence in batch])
    for budget in (1, 20, 10_000):
        torch.testing.assert_close(
            model(batch, token_budget=budget), expected, rtol=1e-4, atol=1e-5
        )
    backwards = model(batch[::-1]).flip(0)
    torch.testing.assert_close(backwards, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.logits(batch).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_score_is_read_at_the_last_token_even_if_that_is_padding_or_eos_came_before():
    # Token 0 is pad: here it is a token like any other, first, last or doubled.
    for pad in (PAD, EOS):
        model = RewardModel.from_causal_lm(llama(pad_token_id=pad))
        for layout in ("packed", "padded"):
            model.layout = layout
            batch = [[2, 3, EOS], [2, 3, EOS, EOS], [2, 3, PAD], [PAD, PAD], [EOS, 4], [5]]
            with torch.no_grad():
                expected = torch.stack([alone(model, sequence) for sequence in batch])
            torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)
            assert expected[0] != expected[1]


def test_inference_records_no_gradient_and_logits_do():
    model = RewardModel.from_causal_lm(llama())
    assert not model([[2, 3]]).requires_grad
    assert model.logits([[2, 3]]).requires_grad
    assert model([[2, 3]]).dtype == torch.float32


def test_a_bfloat16_trunk_has_float32_scores():
    model = RewardModel.from_causal_lm(bfloat16())
    assert model([[2, 3]]).dtype == torch.float32
    assert model.head.weight.dtype == torch.float32


def test_the_causal_lm_is_copied_and_its_dropout_is_off():
    torch.manual_seed(0)
    lm = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, attn_pdrop=0.5
        )
    )
    before = copy.deepcopy(lm.state_dict())
    model = RewardModel.from_causal_lm(lm.requires_grad_(False)).train()
    assert torch.equal(model([[2, 3, 4]]), model([[2, 3, 4]]))
    train_reward_model(model, [([2, 3], [2, 4])] * 4, held_out=0, learning_rate=0.1)
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.state_dict().items())
    assert lm.config._attn_implementation != "ppo_fast"
    moved = dict(model.trunk.named_parameters())
    assert not torch.equal(moved["wte.weight"], before["transformer.wte.weight"])


def test_the_head_starts_small_and_depends_on_the_seed_alone():
    lm = llama(hidden_size=256, num_hidden_layers=1)
    torch.manual_seed(7)
    first = RewardModel.from_causal_lm(lm, seed=1).head
    state = torch.get_rng_state()
    second = RewardModel.from_causal_lm(lm, seed=1).head
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.weight, second.weight)
    assert first.weight.std().item() == pytest.approx(1 / math.sqrt(257), rel=0.2)
    assert first.bias.item() == 0


def test_a_sequence_classifier_scores_the_same():
    torch.manual_seed(0)
    classifier = transformers.LlamaForSequenceClassification(config(num_labels=1)).eval()
    model = as_reward_model(classifier)
    batch = sequences(5)
    with torch.no_grad():
        expected = torch.cat([classifier(input_ids=torch.tensor([s])).logits[0] for s in batch])
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)
    assert as_reward_model(model) is model


def test_both_sides_of_a_batch_go_through_one_forward(monkeypatch):
    model = RewardModel.from_causal_lm(llama())
    calls = []
    inner = module._last_hidden

    def counting(trunk, batch, layout):
        calls.append([list(sequence) for sequence in batch])
        return inner(trunk, batch, layout)

    monkeypatch.setattr(module, "_last_hidden", counting)
    pairs = [([2, 3], [4]), ([5], [6, 7, 8])]
    train_reward_model(model, pairs, steps=1, batch_size=2, held_out=0)
    assert len(calls) == 1
    assert sorted(calls[0]) == [[2, 3], [4], [5], [6, 7, 8]]


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_loss_is_the_mean_over_pairs_however_it_is_cut(budget):
    model = RewardModel.from_causal_lm(llama())
    chosen, rejected = sequences(7, seed=1), sequences(7, seed=2)
    margins = [0.0, 0.5, 1.0, 0.0, 0.0, -1.0, 0.0]
    expected = []
    with torch.no_grad():
        for a, b, margin in zip(chosen, rejected, margins, strict=True):
            up, down = float(alone(model, a)), float(alone(model, b))
            expected.append(math.log1p(math.exp(-(up - down - margin))) + 0.3 * (up + down) ** 2)
    metrics = train_reward_model(
        model,
        list(zip(chosen, rejected, margins, strict=True)),
        steps=1,
        batch_size=7,
        held_out=0,
        token_budget=budget,
        center_rewards_coefficient=0.3,
    )
    assert metrics["loss"] == pytest.approx(sum(expected) / 7, rel=1e-4)


def preferences(count, seed):
    """Whoever has more of tokens 2..5 than of 6..9 wins."""
    rng = random.Random(seed)
    pairs = []
    while len(pairs) < count:
        two = [[rng.randrange(2, 14) for _ in range(rng.randint(4, 9))] + [EOS] for _ in range(2)]
        worth = [sum((2 <= t < 6) - (6 <= t < 10) for t in sequence) for sequence in two]
        if worth[0] != worth[1]:
            pairs.append(TokenPair(*(two if worth[0] > worth[1] else two[::-1])))
    return pairs


def test_learns_a_separable_preference():
    model = RewardModel.from_causal_lm(llama())
    metrics = train_reward_model(
        model,
        preferences(1200, 0),
        epochs=3,
        batch_size=16,
        learning_rate=3e-3,
        held_out=preferences(300, 1),
    )
    assert metrics["eval_accuracy"] > 0.9
    assert metrics["eval_loss"] < 0.3
    assert metrics["eval_margin"] > 1
    assert metrics["steps"] == 225
    untrained = evaluate_reward_model(RewardModel.from_causal_lm(llama()), preferences(300, 1))
    assert untrained["eval_accuracy"] < 0.65


def test_centering_shrinks_the_mean():
    pairs = preferences(200, 0)

    def mean_after(coefficient):
        model = RewardModel.from_causal_lm(llama())
        with torch.no_grad():
            model.head.bias.fill_(3.0)
        metrics = train_reward_model(
            model,
            pairs,
            steps=30,
            batch_size=16,
            learning_rate=1e-2,
            center_rewards_coefficient=coefficient,
        )
        return abs(metrics["eval_mean_score"])

    assert mean_after(0.1) < 0.5
    assert mean_after(0.0) > 2


def test_evaluation_by_hand():
    model = RewardModel.from_causal_lm(llama())
    pairs = preferences(40, 3)
    with torch.no_grad():
        up = [float(alone(model, pair.chosen)) for pair in pairs]
        down = [float(alone(model, pair.rejected)) for pair in pairs]
    found = evaluate_reward_model(model, pairs, token_budget=30)
    gaps = [a - b for a, b in zip(up, down, strict=True)]
    assert found["eval_accuracy"] == sum(gap > 0 for gap in gaps) / 40
    assert found["eval_margin"] == pytest.approx(sum(gaps) / 40, abs=1e-5)
    assert found["eval_mean_score"] == pytest.approx(sum(up + down) / 80, abs=1e-5)
    expected = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 40
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_calibration_of_known_probabilities():
    # In [.1, .2): mean .15 against 1 of 2; .85 against 0; in [.9, 1]: mean .95 against 2 of 2.
    probabilities = torch.tensor([0.12, 0.18, 0.85, 0.9, 1.0])
    outcomes = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    error = expected_calibration_error(probabilities, outcomes)
    assert error == pytest.approx((2 * 0.35 + 0.85 + 2 * 0.05) / 5, rel=1e-5)


def test_calibrated_predictions_have_no_error_and_boastful_ones_have():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(40_000, generator=generator)
    outcomes = (torch.rand(40_000, generator=generator) < truth).float()
    assert expected_calibration_error(truth, outcomes) < 0.02
    boastful = torch.sigmoid(4 * torch.logit(truth, eps=1e-6))
    assert expected_calibration_error(boastful, outcomes) > 0.15


def test_calibration_refuses_what_are_no_probabilities():
    for probabilities in ([0.5, 1.5], [0.5, math.nan], [0.5]):
        with pytest.raises(ValueError, match="expected_calibration_error"):
            expected_calibration_error(torch.tensor(probabilities), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="n > 0"):
        expected_calibration_error(torch.zeros(0), torch.zeros(0))


def test_normalised_scores_have_mean_zero_and_unit_spread():
    model = RewardModel.from_causal_lm(llama())
    batch = sequences(50)
    raw = model(batch)
    model.normalise(batch)
    scores = model(batch)
    assert abs(scores.mean()) < 1e-5
    assert float(scores.std(correction=0)) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(model.logits(batch).detach(), raw)
    model.normalise(batch, scale=False)
    torch.testing.assert_close(model(batch), raw - raw.mean(), rtol=1e-4, atol=1e-5)


def test_training_starts_from_scores_that_are_not_normalised():
    model = RewardModel.from_causal_lm(llama())
    model.normalise(sequences(20))
    train_reward_model(model, preferences(10, 0), steps=1, held_out=0)
    assert model.gain == 1
    assert model.bias == 0


def test_scores_that_do_not_differ_cannot_be_normalised():
    model = RewardModel.from_causal_lm(llama())
    with pytest.raises(ValueError, match="expected finite scores that differ"):
        model.normalise([[2, 3]] * 5)
    with pytest.raises(ValueError, match="1 sequences"):
        model.normalise([[2, 3]])
    with torch.no_grad():
        model.head.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="mean nan"):
        model.normalise(sequences(5))
    assert model.gain == 1


def bfloat16():
    torch.manual_seed(0)
    # Not `.bfloat16()`, which rounds the rotary frequencies that transformers keeps in float32.
    return transformers.AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)


@pytest.mark.parametrize("make", [llama, gpt2, bfloat16])
def test_saved_and_loaded_scores_have_equal_bits(make, tmp_path):
    model = RewardModel.from_causal_lm(make(), seed=3).eval()
    batch = sequences(12)
    model.normalise(batch)
    model.save_pretrained(tmp_path / "new" / "folder")
    torch.manual_seed(99)
    loaded = RewardModel.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(loaded(batch), model(batch))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
        assert tensor.dtype == loaded.state_dict()[name].dtype
    # It can be trained further.
    train_reward_model(loaded, preferences(8, 0), steps=1, held_out=0, learning_rate=1e-3)
    assert not torch.equal(loaded.head.weight, model.head.weight)


def test_a_classifier_saved_by_transformers_loads(tmp_path):
    torch.manual_seed(0)
    classifier = transformers.LlamaForSequenceClassification(config(num_labels=1)).eval()
    classifier.save_pretrained(tmp_path)
    batch = sequences(4)
    assert torch.equal(
        RewardModel.from_pretrained(tmp_path)(batch),
        RewardModel.from_sequence_classifier(classifier)(batch),
    )


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no reward_model"):
        RewardModel.from_pretrained(tmp_path)
    save_checkpoint(tmp_path / FILE, {"x": torch.zeros(1)}, {"kind": "policy"})
    with pytest.raises(CheckpointError, match="'policy'; expected a reward model"):
        RewardModel.from_pretrained(tmp_path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = RewardModel.from_causal_lm(llama())
    model.save_pretrained(tmp_path)
    before = load_checkpoint(tmp_path / FILE)[0]["head.weight"]
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError(28, "full")))
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(CheckpointError):
        model.save_pretrained(tmp_path)
    assert torch.equal(load_checkpoint(tmp_path / FILE)[0]["head.weight"], before)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("pairs", "settings", "words"),
    [
        ([], {}, "pairs is empty"),
        ([([2, 3], [2, 3])], {}, r"chosen and rejected of pairs\[0\] are equal"),
        ([([2, 3], [4]), ((5,), [5])], {}, r"chosen and rejected of pairs\[1\] are equal"),
        ([([2, 20], [2, 3])], {}, r"pairs \(chosen\)\[0\] holds the token id 20"),
        ([([2, 3], [2, -1])], {}, r"pairs \(rejected\)\[0\] holds the token id -1"),
        ([([2, 3], [])], {}, r"pairs \(rejected\)\[0\] is empty"),
        ([([2] * 33, [3])], {}, "33 tokens; expected at most 32"),
        ([([2, 3], [4], math.nan)], {}, r"margin of pairs\[0\] is nan"),
        ([([2, 3], [4])], {"held_out": 0.5}, "leaves none of 1"),
        ([([2, 3], [4])], {"held_out": [([2], [2])]}, r"of held_out\[0\] are equal"),
        ([([2, 3], [4])], {"center_rewards_coefficient": -1}, "coefficient is -1"),
        ([([2, 3], [4])], {"held_out": 0, "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_preferences_are_refused(pairs, settings, words):
    model = RewardModel.from_causal_lm(llama())
    with pytest.raises(ValueError, match=words):
        train_reward_model(model, pairs, **settings)


def test_a_score_that_is_not_finite_stops_training_before_the_step():
    model = RewardModel.from_causal_lm(llama())
    with torch.no_grad():
        model.trunk.embed_tokens.weight[4] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="step 1 of 1 has loss nan"):
        train_reward_model(model, [([2, 3], [4])], held_out=0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_bad_sequences_are_refused():
    model = RewardModel.from_causal_lm(llama())
    for bad, words in (([], "empty"), ([[2], []], "empty"), ([[20]], "token id 20")):
        with pytest.raises(ValueError, match=words):
            model(bad)
        with pytest.raises(ValueError, match=words):
            model.logits(bad)


def test_another_tokenizer_is_refused():
    from ppo_fast.llm.stories import make_tokenizer

    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=f"{len(tokenizer)} tokens, the reward model a vocabulary"):
        RewardModel.from_causal_lm(llama()).check_tokenizer(tokenizer)
    RewardModel.from_causal_lm(llama(vocab_size=len(tokenizer) + 6)).check_tokenizer(tokenizer)


def test_models_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="expected a causal LM"):
        RewardModel.from_causal_lm(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="linear layer 'score'"):
        as_reward_model(llama())
    torch.manual_seed(0)
    three = transformers.LlamaForSequenceClassification(config(num_labels=3))
    with pytest.raises(ValueError, match="3 outputs; expected 1"):
        as_reward_model(three)


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(TypeError, match="merge_and_unload"):
        RewardModel.from_causal_lm(adapted)
