"""The simulated search engine: documents read from text, useful and noisy answers, one's own question in one's own prompt, and no cross talk."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_retrievers import (
    Cached,
    Corpus,
    DiskCached,
    Passage,
    Recorded,
    Replay,
    RetrieverError,
    SearchRequest,
    build_retriever,
    simulated,
)
from searchqa_retrievers.curriculum import Curriculum
from searchqa_retrievers.simulated import NAMESPACE, Simulated, read_documents
from searchqa_retrievers.testing import RetrieverContract

ECHO = "{quality}|{count}|{question}|{answer}|{query}"


class Echo:
    """Writes each prompt back as the only document, and remembers the jobs."""

    def __init__(self, text=None):
        self.text = text
        self.jobs = []

    def write(self, jobs):
        self.jobs += jobs
        return [f"Doc 1: {job.prompt}" if self.text is None else self.text for job in jobs], 0

    def stamp(self):
        return {"writer": "echo", "text": self.text}

    def counters(self):
        return {}

    def close(self):
        pass

    def __reduce__(self):
        return Echo, (self.text,)


def asked(query="author of Hamlet", **changes):
    request = SearchRequest(query, 5, question_id="q1", question="who wrote Hamlet", golden_answers=("Shakespeare", "the Bard"))
    return replace(request, **changes)


def told(hits):
    """What an echoed prompt says: quality, count, question, answer, query."""
    return hits[0].passage.text.split("|")


class TestContract(RetrieverContract):
    def make_retriever(self):
        return Simulated(Echo(), ECHO, Curriculum(0.5, 0.5))

    def request(self, query, top_k=3):
        return asked(query, top_k=top_k)


# -- documents ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "top_k", "documents"),
    [
        ("Doc 1: Hamlet is a play.\nDoc 2: It is long.\n", 5, [("", "Hamlet is a play."), ("", "It is long.")]),
        ("Doc 1: one Doc 2: two Doc 3: three", 2, [("", "one"), ("", "two")]),
        ("Doc 1: one\nDoc 2: two", 1, [("", "one")]),
        ("Here you are:\n\nDoc 1: one\n\n\n\nDoc 2: two\n\n\nmore", 5, [("", "one"), ("", "two\n\nmore")]),
        ('Doc 1(Title: "Hamlet") A play.\nDoc 2(Title: Macbeth) Another.', 5, [("Hamlet", "A play."), ("Macbeth", "Another.")]),
        ("Doc 1(Title: Paris (city)) In France.", 5, [("Paris (city)", "In France.")]),
        ("**Doc 1:** bold\n**Doc 2:** too", 5, [("", "bold"), ("", "too")]),
        ("Doc 1: as Doc 1: and Doc 3: say\nDoc 2: two", 5, [("", "as Doc 1: and Doc 3: say"), ("", "two")]),
        ("Doc 1: mentions Doc 2 without a colon", 5, [("", "mentions Doc 2 without a colon")]),
        ("Nothing in the form", 5, [("", "Nothing in the form")]),
        ("Doc 1:\nDoc 2: two", 5, [("", "two")]),
        ("Doc 1(Title: T)", 5, [("T", "")]),
        ("", 5, []),
        (" \n\t\n", 5, []),
        ("Doc 1: ", 5, []),
        ("Doc 6: six", 5, []),
        ("Doc 99999999999999999999: far", 5, [("", "Doc 99999999999999999999: far")]),
        ("Bani 's leader 's\nDoc 1(Title: capital Bani . mayor Kova .", 5, [("capital Bani . mayor Kova .", "")]),
        ("note\nDoc 1(Title: Bani\nBani is big .\nDoc 2(Title: Kova) A man .", 5, [("Bani", "Bani is big ."), ("Kova", "A man .")]),
        ("Doc 1(Title: Bani Doc 2(Title: Kova) A man .", 5, [("Bani", ""), ("Kova", "A man .")]),
        (f"Doc 1(Title: {'word ' * 61}\nmore", 5, [("", f"{'word ' * 61}\nmore".strip())]),
        ("the answer is Kova\nDoc 1 Bani is big .", 5, [("", "Bani is big .")]),
        ("the answer is Kova\n  **Doc 1** - Bani\n### Doc 2\nKova", 5, [("", "Bani"), ("", "Kova")]),
        ("a note: Doc 1: no\nDoc 1: one\nDoc 2: two", 5, [("", "one"), ("", "two")]),
        ("I shall not write Doc 6.\nDoc 1: one", 5, [("", "one")]),
        ("Doc 1(Title: Doc 2: The Return) A film.\nDoc 2: two", 5, [("Doc 2: The Return", "A film."), ("", "two")]),
        ("<think>Kova it is. Doc 1: hm</think>\nDoc 1: one", 5, [("", "one")]),
        ("Kova it is. Doc 1: hm</think>\nDoc 1: one", 5, [("", "one")]),
        ("<think>Kova it is.\nDoc 1: hm", 5, []),
        ("Doc 1: one\n<think>Kova it is", 5, [("", "one")]),
    ],
)
def test_documents_are_read_from_a_text(text, top_k, documents):
    hits = read_documents(text, top_k)
    assert [(hit.passage.title, hit.passage.text) for hit in hits] == documents
    assert [hit.score for hit in hits] == [1 / rank for rank in range(1, len(documents) + 1)]


@given(st.text(), st.integers(1, 9))
def test_any_text_is_read(text, top_k):
    hits = read_documents(f"Doc 1: {text}", top_k)
    assert len(hits) <= top_k
    assert all(isinstance(hit.passage, Passage) and (hit.passage.title or hit.passage.text) for hit in hits)


HOSTILE = {
    "titles that do not end": "Doc 1(Title: ",
    "numbers": "Doc 1",
    "titles that never end": "Doc 1(Title: (a (b ) c)d ",
    "blank lines": "\n   \n",
    "blanks": "Doc        ",
    "stars at the beginning of a line": "\n************",
    "thoughts": "<think>",
}


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
def test_a_text_of_a_million_characters_is_read(piece):
    """Where reading was quadratic, these would take from many minutes to days."""
    text = piece * (1_000_000 // len(piece))
    hits = read_documents(f"Doc 1: one\nDoc 2: {text}", 5)
    assert hits[0].passage.text == "one"
    assert len(hits) <= 2
    assert len(read_documents(text, 5)) <= 1


def test_each_repetition_of_the_patterns_is_bounded():
    """So that no text makes them try more than a fixed number of characters at any place."""
    for pattern in (simulated._MARKER, simulated._FIRST, simulated._TITLE, simulated._OPEN_TITLE, simulated._MARK, simulated._LOOSE_MARK):
        assert not {"*", "+"} & set(pattern.pattern.replace(r"\*", "").replace(r":*]", "")), pattern.pattern


def test_ids_are_of_the_words():
    one, other = (read_documents(f"Doc 1: {text}", 5)[0].passage for text in ("a text", "another text"))
    assert (
        one.id
        == read_documents("preamble Doc 1:  a text\nDoc 2: more", 5)[0].passage.id
        == "simulated-" + one.id.removeprefix("simulated-")
    )
    assert one.id != other.id


# -- useful or noisy ---------------------------------------------------------------------------------------------------------------------


def test_the_ends_of_the_noise_are_certain():
    requests = [asked(f"query {number}") for number in range(200)]
    for probability, quality in ((0, "useful"), (1, "noisy")):
        answers = Simulated(Echo(), ECHO, Curriculum(probability, probability)).search(requests)
        assert {told(hits)[0] for hits in answers} == {quality}


def test_the_share_of_noisy_answers_is_that_of_the_curriculum_and_a_noisy_one_stays_noisy():
    """With 1,500 draws the share is within 0.05 of its probability: four standard deviations."""
    requests = [asked(f"query {number}") for number in range(1_500)]
    retriever = Simulated(Echo(), ECHO, Curriculum(0, 0.5))
    noisy_before: set[int] = set()
    before = dict.fromkeys(retriever.counters(), 0.0)
    for step in (0, 101, 203):
        if step:
            retriever.set_progress(step, 203)
        answers = retriever.search(requests)
        noisy = {number for number, hits in enumerate(answers) if told(hits)[0] == "noisy"}
        assert abs(len(noisy) / 1_500 - retriever.noise_probability) < 0.05
        assert noisy_before <= noisy
        counted = retriever.counters()
        assert counted["search/simulated_noisy"] - before["search/simulated_noisy"] == len(noisy)
        expected = counted["search/simulated_expected_noisy"] - before["search/simulated_expected_noisy"]
        assert expected == pytest.approx(1_500 * retriever.noise_probability)
        noisy_before, before = noisy, counted


def test_the_draw_depends_on_what_tells_searches_apart():
    retriever = Simulated(Echo(), ECHO, Curriculum(0.5, 0.5))
    for change in ({"seed": 1}, {"turn": 1}, {"question_id": "other"}, {"query": "other"}):
        pairs = [(asked(f"query {number}"), asked(**({"query": f"query {number}"} | change))) for number in range(40)]
        if "query" in change:
            pairs = [(asked(f"query {number}"), asked(f"other {number}")) for number in range(40)]
        differing = sum(told(retriever.search([a])[0])[0] != told(retriever.search([b])[0])[0] for a, b in pairs)
        assert 5 < differing < 35, change
    seeds = [
        [told(hits)[0] for hits in Simulated(Echo(), ECHO, Curriculum(0.5, 0.5), seed=seed).search([asked(f"{n}") for n in range(40)])]
        for seed in (0, 1)
    ]
    assert seeds[0] != seeds[1]


def test_noise_that_never_changes_does_not_follow_progress():
    assert not Simulated(Echo(), ECHO, Curriculum(0.5, 0.5)).follows_progress
    scheduled = Simulated(Echo(), ECHO, Curriculum(0, 0.5))
    assert scheduled.follows_progress
    assert scheduled.noise_probability == 0
    with pytest.raises(RetrieverError, match="number of all steps"):
        scheduled.set_progress(3, 0)


# -- whose question ----------------------------------------------------------------------------------------------------------------------

ROWS = [SearchRequest(f"query {n % 3}", 5, f"q{n}", f"question {n}", n % 2, 100 + n, (f"answer {n}", "other")) for n in range(8)]


@settings(deadline=None)
@given(st.lists(st.sampled_from(range(8)), max_size=12), st.booleans())
def test_each_answer_is_of_its_own_rows_prompt(rows, cached):
    """Whatever rows search, in whatever order, also twice."""
    retriever = Simulated(Echo(), ECHO)
    answers = (Cached(retriever) if cached else retriever).search([ROWS[row] for row in rows])
    assert [told(hits) for hits in answers] == [["useful", "five", f"question {row}", f"answer {row}", f"query {row % 3}"] for row in rows]


def test_equal_requests_are_asked_once_and_answered_each():
    writer = Echo()
    first, second, other = Simulated(writer, ECHO).search([asked(), asked(), asked("other")])
    assert first == second != other
    assert first is not second
    assert [job.prompt.split("|")[-1] for job in writer.jobs] == ["author of Hamlet", "other"]


def test_only_the_first_golden_answer_is_told():
    writer = Echo()
    Simulated(writer, "sft").search([asked()])
    assert "whose answer is Shakespeare." in writer.jobs[0].prompt
    assert "Bard" not in writer.jobs[0].prompt


def test_a_search_without_what_the_prompt_tells_is_refused():
    with pytest.raises(RetrieverError, match="tells question and answer, which the request for 'author of Hamlet' lacks"):
        Simulated(Echo(), "sft").search([asked(question=None, golden_answers=())])
    with pytest.raises(RetrieverError, match="tells answer"):
        Simulated(Echo(), "sft").search([asked(golden_answers=())])
    plain = Simulated(Echo(), "{query}")
    assert not plain.needs_gold
    assert plain.search([SearchRequest("words", 3)])[0][0].passage.text == "words"
    assert Simulated(Echo(), "sft").needs_gold
    assert Simulated(Echo(), "prompted").needs_gold


def test_a_blank_query_finds_nothing_and_asks_nobody():
    writer = Echo()
    retriever = Simulated(writer, "sft")
    assert retriever.search([asked(" \n"), asked("")]) == [[], []]
    assert writer.jobs == []
    assert retriever.counters()["search/simulated_answers"] == 0


def test_an_empty_text_is_an_empty_result_and_counted():
    retriever = Simulated(Echo(""), "sft")
    assert retriever.search([asked(), asked("other")]) == [[], []]
    counted = retriever.counters()
    assert (counted["search/simulated_answers"], counted["search/simulated_empty"], counted["search/simulated_documents"]) == (2, 2, 0)


def test_worlds_may_be_named_and_other_filters_not():
    retriever = Simulated(Echo(), "sft")
    world = {"world": "1", "split": "train", "recipe": "5f"}
    assert retriever.search([asked(filters=world)]) == retriever.search([asked()])
    with pytest.raises(RetrieverError, match="has no filter source"):
        retriever.search([asked(filters={"source": "wiki", "world": "1"})])
    with pytest.raises(RetrieverError, match="top_k"):
        retriever.search([asked(top_k=0)])


def test_the_writer_is_told_where_to_stop_and_how_much_to_write():
    writer = Echo()
    retriever = Simulated(writer, "sft")
    retriever.search([asked(top_k=3), asked(top_k=5), asked(top_k=10)])
    assert [(job.stop, job.max_tokens) for job in writer.jobs] == [("Doc 4", 600), ("Doc 6", 600), ("Doc 11", 1_200)]
    assert len({job.seed for job in writer.jobs}) == 1  # how many documents are asked for is no noise
    writer.jobs.clear()
    Simulated(writer, "sft", max_tokens=50).search([asked(top_k=10)])
    assert writer.jobs[0].max_tokens == 50


# -- caches and recordings ---------------------------------------------------------------------------------------------------------------

CHANGES = {
    "query": "other",
    "top_k": 3,
    "question_id": "q2",
    "question": "another question",
    "golden_answers": ("Marlowe",),
    "turn": 1,
    "seed": 7,
}


@pytest.mark.parametrize("field", CHANGES)
def test_the_cache_key_has_what_an_answer_depends_on(field):
    retriever = Simulated(Echo(), "sft")
    assert retriever.cache_key(asked()) != retriever.cache_key(asked(**{field: CHANGES[field]}))


def test_the_cache_key_leaves_out_what_is_never_told():
    retriever = Simulated(Echo(), "sft")
    assert (
        retriever.cache_key(asked())
        == retriever.cache_key(asked(golden_answers=("Shakespeare",)))
        == retriever.cache_key(asked(filters={"world": "1"}))
    )


def test_the_cache_key_has_settings_and_is_of_no_real_search():
    key = Simulated(Echo(), "sft").cache_key(asked())
    others = [
        Simulated(Echo(), "prompted"),
        Simulated(Echo("text"), "sft"),
        Simulated(Echo(), "sft", seed=1),
        Simulated(Echo(), "sft", max_tokens=5),
        Simulated(Echo(), "sft", Curriculum(1, 1)),
    ]
    assert len({key, *(other.cache_key(asked()) for other in others)}) == 6
    corpus = Corpus.from_passages([("1", "Hamlet", "A play.")])
    assert NAMESPACE in repr(key)
    assert key != build_retriever("bm25", corpus).cache_key(asked())


def test_the_cache_key_follows_the_curriculum():
    retriever = Simulated(Echo(), ECHO, Curriculum(0, 1))
    first = retriever.cache_key(asked())
    useful = retriever.search([asked()])
    retriever.set_progress(10, 10)
    assert retriever.cache_key(asked()) != first
    assert retriever.search([asked()]) != useful


def test_a_memory_forgets_when_the_curriculum_moves():
    cached = Cached(Simulated(Echo(), ECHO, Curriculum(0, 1)))
    assert told(cached.search([asked()])[0])[0] == "useful"
    cached.set_progress(10, 10)
    assert told(cached.search([asked()])[0])[0] == "noisy"


def test_a_cache_file_is_shared_with_real_search_without_cross_talk(tmp_path):
    corpus = Corpus.from_passages([("1", "Hamlet", "The author of Hamlet is in this page.")])
    file = tmp_path / "answers.db"

    def run():
        simulated = DiskCached(Simulated(Echo(), ECHO, Curriculum(0, 1)), file)
        real = build_retriever({"name": "bm25", "cache_file": str(file), "cache_entries": 0}, corpus)
        found = [simulated.search([asked()]), real.search([SearchRequest("author of Hamlet", 5)])]
        simulated.set_progress(5, 5)
        found.append(simulated.search([asked()]))
        return found, simulated, real

    (useful, page, noisy), *_ = run()
    assert told(useful[0])[0] == "useful"
    assert told(noisy[0])[0] == "noisy"
    assert [hit.passage.id for hit in page[0]] == ["1"]
    again, simulated, real = run()
    assert again == [useful, page, noisy]
    assert (simulated.hits, simulated.misses) == (2, 0)
    assert real.counters()["search/disk_hits"] == 1


def test_a_recording_is_replayed_by_question_and_progress(tmp_path):
    file = tmp_path / "recording.jsonl"

    def run(retriever):
        found = []
        for step in (1, 10):
            retriever.set_progress(step, 10)
            found += retriever.search(ROWS)
        return found

    recorded = Recorded(Simulated(Echo(), ECHO, Curriculum(0.3, 0.9)), file)
    expected = run(recorded)
    replay = Replay(file)
    assert replay.needs_gold
    assert run(replay) == expected
    recorded.close()
    replay.close()


# -- settings ----------------------------------------------------------------------------------------------------------------------------


def test_the_stamp_has_the_settings():
    stamp = Simulated(Echo(), "sft", Curriculum(0, 0.5), seed=3).stamp()
    assert stamp["retriever"] == "simulated"
    assert stamp["prompt"] == "sft"
    assert len(stamp["prompt_sha256"]) == 64
    assert stamp["noise"] == {"start": 0, "end": 0.5, "base": 4.0}
    assert (stamp["seed"], stamp["writer"]) == (3, "echo")


def test_a_pickled_one_is_at_the_same_step():
    retriever = Simulated(Echo(), ECHO, Curriculum(0, 1), max_tokens=7, seed=2)
    retriever.set_progress(10, 10)
    again = pickle.loads(pickle.dumps(retriever))
    assert again.noise_probability == 1
    assert again.stamp() == retriever.stamp()
    assert again.search(ROWS) == retriever.search(ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of the two"),
        ({"url": "http://127.0.0.1:1/v1", "checkpoint": "folder"}, "give one of the two"),
        ({"url": "http://127.0.0.1:1/v1", "noise": {"stop": 1}}, "no key stop"),
        ({"url": "http://127.0.0.1:1/v1", "noise": 0.5}, "must be a mapping"),
        ({"url": "http://127.0.0.1:1/v1", "prompt": "sfd"}, "prompt must be one of sft, prompted, world"),
        ({"url": "http://127.0.0.1:1/v1", "temperature": -1}, "temperature"),
        ({"url": "http://127.0.0.1:1/v1", "max_tokens": 0}, "max_tokens"),
        ({"url": "http://127.0.0.1:1/v1", "concurrency": 0}, "concurrency"),
        ({"url": "http://127.0.0.1:1/v1", "extra": {"seed": 1}}, "may not set seed"),
        ({"url": []}, "at least one endpoint"),
        ({"url": "ftp://127.0.0.1/v1"}, "url must be like"),
        ({"url": "http://user:secret@127.0.0.1/v1"}, "without user"),
        ({"url": "http://127.0.0.1:1/v1", "retries": -1}, "retries"),
        ({"url": "http://127.0.0.1:1/v1", "top_k": 3}, "no option top_k"),
        ({"checkpoint": "/no/such/folder"}, "cannot load the text model"),
        ({"checkpoint": "/no/such/folder", "dtype": "int8"}, "dtype"),
        ({"checkpoint": "/no/such/folder", "device": "warp"}, "is not there"),
        ({"checkpoint": "/no/such/folder", "batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(RetrieverError, match=message) as caught:
        build_retriever({"name": "simulated", **options}, Corpus.from_passages([]))
    assert "secret@" not in str(caught.value)
