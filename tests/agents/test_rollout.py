"""Rollouts: the tokens are the policy's and the environment's own, whatever way the environment is stepped."""

import runpy
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.language_model import Sampling, Session
from searchqa_agents.models import make_tiny_model
from searchqa_agents.policy import Policy
from searchqa_agents.rollout import draw_questions, episode_seed, rollout
from searchqa_agents.scripted import ScriptedAgent
from searchqa_envs.errors import EpisodeStateError
from searchqa_retrievers import RetrieverUnavailable

ID = "SearchQA-World-v0"
BUDGETS = {"max_segment_tokens": 10, "max_turns": 3}


class TagLover(Policy):
    """Writes many tags, so that there are episodes of several turns, of several lengths, without training."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        self.bonus = torch.zeros(tokenizer.vocab_size)
        self.bonus[[tokenizer.encode(tag)[0] for tag in ("<search>", "</search>", "<answer>", "</answer>")]] = 6.0

    def logits(self, hidden):
        return super().logits(hidden) + self.bonus


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.set_num_threads(1)
    tokenizer = gym.make_vec(ID, num_envs=1).unwrapped.tokenizer
    model = make_tiny_model(
        tokenizer.vocab_size,
        0,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        hidden_size=32,
        feed_forward_size=48,
        initializer_range=0.1,
    )
    return TagLover(model, tokenizer)


def make(num_envs, **arguments):
    return gym.make_vec(ID, num_envs=num_envs, autoreset_mode="DISABLED", **{**BUDGETS, **arguments})


def close(a, b):
    """Equal but for the rounding of log-probabilities, which differs between batch shapes."""
    pairs = [(a.logprobs, b.logprobs), (a.sampling_logprobs, b.sampling_logprobs)]
    same = all((x is None) == (y is None) and (x is None or np.allclose(x, y, atol=1e-5)) for x, y in pairs)
    return same and replace(a, logprobs=None, sampling_logprobs=None) == replace(b, logprobs=None, sampling_logprobs=None)


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9, "top_k": 40}])
def test_trajectories_are_the_same_for_any_number_of_environments_and_by_plain_step(policy, truncation):
    questions = draw_questions(make(1).unwrapped.source, 15, seed=3, num_worlds=2)
    reference = rollout(make(64), policy, questions, group_size=2, seed=4, **truncation)
    assert len(reference) == 30
    assert len({len(t.turns) for t in reference}) > 1  # some end earlier than others
    for venv in (make(8), make(3), make(1), VectorWrapper(make(7))):  # a wrapper hides step_at: plain reset and step
        for a, b in zip(rollout(venv, policy, questions, group_size=2, seed=4, **truncation), reference, strict=True):
            assert close(a, b)


class Recording(VectorWrapper):
    """Writes down which places are reset and stepped."""

    def __init__(self, venv):
        super().__init__(venv)
        self.calls = []

    def reset_at(self, indices, **arguments):
        self.calls.append(("reset", list(indices)))
        return self.env.reset_at(indices, **arguments)

    def step_at(self, indices, segments):
        self.calls.append(("step", list(indices)))
        return self.env.step_at(indices, segments)


class Slow(Session):
    """Writes the segments of row 0 only when nothing else is left to write."""

    def __init__(self, session):
        self.session, self.waiting, self.released = session, None, []

    def submit(self, rows, contexts, infos):
        asked = list(zip(rows, contexts, infos, strict=True))
        for one in [one for one in asked if one[0] == 0]:
            asked.remove(one)
            self.waiting = one
        if asked:
            self.session.submit(*zip(*asked, strict=True))

    def collect(self):
        written = self.session.collect()
        if not written and self.waiting:
            self.session.submit(*([value] for value in self.waiting))
            self.waiting = None
            return self.session.collect()
        return written

    def release(self, rows):
        self.released += rows
        self.session.release(rows)


class SlowAgent:
    returns_ids, returns_logprobs = True, False

    def __init__(self, agent):
        self.agent = agent

    def start(self, seeds, sampling):
        self.session = Slow(self.agent.start(seeds, sampling))
        return self.session


def test_nobody_waits_for_the_slowest():
    venv = Recording(make(2, max_segment_tokens=48))
    agent = SlowAgent(ScriptedAgent.for_env("oracle", venv))
    done = []
    trajectories = rollout(venv, agent, [0, 1, 2, 3], on_done=done.append)
    assert trajectories == rollout(make(4, max_segment_tokens=48), agent.agent, [0, 1, 2, 3])
    first_step_of_0 = venv.calls.index(("step", [0]))
    assert venv.calls[:first_step_of_0].count(("reset", [1])) == 2  # place 1 began two more episodes before place 0 was answered once
    assert done == [1, 2, 3, 4]
    assert sorted(agent.session.released) == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_an_error_in_the_middle_the_session_is_released_and_everything_can_be_used_again(policy, error):
    class Breaking(Recording):
        def step_at(self, indices, segments):
            if len(self.calls) == 3:
                self.calls.append(None)
                raise error("stop")
            return super().step_at(indices, segments)

    sessions = []
    start = policy.start
    venv = Breaking(make(3))
    questions = draw_questions(venv.unwrapped.source, 6, seed=1)
    try:
        policy.start = lambda *arguments: sessions.append(start(*arguments)) or sessions[-1]
        with pytest.raises(error):
            rollout(venv, policy, questions, seed=2)
    finally:
        del policy.start
    assert sessions[0]._slot == {}
    assert sessions[0].collect() == []
    for a, b in zip(rollout(venv, policy, questions, seed=2), rollout(make(6), policy, questions, seed=2), strict=True):
        assert close(a, b)


def test_a_trajectory_holds_the_sampled_ids_and_the_environments_mask(policy):
    venv = make(4)
    for trajectory in rollout(venv, policy, draw_questions(venv.unwrapped.source, 4, seed=1), seed=2):
        expected = np.zeros(len(trajectory.token_ids), dtype=np.int8)
        for turn in trajectory.turns:
            expected[turn.start : turn.segment_end] = 1
            assert venv.unwrapped.tokenizer.decode(trajectory.token_ids[turn.start : turn.segment_end].tolist()) == turn.segment
        assert trajectory.loss_mask.tolist() == expected.tolist()
        assert (trajectory.logprobs[expected == 1] < 0).all()
        assert (trajectory.logprobs[expected == 0] == 0).all()
        assert trajectory.turns[-1].end == len(trajectory.token_ids)
        assert trajectory.terminated != trajectory.truncated


def test_recorded_log_probabilities_are_those_of_the_policy(policy):
    venv = make(6)
    trajectories = rollout(venv, policy, draw_questions(venv.unwrapped.source, 6, seed=1), seed=2, temperature=1.3)
    with torch.no_grad():
        stats = policy.evaluate([t.token_ids for t in trajectories], [t.loss_mask for t in trajectories], temperature=1.3)
    recorded = np.concatenate([t.logprobs[t.loss_mask == 1] for t in trajectories])
    assert recorded == pytest.approx(stats.logprob.numpy(), abs=1e-5)


def test_sampled_ids_are_never_encoded_again(policy, monkeypatch):
    venv = make(4)
    tokenizer = venv.unwrapped.tokenizer
    encoded = []
    original = type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: encoded.append(text) or original(self, text))
    trajectories = rollout(venv, policy, draw_questions(venv.unwrapped.source, 4, seed=1), seed=2)
    expected = [t.prompt for t in trajectories] + [turn.observation for t in trajectories for turn in t.turns if turn.observation]
    assert sorted(encoded) == sorted(expected)  # environment text, each once, and nothing else


def test_members_of_a_group_share_the_question_and_differ_in_their_samples(policy):
    venv = make(4)
    a, b, c, d = rollout(venv, policy, draw_questions(venv.unwrapped.source, 2, seed=1), group_size=2, seed=2)
    assert a.question_id == b.question_id != c.question_id == d.question_id
    assert a.token_ids.tolist() != b.token_ids.tolist()
    again = rollout(venv, policy, [a.question_id, c.question_id], group_size=2, seed=2)
    assert again == [a, b, c, d]
    assert rollout(venv, policy, [a.question_id], seed=3)[0].token_ids.tolist() != a.token_ids.tolist()


def test_a_lost_back_end_is_recorded_and_the_other_episodes_go_on():
    class Flaky:
        def search(self, requests):
            raise RetrieverUnavailable("gone")

        def cache_key(self, request):
            return request.query

        def __deepcopy__(self, memo):
            return self

    venv = make(2, retriever=Flaky(), max_segment_tokens=48)
    lost, other = rollout(venv, ScriptedAgent.for_env("search_once", venv), [0, 1])
    assert lost.truncated
    assert not lost.terminated
    assert "gone" in lost.backend_error
    assert (lost.reward, dict(lost.reward_terms), dict(lost.metrics)) == (0.0, {}, {})
    assert other.backend_error


def test_seconds_add_up_to_those_of_the_rollout_and_the_stamp_is_kept(policy):
    venv = make(3)
    questions = draw_questions(venv.unwrapped.source, 8, seed=1, num_worlds=1)
    started = time.perf_counter()
    trajectories = rollout(venv, policy, questions, stamp={"seed": 9})
    elapsed = time.perf_counter() - started
    shared = 0.0
    for trajectory in trajectories:
        assert set(trajectory.seconds) == {"model", "search", "environment", "wall"}
        assert all(value >= 0 for value in trajectory.seconds.values())
        assert trajectory.seconds["model"] > 0
        assert trajectory.stamp == {"seed": 9}
        shares = sum(trajectory.seconds[part] for part in ("model", "search", "environment"))
        assert shares <= trajectory.seconds["wall"] <= elapsed  # an episode waits for those beside it
        shared += shares
    assert shared <= elapsed


def test_environments_that_reset_themselves_are_refused(policy):
    venv = VectorWrapper(gym.make_vec(ID, num_envs=2, autoreset_mode="SAME_STEP", **BUDGETS))
    with pytest.raises(EpisodeStateError, match="DISABLED, not SAME_STEP"):
        rollout(venv, policy, [0])


def test_indices_and_ids_cannot_be_mixed(policy):
    with pytest.raises(ValueError, match="all indices"):
        rollout(make(2), policy, [0, "easy-train-0-0-1"])


def test_the_twelve_lines_of_the_docstring_give_the_same_episode(policy):
    venv, env = make(1), gym.make(ID, **BUDGETS)
    [expected] = rollout(venv, policy, [7], seed=5)
    seed = episode_seed(5, 0, 0)
    observation, info = env.reset(options={"question_id": expected.question_id})
    session = policy.start([seed], Sampling(env.unwrapped.max_segment_tokens, env.unwrapped.dialect.closers))
    logprobs, ended = [], False
    while not ended:
        [segment] = session.generate([0], [observation], [info])
        observation, reward, terminated, truncated, info = env.step(segment.ids)
        logprobs.append(segment.logprobs)
        ended = terminated or truncated
    assert observation.tolist() == expected.token_ids.tolist()
    assert info["turn_record"].loss_mask.tolist() == expected.loss_mask.tolist()
    assert np.concatenate(logprobs) == pytest.approx(expected.logprobs[expected.loss_mask == 1], abs=1e-5)
    assert reward == expected.reward


def test_questions_are_drawn_without_repetition_and_by_seed():
    source = make(1, num_worlds=10).unwrapped.source
    drawn = draw_questions(source, 40, seed=1, num_worlds=3)
    assert len(set(drawn)) == 40
    assert len({index * 10 // len(source) for index in drawn}) <= 3
    assert drawn == draw_questions(source, 40, seed=1, num_worlds=3) != draw_questions(source, 40, seed=2, num_worlds=3)
    everything = draw_questions(source, len(source), seed=1)
    assert sorted(everything) == list(range(len(source)))
    assert len(draw_questions(source, len(source) + 5, seed=1)) == len(source) + 5


def test_the_benchmark_runs(capsys):
    path = Path(__file__).parents[1] / "benchmarks" / "bench_rollout.py"
    runpy.run_path(str(path))["main"](["--quick"])
    assert "of the floor" in capsys.readouterr().out


def test_each_trajectory_is_given_out_as_its_episode_ends_with_its_usage_before_it_is_released():
    venv = make(2, max_segment_tokens=48)
    agent = SlowAgent(ScriptedAgent.for_env("oracle", venv))
    given = []

    class Counting(Slow):
        def usage(self, row):
            assert row not in self.released
            return {"calls": float(row)}

    def start(seeds, sampling):
        agent.session = Counting(agent.agent.start(seeds, sampling))
        return agent.session

    agent.start = start

    def on_trajectory(place, member, trajectory):
        given.append((place, member, trajectory, len(agent.session.released)))

    trajectories = rollout(venv, agent, [5, 7], group_size=2, on_trajectory=on_trajectory)
    assert sorted((place, member) for place, member, *_ in given) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(trajectory is trajectories[2 * place + member] for place, member, trajectory, _ in given)
    assert [released for *_, released in given] == [0, 1, 2, 3]  # not all at the end
    assert [t.usage for t in trajectories] == [{"calls": 0.0}, {"calls": 1.0}, {"calls": 2.0}, {"calls": 3.0}]


def test_turns_hold_id_and_title_of_what_they_retrieved():
    venv = make(2, max_segment_tokens=48)
    for trajectory in rollout(venv, ScriptedAgent.for_env("oracle", venv), [0, 1]):
        *searches, answer = trajectory.turns
        assert searches
        assert answer.passages == ()
        for turn in searches:
            [(doc_id, title)] = turn.passages
            assert title == turn.content
            assert doc_id in venv.unwrapped.source[0].metadata["supporting_ids"] + venv.unwrapped.source[1].metadata["supporting_ids"]
