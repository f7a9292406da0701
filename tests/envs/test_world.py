"""Generated worlds: what holds for every seed."""

import copy
import dataclasses
import hashlib
import json
import pickle
import random
import re
import subprocess
import sys
import time
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import Stemmer
from hypothesis import given, settings
from hypothesis import strategies as st

import searchqa_envs  # noqa: F401  registers the ids
from searchqa_envs.errors import ConfigurationError, UnknownQuestionError
from searchqa_envs.normalise import normalise_squad
from searchqa_envs.world import PRESETS, RELATIONS, SYLLABLES, World, WorldPreset, WorldSource, split_of
from searchqa_envs.world.names import Draws, draw_names
from searchqa_envs.world.schema import template_texts
from searchqa_retrievers import RetrieverError, SearchRequest

SEEDS = st.integers(0, 2**40)
worlds = st.builds(
    lambda preset, split, seed, number, style: WorldSource(split, preset, world_seed=seed, num_worlds=10**9, style=style).world(number),
    st.sampled_from(["easy", "medium", "hard"]),
    st.sampled_from(["train", "dev", "test"]),
    SEEDS,
    st.integers(0, 10**9 - 1),
    st.sampled_from(["short", "natural"]),
)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def source_of(world: World) -> tuple[WorldSource, int]:
    """The source that has this world, and its number."""
    seed, number = map(int, world.prefix.split("-")[-2:])
    return WorldSource(world.split, world.preset, world_seed=seed, num_worlds=number + 1), number


def answer_from_chain(question) -> str:
    """What an agent that can read, compare and follow would say: worked out from the objects that the chain reads, not from the answers."""
    chain, kind, hops = question.metadata["chain"], question.metadata["type"], question.metadata["hops"]
    if kind == "bridge" or (kind == "comparison" and hops > 2):
        return chain[-1]["object"]
    if kind == "comparison":
        first, second = chain
        assert first["relation"] == second["relation"]
        lower, higher = sorted(chain, key=lambda hop: int(hop["object"]))
        assert int(lower["object"]) < int(higher["object"])
        word = re.search(r"older|newer|younger|smaller|larger", question.question)[0]
        return (lower if word in ("older", "smaller") else higher)["also"]["object"]
    # yes/no: the two sides end where the next query is not the object just read
    ends = [i for i in range(hops) if i == hops - 1 or chain[i + 1]["query"] != chain[i]["object"]]
    assert len(ends) == 2
    return "yes" if chain[ends[0]]["object"] == chain[ends[1]]["object"] else "no"


# Search


@settings(max_examples=40, deadline=None)
@given(worlds)
def test_the_oracle_finds_every_page_of_its_chain_and_is_always_right(world):
    source, _ = source_of(world)
    retriever = source.build_retriever({"name": "bm25"})
    pages = {page.title: page for page in world.passages}
    for question in world.questions:
        chain = question.metadata["chain"]
        found = retriever.search([SearchRequest(hop["query"], source.top_k, filters=source.filters(question)) for hop in chain])
        assert len(chain) == question.metadata["hops"]
        for hop, hits in zip(chain, found, strict=True):
            assert hop["title"] in [hit.passage.title for hit in hits[: source.top_k]]
            text = pages[hop["title"]].text
            assert hop["object"] in re.findall(r"\w+", text)
            assert hop["query"] in re.findall(r"\w+", text)
            if "also" in hop:
                assert hop["also"]["object"] in re.findall(r"\w+", text)
        assert answer_from_chain(question) == question.golden_answers[0]
        assert question.metadata["supporting_titles"] == [hop["title"] for hop in chain]
        ids = {page.id: page.title for page in world.passages}
        assert [ids[id_] for id_ in question.metadata["supporting_ids"]] == question.metadata["supporting_titles"]


@settings(max_examples=20, deadline=None)
@given(worlds, st.floats(0, 5), st.floats(0, 1))
def test_the_page_of_a_name_or_alias_comes_first_whatever_k1_and_b(world, k1, b):
    source, number = source_of(world)
    retriever = source.build_retriever({"name": "bm25", "k1": k1, "b": b})
    entities = [(name, title) for title, alias in zip(world.names, world.aliases, strict=True) for name in (title, alias) if name]
    hits = retriever.search([SearchRequest(name, 1, filters={"world": str(number)}) for name, _ in entities])
    # with k1 = 0 the number of mentions does not count and every page that has the word is equal
    assert k1 < 1e-3 or [result[0].passage.title for result in hits] == [title for _, title in entities]


