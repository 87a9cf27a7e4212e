"""Supervised fine-tuning: its loss against plain cross-entropy, and a tiny grammar learnt."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from torch.nn.functional import cross_entropy

from ppo_fast.llm import sft
from ppo_fast.llm.sft import evaluate_sft, rate_at, split, train_sft

transformers = pytest.importorskip("transformers")

PAD, EOS, VOCAB = 0, 1, 12


def llama(seed=0, vocab_size=VOCAB, **settings):
    torch.manual_seed(seed)
    options = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    config = transformers.LlamaConfig(vocab_size=vocab_size, **options | settings)
    return transformers.LlamaForCausalLM(config)


def gpt2(dropout=0.0):
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
            bos_token_id=EOS, eos_token_id=EOS,
        )
    )  # fmt: skip


def random_sequences(count, seed=0, low=2):
    rng = random.Random(seed)
    return [
        [rng.randrange(low, VOCAB) for _ in range(rng.randint(2, 9))] + [EOS] for _ in range(count)
    ]


def plain_loss(model, sequences, prompt_lengths):
    """One sequence at a time through the model's own logits."""
    losses = []
    for sequence, prompt in zip(sequences, prompt_lengths, strict=True):
        logits = model(input_ids=torch.tensor([sequence])).logits[0]
        first = max(1, prompt)
        losses.append(
            cross_entropy(
                logits[first - 1 : -1].double(), torch.tensor(sequence[first:]), reduction="none"
            )
        )
    return torch.cat(losses).mean()


