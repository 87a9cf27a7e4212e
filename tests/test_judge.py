"""Judges against forwards of single texts, antisymmetry, and what is refused."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ppo_fast.llm.judge import DEFAULT_TEMPLATE, CausalLMJudge, FunctionJudge

WORDS = ["<unk>", "<bos>", "<eos>", "A", "B", ":", "Prompt", "Answer", "Principle"]
WORDS += ["good", "bad", "day", "night", "short", "long", "Better"]
SHORT = "{principle} Prompt : {prompt} Answer A : {first} Answer B : {second} Better :\n"


def make_tokenizer(post="<bos> $A", **options):
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=post, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        **options,
    )


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        **options,
    )
    return LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def make_pairs(count, seed=0):
    rng = random.Random(seed)
    text = lambda most: " ".join(rng.choices(WORDS[9:15], k=rng.randint(1, most)))  # noqa: E731
    return [[text(most) for _ in range(count)] for most in (6, 12, 12)]


def by_single_forwards(model, tokenizer, template, principle, prompts, first, second):
    """The definition: one text at a time, softmax over the whole vocabulary, two of its entries."""
    model.eval()

    def wins(prompt, a, b):
        text = template.replace("{principle}", principle).replace("{prompt}", prompt)
        text = text.replace("{first}", a).replace("{second}", b)
        text = text.replace("{verdict_1}", "A").replace("{verdict_2}", "B")
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        log_probs = logits.double().log_softmax(-1)
        pair = log_probs[[WORDS.index("A"), WORDS.index("B")]].exp()
        return float(pair[0] / pair.sum())

    triples = list(zip(prompts, first, second, strict=True))
    in_order = [wins(p, a, b) for p, a, b in triples]
    swapped = [wins(p, b, a) for p, a, b in triples]
    bias = sum(x - (1 - y) for x, y in zip(in_order, swapped, strict=True)) / len(triples)
    return [0.5 * (x + 1 - y) for x, y in zip(in_order, swapped, strict=True)], bias


# ---------------------------------------------------------------- a gold score


def test_function_judge_gives_bradley_terry_probabilities():
    judge = FunctionJudge(lambda prompt, answer: len(answer) + 10 * len(prompt), temperature=2.0)
    got = judge(["p", "q", "r"], ["aaaa", "a", "b"], ["a", "aaaa", "c"])
    assert got == pytest.approx([1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(1.5)), 0.5])


def test_function_judge_is_antisymmetric_and_bounded_at_any_distance():
    scores = {"a": 0.3, "b": -2.0, "c": 1e4, "d": -1e4, "e": 1e200}
    names = sorted(scores)
    for temperature in (1e-6, 1.0, 1e3):
        judge = FunctionJudge(lambda prompt, answer: scores[answer], temperature)
        for x in names:
            for y in names:
                (p,), (q,) = judge(["?"], [x], [y]), judge(["?"], [y], [x])
                assert 0 <= p <= 1 and p + q == pytest.approx(1, abs=1e-15)
                assert (p >= 0.5) == (scores[x] >= scores[y])


def test_function_judge_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match="score is a float"):
        FunctionJudge(1.0)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature is"):
            FunctionJudge(lambda prompt, answer: 0.0, temperature)
    judge = FunctionJudge(lambda prompt, answer: math.nan if answer == "bad" else 0.0)
    with pytest.raises(ValueError, match="score is nan for pair 1, answer 'bad'"):
        judge(["p", "p"], ["a", "b"], ["c", "bad"])
    with pytest.raises(ValueError, match="2 prompts, 1 first and 2 second"):
        judge(["p", "p"], ["a"], ["c", "d"])
    assert judge([], [], []) == []


# ---------------------------------------------------------------- a language model


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, SHORT])
def test_lm_judge_equals_one_forward_a_text(make, template):
    model, tokenizer = make(), make_tokenizer()
    pairs = make_pairs(11)
    judge = CausalLMJudge(model, tokenizer, "short good", template, batch_size=4)
    expected, bias = by_single_forwards(model, tokenizer, template, "short good", *pairs)
    assert judge(*pairs) == pytest.approx(expected, abs=1e-5)
    assert judge.position_bias == pytest.approx(bias, abs=1e-5)
    # the oracle is not trivial: probabilities differ, and so do the orders
    assert max(expected) - min(expected) > 0.05 and abs(bias) > 1e-3


def test_swapped_answers_give_one_minus_p_and_the_same_position_bias():
    judge = CausalLMJudge(llama(), make_tokenizer(), "good", SHORT)
    prompts, first, second = make_pairs(9)
    p = judge(prompts, first, second)
    bias = judge.position_bias
    q = judge(prompts, second, first)
    assert [x + y for x, y in zip(p, q, strict=True)] == pytest.approx([1.0] * 9, abs=1e-6)
    assert judge.position_bias == pytest.approx(bias, abs=1e-6)


def test_equal_answers_are_even():
    judge = CausalLMJudge(llama(), make_tokenizer(), "good", SHORT)
    prompts, first, _ = make_pairs(5)
    assert judge(prompts, first, first) == pytest.approx([0.5] * 5, abs=1e-6)


def test_verdicts_do_not_depend_on_the_batch():
    prompts, first, second = make_pairs(10, seed=3)
    model, tokenizer = llama(), make_tokenizer()
    reference = CausalLMJudge(model, tokenizer, "good", SHORT, batch_size=1)(prompts, first, second)
    for batch_size in (2, 7, 64):
        judge = CausalLMJudge(model, tokenizer, "good", SHORT, batch_size=batch_size)
        assert judge(prompts, first, second) == pytest.approx(reference, abs=1e-6)
        order = list(range(10))
        random.Random(batch_size).shuffle(order)
        shuffled = judge(*([column[i] for i in order] for column in (prompts, first, second)))
        assert shuffled == pytest.approx([reference[i] for i in order], abs=1e-6)


def test_a_model_that_returns_all_logits_gives_the_same():
    class AllLogits(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, use_cache=None):
            return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model, tokenizer, pairs = llama(), make_tokenizer(), make_pairs(6)
    other = AllLogits(model.config)
    other.load_state_dict(model.state_dict())
    expected = CausalLMJudge(model, tokenizer, "good", SHORT)(*pairs)
    assert CausalLMJudge(other, tokenizer, "good", SHORT)(*pairs) == pytest.approx(
        expected, abs=1e-6
    )


def test_only_the_last_logits_of_each_text_are_computed():
    model, shapes = llama(), []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(out.shape[1]))
    CausalLMJudge(model, make_tokenizer(), "good", SHORT, batch_size=4)(*make_pairs(6))
    assert len(shapes) == 3 and max(shapes) <= 4


def test_dropout_is_off_while_judging_and_modes_come_back():
    model = gpt2()
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    judge = CausalLMJudge(model, make_tokenizer(), "good", SHORT)
    pairs = make_pairs(4)
    assert judge(*pairs) == judge(*pairs)
    assert [module.training for module in model.modules()] == modes
    assert any(modes) and not all(modes)


def test_an_adapter_of_peft_is_judged_like_its_model():
    peft = pytest.importorskip("peft")
    model, tokenizer, pairs = llama(), make_tokenizer(), make_pairs(4)
    expected = CausalLMJudge(model, tokenizer, "good", SHORT)(*pairs)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    judge = CausalLMJudge(wrapped, tokenizer, "good", SHORT)
    assert judge(*pairs) == pytest.approx(expected, abs=1e-6)  # LoRA starts at zero


def test_braces_in_the_answers_are_text():
    judge = CausalLMJudge(llama(), make_tokenizer(), "good", SHORT)
    (p,) = judge(["{prompt}"], ["{first} {0}"], ["day {"])
    assert 0 < p < 1


def test_chat_gives_the_template_as_a_users_message_with_one_bos():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "<bos> {% for m in messages %}Prompt : {{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}Answer :\n{% endif %}"
    )
    model, pairs = llama(), make_pairs(5)
    bare = make_tokenizer(post="$A")
    expected, _ = by_single_forwards(
        model, bare, f"<bos> Prompt : {SHORT} <eos> Answer :\n", "good", *pairs
    )
    judge = CausalLMJudge(model, tokenizer, "good", SHORT, chat=True)
    assert judge(*pairs) == pytest.approx(expected, abs=1e-5)


def test_other_verdicts_are_named_in_the_default_template():
    judge = CausalLMJudge(llama(), make_tokenizer(), "good", verdicts=("long", "short night"))
    assert judge.verdict_ids == (WORDS.index("long"), WORDS.index("short"))
    text = judge._text("p", "x", "y")
    assert "Answer long: x" in text and "Answer short night: y" in text


@pytest.mark.parametrize("merges", [0, 400])
def test_the_default_template_suits_byte_level_bpe(merges):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet)
    backend.train_from_iterator([DEFAULT_TEMPLATE + verdict for verdict in "AB"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    judge = CausalLMJudge(model, tokenizer, "good")
    assert tokenizer.convert_ids_to_tokens(judge.verdict_ids) == ["A", "B"]
    (p,) = judge(["a"], ["b"], ["c"])
    assert 0 < p < 1


def test_no_pairs_give_no_verdicts():
    judge = CausalLMJudge(llama(), make_tokenizer(), "good")
    assert judge([], [], []) == []
    assert math.isnan(judge.position_bias)


def test_a_text_longer_than_the_context_is_named_before_any_forward():
    model = llama()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    prompts, first, second = make_pairs(4)
    second[2] = "day " * 130
    judge = CausalLMJudge(model, make_tokenizer(), "good", SHORT)
    with pytest.raises(ValueError, match=r"pair 2 takes \d+ tokens .* the context is 128"):
        judge(prompts, first, second)
    # exactly at the bound it fits
    texts = [judge._text(p, a, a) for p, a in zip(prompts, first, strict=True)]
    longest = max(len(ids) for ids in judge._encoded(texts))
    judge = CausalLMJudge(llama(), make_tokenizer(), "good", SHORT, max_length=longest)
    judge(prompts, first, first)
    judge.max_length = longest - 1
    with pytest.raises(ValueError, match=f"takes {longest} tokens"):
        judge(prompts, first, first)


def test_a_model_that_is_not_finite_is_an_error():
    model = llama()
    model.lm_head.weight.data[WORDS.index("B")] = math.nan
    judge = CausalLMJudge(model, make_tokenizer(), "good", SHORT)
    with pytest.raises(ValueError, match="verdict on pair 0 is not finite"):
        judge(*make_pairs(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"template": "{prompt} {first} {second}"}, "template lacks {principle}"),
        ({"template": SHORT + "{other}"}, "template has the field {other}"),
        ({"template": SHORT + "{"}, "no format string"),
        ({"principle": "  "}, "principle is empty"),
        ({"verdicts": ("A", "A")}, r"begin with the same token \(id 3\)"),
        ({"verdicts": ("A", "A B")}, "begin with the same token"),
        ({"verdicts": ("first", "second")}, "begin with the same token"),  # both unknown words
        ({"verdicts": ("A", "")}, "verdict '' does not begin a token"),
        ({"template": SHORT.replace(" :\n", "")}, "verdict 'A' does not begin a token"),
        ({"verdicts": ("A", "B", "C")}, "expected two strings"),
        ({"tokenizer": make_tokenizer(post="<bos> $A <eos>")}, "add_eos_token = False"),
        ({"chat": True}, "no chat template"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_a_judge_that_cannot_work_is_refused_at_construction(options, words):
    defaults = {"tokenizer": make_tokenizer(), "principle": "good", "template": SHORT}
    with pytest.raises(ValueError, match=words):
        CausalLMJudge(llama(), **(defaults | options))


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["extra"])
    with pytest.raises(ValueError, match="tokenizer has 17 tokens, the model's embedding 16 rows"):
        CausalLMJudge(llama(), tokenizer, "good", SHORT)


def test_answers_of_different_number_are_refused():
    judge = CausalLMJudge(llama(), make_tokenizer(), "good", SHORT)
    with pytest.raises(ValueError, match="1 prompts, 2 first and 1 second"):
        judge(["p"], ["a", "b"], ["c"])
