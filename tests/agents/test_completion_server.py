"""The HTTP backend: token-exact on servers that answer in vLLM's and SGLang's documented form, and typed errors for everything that goes wrong."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gymnasium as gym
import numpy as np
import pytest
import torch

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents import completion_server
from searchqa_agents.cli import main
from searchqa_agents.completion_server import CompletionServerLM, ServerAnswerError, ServerUnavailable
from searchqa_agents.language_model import Sampling
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.policy import Policy
from searchqa_agents.rollout import rollout
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.dialects import SEARCH_R1
from searchqa_envs.errors import ConfigurationError, SearchQAError
from searchqa_envs.tokenizers.byte import ByteTokenizer

CLOSERS = SEARCH_R1.closers
TOKENIZER = ByteTokenizer()


@contextmanager
def serving(answer):
    """A server whose every POST is answered by ``answer(path, body)`` with status, headers and content; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keep-alive

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            connections.add(self.client_address)
            self.requested = dict(self.headers)
            status, headers, content = answer(self.path, body)
            if isinstance(content, dict):
                content = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(content)
            except ConnectionError:  # the client has heard enough
                self.close_connection = True
            if int(headers.get("Content-Length", len(content))) != len(content):
                self.close_connection = True

        def log_message(self, *arguments):
            return

    connections = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.request_queue_size = 64
    server.connections = connections
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def model_on(url, tokenizer=TOKENIZER, **arguments):
    lm = CompletionServerLM(url, tokenizer, SEARCH_R1, **arguments)
    try:
        yield lm
    finally:
        lm.close()


# -- a real model behind the documented formats --------------------------------------------------------------------------------------------


class Engine:
    """Samples one token at a time from a real model, each time from the whole context: nothing of the in-process decode loop is used."""

    def __init__(self, model, tokenizer, logprobs_mode):
        self.model, self.tokenizer, self.mode = model, tokenizer, logprobs_mode
        self.lock = threading.Lock()
        self.bodies = []

    def vllm(self, path, body):
        assert path == "/v1/completions"
        self.bodies.append(body)
        ids, logprobs, text, reason = self.sample(body["prompt"], body, body["max_tokens"], body["seed"])
        tokens = [f"token_id:{token}" for token in ids] if body["return_tokens_as_token_ids"] else [self.tokenizer.decode([t]) for t in ids]
        choice = {
            "index": 0,
            "text": text,
            "logprobs": {"text_offset": [0] * len(ids), "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": [{} for _ in ids]},
            "finish_reason": "length" if reason is None else "stop",
            "stop_reason": reason if isinstance(reason, str) else None,
            "token_ids": ids if body["return_token_ids"] else None,
            "prompt_logprobs": None,
            "prompt_token_ids": body["prompt"],
        }
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids), "total_tokens": len(body["prompt"]) + len(ids)}
        return 200, {}, {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": "tiny", "choices": [choice], "usage": usage}

    def vllm_before_token_ids(self, path, body):
        """As versions answered that only had ``return_tokens_as_token_ids``."""
        status, headers, answer = self.vllm(path, body)
        for name in ("token_ids", "prompt_token_ids"):
            del answer["choices"][0][name]
        return status, headers, answer

    def sglang(self, path, body):
        assert path == "/generate"
        self.bodies.append(body)
        params = body["sampling_params"]
        ids, logprobs, text, reason = self.sample(body["input_ids"], params, params["max_new_tokens"], params["sampling_seed"])
        finish = {"type": "length", "length": len(ids)} if reason is None else {"type": "stop", "matched": reason}
        meta = {"id": "1", "finish_reason": finish, "prompt_tokens": len(body["input_ids"]), "completion_tokens": len(ids)}
        meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]
        return 200, {}, {"text": text, "output_ids": ids, "meta_info": meta}

    @torch.inference_mode()
    def sample(self, prompt, parameters, longest, seed):
        """Ids, log-probabilities, text, and what ended them: a stop string, the id of end of sequence, or None."""
        assert (parameters["repetition_penalty"], parameters["min_p"]) == (1, 0)  # nothing is left to a model's own defaults
        generator = torch.Generator().manual_seed(seed)
        temperature, ids, logprobs, bias = parameters["temperature"], [], [], parameters["logit_bias"]
        for _ in range(longest):
            with self.lock:
                raw = self.model(torch.tensor([prompt + ids])).logits[0, -1].float()
            logits = raw.clone()
            for token, value in bias.items():
                logits[int(token)] += value
            logits /= temperature or 1
            unfiltered = logits.clone()
            if temperature and parameters["top_k"] > 0:
                logits[logits < logits.topk(parameters["top_k"]).values[-1]] = -torch.inf
            if temperature:
                token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            else:
                token = int(logits.argmax())
            said = {"raw": raw, "processed": logits, "unfiltered": unfiltered}[self.mode]
            ids.append(token)
            logprobs.append(float(said.log_softmax(-1)[token]))
            text = self.tokenizer.decode(ids)
            stop = next((stop for stop in parameters["stop"] if stop in text), None)
            if token in parameters["stop_token_ids"]:
                return ids, logprobs, text, token
            if stop is not None:
                return ids, logprobs, text[: text.index(stop) + len(stop)], stop
        return ids, logprobs, text, None


