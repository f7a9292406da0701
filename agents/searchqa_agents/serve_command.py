"""``searchqa serve``: a search server over a corpus, or with the retriever of an environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from searchqa_retrievers import Retriever

TOKEN_VARIABLE = "SEARCHQA_RETRIEVER_TOKEN"
"""Environment variable with the server's token: on a command line it would be seen by everybody on the machine."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from searchqa_agents.cli import UsageError

        raise UsageError(f"{message}. See `searchqa serve --help`.")


def main(line: Sequence[str]) -> int:
    """Run ``searchqa serve <line>`` until it is told to stop."""
    from searchqa_agents.cli import UsageError
    from searchqa_retrievers.http_server import Limits, check_exposure, check_installed, serve

    parser = _Parser(prog="searchqa serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--corpus")
    parser.add_argument("--retriever")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--waiting", type=int, default=Limits.waiting)
    parser.add_argument("options", nargs="*")
    words = parser.parse_intermixed_args(line)
    if words.top_k < 1 or words.waiting < 1 or not 0 <= words.port <= 65535:
        got = f"{words.top_k}, {words.waiting} and {words.port}"
        raise UsageError(f"--top-k and --waiting must be at least 1 and --port 0 to 65535; got {got}.")
    of_env = [word for word in words.options if word.startswith(("env=", "env."))]
    options = [word for word in words.options if word not in of_env]
    if bool(of_env) == (words.corpus is not None):
        raise UsageError("Either --corpus FILE or env=NAME says what is searched. See `searchqa serve --help`.")
    if of_env and (words.retriever is not None or options):
        raise UsageError(
            "The retriever of an environment is chosen as for training: env.retriever=bm25, or env.retriever.name= and its options."
        )
    token = os.environ.get(TOKEN_VARIABLE) or None
    check_installed()
    check_exposure(words.host, token)  # before the time that an index takes
    filters = None
    if of_env:
        retriever, filters = _of_environment(of_env)
    else:
        retriever = _over_corpus(words.corpus, words.retriever or "bm25", options)
    limits = Limits(waiting=words.waiting)
    serve(retriever, words.host, words.port, token=token, default_top_k=words.top_k, limits=limits, ready_filters=filters)
    return 0


def _over_corpus(corpus: str, name: str, words: Sequence[str]) -> Retriever:
    import yaml

    from searchqa_agents.cli import UsageError
    from searchqa_retrievers import build_retriever
    from searchqa_retrievers.stored_corpus import open_corpus

    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or key == "name":
            raise UsageError(f"An option of the retriever is key=value, such as preset=search-r1; got {word!r}.")
    return build_retriever({"name": name, **options}, lambda: open_corpus(corpus))


def _of_environment(words: Sequence[str]) -> tuple[Retriever, Mapping[str, str] | None]:
    """The retriever of the environment that these words of a training line describe, and the filters of a search in it."""
    from searchqa_agents.play import make_env

    rules = make_env(words).unwrapped.rules
    return rules.retriever, rules.source.filters(rules.source[0])
