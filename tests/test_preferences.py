"""Preference pairs: files, judges, splits, tokens and the labelling loop, with what is refused."""

from __future__ import annotations

import json
import logging
import math
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ppo_fast.llm.judge import FunctionJudge
from ppo_fast.llm.preferences import (
    Preference,
    collect_preferences,
    label_pairs,
    read_preferences,
    split_preferences,
    tokenize_preferences,
    write_preferences,
)

TALK = [{"role": "user", "content": "what"}]
YES, NO = ([{"role": "assistant", "content": word}] for word in ("good", "bad"))


# ---------------------------------------------------------------- one preference, files


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (("p", "a", "a"), ValueError, "chosen and rejected are equal"),
        ((" ", "a", "b"), ValueError, "prompt is empty"),
        (("p", "", "b"), ValueError, "chosen is empty"),
        (("p", "a", "\n"), ValueError, "rejected is empty"),
        ((3, "a", "b"), TypeError, "prompt is 3"),
        (("p", None, "b"), TypeError, "chosen is None"),
        (("p", "a", ["b"]), TypeError, r"rejected is \['b'\]"),
        ((TALK, "a", NO), TypeError, "chosen is a str, prompt a list"),
        (("p", YES, NO), TypeError, "chosen is a list, prompt a str"),
        ((TALK, YES, YES), ValueError, "are equal"),
        ((TALK, YES, [{"role": "assistant", "content": ""}]), ValueError, "rejected is empty"),
        (("p", "a", "b", -1.0), ValueError, "margin is -1.0"),
        (("p", "a", "b", math.nan), ValueError, "margin is nan"),
        (("p", "a", "b", "1"), TypeError, "margin is '1'"),
        (("p", "a", "b", True), TypeError, "margin is True"),
        (("p", "a", "b", None, 1.5), ValueError, "p is 1.5"),
        (("p", "a", "b", None, math.nan), ValueError, "p is nan"),
    ],
)
def test_a_preference_that_teaches_nothing_cannot_be_made(fields, error, words):
    with pytest.raises(error, match=words):
        Preference(*fields)


def test_files_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "pairs.jsonl"
    preferences = [
        Preference("p", "a\nb", "a\u2028b\x85"),
        Preference('"{}\\', "é 漢字 🙂", "b", margin=0.1 + 0.2, p=1 / 3),
        Preference(TALK, YES, NO, p=0.0),
    ]
    write_preferences(path, preferences)
    assert read_preferences(path) == preferences
    assert read_preferences(str(path)) == preferences
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [sorted(row) for row in rows] == [
        ["chosen", "prompt", "rejected"],
        ["chosen", "margin", "p", "prompt", "rejected"],
        ["chosen", "p", "prompt", "rejected"],
    ]
    assert [p.name for p in path.parent.iterdir()] == ["pairs.jsonl"]


def test_other_keys_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('\n{"chosen": "a", "rejected": "b", "prompt": "p", "score": 3}\n\n')
    assert read_preferences(path) == [Preference("p", "a", "b")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 3 is not JSON"),
        ('["p", "a", "b"]', "line 3 is a list"),
        ('{"prompt": "p", "chosen": "a"}', "line 3 lacks 'rejected'"),
        ('{"chosen": "a", "rejected": "b"}', "line 3 lacks 'prompt'.*taken out"),
        ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "line 3: .*are equal"),
        ('{"prompt": "", "chosen": "a", "rejected": "b"}', "line 3: .*prompt is empty"),
        ('{"prompt": "p", "chosen": 1, "rejected": "b"}', "line 3: .*chosen is 1"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}', "line 3: .*margin"),
    ],
)
def test_a_line_that_is_no_preference_is_named_by_number(tmp_path, line, words):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=words) as caught:
        read_preferences(path)
    assert "pairs.jsonl" in str(caught.value)


