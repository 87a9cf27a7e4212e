"""Policy, reference and critic around Hugging Face models."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers

from ppo_fast.llm import attention
from ppo_fast.llm.models import Policy, make_critic, make_reference
from ppo_fast.llm.packing import pack

VOCABULARY = 61


def config(kind, **changes):
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if kind == "GPT2":
        small = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
        small |= {"n_positions": 64, "pad_token_id": 0, "initializer_range": 0.2}
    return getattr(transformers, f"{kind}Config")(**{**small, **changes})


def causal_lm(kind="Llama", seed=0, **changes):
    torch.manual_seed(seed)
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    return getattr(transformers, kind + suffix)(config(kind, **changes)).eval()


def classifier(kind="Llama", seed=1, num_labels=1, **changes):
    torch.manual_seed(seed)
    made = config(kind, num_labels=num_labels, **changes)
    return getattr(transformers, f"{kind}ForSequenceClassification")(made).eval()


def lora(model, seed=2, **options):
    peft = pytest.importorskip("peft")
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped


def example(seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = [(3, 7), (1, 1), (5, 4), (1, 9)]
    prompts = [torch.randint(1, VOCABULARY, (a,), generator=draw).tolist() for a, _ in lengths]
    responses = [torch.randint(1, VOCABULARY, (b,), generator=draw).tolist() for _, b in lengths]
    return prompts, responses, pack(prompts, responses)


def own_states(trunk, prompts, responses):
    """[M, D]: of each sequence's own forward."""
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response])
        rows.append(
            trunk(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        )
    return torch.cat(rows)


def logits(policy, packed):
    with torch.no_grad(), policy.active():
        return policy.logits(policy.hidden(packed))


# Policy


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "trunk"])
def test_a_policy_without_a_head_is_refused(model):
    model = causal_lm().model if model == "trunk" else model
    with pytest.raises(ValueError, match="expected a causal LM of transformers"):
        Policy(model)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
@torch.no_grad()
def test_head_fp32_leaves_autocast_for_the_dtype_of_the_head(dtype, expected):
    model = causal_lm().to(dtype)
    policy = Policy(model, head_fp32=True)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = policy.hidden(example()[2])
        got = policy.logits(hidden)
    assert got.dtype == expected
    torch.testing.assert_close(got, model.lm_head(hidden.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert Policy(model).logits(hidden).dtype == torch.bfloat16


def test_head_fp32_takes_a_float64_model():
    policy = Policy(causal_lm().double(), head_fp32=True)
    assert logits(policy, example()[2]).dtype == torch.float64


# Reference


def test_a_reference_from_nothing_is_a_frozen_copy():
    policy = Policy(causal_lm())
    packed = example()[2]
    before = logits(policy, packed)
    reference = make_reference(policy, None, "auto")
    assert reference.model is not policy.model
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert all(p.requires_grad for p in policy.model.parameters())
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1)
    assert torch.equal(logits(reference, packed), before)
    assert not torch.equal(logits(policy, packed), before)


def test_a_reference_model_of_its_own_is_frozen():
    policy, other = Policy(causal_lm()), causal_lm(seed=7)
    reference = make_reference(policy, other, "padded")
    assert reference.model is other and reference.layout == "padded"
    assert not any(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("head", [False, True], ids=["layers", "layers and head"])
def test_the_reference_of_adapters_is_the_model_before_them(head):
    model = causal_lm()
    packed = example()[2]
    before = logits(Policy(copy.deepcopy(model)), packed)
    options = {"modules_to_save": ["lm_head"]} if head else {}
    policy = Policy(lora(model, **options))
    if head:
        with torch.no_grad():
            policy.model.get_base_model().get_output_embeddings().weight.mul_(2)
    reference = make_reference(policy, None, "auto")
    wanted = [p.requires_grad for p in policy.model.parameters()]
    own = logits(policy, packed)
    assert float((own - before).abs().max()) > 0.1
    torch.testing.assert_close(logits(reference, packed), before)
    torch.testing.assert_close(logits(policy, packed), own)
    assert [p.requires_grad for p in policy.model.parameters()] == wanted


def test_a_reference_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="ref_model has a vocabulary of 70, model of 61"):
        make_reference(Policy(causal_lm()), causal_lm(vocab_size=70), "auto")


def test_the_policy_itself_is_refused_as_a_reference():
    policy = Policy(causal_lm())
    with pytest.raises(ValueError, match="ref_model is model, or shares parameters"):
        make_reference(policy, policy.model, "auto")
    assert all(p.requires_grad for p in policy.model.parameters())


def test_the_model_inside_adapters_is_refused_as_a_reference():
    model = causal_lm()
    policy = Policy(lora(model))
    with pytest.raises(ValueError, match="ref_model is model, or shares parameters"):
        make_reference(policy, model, "auto")
    assert any(p.requires_grad for p in policy.model.parameters())


# Critic


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_shared_critic_reads_the_policys_hidden_states(layout):
    policy = Policy(causal_lm(), layout)
    critic = make_critic(policy, None, layout)
    packed = example()[2]
    hidden = policy.hidden(packed)
    got = critic(packed, hidden)
    torch.testing.assert_close(got, hidden @ critic.head.weight[0] + critic.head.bias)
    assert critic.trunk is None and got.dtype == torch.float32
    assert len(list(critic.parameters())) == 2


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen2", "OPT", "Bloom", "Gemma2"])
@torch.no_grad()
def test_a_classifiers_values_are_its_scores_at_every_prefix(kind, layout):
    model = classifier(kind)
    prompts, responses, packed = example()
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        for end in range(len(response)):
            ids = torch.tensor([prompt + response[:end]])
            expected.append(model(input_ids=ids, use_cache=False).logits[0, 0])
    policy = Policy(causal_lm())
    critic = make_critic(policy, model, layout)
    assert critic.head is model.score
    assert critic.layout == (
        "padded" if layout == "padded" or kind in ("Bloom", "Gemma2") else "packed"
    )
    got = critic(packed, policy.hidden(packed))
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT", "Bloom"])
def test_a_causal_lm_gets_a_new_head_of_its_width(kind):
    changes = {"word_embed_proj_dim": 16, "ffn_dim": 48} if kind == "OPT" else {}
    model = causal_lm(kind, seed=4, **changes)
    prompts, responses, packed = example()
    trunk = model.base_model
    expected = own_states(trunk, prompts, responses).detach()
    policy = Policy(causal_lm())
    critic = make_critic(policy, model, "auto")
    assert critic.head.weight.shape == (1, expected.shape[1])
    expected = expected @ critic.head.weight[0] + critic.head.bias
    got = critic(packed, policy.hidden(packed))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    got.sum().backward()
    assert all(p.grad is None for p in policy.model.parameters())
    assert all(p.requires_grad for p in critic.parameters())


def test_a_16_bit_causal_lm_gets_a_head_in_float32():
    critic = make_critic(Policy(causal_lm()), causal_lm(seed=4).bfloat16(), "auto")
    assert critic.head.weight.dtype == torch.float32


def test_a_frozen_value_model_is_trained():
    model = classifier().requires_grad_(False)
    critic = make_critic(Policy(causal_lm()), model, "auto")
    assert all(p.requires_grad for p in critic.parameters())


def test_a_reward_models_head_goes_on():
    from ppo_fast.llm.reward_model import RewardModel

    model = RewardModel.from_causal_lm(causal_lm(seed=3))
    critic = make_critic(Policy(causal_lm()), model, "auto")
    assert critic.head is model.head and critic.trunk is model.trunk


def test_adapters_of_a_value_model_are_trained_and_its_score_goes_on():
    model = lora(classifier(), task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"])
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        model.get_base_model().score.weight.mul_(3)
    prompts, responses, packed = example()
    ids = [torch.tensor([p + r[:-1]]) for p, r in zip(prompts, responses, strict=True)]
    expected = torch.stack([model(input_ids=i).logits[0, 0] for i in ids])
    policy = Policy(causal_lm())
    critic = make_critic(policy, model, "auto")
    got = critic(packed, policy.hidden(packed))
    ends = torch.tensor([len(r) for r in responses]).cumsum(0) - 1
    torch.testing.assert_close(got[ends], expected, rtol=0, atol=2e-5)
    trained = {id(p) for p in critic.parameters() if p.requires_grad}
    assert trained and trained <= wanted


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: classifier(num_labels=3), "value_model has 3 labels; expected num_labels=1"),
        (lambda: classifier(vocab_size=70), "value_model has a vocabulary of 70, model of 61"),
        (lambda: causal_lm(vocab_size=70), "value_model has a vocabulary of 70, model of 61"),
        (lambda: nn.Linear(3, 1), "value_model is a Linear"),
        (lambda: causal_lm().model, "value_model is a LlamaModel"),
    ],
    ids=["labels", "classifier's vocabulary", "LM's vocabulary", "no model", "no head"],
)
def test_a_value_model_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        make_critic(Policy(causal_lm()), made(), "auto")


