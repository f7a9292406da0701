"""A run whose search back end is gone, or is another one, stops with an error that says how to go on, and loses nothing that it had earned."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from searchqa_agents.cli import main
from searchqa_agents.lost_back_end import LostBackEndError, LostRollouts, check_measured, is_lost, watched
from searchqa_agents.report import lost_episodes, lost_line
from searchqa_agents.runs import OtherSearchError, RunFolder, list_checkpoints, read_metrics, stamp_differences
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.world import WorldSource
from searchqa_retrievers.http_server import create_app
from searchqa_retrievers.types import RetrieverUnavailable

STEPS = 5


class BackEnd:
    """A real search server of the world, on a port that stays the same when it is stopped and another is started."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.thread = None

    def start(self, wrapped=lambda retriever: retriever, token=None, **options):
        source = WorldSource("train", num_worlds=20)
        retriever = wrapped(source.build_retriever({"name": "bm25", **options}))
        app = create_app(retriever, token=token)
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="critical", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def stop(self):
        if self.thread is not None:
            self.server.should_exit = True
            self.thread.join()
            self.thread = None

    def words(self, retries=1):
        url = f"env.retriever.url=http://127.0.0.1:{self.port}"
        return ["env.retriever.name=http", url, f"env.retriever.retries={retries}", "env.retriever.deadline=2", "env.num_worlds=20"]

    def smoke(self, run, *more):
        small = ["algo.questions_per_step=4", "algo.group_size=3", "algo.num_worlds=2", "evaluation.questions=4", "threads=1"]
        world = ["start=shipped", "env.max_turns=3", "env.max_segment_tokens=16", f"algo.steps={STEPS}"]
        return ["train", "recipe=smoke", *world, *small, *self.words(), f"run_dir={run}", *more]


@pytest.fixture
def back_end():
    one = BackEnd()
    one.start()
    yield one
    one.stop()


@pytest.fixture
def at_line(monkeypatch):
    """Do something right after a line of metrics was written."""

    def at(phase, step, do):
        original = RunFolder.log

        def log(self, line_phase, line_step, values):
            original(self, line_phase, line_step, values)
            if (line_phase, line_step) == (phase, step):
                do()

        monkeypatch.setattr(RunFolder, "log", log)

    yield at
    monkeypatch.undo()


def metrics_of(run):
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "search/")) and k != "seconds"} for line in read_metrics(run)]


def last_weights(run):
    return (list_checkpoints(run)[-1].path / "model.safetensors").read_bytes()


# -- the rule ----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lost(episode):
    return episode([1], [2], backend_error="RetrieverUnavailable: gone.")


@pytest.fixture
def answered(episode):
    return episode([1], [2], metrics={"searches": 1.0})


@pytest.fixture
def silent(episode):
    return episode([1], [2], metrics={"searches": 0.0})


def test_a_rollout_is_lost_when_no_search_in_it_was_answered(lost, answered, silent):
    assert is_lost([lost])
    assert is_lost([lost, silent])
    assert not is_lost([lost, answered])
    assert not is_lost([silent])
    assert not is_lost([answered])
    assert not is_lost([])


def test_so_many_in_a_row_and_no_fewer_are_too_many(lost, answered):
    count = LostRollouts(2, 10)
    for rollout in ([lost], [answered], [lost, lost], [lost]):
        count.check()
        count.add(rollout)
    with pytest.raises(LostBackEndError, match=r"2 rollouts in a row .* The last error: RetrieverUnavailable: gone\. Bring"):
        count.check()
    count.add([answered, lost])
    count.check()
    assert (count.in_a_row, count.episodes) == (0, 1)


def test_all_that_are_left_are_too_many_and_0_is_never(lost):
    last = LostRollouts(3, 1)
    last.add([lost])
    with pytest.raises(LostBackEndError):
        last.check()
    never = LostRollouts(0, 1)
    never.add([lost])
    never.check()
    assert never.in_a_row == 0
    with pytest.raises(ConfigurationError, match="at least 0; got -1"):
        LostRollouts(-1, 1)


@given(st.lists(st.booleans()), st.integers(1, 4))
def test_training_ends_at_the_first_run_of_lost_batches_that_is_long_enough(pattern, most):
    from types import SimpleNamespace

    def batch(step):
        return [SimpleNamespace(backend_error="gone" if pattern[step] else None, metrics={"searches": 1.0})]

    batches, played = watched(batch, LostRollouts(most, 100)), 0
    expected = next((i for i in range(len(pattern)) if i + 1 >= most and all(pattern[i + 1 - most : i + 1])), len(pattern))
    for step in range(len(pattern)):
        try:
            batches(step)
        except LostBackEndError:
            break
        played += 1
    assert played == expected


