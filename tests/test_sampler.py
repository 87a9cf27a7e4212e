"""Samplers against full forward passes, exact distributions and each other."""

import logging
import math
import random

import pytest
import torch
from rehearsal import Recorder
from torch import nn

from ppo_fast import capture
from ppo_fast.capture import rehearsal

transformers = pytest.importorskip("transformers")

from ppo_fast.llm import sampler as sampler_module  # noqa: E402
from ppo_fast.llm.cached_sampler import CachedSampler, unsupported  # noqa: E402
from ppo_fast.llm.generate_sampler import GenerateSampler  # noqa: E402
from ppo_fast.llm.sampler import batches, make_sampler, uniforms  # noqa: E402

V, PAD = 61, 0
KINDS = {"cached": CachedSampler, "generate": GenerateSampler}
SMALL = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SMALL | HEADS | options))
    return spread(transformers.LlamaForCausalLM(config))


def gpt2(**options):
    torch.manual_seed(0)
    shape = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
    return spread(transformers.GPT2LMHeadModel(transformers.GPT2Config(**(shape | options))))


def gemma3():
    """Layers with a window of 4 tokens, and one that sees all."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        **(SMALL | HEADS | {"num_hidden_layers": 3}),
        head_dim=8,
        sliding_window=4,
        layer_types=kinds,
    )
    return spread(transformers.Gemma3ForCausalLM(config))


def qwen3():
    torch.manual_seed(0)
    return spread(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, **HEADS)))


def spread(model):
    """Make fresh weights large enough that the logits depend on what is read."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model.eval()


def lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model


def packable():
    attention = pytest.importorskip("ppo_fast.llm.attention")
    attention.register()
    return llama(attn_implementation=attention.NAME)


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "gemma3": gemma3,
    "qwen3": qwen3,
    "ppo_fast attention": packable,
    "eager": lambda: llama(attn_implementation="eager"),
    "lora": lambda: lora(llama()),
}


def some_prompts(count=7, longest=9, seed=0, vocabulary=V):
    rng = random.Random(seed)
    return [
        [rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))] for _ in range(count)
    ]


def ask(sampler, prompts, T=8, temperature=1.0, seeds=None):
    seeds = list(range(100, 100 + len(prompts))) if seeds is None else seeds
    return sampler(prompts, max_new_tokens=T, temperature=temperature, seeds=seeds)


def responses_of(out):
    return [row[:n] for row, n in zip(out.tokens.tolist(), out.lengths, strict=True)]


