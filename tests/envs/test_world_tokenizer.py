"""The world's tokenizer: lossless for every text, and the same ids for a name wherever it stands."""

import copy
import hashlib
import itertools
import pickle
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from searchqa_envs.dialects import DIALECTS, SEARCH_R1_INVALID, neutralise
from searchqa_envs.errors import InvalidSegmentError
from searchqa_envs.tokenizers import ByteTokenizer, Tokenizer, build_tokenizer
from searchqa_envs.tokenizers.byte import TAGS
from searchqa_envs.tokenizers.world import PHRASES, VOCABULARY, WorldTokenizer
from searchqa_envs.world import SYLLABLES, WorldSource
from searchqa_envs.world.names import SPLITS, Draws, draw_names
from searchqa_retrievers import Passage

tokenizer = WorldTokenizer()
texts = st.text(st.characters(exclude_categories=["Cs"]))
fragments = st.lists(
    st.one_of(
        texts,
        st.sampled_from(
            [*TAGS, *PHRASES, *SYLLABLES, " ", "\n", " Mako", "Mako", " film", "'s", " 's", "<", "</", "Doc 1(Title:", "<pad>", "<eos>"]
        ),
    )
).map("".join)


def shown(text: str) -> list[str]:
    return [piece.decode() for piece in tokenizer.pieces(tokenizer.encode(text))]


