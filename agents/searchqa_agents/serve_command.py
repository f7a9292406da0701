"""``searchqa serve``: a search server over a corpus."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

TOKEN_VARIABLE = "SEARCHQA_RETRIEVER_TOKEN"
"""Environment variable with the server's token: on a command line it would be seen by everybody on the machine."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from searchqa_agents.cli import UsageError

        raise UsageError(f"{message}. See `searchqa serve --help`.")


def main(line: Sequence[str]) -> int:
    """Run ``searchqa serve <line>`` until it is told to stop."""
    import yaml

    from searchqa_agents.cli import UsageError
    from searchqa_retrievers import Corpus, build_retriever
    from searchqa_retrievers.http_server import check_exposure, serve

    parser = _Parser(prog="searchqa serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--retriever", default="bm25")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("options", nargs="*")
    words = parser.parse_intermixed_args(line)
    if words.top_k < 1 or not 0 <= words.port <= 65535:
        raise UsageError(f"--top-k must be at least 1 and --port 0 to 65535; got {words.top_k} and {words.port}.")
    options = {}
    for word in words.options:
        key, equals, value = word.partition("=")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or key == "name":
            raise UsageError(f"An option of the retriever is key=value, such as preset=search-r1; got {word!r}.")
    token = os.environ.get(TOKEN_VARIABLE) or None
    check_exposure(words.host, token)  # before the time that an index takes
    retriever = build_retriever({"name": words.retriever, **options}, lambda: Corpus.from_jsonl(words.corpus))
    serve(retriever, words.host, words.port, token=token, default_top_k=words.top_k)
    return 0
