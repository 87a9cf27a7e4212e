"""Packed and padded forwards against each sequence's own forward by transformers."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers

from ppo_fast.llm import attention
from ppo_fast.llm.forward import (
    choose_layout,
    disable_dropout,
    hidden_states,
    logits_of,
    trunk_of,
    unwrapped,
)
from ppo_fast.llm.packing import pack

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
SLIDING = {"use_sliding_window": True, "max_window_layers": 1}

# Name: class, the layout that "auto" finds, and its config.
MODELS = {
    "llama": ("Llama", "packed", SMALL),
    "llama tied": ("Llama", "packed", {**SMALL, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", "packed", {**GPT2, "initializer_range": 0.2}),
    "gpt2 scaled by layer": (
        "GPT2",
        "packed",
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    ),
    "qwen2": ("Qwen2", "packed", SMALL),
    "qwen2 sliding": ("Qwen2", "packed", {**SMALL, **SLIDING, "sliding_window": 8}),
    "qwen3": ("Qwen3", "packed", {**SMALL, "head_dim": 16}),
    "mistral sliding": ("Mistral", "packed", {**SMALL, "sliding_window": 4}),
    "mistral sliding beyond the check": ("Mistral", "packed", {**SMALL, "sliding_window": 9}),
    "gemma3": ("Gemma3", "packed", {**SMALL, "head_dim": 8, "sliding_window": 4}),
    "gemma3 capped": ("Gemma3", "packed", {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "opt": (
        "OPT",
        "packed",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.2},
    ),
    "gpt_neox": ("GPTNeoX", "packed", SMALL),
    "phi": ("Phi", "packed", SMALL),
    "granite": (
        "Granite",
        "packed",
        {**SMALL, "logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "cohere": ("Cohere", "packed", {**SMALL, "logit_scale": 0.3}),
    "mixtral": ("Mixtral", "packed", {**SMALL, "num_local_experts": 4}),
    "gemma2": ("Gemma2", "padded", {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "bloom": ("Bloom", "padded", {**GPT2, "hidden_size": 32}),
    "mamba": (
        "Mamba",
        "padded",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "gpt_oss": (
        "GptOss",
        "padded",
        {**SMALL, "head_dim": 8, "sliding_window": 8, "num_local_experts": 4},
    ),
    "stablelm": ("StableLm", "padded", SMALL),
    # Only its mask knows of the window.
    "qwen2_moe sliding": (
        "Qwen2Moe",
        "padded",
        {**SMALL, **SLIDING, **MOE, "sliding_window": 8, "shared_expert_intermediate_size": 16},
    ),
    "llama4 chunked": (
        "Llama4",
        "padded",
        {**SMALL, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    # A convolution goes from token to token, whichever sequence they are of.
    "lfm2": ("Lfm2", "padded", {**SMALL, "layer_types": ["conv", "full_attention"]}),
    "bamba": ("Bamba", "padded", {**SMALL, **MAMBA, "attn_layer_indices": [1]}),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}
# Their scans and expert layers are not made for float64.
SINGLE = {"mamba", "mixtral", "gpt_oss", "qwen2_moe sliding"}
LENGTHS = [(3, 17), (1, 1), (5, 9), (2, 1), (1, 22)]


def build(name, dtype=torch.float32, seed=0, **changes):
    kind, _, config = MODELS[name]
    torch.manual_seed(seed)
    made = getattr(transformers, CONFIGS.get(kind, f"{kind}Config"))(**config, **changes)
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    return getattr(transformers, kind + suffix)(made).to(dtype).eval()


def sequences(lengths=LENGTHS, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()

    return [tokens(a) for a, _ in lengths], [tokens(b) for _, b in lengths]


def own_logits(model, prompts, responses):
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response])
        rows.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1])
    return torch.cat(rows)


def our_logits(model, prompts, responses, layout):
    packed = pack(prompts, responses)
    return logits_of(model, hidden_states(trunk_of(model), packed, layout))


def relative(got, expected):
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_each_sequences_own_forward(name):
    model = build(name, torch.float32 if name in SINGLE else torch.float64)
    prompts, responses = sequences()
    expected = own_logits(model, prompts, responses)
    layout = choose_layout(model)
    assert layout == MODELS[name][1]
    # Norms and rotations of many families are float32 also in a float64 model.
    tolerance = 1e-5 if name in SINGLE else 2e-6
    assert relative(our_logits(model, prompts, responses, layout), expected) < tolerance
    padded = choose_layout(build(name), "padded")
    assert relative(our_logits(model, prompts, responses, padded), expected) < tolerance


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral sliding", "phi"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)],
    ids=["fp64", "fp32", "bf16"],
)
@torch.no_grad()
def test_every_dtype_packs(name, dtype, tolerance):
    model = build(name, dtype)
    prompts, responses = sequences()
    expected = own_logits(model, prompts, responses)
    assert choose_layout(model) == "packed"
    got = our_logits(model, prompts, responses, "packed")
    assert got.dtype == dtype
    assert relative(got, expected) < tolerance


@pytest.mark.parametrize("name", ["lfm2", "bamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_below_the_rounding_of_logits_is_found(name, dtype):
    kind, _, config = MODELS[name]
    # At this scale a convolution's output is lost in the logits of bfloat16.
    config = getattr(transformers, f"{kind}Config")(**{**config, "initializer_range": 0.02})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    assert choose_layout(model) == "padded"


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral sliding", "phi"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_each_sequence(name, checkpointing):
    model = build(name, torch.float64)
    disable_dropout(model)
    prompts, responses = sequences()
    weight = torch.randn(sum(map(len, responses)), VOCABULARY, dtype=torch.float64)
    expected = grads(model, (own_logits(model, prompts, responses) * weight).sum())
    assert choose_layout(model) == "packed"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    got = grads(model, (our_logits(model, prompts, responses, "packed") * weight).sum())
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(got[key] / scale, value / scale, rtol=0, atol=1e-9, msg=key)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_lora_models_equal_each_sequences_own_forward_and_gradients(name):
    model = lora(build(name, torch.float64), lora_dropout=0.3)
    disable_dropout(model)
    prompts, responses = sequences()
    model.train()
    own = own_logits(model, prompts, responses)
    with torch.no_grad(), model.disable_adapter():
        assert relative(own_logits(model, prompts, responses), own) > 1e-2
    weight = torch.randn_like(own)
    expected = grads(model, (own * weight).sum())
    assert choose_layout(model) == "packed"
    ours = our_logits(model, prompts, responses, "packed")
    assert relative(ours, own) < 1e-9
    got = grads(model, (ours * weight).sum())
    assert got.keys() == expected.keys() and all("lora_" in key for key in got)
    for key, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(got[key] / scale, value / scale, rtol=0, atol=1e-9, msg=key)


def test_a_learned_prompt_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="learns a prompt"):
        choose_layout(peft.get_peft_model(build("llama"), config))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral sliding"])
@torch.no_grad()
def test_a_token_changes_no_other_sequence_and_nothing_before_it(name, layout):
    model = build(name, torch.float64)
    assert choose_layout(model, layout) == layout
    prompts, responses = sequences()
    before = hidden_states(trunk_of(model), pack(prompts, responses), layout)
    counts = [len(response) for response in responses]
    for index, response in enumerate(responses):
        place = len(response) // 2
        changed = [list(r) for r in responses]
        changed[index][place] = 2
        after = hidden_states(trunk_of(model), pack(prompts, changed), layout)
        differ = (after - before).abs().amax(1).split(counts)
        for other, difference in enumerate(differ):
            if other != index:
                assert float(difference.max()) < 1e-12
        assert float(differ[index][: place + 1].max()) < 1e-12
        # The last token is a target only.
        if place + 1 < len(response):
            assert float(differ[index][place + 1]) > 1e-6


@pytest.mark.parametrize("layout", ["packed", "padded"])
@torch.no_grad()
def test_a_result_is_independent_of_neighbours_and_order(layout):
    model = build("llama", torch.float64)
    choose_layout(model, layout)
    prompts, responses = sequences()
    whole = hidden_states(trunk_of(model), pack(prompts, responses), layout)
    parts = whole.split([len(r) for r in responses])
    for order in ([4, 2, 0, 1, 3], [3], [1, 4], [2, 2]):
        chosen = pack([prompts[i] for i in order], [responses[i] for i in order])
        got = hidden_states(trunk_of(model), chosen, layout)
        torch.testing.assert_close(got, torch.cat([parts[i] for i in order]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mamba", "lfm2"])
@torch.no_grad()
def test_padding_may_be_any_token(name):
    model = build(name)
    choose_layout(model, "padded")
    packed = pack(*sequences())
    before = hidden_states(trunk_of(model), packed, "padded")
    # Another source for padding: rows keep their real tokens and have others after them.
    real = torch.zeros(len(packed.sources), dtype=torch.bool)
    real[packed.slots] = True
    sources = torch.where(real, packed.sources, torch.arange(len(real)) % len(packed.tokens))
    assert not torch.equal(sources, packed.sources)
    after = hidden_states(trunk_of(model), packed._replace(sources=sources), "padded")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


class Scaled(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.1
        return output


@pytest.mark.parametrize("layout", ["auto", "packed", "padded"])
def test_an_unknown_head_is_refused(layout):
    model = Scaled(transformers.LlamaConfig(**SMALL))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="logits differ from the model's own by"):
        choose_layout(model, layout)
    assert model.config._attn_implementation == before


def test_a_model_that_looks_ahead_is_refused():
    # Without is_decoder its attention goes both ways, in its own forward too.
    config = transformers.BertGenerationConfig(**SMALL)
    with pytest.raises(ValueError, match="token 3 of the layout depends on tokens"):
        choose_layout(transformers.BertGenerationDecoder(config))


def test_a_model_that_draws_in_training_mode_is_refused():
    class Noisy(nn.Module):
        def forward(self, hidden):
            return hidden + (torch.randn_like(hidden) * 1e-9 if self.training else 0)

    model = build("llama")
    model.model.norm = nn.Sequential(model.model.norm, Noisy())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws random numbers"):
        choose_layout(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="layout = 'flat'; expected one of auto, packed, padded"):
        choose_layout(build("llama"), "flat")


@pytest.mark.parametrize("name", ["gemma2", "bloom", "mamba", "stablelm", "lfm2"])
def test_a_model_that_cannot_pack_refuses_packed_and_stays_as_it_was(name):
    model = build(name)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="use layout = 'padded'"):
        choose_layout(model, "packed")
    assert model.config._attn_implementation == before
    assert choose_layout(model) == "padded"
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_attention_is_ours_where_packed_and_untouched_where_padded(before):
    model = build("llama", attn_implementation=before)
    assert choose_layout(model, "padded") == "padded"
    assert model.config._attn_implementation == before
    assert choose_layout(model) == "packed"
    assert model.config._attn_implementation == attention.NAME
    assert choose_layout(model) == "packed"
    assert choose_layout(model, "padded") == "padded"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "lfm2"])
def test_the_check_leaves_modes_gradients_and_random_state(name):
    model = build(name)
    model.train()
    model.get_input_embeddings().eval()
    disable_dropout(model)
    modes = [module.training for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    choose_layout(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert torch.is_grad_enabled()


def trained_twice(model):
    model.train()
    ids = torch.randint(3, VOCABULARY, (2, 12))
    return [model(input_ids=ids, use_cache=False).logits for _ in range(2)]


DROPS = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "phi": {"attention_dropout": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "mixtral": {"attention_dropout": 0.5, "router_jitter_noise": 0.3},
}


@pytest.mark.parametrize("name", DROPS)
def test_no_dropout_of_any_kind_stays_on(name):
    model = build(name, **DROPS[name])
    first, second = trained_twice(model)
    assert not torch.equal(first, second)
    disable_dropout(model)
    first, second = trained_twice(model)
    assert torch.equal(first, second)
    ids = torch.ones(1, 4, dtype=torch.int64)
    state = torch.get_rng_state()
    model(input_ids=ids, use_cache=False)
    assert torch.equal(state, torch.get_rng_state())


def test_lora_dropout_goes_off():
    model = lora(build("llama"), lora_dropout=0.5)
    first, second = trained_twice(model)
    assert not torch.equal(first, second)
    disable_dropout(model)
    first, second = trained_twice(model)
    assert torch.equal(first, second)


def test_a_model_without_head_is_checked_by_its_hidden_states():
    model = build("llama")
    trunk = trunk_of(model)
    assert unwrapped(trunk) is trunk
    assert choose_layout(trunk) == "packed"

    class Wrong(transformers.LlamaModel):
        def forward(self, *args, packed=None, **kwargs):
            return super().forward(*args, **kwargs)

    assert choose_layout(Wrong(transformers.LlamaConfig(**SMALL))) == "padded"
