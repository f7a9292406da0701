"""How good an answer and its searches are.

Three systems call three different things "EM". Here each has its own name:

========== ===================================================== ========================================
metric     is 1 when                                             published as
========== ===================================================== ========================================
em         the normal forms are equal                            EM of Search-R1 and SQuAD
sub_em     the golden normal form is a substring of the answer's "EM" of ZeroSearch's released code
cover_em   every golden token is among the answer's tokens       ACC_R of R1-Searcher
========== ===================================================== ========================================

All take the best over the golden answers. A blank answer scores 0, whatever the golden answers are. ``em``, ``sub_em`` and ``f1`` normalise as
Search-R1 and ZeroSearch do, ``cover_em`` as R1-Searcher does; ``em_r1_searcher``, ``sub_em_r1_searcher``, ``f1_r1_searcher`` and
``cover_em_squad`` are the same measures after the other normalisation. To score as one system's released code does, in every corner, use
:mod:`searchqa_envs.scoring`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from searchqa_envs.episode_types import EpisodeView
from searchqa_envs.normalise import normalise_r1_searcher, normalise_squad

Normaliser = Callable[[str], str]

CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})
"""Normal forms that R1-Searcher's F1 counts as right or wrong, with nothing between."""


def em(prediction: str, golden_answers: Sequence[str]) -> float:
    """Exact match after SQuAD's normalisation (Search-R1's ``em_check``)."""
    return _em(prediction, golden_answers, normalise_squad)


def em_r1_searcher(prediction: str, golden_answers: Sequence[str]) -> float:
    """Exact match after R1-Searcher's normalisation (its ``exact_match_score``)."""
    return _em(prediction, golden_answers, normalise_r1_searcher)


def _em(prediction: str, golden_answers: Sequence[str], normalise: Normaliser) -> float:
    if not prediction.strip():
        return 0.0
    normal = normalise(prediction)
    return float(any(normal == normalise(gold) for gold in golden_answers))


def sub_em(prediction: str, golden_answers: Sequence[str]) -> float:
    """Substring match after SQuAD's normalisation (what ZeroSearch's released code calls ``em``).

    Substrings are of characters: gold "no" is found in "Norway". A golden answer that normalises to nothing ("The") matches only an answer
    that does so too; the released code finds it everywhere.
    """
    return _sub_em(prediction, golden_answers, normalise_squad)


def sub_em_r1_searcher(prediction: str, golden_answers: Sequence[str]) -> float:
    """Substring match after R1-Searcher's normalisation (its ``cover_exact_match_score_2``, which its tables do not show)."""
    return _sub_em(prediction, golden_answers, normalise_r1_searcher)


def _sub_em(prediction: str, golden_answers: Sequence[str], normalise: Normaliser) -> float:
    if not prediction.strip():
        return 0.0
    normal = normalise(prediction)
    return float(any(form in normal if form else not normal for form in map(normalise, golden_answers)))


def cover_em(prediction: str, golden_answers: Sequence[str]) -> float:
    """Whether every token of a golden answer is among the answer's tokens, in any order (R1-Searcher's ACC_R, its normaliser)."""
    return _cover_em(prediction, golden_answers, normalise_r1_searcher)


def cover_em_squad(prediction: str, golden_answers: Sequence[str]) -> float:
    """Cover match after SQuAD's normalisation; no released code has it."""
    return _cover_em(prediction, golden_answers, normalise_squad)


def _cover_em(prediction: str, golden_answers: Sequence[str], normalise: Normaliser) -> float:
    if not prediction.strip():
        return 0.0
    # split(" ") and not split(): a text that normalises to nothing has the one token "", and so matches only its like
    tokens = set(normalise(prediction).split(" "))
    return float(any(tokens.issuperset(normalise(gold).split(" ")) for gold in golden_answers))


def f1(prediction: str, golden_answers: Sequence[str]) -> float:
    """Best token F1 over the golden answers after SQuAD's normalisation (ZeroSearch's ``f1``)."""
    if not prediction.strip():
        return 0.0
    normal = normalise_squad(prediction)
    return max((token_f1(normal, normalise_squad(gold)) for gold in golden_answers), default=0.0)


def f1_r1_searcher(prediction: str, golden_answers: Sequence[str]) -> float:
    """Best token F1 after R1-Searcher's normalisation; 0 when one side is yes, no or noanswer and the other is not the same.

    The released code knows one golden answer per question; here the best of all counts.
    """
    if not prediction.strip():
        return 0.0
    normal = normalise_r1_searcher(prediction)
    best = 0.0
    for gold in golden_answers:
        form = normalise_r1_searcher(gold)
        if normal != form and (normal in CLOSED_ANSWERS or form in CLOSED_ANSWERS):
            continue
        best = max(best, token_f1(normal, form))
    return best


def token_f1(prediction: str, gold: str) -> float:
    """F1 of two normal forms as bags of tokens; equal forms give 1, also when both are empty (SQuAD 2.0's rule)."""
    if prediction == gold:
        return 1.0
    predicted, expected = prediction.split(), gold.split()
    if not predicted or not expected:
        return 0.0
    if len(expected) == 1:
        common = int(expected[0] in predicted)
    else:
        common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))


def title_recall(titles: Sequence[str], supporting_titles: Sequence[str]) -> dict[str, float]:
    """``title_recall_all | any | mean``: whether all, whether any, and which share of the supporting titles are among ``titles``.

    Titles are compared as they are. Empty when the question has no supporting titles.
    """
    wanted = set(supporting_titles)
    if not wanted:
        return {}
    found = len(wanted.intersection(titles))
    return {
        "title_recall_all": float(found == len(wanted)),
        "title_recall_any": float(found > 0),
        "title_recall_mean": found / len(wanted),
    }


def episode_metrics(episode: EpisodeView) -> dict[str, float]:
    """The metrics of a finished episode.

    ``em, f1, cover_em, sub_em, searches, invalid_turns`` always; ``title_recall_all | any | mean`` over all passages retrieved in the
    episode where the question has supporting titles. An episode without an answer scores 0 on the first four.
    """
    answer, golden_answers = episode.answer or "", episode.question.golden_answers
    metrics = {
        "em": em(answer, golden_answers),
        "f1": f1(answer, golden_answers),
        "cover_em": cover_em(answer, golden_answers),
        "sub_em": sub_em(answer, golden_answers),
        "searches": float(episode.searches),
        "invalid_turns": float(sum(turn.action.kind == "invalid" for turn in episode.turns)),
    }
    supporting_titles = episode.question.supporting_titles
    if supporting_titles:
        titles = [passage.title for turn in episode.turns for passage in turn.passages]
        metrics.update(title_recall(titles, supporting_titles))
    return metrics