def test_files_with_nothing_in_them_are_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no preferences"):
        read_preferences(path)
    with pytest.raises(ValueError, match="is no file"):
        read_preferences(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no preferences"):
        write_preferences(path, [])


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_preferences(path, [Preference("p", "a", "b")])

    def broken():
        yield Preference("q", "a", "b")
        raise RuntimeError("sampler died")

    with pytest.raises(RuntimeError):
        write_preferences(path, broken())
    assert read_preferences(path) == [Preference("p", "a", "b")]


# ---------------------------------------------------------------- collecting


def longer(temperature):
    return FunctionJudge(lambda prompt, answer: len(answer), temperature)


def test_the_more_probable_answer_is_chosen_whatever_its_place():
    collected = collect_preferences(
        ["p", "q"], lambda prompts: [("aaa", "a"), ("b", "bbb")], longer(2.0), seed=0
    )
    p = 1 / (1 + math.exp(-1.0))
    assert [(x.prompt, x.chosen, x.rejected) for x in collected.preferences] == [
        ("p", "aaa", "a"),
        ("q", "bbb", "b"),
    ]
    assert [x.p for x in collected.preferences] == pytest.approx([p, p])
    assert (collected.equal, collected.empty) == (0, 0)


def test_equal_and_empty_answers_are_dropped_counted_and_logged(caplog):
    seen = []

    def judge(prompts, first, second):
        seen.append((prompts, first, second))
        return [0.9] * len(prompts)

    pairs = [("a", "a"), ("b", "c"), ("", ""), ("", "d"), ("e", " \n"), ("f", "g")]
    with caplog.at_level(logging.INFO, "ppo_fast"):
        collected = collect_preferences(list("uvwxyz"), lambda prompts: pairs, judge, seed=0)
    assert seen == [(["v", "z"], ["b", "f"], ["c", "g"])]
    assert [x.prompt for x in collected.preferences] == ["v", "z"]
    assert (collected.equal, collected.empty) == (2, 2)
    assert "4 of 6 pairs dropped: 2 with equal answers, 2 with an empty one" in caplog.text


def test_drawn_labels_have_the_judges_frequencies():
    count, gap, temperature = 4000, 2, 2.5
    expected = 1 / (1 + math.exp(-gap / temperature))
    collected = collect_preferences(
        ["p"] * count,
        lambda prompts: [("aaa", "a") if i % 2 else ("a", "aaa") for i in range(count)],
        longer(temperature),
        seed=1,
        hard_labels=False,
    )
    right = [x.chosen == "aaa" for x in collected.preferences]
    # four standard deviations of a binomial share
    bound = 4 * math.sqrt(expected * (1 - expected) / count)
    for half in (right[::2], right[1::2]):
        assert sum(half) / len(half) == pytest.approx(expected, abs=bound * math.sqrt(2))
    for x in collected.preferences:
        assert x.p == pytest.approx(expected if x.chosen == "aaa" else 1 - expected)


def test_a_tie_is_drawn_and_certainty_is_not():
    count = 2000
    for hard_labels in (True, False):
        tied = collect_preferences(
            ["p"] * count,
            lambda prompts: [("a", "b")] * count,
            lambda prompts, first, second: [0.5] * count,
            seed=2,
            hard_labels=hard_labels,
        )
        share = sum(x.chosen == "a" for x in tied.preferences) / count
        assert share == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(count))
        for p, chosen in ((1.0, "a"), (0.0, "b")):
            certain = collect_preferences(
                ["p"] * 200,
                lambda prompts: [("a", "b")] * 200,
                lambda prompts, first, second, p=p: [p] * 200,
                seed=3,
                hard_labels=hard_labels,
            )
            assert {x.chosen for x in certain.preferences} == {chosen}


def test_a_seed_fixes_the_labels_and_dropped_pairs_do_not_move_them():
    prompts = [f"p{i}" for i in range(50)]
    pairs = [("aa", "b")] * 50

    def labels(pairs, seed):
        collected = collect_preferences(
            prompts, lambda prompts: pairs, longer(1.0), seed=seed, hard_labels=False
        )
        return {x.prompt: x.chosen for x in collected.preferences}

    all_of_them = labels(pairs, 4)
    assert labels(pairs, 4) == all_of_them
    assert labels(pairs, 5) != all_of_them
    some = [("c", "c") if i % 3 == 0 else pair for i, pair in enumerate(pairs)]
    assert labels(some, 4) == {p: c for i, (p, c) in enumerate(all_of_them.items()) if i % 3}


