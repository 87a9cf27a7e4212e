"""Preference pairs: their JSON lines, from samples and a judge, from people, and their split."""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ppo_fast.checkpoint import atomic_write_text
from ppo_fast.llm.judge import Judge
from ppo_fast.llm.prompts import (
    check_tokenizer,
    is_conversation,
    read_json_lines,
    tokenize_prompts,
)

log = logging.getLogger("ppo_fast")

Text = str | list[dict[str, str]]
Sampler = Callable[[list[str]], Sequence[tuple[str, str]]]

REQUIRED = ("prompt", "chosen", "rejected")
OPTIONAL = ("margin", "p")


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers, one of them preferred; TRL's names.

    The three texts are strings, or all conversations: lists of {"role", "content"} messages, where
    the answers go on after the prompt.

    Raises:
        TypeError: a field of another type.
        ValueError: an empty text, equal answers, a negative margin, or p outside [0, 1].
    """

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None
    """>= 0, by how much the reward of `chosen` should be higher; None where nobody said"""
    p: float | None = None
    """the judge's probability that `chosen` is the better; below 0.5 where the label is noise"""

    def __post_init__(self) -> None:
        for name in REQUIRED:
            text = getattr(self, name)
            if not isinstance(text, str) and not is_conversation(text):
                raise TypeError(
                    f"Preference: {name} is {text!r}; expected a string or a list of "
                    "{'role', 'content'} messages"
                )
            if isinstance(text, str) != isinstance(self.prompt, str):
                raise TypeError(
                    f"Preference: {name} is a {type(text).__name__}, prompt a "
                    f"{type(self.prompt).__name__}; expected three strings or three conversations"
                )
            if _is_empty(text):
                raise ValueError(f"Preference: {name} is empty; drop the pair")
        if self.chosen == self.rejected:
            raise ValueError("Preference: chosen and rejected are equal; drop the pair")
        for name in OPTIONAL:
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise TypeError(f"Preference: {name} is {value!r}; expected a number or None")
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise ValueError(f"Preference: margin is {self.margin}; expected a finite number >= 0")
        if self.p is not None and not 0 <= self.p <= 1:
            raise ValueError(f"Preference: p is {self.p}; expected a probability in [0, 1]")


class Collected(NamedTuple):
    """What became of the pairs of samples."""

    preferences: list[Preference]
    equal: int
    """pairs dropped because their answers are the same text"""
    empty: int
    """pairs dropped because an answer has no text"""


