"""The plan of a run: counts and sums by hand, what is an error and what a warning, and that nothing is instantiated, built or downloaded."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from searchqa_agents.cli import main
from searchqa_agents.model_shapes import random_model, shape_config
from searchqa_agents.plan import addresses, reachable
from searchqa_agents.plan_memory import (
    Shape,
    Work,
    activations,
    advice,
    cache_cells,
    disk,
    flops,
    layer_activations,
    measure_shape,
    memory,
)
from searchqa_agents.policy import last_hidden_states

TINY = Shape(
    parameters=1000, trained=1000, decoder=900, linear=600, output=100, largest=300, layers=2, hidden=10, attention=10, keys=5, feed_forward=30,
    heads=2, vocab_size=50, max_positions=64, rank=0,
)  # fmt: skip
WORK = Work(TINY, 4, False, "cuda", context=40, prompt=8, slots=3, sequences=4, max_tokens=80)


# -- counts ----------------------------------------------------------------------------------------------------------------------------------


def test_a_shape_is_counted_as_the_model_is() -> None:
    shape = measure_shape(shape_config("qwen2.5-0.5b"))
    assert shape.parameters == shape.trained == shape.decoder == 494_032_768  # the output layer is the embeddings'
    assert shape.linear == 24 * (896 * (896 + 896 + 128 + 128) + 3 * 896 * 4864)
    assert shape.output == shape.largest == 151_936 * 896
    assert (shape.attention, shape.keys, shape.max_positions) == (14 * 64, 2 * 64, 32_768)


def test_under_lora_the_adapters_alone_are_trained() -> None:
    shape = measure_shape(shape_config("qwen2.5-7b"), {"rank": 16})
    attention = 2 * (3584 + 3584) + 2 * (3584 + 512)
    assert shape.trained == 28 * 16 * (attention + 3 * (3584 + 18_944))
    assert shape.parameters == 7_615_616_512
    assert shape.largest == 16 * 18_944


@pytest.mark.parametrize(
    ("dtype", "autocast", "lora"),
    [
        (torch.float32, False, False),
        (torch.float32, True, False),
        (torch.bfloat16, False, False),
        (torch.bfloat16, False, True),
        (torch.float32, False, True),
    ],
)
def test_a_layer_keeps_what_autograd_really_keeps(dtype: torch.dtype, autocast: bool, lora: bool) -> None:
    """Counted by hooks, as the difference between two layers and one."""
    tokens = 32

    def kept(layers: int) -> int:
        model = random_model(shape_config("qwen2.5-0.5b", num_hidden_layers=layers, vocab_size=64), 0, pad_id=0, eos_id=1, dtype=dtype)
        if lora:
            from types import SimpleNamespace

            from searchqa_agents.lora import add_lora

            add_lora(SimpleNamespace(model=model, device=torch.device("cpu")))  # type: ignore[arg-type]
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        found: dict[int, int] = {}
        held: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
                held.append(tensor)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            last_hidden_states(model.get_decoder(), torch.ones(1, tokens, dtype=torch.int64), None)
        return sum(found.values())

    shape = measure_shape(shape_config("qwen2.5-0.5b", num_hidden_layers=1, vocab_size=64), {"rank": 16} if lora else None)
    work = Work(shape, 4 if dtype == torch.float32 else 2, autocast, "cpu")
    casts = shape.linear * 2 if autocast else 0
    assert kept(2) - kept(1) == tokens * layer_activations(work) + casts


# -- memory by hand --------------------------------------------------------------------------------------------------------------------------


def test_resident_memory_is_weights_reference_critic_and_two_means_of_what_is_trained() -> None:
    found = memory(replace(WORK, reference=True, critic="separate"))
    for phase in found:
        assert (phase["weights"], phase["reference"], phase["critic"]) == (4000, 4000, 3600)
        assert phase["AdamW"] == 2 * (4000 + 3600)
    assert found.update["gradients"] == 7600
    assert found.checkpoint["copies to save"] == 0  # they are made in the host's memory
    here = memory(replace(WORK, reference=True, critic="separate", device="cpu"))
    assert here.checkpoint["copies to save"] == 4000 + 4000 + 3600 + 2 * 7600


def test_copies_under_lora_are_of_the_adapters_alone() -> None:
    work = replace(WORK, shape=TINY._replace(trained=20, rank=4), weight_bytes=2, device="cpu")
    assert memory(work).checkpoint["copies to save"] == 3 * 80


def test_under_lora_there_is_no_reference_and_only_adapters_have_gradients() -> None:
    work = replace(WORK, shape=TINY._replace(trained=20, rank=4), weight_bytes=2)
    found = memory(work)
    assert found.update["weights"] == 2000 + 80
    assert (found.update["gradients"], found.update["AdamW"], found.update["reference"]) == (80, 160, 0)
    assert disk(work) == 2000 + 3 * 80


def test_shards_divide_what_stays_and_gather_the_weights_that_play() -> None:
    found = memory(replace(WORK, reference=True, processes=4, sharded=True))
    assert (found.rollout["weights"], found.rollout["reference"], found.rollout["AdamW"]) == (1000, 1000, 2000)
    assert found.rollout["gathered weights"] == 4000
    assert found.update["gradients"] == 1000
    assert found.update["unsharded"] == 2 * (400 + 600) * 4  # weights and gradients of the root's own and of both layers, at most
    assert found.checkpoint["copies to save"] == 0  # they are in the first machine's main memory


def test_several_processes_that_do_not_shard_hold_everything() -> None:
    assert memory(replace(WORK, processes=4)).update == memory(WORK).update


def test_the_attention_cache_grows_as_it_does_in_sessions() -> None:
    from searchqa_agents.slot_cache import SlotCache

    work = replace(WORK, context=1500, prompt=200)
    cache = SlotCache()
    for cells in range(201, 1502):
        cache.reserve(1, cells)
    assert cache_cells(work) == cache.capacity
    assert memory(work).rollout["attention cache"] == 3 * cache.capacity * 2 * 2 * 5 * 4


def test_checkpointing_keeps_inputs_of_layers_and_one_layer() -> None:
    plain, less = activations(WORK), activations(replace(WORK, checkpointing=True))
    layer, under_way = 80 * layer_activations(WORK), 80 * (2 * 30 + 4 * 10) * 4
    assert plain == 2 * layer + under_way
    assert less == 2 * 80 * 10 * 4 + layer + under_way


def test_a_micro_batch_holds_one_sequence_that_is_longer_than_it_may_be_and_never_more_than_there_is() -> None:
    assert replace(WORK, max_tokens=16).evaluated == 40
    assert replace(WORK, max_tokens=10_000).evaluated == 160


def test_operations_are_six_per_weight_and_token_and_four_under_lora() -> None:
    read, scored, update = flops(WORK, 10)
    attention = 2 * 2 * 10 * 40**2
    assert read == 2 * 600 * 40 + attention
    assert scored == read + 2 * 100 * 10
    assert update == 6 * 600 * 40 + 3 * attention + 8 * 100 * 10
    assert flops(replace(WORK, checkpointing=True), 10)[2] == update + read
    assert flops(replace(WORK, shape=TINY._replace(rank=4)), 10)[2] == 4 * 600 * 40 + 3 * attention + 6 * 100 * 10


def test_advice_leads_to_something_that_fits() -> None:
    shape = measure_shape(shape_config("qwen2.5-3b"))
    work = Work(shape, 4, True, "cuda", reference=True, context=4596, prompt=200, slots=256, sequences=512)
    words, found = advice(work, 110e9)
    assert memory(work).peak > 110e9
    assert found.peak <= 110e9
    assert "algo.gradient_checkpointing=true" in words
    assert any(word.startswith("num_envs=") for word in words)
    words, found = advice(replace(work, processes=8), 30e9, lambda: measure_shape(shape_config("qwen2.5-3b"), {"rank": 16}))
    assert found.peak <= 30e9
    assert "parallel=fsdp2" in words


# -- the command -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEARCHQA_DATA", raising=False)
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    yield tmp_path
    assert not list(tmp_path.iterdir())


DRY = ("dry_run=true", "threads=1", "plan.flops_per_second=1e12", "plan.bytes_per_second=1e11")


@pytest.mark.parametrize(
    ("recipe", "llm", "parameters"),
    [
        ("search_r1_ppo", "qwen2.5-7b", "7,615,616,512"),
        ("search_r1_grpo_lora", "llama-3.1-8b", "8,030,261,248"),
        ("zerosearch_grpo", "llama-3.2-3b", "3,212,749,824"),
    ],
)
def test_published_recipes_are_planned_without_hub_data_or_server(
    recipe: str, llm: str, parameters: str, nothing_here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", f"recipe=published/{recipe}", f"llm={llm}", "plan.processes=8", "plan.device=h100", *DRY]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert parameters in said
    assert "Would download" in said
    assert "does not answer" in said
    assert "8 x h100" in said
    assert "projection" in said


def test_a_shape_too_large_for_the_device_is_a_warning_that_names_a_way(nothing_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "start=random", "random.like=qwen2.5-3b", "env=world", "plan.memory_gb=60", "device=cpu", *DRY]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "Warning: Does not fit" in said
    assert "with: " in said
    assert "algo.gradient_checkpointing=true" in said


def test_a_context_that_cannot_hold_a_prompt_is_planned_and_then_refused(nothing_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "start=shipped", "env.max_context_tokens=50", *DRY]) == 1
    shown = capsys.readouterr()
    assert "Error: Context" in shown.out
    assert "Would" not in shown.out
    assert "exceed max_context_tokens=50" in shown.err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("plan.processes=0", "plan.processes must be at least 1"),
        ("plan.utilisation=2", "plan.utilisation must be above 0"),
        ("plan.device=abacus", "'abacus'"),
        ("env.retriever=grep", "grep"),
        ("env.tokenizer=byte", "trained with tokenizer"),
    ],
)
def test_what_cannot_be_is_refused(word: str, said: str, nothing_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "start=shipped", *DRY, word]) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Would" not in shown.out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("env.retriever.noise.start=2", "0 <= start"),
        ("+env.retriever.nose.start=.5", "no option nose"),
        ("env.retriever.noise={begin: 0}", "no key begin"),
        ("env.retriever.checkpoint=/no/where", "no folder /no/where"),
        ("env.retriever.checkpoint=shipped", "${shipped_simulator:}"),
        ("env.retriever.checkpoint=null", "give one of the two"),
        ("env.retriever.prompt=riddle", "riddle"),
        ("env.retriever={name: hybrid, retrievers: [bm25, {name: simulated, checkpoint: /no/where}]}", "no folder /no/where"),
    ],
)
def test_a_simulator_that_cannot_be_is_refused_before_its_model_is_loaded(
    word: str, said: str, nothing_here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("searchqa_retrievers.text_model.TextModel.__init__", None)
    assert main(["train", "recipe=zerosearch", *DRY]) == 0
    capsys.readouterr()
    assert main(["train", "recipe=zerosearch", *DRY, word]) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Would" not in shown.out


def test_random_weights_are_like_the_model_of_llm(nothing_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "llm=llama-3.2-3b-instruct", "start=random", "parallel=auto", *DRY]) == 0
    assert "3,212,749,824" in capsys.readouterr().out
    assert main(["train", "start=random", *DRY]) == 1
    assert "random.like (or llm) must be" in capsys.readouterr().err


def test_random_weights_must_cover_the_tokenizer(nothing_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "start=random", "random.like=qwen2.5-0.5b", "random.vocab_size=8"]
    for words in ([*line, *DRY], [*line, "run_dir=cache"]):
        assert main(words) == 1
        assert "must know every id of the tokenizer" in capsys.readouterr().err
    for file in sorted((nothing_here / "cache").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    with contextlib.suppress(FileNotFoundError):
        (nothing_here / "cache").rmdir()


def test_data_that_is_named_but_not_there_is_said_with_the_plan_and_refused(nothing_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "start=shipped", "env=custom", "env.questions=missing.jsonl", "env.tokenizer=world", *DRY]) == 1
    shown = capsys.readouterr()
    assert "Memory of one process" in shown.out
    assert "missing.jsonl" in shown.err


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc; what getrusage tells begins with the memory of the parent process"
)
def test_the_plan_of_a_large_model_takes_little_memory(nothing_here: Path) -> None:
    """In a process of its own: below 1.5 GB with everything that is imported."""
    program = (
        "import re, sys; from searchqa_agents.cli import main; code = main(sys.argv[1:]); "
        "print('peak', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    line = ["train", "recipe=published/search_r1_ppo", "llm=qwen2.5-7b", "plan.processes=8", "plan.device=h100", *DRY]
    done = subprocess.run([sys.executable, "-c", program, *line], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rsplit("peak", 1)[1]) < 1.5e6  # KiB


# -- servers ---------------------------------------------------------------------------------------------------------------------------------


def test_servers_are_found_however_deep_and_asked_whether_they_answer() -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        config = {
            "name": "rerank",
            "retriever": {"name": "hybrid", "parts": [{"name": "http", "url": url}, {"name": "shards", "urls": ["a", "b"]}]},
        }
        assert list(addresses(config)) == [url, "a", "b"]
        assert reachable(f"{url}/retrieve")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert not reachable(url)
    with socket.socket() as listens:  # and says nothing
        listens.bind(("127.0.0.1", 0))
        listens.listen()
        assert not reachable(f"http://127.0.0.1:{listens.getsockname()[1]}")