@pytest.fixture(scope="module")
def venv():
    return gym.make_vec("SearchQA-World-v0", num_envs=6, autoreset_mode="DISABLED", split="test")


@pytest.fixture(scope="module")
def policy(venv):
    return Policy.load(shipped_checkpoint(), venv.unwrapped.tokenizer)


def played(venv, lm, **arguments):
    return rollout(venv, lm, [0, 1, 2, 3], **arguments)


@pytest.mark.parametrize(
    ("protocol", "form", "mode"),
    [("vllm", "vllm", "raw"), ("vllm", "vllm_before_token_ids", "raw"), ("sglang", "sglang", "unfiltered")],
)
def test_greedy_trajectories_are_those_of_the_model_in_this_process(venv, policy, protocol, form, mode):
    engine = Engine(policy.model, policy.tokenizer, mode)
    with serving(getattr(engine, form)) as (url, _), model_on(url + "/v1", policy.tokenizer, protocol=protocol, retries=0) as lm:
        served = played(venv, lm, temperature=0)
    here = played(venv, policy, temperature=0)
    assert {turn.action for trajectory in here for turn in trajectory.turns} >= {"search", "answer"}
    for ours, theirs in zip(here, served, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.loss_mask.tolist() == theirs.loss_mask.tolist()
        assert ours.turns == theirs.turns
        assert ours.reward == theirs.reward
        assert not theirs.retokenized
        np.testing.assert_allclose(theirs.logprobs, ours.logprobs, atol=1e-4)
        assert theirs.sampling_logprobs is None


@pytest.mark.parametrize(
    ("protocol", "mode", "told", "temperature", "top_k", "full", "truncated"),
    [
        ("vllm", "raw", None, 1.0, 0, True, False),
        ("vllm", "processed", "processed", 1.0, 0, True, False),
        ("vllm", "processed", "processed", 0.7, 0, True, False),
        ("vllm", "raw", None, 0.7, 0, False, False),  # not of the distribution that sampled
        ("vllm", "raw", None, 1.0, 5, False, False),  # what sampled is not known
        ("vllm", "processed", "processed", 0.7, 5, False, True),
        ("sglang", "unfiltered", None, 0.7, 0, True, False),
        ("sglang", "unfiltered", None, 0.7, 5, False, False),  # of the untruncated distribution: what sampled is not known
        ("sglang", "raw", "raw", 1.0, 0, True, False),
    ],
)
def test_log_probabilities_are_given_only_where_they_are_what_a_trajectory_says(
    venv, policy, protocol, mode, told, temperature, top_k, full, truncated
):
    engine = Engine(policy.model, policy.tokenizer, mode)
    with serving(getattr(engine, protocol)) as (url, _), model_on(url, policy.tokenizer, protocol=protocol, logprobs=told) as lm:
        trajectories = rollout(venv, lm, [0, 1], temperature=temperature, top_k=top_k, seed=3)
    for trajectory in trajectories:
        assert (trajectory.logprobs is not None) == full
        assert (trajectory.sampling_logprobs is not None) == truncated
        assert Trajectory.from_json(json.loads(json.dumps(trajectory.to_json()))) == trajectory
        mask = trajectory.loss_mask == 1
        stats = policy.evaluate([trajectory.token_ids], [trajectory.loss_mask], temperature=temperature)
        if full:
            np.testing.assert_allclose(trajectory.logprobs[mask], stats.logprob.detach().numpy(), atol=1e-4)
        if truncated:  # renormalised over fewer tokens
            assert (trajectory.sampling_logprobs[mask] >= stats.logprob.detach().numpy() - 1e-4).all()


def test_a_request_has_the_same_seed_in_any_batch_and_another_in_the_next_turn(venv, policy):
    def seeds(num_envs, concurrency):
        engine = Engine(policy.model, policy.tokenizer, "raw")
        places = gym.make_vec("SearchQA-World-v0", num_envs=num_envs, autoreset_mode="DISABLED", split="test")
        with serving(engine.vllm) as (url, _), model_on(url, policy.tokenizer, concurrency=concurrency) as lm:
            trajectories = played(places, lm, seed=5)
        return {(tuple(body["prompt"]), body["seed"]) for body in engine.bodies}, [t.token_ids.tolist() for t in trajectories]

    one, trajectories = seeds(1, 1)
    assert seeds(4, 3) == (one, trajectories)
    assert len({seed for _, seed in one}) == len(one) > 4
    assert all(0 <= seed < 2**31 for _, seed in one)


def test_eval_from_the_command_line(policy, tmp_path, capsys):
    engine = Engine(policy.model, policy.tokenizer, "raw")
    with serving(engine.vllm) as (url, _):
        line = ["env=world", "agent=server", f"agent.url={url}", "agent.temperature=0", "questions=6", f"run_dir={tmp_path}/served"]
        assert main(["eval", *line]) == 0
    assert main(["eval", "env=world", "agent=lm", "agent.temperature=0", "questions=6", f"run_dir={tmp_path}/here", "device=cpu"]) == 0
    capsys.readouterr()
    served, here = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("served", "here"))
    assert served["metrics"] == here["metrics"]
    assert served["metrics"]["searches"] > 0.5