@torch.no_grad()
def log_probs_by_full_forward(model, prompt, response, temperature):
    """One sequence, no padding, no cache, all logits."""
    was_training = model.training
    model.eval()
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    model.train(was_training)
    all_log_probs = (logits.double() / temperature).log_softmax(-1)
    return torch.stack(
        [all_log_probs[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
    )


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_a_full_unpadded_uncached_forward(kind, name, temperature):
    model = MODELS[name]()
    prompts = some_prompts()
    out = ask(kind(model, [3, 5, 8, 13, 21], PAD), prompts, 12, temperature)
    assert out.tokens.shape == out.log_probs.shape == (7, 12)
    assert out.tokens.dtype is torch.int64 and out.log_probs.dtype is torch.float32
    assert len(set(out.lengths)) > 1 and True in out.ended and False in out.ended
    for row, response in enumerate(responses_of(out)):
        n = out.lengths[row]
        want = log_probs_by_full_forward(model, prompts[row], response, temperature)
        torch.testing.assert_close(out.log_probs[row, :n].double(), want, rtol=1e-4, atol=1e-4)
        assert (out.log_probs[row, n:] == 0).all() and (out.tokens[row, n:] == PAD).all()
        assert n == 12 or out.ended[row]


@pytest.mark.parametrize("name", MODELS)
def test_both_samplers_draw_the_same(name):
    model, prompts = MODELS[name](), some_prompts(9)
    for eos, temperature in (([3, 5, 8], 0.8), ([], 1.0)):
        ours = ask(CachedSampler(model, eos, PAD), prompts, 12, temperature)
        theirs = ask(GenerateSampler(model, eos, PAD), prompts, 12, temperature)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert ours.lengths == theirs.lengths and ours.ended == theirs.ended
        torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-4)


def chi_square(counts, probabilities):
    """Pearson's statistic and its degrees of freedom, rare outcomes lumped together."""
    expected = probabilities * counts.sum()
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    kept = expected > 0
    return ((counts - expected)[kept].square() / expected[kept]).sum(), int(kept.sum()) - 1


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_responses_follow_the_models_distribution(kind, temperature):
    size, prompt, draws = 4, [1, 3], 4000
    model = llama(vocab_size=size)
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    probabilities = torch.stack(
        [
            log_probs_by_full_forward(model, prompt, pair, temperature).sum()
            for pair in pairs.tolist()
        ]
    ).exp()
    assert abs(probabilities.sum() - 1) < 1e-6 and probabilities.max() < 0.7
    # Consecutive seeds, as a trainer would count them.
    out = ask(kind(model, [], 0), [prompt] * draws, 2, temperature, list(range(draws)))
    counts = torch.bincount(out.tokens[:, 0] * size + out.tokens[:, 1], minlength=size**2)
    statistic, freedom = chi_square(counts.double(), probabilities)
    # Mean `freedom`, variance twice that: four standard deviations, one run in ten thousand.
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_ended_responses_follow_the_models_distribution():
    # With an EOS token outcomes have different lengths: [e], or [x, y].
    size, eos, prompt, draws = 4, 2, [1, 3], 4000
    model = llama(vocab_size=size)
    outcomes = [[eos]] + [[x, y] for x in range(size) if x != eos for y in range(size)]
    probabilities = torch.stack(
        [log_probs_by_full_forward(model, prompt, o, 1.0).sum() for o in outcomes]
    ).exp()
    assert abs(probabilities.sum() - 1) < 1e-6
    drawn = responses_of(ask(CachedSampler(model, [eos], 0), [prompt] * draws, 2))
    counts = torch.tensor([drawn.count(outcome) for outcome in outcomes])
    assert counts.sum() == draws
    statistic, freedom = chi_square(counts.double(), probabilities)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_response_depends_on_its_prompt_and_seed_only(kind, name):
    model, prompts, seeds = MODELS[name](), some_prompts(8), list(range(50, 58))
    whole = ask(kind(model, [3, 5], PAD), prompts, 10, 0.9, seeds)
    want = responses_of(whole)
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    arrangements = [[row] for row in range(8)] + [order, [3, 1], [6, 0, 2]]
    for rows in arrangements:
        some = ask(
            kind(model, [3, 5], PAD), [prompts[r] for r in rows], 10, 0.9, [seeds[r] for r in rows]
        )
        assert responses_of(some) == [want[r] for r in rows]
        torch.testing.assert_close(some.log_probs, whole.log_probs[rows], rtol=1e-4, atol=1e-4)
    # Beside rows of another length.
    beside = ask(kind(model, [3, 5], PAD), [list(range(25)), prompts[4]], 10, 0.9, [1, seeds[4]])
    assert responses_of(beside)[1] == want[4]
    for limits in ({"batch_size": 3}, {"max_batch_tokens": 40}, {"batch_size": 1}):
        split = ask(kind(model, [3, 5], PAD, **limits), prompts, 10, 0.9, seeds)
        assert responses_of(split) == want and split.ended == whole.ended
    other = ask(kind(model, [3, 5], PAD), prompts, 10, 0.9, [s + 1 for s in seeds])
    assert responses_of(other) != want


def test_a_shorter_response_is_the_start_of_a_longer_one(kind):
    model, prompts = llama(), some_prompts()
    long = responses_of(ask(kind(model, [3], PAD), prompts, 12))
    short = responses_of(ask(kind(model, [3], PAD), prompts, 5))
    assert short == [response[:5] for response in long]


@pytest.mark.parametrize("eos", [[3, 5], [], [7]])
def test_taking_ended_rows_out_changes_nothing(eos):
    model, prompts = llama(), some_prompts(16)
    # Many of these end early, one after the other.
    with_it = ask(CachedSampler(model, eos, PAD), prompts, 16)
    without = ask(CachedSampler(model, eos, PAD, compact=False), prompts, 16)
    assert torch.equal(with_it.tokens, without.tokens)
    assert with_it.lengths == without.lengths and with_it.ended == without.ended
    torch.testing.assert_close(with_it.log_probs, without.log_probs, rtol=1e-4, atol=1e-4)


def rows_of_passes(model):
    rows = []
    hook = lambda module, args, kwargs, output: rows.append(tuple(output.logits.shape))  # noqa: E731
    model.register_forward_hook(hook, with_kwargs=True)
    return rows


def test_passes_are_as_many_and_as_large_as_needed():
    model, prompts = llama(), some_prompts(16)
    shapes = rows_of_passes(model)
    out = ask(CachedSampler(model, [3, 5, 8], PAD), prompts, 14)
    assert len(set(out.lengths)) > 3
    longest = max(out.lengths)
    alive = [sum(n > step for n in out.lengths) for step in range(longest)]
    # Logits of the last column only, of rows that still go on.
    assert shapes == [(n, 1, V) for n in alive]


def test_sampling_stops_when_all_rows_have_ended(kind):
    model, prompts = llama(), some_prompts(5)
    eos = list(range(0, V, 2))
    shapes = rows_of_passes(model)
    out = ask(kind(model, eos, PAD), prompts, 40)
    assert all(out.ended) and len(shapes) == max(out.lengths) < 40
    assert out.tokens.shape == (5, 40)


def test_pad_may_be_the_eos_token(kind):
    model, prompts = llama(), some_prompts(12)
    # The prompts hold it, too.
    prompts = [[3, *prompt, 3] for prompt in prompts]
    apart = ask(kind(model, [3, 5], PAD), prompts, 12)
    same = ask(kind(model, [3, 5], 3), prompts, 12)
    assert responses_of(same) == responses_of(apart)
    assert same.lengths == apart.lengths and same.ended == apart.ended
    assert any(row[-1] == 3 for row in responses_of(same))
    for row, n in enumerate(same.lengths):
        assert (same.tokens[row, n:] == 3).all() and (same.log_probs[row, n:] == 0).all()
        assert (same.log_probs[row, :n] != 0).all()


def test_eos_may_be_the_first_token(kind):
    out = ask(kind(llama(), list(range(V)), PAD), some_prompts(5), 6)
    assert out.lengths == [1] * 5 and all(out.ended)
    assert (out.log_probs[:, 0] < 0).all() and (out.log_probs[:, 1:] == 0).all()


def test_one_new_token(kind):
    model, prompts = llama(), [[5], [7, 8, 9]]
    out = ask(kind(model, [], PAD), prompts, 1)
    longer = ask(kind(model, [], PAD), prompts, 3)
    assert out.tokens.shape == (2, 1) and out.lengths == [1, 1] and out.ended == [False, False]
    assert torch.equal(out.tokens, longer.tokens[:, :1])


def test_prompts_of_one_token(kind):
    model = llama()
    out = ask(kind(model, [], PAD), [[5], [7]], 4)
    for row, prompt in enumerate([[5], [7]]):
        want = log_probs_by_full_forward(model, prompt, out.tokens[row].tolist(), 1.0)
        torch.testing.assert_close(out.log_probs[row].double(), want, rtol=1e-4, atol=1e-4)


def test_any_of_two_eos_ids_ends_a_response(kind):
    model, prompts = llama(), some_prompts(40)
    free = responses_of(ask(kind(model, [], PAD), prompts, 12))
    out = ask(kind(model, [3, 5], PAD), prompts, 12)
    want = []
    for response in free:
        ends = [i for i, token in enumerate(response) if token in (3, 5)]
        want.append(response[: ends[0] + 1] if ends else response)
    assert responses_of(out) == want
    assert out.ended == [response[-1] in (3, 5) for response in want]
    assert {3, 5} <= {response[-1] for response in want}


def test_without_an_eos_id_every_response_has_full_length(kind):
    out = ask(kind(llama(), (), PAD), some_prompts(3), 9)
    assert out.lengths == [9] * 3 and out.ended == [False] * 3


def test_the_context_may_be_filled_to_its_end(kind):
    model = gpt2()
    out = ask(kind(model, [], PAD), [list(range(30)), [1]], 10)
    want = log_probs_by_full_forward(model, list(range(30)), out.tokens[0].tolist(), 1.0)
    torch.testing.assert_close(out.log_probs[0].double(), want, rtol=1e-4, atol=1e-4)


def test_training_mode_dropout_and_checkpointing_are_off_and_come_back(kind):
    plain = gpt2()
    want = ask(kind(plain, [3], PAD), some_prompts(), 10)
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.load_state_dict(plain.state_dict())
    model.train()
    model.transformer.h[1].eval()  # as someone may have frozen it
    model.gradient_checkpointing_enable()
    before = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
    for _ in range(2):
        out = ask(kind(model, [3], PAD), some_prompts(), 10)
        assert torch.equal(out.tokens, want.tokens) and torch.equal(out.log_probs, want.log_probs)
    after = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
    assert after == before and model.training and (True, True) in after
    # Nothing it left behind breaks the next backward pass.
    assert not out.log_probs.requires_grad
    model(input_ids=out.tokens).logits.sum().backward()
    assert model.transformer.wte.weight.grad.isfinite().all()


def test_the_mode_comes_back_after_an_error(kind):
    model = llama().train()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        ask(kind(model, [3], PAD), some_prompts())
    assert model.training
    assert model.generation_config.pad_token_id is None


def test_the_models_generation_config_does_not_bend_the_distribution():
    model, prompts = llama(), some_prompts()
    want = ask(GenerateSampler(model, [3], PAD), prompts, 12)
    bent = transformers.GenerationConfig(
        repetition_penalty=1.5, top_k=2, do_sample=True, min_new_tokens=5, eos_token_id=7
    )
    model.generation_config = bent
    out = ask(GenerateSampler(model, [3], PAD), prompts, 12)
    assert torch.equal(out.tokens, want.tokens) and torch.equal(out.log_probs, want.log_probs)
    assert model.generation_config is bent


def test_the_global_random_state_is_left_alone(kind):
    model = llama()
    state = torch.get_rng_state()
    ask(kind(model, [3], PAD), some_prompts())
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_followed(kind):
    model, prompts = llama(), some_prompts()
    sampler = kind(model, [], PAD)
    first = ask(sampler, prompts)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    sampler.load_policy(model)
    second = ask(sampler, prompts)
    assert not torch.equal(first.tokens, second.tokens)
    want = log_probs_by_full_forward(model, prompts[0], second.tokens[0].tolist(), 1.0)
    torch.testing.assert_close(second.log_probs[0].double(), want, rtol=1e-4, atol=1e-4)


def test_adapters_are_followed(kind):
    model, prompts = lora(llama()), some_prompts()
    sampler = kind(model, [], PAD)
    with_adapter = ask(sampler, prompts)
    with model.disable_adapter():
        without = ask(sampler, prompts)
    assert torch.equal(without.tokens, ask(kind(llama(), [], PAD), prompts).tokens)
    assert not torch.equal(without.tokens, with_adapter.tokens)


def test_bfloat16_models_report_float32_log_probs(kind):
    out = ask(kind(llama().bfloat16(), [3], PAD), some_prompts(), 6)
    assert out.log_probs.dtype is torch.float32 and out.log_probs.isfinite().all()


# The device's way, rehearsed on a CPU: steps recorded, looks seldom.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "ppo_fast attention", "eager"])
def test_replayed_steps_draw_what_eager_ones_do(name):
    model, prompts = MODELS[name](), some_prompts(8)
    want = [ask(CachedSampler(model, [3, 5], PAD), prompts, 20, T) for T in (1.0, 0.6)]
    recorder = Recorder()
    with rehearsal(recorder):
        sampler = CachedSampler(model, [3, 5], PAD, look_every=4)
        # The recording of the first rollout serves the second, at another temperature.
        got = [ask(sampler, prompts, 20, T) for T in (1.0, 0.6)]
    assert recorder.replays > 15
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert ours.lengths == theirs.lengths and ours.ended == theirs.ended
        torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-4)


