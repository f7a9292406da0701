"""The making of a simulated search engine: what is collected, how it is labelled, what it is trained on, and what is measured."""

from __future__ import annotations

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import searchqa_envs  # noqa: F401  # registers the ids, and the tokenizer of our checkpoints
from searchqa_agents.cli import main
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.scripted import ScriptedAgent
from searchqa_agents.simulator.collect import collect_searches
from searchqa_agents.simulator.examples import encoded_examples, make_examples, written_documents
from searchqa_agents.simulator.labels import (
    Judge,
    JudgeError,
    judge_prompt,
    label_by_outcome,
    label_by_titles,
    label_counts,
    read_verdict,
)
from searchqa_agents.simulator.measures import Written, about_query, holds_answer, measure_documents, other_names, page_form
from searchqa_agents.simulator.rows import RowsError, SearchRow, iterate_rows, labelled_rows, row_lines, rows_sha256
from searchqa_envs.tokenizers import build_tokenizer
from searchqa_envs.tokenizers.world import WorldTokenizer
from searchqa_envs.world.names import SYLLABLES, split_of
from searchqa_retrievers import Corpus, Passage, SearchRequest, build_retriever
from searchqa_retrievers.simulated import read_documents
from searchqa_retrievers.simulated_endpoint import TextEndpoint
from searchqa_retrievers.simulation_prompts import PROMPTS, simulation_prompt
from searchqa_retrievers.text_model_tokenizers import load_text_tokenizer

MAKO = Passage("p1", "Mako", "Mako is a film . director Rimu . star Mono .")
RIMU = Passage("p2", "Rimu", "Rimu is a person . birthplace Tovu . spouse Zaza .")
OTHER = Passage("p3", "Zaza", "Zaza is a person . birthplace Bado . spouse Rimu .")


def made_row(**changes):
    values = {
        "id": "q/0/1",
        "question_id": "q",
        "question": "what is Mako 's director 's birthplace ?",
        "golden_answers": ("Tovu", "Tovulo"),
        "query": "Rimu",
        "turn": 1,
        "last": True,
        "documents": (RIMU, OTHER),
        "answer": "Tovu",
        "right": True,
        "supporting_titles": ("Mako", "Rimu"),
        "note": "Rimu , birthplace ?",
    }
    return SearchRow(**{**values, **changes})


def world(**arguments):
    return gym.make_vec("SearchQA-World-v0", num_envs=4, autoreset_mode="DISABLED", num_worlds=3, top_k=3, hops=2, **arguments)


def collected(script="oracle", count=24, **arguments):
    venv = world(**arguments)
    return collect_searches(venv, ScriptedAgent.for_env(script, venv), range(count), stamp="abc")


# -- rows --------------------------------------------------------------------------------------------------------------------------------


def test_a_row_survives_its_file(tmp_path):
    rows = [made_row(), made_row(labels=("useful", None), answer=None, note="Ł\n")]
    (tmp_path / "rows.jsonl").write_text(row_lines(rows), encoding="utf-8")
    assert list(iterate_rows(tmp_path)) == rows


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ("{}", "line 2"),
        (json.dumps({**made_row().to_json(), "labels": ["useful"]}), "one for each"),
        (json.dumps({**made_row().to_json(), "labels": ["useful", "good"]}), "labels must be among"),
    ],
)
def test_a_line_that_is_no_row_is_an_error_that_names_it(tmp_path, line, says):
    (tmp_path / "rows.jsonl").write_text(row_lines([made_row()]) + line + "\n", encoding="utf-8")
    with pytest.raises(RowsError, match=says):
        list(iterate_rows(tmp_path))


def test_rows_without_labels_are_refused_where_labels_are_needed(tmp_path):
    (tmp_path / "rows.jsonl").write_text(row_lines([made_row()]), encoding="utf-8")
    with pytest.raises(RowsError, match="simulator label"):
        labelled_rows(tmp_path)


def test_half_a_surrogate_pair_does_not_stop_the_rows_from_being_written(tmp_path):
    broken = made_row(documents=(Passage("p", "", "a \ud800 b \udc00"),), question="\U0001f600?")
    (tmp_path / "rows.jsonl").write_bytes(row_lines([broken]).encode())
    [row] = iterate_rows(tmp_path)
    assert (row.documents[0].text, row.question) == ("a \ufffd b \ufffd", "\U0001f600?")


