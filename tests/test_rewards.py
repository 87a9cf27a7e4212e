"""Scores and token rewards against loops over responses, and what is refused."""

from __future__ import annotations

import functools
import math
import random
import statistics

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_fast.llm.rewards import (
    Reward,
    RewardError,
    kl_per_token,
    shape_scores,
    token_rewards,
    whiten_rewards,
)

WORDS = ["<unk>", "<eos>", "good", "bad", "day", "what"]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


PROMPTS = [[5], [5, 4], [4]]
RESPONSES = [[2, 4, 1], [3, 1], [3, 2, 4]]
TEXTS = (["what", "what day", "day"], ["good day", "bad", "bad good day"])


# ---------------------------------------------------------------- how functions are called


def test_functions_get_what_their_parameters_name(tokenizer):
    seen = {}

    def texts(completions):
        seen["texts"] = completions
        return [1.0] * 3

    def ids(completion_ids, prompt_ids):
        seen["ids"] = (prompt_ids, completion_ids)
        return [2.0] * 3

    def column(answer, completions, *, prompts, scale=3.0):
        seen["column"] = (prompts, completions, answer, scale)
        return [scale] * 3

    def everything(**kwargs):
        seen["everything"] = kwargs
        return [4.0] * 3

    columns = {"answer": ["x", "y", "z"], "n": [1, 2, 3]}
    reward = Reward([texts, ids, column, everything], tokenizer=tokenizer, columns=columns)
    scores = reward(PROMPTS, RESPONSES, columns=columns)
    assert scores.total.tolist() == [10.0] * 3
    assert seen["texts"] == TEXTS[1]
    assert seen["ids"] == (PROMPTS, RESPONSES)
    assert seen["column"] == (*TEXTS, ["x", "y", "z"], 3.0)
    assert seen["everything"] == {
        "prompts": TEXTS[0],
        "completions": TEXTS[1],
        "prompt_ids": PROMPTS,
        "completion_ids": RESPONSES,
        **columns,
    }


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lambda got: lambda texts: got(texts), (TEXTS[1],)),
        (lambda got: lambda texts, threshold=0.5: got(texts), (TEXTS[1],)),
        (lambda got: lambda questions, answers: got(questions, answers), TEXTS),
        (lambda got: lambda completions, /: got(completions), (TEXTS[1],)),
        (lambda got: functools.partial(lambda w, texts: got(texts), 2.0), (TEXTS[1],)),
        (lambda got: lambda texts, **rest: got(texts, len(rest)), (TEXTS[1], 4)),
    ],
)
def test_parameters_of_other_names_get_texts_by_position(tokenizer, function, arguments):
    calls = []

    def got(*args):
        calls.append(args)
        return [0.5, 1.5, 2.5]

    scores = Reward(function(got), tokenizer=tokenizer)(PROMPTS, RESPONSES)
    assert calls == [arguments]
    assert scores.total.tolist() == [0.5, 1.5, 2.5]


def test_objects_with_call_are_reward_functions(tokenizer):
    class Length:
        def __call__(self, completions):
            return [len(text) for text in completions]

    reward = Reward(Length(), tokenizer=tokenizer)
    assert reward.names == ["Length"]
    assert reward(PROMPTS, RESPONSES).total.tolist() == [8.0, 3.0, 12.0]


def test_prompts_as_the_user_wrote_them_win_over_decoded_ids(tokenizer):
    reward = Reward(lambda prompts: [len(text) for text in prompts], tokenizer=tokenizer)
    assert reward(PROMPTS, RESPONSES, prompts=["a", "bb", "ccc"]).total.tolist() == [1, 2, 3]
    assert reward(PROMPTS, RESPONSES).total.tolist() == [4, 8, 3]


def test_a_function_of_ids_needs_no_tokenizer():
    reward = Reward(lambda completion_ids: [len(row) for row in completion_ids])
    assert reward(PROMPTS, RESPONSES).total.tolist() == [3, 2, 3]
    with pytest.raises(ValueError, match="tokenizer is None"):
        Reward(lambda completions: [0.0])