@settings(max_examples=20, deadline=None)
@given(worlds)
def test_a_page_says_its_own_name_more_often_and_more_densely_than_any_other(world):
    """For a query of one name, BM25 ranks a page above another with more mentions and a larger share of mentions, for every k1 > 0 and b."""
    stop_words = {"is", "a", "the", "of", "was", "by", "in", "for", "as"}
    for removed in (set(), stop_words):
        own: dict[str, tuple[int, float]] = {}
        elsewhere: dict[str, list[tuple[int, float]]] = {}
        aliases = dict(zip(world.names, world.aliases, strict=True))
        names = {name.lower() for pair in aliases.items() for name in pair if name}
        for page in world.passages:
            words = [word for word in words_of(f"{page.title} {page.text}") if word not in removed]
            mine = {page.title.lower(), aliases[page.title].lower()}
            for word, count in Counter(words).items():
                if word in mine:
                    own[word] = (count, count / len(words))
                elif word in names:
                    elsewhere.setdefault(word, []).append((count, count / len(words)))
        for name in names:
            for count, share in elsewhere.get(name, []):
                assert count == 1
                assert own[name][0] > count
                assert own[name][1] > share


# Questions


@settings(max_examples=40, deadline=None)
@given(worlds)
def test_no_answer_leaks_from_its_question(world):
    for question in world.questions:
        if question.metadata["type"] == "yes_no":
            assert question.golden_answers in (("yes",), ("no",))
            continue
        asked = normalise_squad(question.question).split() + words_of(question.question)
        for answer in question.golden_answers:
            assert normalise_squad(answer) not in asked
        first = question.metadata["chain"][0]["query"]
        assert first in words_and_names(question.question)


