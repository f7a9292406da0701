"""The compiled search over postings. Importing this module imports numba; only large corpora do.

The scan has two levels: the maximum of every block of 256 scores first, then only the blocks that can hold one of the best. Scores are
never negative, and non-negative floats order like the integers of the same bits, which compilers turn into vector instructions.
"""

from __future__ import annotations

import logging
import pickle
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

logger = logging.getLogger(__name__)

BLOCK = 256
_SPARSE_SHARE = 16


def _insert(best: npt.NDArray[np.int32], documents: npt.NDArray[np.int32], count: int, value: int, document: int) -> int:
    """Put one score into a list ordered by (score descending, document ascending); returns the new length."""
    k = len(best)
    if count == k:
        if value < best[k - 1] or (value == best[k - 1] and document > documents[k - 1]):
            return count
        slot = k - 1
    else:
        slot = count
        count += 1
    while slot > 0 and (best[slot - 1] < value or (best[slot - 1] == value and documents[slot - 1] > document)):
        best[slot] = best[slot - 1]
        documents[slot] = documents[slot - 1]
        slot -= 1
    best[slot] = value
    documents[slot] = document
    return count


_compiled_insert: Any = numba.njit(nogil=True)(_insert)


def _search(
    data: npt.NDArray[np.float32],  # [P]
    indices: npt.NDArray[np.int32],  # [P]
    indptr: npt.NDArray[np.int64],  # [V + 1]
    terms: npt.NDArray[np.int32],  # [T] the terms of all queries, -1 for none
    ends: npt.NDArray[np.int64],  # [Q + 1] the terms of query q are terms[ends[q]:ends[q + 1]]
    scores: npt.NDArray[np.float32],  # [a multiple of BLOCK] all zero; all zero again at the end
    block_best: npt.NDArray[np.int32],  # [len(scores) / BLOCK]
    out_scores: npt.NDArray[np.float32],  # [Q, k]
    out_documents: npt.NDArray[np.int32],  # [Q, k]
    out_counts: npt.NDArray[np.int64],  # [Q]
) -> None:
    positions = indices.view(np.uint32)  # without a sign, no test for indexing from the end: half the time of the loop over postings
    bits = scores.view(np.int32)
    out_bits = out_scores.view(np.int32)
    k = out_scores.shape[1]
    thresholds = np.empty(k, dtype=np.int32)
    for q in range(len(ends) - 1):
        postings = 0
        for t in range(ends[q], ends[q + 1]):
            term = terms[t]
            if term >= 0:
                where = positions[indptr[term] : indptr[term + 1]]
                what = data[indptr[term] : indptr[term + 1]]
                postings += len(where)
                for j in range(len(where)):
                    scores[where[j]] += what[j]
        best = out_bits[q]
        documents = out_documents[q]
        count = 0
        if postings * _SPARSE_SHARE < len(scores):
            # Few postings: visit the touched passages again; clearing each keeps it from being counted twice.
            for t in range(ends[q], ends[q + 1]):
                term = terms[t]
                if term >= 0:
                    where = positions[indptr[term] : indptr[term + 1]]
                    for j in range(len(where)):
                        document = where[j]
                        value = bits[document]
                        if value > 0:
                            if count < k or value >= best[k - 1]:
                                count = _compiled_insert(best, documents, count, value, np.int32(document))
                            bits[document] = 0
        else:
            # The k-th best block maximum bounds the k-th best score from below, since every block holds its maximum.
            filled = 0
            for block in range(len(block_best)):
                chunk = bits[block * BLOCK : (block + 1) * BLOCK]
                top = np.int32(0)
                for i in range(BLOCK):
                    top = max(top, chunk[i])
                block_best[block] = top
                if filled < k or top > thresholds[k - 1]:
                    slot = min(filled, k - 1)
                    filled = min(filled + 1, k)
                    while slot > 0 and thresholds[slot - 1] < top:
                        thresholds[slot] = thresholds[slot - 1]
                        slot -= 1
                    thresholds[slot] = top
            threshold = np.int32(1)
            if filled == k:
                threshold = max(threshold, thresholds[k - 1])
            for block in range(len(block_best)):
                if block_best[block] >= threshold:
                    chunk = bits[block * BLOCK : (block + 1) * BLOCK]
                    for i in range(BLOCK):
                        if chunk[i] >= threshold:
                            count = _compiled_insert(best, documents, count, chunk[i], np.int32(block * BLOCK + i))
                    if count == k:
                        threshold = max(threshold, best[k - 1] + np.int32(1))  # passages come in order: a later equal loses
            scores[:] = 0
        out_counts[q] = count


def _array(dtype: Any, dimensions: int, readonly: bool = False) -> Any:
    return types.Array(dtype, dimensions, "C", readonly=readonly)


_SIGNATURE = types.void(
    _array(types.float32, 1, readonly=True),
    _array(types.int32, 1, readonly=True),
    _array(types.int64, 1, readonly=True),
    _array(types.int32, 1),
    _array(types.int64, 1),
    _array(types.float32, 1),
    _array(types.int32, 1),
    _array(types.float32, 2),
    _array(types.int32, 2),
    _array(types.int64, 1),
)


@cache
def compiled_search() -> Any:
    """The machine code of ``_search``, from numba's cache on disk where there is one, else compiled now (about two seconds)."""
    try:
        return numba.njit(_SIGNATURE, cache=True, nogil=True)(_search)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        logger.info("numba cannot keep compiled code on disk (%s); the search is compiled in every process", error)
        return numba.njit(_SIGNATURE, nogil=True)(_search)
