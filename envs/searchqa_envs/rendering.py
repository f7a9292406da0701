"""An episode as text for a terminal."""

from __future__ import annotations

from searchqa_envs.episode_types import EpisodeView

_DIM, _BOLD, _RESET = "\033[2m", "\033[1m", "\033[0m"
_HIDDEN = {code: "�" for code in range(32) if code not in (9, 10)} | {127: "�"} | dict.fromkeys(range(128, 160), "�")


def render_episode(view: EpisodeView, colour: bool, last_only: bool = False) -> str:
    """Prompt and environment text dim, segments bold where ``colour``.

    Control characters are shown as U+FFFD, so that no text can steer the terminal.
    ``last_only`` gives the newest turn (the prompt before the first).
    """
    parts: list[str] = []
    if not last_only or not view.turns:
        parts.append(_styled(view.prompt, _DIM, colour))
    for turn in view.turns[-1:] if last_only else view.turns:
        parts += [_styled(turn.segment, _BOLD, colour), _styled(turn.observation, _DIM, colour)]
    if view.turns and (view.terminated or view.answer is not None):
        parts.append(f"\n[answer: {(view.answer or 'none').translate(_HIDDEN)} | gold: {' / '.join(view.question.golden_answers)}]")
    return "".join(parts)


def _styled(text: str, style: str, colour: bool) -> str:
    text = text.translate(_HIDDEN)
    return f"{style}{text}{_RESET}" if colour and text else text