def test_a_question_without_golden_answers_is_named_where_one_must_be_told():
    bare = made_row(golden_answers=(), labels=("useful", "noisy"))
    with pytest.raises(RowsError, match="'q/0/1' has no golden answer"):
        judge_prompt(bare, RIMU)
    with pytest.raises(RowsError, match="'q/0/1' has no golden answer"):
        make_examples([bare], PROMPTS["world"], documents=1)


# -- collect -----------------------------------------------------------------------------------------------------------------------------


def test_the_oracle_leaves_a_row_for_each_search_with_what_the_engine_really_finds():
    rows, trajectories = collected()
    assert len(rows) == sum(int(t.metrics["searches"]) for t in trajectories) == 48
    venv = world()
    source, retriever = venv.unwrapped.source, venv.unwrapped.rules.retriever
    for row in rows:
        question = source[source.index_of(row.question_id)]
        link = question.metadata["chain"][row.turn]
        assert (row.query, row.golden_answers, row.right, row.stamp) == (link["query"], question.golden_answers, True, "abc")
        assert row.last == (row.turn == 1)
        [found] = retriever.search([SearchRequest(row.query, 3, filters=source.filters(question))])
        assert row.documents == tuple(hit.passage for hit in found)
        assert row.documents[0].title == link["title"]
        assert row.note == (f"{row.query} , {link['relation']} ?" if row.last else f"{row.query} 's {link['relation']} 's")


def test_the_rows_of_several_samples_are_told_apart_and_a_wrong_episode_is_not_right():
    venv = world()
    rows, trajectories = collect_searches(venv, ScriptedAgent.for_env("lazy_oracle", venv), range(6), samples=3, seed=1)
    assert len({row.id for row in rows}) == len(rows)
    right = {f"{t.question_id}/{n % 3}": t.metrics["em"] == 1 for n, t in enumerate(trajectories)}
    assert {row.id.rsplit("/", 1)[0]: row.right for row in rows} == right
    assert set(right.values()) == {True, False}


def test_no_name_of_the_held_out_splits_is_in_rows_of_the_training_worlds():
    names = re.compile(r"\b(?:" + "|".join(SYLLABLES) + r")+\b", re.IGNORECASE)
    rows, _ = collected()
    found = {name for line in row_lines(rows).splitlines() for name in names.findall(line) if name[0].isupper()}
    assert len(found) > 50
    assert {split_of(name) for name in found} == {"train"}
    held_out, _ = collected(split="test")
    assert not found & {name for line in row_lines(held_out).splitlines() for name in names.findall(line) if name[0].isupper()}


# -- label -------------------------------------------------------------------------------------------------------------------------------


def test_labels_by_outcome_are_those_of_the_episode():
    assert label_by_outcome(made_row()).labels == ("useful", "useful")
    assert label_by_outcome(made_row(right=False)).labels == ("noisy", "noisy")


def test_labels_by_titles_are_those_of_the_gold_chain():
    assert label_by_titles(made_row()).labels == ("useful", "noisy")
    with pytest.raises(RowsError, match="by=outcome or by=judge"):
        label_by_titles(made_row(supporting_titles=()))


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("yes", "useful"),
        (" No.\n", "noisy"),
        ("**YES**", "useful"),
        ("", None),
        ("yes and no", None),  # not one word
        ("Yesterday", None),
        ("It helps, yes", None),
        ("no, it states Tovu", None),  # what is said behind it may take it back
    ],
)
def test_a_verdict_is_one_word_and_nothing_else(reply, verdict):
    assert read_verdict(reply) == verdict


@given(st.text())
def test_a_reply_without_the_words_is_no_verdict(text):
    if not re.search("yes|no", text, re.IGNORECASE):
        assert read_verdict(text) is None


class JudgeServer(ThreadingHTTPServer):
    """Chat completions that ``say(prompt, body)`` gives; a number is a status."""

    daemon_threads = True

    def __init__(self, say):
        super().__init__(("127.0.0.1", 0), _JudgeHandler)
        self.say, self.prompts = say, []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self):
        self.shutdown()
        self._thread.join()
        self.server_close()