def test_eval_of_a_server_that_is_not_there_says_so(tmp_path, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert main(["eval", "env=world", "agent=server", f"agent.url={url}", "agent.retries=0", f"run_dir={tmp_path}/run"]) != 0
    assert url in capsys.readouterr().err.replace("\n", "")


# -- one answer at a time ------------------------------------------------------------------------------------------------------------------


def vllm_answer(ids, *, finish_reason="stop", text=None, **changed):
    choice = {
        "text": TOKENIZER.decode([i for i in ids if 0 <= i < TOKENIZER.vocab_size]) if text is None else text,
        "finish_reason": finish_reason,
        "logprobs": {"token_logprobs": [-1.0] * len(ids), "tokens": ["?"] * len(ids)},
        "token_ids": ids,
    }
    return 200, {}, {"choices": [choice | changed]}


def text_answer(text, finish_reason="stop", **changed):
    return 200, {}, {"choices": [{"text": text, "message": {"content": text}, "finish_reason": finish_reason, **changed}]}


def one_segment(answer, *, protocol="vllm", max_new_tokens=64, tokenizer=TOKENIZER, context=(65, 66), **arguments):
    """The segment of one request to a server that answers with ``answer``, a constant or a function of path and body."""
    reply = answer if callable(answer) else lambda path, body: answer
    with serving(reply) as (url, _), model_on(url, tokenizer, protocol=protocol, **{"retries": 0, **arguments}) as lm:
        session = lm.start([7], Sampling(max_new_tokens, CLOSERS))
        [segment] = session.generate([0], [np.array(context, dtype=np.int32)], [{}])
    return segment


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ("<search>a</search>", "<search>a</search>"),
        ("<search>a</search> more<answer>b</answer>", "<search>a</search>"),  # sampled a little further before it looked
        ("no tag at all", "no tag at all"),
        ("</answer>", "</answer>"),
    ],
)
def test_ids_count_up_to_the_one_that_completes_a_closing_tag(ids, kept):
    segment = one_segment(vllm_answer(TOKENIZER.encode(ids)))
    assert segment.ids.tolist() == TOKENIZER.encode(kept)
    assert segment.ids.dtype == np.int32
    assert segment.logprobs.tolist() == [-1.0] * len(segment.ids)


