"""Prompts of every form become the ids their tokenizer would give, or a named error."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ppo_fast.llm.prompts import (
    Prompts,
    check_tokenizer,
    read_json_lines,
    tokenize_prompts,
    vocabulary_size,
)

WORDS = ["<unk>", "<bos>", "<eos>", "<pad>", "user", "assistant", ":", "good", "bad", "day", "what"]
ID = {word: index for index, word in enumerate(WORDS)}
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def make_tokenizer(post="<bos> $A", *, chat=None, eos="<eos>", pad="<pad>", **options):
    backend = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post:
        backend.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[(w, ID[w]) for w in ("<bos>", "<eos>")]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token=eos,
        pad_token=pad,
        **options,
    )
    tokenizer.chat_template = chat
    return tokenizer


def ids(text):
    return [ID[word] for word in text.split()]


class FakeDataset:
    """Iterates over dicts and has a length, as `datasets.Dataset` does."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)


def test_strings_get_the_special_tokens_and_keep_their_text():
    prompts = tokenize_prompts(["good  day", "what"], make_tokenizer())
    assert prompts.ids == [ids("<bos> good day"), ids("<bos> what")]
    assert prompts.texts == ["good  day", "what"]
    assert prompts.columns == {} and len(prompts) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_does_not_matter(side):
    tokenizer = make_tokenizer(padding_side=side, truncation_side=side)
    assert tokenize_prompts(["good day", "what"], tokenizer).ids == [
        ids("<bos> good day"),
        ids("<bos> what"),
    ]


def test_truncation_and_padding_left_on_in_the_tokenizer_do_not_enter():
    tokenizer = make_tokenizer()
    tokenizer(["good day what", "bad"], padding=True, truncation=True, max_length=2)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert tokenize_prompts(["good day what"], tokenizer).ids == [ids("<bos> good day what")]


def test_a_conversation_is_written_once_by_the_template_without_a_second_bos():
    tokenizer = make_tokenizer(chat="<bos> " + CHAT)
    talk = [{"role": "user", "content": "what day"}]
    expected = ids("<bos> user : what day <eos> assistant :")
    for data in ([talk], [{"prompt": talk}], FakeDataset([{"prompt": talk}])):
        prompts = tokenize_prompts(data, tokenizer)
        assert prompts.ids == [expected]
        assert prompts.texts == ["<bos> user : what day <eos> assistant :"]


def test_a_conversation_that_ends_in_the_assistant_is_continued():
    talk = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "good"}]
    prompts = tokenize_prompts([talk], make_tokenizer(chat=CHAT))
    assert prompts.ids == [ids("user : what <eos> assistant : good")]


def test_token_ids_come_through_from_every_container():
    wanted = [ids("<bos> good day"), ids("what")]
    rows = (
        wanted,
        [tuple(row) for row in wanted],
        [torch.tensor(row) for row in wanted],
        [np.array(row) for row in wanted],
        [{"input_ids": row} for row in wanted],
        [{"input_ids": torch.tensor(row)} for row in wanted],
        (row for row in wanted),
    )
    for data in rows:
        prompts = tokenize_prompts(data, make_tokenizer())
        assert prompts.ids == wanted
        assert all(type(token) is int for row in prompts.ids for token in row)
        assert prompts.texts == ["good day", "what"]


def test_token_ids_need_no_tokenizer():
    prompts = tokenize_prompts([{"input_ids": [4, 900], "n": 1}], None, max_length=2)
    assert prompts == Prompts([[4, 900]], [""], {"n": [1]})
    with pytest.raises(ValueError, match="prompt 0 holds the token id -1"):
        tokenize_prompts([[3, -1]], None)
    with pytest.raises(ValueError, match="tokenizer is None and prompt 0 is a string"):
        tokenize_prompts(["good"], None)


def test_padding_named_by_the_attention_mask_is_dropped_even_where_pad_is_eos():
    row = {
        "input_ids": ids("<eos> <eos> good <eos> day"),
        "attention_mask": [0, 0, 1, 1, 1],
        "label": 3,
    }
    prompts = tokenize_prompts([row], make_tokenizer(pad="<eos>"))
    assert prompts.ids == [ids("good <eos> day")]
    assert prompts.columns == {"label": [3]}