def test_a_function_that_changes_its_lists_harms_no_other(tokenizer):
    def vandal(completions, completion_ids, prompt_ids):
        completions.clear()
        completion_ids[0].append(99)
        prompt_ids.pop()
        return [0.0] * 3

    prompts, responses = [list(row) for row in PROMPTS], [list(row) for row in RESPONSES]
    seen = []

    def model(sequences, lengths):
        seen.extend(sequences)
        return torch.zeros(3)

    reward = Reward(
        [vandal, lambda completions: [len(completions)] * 3], model, tokenizer=tokenizer
    )
    assert reward(prompts, responses).total.tolist() == [3.0] * 3
    assert (prompts, responses) == (PROMPTS, RESPONSES)
    assert seen == [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]


def test_no_gradients_are_recorded(tokenizer):
    weight = torch.ones(3, requires_grad=True)
    scores = Reward(reward_model=lambda sequences, lengths: weight * 2)(PROMPTS, RESPONSES)
    assert not scores.total.requires_grad
    outside = weight * 2  # made where gradients are on
    assert not Reward(lambda completion_ids: outside)(PROMPTS, RESPONSES).total.requires_grad


# ---------------------------------------------------------------- sums, types


def test_functions_and_model_are_summed_by_weight_and_kept_apart(tokenizer):
    def length(completion_ids):
        return np.array([len(row) for row in completion_ids])

    def model(sequences, prompt_lengths):
        ends = [row[n:] for row, n in zip(sequences, prompt_lengths, strict=True)]
        return torch.tensor([sum(row) for row in ends], dtype=torch.bfloat16)

    reward = Reward([length, lambda completion_ids: [True, 0, 0.25]], model, weights=[1, -2, 0.5])
    scores = reward(PROMPTS, RESPONSES)
    assert reward.names == ["length", "reward_fn", "reward_model"] == list(scores.parts)
    assert scores.parts["length"].tolist() == [3, 2, 3]
    assert scores.parts["reward_fn"].tolist() == [1, 0, 0.25]
    assert scores.parts["reward_model"].tolist() == [7, 4, 9]
    assert scores.total.tolist() == [3 - 2 + 3.5, 2 + 2, 3 - 0.5 + 4.5]
    for part in (scores.total, *scores.parts.values()):
        assert part.dtype == torch.float32 and part.device.type == "cpu"


def test_equal_names_are_told_apart():
    def length(completion_ids):
        return [1.0] * 3

    reward = Reward([length, length, functools.partial(length)])
    assert reward.names == ["length", "length_2", "length_3"]
    assert reward(PROMPTS, RESPONSES).total.tolist() == [3.0] * 3


def test_scores_do_not_share_memory_with_what_was_returned():
    kept = torch.zeros(3)
    scores = Reward(lambda completion_ids: kept)(PROMPTS, RESPONSES)
    kept += 1
    assert scores.parts["reward_fn"].tolist() == scores.total.tolist() == [0.0] * 3


# ---------------------------------------------------------------- errors


class _Module(torch.nn.Module):
    def forward(self, completions):
        return completions