def test_a_token_in_whose_middle_the_tag_ends_is_kept_whole():
    class Pairs:
        """Two bytes to a token: "</answer>" ends in the middle of one."""

        name, vocab_size, eos_id, pad_id, reserved = "pairs", 256 + 2**16, 0, 1, ()

        def encode(self, text):
            data = text.encode() + b" " * (len(text.encode()) % 2)
            return [256 + 256 * a + b for a, b in zip(data[::2], data[1::2], strict=True)]

        def pieces(self, ids):
            return [bytes(divmod(token - 256, 256)) for token in ids]

        def decode(self, ids):
            return b"".join(self.pieces(ids)).decode("utf-8", "replace")

    tokenizer = Pairs()
    ids = tokenizer.encode("<answer>b</answer>\n more")
    segment = one_segment(vllm_answer(ids, text="<answer>b</answer>"), tokenizer=tokenizer)
    assert tokenizer.decode(segment.ids.tolist()) in ("<answer>b</answer>", "<answer>b</answer>\n")
    ids = tokenizer.encode("<answer>bb</answer>\n more")
    segment = one_segment(vllm_answer(ids, text="<answer>bb</answer>"), tokenizer=tokenizer)
    assert tokenizer.decode(segment.ids.tolist()) == "<answer>bb</answer>\n"
    assert segment.ids.tolist() == ids[: len(segment.ids)]


def test_end_of_sequence_is_kept_and_ends_the_segment():
    ids = [*TOKENIZER.encode("<answer>b"), TOKENIZER.eos_id]
    assert one_segment(vllm_answer([*ids, 65])).ids.tolist() == ids


@pytest.mark.parametrize("protocol", ["completions", "chat"])
@pytest.mark.parametrize(
    ("text", "finish_reason", "named", "kept"),
    [
        ("<search> x ", "stop", None, "<search> x </search>"),  # left out by the server
        ("<answer> x", "stop", None, "<answer> x</answer>"),
        ("<answer> or <search> x", "stop", None, "<answer> or <search> x</search>"),  # opened last
        ("<search> x", "stop", "</answer>", "<search> x</answer>"),  # the server knows better
        ("<search> x</search>", "stop", None, "<search> x</search>"),  # left in
        ("<search> x</search> and <answer>y</answer>", "stop", None, "<search> x</search>"),  # a server that does not stop
        ("<search> x</search>", "length", None, "<search> x</search>"),
        ("<search> x", "length", None, "<search> x"),  # cut short
        ("thoughts", "stop", None, "thoughts$"),  # end of sequence
        ("", "stop", None, "$"),
        ("", "length", None, ""),
    ],
)
def test_the_stop_string_that_a_text_server_leaves_out_is_put_back(protocol, text, finish_reason, named, kept):
    segment = one_segment(text_answer(text, finish_reason, stop_reason=named), protocol=protocol)
    assert segment.ids.tolist() == [*TOKENIZER.encode(kept.rstrip("$")), *[TOKENIZER.eos_id] * kept.endswith("$")]
    assert segment.logprobs is None


