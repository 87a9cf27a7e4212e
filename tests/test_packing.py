"""Packing and micro-batches against loops over sequences."""

import itertools
import random

import pytest
import torch

from ppo_fast.llm.packing import micro_batches, pack


def random_sequences(seed, count=6, longest=9):
    draw = random.Random(seed)

    def tokens():
        return [draw.randrange(1000) for _ in range(draw.randint(1, longest))]

    return [tokens() for _ in range(count)], [tokens() for _ in range(count)]


def check(prompts, responses):
    packed = pack(prompts, responses)
    tokens, positions, predict, targets, starts = [], [], [], [], [0]
    for prompt, response in zip(prompts, responses, strict=True):
        whole = list(prompt) + list(response)
        for place, token in enumerate(response):
            predict.append(starts[-1] + len(prompt) + place - 1)
            targets.append(token)
        tokens += whole[:-1]
        positions += range(len(whole) - 1)
        starts.append(starts[-1] + len(whole) - 1)
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    longest = max(lengths)
    slots = [row * longest + place for row, n in enumerate(lengths) for place in range(n)]
    rows = [[*range(a, b)] + [b - 1] * (longest - b + a) for a, b in itertools.pairwise(starts)]
    assert packed.tokens.tolist() == tokens
    assert packed.position_ids.tolist() == positions
    assert packed.predict.tolist() == predict
    assert packed.targets.tolist() == targets
    assert packed.slots.tolist() == slots
    assert packed.sources.tolist() == list(itertools.chain(*rows))
    assert packed.cu_seqlens.tolist() == starts
    assert packed.lengths == lengths
    assert packed.max_length == longest
    assert all(part.dtype == torch.int64 for part in packed[:6])
    assert packed.cu_seqlens.dtype == torch.int32
    assert all(type(length) is int for length in packed.lengths)


@pytest.mark.parametrize("seed", range(20))
def test_pack_equals_a_loop_on_random_lengths(seed):
    check(*random_sequences(seed, count=1 + seed % 7))


@pytest.mark.parametrize(
    ("prompts", "responses"),
    [
        ([[5]], [[6]]),
        ([[5]], [[6, 7, 8]]),
        ([[5, 6, 7]], [[8]]),
        ([[5], [6]], [[7], [8]]),
        ([[1, 2], [3], [4, 5, 6]], [[7, 8], [9, 10, 11], [12]]),
        ([[0], [0, 0]], [[0, 0], [0]]),
    ],
    ids=["one", "token prompt", "token response", "all single", "equal lengths", "id 0"],
)
def test_pack_equals_a_loop_on_edges(prompts, responses):
    check(prompts, responses)


def test_the_last_token_is_a_target_and_no_input():
    packed = pack([[1, 2], [3]], [[4, 99], [98]])
    assert packed.tokens.tolist() == [1, 2, 4, 3]
    assert packed.targets.tolist() == [4, 99, 98]


def test_prompts_that_are_tensors_pack_as_lists_do():
    a = pack([torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([4]), torch.tensor([5, 6])])
    b = pack([[1, 2], [3]], [[4], [5, 6]])
    assert all(torch.equal(x, y) for x, y in zip(a[:7], b[:7], strict=True))


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([], [], "0 prompts and 0 responses"),
        ([[1]], [], "1 prompts and 0 responses"),
        ([[1], []], [[1], [2]], "prompt 1 is empty"),
        ([[1], [2]], [[], [2]], "response 0 is empty"),
    ],
)
def test_pack_refuses(prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, responses)


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_hold_every_index_once_within_the_budget(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 40))]
    budget = draw.randint(1, 200)
    groups = micro_batches(lengths, budget)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for group in groups:
        assert group
        padded = len(group) * max(lengths[index] for index in group)
        assert padded <= budget or len(group) == 1


def test_micro_batches_take_as_many_as_fit_longest_first():
    assert micro_batches([2, 9, 4, 4, 9, 1], 18) == [[1, 4], [2, 3, 0, 5]]
    assert micro_batches([3, 3, 3], 8) == [[0, 1], [2]]
    assert micro_batches([3, 3, 3], 9) == [[0, 1, 2]]


def test_equal_lengths_keep_their_order():
    assert micro_batches([5] * 7, 15) == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_sequence_above_the_budget_is_alone():
    assert micro_batches([3, 100, 3], 10) == [[1], [0, 2]]
    assert micro_batches([7, 7], 1) == [[0], [1]]


def test_no_sequences_are_no_groups():
    assert micro_batches([], 10) == []


@pytest.mark.parametrize("budget", [0, -5])
def test_a_budget_below_one_is_refused(budget):
    with pytest.raises(ValueError, match=f"token_budget = {budget}; expected at least 1"):
        micro_batches([1], budget)