async def _coroutine(completions):
    return completions


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "neither reward_fn nor reward_model"),
        ({"reward_fn": []}, ValueError, "neither"),
        ({"reward_fn": 3}, TypeError, "reward_fn 0 is a int"),
        ({"reward_fn": _Module()}, TypeError, "is the module _Module.*reward_model"),
        ({"reward_fn": _coroutine}, TypeError, "coroutine"),
        ({"reward_model": 3}, TypeError, "reward_model is a int"),
        ({"reward_fn": lambda: 0}, TypeError, "reward_fn takes none by name"),
        ({"reward_fn": lambda a, b, c: 0}, TypeError, "takes 'a', 'b', 'c' beside none of"),
        ({"reward_fn": lambda completions, answer: 0}, TypeError, r"takes 'answer' beside \['comp"),
        ({"reward_fn": lambda *, text: 0}, TypeError, "takes 'text'"),
        ({"reward_fn": dict}, TypeError, "parameters of dict cannot be seen"),
        ({"reward_fn": len, "columns": ["completions"]}, ValueError, "rename the column"),
        ({"reward_fn": lambda completion_ids: 0, "weights": [1, 2]}, ValueError, "2 weights for 1"),
        ({"reward_fn": lambda completion_ids: 0, "weights": [math.nan]}, ValueError, "finite"),
    ],
)
def test_a_reward_that_cannot_work_is_refused_at_construction(arguments, error, words, tokenizer):
    with pytest.raises(error, match=words):
        Reward(**arguments, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([1.0, 2.0], r"returned \[2\] for 3 responses; expected \[3\]"),
        (torch.zeros(3, 1), r"returned \[3, 1\] for 3 responses"),
        (np.zeros((1, 3)), r"returned \[1, 3\]"),
        ([0.0, math.nan, 0.0], r"returned nan for response 1 \('bad'\)"),
        (torch.tensor([0.0, 0.0, math.inf]), r"returned inf for response 2 \('bad good day'\)"),
        ([1e300, 0.0, 0.0], r"returned inf for response 0 .*within float32"),
        ([0.0, "1", 2.0], "returned '1' at 1"),
        ([0.0, 1.0, None], "returned None at 2"),
        ([[0.0], [1.0], [2.0]], r"returned \[0.0\] at 0"),
        (1.0, "returned 1.0 for 3 responses; .*whole batch"),
        (None, "returned None for 3 responses"),
        ("abc", "returned a str that is no list"),
        (np.array(["a", "b", "c"]), "returned a ndarray that is no list"),
        (torch.zeros(3, dtype=torch.complex64), "complex"),
        ({"a": 1}, "returned a dict"),
    ],
)
@pytest.mark.parametrize("as_model", [False, True])
def test_what_is_not_b_finite_numbers_is_an_error_that_names_the_function(
    tokenizer, result, words, as_model
):
    def judge_of_tone(completions):
        return result

    if as_model:
        reward = Reward(reward_model=lambda sequences, lengths: result, tokenizer=tokenizer)
    else:
        reward = Reward(judge_of_tone, tokenizer=tokenizer)
    with pytest.raises(RewardError, match=words) as caught:
        reward(PROMPTS, RESPONSES)
    assert str(caught.value).startswith("reward_model" if as_model else "judge_of_tone")