@pytest.mark.parametrize("reason", ["length", "content_filter", "stop"])
def test_an_answer_of_null_ends_the_segment_and_the_question_is_scored(venv, reason):
    with serving(lambda path, body: text_answer(None, reason)) as (url, _), model_on(url, venv.unwrapped.tokenizer, protocol="chat") as lm:
        [trajectory] = rollout(venv, lm, [0])
    assert trajectory.answer is None
    assert all(turn.action == "invalid" for turn in trajectory.turns)


def test_tokens_of_a_text_server_are_the_ones_that_it_tells(venv):
    counts = iter([(100, 7), (120, 5)])
    texts = iter(["<search>Naru</search>", "<answer>x</answer>"])

    def answer(path, body):
        status, headers, content = text_answer(next(texts))
        prompt, generated = next(counts)
        return status, headers, content | {"usage": {"prompt_tokens": prompt, "completion_tokens": generated}}

    with serving(answer) as (url, _), model_on(url, venv.unwrapped.tokenizer, protocol="chat") as lm:
        [trajectory] = rollout(venv, lm, [0])
    assert trajectory.usage == {"calls": 2, "prompt_tokens": 220, "generated_tokens": 12}
    with (
        serving(lambda path, body: text_answer("<answer>x</answer>")) as (url, _),
        model_on(url, venv.unwrapped.tokenizer, protocol="chat") as lm,
    ):
        [untold] = rollout(venv, lm, [0])
    assert untold.usage == {"calls": 1}


def test_text_is_cut_to_the_longest_segment():
    assert one_segment(text_answer("a" * 1000, "length"), protocol="completions", max_new_tokens=16).ids.tolist() == [97] * 16


def test_a_conversation_has_the_policys_segments_as_the_assistants_messages(small_data):
    bodies = []

    def answer(path, body):
        bodies.append(body)
        return text_answer("<search>Vistula</search>" if len(body["messages"]) < 4 else "<answer>Vistula</answer>")

    folder = small_data / "hotpotqa"
    files = {"questions": str(folder / "questions.jsonl"), "corpus": str(folder / "corpus.jsonl.gz")}
    venv = gym.make_vec("SearchQA-Custom-v0", num_envs=2, autoreset_mode="DISABLED", **files)
    with serving(answer) as (url, _), model_on(url, venv.unwrapped.tokenizer, protocol="chat", model="m") as lm:
        trajectories = rollout(venv, lm, [0, 1], temperature=0.5)
    for trajectory in trajectories:
        texts = [trajectory.prompt, *(text for turn in trajectory.turns for text in (turn.segment, turn.observation))]
        longest = [body["messages"] for body in bodies if body["messages"][0]["content"] == trajectory.prompt][-1]
        assert [message["content"] for message in longest] == texts[:5]
        assert [message["role"] for message in longest] == ["user", "assistant", "user", "assistant", "user"]
        assert [turn.action for turn in trajectory.turns] == ["search", "search", "answer"]
        assert trajectory.retokenized
    assert {(body["model"], body["temperature"], tuple(body["stop"])) for body in bodies} == {("m", 0.5, CLOSERS)}


def test_a_chat_template_of_ours_is_not_put_into_the_servers():
    class Templated(ByteTokenizer):
        def chat_prompt(self, text):
            return f"[system]Be brief.[end][user]{text}[end][assistant]"

    tokenizer, bodies = Templated(), []

    def answer(path, body):
        bodies.append(body)
        return text_answer("<answer>x")

    one_segment(answer, protocol="chat", tokenizer=tokenizer, context=tokenizer.encode(tokenizer.chat_prompt("Who? [end]")))
    assert bodies[0]["messages"] == [{"role": "user", "content": "Who? [end]"}]
    one_segment(answer, protocol="chat", tokenizer=tokenizer, context=tokenizer.encode("Who?"))
    assert bodies[1]["messages"] == [{"role": "user", "content": "Who?"}]


