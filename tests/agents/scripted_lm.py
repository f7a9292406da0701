"""A language model that says what a function of the prompt says, in this process and behind HTTP; both record what they were asked."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from searchqa_agents.language_model import Segment, Session


class ScriptedLM:
    """A real ``LanguageModel`` with ids: ``answer(prompt)`` is its text, cut at ``max_new_tokens`` and at the token that completes a stop string.

    ``prompts`` and ``samplings`` are those of each request, ``seeds`` their seeds, ``batches`` the number of requests in each batch.
    """

    returns_ids = True
    returns_logprobs = False

    def __init__(self, tokenizer, answer):
        self.tokenizer = tokenizer
        self.answer = answer
        self.prompts, self.samplings, self.seeds, self.batches = [], [], [], []

    def start(self, seeds, sampling):
        return _Session(self, seeds, sampling)


def ids_until_stop(tokenizer, text, max_tokens, stops):
    """Ids of a text up to the one that completes a stop string; else end of sequence behind them, if there is room."""
    ids = []
    for token in tokenizer.encode(text)[:max_tokens]:
        ids.append(token)
        if any(stop in tokenizer.decode(ids) for stop in stops):
            return ids
    return ids if len(ids) == max_tokens else [*ids, tokenizer.eos_id]


class _Session(Session):
    def __init__(self, lm, seeds, sampling):
        self.lm, self.seeds, self.sampling, self.written = lm, seeds, sampling, []

    def submit(self, rows, contexts, infos):
        self.lm.batches.append(len(rows))
        for row, context in zip(rows, contexts, strict=True):
            prompt = self.lm.tokenizer.decode(context.tolist())
            self.lm.prompts.append(prompt)
            self.lm.samplings.append(self.sampling)
            self.lm.seeds.append(self.seeds[row])
            ids = ids_until_stop(self.lm.tokenizer, self.lm.answer(prompt), self.sampling.max_new_tokens, self.sampling.stop)
            self.written.append((row, Segment(np.array(ids, dtype=np.int32))))

    def collect(self):
        written, self.written = self.written, []
        return written


@contextmanager
def serving_lm(answer, *, names_stop=True, usage=True, tokenizer=None, refuses=lambda body: None):
    """An OpenAI-compatible server of ``/v1/chat/completions`` and ``/v1/completions``; yields its address and the list of request bodies.

    ``answer(prompt)`` is given the text of the last message of the user's with that of the assistant's behind it, or the prompt. Words are its tokens.
    Where it gives a tuple, that is the content and the reason for its end. With a ``tokenizer`` it also takes prompts of ids, as vLLM does.
    ``refuses(body)`` is the status and text of a refusal, or None.
    """
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            refusal = refuses(body)
            if refusal is not None:
                self.send({"error": refusal[1]}, refusal[0])
                return
            chat = self.path == "/v1/chat/completions"
            prompt = body.get("prompt")
            if chat:
                last_user = max(i for i, message in enumerate(body["messages"]) if message["role"] == "user")
                prompt = "".join(message["content"] for message in body["messages"][last_user:])
            if isinstance(prompt, list):
                self.send(self.with_ids(prompt, body))
                return
            given = answer(prompt)
            content, reason = given if isinstance(given, tuple) else (given, "stop")
            text, stop = content or "", None
            found = [(text.index(given), given) for given in body.get("stop", []) if given in text]
            if found:
                end, stop = min(found)
                text = text[:end]
            words = text.split(" ")
            if len(words) > body["max_tokens"]:
                text, reason, stop = " ".join(words[: body["max_tokens"]]), "length", None
            choice = {"index": 0, "finish_reason": reason}
            text = None if content is None else text
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choice |= {"stop_reason": stop} if names_stop else {}
            content = {"id": "1", "choices": [choice]}
            if usage:
                content["usage"] = {"prompt_tokens": len(json.dumps(body)), "completion_tokens": min(len(words), body["max_tokens"])}
            self.send(content)

        def with_ids(self, prompt, body):
            text = answer(tokenizer.decode(prompt))
            ids = ids_until_stop(tokenizer, text, body["max_tokens"], body["stop"])
            stop = next((stop for stop in body["stop"] if stop in tokenizer.decode(ids)), None)
            cut = stop is None and ids[-1] != tokenizer.eos_id
            choice = {"index": 0, "text": tokenizer.decode(ids), "token_ids": ids, "finish_reason": "length" if cut else "stop"}
            choice |= {"stop_reason": stop, "logprobs": {"token_logprobs": [-1.0] * len(ids)}, "prompt_token_ids": prompt}
            return {"id": "1", "choices": [choice]}

        def send(self, content, status=200):
            sent = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *arguments):
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # many connections at once

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
