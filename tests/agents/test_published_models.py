"""Published checkpoints by name, from a server on the loopback that speaks the hub's protocol, through the command in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from searchqa_agents.cli import main
from searchqa_agents.config_help import conf_dir, options
from searchqa_agents.loading import checkpoint_path, checkpoint_tokenizer, make_venv
from searchqa_agents.lora import has_lora
from searchqa_agents.models import load_model
from searchqa_agents.policy import Policy
from searchqa_agents.settings import register
from searchqa_agents.trajectory import load_trajectories
from searchqa_envs.dialects import R1_SEARCHER_CHAT_PROMPT, R1_SEARCHER_PROMPT, SEARCH_R1_PROMPT
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers import build_tokenizer

COMMIT = "c" * 40
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SEARCH_R1 = "PeterJinGo/SearchR1-nq_hotpotqa_train-qwen2.5-7b-em-ppo"
R1_SEARCHER_LLAMA = "XXsongLALA/Llama-3.1-8B-instruct-RAG-RL"
GATED = "Alibaba-NLP/ZeroSearch_wiki_V2_Llama_3.2_3B"
UNREACHED = "Alibaba-NLP/ZeroSearch_wiki_V2_Qwen2.5_3B"


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with the control tokens and the chat template of Qwen2.5 or Llama 3."""
    control = {
        "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"],
    }[kind]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in control],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([SEARCH_R1_PROMPT, R1_SEARCHER_PROMPT, R1_SEARCHER_CHAT_PROMPT] * 3, trainer)
    if kind == "qwen":
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=CHATML,
            clean_up_tokenization_spaces=False,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|pad|>", chat_template=LLAMA3,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def model_of(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32_768, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**shape)) if kind == "qwen" else LlamaForCausalLM(LlamaConfig(**shape))
    return model