def test_an_exception_inside_is_chained_under_the_name_of_its_function(tokenizer):
    def remote(completions):
        raise ConnectionError("no route")

    with pytest.raises(RewardError, match=r"^remote raised ConnectionError: no route$") as caught:
        Reward(remote, tokenizer=tokenizer)(PROMPTS, RESPONSES)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_an_interrupt_inside_is_not_taken_for_an_error(tokenizer):
    def slow(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reward(slow, tokenizer=tokenizer)(PROMPTS, RESPONSES)


def test_a_sum_beyond_float32_is_an_error():
    reward = Reward(lambda completion_ids: [1.0, 2.0, 3.0], weights=[3e38])
    with pytest.raises(RewardError, match="the weighted sum returned inf for response 1"):
        reward(PROMPTS, RESPONSES)


def test_arguments_of_other_sizes_are_refused(tokenizer):
    reward = Reward(lambda answer: [0.0] * 3, columns=["answer"])
    columns = {"answer": [1, 2, 3]}
    with pytest.raises(ValueError, match="3 prompt_ids and 2 of response_ids"):
        reward(PROMPTS, RESPONSES[:2], columns=columns)
    with pytest.raises(ValueError, match="3 prompt_ids and 1 of prompts"):
        reward(PROMPTS, RESPONSES, prompts=["a"], columns=columns)
    with pytest.raises(ValueError, match="3 prompt_ids and 2 of the column 'answer'"):
        reward(PROMPTS, RESPONSES, columns={"answer": [1, 2]})
    with pytest.raises(ValueError, match="column 'answer' was named at construction"):
        reward(PROMPTS, RESPONSES)
    with pytest.raises(ValueError, match="no responses"):
        reward([], [], columns={"answer": []})


# ---------------------------------------------------------------- shaping


def test_missing_eos_is_subtracted_or_replaced_only_where_it_is_missing():
    scores = torch.tensor([2.0, -3.0, 0.5])
    ended = [True, False, True]
    assert shape_scores(scores, ended).tolist() == [2.0, -3.0, 0.5]
    assert shape_scores(scores, ended, missing_eos_penalty=1.5).tolist() == [2.0, -4.5, 0.5]
    assert shape_scores(scores, ended, missing_eos_score=-1.0).tolist() == [2.0, -1.0, 0.5]
    as_tensor = torch.tensor(ended)
    assert shape_scores(scores, as_tensor, missing_eos_score=0.0).tolist() == [2.0, 0.0, 0.5]
    assert scores.tolist() == [2.0, -3.0, 0.5]


def test_the_clip_comes_after_the_missing_eos_and_whitening_last():
    random.seed(0)
    for _ in range(20):
        size = random.randint(2, 9)
        scores = [random.gauss(0, 3) for _ in range(size)]
        ended = [random.random() < 0.5 for _ in range(size)]
        by_hand = [s if e else s - 2.0 for s, e in zip(scores, ended, strict=True)]
        by_hand = [min(max(s, -1.5), 1.5) for s in by_hand]
        shaped = shape_scores(torch.tensor(scores), ended, missing_eos_penalty=2.0, clip=1.5)
        assert shaped.tolist() == pytest.approx(by_hand, abs=1e-6)
        if len(set(by_hand)) < 2:
            continue
        mean, std = statistics.mean(by_hand), statistics.stdev(by_hand)
        whitened = shape_scores(
            torch.tensor(scores), ended, missing_eos_penalty=2.0, clip=1.5, whiten=True
        )
        assert whitened.tolist() == pytest.approx([(s - mean) / std for s in by_hand], abs=1e-5)


def test_whitening_leaves_one_score_and_takes_equal_scores_to_zero():
    assert shape_scores(torch.tensor([3.0]), [True], whiten=True).tolist() == [3.0]
    assert shape_scores(torch.full((4,), 0.1), [True] * 4, whiten=True).tolist() == [0.0] * 4


def test_shaped_scores_are_new_and_float32():
    scores = torch.tensor([1.0, 2.0])
    shape_scores(scores, [True, True]).add_(5)
    assert scores.tolist() == [1.0, 2.0]
    assert shape_scores(scores.double(), [True, True]).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"missing_eos_penalty": 1.0, "missing_eos_score": -1.0}, "expected one of them"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0"),
        ({"missing_eos_penalty": math.inf}, "missing_eos_penalty is inf"),
        ({"missing_eos_score": math.nan}, "missing_eos_score is nan"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": math.nan}, "clip is nan"),
        ({"ended": [True]}, r"ended is \[1\]"),
        ({"ended": [1, 0]}, r"ended is \[2\] torch.int64"),
        ({"scores": torch.zeros(2, 1)}, r"scores is \[2, 1\]"),
        ({"scores": torch.zeros(2, dtype=torch.long)}, "torch.int64; expected"),
    ],
)
def test_shaping_that_makes_no_sense_is_refused(options, words):
    arguments = {"scores": torch.zeros(2), "ended": [True, False]} | options
    with pytest.raises(ValueError, match=words):
        shape_scores(arguments.pop("scores"), arguments.pop("ended"), **arguments)


# ---------------------------------------------------------------- rewards of tokens


def test_every_token_pays_kl_and_the_last_real_one_takes_the_score():
    random.seed(1)
    for _ in range(30):
        lengths = [random.randint(1, 6) for _ in range(random.randint(1, 5))]
        scores = [random.gauss(0, 2) for _ in lengths]
        kl = [[random.gauss(0, 1) for _ in range(n)] for n in lengths]
        coef = random.random()
        by_hand = []
        for score, row in zip(scores, kl, strict=True):
            rewards = [-coef * value for value in row]
            rewards[-1] += score
            by_hand += rewards
        flat = torch.tensor([value for row in kl for value in row])
        for kl_coef in (coef, torch.tensor(coef)):
            rewards = token_rewards(torch.tensor(scores), flat, lengths, kl_coef=kl_coef)
            assert rewards.dtype == torch.float32
            assert rewards.tolist() == pytest.approx(by_hand, abs=1e-6)
        alone = token_rewards(torch.tensor(scores), None, lengths)
        ends = [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]
        assert alone.nonzero().flatten().tolist() == ends
        assert alone[ends].tolist() == pytest.approx(scores, abs=1e-6)


