"""Mini-stories of a known grammar and sentiment, and their ground-truth reward.

The whole RLHF pipeline can be tried without a download: a language model learns the stories, a
reward model learns preferences between its samples, and the grammar itself says what the samples
are really worth. Grammar and words are this file; nothing is taken from a corpus.

    tom went to the park . | he met a friendly dog . it was a wonderful day .
    prompt                 | response

Words are separated by spaces, the full stop is a word. A prompt has no sentiment. A story goes on
for `MIN_SENTENCES` to `MAX_SENTENCES` sentences, each of another frame. Frames hold no recursion,
so the language is finite and a regular expression over words parses it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from ppo_fast.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"

MIN_SENTENCES, MAX_SENTENCES = 2, 3
# What a fault costs, in positive words.
WRONG_SENTENCE_COST, REPEAT_COST, ENDING_COST = 2.0, 1.0, 2.0

HEROES = {
    "he": "tom ben sam max leo jack noah finn",
    "she": "anna lucy mia emma ella rose nora lily",
}
# What HE, HIS, HIM of a frame are where the hero is a "he" and a "she".
PRONOUNS = {
    "he": {"HE": "he", "HIS": "his", "HIM": "him"},
    "she": {"HE": "she", "HIS": "her", "HIM": "her"},
}

NEUTRAL = {
    "ONCE": "morning day afternoon evening night",
    "PLACE": "park forest beach village market garden river school farm castle lake harbor",
    "FRIEND": "friend cousin brother sister uncle aunt neighbor teacher grandpa grandma",
    "WEATHER": "sun sky wind air",
    "MET": "met saw found noticed",
    "CREATURE": "dog cat bird horse rabbit fox goat duck owl bear turtle",
    "GAVE": "gave showed brought",
    "THING": "ball kite lamp ring drum boat hat map box bell book coin",
    "FOOD": "cake soup bread apple pie cheese milk tea",
    "TIME": "day trip visit walk journey",
    "DEGREE": "very really quite so",
}
# Slots with a sentiment: positive words, negative words, neutral words.
VALENCED = {
    "WEATHER_ADJ": (
        "warm bright pleasant mild",
        "cold dark gloomy harsh",
        "dry clear windless",
    ),
    "CREATURE_ADJ": (
        "kind gentle friendly clever brave",
        "cruel angry nasty greedy rude",
        "small brown old young grey",
    ),
    "THING_ADJ": (
        "shiny pretty precious perfect splendid",
        "broken ugly dirty useless rusty",
        "red blue heavy wooden round",
    ),
    "TREATED": (
        "loved hugged thanked helped",
        "hated kicked blamed feared",
        "followed watched called touched",
    ),
    "ACTED": (
        "laughed danced sang smiled",
        "cried argued fought screamed",
        "walked talked waited rested",
    ),
    "MANNER": (
        "happily merrily joyfully",
        "sadly angrily nervously",
        "quietly slowly together",
    ),
    "TASTE": (
        "sweet delicious tasty fresh",
        "bitter rotten stale burnt",
        "salty plain hot",
    ),
    "FEELING": (
        "happy glad proud hopeful thankful",
        "sad lonely scared upset worried",
        "tired hungry sleepy",
    ),
    "TIME_ADJ": (
        "wonderful lovely amazing beautiful great",
        "terrible awful horrible dreadful bad",
        "long short busy ordinary",
    ),
}

# Upper case: a slot. A question mark: may be left out. "a" is "an" before a vowel.
OPENINGS = (
    "HERO went to the PLACE .",
    "HERO lived near the PLACE .",
    "one ONCE HERO walked to the PLACE .",
    "one ONCE HERO was at the PLACE with HIS FRIEND .",
    "HERO and HIS FRIEND were in the PLACE .",
)
# In the order in which a generated story tells them.
FRAMES = (
    "the WEATHER was DEGREE? WEATHER_ADJ .",
    "HE MET a CREATURE_ADJ? CREATURE .",
    "the CREATURE was DEGREE? CREATURE_ADJ .",
    "HE TREATED the CREATURE_ADJ? CREATURE .",
    "HIS FRIEND GAVE HIM a THING_ADJ? THING .",
    "HE and HIS FRIEND ACTED MANNER? .",
    "the FOOD tasted DEGREE? TASTE .",
    "it was a DEGREE? TIME_ADJ TIME .",
    "HE felt FEELING and FEELING .",
    "then HE went home DEGREE? FEELING .",
)

POSITIVE = frozenset(word for words in VALENCED.values() for word in words[0].split())
NEGATIVE = frozenset(word for words in VALENCED.values() for word in words[1].split())
# A story's mood is the probability that a word with a sentiment is a positive one.
MOODS = (0.1, 0.5, 0.9)
NEUTRAL_SHARE, OPTIONAL_SHARE = 0.25, 0.5


class Story(NamedTuple):
    """A story in two parts, and its number of positive words less its number of negative ones."""

    prompt: str
    response: str
    sentiment: int

    @property
    def text(self) -> str:
        """Prompt and response."""
        return f"{self.prompt} {self.response}"


class GoldTerms(NamedTuple):
    """What `gold_reward` adds up.

    Attributes:
        sentiment: distinct positive less distinct negative words in sentences that count.
        wrong_sentences: sentences outside the grammar, past the last a story may have, or missing.
        repeats: words with a sentiment, and frames of sentences, that came before.
        ended: whether the response ends by EOS, right after a full stop.
    """

    sentiment: int
    wrong_sentences: int
    repeats: int
    ended: bool

    @property
    def reward(self) -> float:
        """The sentiment less the cost of every fault."""
        return (
            self.sentiment
            - WRONG_SENTENCE_COST * self.wrong_sentences
            - REPEAT_COST * self.repeats
            - ENDING_COST * (not self.ended)
        )

    @property
    def well_formed(self) -> bool:
        """Whether it is a story of the grammar, whatever its sentiment."""
        return self.wrong_sentences == 0 and self.repeats == 0 and self.ended


def generate_stories(n: int, seed: int) -> list[Story]:
    """Draw stories: positive, mixed and negative ones in equal shares.

    Args:
        n: how many.
        seed: the same seed gives the same stories, the first of a longer list included.

    Raises:
        ValueError: n is not positive.
    """
    if n < 1:
        raise ValueError(f"generate_stories: n is {n}; expected at least 1")
    rng = random.Random(seed)
    return [_story(rng) for _ in range(n)]


def generate_prompts(n: int, seed: int) -> list[str]:
    """Draw openings only, as `generate_stories` does."""
    if n < 1:
        raise ValueError(f"generate_prompts: n is {n}; expected at least 1")
    rng = random.Random(seed)
    return [_opening(rng)[0] for _ in range(n)]


def gold_reward(prompt: str, response: str) -> float:
    """The true worth of a response, of which a reward model learns an approximation.

    Positive words count 1, negative ones -1, only in sentences of the grammar and only once each.
    A wrong, surplus or missing sentence costs 2, a repetition 1, a missing end 2: praise heaped up
    without grammar is worth less than a neutral story. Well-formed stories lie within about +-6.

    Args:
        prompt: an opening of this file's grammar; it says which pronouns are right.
        response: decoded *with* special tokens, since a response that was cut and one that ended
            differ by nothing but `EOS`. Other special tokens are words of no sentence.

    Raises:
        ValueError: the prompt is not an opening.
    """
    return gold_terms(prompt, response).reward


def gold_terms(prompt: str, response: str) -> GoldTerms:
    """`gold_reward` before it is added up; arguments and errors are the same."""
    parse = _sentence_pattern(_pronoun(prompt)).fullmatch
    words = response.split()
    ended = words[-2:] == [".", EOS]
    if words and words[-1] == EOS:
        words.pop()
    sentences = _sentences(words)
    seen: set[str] = set()
    sentiment = repeats = 0
    wrong = max(0, MIN_SENTENCES - len(sentences))
    for number, sentence in enumerate(sentences):
        match = parse(_joined(sentence))
        counts = match is not None and number < MAX_SENTENCES
        wrong += not counts
        marks = [word for word in sentence if word in POSITIVE or word in NEGATIVE]
        if match is not None:
            assert match.lastgroup is not None
            marks.append(match.lastgroup)
        for mark in marks:
            if mark in seen:
                repeats += 1
            elif counts:
                sentiment += (mark in POSITIVE) - (mark in NEGATIVE)
            seen.add(mark)
    return GoldTerms(sentiment, wrong, repeats, ended)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with an id for every word of the grammar and for pad, bos, eos and unk.

    As with Llama's, `tokenizer(text)` puts BOS in front and no EOS behind: encode a prompt so, and
    a response with `add_special_tokens=False`.

    Raises:
        ImportError: transformers or tokenizers is missing.
    """
    feature = "the story tokenizer"
    tokenizers = require("tokenizers", "llm", feature)
    transformers = require("transformers", "llm", feature)
    vocabulary = {word: index for index, word in enumerate((PAD, BOS, EOS, UNK, *_all_words()))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode_story(tokenizer: PreTrainedTokenizerFast, story: Story) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, BOS first, and of the response, EOS last."""
    response = tokenizer(story.response, add_special_tokens=False)["input_ids"]
    return tokenizer(story.prompt)["input_ids"], [*response, tokenizer.eos_token_id]


def gold_reward_fn(
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[float]]:
    """`gold_reward` of token ids, as a reward function of a trainer.

    It takes ids and not texts: trainers leave EOS out of texts, and the end counts.
    """

    def gold(
        prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        return [
            gold_reward(
                str(tokenizer.decode(list(prompt))), str(tokenizer.decode(list(completion)))
            )
            for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        ]

    return gold


def _story(rng: random.Random) -> Story:
    prompt, pronoun = _opening(rng)
    mood = rng.choice(MOODS)
    count = rng.randint(MIN_SENTENCES, MAX_SENTENCES)
    frames = sorted(rng.sample(range(len(FRAMES)), count))
    used: set[str] = set()
    # A story is about one creature.
    fixed = PRONOUNS[pronoun] | {"CREATURE": _neutral_word("CREATURE", rng)}
    words: list[str] = []
    for frame in frames:
        for slot in FRAMES[frame].split():
            if slot.endswith("?") and rng.random() > OPTIONAL_SHARE:
                continue
            slot = slot.removesuffix("?")
            if slot in fixed:
                words.append(fixed[slot])
            elif slot in VALENCED:
                words.append(_valenced_word(slot, mood, used, rng))
            else:
                words.append(_neutral_word(slot, rng) if slot in NEUTRAL else slot)
    sentiment = sum((word in POSITIVE) - (word in NEGATIVE) for word in words)
    return Story(prompt, " ".join(_with_articles(words)), sentiment)


def _opening(rng: random.Random) -> tuple[str, str]:
    """An opening and its hero's pronoun."""
    pronoun = rng.choice(tuple(PRONOUNS))
    fixed = PRONOUNS[pronoun] | {"HERO": rng.choice(HEROES[pronoun].split())}
    words = [
        fixed[slot] if slot in fixed else _neutral_word(slot, rng) if slot in NEUTRAL else slot
        for slot in rng.choice(OPENINGS).split()
    ]
    return " ".join(words), pronoun


def _neutral_word(slot: str, rng: random.Random) -> str:
    return rng.choice(NEUTRAL[slot].split())


def _valenced_word(slot: str, mood: float, used: set[str], rng: random.Random) -> str:
    positive, negative, neutral = VALENCED[slot]
    words = positive if rng.random() < mood else negative
    if rng.random() < NEUTRAL_SHARE:
        words = neutral
    word = rng.choice([word for word in words.split() if word not in used])
    used.add(word)
    return word


def _with_articles(words: list[str]) -> list[str]:
    following = [*words[1:], "."]
    return [
        "an" if word == "a" and after[0] in "aeiou" else word
        for word, after in zip(words, following, strict=True)
    ]


def _sentences(words: list[str]) -> list[list[str]]:
    """Cut after every full stop; what follows the last one is a sentence too, an unfinished one."""
    sentences: list[list[str]] = [[]]
    for word in words:
        sentences[-1].append(word)
        if word == ".":
            sentences.append([])
    return sentences if sentences[-1] else sentences[:-1]


def _pronoun(prompt: str) -> str:
    text = _joined(prompt.removeprefix(BOS).split())
    for pronoun in PRONOUNS:
        if _opening_pattern(pronoun).fullmatch(text):
            return pronoun
    raise ValueError(
        f"gold_reward: prompt is {prompt!r}; expected an opening of the stories' grammar, such as "
        f"{generate_prompts(1, 0)[0]!r}; take prompts from generate_stories or generate_prompts"
    )


@cache
def _opening_pattern(pronoun: str) -> re.Pattern[str]:
    return re.compile("|".join(_expression(opening, pronoun) for opening in OPENINGS))


@cache
def _sentence_pattern(pronoun: str) -> re.Pattern[str]:
    """One alternative a frame; the group that matched names it."""
    return re.compile(
        "|".join(
            f"(?P<frame{number}>{_expression(frame, pronoun)})"
            for number, frame in enumerate(FRAMES)
        )
    )


def _expression(frame: str, pronoun: str) -> str:
    fixed = PRONOUNS[pronoun] | {"HERO": "|".join(HEROES[pronoun].split())}
    parts = []
    for slot in frame.split():
        name = slot.removesuffix("?")
        if name == "a":
            words = "a(?= [^aeiou])|an(?= [aeiou])"
        elif name in fixed:
            words = fixed[name]
        else:
            words = "|".join(map(re.escape, _words_of(name)))
        parts.append(f"(?:(?:{words}) )" + ("?" if slot != name else ""))
    return "".join(parts)


def _joined(words: list[str]) -> str:
    """What the patterns match: a space after every word, the last one too."""
    return "".join(f"{word} " for word in words)


def _words_of(slot: str) -> list[str]:
    if slot in VALENCED:
        return " ".join(VALENCED[slot]).split()
    return NEUTRAL.get(slot, slot).split()


def _all_words() -> list[str]:
    words = {word for names in HEROES.values() for word in names.split()}
    words |= {word for pronouns in PRONOUNS.values() for word in pronouns.values()} | {"an"}
    for frame in (*OPENINGS, *FRAMES):
        for slot in frame.split():
            name = slot.removesuffix("?")
            if name != "HERO" and name not in PRONOUNS["he"]:
                words.update(_words_of(name))
    return sorted(words)