def test_a_prompt_that_text_cannot_carry_is_refused():
    with pytest.raises(ConfigurationError, match="end-of-sequence"):
        one_segment(text_answer("x"), protocol="completions", context=[65, TOKENIZER.eos_id, 66])


# -- faults --------------------------------------------------------------------------------------------------------------------------------

GOOD = vllm_answer(TOKENIZER.encode("<search>a</search>"))


@pytest.mark.parametrize(
    ("answer", "protocol", "message"),
    [
        (vllm_answer([65, TOKENIZER.vocab_size]), "vllm", "outside the vocabulary"),
        (vllm_answer([65, -1]), "vllm", "outside the vocabulary"),
        (vllm_answer([65, True]), "vllm", "must be integers"),
        (vllm_answer([65, 66.0]), "vllm", "must be integers"),
        (vllm_answer([]), "vllm", "1 to 64 tokens"),
        (vllm_answer([65] * 65), "vllm", "1 to 64 tokens"),
        (vllm_answer([65], text="Z"), "vllm", "reads its ids as 'Z'"),  # another tokenizer
        (vllm_answer([65], prompt_token_ids=[1, 65, 66]), "vllm", "other ids into the prompt"),
        (vllm_answer([65], token_ids=None), "vllm", "token_ids"),
        (vllm_answer([65], logprobs=None), "vllm", "logprobs"),
        (vllm_answer([65], logprobs={"token_logprobs": [None]}), "vllm", "finite"),
        (vllm_answer([65], logprobs={"token_logprobs": [0.5]}), "vllm", "at most 0"),
        (vllm_answer([65], logprobs={"token_logprobs": [-1.0, -1.0]}), "vllm", "each with its log-probability"),
        (vllm_answer([65], finish_reason="abort"), "vllm", "abort"),
        (vllm_answer([65], finish_reason=None), "vllm", "finish_reason"),
        ((200, {}, {"choices": []}), "vllm", r"choices\[0\]"),
        ((200, {}, {"error": "no"}), "vllm", "choices"),
        ((200, {}, b"[1, 2"), "vllm", "cannot be used"),
        ((200, {}, b"\xff\xfe"), "vllm", "cannot be used"),
        ((200, {}, b"<html>hello</html>"), "completions", "cannot be used"),
        ((200, {}, {"text": "A", "meta_info": {"finish_reason": {"type": "abort"}}}), "sglang", "abort"),
        ((200, {}, {"text": "A", "meta_info": {"finish_reason": {"type": "stop"}}}), "sglang", "output_token_logprobs"),
        ((200, {}, {"text": "A", "meta_info": {"finish_reason": {"type": "stop"}, "output_token_logprobs": [65]}}), "sglang", "log-prob"),
        (text_answer(7), "chat", "content must be a str"),
        ((200, {}, {"choices": [{"message": {}, "finish_reason": "stop"}]}), "chat", "content must be a str"),
        (text_answer("x", "tool_calls"), "chat", "tool_calls"),
        (text_answer("x", "function_call"), "completions", "function_call"),
        ((400, {}, b'{"error": "maximum context length"}'), "vllm", "maximum context length"),
        ((404, {}, b"no such model"), "chat", "404"),
        ((307, {"Location": "http://elsewhere"}, b""), "vllm", "307"),
    ],
)
def test_an_answer_that_is_none_is_an_error_at_once(answer, protocol, message):
    asked = []

    def once(path, body):
        asked.append(path)
        return answer

    with pytest.raises(ServerAnswerError, match=message) as raised:
        one_segment(once, protocol=protocol, retries=3)
    assert len(asked) == 1  # asking again would not help
    assert "http://127.0.0.1" in str(raised.value)
    assert isinstance(raised.value, SearchQAError)