@pytest.mark.parametrize(
    ("prompts", "pairs", "judged", "words"),
    [
        ([], [], [], "no prompts"),
        (["p", " "], [("a", "b")] * 2, [0.5] * 2, "prompt 1 is ' '"),
        ([3], [("a", "b")], [0.5], "prompt 0 is 3"),
        (["p", "q"], [("a", "b")], [0.5], "sample returned 1 pairs for 2 prompts"),
        (["p"], [("a", "b", "c")], [0.5], "expected two strings"),
        (["p"], [("a", 1)], [0.5], "expected two strings"),
        (
            ["p", "q"],
            [("a", "a"), ("", "b")],
            [],
            "no pair is left of 2: 1 have equal answers, 1 an",
        ),
        (["p"], [("a", "b")], [0.5, 0.5], "judge returned 2 probabilities for 1 pairs"),
        (
            ["q", "p"],
            [("a", "a"), ("a", "b")],
            [1.2],
            "judge returned 1.2 for the pair of prompt 1",
        ),
        (["p"], [("a", "b")], [math.nan], "judge returned nan"),
    ],
)
def test_what_samplers_and_judges_may_not_return_is_refused(prompts, pairs, judged, words):
    with pytest.raises(ValueError, match=words):
        collect_preferences(prompts, lambda p: pairs, lambda p, first, second: judged, seed=0)


# ---------------------------------------------------------------- splitting


def test_a_prompt_is_never_in_both_parts_and_nothing_is_lost():
    rng = random.Random(0)
    for seed in range(20):
        count = rng.randint(2, 30)
        preferences = [
            Preference(f"p{rng.randrange(count)}", f"a{i}", "b") for i in range(3 * count)
        ] + [Preference(TALK, YES, NO)]
        share = rng.choice([0.01, 0.1, 0.5, 0.99])
        train, held_out = split_preferences(preferences, share, seed=seed)
        keys = [{str(x.prompt) for x in part} for part in (train, held_out)]
        assert keys[0] and keys[1] and not keys[0] & keys[1]
        number = len(keys[0] | keys[1])
        assert abs(len(keys[1]) - share * number) <= 1
        assert [x for x in preferences if x in train] == train
        assert len(train) + len(held_out) == len(preferences)


def test_the_split_depends_on_the_prompts_and_the_seed_only():
    preferences = [Preference(f"p{i % 40}", f"a{i}", "b") for i in range(120)]
    held_out = {x.prompt for x in split_preferences(preferences, seed=1)[1]}
    assert len(held_out) == 4
    random.Random(9).shuffle(preferences)
    assert {x.prompt for x in split_preferences(preferences[::-1], seed=1)[1]} == held_out
    others = [{x.prompt for x in split_preferences(preferences, seed=s)[1]} for s in range(2, 6)]
    assert any(other != held_out for other in others)


def test_a_split_that_cannot_be_made_is_refused():
    preferences = [Preference("p", "a", "b"), Preference("p", "a", "c")]
    with pytest.raises(ValueError, match="2 preferences of 1 prompts"):
        split_preferences(preferences, seed=0)
    for share in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="held_out is"):
            split_preferences(preferences, share, seed=0)


# ---------------------------------------------------------------- tokens

WORDS = ["<unk>", "<bos>", "<eos>", "user", "assistant", ":", "what", "good", "bad", "day"]


def make_tokenizer(chat=None):
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = chat
    return tokenizer