def test_an_evaluation_of_nothing_is_an_error(lost, answered, silent):
    check_measured([lost, answered], "it")
    with pytest.raises(LostBackEndError, match="it has no result, because 1 of its 2 episodes lost it"):
        check_measured([lost, silent], "it")


def test_lost_episodes_by_hand():
    lines = [{"phase": "train", "charts/backend_errors": 3.0}, {"phase": "train"}, {"phase": "sft", "charts/backend_errors": 2.0}]
    counts = lost_episodes(lines, {"before": {"hops=2/sampled/backend_errors": 1.0, "hops=2/sampled/em": 1.0}, "after": {}})
    assert counts == {"sft": 2, "before": 1, "train": 3}
    assert "lost in 6 episodes (demonstrations 2, evaluation before 1, training 3)" in lost_line(counts)
    assert lost_line({}) == ""


def test_another_round_of_dynamic_sampling_is_not_played_without_a_back_end(lost, monkeypatch):
    import gymnasium as gym

    from searchqa_agents.algorithms.grpo import GRPOConfig
    from searchqa_agents.parallel import Parallel
    from searchqa_agents.trainer import _play

    venv = gym.make_vec("SearchQA-World-v0", num_envs=2, autoreset_mode="DISABLED")
    rounds = []
    monkeypatch.setattr("searchqa_agents.trainer.shared_rollout", lambda *_, **__: rounds.append(1) or [lost, lost])
    config = GRPOConfig(questions_per_step=1, group_size=2, dynamic_sampling=5)
    played, kept, _ = _play(venv, None, config, 0, {}, Parallel())
    venv.close()
    assert (len(rounds), len(played), kept) == (1, 2, [])


# -- runs --------------------------------------------------------------------------------------------------------------------------------------


def test_a_run_without_a_back_end_fails_before_it_trains(back_end, tmp_path, capsys):
    back_end.stop()
    run = tmp_path / "run"
    assert main(back_end.smoke(run)) == 1
    said = capsys.readouterr().err
    assert "the evaluation hops=2/sampled has no result" in said
    assert f"`searchqa train resume={run}` begins again" in said
    assert not (run / "summary.json").exists()
    assert not [line for line in read_metrics(run) if line["phase"] == "train"]