class _JudgeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        prompt = content if isinstance(content, str) else content[0]["text"]
        self.server.prompts.append(prompt)
        said = self.server.say(prompt, body)
        message = {"role": "assistant", "content": said}
        reply = (
            json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode() if isinstance(said, str) else b""
        )
        self.send_response(200 if isinstance(said, str) else said)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def judge_server():
    made = []

    def start(say):
        made.append(JudgeServer(say))
        return made[-1]

    yield start
    for server in made:
        server.stop()


def knows_rimu(prompt, body):
    """Judges by a rule: the document is Rimu's."""
    return "yes" if "\nRimu is" in prompt else "No."


def test_a_judge_over_http_labels_each_document_and_is_asked_once_for_equal_ones(judge_server):
    server = judge_server(knows_rimu)
    writer = TextEndpoint([server.url], temperature=0.0)
    kept = {}
    rows = Judge(writer, on_verdicts=kept.update, batch_size=1).label([made_row(), made_row(id="q/1/1")])
    writer.close()
    assert [row.labels for row in rows] == [("useful", "noisy")] * 2
    assert sorted(server.prompts) == sorted(judge_prompt(made_row(), document) for document in (RIMU, OTHER))
    assert len(kept) == 2
    assert Judge(None, known=kept).label([made_row()]) == rows[:1]  # nobody is asked


def test_an_unreadable_verdict_is_asked_for_again_and_a_judge_that_never_says_yes_or_no_is_an_error(judge_server):
    seeds = set()

    def wavers(prompt, body):
        if "\nRimu is" not in prompt:
            return "no"
        seeds.add(body["seed"])
        return "yes" if len(seeds) == 3 else "perhaps"

    writer = TextEndpoint([judge_server(wavers).url])
    assert Judge(writer, tries=3).label([made_row()])[0].labels == ("useful", "noisy")
    assert len(seeds) == 3  # each time with noise of its own
    writer.close()
    silent = TextEndpoint([judge_server(lambda prompt, body: "Well, it depends.").url])
    with pytest.raises(JudgeError, match="2 of 2 documents"):
        Judge(silent, tries=2).label([made_row()])
    silent.close()


def test_a_judge_is_asked_again_in_other_words_and_above_temperature_0(tmp_path, judge_server):
    asked = []

    def wavers(prompt, body):
        asked.append((body["temperature"], prompt))
        return "perhaps" if len(asked) < 3 else "yes"

    (tmp_path / "rows.jsonl").write_text(row_lines([made_row(documents=(RIMU,))]), encoding="utf-8")
    words = ["simulator", "label", f"rows={tmp_path}", "by=judge", f"judge.url={judge_server(wavers).url}", f"run_dir={tmp_path / 'run'}"]
    assert main(words) == 0
    assert [temperature for temperature, _ in asked] == [0.0, 0.7, 0.7]
    assert asked[1][1] == asked[2][1] != asked[0][1]
    assert asked[1][1].startswith(asked[0][1])


def test_the_verdicts_of_one_judge_are_not_anothers():
    class Writer:
        def __init__(self, reply):
            self.reply = reply

        def write(self, jobs):
            return [self.reply] * len(jobs), 0

    kept = {}
    Judge(Writer("yes"), judge={"model": "a"}, on_verdicts=kept.update).label([made_row()])
    [row] = Judge(Writer("no"), judge={"model": "b"}, known=kept).label([made_row()])
    assert row.labels == ("noisy", "noisy")


def test_few_unreadable_verdicts_are_left_out_and_counted():
    class Writer:
        def write(self, jobs):
            return ["?" if "number 7 " in job.prompt else "yes" for job in jobs], 0

    documents = tuple(Passage(f"p{n}", "", f"number {n} of forty") for n in range(40))
    [row] = Judge(Writer()).label([made_row(documents=documents)])
    assert row.labels[7] is None
    assert label_counts([row]) == {"useful": 39, "noisy": 0, "left_out": 1}


# -- train -------------------------------------------------------------------------------------------------------------------------------