def test_rows_are_halved_at_looks_and_every_number_of_rows_is_recorded_once(caplog):
    model, prompts = llama(), some_prompts(16)
    eos = [3, 5, 8, 13, 21, 34]
    want = ask(CachedSampler(model, eos, PAD), prompts, 40)
    shapes = rows_of_passes(model)
    recorder = Recorder()
    with rehearsal(recorder), caplog.at_level(logging.WARNING, "ppo_fast"):
        sampler = CachedSampler(model, eos, PAD, look_every=4)
        first, second = (ask(sampler, prompts, 40) for _ in range(2))
    assert torch.equal(first.tokens, want.tokens) and torch.equal(second.tokens, want.tokens)
    assert not caplog.records
    assert {rows for rows, _, _ in shapes} <= {16, 8, 4, 2, 1} and len(recorder.phases) > 2
    assert len(recorder.phases) <= 5 and recorder.replays > 0


def test_memory_of_a_recording_serves_rollouts_that_fit_into_it():
    model = llama(max_position_embeddings=256)
    few, many, long = some_prompts(8), some_prompts(9), [[1] * 40] * 9
    rollouts = [  # prompts, new tokens, whether the memory of the one before serves
        (few, 12, False),
        (few[:5], 10, True),
        (few[3:], 12, True),
        (few, 9, True),
        (many, 12, False),  # more rows
        (many, 24, False),  # more steps
        (long, 24, True),
        (long, 90, False),  # more slots
        (long[:2], 5, False),  # so few that most would be read in vain
    ]
    with rehearsal(Recorder()):
        sampler = CachedSampler(model, [3], PAD)
        for prompts, T, kept in rollouts:
            before = sampler._decoding
            out = ask(sampler, prompts, T)
            assert (sampler._decoding is before) == kept
            fresh = ask(CachedSampler(model, [3], PAD), prompts, T)
            assert torch.equal(out.tokens, fresh.tokens) and out.lengths == fresh.lengths