def test_a_back_end_that_goes_and_comes_back_costs_nothing_but_a_resume(back_end, tmp_path, capsys, at_line, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(back_end.smoke(whole)) == 0
    assert "The search back end was lost" not in capsys.readouterr().out
    at_line("train", 2, back_end.stop)
    assert main(back_end.smoke(run, "max_lost_rollouts=2")) == 1
    monkeypatch.undo()
    said = capsys.readouterr().err
    kept = list_checkpoints(run)[-1]
    assert (kept.phase, kept.step) == ("train", 2)  # none of the steps that were lost
    assert "2 rollouts in a row" in said
    assert "ConnectError" in said
    assert f"The last good checkpoint is {kept.path}: `searchqa train resume={run}` goes on from it" in said
    assert [line["step"] for line in read_metrics(run) if line["phase"] == "train"] == [1, 2, 3, 4]
    back_end.start()
    assert main(["train", f"resume={run}"]) == 0
    assert metrics_of(run) == metrics_of(whole)
    assert last_weights(run) == last_weights(whole)
    assert len(json.loads((run / "stamps.json").read_text())) == 2


def test_where_lost_rollouts_may_go_on_they_are_told_at_the_end(back_end, tmp_path, capsys, at_line, monkeypatch):
    run = tmp_path / "run"
    at_line("train", 1, back_end.stop)
    assert main(back_end.smoke(run, "algo.steps=3", "max_lost_rollouts=0")) == 1  # the evaluation has no result
    monkeypatch.undo()
    assert "the evaluation hops=2/sampled has no result" in capsys.readouterr().err
    assert list_checkpoints(run)[-1].step == 3
    back_end.start()
    assert main(["train", f"resume={run}"]) == 0
    out = capsys.readouterr().out
    lost = sum(line["charts/backend_errors"] for line in read_metrics(run) if line["phase"] == "train")
    assert lost > 0
    assert f"The search back end was lost in {lost:.0f} episodes (training {lost:.0f})" in out
    assert json.loads((run / "summary.json").read_text())["lost_episodes"] == {"train": lost}
    assert main(["report", str(run)]) == 0
    assert f"lost in {lost:.0f} episodes" in capsys.readouterr().out


def test_demonstrations_that_are_lost_stop_the_warm_start(back_end, tmp_path, capsys, at_line, monkeypatch):
    run = tmp_path / "run"
    line = ["sft", "recipe=smoke", "threads=1", "warmup.target_loss=100", "warmup.max_steps=4", "warmup.check_every=2", "sft.steps=6"]
    line = [word for word in line if not word.startswith("recipe")] + ["sft.batch_size=4", "sft.checkpoint_every=2", "model.hidden_size=32"]
    at_line("sft", 2, back_end.stop)
    assert main([*line, *back_end.words(), f"run_dir={run}"]) == 1
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert "3 rollouts in a row" in said
    assert f"`searchqa sft resume={run}` goes on from it" in said
    assert (list_checkpoints(run)[-1].phase, list_checkpoints(run)[-1].step) == ("sft", 2)
    back_end.start()
    assert main(["sft", f"resume={run}"]) == 0
    assert [line["step"] for line in read_metrics(run) if line["phase"] == "sft"] == [1, 2, 3, 4, 5, 6]


class FirstCallLost:
    """A retriever whose first call, and no other, fails."""

    name = "first_call_lost"

    def __init__(self, retriever):
        self.retriever, self.calls = retriever, 0

    def search(self, requests):
        self.calls += 1
        if self.calls == 1:
            raise RetrieverUnavailable("not yet")
        return self.retriever.search(requests)

    def cache_key(self, request):
        return self.retriever.cache_key(request)

    def __deepcopy__(self, memo):
        return self


def test_an_evaluation_without_a_back_end_stops_and_one_that_gets_it_back_leaves_nothing_out(back_end, tmp_path, capsys):
    line = ["eval", "env=world", "agent=search_once", "questions=8", "threads=1", *back_end.words(retries=0)]
    assert main([*line, f"run_dir={tmp_path / 'whole'}"]) == 0
    back_end.stop()
    capsys.readouterr()
    for num_envs, said in (
        (2, "The search back end is gone: 6 episodes in a row"),
        (8, "was lost in 8 episodes of world, also when they were played again"),
    ):
        run = tmp_path / f"none-{num_envs}"
        assert main([*line, f"run_dir={run}", f"num_envs={num_envs}"]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert said in told
        assert f"No episode has ended yet: `searchqa eval resume={run}` begins again" in told
        assert not (run / "summary.json").exists()
    back_end.start(wrapped=FirstCallLost)
    assert main([*line, f"run_dir={tmp_path / 'some'}", "num_envs=2"]) == 0
    assert (tmp_path / "some" / "scores.jsonl").read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()
    assert main(["eval", f"resume={tmp_path / 'none-8'}"]) == 0
    assert (tmp_path / "none-8" / "scores.jsonl").read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()


def test_an_evaluation_whose_back_end_goes_in_the_middle_keeps_what_was_answered(back_end, tmp_path, capsys, monkeypatch):
    from searchqa_agents.answers import Journal, read_answers

    line = ["eval", "env=world", "agent=search_once", "questions=40", "num_envs=2", "threads=1", *back_end.words(retries=0)]
    assert main([*line, f"run_dir={tmp_path / 'whole'}"]) == 0
    original, kept = Journal.add, []

    def add(self, *arguments):
        original(self, *arguments)
        kept.append(arguments[0]["id"])
        if len(kept) == 10:
            back_end.stop()

    monkeypatch.setattr(Journal, "add", add)
    run = tmp_path / "run"
    assert main([*line, f"run_dir={run}"]) == 1
    assert "episodes in a row" in capsys.readouterr().err
    assert 10 <= len(read_answers(run).rows) < 40
    back_end.start()
    assert main(["eval", f"resume={run}"]) == 0
    assert sorted(kept) == sorted(set(kept))  # none twice
    assert (run / "scores.jsonl").read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()


def test_an_evaluation_goes_on_with_its_server_elsewhere_but_not_with_another_search(back_end, tmp_path, capsys):
    line = ["eval", "env=world", "agent=search_once", "threads=1"]
    assert main([*line, *back_end.words(), "questions=6", f"run_dir={tmp_path / 'whole'}"]) == 0
    run = tmp_path / "run"
    assert main([*line, *back_end.words(), "questions=4", f"run_dir={run}"]) == 0
    back_end.stop()
    elsewhere = BackEnd()
    try:
        elsewhere.start(k1=0.3)
        moved = [word for word in elsewhere.words(retries=0) if "num_worlds" not in word] + ["env.retriever.timeout=5"]
        capsys.readouterr()
        assert main(["eval", f"resume={run}", *moved, "questions=6"]) == 1
        said = capsys.readouterr().err
        assert "retriever.server.k1 was" in said
        assert "url was" not in said
        elsewhere.stop()
        elsewhere.start()
        assert main(["eval", f"resume={run}", *moved, "questions=6"]) == 0
        assert main(["eval", f"resume={run}", *moved, "env.top_k=1"]) == 1
        assert "another env" in capsys.readouterr().err
    finally:
        elsewhere.stop()
    assert (run / "scores.jsonl").read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()


def test_an_error_of_the_configuration_in_the_middle_tells_how_to_go_on(back_end, tmp_path, capsys, at_line, monkeypatch):
    run = tmp_path / "run"

    def closed():
        back_end.stop()
        back_end.start(token="another")

    at_line("train", 2, closed)
    assert main(back_end.smoke(run)) == 1
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert re.search(r"\b401\b", said)
    kept = list_checkpoints(run)[-1]
    assert kept.step == 2
    assert f"The last good checkpoint is {kept.path}: `searchqa train resume={run}` goes on from it" in said


@pytest.mark.slow
def test_processes_that_train_together_stop_together_and_one_goes_on_alone(back_end, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "searchqa_agents.cli"]
    with log.open("w") as output:
        process = subprocess.Popen([*launch, *back_end.smoke(run, "algo.steps=60")], stdout=output, stderr=output)
        try:
            while not any(line["phase"] == "train" for line in read_metrics(run)):
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            back_end.stop()
            assert process.wait(60) == 1, log.read_text()
        finally:
            process.kill()
            process.wait()
    said = log.read_text()
    for rank in (0, 1):
        assert f"searchqa, process {rank} of 2: The search back end is gone: 3 rollouts in a row" in said
    kept = list_checkpoints(run)[-1]
    assert f"`searchqa train resume={run}` goes on from it" in said
    done = [line["step"] for line in read_metrics(run) if line["phase"] == "train"][-1]
    assert kept.step == done - 3
    back_end.start()
    assert main(["train", f"resume={run}", f"algo.steps={kept.step + 1}"]) == 0


# -- another search engine ---------------------------------------------------------------------------------------------------------------------


def test_a_run_does_not_go_on_with_another_search_engine(back_end, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(back_end.smoke(run, "algo.steps=1")) == 0
    before = {file: (run / file).read_text() for file in ("stamp.json", "stamps.json", "summary.json", "metrics.jsonl", "config.yaml")}
    back_end.stop()
    back_end.start(k1=2.0)
    assert main(["train", f"resume={run}", "algo.steps=2"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"retriever\.server\.\S*k1 was [\d.]+, is 2\.0", said)
    assert {file: (run / file).read_text() for file in before} == before
    back_end.stop()
    back_end.start()
    assert main(["train", f"resume={run}", "algo.steps=2"]) == 0
    stamps = json.loads((run / "stamps.json").read_text())
    assert len(stamps) == 2
    assert stamps[0] == json.loads(before["stamp.json"])
    assert stamps[1] == json.loads((run / "stamp.json").read_text())


def stamp(**parts):
    return {"dataset": "d", "retriever": {"retriever": "http", "server": {"k1": 0.9}}, "top_k": 3, "seed": 0, "searchqa_gym": "1", **parts}


def test_stamps_differ_in_what_a_number_depends_on_and_what_is_unknown_is_no_difference():
    assert stamp_differences(stamp(), stamp()) == []
    assert stamp_differences(stamp(), stamp(top_k=5, seed=1, searchqa_gym="2", command="x")) == [("top_k", 3, 5)]
    other = {"retriever": "http", "server": {"k1": 2.0}}
    assert stamp_differences(stamp(), stamp(retriever=other)) == [("retriever.server.k1", 0.9, 2.0)]
    assert stamp_differences(stamp(), stamp(retriever={"retriever": "http", "server": None})) == []
    assert stamp_differences(stamp(corpus_sha256="a"), stamp()) == []
    assert stamp_differences(stamp(corpus_sha256="a"), stamp(corpus_sha256="b")) == [("corpus_sha256", "a", "b")]
    parts = [{"name": "hybrid", "retrievers": [{"k1": 1}, {"k1": k1}]} for k1 in (1, 2)]
    assert stamp_differences({"retriever": parts[0]}, {"retriever": parts[1]}) == [("retriever.retrievers.1.k1", 1, 2)]


def test_every_earlier_stamp_counts_once_there_is_a_checkpoint_and_versions_only_warn(tmp_path, caplog):
    with RunFolder(tmp_path) as folder:
        folder.write_stamp(stamp(top_k=9))
        folder.write_stamp(stamp())  # nothing was earned with the first
        folder.save_checkpoint("train", 1, lambda path: None)
        unknown = stamp(retriever={"retriever": "http", "server": None}, packages={"torch": "2"}, searchqa_gym="2")
        folder.write_stamp(unknown)
        assert "searchqa_gym was 1, is 2" in caplog.text
        with pytest.raises(OtherSearchError, match=r"retriever\.server\.k1 was 0\.9, is 2\.0"):
            folder.write_stamp(stamp(retriever={"retriever": "http", "server": {"k1": 2.0}}))
    assert json.loads((tmp_path / "stamps.json").read_text()) == [stamp(), unknown]