def read_preferences(path: str | os.PathLike[str]) -> list[Preference]:
    """Read JSON lines with the keys prompt, chosen, rejected and optionally margin and p.

    Other keys are ignored, blank lines too.

    Raises:
        ValueError: no such file, nothing in it, or a line that is no preference, by its number.
    """
    name = "read_preferences"
    preferences = []
    for number, row in read_json_lines(name, path):
        where = f"{name}: {os.fspath(path)}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(
                f"{where} is a {type(row).__name__}; expected an object with the keys "
                f"{', '.join(REQUIRED)}"
            )
        missing = [key for key in REQUIRED if key not in row]
        if missing:
            raise ValueError(
                f"{where} lacks {missing[0]!r}, its keys are {sorted(row)}; expected "
                f"{', '.join(REQUIRED)} (a prompt inside the answers is to be taken out of them)"
            )
        try:
            preferences.append(
                Preference(**{k: row[k] for k in (*REQUIRED, *OPTIONAL) if k in row})
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    if not preferences:
        raise ValueError(f"{name}: {os.fspath(path)} holds no preferences; expected at least one")
    return preferences


def write_preferences(path: str | os.PathLike[str], preferences: Iterable[Preference]) -> None:
    """Replace the file at `path` by JSON lines, atomically; missing folders are made.

    Raises:
        OSError: it cannot be written; what was there is untouched.
        ValueError: no preferences.
    """
    lines = [_line(preference) for preference in preferences]
    if not lines:
        raise ValueError("write_preferences: no preferences; expected at least one")
    atomic_write_text(path, "".join(lines))


def collect_preferences(
    prompts: Sequence[str],
    sample: Sampler,
    judge: Judge,
    *,
    seed: int,
    hard_labels: bool = True,
) -> Collected:
    """Draw two answers to every prompt and have a judge prefer one.

    Pairs with equal or empty answers are dropped, counted and logged; the judge sees the others in
    one call.

    Args:
        prompts: N texts, none empty.
        sample: `prompts -> N pairs of answers`.
        judge: see `ppo_fast.llm.judge`.
        seed: of the labels.
        hard_labels: True prefers the more probable answer, and a drawn one if both are equally so;
            False draws every label from its probability, which is Bradley-Terry noise.

    Returns:
        The preferences in the order of the prompts, with the judge's probability as `p`, and the
        counts of what was dropped.

    Raises:
        ValueError: no prompts or an empty one, another number of pairs or probabilities than asked
            for, a probability outside [0, 1], or no pair left.
    """
    name = "collect_preferences"
    prompts = list(prompts)
    if not prompts:
        raise ValueError(f"{name}: no prompts; expected at least one")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"{name}: prompt {index} is {prompt!r}; expected a text that is not empty"
            )
    pairs = list(sample(list(prompts)))
    if len(pairs) != len(prompts):
        raise ValueError(
            f"{name}: sample returned {len(pairs)} pairs for {len(prompts)} prompts; expected one "
            "pair of answers for each"
        )
    for index, pair in enumerate(pairs):
        if len(pair) != 2 or not all(isinstance(answer, str) for answer in pair):
            raise ValueError(f"{name}: sample returned {pair!r} at {index}; expected two strings")
    equal = [first == second for first, second in pairs]
    empty = [_is_empty(first) or _is_empty(second) for first, second in pairs]
    kept = [i for i in range(len(pairs)) if not equal[i] and not empty[i]]
    dropped_equal = sum(equal)
    dropped_empty = len(pairs) - len(kept) - dropped_equal
    if len(kept) < len(pairs):
        log.info(
            "%d of %d pairs dropped: %d with equal answers, %d with an empty one",
            len(pairs) - len(kept),
            len(pairs),
            dropped_equal,
            dropped_empty,
        )
    if not kept:
        raise ValueError(
            f"{name}: no pair is left of {len(pairs)}: {dropped_equal} have equal answers, "
            f"{dropped_empty} an empty one; raise the sampling temperature or the response length"
        )
    probabilities = list(
        judge([prompts[i] for i in kept], [pairs[i][0] for i in kept], [pairs[i][1] for i in kept])
    )
    if len(probabilities) != len(kept):
        raise ValueError(
            f"{name}: judge returned {len(probabilities)} probabilities for {len(kept)} pairs; "
            "expected one for each"
        )
    # One draw a prompt, kept or not: what is dropped does not change the labels of the others.
    generator = random.Random(seed)
    draws = [generator.random() for _ in prompts]
    preferences = []
    for i, probability in zip(kept, probabilities, strict=True):
        p = float(probability)
        if not 0 <= p <= 1:
            raise ValueError(
                f"{name}: judge returned {p} for the pair of prompt {i}; expected a probability in "
                "[0, 1]"
            )
        prefers_first = p > 0.5 if hard_labels and p != 0.5 else draws[i] < p
        chosen, rejected = pairs[i] if prefers_first else pairs[i][::-1]
        preferences.append(
            Preference(prompts[i], chosen, rejected, p=p if prefers_first else 1 - p)
        )
    return Collected(preferences, dropped_equal, dropped_empty)


