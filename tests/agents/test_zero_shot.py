"""Zero-shot prompting: a model behind an OpenAI-compatible server is asked in each dialect as published, and what it writes acts in the environment.

The server is real and its replies are scripted: it searches for the title of a supporting passage, reads what comes back, and answers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from searchqa_agents.cli import main
from searchqa_agents.trajectory import load_trajectories
from searchqa_envs.datasets import load_source
from searchqa_envs.dialects import DIALECTS
from searchqa_envs.questions import Question
from searchqa_envs.tokenizers import build_tokenizer

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = 3


class Server:
    """Searches in the first turn and answers in the second, in the form of the protocol that is asked for."""

    def __init__(self, dialect: str, protocol: str, questions: list[Question], tokenizer: Any) -> None:
        self.dialect, self.protocol, self.questions, self.tokenizer = DIALECTS[dialect], protocol, questions, tokenizer
        self.bodies: dict[str, list[dict[str, Any]]] = {question.id: [] for question in questions}
        self.paths: set[str] = set()

    def text_of(self, body: dict[str, Any]) -> str:
        """Everything that a request says."""
        if self.protocol == "chat":
            return "".join(message["content"] for message in body["messages"])
        return str(self.tokenizer.decode(body["prompt"]) if self.protocol == "vllm" else body["prompt"])

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.paths.add(path)
        dialect = self.dialect
        question = next(question for question in self.questions if question.question in self.text_of(body))
        turn = len(self.bodies[question.id])
        self.bodies[question.id].append(body)
        if turn == 0:
            text, stop = f"I look it up. {dialect.search_open} {question.metadata['supporting_titles'][0]} ", dialect.search_close
        else:
            text, stop = f"Found.{dialect.think_close}\n{dialect.answer_open} {question.golden_answers[0]} ", dialect.answer_close
        assert stop in body["stop"]
        if self.protocol == "chat":
            return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
        if self.protocol == "completions":
            return {"choices": [{"text": text, "finish_reason": "stop"}]}
        assert body["include_stop_str_in_output"]
        ids = self.tokenizer.encode(text + stop)
        logprobs = {"token_logprobs": [-0.5] * len(ids), "tokens": [f"token_id:{token}" for token in ids]}
        return {
            "choices": [
                {"text": text + stop, "finish_reason": "stop", "stop_reason": stop, "token_ids": ids, "logprobs": logprobs}
                | {"prompt_token_ids": body["prompt"]}
            ]
        }


@contextmanager
def serving(server: Server) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps(server.answer(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is said of requests."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a byte-level tokenizer: of a base model, and of an instruct model with a chat template."""
    folders = {}
    for kind, template in (("base", None), ("instruct", CHATML)):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = [AddedToken(token, normalized=False, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator([text for dialect in DIALECTS.values() for text in dialect.prompts.values()] * 3, trainer)
        made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template)
        folder = tmp_path_factory.mktemp(kind)
        made.save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """The first questions of HotpotQA."""
    source = load_source("hotpotqa", split="all")
    return [source[place] for place in range(QUESTIONS)]


CASES = [
    # dialect, prompt, protocol, tokenizer, how the first request must look
    *((dialect, "published", "completions", None, "text") for dialect in DIALECTS),
    *((dialect, "published", "chat", None, "one message") for dialect in DIALECTS),
    *((dialect, "published", "vllm", "base", "text") for dialect in DIALECTS),
    ("search-r1", "published", "vllm", "instruct", "template"),
    ("zerosearch", "published", "vllm", "instruct", "template"),
    ("r1-searcher", "chat", "vllm", "instruct", "system template"),
    ("search-r1", "published", "chat", "instruct", "one message"),
    ("r1-searcher", "chat", "chat", None, "two messages"),
    ("r1-searcher", "chat", "chat", "instruct", "two messages"),
]


@pytest.mark.data
@pytest.mark.parametrize(("dialect", "prompt", "protocol", "tokenizer", "form"), CASES)
def test_a_served_model_is_asked_as_published_and_plays(
    dialect: str,
    prompt: str,
    protocol: str,
    tokenizer: str | None,
    form: str,
    tokenizers: dict[str, str],
    questions: list[Question],
    tmp_path: Path,
) -> None:
    own = build_tokenizer(tokenizers[tokenizer] if tokenizer else "byte")
    server = Server(dialect, protocol, questions, own)
    words = [f"env.tokenizer={tokenizers[tokenizer]}"] if tokenizer else []
    budgets = ["env.max_segment_tokens=300", "env.max_observation_tokens=6000", "env.max_context_tokens=15000"]
    with serving(server) as url:
        line = [
            "env=hotpotqa",
            "env.split=all",
            f"questions={QUESTIONS}",
            "save=null",
            "threads=1",
            f"run_dir={tmp_path / 'run'}",
            *budgets,
            *words,
        ]
        agent = ["agent=baseline/zero_shot_server", f"agent.url={url}", f"agent.protocol={protocol}", "agent.retries=0"]
        assert main(["eval", *line, *agent, f"env.dialect={dialect}", f"env.prompt={prompt}"]) == 0

    rules = DIALECTS[dialect]
    assert server.paths == {"/v1/chat/completions" if protocol == "chat" else "/v1/completions"}
    played = {trajectory.question_id: trajectory for trajectory in load_trajectories(tmp_path / "run" / "trajectories" / "eval.jsonl.gz")}
    for question in questions:
        first, second = server.bodies[question.id]  # each question takes two requests
        assert first["stop"] == second["stop"] == list(rules.closers)
        assert first["temperature"] == 0
        assert first["max_tokens"] == 300
        asked = rules.render_question(prompt, question.question)
        system, user, opening = rules.messages(asked)
        said = first["messages"] if protocol == "chat" else server.text_of(first)
        assert (
            said
            == {
                "text": asked,
                "one message": [{"role": "user", "content": asked}],
                "two messages": [{"role": "system", "content": system}, {"role": "user", "content": question.question}],
                # the end of a message is an id without text
                "template": f"<|im_start|>system\nYou help.\n<|im_start|>user\n{asked}\n<|im_start|>assistant\n",
                "system template": f"<|im_start|>system\n{system}\n<|im_start|>user\n{user}\n<|im_start|>assistant\n{opening}",
            }[form]
        )

        trajectory = played[question.id]
        title = question.metadata["supporting_titles"][0]
        assert [(turn.action, turn.content) for turn in trajectory.turns] == [("search", title), ("answer", question.golden_answers[0])]
        assert trajectory.metrics["em"] == 1
        assert trajectory.retokenized == (protocol != "vllm")
        passages = trajectory.turns[0].observation
        assert rules.information_open in passages
        assert len(trajectory.turns[0].passages) == 3
        assert all(found in passages for _, found in trajectory.turns[0].passages)
        assert passages in server.text_of(second)
        assert f"{rules.search_open} {title} {rules.search_close}{passages}" in server.text_of(second)
        if protocol == "chat":
            assert [message["role"] for message in second["messages"][-3:]] == ["user", "assistant", "user"]
            assert second["messages"][-1]["content"] == passages
        if protocol == "vllm":
            assert second["prompt"][: len(first["prompt"])] == first["prompt"]
            assert 1 in trajectory.loss_mask