def test_a_classifier_with_another_kind_of_head_is_refused():
    made = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=1,
    )
    model = transformers.BertForSequenceClassification(made)
    with pytest.raises(ValueError, match="without a linear layer 'score'"):
        make_critic(Policy(causal_lm()), model, "auto")
    # Bert looks ahead: a value would know the tokens to come.
    model.score = nn.Linear(32, 1)
    with pytest.raises(ValueError, match="depends on tokens"):
        make_critic(Policy(causal_lm()), model, "auto")


def test_the_policy_itself_is_refused_as_a_critic():
    policy = Policy(causal_lm())
    with pytest.raises(ValueError, match="value_model is model, or shares parameters"):
        make_critic(policy, policy.model, "auto")


def test_a_trunk_that_cannot_pack_is_padded_or_refused():
    policy = Policy(causal_lm())
    assert policy.layout == "packed"
    assert make_critic(policy, classifier("Gemma2"), "auto").layout == "padded"
    with pytest.raises(ValueError, match="layout = 'packed' does not fit Gemma2Model"):
        make_critic(policy, classifier("Gemma2"), "packed")


class Neighbourly(transformers.LlamaModel):
    """Its hidden states have a little of the token before them in the layout."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        states = output.last_hidden_state
        output.last_hidden_state = states + 1e-7 * states.roll(1, dims=1)
        return output


@pytest.mark.parametrize("layout", ["auto", "packed", "padded"])
def test_a_trunk_of_the_policys_kind_is_checked_for_itself(layout):
    model = classifier()
    model.model.__class__ = Neighbourly
    with pytest.raises(ValueError, match="depends on tokens"):
        make_critic(Policy(causal_lm()), model, layout)
    assert model.model.config._attn_implementation != attention.NAME


def test_a_padded_policy_may_have_a_packed_critic():
    policy = Policy(causal_lm("Gemma2"))
    assert policy.layout == "padded"
    critic = make_critic(policy, classifier(), "auto")
    assert critic.layout == "packed"


def test_dropout_of_a_value_model_goes_off():
    model = classifier("GPT2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    policy = Policy(causal_lm())
    critic = make_critic(policy, model, "auto").train()
    packed = example()[2]
    hidden = policy.hidden(packed)
    assert torch.equal(critic(packed, hidden), critic(packed, hidden))