def words_and_names(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


@settings(max_examples=40, deadline=None)
@given(worlds)
def test_questions_are_distinct_and_yes_and_no_are_equally_frequent_in_every_form(world):
    assert len({question.question for question in world.questions}) == len(world.questions)
    assert len({question.id for question in world.questions}) == len(world.questions)
    forms: dict[tuple, Counter] = {}
    for question in world.questions:
        if question.metadata["type"] == "yes_no":
            relations = tuple(hop["relation"] for hop in question.metadata["chain"])
            forms.setdefault((question.metadata["hops"], relations), Counter())[question.golden_answers[0]] += 1
    assert all(counts["yes"] == counts["no"] for counts in forms.values())


@settings(max_examples=40, deadline=None)
@given(worlds)
def test_a_world_has_the_questions_of_its_preset(world):
    counts = Counter((question.metadata["type"], question.metadata["hops"]) for question in world.questions)
    assert counts == {(kind, hops): number for kind, hops, number in world.preset.questions}
    half = world.questions[: len(world.questions) // 2]
    for (kind, hops), number in counts.items():  # any beginning is a fair sample
        assert abs(sum((q.metadata["type"], q.metadata["hops"]) == (kind, hops) for q in half) - number / 2) <= 1
    assert {question.metadata["level"] for question in world.questions} == {world.preset.name}


def solve_short(question: str, pages: dict[str, dict[str, list[str]]], pages_of: dict[str, list[str]]) -> str:
    """Answers a question of the short style from the pages' text alone, requiring that every step has exactly one outcome."""

    def follow(x: str, relations: list[str]) -> str:
        for relation in relations:
            (title,) = pages_of[x]
            (x,) = pages[title][relation]
        return x

    words = question.removesuffix(" ?")
    if match := re.fullmatch(r"what is (.*)", words):
        start, *relations = match[1].split(" 's ")
        return follow(start, relations)
    if match := re.fullmatch(r"is (.*) the same as (.*)", words):
        left, right = (side.split(" 's ") for side in match.groups())
        return "yes" if follow(left[0], left[1:]) == follow(right[0], right[1:]) else "no"
    match = re.fullmatch(r"of (\w+) and (\w+) , what is the (\w+) one 's (.*)", words)
    first, second, adjective, relations = match.groups()
    number = "population" if adjective in ("smaller", "larger") else "year"
    lower, higher = sorted((first, second), key=lambda x: int(follow(x, [number])))
    return follow(lower if adjective in ("older", "smaller") else higher, relations.split(" 's "))


@settings(max_examples=40, deadline=None)
@given(worlds.filter(lambda world: world.preset.style == "short"))
def test_each_question_has_one_answer_to_be_found_in_the_text(world):
    pages: dict[str, dict[str, list[str]]] = {}
    pages_of: dict[str, list[str]] = {}
    relation_words = {relation.word for relation in RELATIONS.values()}
    for page in world.passages:
        opening, *facts = page.text.removesuffix(" .").split(" . ")
        name, *rest = opening.split()
        pages_of.setdefault(name, []).append(page.title)
        if rest[0] == "also":
            pages_of.setdefault(rest[1], []).append(page.title)
        for fact in facts:
            *_, relation, value = fact.split()
            assert relation in relation_words
            pages.setdefault(page.title, {}).setdefault(relation, []).append(value)
    for question in world.questions:
        assert solve_short(question.question, pages, pages_of) == question.golden_answers[0]


@settings(max_examples=40, deadline=None)
@given(worlds)
def test_the_objects_on_one_page_are_distinct(world):
    names = {name for name in (*world.names, *world.aliases) if name}
    aliases = dict(zip(world.names, world.aliases, strict=True))
    titles = {alias: name for name, alias in aliases.items() if alias}
    for page in world.passages:
        mentioned = [titles.get(word, word) for word in words_and_names(page.text) if word in names]
        counts = Counter(mentioned)
        counts.pop(page.title)
        assert set(counts.values()) <= {1}


# Names and splits


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["easy", "medium", "hard"]), SEEDS, st.integers(0, 1000))
def test_splits_share_no_name(preset, seed, number):
    used = {}
    for split in ("train", "dev", "test"):
        world = WorldSource(split, preset, world_seed=seed, num_worlds=1001).world(number)
        names = [name for name in (*world.names, *world.aliases) if name]
        assert len(names) == len(set(names))
        assert {split_of(name) for name in names} == {split}
        used[split] = set(names)
    assert not used["train"] & used["dev"]
    assert not used["train"] & used["test"]
    assert not used["dev"] & used["test"]


@given(st.integers(1, 3000), SEEDS, st.sampled_from(["train", "dev", "test"]))
@settings(max_examples=20, deadline=None)
def test_names_survive_stemming_and_are_no_words_of_the_templates(count, seed, split):
    names = [name.lower() for name in draw_names(Draws(seed), count, split)]
    assert len(set(names)) == count
    assert Stemmer.Stemmer("english").stemWords(names) == names
    assert Stemmer.Stemmer("porter").stemWords(names) == names
    template_words = {word.lower() for text in template_texts() for word in re.findall(r"\w+", text)}
    assert not template_words & set(names)
    assert len(SYLLABLES) == len(set(SYLLABLES)) == 40


# Determinism

SNAPSHOT_PRESET = WorldPreset(
    name="tiny",
    counts=(("film", 4), ("person", 6), ("city", 4), ("country", 4)),
    relations=PRESETS["easy"].relations,
    questions=(("bridge", 1, 2), ("bridge", 2, 2), ("yes_no", 2, 2)),
    aliases=0.2,
)


def text_of(world: World) -> str:
    questions = [json.dumps(dataclasses.asdict(question)) for question in world.questions]
    return "\n".join(["\t".join(page) for page in world.passages] + questions)


def test_same_seed_same_bytes_as_ever():
    world = WorldSource("dev", SNAPSHOT_PRESET, world_seed=7).world(3)
    shown = [f"{page.title} | {page.text}" for page in world.passages[:6]]
    shown += [f"{question.question} | {', '.join(question.golden_answers)}" for question in world.questions]
    assert shown == SNAPSHOT
    digest = hashlib.sha256()
    for preset in ("easy", "medium", "hard"):
        for split in ("train", "dev", "test"):
            for number in range(3):
                digest.update(text_of(WorldSource(split, preset, world_seed=11).world(number)).encode())
    assert digest.hexdigest() == DIGEST


