"""The typed errors of this package. Each message states the rule, the value seen, and the way out."""

from __future__ import annotations


class SearchQAError(Exception):
    """Base of every error raised by ``searchqa_envs``."""


class InvalidSegmentError(SearchQAError, ValueError):
    """A segment is not a one-dimensional sequence of token ids of the vocabulary. The episode is left as it was."""


class ConfigurationError(SearchQAError, ValueError):
    """An argument of an environment, dialect, reward or tokenizer has an impossible value."""


class DataError(SearchQAError):
    """Base of the errors about question and corpus files."""


class MalformedRowError(DataError, ValueError):
    """A row of a data file cannot be read; the message names file, line and field."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data set is not on this machine and cannot be downloaded; the message names every way out."""


class UnknownQuestionError(DataError, KeyError):
    """No question of the set has the id or index asked for."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class EpisodeStateError(SearchQAError, RuntimeError):
    """``step`` before ``reset``, ``step`` after the end, or a saved state that belongs to another environment."""
