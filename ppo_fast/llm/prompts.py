"""Prompts of every form, as token ids; what a tokenizer must bring; JSON lines."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

log = logging.getLogger("ppo_fast")

FORMS = (
    "a string, a conversation (a list of {'role', 'content'} dicts), a list of token ids, "
    "{'prompt': string or conversation} or {'input_ids': token ids}"
)


@dataclass(frozen=True)
class Prompts:
    """N prompts; the three fields have an entry for each."""

    ids: list[list[int]]
    """token ids, never empty, not padded"""
    texts: list[str]
    """the string as given, the conversation as its chat template writes it, or the ids decoded"""
    columns: dict[str, list[Any]]
    """the other keys of the rows, for reward functions"""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Iterable[int]) -> Prompts:
        """The prompts at `indices`, in that order."""
        indices = list(indices)
        return Prompts(
            [self.ids[i] for i in indices],
            [self.texts[i] for i in indices],
            {name: [column[i] for i in indices] for name, column in self.columns.items()},
        )


def tokenize_prompts(data: Any, tokenizer: Any, *, max_length: int | None = None) -> Prompts:
    """Bring prompts to token ids, or say which of them cannot be.

    Every row has the same form: a string; a conversation, a list of {"role", "content"} dicts; a
    list of token ids; {"prompt": string or conversation}; or {"input_ids": token ids}, as TRL
    1.10's `PPOTrainer` took them. Strings get the tokenizer's special tokens. A conversation is
    written by the chat template, which brings its own, with the generation prompt; one that ends
    in an assistant's message is continued instead. Positions whose `attention_mask` is 0 are
    padding and dropped. Other keys become `columns`.

    Args:
        data: the rows as a list, a Hugging Face `Dataset` or another iterable, or the path of a
            file with one row of JSON a line.
        tokenizer: a Hugging Face tokenizer; its padding side does not matter. None takes token ids
            only, of any vocabulary, and leaves texts empty.
        max_length: most tokens of a prompt; None sets no bound.

    Raises:
        TypeError: data is no rows, or a row has none of these forms.
        ValueError: no rows, rows of different forms or keys, a prompt that is empty or longer than
            max_length, token ids that the tokenizer does not have, a conversation without a chat
            template, no tokenizer for texts, a tokenizer that ends prompts with EOS, or a file that
            is not JSON lines.
    """
    name = "tokenize_prompts"
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"{name}: max_length is {max_length!r}; expected a whole number >= 1")
    rows = _rows(data)
    prompts, columns = _split_columns(rows)
    forms = [_form(index, prompt) for index, prompt in enumerate(prompts)]
    for index, form in enumerate(forms):
        if form != forms[0]:
            raise ValueError(
                f"{name}: prompt {index} is {form}, prompt 0 is {forms[0]}; expected one form for "
                "all, bring them to it or make two data sets"
            )
    if tokenizer is None and forms[0] != "token ids":
        raise ValueError(
            f"{name}: tokenizer is None and prompt 0 is {forms[0]}; expected the tokenizer, or prompts "
            "as token ids"
        )
    if forms[0] == "token ids":
        ids = _checked_ids(prompts, tokenizer)
        texts = [""] * len(ids)
        if tokenizer is not None:
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    elif forms[0] == "a conversation":
        texts = _rendered(prompts, tokenizer)
        ids = _encoded(tokenizer, texts, add_special_tokens=False)
    else:
        texts = list(prompts)
        ids = _encoded(tokenizer, texts, add_special_tokens=True)
        _refuse_added_eos(ids, texts, tokenizer)
    _check_lengths(ids, max_length)
    return Prompts(ids, texts, columns)


def check_tokenizer(tokenizer: Any, stop_token_id: int | None = None) -> tuple[int, int]:
    """`(pad_token_id, eos_token_id)` for generation: the filler, and what ends a response.

    Masks come from lengths, so a pad that equals EOS is no error; a tokenizer without pad gets EOS
    as the filler. Both are logged.

    Args:
        tokenizer: a Hugging Face tokenizer.
        stop_token_id: ends responses in place of the tokenizer's EOS.

    Raises:
        ValueError: neither EOS nor stop_token_id, or an id that the tokenizer does not have.
    """
    eos = tokenizer.eos_token_id if stop_token_id is None else stop_token_id
    if eos is None:
        raise ValueError(
            "check_tokenizer: the tokenizer has no EOS token, so no response could end; set "
            "tokenizer.eos_token = '...' to the token that ends texts in training, or give "
            "stop_token_id"
        )
    pad = tokenizer.pad_token_id
    size = vocabulary_size(tokenizer)
    for what, token in (("EOS or stop", eos), ("pad", pad)):
        if token is not None and not 0 <= token < size:
            raise ValueError(
                f"check_tokenizer: the {what} token's id is {token}; expected 0 <= id < {size}, "
                "the tokenizer's vocabulary"
            )
    if pad is None:
        log.info("the tokenizer has no pad token; EOS (id %d) fills, lengths mask", eos)
        pad = eos
    elif pad == eos:
        log.info("the tokenizer's pad token is its EOS (id %d); lengths mask", eos)
    return pad, eos


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest token id, added tokens included: ids may have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def read_json_lines(name: str, path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Yield `(line number, value)` of the lines that are not blank.

    Args:
        name: the caller's, for messages.
        path: a UTF-8 file.

    Raises:
        ValueError: no such file, not UTF-8, or a line that is not JSON.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{name}: {os.fspath(path)!r} is no file; expected a path to JSON lines")
    # Iterated, not str.splitlines(): that also splits at U+2028, which JSON strings may hold.
    with open(path, encoding="utf-8-sig") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: {os.fspath(path)} is not UTF-8 after line {number} ({error.reason}); "
                "convert it, for example with iconv"
            ) from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}: {os.fspath(path)}, line {number} is not JSON ({error}); expected one "
                "JSON value a line"
            ) from error


def is_conversation(value: Any) -> bool:
    """Whether this is a list of {"role": str, "content": str} messages, at least one."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )


def _rows(data: Any) -> list[Any]:
    if isinstance(data, str | os.PathLike):
        rows = [value for _, value in read_json_lines("tokenize_prompts", data)]
    elif isinstance(data, Mapping):
        raise TypeError(
            f"tokenize_prompts: data is a {type(data).__name__} with the keys {sorted(data)}; "
            "expected rows: choose a split, as in data['train'], or zip its columns to rows"
        )
    elif isinstance(data, Iterable):
        rows = list(data)
    else:
        raise TypeError(
            f"tokenize_prompts: data is a {type(data).__name__}; expected a list of prompts, a "
            f"data set or the path of JSON lines, each {FORMS}"
        )
    if not rows:
        raise ValueError("tokenize_prompts: data holds no prompts; expected at least one")
    if all(isinstance(row, int) for row in rows):
        raise TypeError(
            "tokenize_prompts: data is one list of token ids; expected a list of prompts, "
            "wrap it: [ids]"
        )
    return rows


def _split_columns(rows: list[Any]) -> tuple[list[Any], dict[str, list[Any]]]:
    """The prompts of the rows, and their other keys by column."""
    first = rows[0]
    for index, row in enumerate(rows):
        if isinstance(row, Mapping) != isinstance(first, Mapping):
            raise ValueError(
                f"tokenize_prompts: row {index} is a {type(row).__name__}, row 0 a "
                f"{type(first).__name__}; expected one form for all"
            )
    if not isinstance(first, Mapping):
        return rows, {}
    for index, row in enumerate(rows):
        if row.keys() != first.keys():
            raise ValueError(
                f"tokenize_prompts: row {index} has the keys {sorted(row)}, row 0 {sorted(first)}; "
                "expected the same in every row"
            )
    sources = [key for key in ("prompt", "input_ids") if key in first]
    if len(sources) != 1:
        hint = ""
        if {"role", "content"} <= first.keys():
            hint = "; a conversation is a list of messages, wrap it: [messages]"
        elif "messages" in first:
            hint = "; name the messages that come before the answer 'prompt'"
        raise ValueError(
            f"tokenize_prompts: rows have the keys {sorted(first)}; expected either 'prompt' or "
            f"'input_ids'{hint}"
        )
    source = sources[0]
    prompts = [row[source] for row in rows]
    used = {source}
    if source == "input_ids" and "attention_mask" in first:
        used.add("attention_mask")
        prompts = [
            _without_padding(index, row["input_ids"], row["attention_mask"])
            for index, row in enumerate(rows)
        ]
    columns = {key: [row[key] for row in rows] for key in first if key not in used}
    return prompts, columns