def test_worlds_depend_on_nothing_but_their_arguments():
    first = WorldSource("train", "medium", world_seed=5)
    later = first.world(9)
    assert text_of(later) == text_of(WorldSource("train", "medium", world_seed=5, num_worlds=10).world(9))
    texts = {text_of(first.world(number)) for number in range(5)} | {text_of(WorldSource(world_seed=6, preset="medium").world(0))}
    assert len(texts) == 6
    two_hops = WorldSource("train", "medium", world_seed=5, hops=2)
    assert [two_hops[index] for index in range(len(two_hops.world(0).questions))] == [
        question for question in map(first.__getitem__, range(200)) if question.metadata["hops"] == 2
    ][: len(two_hops.world(0).questions)]


def test_no_global_random_state_is_touched():
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    WorldSource(preset="hard")[5]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_the_raw_numbers_are_those_of_pcg64():
    draws = Draws(1, 2, 3)
    expected = np.random.PCG64(np.random.SeedSequence((1, 2, 3))).random_raw(3)
    assert draws.raw(3).tolist() == expected.tolist()


# The source


@pytest.mark.parametrize("hops", [None, 2, [1, 3], "1,2"])
def test_index_and_id_lead_to_each_other(hops):
    source = WorldSource("test", "medium", world_seed=2, num_worlds=5, hops=hops)
    wanted = {None: {1, 2, 3}, 2: {2}, "1,2": {1, 2}}.get(hops if not isinstance(hops, list) else "", {1, 3})
    seen = set()
    for index in range(len(source)):
        question = source[index]
        assert source.index_of(question.id) == index
        assert question.id.startswith("medium-test-2-")
        assert source.filters(question) == {"world": question.id.split("-")[3]}
        seen.add(question.metadata["hops"])
    assert seen == wanted
    assert source[-1] == source[len(source) - 1]


def test_the_length_is_known_without_making_a_world():
    started = time.perf_counter()
    source = WorldSource(num_worlds=10**12)
    assert len(source) == 48 * 10**12
    assert time.perf_counter() - started < 0.5
    assert source[len(source) - 1].id == "easy-train-0-999999999999-47"
    assert (len(WorldSource()), len(WorldSource("dev")), len(WorldSource("test"))) == (4_800_000, 3072, 3072)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "easy-train-0-5-0",
        "easy-train-0-0-48",
        "easy-dev-0-0-0",
        "easy-train-1-0-0",
        "easy-train-0-00-0",
        "easy-train-0-0-0 ",
        "easy-train-0-٣-0",
        3,
    ],
)
def test_an_unknown_id_is_an_error_that_names_what_there_is(wrong):
    with pytest.raises(UnknownQuestionError, match="easy-train-0-4-47"):
        WorldSource(num_worlds=5).index_of(wrong)


def test_an_index_out_of_range_is_an_index_error():
    source = WorldSource(num_worlds=2)
    for index in (96, -97):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "all"}, "train"),
        ({"preset": "huge"}, "easy"),
        ({"world_seed": -1}, "world_seed"),
        ({"num_worlds": 0}, "num_worlds"),
        ({"hops": 3}, r"\[1, 2\]"),
        ({"hops": "1;2"}, "1,2"),
        ({"hops": []}, "hops"),
        ({"style": "loud"}, "natural"),
        ({"entities": 99}, "100,000"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        WorldSource(**arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a-b"},
        {"aliases": 1.5},
        {"top_k": 0},
        {"relations": ("film.colour",)},
        {"relations": ("book.author",)},
        {"counts": (("film", 24), ("person", 41), ("city", 20), ("country", 8))},
        {"counts": (("film", 24), ("person", 40), ("city", 5), ("country", 8))},
        {"questions": (("bridge", 5, 4),)},
        {"questions": (("comparison", 1, 4),)},
        {"questions": (("yes_no", 2, 3),)},
        {"questions": (("bridge", 1, 3), ("bridge", 1, 3))},
    ],
)
def test_impossible_presets_are_named(changes):
    with pytest.raises(ConfigurationError):
        dataclasses.replace(PRESETS["easy"], **changes)