@settings(max_examples=300)
@given(st.one_of(texts, fragments))
@example("<search>" * 3 + "\n\n\r\n\x00 'sx 's's")
@example("".join(PHRASES))
@example("naïve 東京 😀 ́")
def test_every_text_comes_back_unchanged(text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.pad_id not in ids
    assert tokenizer.eos_id not in ids
    assert b"".join(tokenizer.pieces(ids)) == text.encode()


@given(st.text())
def test_a_lone_surrogate_becomes_the_replacement_character(text):
    assert tokenizer.decode(tokenizer.encode(text)) == re.sub("[\ud800-\udfff]", "\ufffd", text)


@given(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
def test_any_ids_of_the_vocabulary_decode(ids):
    assert tokenizer.decode(ids) == b"".join(VOCABULARY[token] for token in ids).decode("utf-8", "replace")


@pytest.mark.parametrize("token", [-1, tokenizer.vocab_size, 10**9])
def test_an_id_outside_the_vocabulary_is_an_error(token):
    with pytest.raises(InvalidSegmentError, match=str(tokenizer.vocab_size)):
        tokenizer.decode([5, token])


no_markup = fragments.map(lambda text: text.replace("<", ""))


@given(no_markup, st.sampled_from(TAGS), no_markup)
def test_a_tag_is_one_id_and_the_text_round_it_is_as_without_it(before, tag, after):
    (token,) = tokenizer.encode(tag)
    assert tokenizer.encode(before + tag + after) == [*tokenizer.encode(before), token, *tokenizer.encode(after)]


def test_the_vocabulary_is_fixed():
    """A change makes checkpoints unreadable: give the tokenizer a new name with it."""
    assert (tokenizer.name, tokenizer.vocab_size, hashlib.sha256(b"\n".join(VOCABULARY)).hexdigest()[:16]) == FIXED
    assert tokenizer.vocab_size < 1000
    assert len(set(VOCABULARY)) == len(VOCABULARY) - 1  # padding and end of sequence are both empty
    assert VOCABULARY[tokenizer.pad_id] == VOCABULARY[tokenizer.eos_id] == b""
    assert set(TAGS) < set(tokenizer.reserved)


def test_it_is_a_tokenizer_and_can_be_shared():
    assert isinstance(tokenizer, Tokenizer)
    assert isinstance(build_tokenizer("world"), WorldTokenizer)
    assert copy.deepcopy(tokenizer) is tokenizer
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer == WorldTokenizer()
    assert hash(tokenizer) == hash(WorldTokenizer())
    assert tokenizer != ByteTokenizer()


def test_all_names_are_their_syllables():
    for first, second in itertools.product(SYLLABLES, repeat=2):
        assert shown(f" {first.capitalize()}{second}") == [f" {first.capitalize()}", second]
        assert shown(f"{first.capitalize()}{second}") == [first.capitalize(), second]
    for name in draw_names(Draws(1), 20_000, "train"):
        assert shown(f" {name}") == [f" {name[:2]}", *(name[i : i + 2] for i in range(2, len(name), 2))]


@pytest.mark.parametrize("split", SPLITS)
def test_a_name_has_the_same_ids_wherever_it_stands(split):
    for name in draw_names(Draws(2), 50, split):
        ids = tokenizer.encode(f" {name}")
        places = [
            *("<search> {} </search>", "<think> director {} </think>", "<answer> {} </answer>", "<|begin_of_query|> {}<|end_of_query|>"),
            *("Doc 1(Title: {}) {} is a film . director {} .", "what is {} 's director ?", "\n {}\n"),
            *("{} was directed by {}.", "Who directed {}, {} and {}?", "is it {}'s star?"),
        ]
        for place in places:
            text = " " + place.replace("{}", name)
            found = tokenizer.encode(text)
            hits = sum(found[i : i + len(ids)] == ids for i in range(len(found)))
            assert hits == text.count(name)


def test_pages_questions_and_replies_cost_few_tokens():
    assert shown("Doc 1(Title: Mako) Mako is a film . director Tavo . star Riku .") == [
        "Doc 1(Title:", " Ma", "ko", ")", " Ma", "ko", " is", " a", " film", " .", " director", " Ta", "vo", " .", " star", " Ri", "ku", " .",
    ]  # fmt: skip
    assert shown("what is Mako 's director 's birthplace ?\n") == [
        "what",
        " is",
        " Ma",
        "ko",
        " 's",
        " director",
        " 's",
        " birthplace",
        " ?",
        "\n",
    ]
    assert len(tokenizer.encode(SEARCH_R1_INVALID)) <= 12
    for dialect in DIALECTS.values():
        for prompt in ("published", "bare"):
            assert len(tokenizer.encode(dialect.render_question(prompt, "what is Mako 's director ?"))) <= 50


@pytest.mark.parametrize("preset", ["easy", "medium", "hard"])
@pytest.mark.parametrize("style", ["short", "natural"])
@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_the_worlds_texts_need_no_letter_spelled_out(preset, style, dialect):
    letters = {bytes([value]) for value in range(256) if chr(value).isalpha() or value >= 128}
    for number in range(3):
        world = WorldSource("dev", preset, style=style).world(number)
        texts = [question.question for question in world.questions]
        texts += [dialect.document_text(1, page, quoted_titles=True) for page in world.passages]
        for text in texts:
            assert not letters & set(tokenizer.pieces(tokenizer.encode(text)))


def test_a_neutralised_tag_is_no_tag():
    passage = Passage("1", "Mako", "".join(TAGS) + "<pad><eos>")
    text = neutralise(passage.text, tokenizer.reserved)
    assert not set(tokenizer.encode(text)) & {token for tag in TAGS for token in tokenizer.encode(tag)}


def test_a_page_is_encoded_in_microseconds():
    text = "\n\n<information>Doc 1(Title: Mako) Mako is a film . director Tavo . star Riku .</information>\n\n"
    tokenizer.encode(text)
    started = time.perf_counter()
    for _ in range(2000):
        tokenizer.encode(text)
    assert (time.perf_counter() - started) / 2000 < 200e-6  # about 10 us on an idle core


def test_memory_stays_bounded():
    fresh = WorldTokenizer()
    for number in range(0x1000, 0x1000 + 60_000):
        fresh.encode(chr(number) if not 0xD800 <= number < 0xE000 else "a" * (number % 90))
    assert len(fresh._memo) <= 50_000


FIXED = ("world-1", 554, "c79a448f17aa762f")
