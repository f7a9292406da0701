"""``searchqa play``: a person is the agent, in a terminal."""

from __future__ import annotations

import argparse
import sys
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
    from searchqa_agents.settings import EnvSettings, env_arguments, register
    from searchqa_envs.wrappers import TextView

    register()
    wrong = [word for word in overrides if not word.startswith(("env=", "env."))]
    if wrong:
        raise UsageError(f"play takes env=NAME and env.key=value; got {wrong[0]!r}. See `searchqa play --help`.")
    GlobalHydra.instance().clear()
    with initialize_config_module("searchqa_conf", version_base="1.3"):
        config = compose("play", overrides=list(overrides))
    settings = cast(EnvSettings, OmegaConf.to_object(config.env))
    return TextView(gym.make(settings.id, **env_arguments(settings)))


def play(env: Any, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
    """One episode: what a line on standard input means is the segment of a turn. Raises ``EOFError`` at the end of input."""
    base = env.unwrapped
    rules, dialect = base.rules, base.dialect
    _, info = env.reset(seed=seed, options=options)
    _say(f"Question ({info['question_id']}): {printable(info['question'])}")
    _say(f"search: ...   answer: ...   or {dialect.search_open}...{dialect.search_close}. {rules.max_turns} turns; Ctrl-D leaves.\n")
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
            _say(f"  [{i}] {printable(passage.title)}\n      {printable(passage.text)}")
        if not turn.passages:
            _say("  Nothing was found.")
    elif turn.action.kind == "search":
        _say("  That was the last turn: the search is not carried out.")
    elif turn.action.kind == "invalid" and not ended:
        _say("  That is neither a search nor an answer; it cost a turn.")
    _say("")


def _show_end(info: dict[str, Any], reward: float, truncated: bool) -> None:
    if truncated:
        _say("The episode ended without an answer.")
    _say(f"Your answer: {printable(str(info.get('answer')))}   Golden answers: {printable(' / '.join(info['golden_answers']))}")
    for title, values in (("reward terms", info["reward_terms"]), ("metrics", info["metrics"])):
        if values:
            _say(f"{title}: " + ", ".join(f"{name} {value:g}" for name, value in values.items()))
    _say(f"reward: {reward:g}")


def _read(prompt: str) -> str:
    if sys.stdin.isatty():
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    _say(f"{prompt}{printable(line.rstrip())}")
    return line


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
