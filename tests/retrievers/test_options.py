"""The options of configurations: what is unknown, missing or of another type is refused for every retriever before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from searchqa_retrievers import Corpus, RetrieverError, build_retriever
from searchqa_retrievers.build import _MAKERS
from searchqa_retrievers.options import check_options


def make(
    corpus: Callable[[], Corpus],
    file: str,
    k1: float | None = None,
    depth: int = 3,
    show: bool = True,
    words: str | Sequence[str] | None = None,
    weights: Sequence[float] = (),
    more: Mapping[str, int] | None = None,
    anything: Any = None,
) -> None:
    """Takes options of every kind."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k1": 1},
        {"k1": 1.5, "depth": 4, "show": False},
        {"words": "en"},
        {"words": ["a", "b"]},
        {"words": None},
        {"weights": [1, 2.5]},
        {"more": {"a": 1}},
        {"anything": object()},
        {"file": Path("x")},
    ],
)
def test_values_that_fit_pass(options):
    check_options("mine", make, {"file": "x", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k1": "x"}, "'k1' .* a number or null, got 'x'"),
        ({"k1": True}, "a number or null, got True"),
        ({"depth": 3.0}, "a whole number, got 3.0"),
        ({"depth": "3"}, "a whole number, got '3'"),
        ({"depth": None}, "a whole number, got None"),
        ({"show": "no"}, "true or false, got 'no'"),
        ({"words": 5}, "a string or a list .each a string. or null, got 5"),
        ({"words": [1]}, r"got \[1\]"),
        ({"weights": "12"}, "a list .each a number., got '12'"),
        ({"weights": [1, "2"]}, "got"),
        ({"more": {"a": "b"}}, "a mapping or null"),
        ({"more": 5}, "a mapping or null"),
        ({"nothing": 1, "other": 2}, "no option nothing, other; it has file, k1, .*, price"),
    ],
)
def test_values_that_do_not_are_named_with_what_is_wanted(options, message):
    with pytest.raises(RetrieverError, match=message):
        check_options("mine", make, {"file": "x", **options}, ["price"])


def test_a_missing_option_is_named():
    with pytest.raises(RetrieverError, match="retriever 'mine' needs the option file"):
        check_options("mine", make, {"k1": 1.0})


def _cases() -> list[tuple[str, str]]:
    """Every option of every retriever for which no object will do."""
    cases = []
    for name, maker in _MAKERS.items():
        hints = get_type_hints(getattr(import_module(f"searchqa_retrievers.{maker.module}"), maker.function))
        cases += [(name, key) for key, hint in hints.items() if key not in ("corpus", "return") and hint is not Any]
    return cases


@pytest.mark.parametrize(("name", "key"), _cases())
def test_no_option_of_any_retriever_takes_what_it_cannot_use(name, key):
    maker = _MAKERS[name]
    function = getattr(import_module(f"searchqa_retrievers.{maker.module}"), maker.function)
    needed = {
        other: ["http://127.0.0.1:9"] if other == "urls" else "x"
        for other, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and other not in ("corpus", key)
    }

    def no_corpus() -> Corpus:
        raise AssertionError("the corpus was read before the options were checked")

    for value in (object(), [object()], {1: object()}):
        with pytest.raises(RetrieverError):
            build_retriever({"name": name, **needed, key: value}, no_corpus)