def test_a_recording_is_not_replayed_with_other_adapters(monkeypatch):
    monkeypatch.setattr(capture, "EAGER_RUNS", 1)
    model, prompts = lora(llama()), some_prompts()
    with rehearsal(Recorder()):
        sampler = CachedSampler(model, [], PAD)
        ask(sampler, prompts)
        with model.disable_adapter():
            without = ask(sampler, prompts)
    assert torch.equal(without.tokens, ask(CachedSampler(llama(), [], PAD), prompts).tokens)


def test_logits_that_are_no_numbers_are_reported_where_the_host_does_not_look():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = math.nan
    with rehearsal(Recorder()), pytest.raises(ValueError, match=r"prompts\[1\] hold NaN"):
        ask(CachedSampler(model, [], PAD), [[1, 2], [9], [3]], 2)


def test_memory_is_kept_until_it_is_released():
    with rehearsal(Recorder()):
        sampler = CachedSampler(llama(), [3], PAD)
        first = ask(sampler, some_prompts())
        assert sampler._decoding is not None
        sampler.release()
        assert sampler._decoding is None
        assert torch.equal(ask(sampler, some_prompts()).tokens, first.tokens)
    sampler = CachedSampler(llama(), [3], PAD)
    ask(sampler, some_prompts())
    assert sampler._decoding is None  # on a CPU nothing is kept