def test_other_keys_become_columns_and_take_keeps_them_together():
    rows = [
        {"prompt": w, "answer": w.upper(), "n": i} for i, w in enumerate(["good", "bad", "day"])
    ]
    prompts = tokenize_prompts(rows, make_tokenizer())
    assert prompts.columns == {"answer": ["GOOD", "BAD", "DAY"], "n": [0, 1, 2]}
    assert prompts.take([2, 0, 2]) == Prompts(
        [ids("<bos> day"), ids("<bos> good"), ids("<bos> day")],
        ["day", "good", "day"],
        {"answer": ["DAY", "GOOD", "DAY"], "n": [2, 0, 2]},
    )


def test_json_lines_hold_every_form(tmp_path):
    tokenizer = make_tokenizer(chat=CHAT)
    talk = [{"role": "user", "content": "what"}]
    for rows in (["good day"], [{"prompt": "good"}], [talk], [{"prompt": talk}], [[7, 8]]):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n" + "\n".join(map(json.dumps, rows)) + "\n\n")
        assert tokenize_prompts(path, tokenizer) == tokenize_prompts(rows, tokenizer)
        assert tokenize_prompts(str(path), tokenizer) == tokenize_prompts(rows, tokenizer)


def test_json_lines_split_at_line_feeds_only_and_skip_a_byte_order_mark(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('\ufeff"a\u2028b\x85c"\n\n"d"\n', encoding="utf-8")
    assert list(read_json_lines("f", path)) == [(1, "a\u2028b\x85c"), (3, "d")]


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "good"}\n\nplain text\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 3 is not JSON"):
        tokenize_prompts(path, make_tokenizer())
    path.write_bytes(b'"good"\n"\xff"\n')
    with pytest.raises(ValueError, match="is not UTF-8"):
        tokenize_prompts(path, make_tokenizer())
    with pytest.raises(ValueError, match=r"'what day' is no file; expected a path"):
        tokenize_prompts("what day", make_tokenizer())


def test_max_length_holds_at_its_bound_and_names_the_first_that_is_longer():
    data = ["what", "good day", "bad bad day", "bad bad bad"]
    tokenizer = make_tokenizer()
    assert len(tokenize_prompts(data, tokenizer, max_length=4)) == 4
    with pytest.raises(
        ValueError, match=r"prompt 2 has 4 tokens, more than max_length 3 \(2 of 4 prompts"
    ):
        tokenize_prompts(data, tokenizer, max_length=3)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="max_length is"):
            tokenize_prompts(data, tokenizer, max_length=wrong)


def test_empty_prompts_are_named():
    plain = make_tokenizer(post=None)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        tokenize_prompts(["good", "  "], plain)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        tokenize_prompts([[7], []], plain)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        tokenize_prompts([{"input_ids": [3], "attention_mask": [0]}], plain)
    # with a BOS there is something to go on from
    assert tokenize_prompts([""], make_tokenizer()).ids == [[ID["<bos>"]]]


@pytest.mark.parametrize("data", [[], FakeDataset([]), iter(())])
def test_no_prompts_is_an_error(data):
    with pytest.raises(ValueError, match="no prompts"):
        tokenize_prompts(data, make_tokenizer())


def test_ids_outside_the_vocabulary_are_named():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"prompt 1 holds the token id 11; expected 0 <= id < 11"):
        tokenize_prompts([[10], [3, 11]], tokenizer)
    with pytest.raises(ValueError, match=r"prompt 0 holds the token id -1"):
        tokenize_prompts([[-1]], tokenizer)
    tokenizer.add_tokens(["extra"])
    assert vocabulary_size(tokenizer) == 12
    assert tokenize_prompts([[11]], tokenizer).ids == [[11]]


def test_ids_above_a_gap_in_the_vocabulary_are_known():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 90}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b")
    assert vocabulary_size(tokenizer) == 91
    assert tokenize_prompts([[90]], tokenizer).ids == [[90]]