def step_of(model, sequences, prompt_lengths, monkeypatch, **settings):
    """The gradient of the first optimizer step, before clipping."""
    gradients = {}
    clip = torch.nn.utils.clip_grad_norm_

    def recording(parameters, max_norm):
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters()})
        return clip(parameters, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(sft.nn.utils, "clip_grad_norm_", recording)
        metrics = train_sft(
            model,
            sequences,
            prompt_lengths,
            steps=1,
            batch_size=len(sequences),
            eval_fraction=0,
            **settings,
        )
    return gradients, metrics


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_loss_and_gradient_are_those_of_plain_cross_entropy(make, layout, monkeypatch):
    model = make()
    oracle = copy.deepcopy(model)
    sequences = random_sequences(7)
    prompts = [0, 1, 2, 1, 2, 0, 1]
    expected = plain_loss(oracle, sequences, prompts)
    expected.backward()
    # In three or more micro-batches: the mean is over the tokens of the whole batch.
    gradients, metrics = step_of(
        model, sequences, prompts, monkeypatch, token_budget=20, layout=layout
    )
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradient_does_not_depend_on_the_micro_batches(monkeypatch):
    sequences = random_sequences(9)
    whole, _ = step_of(llama(), sequences, None, monkeypatch)
    for budget in (1, 13, 40):
        parts, _ = step_of(llama(), sequences, None, monkeypatch, token_budget=budget)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_prompt_tokens_are_no_targets(monkeypatch):
    model = llama()
    sequences = [[2, 3, 4, EOS], [5, 6, EOS]]
    expected = plain_loss(model, sequences, [3, 2])
    _, metrics = step_of(copy.deepcopy(model), sequences, [3, 2], monkeypatch)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["target_tokens"] == 2


def test_pad_equal_to_eos_changes_nothing(monkeypatch):
    sequences = random_sequences(6)
    for layout in ("packed", "padded"):
        apart, first = step_of(llama(), sequences, None, monkeypatch, layout=layout)
        same, second = step_of(llama(pad_token_id=EOS), sequences, None, monkeypatch, layout=layout)
        assert first["loss"] == second["loss"]
        assert all(torch.equal(apart[name], same[name]) for name in apart)


def test_evaluation_is_the_plain_loss_and_leaves_the_model_alone():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    sequences = random_sequences(8)
    found = evaluate_sft(model, sequences, [1] * 8, token_budget=15)
    expected = float(plain_loss(model, sequences, [1] * 8).detach())
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    hits = [
        int(logits.argmax()) == token
        for sequence in sequences
        for logits, token in zip(
            model(input_ids=torch.tensor([sequence])).logits[0, :-1], sequence[1:], strict=True
        )
    ]
    assert found["eval_token_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def grammar(count, seed):
    """`a b b ... EOS` with b = a + 5 repeated a - 1 times: a in 2..5."""
    rng = random.Random(seed)
    return [[a, *[a + 5] * (a - 1), EOS] for a in (rng.randint(2, 5) for _ in range(count))]


def test_learns_a_tiny_grammar_and_when_it_ends():
    model = llama()
    rows = []
    metrics = train_sft(
        model,
        grammar(400, 0),
        [1] * 400,
        steps=120,
        batch_size=16,
        learning_rate=5e-3,
        log_every=50,
        callback=lambda step, row: rows.append((step, row)),
    )
    # Everything after the first token is certain.
    assert metrics["eval_loss"] < 0.01
    assert metrics["eval_token_accuracy"] == 1
    assert metrics["steps"] == 120
    assert [step for step, _ in rows] == [50, 100, 120]
    assert rows[-1][1]["loss"] < rows[0][1]["loss"]
    for a in (2, 3, 4, 5):
        made = model.generate(
            torch.tensor([[a]]), max_new_tokens=10, do_sample=False, pad_token_id=PAD
        )
        assert made[0].tolist() == [a, *[a + 5] * (a - 1), EOS]


def test_same_seed_same_weights_and_another_seed_others():
    def trained(seed):
        model = llama()
        train_sft(model, random_sequences(40), steps=3, batch_size=8, learning_rate=1e-3, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_dropout_is_off_and_the_mode_is_kept():
    model = gpt2(dropout=0.5).eval()
    same = copy.deepcopy(model)
    sequences = random_sequences(8)
    for each, seed in ((model, 1), (same, 2)):
        torch.manual_seed(seed)
        train_sft(each, sequences, steps=2, batch_size=8, learning_rate=1e-3)
        assert not each.training
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)


def test_epochs_give_their_number_of_steps():
    # 20 sequences, 2 held out: 18 in batches of 4 are 5 steps a pass.
    model = llama()
    metrics = train_sft(model, random_sequences(20), epochs=2, batch_size=4, eval_fraction=0.1)
    assert metrics["steps"] == 10


def test_every_pass_sees_every_sequence_once():
    batches = sft._batches(list(range(3, 13)), 4, seed=0)
    passes = [[next(batches) for _ in range(3)] for _ in range(2)]
    for one in passes:
        assert [len(batch) for batch in one] == [4, 4, 2]
        assert sorted(index for batch in one for index in batch) == list(range(3, 13))
    assert passes[0] != passes[1]


def test_learning_rate_rises_then_falls():
    rates = [rate_at(step, 100, 0.1, "cosine") for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.5)  # halfway through the 90 that fall
    assert 0 < rates[99] < 0.01
    assert rate_at(55, 100, 0.1, "linear") == pytest.approx(0.5)
    assert rate_at(99, 100, 0.0, "constant") == 1
    assert rate_at(0, 1, 0.0, "linear") == 1


def test_split_parts_cover_everything_once():
    train, held_out = split("test", 100, 0.25, seed=0)
    assert len(held_out) == 25
    assert sorted(train + held_out) == list(range(100))
    assert split("test", 10, 0.0, seed=0) == (list(range(10)), [])
    assert split("test", 100, 0.25, seed=1)[1] != held_out


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="step 1 of 2 has loss nan"):
        # Layouts are chosen by comparing logits, which nan passes in neither.
        sft.minimise(
            "test",
            model,
            lambda batch, weight: model(input_ids=torch.tensor([[2, 3]])).logits.sum() / weight,
            indices=[0, 1], lengths=[2, 2], weights=[1, 1], epochs=1, steps=2, batch_size=1,
            token_budget=9, learning_rate=1e-3, warmup=0.0, schedule="linear", weight_decay=0.0,
            max_grad_norm=1.0, seed=0, log_every=1, callback=None,
        )  # fmt: skip
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("sequences", "settings", "words"),
    [
        ([], {}, "sequences is empty"),
        ([[2, 3, EOS], []], {}, r"sequences\[1\] is empty"),
        ([[2, 3, EOS], [EOS]], {}, "sequence 1 has 1 tokens"),
        ([[2, VOCAB, EOS]], {}, "token id 12; expected 0 to 11"),
        ([[2, -1, EOS]], {}, "token id -1"),
        ([[2] * 40 + [EOS]], {}, "41 tokens; expected at most 32"),
        ([[2, 3], [3, 4]], {}, "no sequence ends by the model's EOS token"),
        ([[2, 3, EOS]], {}, "leaves none of 1 examples"),
        ([[2, 3, EOS]] * 4, {"prompt_lengths": [1]}, "1 prompt_lengths for 4 sequences"),
        ([[2, 3, EOS]] * 2, {"prompt_lengths": [1, 3]}, "sequence 1 has 3 tokens and prompt"),
        ([[2, 3, EOS]] * 2, {"prompt_lengths": [1, -1]}, "sequence 1 has 3 tokens and prompt"),
        ([[2, 3, EOS]] * 4, {"eval_fraction": 1.0}, "held-out share is 1.0"),
        ([[2, 3, EOS]] * 4, {"batch_size": 0}, "batch_size is 0"),
        ([[2, 3, EOS]] * 4, {"steps": 0}, "steps is 0"),
        ([[2, 3, EOS]] * 4, {"epochs": -1}, "epochs is -1"),
        ([[2, 3, EOS]] * 4, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        ([[2, 3, EOS]] * 4, {"learning_rate": math.nan}, "learning_rate is nan"),
        ([[2, 3, EOS]] * 4, {"warmup": 2}, "warmup is 2"),
        ([[2, 3, EOS]] * 4, {"schedule": "step"}, "schedule is 'step'"),
        ([[2, 3, EOS]] * 4, {"layout": "ragged"}, "layout = 'ragged'"),
    ],
)
def test_bad_input_is_refused_and_nothing_trained(sequences, settings, words):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        train_sft(model, sequences, **settings)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_sequences_without_eos_can_be_asked_for():
    metrics = train_sft(llama(), [[2, 3], [3, 4]], steps=1, eval_fraction=0, require_eos=False)
    assert metrics["target_tokens"] == 2


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        train_sft(llama().requires_grad_(False), random_sequences(8))