# What is told apart and refused.


class OfItsOwn(nn.Module):
    def forward(self, input_ids):
        return input_ids


def test_make_sampler_takes_the_faster_that_can_run_the_model(caplog):
    recurrent = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with caplog.at_level(logging.INFO, "ppo_fast"):
        assert isinstance(make_sampler(llama(), [3], PAD), CachedSampler)
        assert isinstance(make_sampler(lora(llama()), [3], PAD), CachedSampler)
        assert isinstance(make_sampler(llama(), [3], PAD, "generate"), GenerateSampler)
        assert isinstance(make_sampler(recurrent, [3], PAD, batch_size=2), GenerateSampler)
    said = [record.getMessage() for record in caplog.records]
    assert "faster" in said[0] and "asked for" in said[2] and "cannot run this model" in said[3]
    assert make_sampler(llama(), [3], PAD, batch_size=2).batch_size == 2
    with pytest.raises(ValueError, match=r"CachedSampler: cannot run .*use GenerateSampler"):
        make_sampler(recurrent, [3], PAD, "cached")
    with pytest.raises(ValueError, match="make_sampler: kind is 'vllm'"):
        make_sampler(llama(), [3], PAD, "vllm")
    with pytest.raises(TypeError, match="OfItsOwn without generate"):
        make_sampler(OfItsOwn(), [3], PAD)


def test_models_with_a_state_of_their_own_are_generated_from():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config)
    out = ask(make_sampler(model, [3], PAD), [[1, 2, 3], [4, 5, 6]], 5)
    for row, prompt in enumerate([[1, 2, 3], [4, 5, 6]]):
        response = responses_of(out)[row]
        want = log_probs_by_full_forward(model, prompt, response, 1.0)
        got = out.log_probs[row, : len(response)].double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_the_loop_cannot_run_is_named():
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2)
    )
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    assert "position_ids" in unsupported(bloom)
    assert "encoder" in unsupported(t5)
    assert "not a transformers model" in unsupported(OfItsOwn())
    assert [unsupported(make()) for make in MODELS.values()] == [None] * len(MODELS)
    with pytest.raises(ValueError, match=r"GenerateSampler: .* has an encoder"):
        GenerateSampler(t5, [1], 0)