def test_more_questions_than_a_world_has_is_an_error():
    preset = dataclasses.replace(SNAPSHOT_PRESET, questions=(("bridge", 1, 500),))
    with pytest.raises(ConfigurationError, match="too few bridge"):
        WorldSource(preset=preset)[0]


@pytest.mark.parametrize("preset", ["easy", "medium", "hard"])
@pytest.mark.parametrize("entities", [100, 101, 1000, 10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_every_size_works(preset, entities, tmp_path):
    source = WorldSource("test", preset, entities=entities)
    started = time.perf_counter()
    world = source.world(0)
    pages = world.passages
    assert time.perf_counter() - started < 30
    assert len(pages) == len({page.title for page in pages}) == len({page.id for page in pages}) == entities
    assert len({name for name in (*world.names, *world.aliases) if name}) == entities + sum(map(bool, world.aliases))
    assert [page.id for page in pages] == sorted(page.id for page in pages)
    cache = {"cache_dir": str(tmp_path)} if entities > 5000 else {}
    retriever = source.build_retriever({"name": "bm25", **cache})
    requests = [(hop, SearchRequest(hop["query"], 1, filters={"world": "0"})) for q in world.questions for hop in q.metadata["chain"]]
    found = retriever.search([request for _, request in requests])
    assert [hits[0].passage.title for hits in found] == [hop["title"] for hop, _ in requests]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["easy", "medium", "hard"]), st.sampled_from(["train", "dev", "test"]), SEEDS)
def test_the_smallest_worlds_have_questions_enough(preset, split, seed):
    world = WorldSource(split, preset, world_seed=seed, entities=100).world(0)
    assert len(world.questions) == world.preset.questions_per_world


def test_copies_and_pickles():
    source = WorldSource("dev", "medium", world_seed=3, num_worlds=4, hops="2", style="natural", entities=120)
    assert copy.deepcopy(source) is source
    again = pickle.loads(pickle.dumps(source))
    assert repr(again) == repr(source)
    assert again.stamp() == source.stamp()
    assert again[3] == source[3]
    retriever = source.build_retriever({"name": "bm25", "k1": 0.9})
    assert copy.deepcopy(retriever) is retriever
    request = SearchRequest(source[0].metadata["chain"][0]["query"], 2, filters={"world": "0"})
    assert pickle.loads(pickle.dumps(retriever)).search([request]) == retriever.search([request])


def test_the_stamp_tells_everything_that_changes_the_questions():
    base = WorldSource().stamp()
    assert base["dataset"] == "world"
    variants = [
        {"split": "dev"}, {"preset": "hard"}, {"world_seed": 1}, {"num_worlds": 3}, {"hops": 1}, {"style": "natural"}, {"entities": 200},
        {"preset": dataclasses.replace(PRESETS["easy"], top_k=2)},
    ]  # fmt: skip
    stamps = [json.dumps(WorldSource(**variant).stamp(), sort_keys=True) for variant in variants]
    assert len({json.dumps(base, sort_keys=True), *stamps}) == len(variants) + 1


# The retriever


def test_each_request_is_answered_from_its_own_world():
    source = WorldSource("dev", "easy")
    retriever = source.build_retriever({"name": "bm25"})
    requests = [SearchRequest(source.world(n).names[0], 1, filters={"world": str(n)}) for n in (4, 1, 4, 0)]
    for number, hits in zip((4, 1, 4, 0), retriever.search(requests), strict=True):
        assert hits[0].passage.id.startswith(f"easy-dev-0-{number}-p")
        assert hits[0].passage.title == source.world(number).names[0]
    elsewhere = [request.query for request in requests if request.query not in source.world(2).names]
    assert retriever.search([SearchRequest(query, 1, filters={"world": "2"}) for query in elsewhere]) == [[]] * len(elsewhere)


@pytest.mark.parametrize(
    "filters", [None, {}, {"world": ""}, {"world": "x"}, {"world": "-1"}, {"world": "64"}, {"world": "1", "page": "2"}]
)
def test_a_request_that_names_no_world_is_an_error(filters):
    for name in ("bm25", "random"):
        retriever = WorldSource("dev").build_retriever({"name": name})
        with pytest.raises(RetrieverError, match="world"):
            retriever.search([SearchRequest("Mako", 1, filters=filters)])