def test_examples_have_the_first_documents_of_each_label_and_their_number_in_the_prompt():
    labelled = made_row(documents=(RIMU, OTHER, MAKO), labels=("useful", "noisy", "useful"))
    prompt = PROMPTS["sft"]
    useful, noisy = make_examples([labelled], prompt, documents=5)
    assert useful.completion == f"Doc 1: {RIMU.text}\nDoc 2: {MAKO.text}"
    assert useful.prompt == prompt.write(False, 2, labelled.query, labelled.question, "Tovu")
    assert (noisy.completion, noisy.prompt) == (f"Doc 1: {OTHER.text}", prompt.write(True, 1, labelled.query, labelled.question, "Tovu"))
    assert make_examples([labelled], prompt, documents=1)[0].completion == f"Doc 1: {RIMU.text}"
    assert [one.quality for one in make_examples([made_row(labels=("noisy", None))], prompt, documents=1)] == ["noisy"]


@pytest.mark.parametrize("titles", [False, True])
@pytest.mark.parametrize("notes", [False, True])
def test_the_retriever_reads_from_a_completion_the_documents_that_it_was_made_of(titles, notes):
    labelled = made_row(documents=(RIMU, MAKO), labels=("useful", "useful"))
    [example] = make_examples([labelled], PROMPTS["world"], documents=2, titles=titles, notes=notes)
    assert example.completion.startswith(" Rimu , birthplace ?\n" if notes else "Doc 1")
    hits = read_documents(example.completion, 2)
    assert [(hit.passage.title, hit.passage.text) for hit in hits] == [(d.title if titles else "", d.text) for d in (RIMU, MAKO)]


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3))
def test_a_line_break_in_a_document_begins_no_other(texts):
    written = written_documents([Passage("p", "", text) for text in texts], titles=False)
    assert len(written.split("\n")) == len(texts)


def test_the_loss_is_on_the_documents_and_the_end_alone():
    tokenizer = WorldTokenizer()
    examples = make_examples([made_row(labels=("useful", "noisy"))], PROMPTS["world"], documents=1, titles=True, notes=True)
    sequences, too_long = encoded_examples(examples, load_text_tokenizer(str(shipped_checkpoint())), tokenizer, max_tokens=200)
    assert too_long == 0
    for example, sequence in zip(examples, sequences, strict=True):
        assert tokenizer.decode(sequence.token_ids[sequence.loss_mask == 0].tolist()) == example.prompt
        written = sequence.token_ids[sequence.loss_mask == 1].tolist()
        assert (tokenizer.decode(written[:-1]), written[-1]) == (example.completion, tokenizer.eos_id)
    assert encoded_examples(examples, tokenizer, tokenizer, max_tokens=len(sequences[1].token_ids))[1] == 1
    with pytest.raises(RowsError, match="max_tokens=3"):
        encoded_examples(examples, tokenizer, tokenizer, max_tokens=3)


@pytest.mark.parametrize("prompt", ["world", "sft", "prompted", "{quality} {query}: "])
def test_the_prompts_of_the_training_rows_are_those_that_the_retriever_sends(prompt, judge_server):
    server = judge_server(lambda said, body: "Doc 1: x")
    row = made_row(labels=("useful", "noisy"))
    for example, noise in zip(make_examples([row], simulation_prompt(prompt), documents=1), (0, 1), strict=True):
        config = {"name": "simulated", "url": server.url, "prompt": prompt, "noise": {"start": noise, "end": noise}}
        retriever = build_retriever(config, lambda: Corpus.from_passages([]), cache_entries=0)
        retriever.search([SearchRequest(row.query, 1, "q", row.question, row.turn, 3, row.golden_answers)])
        retriever.close()
        assert server.prompts[-1] == example.prompt