def test_a_tokenizer_that_ends_prompts_with_eos_is_refused():
    tokenizer = make_tokenizer(post="<bos> $A <eos>")
    with pytest.raises(ValueError, match=r"ends prompt 0 with EOS \(id 2\)"):
        tokenize_prompts(["good day"], tokenizer)
    # written into the prompt, it is the user's wish
    assert tokenize_prompts(["good <eos>"], make_tokenizer()).ids == [ids("<bos> good <eos>")]


def test_a_conversation_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match=r"no chat template; set tokenizer\.chat_template"):
        tokenize_prompts([[{"role": "user", "content": "what"}]], make_tokenizer())


def test_a_conversation_the_template_refuses_is_named():
    chat = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    talks = [[{"role": role, "content": "what"}] for role in ("user", "system")]
    with pytest.raises(ValueError, match="chat template refuses prompt 1: no system"):
        tokenize_prompts(talks, make_tokenizer(chat=chat))


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"train": ["a"]}, TypeError, "choose a split"),
        (3, TypeError, "data is a int"),
        ([3, 4], TypeError, "one list of token ids"),
        (["a", None], TypeError, "prompt 1 is None"),
        ([1.5], TypeError, "prompt 0 is 1.5"),
        ([[True]], TypeError, r"prompt 0 is \[True\]"),
        ([["a", "b"]], TypeError, "prompt 0 is"),
        ([[{"role": "user"}]], TypeError, "prompt 0 is"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], TypeError, "contents that are str"),
        (["good", [7]], ValueError, "prompt 1 is token ids, prompt 0 is a string"),
        (["good", {"prompt": "good"}], ValueError, "row 1 is a dict, row 0 a str"),
        ([{"prompt": "good"}, "good"], ValueError, "row 1 is a str, row 0 a dict"),
        ([{"prompt": "a"}, {"prompt": "b", "n": 1}], ValueError, "row 1 has the keys"),
        ([{"text": "good"}], ValueError, "expected either 'prompt' or 'input_ids'"),
        ([{"prompt": "a", "input_ids": [7]}], ValueError, "expected either"),
        ([{"role": "user", "content": "a"}], ValueError, r"wrap it: \[messages\]"),
        ([{"messages": [{"role": "user", "content": "a"}]}], ValueError, "'prompt'"),
        ([{"input_ids": [7, 8], "attention_mask": [1]}], ValueError, "row 0 has 2 input_ids"),
    ],
)
def test_other_forms_are_refused_by_name(data, error, words):
    with pytest.raises(error, match=words):
        tokenize_prompts(data, make_tokenizer(chat=CHAT))


def test_pad_and_eos_of_a_complete_tokenizer(caplog):
    with caplog.at_level(logging.INFO, "ppo_fast"):
        assert check_tokenizer(make_tokenizer()) == (3, 2)
        assert check_tokenizer(make_tokenizer(), stop_token_id=6) == (3, 6)
    assert not caplog.records


def test_without_pad_eos_fills_and_a_line_says_so(caplog):
    tokenizer = make_tokenizer(pad=None)
    with caplog.at_level(logging.INFO, "ppo_fast"):
        assert check_tokenizer(tokenizer) == (2, 2)
        assert check_tokenizer(make_tokenizer(pad="<eos>")) == (2, 2)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "no pad token" in caplog.text and "pad token is its EOS" in caplog.text
    assert tokenizer.pad_token_id is None  # the user's object is as it was


def test_without_eos_the_error_names_the_remedies():
    tokenizer = make_tokenizer(eos=None)
    with pytest.raises(ValueError, match=r"tokenizer\.eos_token = '\.\.\.'.*stop_token_id"):
        check_tokenizer(tokenizer)
    assert check_tokenizer(tokenizer, stop_token_id=6) == (3, 6)
    for wrong in (-1, 11):
        with pytest.raises(ValueError, match=rf"id is {wrong}; expected 0 <= id < 11"):
            check_tokenizer(tokenizer, stop_token_id=wrong)
