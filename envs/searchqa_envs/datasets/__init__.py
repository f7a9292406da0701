"""Real question sets: found on this machine or downloaded, in the formats they are published in.

>>> from searchqa_envs.datasets import load_source
>>> source = load_source("hotpotqa", split="dev")  # doctest: +SKIP
"""

from searchqa_envs.datasets.formats import FORMATS, make_passage, passage_id, read_questions
from searchqa_envs.datasets.registry import DATASETS, DatasetInfo, HubFiles, dataset_info
from searchqa_envs.datasets.sources import DatasetSource, clear_cache, corpus_from_contexts, load_custom, load_source, locate

__all__ = [
    "DATASETS",
    "FORMATS",
    "DatasetInfo",
    "DatasetSource",
    "HubFiles",
    "clear_cache",
    "corpus_from_contexts",
    "dataset_info",
    "load_custom",
    "load_source",
    "locate",
    "make_passage",
    "passage_id",
    "read_questions",
]