@dataclass
class Hub:
    """Files of each repository, and how the others are refused."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """The requests are in the hub's log."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(path)
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = self.hub.files.get(repository)
        if repository == UNREACHED:
            self.close_connection = True
            self.connection.close()
        elif repository == GATED:
            self.reply(401, {"X-Error-Code": "GatedRepo"}, b"Access to this model is restricted", body)
        elif files is None:
            self.reply(401, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
        elif path.startswith("/api/"):
            listed = [{"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in files.items()]
            about = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            inner = path.partition("/tree/main/")[2]
            if inner:  # a folder that no repository here has
                self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"{}", body)
            else:
                self.reply(200, {"Content-Type": "application/json"}, json.dumps(listed if "/tree/" in path else about).encode(), body)
        else:
            content = files.get(path.partition("/resolve/")[2].partition("/")[2])
            if content is None:
                self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"{}", body)
            else:
                tag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.reply(200, {"X-Repo-Commit": COMMIT, "ETag": tag, "Accept-Ranges": "bytes"}, content, body)

    def reply(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with two of the published names, each with random weights in several files."""
    hub = Hub()
    for repository, kind in ((SEARCH_R1, "qwen"), (R1_SEARCHER_LLAMA, "llama")):
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = tokenizer_of(kind)
        tokenizer.save_pretrained(folder)
        model_of(kind, tokenizer).to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
        hub.files[repository] = {path.name: path.read_bytes() for path in folder.iterdir()}
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


CODE = """
import json, sys
from searchqa_agents.cli import main
for line in json.loads(sys.argv[1]):
    print("=====", main(["eval", *line]), file=sys.stderr)
"""


def evaluated(hub: Hub, home: Path, data: Path, lines: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status and what was said of each evaluation, in one process that has this hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "SEARCHQA_DATA": str(data)}
    process = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(lines)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    parts = process.stderr.split("===== ")
    assert len(parts) == len(lines) + 1, process.stdout + process.stderr
    return [(int(after.split(maxsplit=1)[0]), before) for before, after in pairwise(parts)]


NAMES = {
    **{
        f"search_r1_{model}{'_instruct' if instruct else ''}_{algorithm}{version}": (
            f"PeterJinGo/SearchR1-nq_hotpotqa_train-{model.replace('_', '-')}-{'it-' if instruct else ''}em-{algorithm}{version.replace('_', '-')}"
        )
        for version, model, instruct, algorithm in [
            *(("", "qwen2.5_3b", i, a) for i in (0, 1) for a in ("ppo", "grpo")),
            *(("", "qwen2.5_7b", i, "ppo") for i in (0, 1)),
            *(("", "llama3.2_3b", i, a) for i in (0, 1) for a in ("ppo", "grpo")),
            *(("_v0.2", f"qwen2.5_{size}b", i, a) for size in (3, 7) for i in (0, 1) for a in ("ppo", "grpo")),
            *(("_v0.3", f"qwen2.5_{size}b", i, "grpo") for size in (3, 7, 14) for i in (0, 1)),
            *(("_v0.3", f"qwen2.5_{size}b", 0, "ppo") for size in (3, 7, 14)),
            ("_v0.2", "qwen2.5_14b", 0, "ppo"),
            ("_v0.3", "qwen2.5_3b", 1, "ppo"),
            ("_v0.3", "qwen2.5_32b", 0, "grpo"),
        ]
    },
    **{
        f"r1_qwen2.5_{size}b{'_instruct' if instruct else ''}_ppo_v0.2": (
            f"PeterJinGo/R1-nq_hotpotqa_train-qwen2.5-{size}b-{'it-' if instruct else ''}em-ppo-v0.2"
        )
        for size in (3, 7)
        for instruct in (0, 1)
    },
    "r1_searcher_qwen2.5_7b": "XXsongLALA/Qwen-2.5-7B-base-RAG-RL",
    "r1_searcher_llama3.1_8b_instruct": R1_SEARCHER_LLAMA,
    **{
        f"zerosearch_{engine}_{name}{'_instruct' if instruct else ''}": f"Alibaba-NLP/ZeroSearch_{engine}_V2_{model}{'_Instruct' if instruct else ''}"
        for engine in ("google", "wiki")
        for name, model in (("qwen2.5_3b", "Qwen2.5_3B"), ("qwen2.5_7b", "Qwen2.5_7B"), ("llama3.2_3b", "Llama_3.2_3B"))
        for instruct in (0, 1)
    },
}
"""The published names, as the three repositories and the users of their collections give them."""
EVALUATION: dict[str, dict[str, Any]] = {
    "search_r1": {"dialect": "search-r1", "prompt": "published", "top_k": 3, "max_turns": 5, "max_segment_tokens": 500, "retriever": None},
    "r1": {"dialect": "search-r1", "prompt": "no_search", "retriever": "none", "max_turns": 1, "max_segment_tokens": 500},
    "r1_searcher": {"dialect": "r1-searcher", "top_k": 5, "max_turns": 9, "max_segment_tokens": 512, "max_context_tokens": 22016},
    "zerosearch": {"dialect": "zerosearch", "prompt": "published", "top_k": 5, "max_turns": 3, "max_observation_tokens": 2048},
}


def composed(*words: str) -> Any:
    register()
    with initialize_config_module("searchqa_conf", version_base="1.3"):
        return OmegaConf.to_object(compose("eval", overrides=["name=x", "run_dir=x", *words]))


def test_every_published_agent_is_one_that_is_listed_here() -> None:
    assert options("agent/published") == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_published_agent_has_its_name_on_the_hub_and_the_evaluation_of_its_system(name: str) -> None:
    system = max((system for system in EVALUATION if name.startswith(system)), key=len)
    file = conf_dir() / "agent" / "published" / f"{name}.yaml"
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert written["defaults"] == ["/agent/lm@agent", f"/published/{system}_evaluation", "_self_"]
    assert written["agent"] == {"checkpoint": NAMES[name]}
    assert written.get("env", {}) == ({"prompt": "chat"} if name == "r1_searcher_llama3.1_8b_instruct" else {})


@pytest.mark.parametrize("system", sorted(EVALUATION))
def test_what_an_evaluation_has_reaches_agent_and_environment(system: str) -> None:
    name = next(name for name in sorted(NAMES) if name.startswith(system))
    settings = composed("env=nq", f"agent=published/{name}")
    assert (settings.agent.kind, settings.agent.checkpoint, settings.agent.temperature) == ("lm", NAMES[name], 0)
    assert settings.dtype == "bfloat16"
    assert {key: getattr(settings.env, key) for key in EVALUATION[system]} == EVALUATION[system]
    assert settings.env.tokenizer is None  # the checkpoint's own


def test_the_line_wins_over_a_published_agent_in_whatever_order() -> None:
    words = ["env.top_k=7", "agent.temperature=0.5", "dtype=float32", "agent.checkpoint=a/b", "env.retriever=random"]
    for line in (
        [*words, "env=nq", "agent=published/r1_searcher_qwen2.5_7b"],
        ["agent=published/r1_searcher_qwen2.5_7b", "env=nq", *words],
    ):
        settings = composed(*line)
        assert (settings.env.top_k, settings.env.retriever, settings.env.max_turns) == (7, "random", 9)
        assert (settings.agent.temperature, settings.agent.checkpoint, settings.dtype) == (0.5, "a/b", "float32")


def test_the_help_of_eval_lists_published_agents_and_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", "--help"])
    said = capsys.readouterr().out
    assert all(f"{name}" in said for name in NAMES)
    assert all(f"baseline/{name} " in said for name in ("r1", "sft", "rejection_sampling", "zero_shot", "zero_shot_server"))
    assert "in bfloat16 on the first GPU" in said


def test_a_folder_of_lora_adapters_is_the_model_with_them_and_has_its_tokenizer(tmp_path: Path) -> None:
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    tokenizer = tokenizer_of("qwen")
    tokenizer.save_pretrained(base)
    model = model_of("qwen", tokenizer)
    model.save_pretrained(base)
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapters)
    assert (adapters / "adapter_config.json").is_file()
    assert not (adapters / "config.json").is_file()

    own = build_tokenizer(str(checkpoint_tokenizer(str(adapters))))
    assert own.name == build_tokenizer(str(base)).name
    policy = Policy.load(checkpoint_path(str(adapters)), own)
    assert not has_lora(policy.model)
    ids = torch.tensor([own.encode("Question: who?")])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.allclose(policy.model(ids).logits, expected, atol=1e-5)
        assert not torch.allclose(load_model(base)(ids).logits, expected, atol=1e-2)


def test_without_the_hub_a_name_that_is_not_in_the_cache_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    env = composed("env=world", "env.tokenizer=nobody/nothing").env
    with pytest.raises(ConfigurationError, match=r"nobody/nothing is not in the cache of the model hub, and .* cannot be reached"):
        make_venv(env, 1)
    with pytest.raises(ConfigurationError, match="nobody/nothing"):
        load_model("nobody/nothing")


def test_a_folder_that_holds_no_weights_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigurationError, match=f"The model in {tmp_path} cannot be loaded"):
        load_model(tmp_path)


def test_published_checkpoints_are_evaluated_by_name(hub: Hub, small_data: Path, tmp_path: Path) -> None:
    short = ["env=hotpotqa", "questions=2", "threads=1", "device=cpu", "save=null"]
    qwen, llama = tmp_path / "qwen", tmp_path / "llama"
    told = evaluated(
        hub,
        tmp_path / "home",
        small_data,
        [
            [*short, "agent=published/search_r1_qwen2.5_7b_ppo", "env.max_segment_tokens=8", f"run_dir={qwen}"],
            [
                "sets=[nq,hotpotqa]",
                *short[1:],
                "agent=published/r1_searcher_llama3.1_8b_instruct",
                "env.max_segment_tokens=8",
                "env.top_k=2",
                f"run_dir={llama}",
            ],
            [*short, "agent=published/r1_searcher_qwen2.5_7b", f"run_dir={tmp_path / 'missing'}"],
            [*short, "agent=published/zerosearch_wiki_llama3.2_3b", f"run_dir={tmp_path / 'gated'}"],
            [*short, "agent=published/zerosearch_wiki_qwen2.5_3b", f"run_dir={tmp_path / 'unreached'}"],
        ],
    )
    assert [status for status, _ in told] == [0, 0, 1, 1, 1], told
    for run, name, dialect, prompt, top_k, turns in (
        (qwen, SEARCH_R1, "search-r1", "published", 3, 5),
        (llama, R1_SEARCHER_LLAMA, "r1-searcher", "chat", 2, 9),
    ):
        stamp = json.loads((run / "stamp.json").read_text())
        assert stamp["tokenizer"].startswith(f"{name}@")
        assert (stamp["dialect"], stamp["prompt"], stamp["top_k"], stamp["max_turns"]) == (dialect, prompt, top_k, turns)
        assert stamp["max_segment_tokens"] == 8  # the line's own value, as R1-Searcher's top_k
        assert (stamp["agent"]["checkpoint"], stamp["agent"]["revision"]) == (name, COMMIT)
        assert stamp["agent"]["temperature"] == 0
        assert yaml.safe_load((run / "config.yaml").read_text())["dtype"] == "bfloat16"
        shards = [file for file in hub.files[name] if file.endswith(".safetensors")]
        assert len(shards) > 2
        assert all(f"/{name}/resolve/{COMMIT}/{shard}" in hub.log or f"/{name}/resolve/main/{shard}" in hub.log for shard in shards)

    question = "On which river lies the birthplace of Marie Curie?"
    [first, _] = load_trajectories(qwen / "trajectories" / "eval.jsonl.gz")
    asked = SEARCH_R1_PROMPT.replace("{question}", question)
    assert first.prompt == f"<|im_start|>user\n{asked}\n<|im_start|>assistant\n"  # <|im_end|> is an id without text
    [first, _] = load_trajectories(llama / "trajectories" / "nq.jsonl.gz")
    rules = R1_SEARCHER_CHAT_PROMPT.partition("\n\nUser:")[0]
    assert first.prompt == (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{rules}<|start_header_id|>user<|end_header_id|>\n\n{question}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<think>"
    )  # <|eot_id|> likewise

    missing, gated, unreached = (" ".join(said.split()) for _, said in told[2:])
    assert f"There is no model XXsongLALA/Qwen-2.5-7B-base-RAG-RL on {hub.url}, or it is private" in missing
    assert f"{hub.url} gives out {GATED} only to those who have accepted its conditions" in gated
    assert f"{UNREACHED} is not in the cache of the model hub, and {hub.url} cannot be reached: check the network" in unreached
    for name, said in ((GATED, gated), (UNREACHED, unreached)):
        assert f"hf download {name} --local-dir FOLDER) and give the folder in place of the name: agent.checkpoint=FOLDER" in said
        assert "Traceback" not in said