def test_a_huge_answer_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(completion_server, "MOST_BYTES", 100_000)
    with pytest.raises(ServerAnswerError, match="more than 100000 bytes"):
        one_segment(text_answer("x" * 10_000_000), protocol="completions")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(completion_server, "FIRST_PAUSE", 0.02)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "fault",
    [
        (500, {}, b"oops"),
        (503, {}, b"loading"),
        (429, {"Retry-After": "0"}, b"slow down"),
        (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"slow down"),
        (429, {"Retry-After": "soon"}, b"slow down"),
        (200, {"Content-Length": "5000"}, b'{"choices": ['),  # the connection ends before the answer does
    ],
)
def test_passing_faults_are_asked_again(fault):
    faults = [fault, fault]
    assert one_segment(lambda path, body: faults.pop() if faults else GOOD, retries=2).ids.tolist() == TOKENIZER.encode(
        "<search>a</search>"
    )
    assert not faults


@pytest.mark.usefixtures("quick")
def test_tries_are_bounded_and_the_error_names_address_cause_and_way_out():
    asked = []

    def failing(path, body):
        asked.append(time.monotonic())
        return 500, {}, b"out of memory"

    with pytest.raises(
        ServerUnavailable, match=r"http://127.0.0.1:\d+/v1/completions .* 4 tries: status 500: out of memory. Start the server"
    ):
        one_segment(failing, retries=3)
    assert len(asked) == 4
    assert (np.diff(asked) >= np.array([0.01, 0.02, 0.04])).all()  # pauses double, from half of what was set


def test_retry_after_is_heeded_and_one_beyond_the_deadline_is_an_error_at_once():
    replies = [(429, {"Retry-After": "1"}, b"busy")]
    started = time.monotonic()
    one_segment(lambda path, body: replies.pop() if replies else GOOD, retries=1)
    assert time.monotonic() - started >= 1
    started = time.monotonic()
    with pytest.raises(ServerUnavailable, match="busy"):
        one_segment((429, {"Retry-After": "3600"}, b"busy"), retries=5, deadline=30.0)
    assert time.monotonic() - started < 20


@pytest.mark.usefixtures("quick")
def test_a_refused_connection():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with model_on(url, retries=2) as lm, pytest.raises(ServerUnavailable, match="3 tries: ConnectError"):
            lm.start([0], Sampling(8, CLOSERS)).generate([0], [np.array([65], dtype=np.int32)], [{}])


@pytest.mark.usefixtures("quick")
def test_a_server_that_does_not_answer_in_time():
    release = threading.Event()

    def hang(path, body):
        release.wait(30)
        return GOOD

    try:
        with serving(hang) as (url, _):
            context = np.array([65], dtype=np.int32)
            with model_on(url, retries=1, timeout=0.1) as lm, pytest.raises(ServerUnavailable, match="2 tries: no answer in"):
                lm.start([0], Sampling(8, CLOSERS)).generate([0], [context], [{}])
            with model_on(url, retries=9, deadline=0.2) as lm, pytest.raises(ServerUnavailable, match="the deadline of"):
                lm.start([0], Sampling(8, CLOSERS)).generate([0], [context], [{}])
            release.set()
    finally:
        release.set()


# -- many requests -------------------------------------------------------------------------------------------------------------------------


def test_requests_run_at_the_same_time_up_to_the_bound_on_kept_connections():
    together, most, lock = 0, 0, threading.Lock()
    full = threading.Event()

    def answer(path, body):
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
            if together == 4:
                full.set()
        full.wait(20)  # nobody is answered before four have asked
        with lock:
            together -= 1
        return GOOD

    with serving(answer) as (url, server), model_on(url, concurrency=4) as lm:
        session = lm.start(list(range(20)), Sampling(64, CLOSERS))
        rows = list(range(20))
        segments = session.generate(rows, [np.array([65], dtype=np.int32)] * 20, [{}] * 20)
        assert len(segments) == 20
        assert most == 4
        assert len(server.connections) == 4


def test_time_spent_waiting_for_a_turn_does_not_count_against_the_deadline():
    def answer(path, body):
        time.sleep(0.6)
        return GOOD

    with serving(answer) as (url, _), model_on(url, concurrency=1, retries=0, deadline=1.5) as lm:
        session = lm.start([0, 1, 2], Sampling(64, CLOSERS))
        assert len(session.generate([0, 1, 2], [np.array([65])] * 3, [{}] * 3)) == 3