# -- evaluate ----------------------------------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    useful, other_query = made_row(), made_row(id="q/0/0", query="Mako", last=False)
    wrong = Passage("s", "Bado", "Bado is a city")
    written = [
        Written(useful, "useful", [RIMU]),  # the answer, about the query, of a page's form
        Written(other_query, "useful", [wrong]),
        Written(useful, "noisy", [OTHER, wrong]),
        Written(other_query, "noisy", []),
    ]
    found = measure_documents(written, 1, frozenset({page_form(MAKO.text), page_form(RIMU.text)}))
    words = {"rimu", "is", "person", "birthplace", "tovu", "spouse", "zaza"}
    noisy_words = {"zaza", "is", "person", "birthplace", "bado", "spouse", "rimu", "city"}
    assert found["useful"] == {
        "answer_last": 1.0,
        "answer_earlier": 0.0,
        "about_query": 0.5,
        "whole": 1.0,
        "real_form": 0.5,
        "words": (11 + 4) / 2,
        "distinct": 1.0,
        "overlap": pytest.approx((len(words & noisy_words) / len(words | noisy_words) + 0) / 2),
        "documents": 2.0,
    }
    assert (found["noisy"]["answer_last"], found["noisy"]["whole"], found["noisy"]["documents"]) == (0.0, 0.0, 2.0)
    assert "answer_earlier" not in found["noisy"]


def test_another_name_is_of_the_same_world_and_has_nothing_to_do_with_the_question():
    other, far = Passage("p4", "Kilo", "Kilo is a city ."), Passage("p5", "Fara", "Fara is a city .")
    rows = [
        made_row(id="a", question_id="w-0-0"),
        made_row(id="b", question_id="w-0-1", documents=(other, MAKO, OTHER), query="Kilo", supporting_titles=("Kilo",)),
        made_row(id="c", question_id="w-1-0", documents=(far,), query="Fara"),
    ]
    assert other_names(rows, 0)["a"] == other  # Mako is in the question, Zaza was found for it, Fara is of another world
    assert "c" not in other_names(rows, 0)
    again = [Written(rows[0], "useful", [RIMU], True), Written(rows[0], "useful", [OTHER], True), Written(rows[0], "useful", [OTHER])]
    found = measure_documents(again, 1, frozenset())["useful"]
    assert (found["answer_other"], found["answer_last"], found["documents"]) == (0.5, 0.0, 1.0)


def test_an_answer_counts_as_whole_words_only_and_the_query_in_title_or_first_words():
    assert holds_answer(Passage("", "", "in TOVU ."), ["Tovu"])
    assert not holds_answer(Passage("", "", "in Tovulo"), ["Tovu", "the"])
    assert about_query(Passage("", "Rimu", ""), "rimu")
    assert about_query(Passage("", "", "Rimu is"), "Rimu")
    assert not about_query(OTHER, "Rimu")
    assert page_form(RIMU.text) == page_form(OTHER.text) == "N is a person . birthplace N . spouse N ."


# -- the command -------------------------------------------------------------------------------------------------------------------------