def test_a_model_that_leaves_the_cache_empty_is_found_out():
    model = llama()
    forward = model.forward

    def without_cache(input_ids, attention_mask, position_ids, past_key_values, use_cache):
        return forward(input_ids, attention_mask, position_ids, use_cache=False)

    model.forward = without_cache
    with pytest.raises(RuntimeError, match="LlamaForCausalLM did not keep its keys"):
        ask(CachedSampler(model, [3], PAD), some_prompts())


def test_learned_prompts_are_refused(kind):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"adapter 'default' is a learned prompt"):
        kind(peft.get_peft_model(llama(), config), [3], PAD)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"prompts": [[1], []]}, ValueError, r"prompts\[1\] is empty"),
        ({"prompts": ["text", [1]]}, TypeError, r"prompts\[0\] is a str; expected a list of token"),
        (
            {"prompts": [[1], [1, V]]},
            ValueError,
            rf"prompts\[1\] holds token {V}; expected .*0..60",
        ),
        ({"prompts": [[1], [-1]]}, ValueError, r"prompts\[1\] holds token -1"),
        (
            {"prompts": [[1], [1] * 60]},
            ValueError,
            r"prompts\[1\] has 60 .* is 65; .* context of 64",
        ),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens is 2.5"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"seeds": [1]}, ValueError, "there are 1 seeds for 2 prompts"),
        ({"seeds": [1, -1]}, ValueError, "seeds hold -1"),
        ({"seeds": [1, 2.0]}, TypeError, "seeds hold 2.0"),
    ],
)
def test_bad_requests_are_explained_before_the_first_pass(kind, change, error, message):
    model = llama()
    shapes = rows_of_passes(model)
    request = {"prompts": [[1, 2], [3]], "max_new_tokens": 5, "temperature": 1.0, "seeds": [0, 1]}
    request |= change
    with pytest.raises(error, match=f"{kind.__name__}: .*{message}"):
        kind(model, [3], PAD)(request.pop("prompts"), **request)
    assert not shapes


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((3, PAD), {}, TypeError, "eos_token_ids is 3; expected a sequence"),
        ((None, PAD), {}, TypeError, "eos_token_ids is None"),
        (([3, V], PAD), {}, ValueError, f"eos_token_ids holds {V}"),
        (([3], None), {}, TypeError, "pad_token_id holds None.*set tokenizer.pad_token"),
        (([3], -1), {}, ValueError, "pad_token_id holds -1"),
        (([3], PAD), {"batch_size": 0}, ValueError, "batch_size is 0"),
        (([3], PAD), {"max_batch_tokens": 0}, ValueError, "max_batch_tokens is 0"),
    ],
)
def test_bad_constructions_are_explained(kind, args, options, error, message):
    with pytest.raises(error, match=f"{kind.__name__}: {message}"):
        kind(llama(), *args, **options)


def test_a_row_over_the_token_limit_is_refused(kind):
    sampler = kind(llama(), [3], PAD, max_batch_tokens=10)
    with pytest.raises(ValueError, match=r"max_batch_tokens is 10, but .* may have 11"):
        ask(sampler, [[1], [1] * 6], 5)


def test_batches_keep_to_their_limits_and_hold_every_row_once():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 30))]
        size, tokens = rng.choice([None, 1, 4]), rng.choice([None, 60, 200])
        parts = batches("test", lengths, 10, size, tokens)
        assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
        assert len(parts) == 1 or [lengths[r] for p in parts for r in p] == sorted(lengths)[::-1]
        for part in parts:
            assert size is None or len(part) <= size
            padded = len(part) * (max(lengths[r] for r in part) + 10)
            assert tokens is None or padded <= tokens
    assert batches("test", [3, 9, 4], 5, None, None) == [[0, 1, 2]]


def test_random_numbers_are_a_rows_own():
    u = uniforms([7, 8, 7], 5)
    assert u.shape == (3, 5, 2) and u.dtype is torch.float64
    assert torch.equal(u[0], u[2]) and not torch.equal(u[0], u[1])
    assert torch.equal(uniforms([8], 3)[0], u[1, :3])
    many = uniforms(range(2000), 3).flatten(1)
    assert abs(many.mean() - 0.5) < 0.02 and many.min() >= 0 and many.max() < 1
    correlations = torch.corrcoef(many.T) - torch.eye(6)
    assert correlations.abs().max() < 0.1


def test_the_protocol_is_kept(kind):
    sampler: sampler_module.Sampler = kind(llama(), [3], PAD)
    assert sampler.load_policy(llama()) is None
