"""Wire formats: the published bodies as literals, round trips, and everything malformed refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_retrievers import Hit, Passage, RetrieverError, SearchRequest
from searchqa_retrievers.http_formats import FORMATS, FormatError, Question, format_of, from_json, to_json

HITS = [Hit(Passage("7", "Oslo", "The capital."), 2.5), Hit(Passage("12", "", "No title."), 1.0)]
SCORED = [
    {"document": {"id": "7", "contents": '"Oslo"\nThe capital.'}, "score": 2.5},
    {"document": {"id": "12", "contents": '""\nNo title.'}, "score": 1.0},
]
BARE = [row["document"] for row in SCORED]


def requests(*queries: str, top_k: int = 3) -> list[SearchRequest]:
    return [SearchRequest(query, top_k) for query in queries]


@pytest.mark.parametrize(
    ("path", "body", "name", "question"),
    [
        # What the released clients send.
        ("/retrieve", {"queries": ["a", "b"], "topk": 3, "return_scores": True}, "search-r1", Question(requests("a", "b"), True)),
        ("/retrieve", {"queries": ["a"], "topk": None, "return_scores": False}, "search-r1", Question(requests("a", top_k=9), False)),
        ("/retrieve", {"queries": ["a"]}, "search-r1", Question(requests("a", top_k=9), False)),
        ("/retrieve", {"queries": ["a"], "topk_retrieval": 10, "topk_rerank": 3}, "search-r1", Question(requests("a", top_k=9), False)),
        ("/retrieve", {"queries": []}, "search-r1", Question([], False)),
        ("/queries", {"queries": ["a", "b"], "k": 5}, "r1-searcher", Question(requests("a", "b", top_k=5))),
        ("/queries", {"queries": ["a"]}, "r1-searcher", Question(requests("a", top_k=9))),
        ("/queries", {"queries": ["a"], "k": None}, "r1-searcher", Question(requests("a", top_k=9))),
        ("/retrieve", {"queries": ["a"], "return_scores": None}, "search-r1", Question(requests("a", top_k=9), False)),
        ("/retrieve", {"query": "a"}, "zerosearch", Question(requests("a", top_k=9))),
        ("/retrieve", {"query": "a", "top_k": None}, "zerosearch", Question(requests("a", top_k=9))),
        ("/retrieve", {"query": "a", "top_k": 5}, "zerosearch", Question(requests("a", top_k=5))),
        # Ours.
        (
            "/search",
            {"requests": [{"query": "a", "top_k": 1}, {"query": "b", "top_k": 2, "filters": {"lang": "en"}}]},
            "searchqa",
            Question([SearchRequest("a", 1), SearchRequest("b", 2, filters={"lang": "en"})]),
        ),
    ],
)
def test_requests_that_a_server_understands(path, body, name, question):
    format_ = format_of(path, body)
    assert format_.name == name
    assert format_.read_request(body, 9) == question


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/retrieve", [], "must be a JSON object"),
        ("/retrieve", {}, "either 'queries'"),
        ("/retrieve", {"queries": ["a"], "query": "a"}, "either 'queries'"),
        ("/retrieve", {"queries": "a"}, "'queries' must be a list"),
        ("/retrieve", {"queries": ["a", None]}, "list of strings"),
        ("/retrieve", {"queries": ["a"], "topk": 0}, "'topk' must be"),
        ("/retrieve", {"queries": ["a"], "topk": True}, "'topk' must be"),
        ("/retrieve", {"queries": ["a"], "topk": 3.0}, "'topk' must be"),
        ("/retrieve", {"queries": ["a"], "return_scores": 1}, "return_scores must be"),
        ("/retrieve", {"query": "a", "top_k": "3"}, "'top_k' must be"),
        ("/retrieve", {"query": ["a"], "top_k": 3}, "'query' must be"),
        ("/queries", {"queries": ["a"], "k": 0}, "'k' must be"),
        ("/queries", {"queries": ["a"], "k": "3"}, "'k' must be"),
        ("/queries", {"query": "a"}, "'queries' must be a list"),
        ("/search", {"requests": [{"query": "a"}]}, "'top_k' must be"),
        ("/search", {"requests": ["a"]}, "must be an object"),
        ("/search", {"requests": [{"query": "a", "top_k": 1, "filter": {}}]}, "no field"),
        ("/search", {"requests": [], "topk": 3}, "no field"),
        ("/search", {"requests": [{"query": "a", "top_k": 1, "filters": {"year": 1990}}]}, "object of strings"),
        ("/elsewhere", {}, "no format has the path"),
    ],
)
def test_malformed_requests_are_refused(path, body, message):
    with pytest.raises(FormatError, match=message):
        format_of(path, body).read_request(body, 3)


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("search-r1", Question(requests("a", "b"), True), {"result": [SCORED, []]}),
        ("search-r1", Question(requests("a", "b"), False), {"result": [BARE, []]}),
        ("r1-searcher", Question(requests("a", "b")), {"queries": ["a", "b"], "answers": [["Oslo The capital.", "No title."], []]}),
        (
            "searchqa",
            Question(requests("a", "b")),
            {
                "answers": [
                    [
                        {"id": "7", "title": "Oslo", "text": "The capital.", "score": 2.5},
                        {"id": "12", "title": "", "text": "No title.", "score": 1.0},
                    ],
                    [],
                ]
            },
        ),
    ],
)
def test_answers_that_a_server_writes(name, question, answer):
    assert FORMATS[name].write_answer(question, [HITS, []]) == answer


def test_zerosearch_answers_one_query():
    assert FORMATS["zerosearch"].write_answer(Question(requests("a")), [HITS]) == [{"text": "Oslo The capital."}, {"text": "No title."}]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("searchqa", {"requests": [{"query": "a", "top_k": 5}]}),
        ("search-r1", {"queries": ["a"], "topk": 5, "return_scores": True}),
        ("r1-searcher", {"queries": ["a"], "k": 5}),
        ("zerosearch", {"query": "a", "top_k": 5}),
    ],
)
def test_requests_that_a_client_writes(name, body):
    assert FORMATS[name].write_request(requests("a", top_k=5)) == body


def test_search_r1_answers_of_all_published_servers_are_read():
    read = FORMATS["search-r1"].read_answer
    assert read({"result": [SCORED]}, requests("a")) == [HITS]
    assert [hit.passage for hit in read({"result": [BARE]}, requests("a"))[0]] == [hit.passage for hit in HITS]
    web = [{"document": {"contents": '"One"\nfirst'}}, {"document": {"contents": "second"}}, {"document": {"contents": "third"}}]
    [hits] = read({"result": [web]}, requests("a", top_k=2))  # no ids, no scores, more than asked for
    assert [(hit.passage.title, hit.passage.text, hit.score) for hit in hits] == [("One", "first", 1.0), ("", "second", 0.5)]
    assert hits[0].passage.id != hits[1].passage.id
    [[hit]] = read({"result": [[{"document": {"id": 5, "contents": "x"}, "score": 1}]]}, requests("a"))
    assert hit == Hit(Passage("5", "", "x"), 1.0)


def test_hits_are_ordered_by_score_then_id_before_they_are_cut():
    rows = [{"document": {"id": id_, "contents": ""}, "score": score} for id_, score in [("9", 1), ("10", 1), ("1", 0.5), ("2", 3)]]
    [hits] = FORMATS["search-r1"].read_answer({"result": [rows]}, requests("a", top_k=3))
    assert [(hit.passage.id, hit.score) for hit in hits] == [("2", 3.0), ("10", 1.0), ("9", 1.0)]


def test_texts_keep_the_order_of_the_server_and_have_an_id_of_their_own():
    [[first, second], [third]] = FORMATS["r1-searcher"].read_answer({"answers": [["x", "y"], ["y"]]}, requests("a", "b"))
    assert [first.passage.text, second.passage.text] == ["x", "y"]
    assert first.score > second.score
    assert second.passage == third.passage != first.passage
    [[zero]] = FORMATS["zerosearch"].read_answer([{"text": "y"}], requests("a"))
    assert zero.passage == second.passage


@pytest.mark.parametrize(
    ("name", "body"),
    [
        *(
            (name, body)
            for name in ("searchqa", "search-r1", "r1-searcher")
            for body in (None, [], "error", {}, {"error": "out of memory"}, {"detail": "x"})
        ),
        *(("searchqa", {"answers": value}) for value in (None, [], [[], []], [None], ["text"], [[None]], [[{}]])),
        ("searchqa", {"answers": [[{"id": "1", "title": "", "text": ""}]]}),
        ("searchqa", {"answers": [[{"id": 1, "title": "", "text": "", "score": 1.0}]]}),
        *(("search-r1", {"result": value}) for value in (None, [], [[], []], [None], [["text"]], [[{"document": "text", "score": 1}]])),
        ("search-r1", {"result": [[{"document": {"id": "1"}, "score": 1}]]}),
        ("search-r1", {"result": [[{"document": {"id": [], "contents": ""}, "score": 1}]]}),
        ("search-r1", {"result": [[SCORED[0], {"document": {"contents": ""}}]]}),  # one with, one without score
        *(("search-r1", {"result": [[{"document": {"contents": ""}, "score": score}]]}) for score in (None, "1", True, float("inf"))),
        *(("r1-searcher", {"answers": value}) for value in ([], [[None]], [[{"text": ""}]], ["text"])),
        ("r1-searcher", {"queries": ["b"], "answers": [["text"]]}),  # somebody else's answer
        *(("zerosearch", value) for value in (None, {}, {"error": "x"}, "text", ["text"], [{}], [{"text": None}])),
    ],
)
def test_malformed_answers_are_refused(name, body):
    with pytest.raises(FormatError):
        FORMATS[name].read_answer(body, requests("a"))


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"a": NaN}', b"[Infinity]", b"\xff\xfe", b"<html>", b"[" * 100_000, b"1" * 10_000],
    ids=lambda body: repr(body[:9]),
)
def test_what_is_no_json_is_refused(body):
    with pytest.raises(FormatError, match="must be JSON"):
        from_json(body)


def test_a_format_error_is_one_of_this_package():
    assert issubclass(FormatError, RetrieverError)


texts = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates too
scores = st.floats(allow_nan=False, allow_infinity=False)


def apart(text: str) -> bool:
    """Whether JSON keeps it: a high surrogate before a low one comes back as the one character that they make."""
    return text == text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


whole = texts.filter(apart)
passages = st.builds(Passage, whole, whole, whole)


@given(
    st.lists(
        st.tuples(
            st.builds(SearchRequest, whole, st.integers(1, 9), filters=st.none() | st.dictionaries(whole, whole, max_size=2)),
            st.lists(st.builds(Hit, passages, scores), max_size=4),
        ),
        max_size=4,
    )
)
def test_our_format_loses_nothing(pairs):
    ours = FORMATS["searchqa"]
    asked = [request for request, _ in pairs]
    answers = [sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))[: request.top_k] for request, hits in pairs]
    assert ours.read_request(from_json(to_json(ours.write_request(asked))), 3) == Question(asked)
    assert ours.read_answer(from_json(to_json(ours.write_answer(Question(asked), answers))), asked) == answers


@given(st.lists(st.builds(Hit, st.builds(Passage, whole, whole.filter(lambda title: "\n" not in title), whole), scores), max_size=4))
def test_search_r1_keeps_ids_titles_texts_and_scores(hits):
    ranked = sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))
    format_ = FORMATS["search-r1"]
    body = from_json(to_json(format_.write_answer(Question(requests("a", top_k=9), True), [ranked])))
    assert format_.read_answer(body, requests("a", top_k=9)) == [ranked]


@pytest.mark.parametrize(
    ("format", "answer", "has_scores"),
    [
        ("searchqa", {"answers": [[{"id": "1", "title": "", "text": "a", "score": 1.0}]]}, True),
        ("search-r1", {"result": [[{"document": {"contents": "a"}, "score": 1.0}]]}, True),
        ("search-r1", {"result": [[{"document": {"contents": "a"}}]]}, False),
        ("search-r1", {"result": [[{"contents": "a"}]]}, False),
        ("search-r1", {"result": [[{"document": {"contents": "a"}, "score": 1.0}], [{"contents": "b"}]]}, False),
        ("search-r1", {"result": [[], []]}, True),
    ],
)
def test_an_answer_tells_whether_it_has_scores(format, answer, has_scores):
    assert FORMATS[format].scored
    assert FORMATS[format].has_scores(answer) is has_scores


def test_two_formats_have_no_scores():
    assert [name for name, format_ in FORMATS.items() if not format_.scored] == ["r1-searcher", "zerosearch"]