def split_preferences(
    preferences: Sequence[Preference], held_out: float = 0.1, *, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """`(train, held out)`: a share of the prompts, with all their pairs, is held out.

    The choice depends on the set of prompts and the seed, not on the order of the pairs, which
    both parts keep.

    Args:
        preferences: of at least two prompts.
        held_out: share of the prompts, in (0, 1); at least one prompt goes to either part.
        seed: of the choice.

    Raises:
        ValueError: held_out is out of range, or there are fewer than two prompts.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"split_preferences: held_out is {held_out}; expected a share in (0, 1)")
    keys = sorted({_key(preference.prompt) for preference in preferences})
    if len(keys) < 2:
        raise ValueError(
            f"split_preferences: {len(preferences)} preferences of {len(keys)} prompts; expected "
            "two prompts or more, none may be in both parts"
        )
    count = min(max(round(held_out * len(keys)), 1), len(keys) - 1)
    chosen = set(random.Random(seed).sample(keys, count))
    parts: tuple[list[Preference], list[Preference]] = ([], [])
    for preference in preferences:
        parts[_key(preference.prompt) in chosen].append(preference)
    return parts


def tokenize_preferences(
    preferences: Sequence[Preference],
    tokenizer: Any,
    *,
    max_length: int | None = None,
) -> list[tuple[list[int], list[int], float]]:
    """`(chosen, rejected, margin)` for `train_reward_model`: prompt, answer and EOS as token ids.

    Prompts are tokenized as `tokenize_prompts` does, answers apart from them, as a policy writes
    them: no token spans both. Of a conversation's answer everything up to the template's last EOS
    stays. An answer that does not end in EOS gets one; a margin of None is 0.

    Args:
        preferences: N of them, strings or conversations.
        tokenizer: a Hugging Face tokenizer with EOS.
        max_length: most tokens of a prompt with its answer; None sets no bound.

    Raises:
        ValueError: what `tokenize_prompts` raises of prompts, a tokenizer without EOS, a chat
            template that writes the prompt otherwise once an answer follows, an answer without
            tokens, answers of equal tokens, or a sequence longer than max_length.
    """
    name = "tokenize_preferences"
    _, eos = check_tokenizer(tokenizer)
    prompts = tokenize_prompts([p.prompt for p in preferences], tokenizer)
    tokenized = []
    for index, preference in enumerate(preferences):
        start = prompts.ids[index]
        both = []
        for which in ("chosen", "rejected"):
            answer = getattr(preference, which)
            if not isinstance(answer, str):
                answer = _rendered_answer(
                    index, preference, answer, prompts.texts[index], tokenizer
                )
            ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
            if not ids:
                raise ValueError(
                    f"{name}: {which} of preference {index} has no tokens ({answer!r}); drop the pair"
                )
            sequence = [*start, *ids] if ids[-1] == eos else [*start, *ids, eos]
            if max_length is not None and len(sequence) > max_length:
                raise ValueError(
                    f"{name}: prompt and {which} of preference {index} have {len(sequence)} tokens, "
                    f"more than max_length {max_length}; drop the pair or raise max_length if the "
                    "model's context allows"
                )
            both.append(sequence)
        if both[0] == both[1]:
            raise ValueError(
                f"{name}: chosen and rejected of preference {index} have the same tokens; drop the "
                "pair, or take a tokenizer that knows their words"
            )
        tokenized.append((both[0], both[1], float(preference.margin or 0.0)))
    return tokenized


def _rendered_answer(
    index: int, preference: Preference, answer: list[dict[str, str]], start: str, tokenizer: Any
) -> str:
    """What the chat template writes after the prompt `start`, up to its last EOS."""
    whole: str = tokenizer.apply_chat_template([*preference.prompt, *answer], tokenize=False)
    if not whole.startswith(start):
        raise ValueError(
            f"tokenize_preferences: the chat template writes the prompt of preference {index} "
            f"otherwise before its answer; expected {start[-40:]!r} at its end in both; write the "
            "preferences as strings"
        )
    text, end, rest = whole[len(start) :].rpartition(tokenizer.eos_token)
    return text + end if end and not rest.strip() else text + end + rest


def label_pairs(
    pairs: Sequence[tuple[str, str, str]],
    path: str | os.PathLike[str],
    *,
    input: Callable[[str], str] = input,
    output: Callable[[str], Any] = print,
) -> int:
    """Ask a person at the terminal which of two answers is better, and keep every answer at once.

    Each answer is on the disk, as a line at the end of `path`, before the next question; Ctrl-C,
    Ctrl-D and "q" stop without loss. Pairs that `path` already holds, in either order, are not
    asked again; skipped ones are.

    Args:
        pairs: (prompt, first, second) texts.
        path: JSON lines, as `read_preferences` reads; made if missing.
        input: asks with a prompt and returns a line.
        output: shows a text.

    Returns:
        How many answers were added.

    Raises:
        OSError: `path` cannot be written.
        ValueError, TypeError: a pair with an empty text or equal ones, or a `path` that holds
            something else; before the first question.
    """
    for index, pair in enumerate(pairs):
        try:
            Preference(*pair)
        except (TypeError, ValueError) as error:
            raise type(error)(f"label_pairs: pair {index}: {error}") from error
    path = os.fspath(path)
    done = set()
    if os.path.exists(path) and os.path.getsize(path):
        done = {_pair_key(p.prompt, p.chosen, p.rejected) for p in read_preferences(path)}
    added = 0
    for number, (prompt, first, second) in enumerate(pairs, 1):
        key = _pair_key(prompt, first, second)
        if key in done:
            continue
        output(f"\n[{number}/{len(pairs)}] {prompt}\n\n1: {first}\n\n2: {second}\n")
        answer = _ask(input, output)
        if answer == "q":
            break
        if answer == "s":
            continue
        chosen, rejected = (first, second) if answer == "1" else (second, first)
        _append(path, _line(Preference(prompt, chosen, rejected)))
        done.add(key)
        added += 1
    output(f"{added} answers added to {path}")
    return added


def _ask(input: Callable[[str], str], output: Callable[[str], Any]) -> str:
    """Ask until the answer is "1", "2", "s" to skip or "q" to quit; return it."""
    while True:
        try:
            answer = input("Which is better? 1, 2, s(kip), q(uit): ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            return "q"
        for known, words in (
            ("1", ("1",)),
            ("2", ("2",)),
            ("s", ("s", "skip")),
            ("q", ("q", "quit")),
        ):
            if answer in words:
                return known
        output(f"{answer!r} is none of 1, 2, s, q")


def _append(path: str, line: str) -> None:
    """Add a line, on the disk when this returns."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            # A file edited by hand may lack its last line feed.
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _line(preference: Preference) -> str:
    row = {name: getattr(preference, name) for name in (*REQUIRED, *OPTIONAL)}
    row = {name: value for name, value in row.items() if value is not None}
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _is_empty(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return not all(message["content"].strip() for message in text)


def _key(text: Text) -> str:
    return json.dumps(text, sort_keys=True)


def _pair_key(prompt: Text, first: Text, second: Text) -> tuple[str, frozenset[str]]:
    return _key(prompt), frozenset((_key(first), _key(second)))