def _without_padding(index: int, ids: Any, mask: Any) -> list[Any]:
    ids, mask = _plain(ids), _plain(mask)
    if len(ids) != len(mask):
        raise ValueError(
            f"tokenize_prompts: row {index} has {len(ids)} input_ids and an attention_mask of "
            f"{len(mask)}; expected as many"
        )
    return [token for token, real in zip(ids, mask, strict=True) if real]


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _form(index: int, prompt: Any) -> str:
    if isinstance(prompt, str):
        return "a string"
    prompt = _plain(prompt)
    if isinstance(prompt, Sequence):
        if not prompt:
            raise ValueError(f"tokenize_prompts: prompt {index} is empty; drop it")
        if is_conversation(prompt):
            return "a conversation"
        if all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            return "token ids"
    raise TypeError(
        f"tokenize_prompts: prompt {index} is {_shortened(prompt)}; expected {FORMS}, with "
        "contents that are strings"
    )


def _shortened(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _checked_ids(prompts: list[Any], tokenizer: Any) -> list[list[int]]:
    ids = [list(_plain(prompt)) for prompt in prompts]
    size = math.inf if tokenizer is None else vocabulary_size(tokenizer)
    for index, prompt in enumerate(ids):
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= size:
            raise ValueError(
                f"tokenize_prompts: prompt {index} holds the token id {low if low < 0 else high}; "
                f"expected 0 <= id < {size}, the tokenizer's vocabulary; tokenize with this "
                "tokenizer"
            )
    return ids


def _rendered(conversations: list[Any], tokenizer: Any) -> list[str]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "tokenize_prompts: the prompts are conversations, the tokenizer has no chat template; "
            "set tokenizer.chat_template, or write the prompts as strings"
        )
    texts = []
    for index, messages in enumerate(conversations):
        goes_on = messages[-1]["role"] == "assistant"
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
            )
        except Exception as error:
            raise ValueError(
                f"tokenize_prompts: the chat template refuses prompt {index}: {error}"
            ) from error
        texts.append(text)
    return texts


def _encoded(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, padding=False, truncation=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _refuse_added_eos(ids: list[list[int]], texts: list[str], tokenizer: Any) -> None:
    """After its EOS a text is over: a policy that goes on from there was never trained to."""
    eos = tokenizer.eos_token_id
    for index, (tokens, text) in enumerate(zip(ids, texts, strict=True)):
        if eos is not None and tokens[-1:] == [eos] and not text.endswith(tokenizer.eos_token):
            raise ValueError(
                f"tokenize_prompts: the tokenizer ends prompt {index} with EOS (id {eos}); set "
                "tokenizer.add_eos_token = False, or give token ids"
            )


def _check_lengths(ids: list[list[int]], max_length: int | None) -> None:
    for index, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(
                f"tokenize_prompts: prompt {index} has no tokens; drop it, or begin it with the "
                "tokenizer's BOS token"
            )
    if max_length is None:
        return
    long = (index for index, prompt in enumerate(ids) if len(prompt) > max_length)
    for index in islice(long, 1):
        count = 1 + sum(1 for _ in long)
        raise ValueError(
            f"tokenize_prompts: prompt {index} has {len(ids[index])} tokens, more than max_length "
            f"{max_length} ({count} of {len(ids)} prompts are longer); drop or shorten them, or "
            "raise max_length if the model's context allows"
        )
