"""The packed attention function against loops over sequences, and in transformers' generation."""

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ppo_fast.llm import attention
from ppo_fast.llm.attention import packed_attention
from ppo_fast.llm.packing import pack

LENGTHS = [(3, 9), (1, 1), (4, 2), (1, 7)]


def layout(lengths=LENGTHS):
    return pack([[1] * a for a, _ in lengths], [[1] * b for _, b in lengths])


def heads(packed, query_heads=4, key_heads=4, size=8, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    total = len(packed.tokens)
    return [
        torch.randn(1, n, total, size, generator=draw, dtype=torch.float64).to(dtype)
        for n in (query_heads, key_heads, key_heads)
    ]


def by_hand(query, key, value, starts, scaling=None, window=None):
    """Softmax of scores token by token, in float64."""
    query, key, value = (part[0].double() for part in (query, key, value))
    groups = query.shape[0] // key.shape[0]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.zeros(query.shape[1], query.shape[0], value.shape[-1], dtype=torch.float64)
    for begin, end in itertools.pairwise(starts):
        for token in range(begin, end):
            first = begin if window is None else max(begin, token - window + 1)
            for head in range(query.shape[0]):
                k = key[head // groups, first : token + 1]
                scores = (k @ query[head, token]) * scaling
                out[token, head] = scores.softmax(0) @ value[head // groups, first : token + 1]
    return out[None]


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 50])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_attention_equals_a_loop(key_heads, window, dtype, tolerance):
    packed = layout()
    parts = heads(packed, key_heads=key_heads, dtype=dtype)
    got, weights = packed_attention(
        nn.Identity(), *parts, None, packed=packed, sliding_window=window, scaling=0.3
    )
    assert weights is None and got.dtype == dtype
    expected = by_hand(*parts, packed.cu_seqlens.tolist(), 0.3, window)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


def test_scaling_of_none_is_that_of_the_head_size():
    packed = layout()
    parts = heads(packed)
    got, _ = packed_attention(nn.Identity(), *parts, None, packed=packed)
    torch.testing.assert_close(got, by_hand(*parts, packed.cu_seqlens.tolist()))


def test_equal_lengths_equal_a_loop():
    packed = layout([(2, 5), (4, 3), (1, 6)])
    assert len(packed.sources) == len(packed.tokens)
    parts = heads(packed, key_heads=2)
    got, _ = packed_attention(nn.Identity(), *parts, None, packed=packed)
    torch.testing.assert_close(got, by_hand(*parts, packed.cu_seqlens.tolist()))


def test_values_may_have_another_size_than_keys():
    packed = layout()
    query, key, value = heads(packed)
    value = torch.cat([value, value[..., :3] * 2], -1)
    got, _ = packed_attention(nn.Identity(), query, key, value, None, packed=packed)
    torch.testing.assert_close(got, by_hand(query, key, value, packed.cu_seqlens.tolist()))


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_equal_those_of_a_loop(window):
    packed = layout()
    weight = torch.randn(1, len(packed.tokens), 4, 8, dtype=torch.float64)
    found = []
    for function in ("packed", "loop"):
        parts = [part.requires_grad_() for part in heads(packed, key_heads=2)]
        if function == "packed":
            out, _ = packed_attention(
                nn.Identity(), *parts, None, packed=packed, sliding_window=window
            )
        else:
            out = by_hand(*parts, packed.cu_seqlens.tolist(), None, window)
        found.append(torch.autograd.grad((out * weight).sum(), parts))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


class Layer(nn.Module):
    """What an attention layer of transformers says about itself."""

    def __init__(self, layer_idx=0, is_causal=True, **config):
        super().__init__()
        self.layer_idx, self.is_causal = layer_idx, is_causal
        self.config = type("Config", (), config)()


@pytest.mark.parametrize(
    ("layer", "mask", "options", "message"),
    [
        (Layer(), None, {"softcap": 30.0}, "softcap"),
        (Layer(), None, {"s_aux": torch.zeros(4)}, "s_aux"),
        (Layer(), None, {"dropout": 0.1}, "dropout"),
        (Layer(), None, {"is_causal": False}, "later tokens"),
        (Layer(is_causal=False), None, {}, "later tokens"),
        (Layer(), torch.zeros(1, 1, 21, 21), {}, "mask or bias"),
        (Layer(sliding_window=8), None, {}, "window or chunks"),
        (Layer(1, layer_types=["full_attention", "sliding_attention"]), None, {}, "window or"),
        (Layer(0, layer_types=["chunked_attention"]), None, {}, "window or chunks"),
    ],
)
def test_what_is_not_computed_is_refused(layer, mask, options, message):
    packed = layout()
    with pytest.raises(NotImplementedError, match=message):
        packed_attention(layer, *heads(packed), mask, packed=packed, **options)


@pytest.mark.parametrize(
    "layer",
    [
        Layer(0, layer_types=["full_attention", "sliding_attention"], sliding_window=4),
        Layer(sliding_window=None),
        Layer(None, layer_types=None),
    ],
)
def test_a_layer_without_a_window_is_taken(layer):
    packed = layout()
    parts = heads(packed)
    got, _ = packed_attention(layer, *parts, torch.zeros(1, 1, 1, 1), packed=packed, softcap=None)
    torch.testing.assert_close(got, by_hand(*parts, packed.cu_seqlens.tolist()))


def models():
    torch.manual_seed(0)
    yield LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
    ).eval()
    yield GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    ).eval()


@pytest.mark.parametrize("index", [0, 1], ids=["llama", "gpt2"])
@pytest.mark.parametrize("sampled", [False, True])
def test_generation_equals_that_of_sdpa(index, sampled):
    model = list(models())[index]
    ids = torch.randint(3, 50, (4, 6))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 2, 5, 1)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    attention.register()
    found = []
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation(name)
        torch.manual_seed(1)
        found.append(
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=8,
                do_sample=sampled,
                pad_token_id=0,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.equal(torch.stack(found[0].logits), torch.stack(found[1].logits))


def test_a_second_registration_changes_nothing():
    attention.register()
    attention.register()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS[attention.NAME] is packed_attention
