"""``searchqa play``: a person is the agent, in a terminal."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from searchqa_agents.cli import UsageError

PREFIXES = ("search:", "answer:")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See `searchqa play --help`.")


def main(line: Sequence[str]) -> int:
    """Run ``searchqa play <line>``."""
    parser = _Parser(prog="searchqa play", add_help=False)
    parser.add_argument("--question-id")
    parser.add_argument("--seed", type=int)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(list(line))
    env = make_env(arguments.overrides)
    options = {"question_id": arguments.question_id} if arguments.question_id is not None else None
    try:
        play(env, seed=arguments.seed, options=options)
    except (EOFError, KeyboardInterrupt):
        _say("\nYou left before an answer; bye.")
    finally:
        env.close()
    return 0


def make_env(overrides: Sequence[str]) -> Any:
    """The environment that ``env=NAME env.key=value ...`` describes, as text in, text out."""
    import gymnasium as gym
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    import searchqa_envs  # noqa: F401, registers the ids
    from searchqa_agents.settings import EnvSettings, env_arguments, register, with_parts
    from searchqa_envs.wrappers import TextView

    register()
    wrong = [word for word in overrides if not word.startswith(("env=", "env."))]
    if wrong:
        raise UsageError(f"play takes env=NAME and env.key=value; got {wrong[0]!r}. See `searchqa play --help`.")
    GlobalHydra.instance().clear()
    with initialize_config_module("searchqa_conf", version_base="1.3"):
        config = compose("play", overrides=with_parts(overrides))
    settings = cast(EnvSettings, OmegaConf.to_object(config.env))
    return TextView(gym.make(settings.id, **env_arguments(settings)))


def play(env: Any, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
    """One episode: what a line on standard input means is the segment of a turn. Raises ``EOFError`` at the end of input."""
    from searchqa_envs.world import WorldSource

    base = env.unwrapped
    rules, dialect = base.rules, base.dialect
    _, info = env.reset(seed=seed, options=options)
    if isinstance(base.source, WorldSource):
        _say("The question is about a made-up world: only its search engine knows the answer.")
    _say(f"Question ({info['question_id']}): {printable(info['question'])}")
    _say(f"Type `search: some words` or `answer: some words`, a line per turn ({rules.max_turns} at most). Ctrl-D leaves.\n")
    ended, truncated, reward = False, False, 0.0
    while not ended:
        line = _read(f"turn {info['turn'] + 1} of {rules.max_turns}> ")
        if not line.strip():
            continue
        _, reward, terminated, truncated, info = env.step(segment_of(line, dialect))
        ended = terminated or truncated
        _show_turn(base.episode_view().turns[-1], info, ended)
    _show_end(info, reward, truncated)


def segment_of(line: str, dialect: Any) -> str:
    """``search: q`` and ``answer: a`` in the dialect's tags; anything else as it is."""
    text = line.strip()
    for prefix, opening, closing in zip(
        PREFIXES, (dialect.search_open, dialect.answer_open), (dialect.search_close, dialect.answer_close), strict=True
    ):
        if text.lower().startswith(prefix):
            return f"{opening}{text[len(prefix) :].strip()}{closing}"
    return text


def printable(text: str) -> str:
    """Without control characters, so that no text from a corpus can steer the terminal."""
    return "".join(character if character.isprintable() or character == "\n" else "�" for character in text)


def _show_turn(turn: Any, info: dict[str, Any], ended: bool) -> None:
    if info["backend_error"]:
        _say(f"  The search back end was lost: {info['backend_error']}")
    elif turn.action.kind == "search" and turn.searched:
        for i, passage in enumerate(turn.passages, start=1):
            _say(f"  [{i}] {printable(passage.title)}")
            _say(printable(passage.text), indent="      ")
        if not turn.passages:
            _say("  Nothing was found.")
    elif turn.action.kind == "search":
        _say("  That was the last turn: the search is not carried out.")
    elif turn.action.kind == "invalid" and not ended:
        _say("  That is neither a search nor an answer, and cost a turn. Begin with `search:` or `answer:`.")
    _say("")


def _show_end(info: dict[str, Any], reward: float, truncated: bool) -> None:
    if truncated:
        _say("The episode ended without an answer.")
    given = "" if info["answer"] is None else f"Your answer: {printable(info['answer'])}   "
    _say(f"{given}Golden answers: {printable(' / '.join(info['golden_answers']))}")
    for title, values in (("reward terms", info["reward_terms"]), ("metrics", info["metrics"])):
        if values:
            _say(f"{title}: " + ", ".join(f"{name} {value:g}" for name, value in values.items()))
    _say(f"reward: {reward:g}")


def _read(prompt: str) -> str:
    if sys.stdin.isatty():
        if importlib.util.find_spec("readline") is not None:  # not on Windows, whose terminal edits lines itself
            import readline  # noqa: F401, gives input() arrow keys and a history
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    _say(f"{prompt}{printable(line.rstrip())}")
    return line


def _say(text: str, indent: str = "") -> None:
    """Write lines, on a terminal broken between words."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for line in text.split("\n"):
        wrapped = textwrap.wrap(line, width, initial_indent=indent, subsequent_indent=indent or "  ", break_on_hyphens=False)
        sys.stdout.write("\n".join(wrapped) + "\n")
    sys.stdout.flush()