def test_segments_are_handed_over_as_they_come():
    slow = threading.Event()

    def answer(path, body):
        if body["prompt"] == [65]:
            slow.wait(30)
        return GOOD

    with serving(answer) as (url, _), model_on(url) as lm:
        session = lm.start([0, 1, 2], Sampling(64, CLOSERS))
        session.submit([0, 1], [np.array([65]), np.array([66])], [{}, {}])
        assert [row for row, _ in session.collect()] == [1]
        session.submit([1, 2], [np.array([66, 67]), np.array([68])], [{}, {}])  # others begin while row 0 is still written
        rows = set()
        while rows != {1, 2}:
            rows |= {row for row, _ in session.collect()}
        with pytest.raises(ValueError, match="one segment at a time"):
            session.submit([0], [np.array([65])], [{}])
        slow.set()
        assert [row for row, _ in session.collect()] == [0]
        assert session.collect() == []


def test_what_came_with_a_failure_is_handed_over_before_it_is_raised():
    def answer(path, body):
        return (400, {}, b"too long") if body["prompt"] == [65] else GOOD

    hang = threading.Event()

    def answer_two(path, body):
        if body["prompt"] == [67]:
            hang.wait(30)
        return answer(path, body)

    try:
        with serving(answer_two) as (url, _), model_on(url) as lm:
            session = lm.start([0, 1, 2], Sampling(64, CLOSERS))
            session.submit([0, 1, 2], [np.array([65]), np.array([66]), np.array([67])], [{}, {}, {}])
            while sum(future.done() for future in session._waiting) < 2:
                time.sleep(0.01)
            assert [row for row, _ in session.collect()] == [1]
            with pytest.raises(ServerAnswerError, match="too long"):  # and row 2 is not waited for
                session.collect()
            assert session.collect() == []
            hang.set()
    finally:
        hang.set()


def test_a_dead_server_stops_the_rollout_with_the_error(venv):
    asked = []

    def answer(path, body):
        asked.append(body)
        return (500, {}, b"gone") if len(asked) > 6 else vllm_answer([65], text="", finish_reason="length")

    with (
        serving(answer) as (url, _),
        model_on(url, venv.unwrapped.tokenizer, retries=0) as lm,
        pytest.raises(ServerUnavailable, match="gone"),
    ):
        rollout(venv, lm, list(range(6)))


def test_the_key_is_sent_and_shown_to_nobody():
    seen = []

    class Keyed(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.headers["Authorization"])
            self.send_error(401)

        def log_message(self, *arguments):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Keyed)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with model_on(f"http://127.0.0.1:{server.server_port}", api_key="secret-1") as lm, pytest.raises(ServerAnswerError) as raised:
            lm.start([0], Sampling(8, CLOSERS)).generate([0], [np.array([65])], [{}])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert seen == ["Bearer secret-1"]
    assert "secret-1" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "http://localhost:8000"),
        ({"url": "ftp://localhost"}, "ftp"),
        ({"url": "http://"}, "address"),
        ({"protocol": "openai"}, "chat"),
        ({"logprobs": "both"}, "raw or processed"),
        ({"concurrency": 0}, "concurrency >= 1"),
        ({"retries": -1}, "retries >= 0"),
        ({"timeout": 0.0}, "timeout > 0"),
        ({"deadline": float("nan")}, "deadline > 0"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        CompletionServerLM(**{"url": "http://localhost:1", "tokenizer": TOKENIZER, "dialect": SEARCH_R1, **arguments})


def test_top_k_is_refused_where_the_protocol_has_none():
    with model_on("http://localhost:1", protocol="chat") as lm, pytest.raises(ConfigurationError, match="top_k"):
        lm.start([0], Sampling(8, CLOSERS, top_k=5))
