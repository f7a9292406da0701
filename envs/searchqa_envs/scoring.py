"""Scores an answer as one published system's released evaluation does, also in the corners where it differs from :mod:`searchqa_envs.metrics`.

The three systems name things differently, and none has all four measures:

============ ================================== ============================================== =====================================
measure      ``search-r1``                      ``r1-searcher``                                ``zerosearch``
============ ================================== ============================================== =====================================
em           **EM** (``em_check``)              EM (``exact_match_score``)                     not in its code
f1           not in its code                    F1 (``f1_score``)                              F1 (``f1_score_cal``)
cover_em     not in its code                    **ACC_R** (``cover_exact_match_score_1``)      not in its code
sub_em       ``subem_check``                    ``cover_exact_match_score_2``, in no table     **"EM"** (``em_check``)
normal form  :func:`normalise_squad`            :func:`normalise_r1_searcher`                  :func:`normalise_squad`
============ ================================== ============================================== =====================================

In bold: what the system's tables show, :data:`HEADLINE`. What a system's code does not have is the same measure after its normal form.

Rules, and where they were read:

- Search-R1 at a14dc3a, ``verl/utils/reward_score/qa_em.py``: equality, or for ``subem_check`` a substring of characters; a string or a list of
  golden answers, the best counts.
- R1-Searcher at 631167c, ``evaluation/metric_calc_rule.py`` (a copy, unchanged in these functions, is ``evaluation/metric_eval_rule.py`` of
  sonam13/Capstone_UOA at e863771): ``True`` and ``False``, exactly so, are ``yes`` and ``no`` on both sides before anything else; the answer is not
  stripped or lower-cased beforehand; cover match looks for every golden token, split at blanks, among the answer's tokens, whatever their order
  and number; F1 is 0 where one side is ``yes``, ``no`` or ``noanswer`` and the other is not the same. Golden answers are one string in its data; of a
  list its code takes the best, measure by measure. It reads ``pred_ans``, in which ``evaluation/eval_search_loacl.py`` writes ``I don't know.`` where there
  is no answer: an answer like others. It scores the first 2,000 rows of a file; here all count.
- ZeroSearch at 2d4cdca, ``verl/utils/reward_score/qa_em.py`` (a fork: YuchenFan48/ZeroSearch at 9fb5935): substring, F1 as bags of tokens, the best of both.

A text may normalise to nothing ("The", "!!!"). Then, as in the released code: two such texts are equal and cover each other, their F1 is 0, and a golden
one is a substring of every answer. :mod:`searchqa_envs.metrics`, whose numbers may be trained on, does not give that last point away.

One rule is ours: no answer, or a blank one, scores 0. Released code fails on no answer, and lets a blank one match what normalises to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from searchqa_envs.errors import ConfigurationError
from searchqa_envs.metrics import CLOSED_ANSWERS, Normaliser, token_f1
from searchqa_envs.normalise import normalise_r1_searcher, normalise_squad

MEASURES = ("em", "f1", "cover_em", "sub_em")


class _Rules(NamedTuple):
    normalise: Normaliser
    closed_answers: frozenset[str]
    """normal forms that earn no partial F1"""
    headline: str


_RULES = {
    "search-r1": _Rules(normalise_squad, frozenset(), "em"),
    "r1-searcher": _Rules(normalise_r1_searcher, CLOSED_ANSWERS, "cover_em"),
    "zerosearch": _Rules(normalise_squad, frozenset(), "sub_em"),
}

STYLES = tuple(_RULES)
HEADLINE = {style: rules.headline for style, rules in _RULES.items()}
"""The measure that a system's tables show."""
PUBLISHED_AS = {
    "search-r1": "EM",
    "r1-searcher": "ACC_R (cover exact match)",
    "zerosearch": "EM, which is a substring match in its released code",
}
"""How the system calls its :data:`HEADLINE`."""


def is_unanswered(prediction: str | None) -> bool:
    """Whether there is no answer, or a blank one."""
    return prediction is None or not prediction.strip()


def score(prediction: str | None, golden_answers: str | Sequence[str], style: str) -> dict[str, float]:
    """How good an answer is under a published system's normal form and rules.

    Parameters
    ----------
    prediction
        The answer alone, as the system took it from the model's text; None where there is none.
    golden_answers
        One or more; the best counts, for each measure by itself.
    style
        One of :data:`STYLES`.

    Returns
    -------
    dict
        ``em``, ``f1``, ``cover_em`` and ``sub_em``, each in [0, 1].

    Raises
    ------
    ConfigurationError
        There is no such style, or no golden answer.

    Examples
    --------
    >>> score("Paris, France", ["Paris"], "search-r1")
    {'em': 0.0, 'f1': 0.6666666666666666, 'cover_em': 1.0, 'sub_em': 1.0}
    """
    if style not in _RULES:
        raise ConfigurationError(f"style must be one of {', '.join(STYLES)}; got {style!r}.")
    golden = (golden_answers,) if isinstance(golden_answers, str) else tuple(golden_answers)
    if not golden:
        raise ConfigurationError("An answer is scored against at least one golden answer; got none.")
    if prediction is None or is_unanswered(prediction):
        return dict.fromkeys(MEASURES, 0.0)
    rules = _RULES[style]
    normal = rules.normalise(prediction)
    forms = [rules.normalise(gold) for gold in golden]
    # split(" ") and not split(), as released: a text that normalises to nothing has the one token ""
    tokens = set(normal.split(" "))
    return {
        "em": float(normal in forms),
        "f1": max(_f1(normal, form, rules.closed_answers) for form in forms),
        "cover_em": float(any(tokens.issuperset(form.split(" ")) for form in forms)),
        "sub_em": float(any(form in normal for form in forms)),
    }


def _f1(normal: str, form: str, closed_answers: frozenset[str]) -> float:
    if not normal or not form or (normal != form and (normal in closed_answers or form in closed_answers)):
        return 0.0
    return token_f1(normal, form)