CHAT = (
    "<bos> {% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def test_preferences_become_prompt_answer_and_one_eos():
    pairs = [Preference("what day", "good day", "bad <eos>"), Preference("day", "bad", "good", 0.5)]
    assert tokenize_preferences(pairs, make_tokenizer()) == [
        (ids("<bos> what day good day <eos>"), ids("<bos> what day bad <eos>"), 0.0),
        (ids("<bos> day bad <eos>"), ids("<bos> day good <eos>"), 0.5),
    ]


def test_conversations_end_at_the_templates_eos():
    ((chosen, rejected, _),) = tokenize_preferences(
        [Preference(TALK, YES, NO)], make_tokenizer(CHAT)
    )
    assert chosen == ids("<bos> user : what <eos> assistant : good <eos>")
    assert rejected == ids("<bos> user : what <eos> assistant : bad <eos>")


@pytest.mark.parametrize(
    ("preference", "options", "words"),
    [
        (Preference("p", "xx", "yy"), {}, "preference 0 have the same tokens"),
        (
            Preference("what", "good", "good day"),
            {"max_length": 4},
            "rejected of preference 0 have 5",
        ),
        (Preference(TALK, YES, NO), {}, "no chat template"),
    ],
)
def test_pairs_that_tokens_cannot_tell_or_hold_are_refused(preference, options, words):
    with pytest.raises(ValueError, match=words):
        tokenize_preferences([preference], make_tokenizer(), **options)


def test_a_template_that_rewrites_the_prompt_is_refused():
    chat = "{{ messages | length }} " + CHAT
    with pytest.raises(ValueError, match="writes the prompt of preference 0 otherwise"):
        tokenize_preferences([Preference(TALK, YES, NO)], make_tokenizer(chat))


def test_pairs_fit_the_reward_models_trainer():
    from ppo_fast.llm.reward_model import TokenPair

    (pair,) = tokenize_preferences([Preference("what", "good", "bad", 1.5)], make_tokenizer())
    pair = TokenPair(*pair)
    assert pair.margin == 1.5 and pair.chosen == ids("<bos> what good <eos>")


# ---------------------------------------------------------------- people

PAIRS = [("p", "a", "b"), ("p", "a", "c"), ("q", "d", "e"), ("r", "f", "g")]


class Terminal:
    """Types the given lines; an exception among them is raised."""

    def __init__(self, *lines, path=None):
        self.lines, self.shown, self.path, self.on_disk = list(lines), [], path, []

    def input(self, prompt):
        if self.path is not None:
            self.on_disk.append(self.path.read_text() if self.path.exists() else "")
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line

    def label(self, path, pairs=PAIRS):
        return label_pairs(pairs, path, input=self.input, output=self.shown.append)


def test_people_choose_skip_and_quit(tmp_path):
    path = tmp_path / "new" / "people.jsonl"
    terminal = Terminal("1", "what?", " S ", "2", "q")
    assert terminal.label(path) == 2
    assert read_preferences(path) == [Preference("p", "a", "b"), Preference("q", "e", "d")]
    assert any("'what?' is none of 1, 2, s, q" in text for text in terminal.shown)
    assert any("1: d" in text and "2: e" in text and "q" in text for text in terminal.shown)


def test_every_answer_is_in_the_file_before_the_next_question(tmp_path):
    path = tmp_path / "people.jsonl"
    terminal = Terminal("1", "2", "1", "q", path=path)
    terminal.label(path)
    assert [text.count("\n") for text in terminal.on_disk] == [0, 1, 2, 3]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, EOFError, "quit"])
def test_a_stop_loses_nothing_and_the_next_run_goes_on(tmp_path, stop):
    path = tmp_path / "people.jsonl"
    assert Terminal("1", "2", stop).label(path) == 2
    again = Terminal("2", "1")
    assert again.label(path) == 2
    assert not again.lines
    assert read_preferences(path) == [
        Preference("p", "a", "b"),
        Preference("p", "c", "a"),
        Preference("q", "e", "d"),
        Preference("r", "f", "g"),
    ]
    assert Terminal().label(path) == 0


def test_a_pair_in_the_other_order_is_known_and_a_repeated_one_asked_once(tmp_path):
    path = tmp_path / "people.jsonl"
    Terminal("1").label(path, [("p", "a", "b")])
    terminal = Terminal("2")
    assert terminal.label(path, [("p", "b", "a"), ("q", "b", "a"), ("q", "a", "b")]) == 1
    assert len(read_preferences(path)) == 2


def test_a_missing_line_feed_at_the_end_joins_no_lines(tmp_path):
    path = tmp_path / "people.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}')
    Terminal("2", "q").label(path)
    assert read_preferences(path) == [Preference("p", "a", "b"), Preference("p", "c", "a")]


def test_nothing_is_asked_if_a_pair_or_the_file_is_wrong(tmp_path):
    path = tmp_path / "people.jsonl"
    with pytest.raises(ValueError, match=r"pair 1: .*are equal"):
        Terminal().label(path, [("p", "a", "b"), ("p", "a", "a")])
    assert not path.exists()
    path.write_text("notes\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        Terminal().label(path)
    assert path.read_text() == "notes\n"
