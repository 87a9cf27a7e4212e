"""The story corpus: its grammar against hand-written sentences, its reward against hand-made sums."""

from __future__ import annotations

import random
import statistics

import pytest

from ppo_fast.llm.stories import (
    EOS,
    NEGATIVE,
    POSITIVE,
    VALENCED,
    encode_story,
    generate_prompts,
    generate_stories,
    gold_reward,
    gold_reward_fn,
    gold_terms,
    make_tokenizer,
)

TOM = "tom went to the park ."
ANNA = "one morning anna was at the lake with her friend ."


def terms(text, prompt=TOM):
    return gold_terms(prompt, text)


@pytest.fixture(scope="module")
def stories():
    return generate_stories(2000, seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    return make_tokenizer()


def test_same_seed_same_stories_and_a_longer_list_begins_with_the_shorter():
    assert generate_stories(50, seed=3) == generate_stories(200, seed=3)[:50]
    assert generate_stories(50, seed=3) != generate_stories(50, seed=4)
    assert generate_prompts(5, seed=1) == generate_prompts(9, seed=1)[:5]


def test_every_generated_story_parses_and_its_reward_is_its_sentiment(stories):
    for story in stories:
        found = terms(f"{story.response} {EOS}", story.prompt)
        assert found.well_formed, story
        assert found.reward == found.sentiment == story.sentiment


def test_sentiment_is_mixed_around_zero_with_room_above(stories):
    gold = [story.sentiment for story in stories]
    mean, spread = statistics.mean(gold), statistics.pstdev(gold)
    assert abs(mean) < 0.2
    assert spread > 1.2
    assert max(gold) > mean + 2 * spread


def test_responses_are_short_and_the_vocabulary_small(stories, tokenizer):
    lengths = [len(encode_story(tokenizer, story)[1]) for story in stories]
    assert min(lengths) >= 8
    assert max(lengths) <= 32
    assert 150 <= len(tokenizer) <= 400


def test_no_word_is_both_kinds_or_neutral_too():
    neutral = {word for words in VALENCED.values() for word in words[2].split()}
    assert not POSITIVE & NEGATIVE
    assert not neutral & (POSITIVE | NEGATIVE)


@pytest.mark.parametrize(
    "sentence",
    [
        "the sun was warm .",
        "the sun was very warm .",
        "he met a dog .",
        "he met an owl .",
        "he met an old owl .",
        "he found a kind owl .",
        "the dog was so cruel .",
        "he hugged the gentle bear .",
        "his aunt gave him an ugly hat .",
        "his uncle brought him a kite .",
        "he and his brother danced happily .",
        "he and his brother talked .",
        "the soup tasted quite bitter .",
        "it was an awful trip .",
        "it was a really awful trip .",
        "he felt happy and tired .",
        "then he went home sad .",
    ],
)
def test_sentences_of_the_grammar_parse(sentence):
    # With a second sentence of another frame, as a story has two.
    other = "the wind was dry ." if "sun" not in sentence else "he met a dog ."
    assert terms(f"{sentence} {other} {EOS}").well_formed


@pytest.mark.parametrize(
    "sentence",
    [
        ".",
        "the sun was warm",  # no full stop, so it runs into the next
        "sun was warm .",
        "the sun warm .",
        "the sun was was warm .",
        "the sun was very very warm .",
        "the sun was warm warm .",
        "the sun was happy .",
        "the dog was delicious .",
        "he met a owl .",
        "he met an dog .",
        "he met an kind owl .",
        "he met a old dog .",
        "she met a dog .",
        "her aunt gave him a hat .",
        "his aunt gave her a hat .",
        "he and her brother danced .",
        "he felt happy .",
        "he felt happy and .",
        "he felt happy and glad and proud .",
        "wonderful wonderful wonderful .",
        "thesun was warm .",
        "the sunwas warm .",
        "<unk> sun was warm .",
        "the sun was <pad> warm .",
        "<bos> the sun was warm .",
        "tom went to the park .",
    ],
)
def test_sentences_outside_the_grammar_do_not_parse(sentence):
    found = terms(f"{sentence} it was a long trip . then he went home hungry . {EOS}")
    assert found.wrong_sentences == 1


def test_pronouns_follow_the_hero_of_the_prompt():
    text = f"she met a dog . she and her cousin sang . {EOS}"
    assert terms(text, ANNA).well_formed
    assert terms(text, TOM).wrong_sentences == 2
    assert terms(text, f"<bos> {ANNA}").well_formed


def test_corrupted_stories_do_not_parse(stories):
    rng = random.Random(0)
    for story in stories[:500]:
        words = story.response.split()
        place = rng.randrange(len(words) - 1)
        doubled = [*words[: place + 1], *words[place:]]
        backwards = [*reversed(words[:-1]), "."]
        for corrupted in (doubled, backwards):
            found = terms(" ".join([*corrupted, EOS]), story.prompt)
            assert not found.well_formed, corrupted
            assert found.reward < max(1, story.sentiment)


def test_reward_is_the_sum_of_its_terms_by_hand():
    # wonderful +1, happy +1, glad +1
    assert gold_reward(TOM, f"it was a wonderful trip . he felt happy and glad . {EOS}") == 3
    # cruel -1, sad -1, kind +1
    text = f"he met a cruel dog . the dog was kind . then he went home sad . {EOS}"
    assert gold_reward(TOM, text) == -1
    assert gold_reward(TOM, f"he met a dog . the soup tasted plain . {EOS}") == 0


def test_praise_without_grammar_is_worth_less_than_a_neutral_story():
    for soup in (
        "wonderful happy kind lovely sweet glad .",
        "happy . glad . kind . lovely .",
        "he felt happy and happy and happy and happy .",
        "it was a wonderful wonderful wonderful day .",
    ):
        assert gold_reward(TOM, f"{soup} {EOS}") < 0, soup


def test_repetition_costs():
    once = f"he met a kind dog . it was a great day . {EOS}"
    assert gold_reward(TOM, once) == 2
    # "kind" again: not counted, and one less.
    again = f"he met a kind dog . the dog was kind . it was a great day . {EOS}"
    assert gold_reward(TOM, again) == 1
    # The frame again: "lovely" counts, and one less.
    frame = f"it was a great day . it was a lovely trip . {EOS}"
    assert gold_reward(TOM, frame) == 2 - 1
    both = f"it was a great day . it was a great day . {EOS}"
    assert gold_reward(TOM, both) == 1 - 2


def test_sentences_past_the_third_cost_and_do_not_count():
    three = "he met a kind dog . it was a great day . he felt happy and glad ."
    four = f"{three} the soup tasted sweet ."
    assert gold_reward(TOM, f"{three} {EOS}") == 4
    assert gold_reward(TOM, f"{four} {EOS}") == 4 - 2
    assert gold_reward(TOM, f"it was a great day . {EOS}") == 1 - 2


def test_the_end_is_eos_after_a_full_stop():
    story = "he met a kind dog . it was a great day ."
    assert gold_reward(TOM, f"{story} {EOS}") == 2
    assert gold_reward(TOM, story) == 0
    cut = f"{story} he felt"
    assert terms(cut) == (2, 1, 0, False)
    assert terms(f"{cut} {EOS}") == (2, 1, 0, False)
    assert terms(EOS).reward == terms("").reward - 0 == -6


def test_a_prompt_outside_the_grammar_is_refused():
    for prompt in ("", "once upon a time .", "tom went to the park", "tomwent to the park ."):
        with pytest.raises(ValueError, match="expected an opening"):
            gold_reward(prompt, EOS)


def test_number_of_stories_is_checked():
    with pytest.raises(ValueError, match="n is 0"):
        generate_stories(0, seed=0)
    with pytest.raises(ValueError, match="n is -1"):
        generate_prompts(-1, seed=0)


def test_special_tokens_are_distinct_and_every_word_is_known(stories, tokenizer):
    special = {
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    }
    assert len(special) == 4
    for story in stories:
        prompt, response = encode_story(tokenizer, story)
        assert tokenizer.unk_token_id not in prompt + response
        assert prompt[0] == tokenizer.bos_token_id
        assert response[-1] == tokenizer.eos_token_id
    assert tokenizer("zebra", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_tokens_decode_to_the_same_text(stories, tokenizer):
    for story in stories[:200]:
        prompt, response = encode_story(tokenizer, story)
        assert tokenizer.decode(prompt + response, skip_special_tokens=True) == story.text
        assert tokenizer.decode(response) == f"{story.response} {EOS}"


def test_the_tokenizer_survives_saving(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TOM)["input_ids"] == tokenizer(TOM)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_gold_of_token_ids_sees_the_end(stories, tokenizer):
    story = stories[0]
    prompt, response = encode_story(tokenizer, story)
    gold = gold_reward_fn(tokenizer)
    values = gold(prompt_ids=[prompt, prompt], completion_ids=[response, response[:-1]])
    assert values == [story.sentiment, story.sentiment - 2]