def test_the_rewards_of_a_response_sum_to_its_score_less_its_kl():
    scores, kl = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 0.25, 1.0, 2.0])
    rewards = token_rewards(scores, kl, [3, 1], kl_coef=0.5)
    assert rewards.split([3, 1])[0].sum() == 3.0 - 0.5 * 1.75
    assert rewards.split([3, 1])[1].sum() == -1.0 - 0.5 * 2.0


def test_double_inputs_keep_their_precision():
    rewards = token_rewards(torch.tensor([1.0]), torch.full((2,), 1 / 3).double(), [2], kl_coef=0.1)
    assert rewards.dtype == torch.float64


def test_low_precision_inputs_give_float32_and_inputs_stay():
    scores, kl = torch.tensor([1.0]).half(), torch.ones(2, dtype=torch.bfloat16)
    rewards = token_rewards(scores, kl, [2], kl_coef=0.5)
    assert rewards.dtype == torch.float32 and rewards.tolist() == [-0.5, 0.5]
    assert kl.tolist() == [1.0, 1.0] and scores.tolist() == [1.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"response_lengths": [2, 0, 1]}, "response 1 has length 0"),
        ({"response_lengths": [2, 1]}, "2 response_lengths for 3 scores"),
        ({"response_lengths": [2, 1, 1]}, r"kl is \[3\] torch.float32; expected \[4\]"),
        ({"kl": torch.zeros(1, 3)}, r"kl is \[1, 3\]"),
        ({"kl": torch.zeros(3, dtype=torch.long)}, "torch.int64"),
        ({"kl": None}, "kl is None with kl_coef 0.1"),
        ({"kl": None, "kl_coef": torch.tensor(0.1)}, "kl is None"),
        ({"kl": torch.zeros(3, requires_grad=True)}, r"kl requires a gradient; .*kl\.detach"),
        ({"scores": torch.zeros(3, requires_grad=True)}, r"scores requires a gradient"),
        ({"scores": torch.zeros(3, 1)}, r"scores is \[3, 1\]"),
        ({"scores": torch.zeros(0), "response_lengths": []}, "at least one"),
    ],
)
def test_token_rewards_that_would_drop_something_are_refused(arguments, words):
    defaults = {
        "scores": torch.zeros(3),
        "kl": torch.zeros(3),
        "response_lengths": [1, 1, 1],
        "kl_coef": 0.1,
    }
    with pytest.raises(ValueError, match=words):
        token_rewards(**(defaults | arguments))


def test_whitened_rewards_keep_their_mean_and_get_unit_deviation():
    rewards = torch.tensor([0.5, -1.0, 2.0, 4.0, 0.0])
    values = rewards.tolist()
    mean, std = statistics.mean(values), statistics.stdev(values)
    expected = [(value - mean) / std + mean for value in values]
    assert whiten_rewards(rewards).tolist() == pytest.approx(expected, abs=1e-5)
    assert whiten_rewards(torch.tensor([2.5])).tolist() == [2.5]
    with pytest.raises(ValueError, match=r"rewards is \[1, 5\]"):
        whiten_rewards(rewards[None])


def test_whitening_by_the_moments_of_a_larger_batch_equals_its_part():
    rewards = torch.tensor([0.5, -1.0, 2.0, 4.0, 0.0, 7.0])
    moments = torch.tensor([6.0, rewards.mean(), (rewards - rewards.mean()).square().sum()])
    parts = [whiten_rewards(part, moments) for part in rewards.split([2, 4])]
    torch.testing.assert_close(torch.cat(parts), whiten_rewards(rewards))


def test_kl_estimates_match_their_formulas_and_are_constants():
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -0.5])
    d = [-0.5, 1.0, 0.0]  # log ref - log policy
    formulas = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(d) - 1 - d}
    for estimator, formula in formulas.items():
        kl = kl_per_token(log_probs, ref, estimator)
        assert not kl.requires_grad and kl.dtype == torch.float32
        assert kl.tolist() == pytest.approx([formula(x) for x in d], abs=1e-6)
    with pytest.raises(ValueError, match=r"estimator is 'full'.*kl_from_logits"):
        kl_per_token(log_probs, ref, "full")
    with pytest.raises(ValueError, match="expected one shape"):
        kl_per_token(log_probs, ref[:2], "k1")