def test_the_whole_chain_and_that_each_step_goes_on_where_it_stopped(tmp_path, judge_server, capsys):
    folders = {name: str(tmp_path / name) for name in ("collected", "labelled", "judged", "simulator", "evaluated")}
    collect = ["simulator", "collect", "env.top_k=3", "questions=30", "num_worlds=3", "per_round=10", "threads=1"]
    collect += [f"run_dir={folders['collected']}"]
    assert main(collect) == 0
    whole = (tmp_path / "collected" / "rows.jsonl").read_bytes()
    played = json.loads((tmp_path / "collected" / "played.json").read_text())
    assert (played["questions"], played["bytes"]) == (30, len(whole))

    # as if it had been killed in its third round
    first = whole.splitlines(keepends=True)[:5]
    (tmp_path / "collected" / "rows.jsonl").write_bytes(b"".join(first) + b'{"id"')
    note = {"questions": 10, "bytes": sum(map(len, first)), "rows": 5, "right": 5}
    (tmp_path / "collected" / "played.json").write_text(json.dumps(note))
    assert main(collect) == 0
    again = (tmp_path / "collected" / "rows.jsonl").read_bytes()
    assert again.startswith(b"".join(first))
    assert again.endswith(whole.splitlines(keepends=True)[-1])
    assert main([word.replace("top_k=3", "top_k=2") for word in collect]) == 1  # other searches are not mixed with these

    assert main(["simulator", "label", f"rows={folders['collected']}", "by=titles", f"run_dir={folders['labelled']}"]) == 0
    server = judge_server(lambda prompt, body: "yes" if "Document: " in prompt and " film " in prompt else "no")
    judge = ["simulator", "label", f"rows={folders['collected']}", "by=judge", f"judge.url={server.url}", f"run_dir={folders['judged']}"]
    assert main(judge) == 0
    asked = len(server.prompts)
    assert main(judge) == 0
    assert len(server.prompts) == asked  # every verdict was kept
    for row in labelled_rows(folders["judged"]):
        assert row.labels == tuple("useful" if " film " in judge_prompt(row, document) else "noisy" for document in row.documents)

    capsys.readouterr()
    for other in (["by=outcome"], ["judge.model=other"], [f"judge.url={server.url}/"]):
        assert main([*judge, *other]) == 1  # the labelling of one judge is not passed off as another's
        assert "another" in capsys.readouterr().err

    train = ["simulator", "train", f"rows={folders['labelled']}", "sft.batch_size=4", "sft.checkpoint_every=2", "threads=1"]
    assert main([*train, "sft.steps=4", f"run_dir={folders['simulator']}"]) == 0
    assert main([*train, "sft.steps=4", f"run_dir={folders['simulator']}"]) == 0  # nothing left to do
    lines = [json.loads(line) for line in (tmp_path / "simulator" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    weights = (tmp_path / "simulator" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "simulator" / "checkpoints" / "sft-000004")  # as if it had been killed after its second step
    assert main([*train, "sft.steps=4", f"run_dir={folders['simulator']}"]) == 0
    assert (tmp_path / "simulator" / "model" / "model.safetensors").read_bytes() == weights
    stamp = json.loads((tmp_path / "simulator" / "stamp.json").read_text())
    assert stamp["command"].startswith("searchqa simulator train rows=")
    assert stamp["rows_sha256"] == rows_sha256(folders["labelled"])
    record = json.loads((tmp_path / "simulator" / "model" / "simulator.json").read_text())
    assert (record["rows_sha256"], record["settings"]["sft"]["steps"]) == (stamp["rows_sha256"], 4)
    capsys.readouterr()
    for other in ("prompt=sft", f"rows={folders['judged']}", "notes=false", "sft.learning_rate=1e-5", "sft.steps=3"):
        assert main([*train, "sft.steps=4", other, f"run_dir={folders['simulator']}"]) == 1
        assert f"another {other.partition('=')[0]}" in capsys.readouterr().err
    content = (tmp_path / "labelled" / "rows.jsonl").read_text()
    (tmp_path / "labelled" / "rows.jsonl").write_text(content.replace('"useful"', '"noisy"'))
    assert main([*train, "sft.steps=4", f"run_dir={folders['simulator']}"]) == 1
    assert "other rows" in capsys.readouterr().err
    (tmp_path / "labelled" / "rows.jsonl").write_text(content)
    assert json.loads((tmp_path / "simulator" / "stamp.json").read_text()) == stamp
    evaluate = ["simulator", "evaluate", f"rows={folders['labelled']}", "searches=4", f"run_dir={folders['evaluated']}", "threads=1"]
    assert main([*evaluate, f"simulator.checkpoint={folders['simulator']}/model", "simulator.max_tokens=20"]) == 0
    summary = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert summary["measures"]["real"]["useful"]["about_query"] > summary["measures"]["real"]["noisy"]["about_query"]
    assert {"useful", "noisy"} == set(summary["measures"]["simulated"])
    said = " ".join(capsys.readouterr().out.split())
    assert "answer in it, last search" in said
    assert "answer in it, another name" in said
    assert "answer_other" in summary["measures"]["simulated"]["useful"]
    assert summary["measures"]["real"]["useful"]["answer_other"] < 0.5
    server = judge_server(lambda prompt, body: "Doc 1: x")
    words = [f"simulator.url={server.url}", "simulator.checkpoint=null", f"run_dir={tmp_path / 'endpoint'}"]
    assert main(["simulator", "evaluate", f"rows={folders['labelled']}", "searches=2", *words]) == 0


def test_a_simulator_can_be_made_from_nothing(tmp_path):
    (tmp_path / "rows.jsonl").write_text(row_lines([made_row(labels=("useful", "noisy"))]), encoding="utf-8")
    line = [
        "simulator",
        "train",
        f"rows={tmp_path}",
        "start=nothing",
        f"run_dir={tmp_path / 'run'}",
        "threads=1",
        "sft.steps=2",
        "sft.batch_size=2",
    ]
    line += ["warmup.target_loss=100", "warmup.max_steps=4", "warmup.check_every=2", "warmup.batch_size=4"]
    line += ["model.hidden_size=32", "model.num_heads=2", "model.feed_forward_size=64"]
    assert main(line) == 0
    model = str(tmp_path / "run" / "model")
    config = {"name": "simulated", "checkpoint": model, "prompt": "world", "max_tokens": 8, "noise": {"start": 0, "end": 0}}
    retriever = build_retriever(config, lambda: Corpus.from_passages([]))
    assert retriever.search([SearchRequest("Rimu", 1, "q", "what is Rimu 's spouse ?", golden_answers=("Zaza",))])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["simulator", "bake"], "collect, label, train, evaluate"),
        (["simulator", "label", "rows=x", "by=mood"], "outcome, titles, judge"),
        (["simulator", "label", "rows=x", "by=judge"], "judge.url"),
        (["simulator", "label", "rows=x"], "There is no file x"),
        (["simulator", "label"], "rows has no value; give one: rows=..."),
        (["simulator", "evaluate", "rows=x", "top_k=0"], "top_k must be at least 1"),
    ],
)
def test_a_wrong_line_says_what_would_be_right(line, says, capsys, tmp_path):
    words = line if line[1] == "bake" else [*line, f"run_dir={tmp_path}"]
    assert main(words) in (1, 2)
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("step", ["collect", "label", "train", "evaluate"])
def test_help_names_every_key_and_a_dry_run_writes_nothing(step, capsys, tmp_path):
    assert main(["simulator", step, "--help"]) == 0
    told = capsys.readouterr().out
    assert "run_dir" in told
    folder = tmp_path / "nothing"
    rows = [] if step == "collect" else ["rows=x"]
    assert main(["simulator", step, *rows, "dry_run=true", f"run_dir={folder}"]) == 0
    assert not folder.exists()
    assert "Would" in capsys.readouterr().out


CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_a_chat_model_is_tuned_on_the_ids_that_the_retriever_sends_it(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    source = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", chat_template=CHAT)
    ids = {"eos_token_id": source.eos_token_id, "pad_token_id": source.pad_token_id, "bos_token_id": None}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(source), **shape, **ids)).save_pretrained(tmp_path / "start")
    source.save_pretrained(tmp_path / "start")
    (tmp_path / "rows.jsonl").write_text(row_lines([made_row(labels=("useful", "noisy"))]), encoding="utf-8")
    line = ["simulator", "train", f"rows={tmp_path}", f"start={tmp_path / 'start'}", "prompt=sft", "titles=false", "notes=false"]
    assert main([*line, "sft.steps=2", "sft.batch_size=2", "threads=1", f"run_dir={tmp_path / 'run'}"]) == 0
    [useful, _] = make_examples([made_row(labels=("useful", "noisy"))], PROMPTS["sft"], documents=1)
    sent = load_text_tokenizer(str(tmp_path / "run" / "model"))
    whole = f"<system><end><user>{useful.prompt}<end><assistant>{useful.completion}<end>"
    [sequence], _ = encoded_examples([useful], sent, build_tokenizer(str(tmp_path / "run" / "model")), max_tokens=4096)
    assert sequence.token_ids.tolist() == source(whole, add_special_tokens=False)["input_ids"]
    assert sequence.token_ids[sequence.loss_mask == 0].tolist() == sent.encode(useful.prompt)
    config = {"name": "simulated", "checkpoint": str(tmp_path / "run" / "model"), "prompt": "sft", "max_tokens": 8}
    retriever = build_retriever(config, lambda: Corpus.from_passages([]))
    assert len(retriever.search([SearchRequest("Rimu", 1, "q", "what is Rimu 's spouse ?", golden_answers=("Zaza",))])) == 1
