"""Recall of the question as query on the real sets equals the published reference of plain bm25s."""

import gzip
import json
import os
from pathlib import Path

import pytest

from searchqa_retrievers import BM25Retriever, Corpus, SearchRequest

SETS = ["hotpotqa", "2wikimultihopqa", "musique", "popqa", "nq", "triviaqa", "bamboogle"]
TOLERANCE = 0.005


def bare_words(text):
    """Lower case, punctuation as blanks, one blank around each word."""
    kept = "".join(char if char.isalnum() else " " for char in text.lower())
    return f" {' '.join(kept.split())} "


@pytest.mark.data
@pytest.mark.parametrize("name", SETS)
def test_recall_equals_the_reference(name, tmp_path):
    data = Path(os.environ["SEARCHQA_DATA"])
    reference = json.loads((data / "bm25_reference.json").read_text())[name]
    with gzip.open(data / name / "questions.jsonl.gz", "rt", encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines]
    retriever = BM25Retriever(Corpus.from_jsonl(data / name / "corpus.jsonl.gz"), cache_dir=tmp_path)
    answers = retriever.search([SearchRequest(question["question"], 10) for question in questions])
    recall = {}
    for k in (3, 5, 10):
        shares = []
        for question, hits in zip(questions, answers, strict=True):
            titles = set(question["metadata"].get("supporting_titles", ()))
            if titles:
                shares.append(len(titles & {hit.passage.title for hit in hits[:k]}) / len(titles))
        if shares:
            recall[f"all@{k}"] = sum(share == 1 for share in shares) / len(shares)
            recall[f"any@{k}"] = sum(share > 0 for share in shares) / len(shares)
            recall[f"mean@{k}"] = sum(shares) / len(shares)
        found = 0
        for question, hits in zip(questions, answers, strict=True):
            passages = [bare_words(f"{hit.passage.title} {hit.passage.text}") for hit in hits[:k]]
            found += any(bare_words(answer) in passage for answer in question["golden_answers"] for passage in passages)
        recall[f"ans@{k}"] = found / len(questions)
    wrong = {key: (recall[key], value) for key, value in reference.items() if key != "questions" and abs(recall[key] - value) > TOLERANCE}
    assert not wrong, wrong