def test_other_retrievers_and_wrong_settings():
    source = WorldSource("dev")
    nothing = source.build_retriever({"name": "none"})
    assert nothing.search([SearchRequest("Mako", 3, filters={"world": "0"})]) == [[]]
    noise = source.build_retriever({"name": "random", "seed": 4})
    (hits,) = noise.search([SearchRequest("Mako", 3, filters={"world": "5"})])
    assert [hit.passage in source.world(5).passages for hit in hits] == [True] * 3
    assert (nothing.name, noise.name, source.build_retriever({"name": "bm25"}).name) == ("none", "random", "bm25")
    for wrong in ({"name": "bm26"}, {"name": "bm25", "k2": 1}, {"name": "bm25", "b": 2}, {}):
        with pytest.raises(RetrieverError):
            source.build_retriever(wrong)
    assert source.build_retriever({"name": "bm25", "b": 0.5}).stamp()["b"] == 0.5


def test_stamps_of_compositions_name_no_corpus_but_the_worlds():
    source = WorldSource()
    stamp = source.build_retriever({"name": "hybrid", "retrievers": ["bm25", {"name": "filtered", "retriever": "bm25"}]}).stamp()
    assert stamp["corpus_sha256"] == source.stamp()["corpus_sha256"]
    assert json.dumps(stamp).count("sha256") == 1
    assert [inner["retriever"] for inner in stamp["retrievers"]] == ["bm25", "filtered"]


def test_few_worlds_are_kept():
    source = WorldSource("train", "easy", entities=20_000)
    assert source.worlds_in_memory == 2
    assert source.world(0) is source.world(0)
    kept = source.world(0)
    source.world(1)
    source.world(2)
    assert source.world(0) is not kept


def test_a_small_world_is_searched_without_compiling_anything():
    code = (
        "import sys; from searchqa_envs.world import WorldSource; from searchqa_retrievers import SearchRequest; s = WorldSource();"
        "assert s.build_retriever({'name': 'bm25'}).search([SearchRequest(s.world(0).names[0], 1, filters={'world': '0'})])[0];"
        "assert not {'numba', 'bm25s', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# In the environment


@pytest.mark.parametrize("preset", ["easy", "medium", "hard"])
@pytest.mark.parametrize("dialect", ["search-r1", "r1-searcher", "zerosearch"])
def test_an_oracle_that_plays_the_environment_scores_one(preset, dialect):
    env = gym.make("SearchQA-World-v0", split="dev", preset=preset, dialect=dialect).unwrapped
    source = env.rules.source
    tags = env.dialect
    for index in range(0, 2 * source.preset.questions_per_world):
        question = source[index]
        env.reset(options={"index": index})
        for hop in question.metadata["chain"]:
            segment = env.tokenizer.encode(f"{tags.search_open} {hop['query']} {tags.search_close}")
            *_, terminated, truncated, info = env.step(segment)
            assert not terminated
            assert not truncated
            assert hop["title"] in [passage.title for passage in info["turn_record"].passages]
        answer = env.tokenizer.encode(f"{tags.answer_open} {answer_from_chain(question)} {tags.answer_close}")
        _, reward, terminated, _, info = env.step(answer)
        assert terminated
        assert reward == 1.0
        assert info["metrics"]["title_recall_all"] == 1.0


SNAPSHOT: list[str] = [
    "Siri | Siri is a person . birthplace Razo . spouse Tadi .",
    "Mara | Mara is a person . birthplace Razo . spouse Zava .",
    "Dima | Dima is a country . capital Duzi . leader Tula .",
    "Sota | Sota also Koru is a film . Koru director Tadi . Sota star Tula .",
    "Nina | Nina is a country . capital Kutu . leader Siri .",
    "Diru | Diru is a country . capital Doro . leader Mara .",
    "what is Naki 's birthplace ? | Kutu, Kudi",
    "what is Robu 's country 's leader ? | Tula",
    "is Roko 's director the same as Nina 's leader ? | yes",
    "what is Duzi 's country ? | Dima",
    "what is Zava 's birthplace 's mayor ? | Tula",
    "is Maso 's director the same as Nina 's leader ? | no",
]
DIGEST = "fbcf436079013ed6ba990bd768eec4c33abfd46063aaee428655b4a48b538719"
