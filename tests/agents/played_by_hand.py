"""A baseline's script played by hand: given the model's replies and what searches find, what it asked and what it did."""

import numpy as np

from searchqa_agents.scripted import Ask, Reply, Task
from searchqa_envs.dialects import SEARCH_R1
from searchqa_envs.episode import TurnRecord
from searchqa_envs.questions import Question
from searchqa_envs.tokenizers import ByteTokenizer

QUESTION = Question("q", "On which river lies the birthplace of Marie Curie?", ("Vistula",))
MAX_SEGMENT_TOKENS = 4096


def played(script, replies, found=(), *, max_turns=11, set_name=""):
    """All asks and all segments of a script. ``replies`` are what each ask is answered, all of them; ``found`` the passages of each search."""
    task = Task(QUESTION, SEARCH_R1, np.random.default_rng(0), max_turns, MAX_SEGMENT_TOKENS, ByteTokenizer(), False, set_name)
    asks, segments, running = [], [], script(task)
    replies, found, sent = iter(replies), iter(found), None
    while True:
        try:
            said = running.send(sent)
        except StopIteration:
            break
        if isinstance(said, Ask):
            asks.append(said)
            sent = next(replies)
        else:
            segments.append(said)
            nothing = np.empty(0, dtype=np.int32)
            sent = {"turn_record": TurnRecord(nothing, 0, nothing.astype(np.int8), tuple(next(found, ())), 0.0)}
    assert next(replies, None) is None, "the script asked less often than it was expected to"
    return asks, segments


def says(text, stop=None, finished=True, stop_known=True):
    """A reply."""
    return Reply(text, stop, finished, stop_known=stop_known)
