"""Runs that differ in a setting: which are variants of what, paired differences, the file of results, the table, the picture; and the ablations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from searchqa_agents.cli import main
from searchqa_agents.config_help import conf_dir, options
from searchqa_agents.report import Run
from searchqa_agents.runs import RunFolderError, read_metrics
from searchqa_agents.settings import register, register_training
from searchqa_agents.variants import (
    Comparison,
    Outcome,
    compared,
    comparison_table,
    difference_text,
    draw_comparison,
    interval_text,
    mean_of_known,
    notes,
    paired_difference,
    read_results,
    settings_of,
    write_results,
)


def a_run(seed: int, after: float, algorithm: str = "grpo", algo: dict[str, Any] | None = None, **changed: Any) -> Run:
    config = {"seed": seed, "env": {"id": "w", **changed.pop("env", {})}, "evaluation": {"questions": 256, "seed": 1000}}
    config |= {"algo": {"name": algorithm, "seed": seed, **(algo or {})}, "run_dir": f"runs/{seed}", "threads": seed}
    measures = {
        "before": {"hops=2/sampled/em": 0.3, "hops=2/sampled/searches": 1.25},
        "after": {"hops=2/sampled/em": after, "hops=2/sampled/searches": 2.0},
    }
    return Run(
        path=Path("nowhere"),
        config=config,
        name=changed.pop("name", f"train-w-{algorithm}"),
        stamp={"dataset": "world", "seed": seed, "commit": "abc", "threads": seed},
        summary={"kind": "train", "measures": measures, "algorithm": algorithm, "seed": seed, "tokens": 1e6 + seed}
        | {"seconds_training": 60.0 + 2 * seed},
    )


@pytest.fixture(autouse=True)
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs made by hand have a curve of exact match .25, .5, .75."""
    lines = [{"phase": "train", "step": i, "charts/em": i / 4, "charts/searches": 1.0 + i, "losses/kl": 0.0} for i in (1, 2, 3)]
    lines += [{"phase": "after", "step": 0, "charts/em": 9.0}]
    made = {Path("nowhere"): lines, Path("no curve"): []}
    monkeypatch.setattr("searchqa_agents.variants.read_metrics", lambda path: made[path] if path in made else read_metrics(path))


def labels(*runs: Run) -> list[str] | None:
    comparison = compared(runs)
    return None if comparison is None else list(comparison.settings)


def test_algorithms_are_compared_and_called_by_their_names() -> None:
    runs = [a_run(seed, 0.8 + seed / 10, "grpo") for seed in (0, 1)] + [a_run(seed, 0.7, "ppo", {"lam": 1.0}) for seed in (1, 0)]
    comparison = compared(runs)
    assert comparison is not None
    assert (comparison.by, list(comparison.settings), comparison.measure) == ("algorithm", ["grpo", "ppo"], "hops=2/sampled")
    assert [one.seed for one in comparison.of("ppo")] == [0, 1]
    assert comparison.stamp == {"dataset": "world", "commit": "abc"}


def test_a_setting_that_differs_is_a_variant_and_settings_of_no_matter_are_none() -> None:
    masked = [a_run(seed, 0.8, algo={"mask_environment": mask}) for mask in (True, False) for seed in (0, 1)]
    assert labels(*masked) == ["mask_environment=true", "mask_environment=false"]
    assert labels(a_run(0, 0.8), a_run(1, 0.9)) is None
    assert labels(a_run(0, 0.8, env={"top_k": 1}), a_run(0, 0.8, env={"top_k": 3})) == ["top_k=1", "top_k=3"]
    assert labels(a_run(0, 0.8, env={"top_k": 1}, algo={"top_k": 0}), a_run(0, 0.8, env={"top_k": 3}, algo={"top_k": 5})) == [
        "env.top_k=1 algo.top_k=0",
        "env.top_k=3 algo.top_k=5",
    ]
    assert labels(a_run(0, 0.8, env={"retriever": None}), a_run(0, 0.8, env={"retriever": {"name": "dense"}})) == [
        "retriever=null",
        'retriever={"name": "dense"}',
    ]


def test_names_that_were_given_are_the_labels_where_they_say_the_same_as_the_settings() -> None:
    said = [
        a_run(seed, 0.8, name=name, env={"retriever": kind}) for name, kind in (("search", None), ("no search", "none")) for seed in (0, 1)
    ]
    assert labels(*said) == ["search", "no search"]
    assert labels(a_run(0, 0.8, name="a", env={"top_k": 1}), a_run(0, 0.8, name="a", env={"top_k": 3})) == ["top_k=1", "top_k=3"]
    one_more = a_run(2, 0.8, name="search", env={"retriever": "none"})
    assert labels(*said, one_more) == ["retriever=null", "retriever=none"]


def test_runs_that_were_measured_otherwise_are_not_compared() -> None:
    other = a_run(0, 0.9, "ppo")
    other.config["env"] = {"id": "another"}
    assert compared([a_run(0, 0.8), other]) is None
    other = a_run(0, 0.9, "ppo")
    other.config["evaluation"] = {"questions": 8, "seed": 1000}
    assert compared([a_run(0, 0.8), other]) is None
    other = a_run(0, 0.9, "ppo")
    other.summary["measures"] = {"before": {"sampled/em": 0.1}, "after": {"sampled/em": 0.1}}
    assert compared([a_run(0, 0.8), other]) is None
    other.summary["kind"] = "eval"
    assert compared([a_run(0, 0.8), other]) is None


@pytest.mark.parametrize(
    "other",
    [
        {"env": {"preset": "hard"}},
        {"env": {"hops": [1]}},
        {"evaluation": {"questions": 256, "seed": 1000, "env": {"hops": [1]}}},
        {"evaluation": {"questions": 256, "seed": 1000, "split": "dev"}},
    ],
)
def test_runs_with_other_held_out_questions_are_not_compared(other: dict[str, Any]) -> None:
    changed = a_run(0, 0.9, "ppo", env=other.get("env", {}))
    changed.config["evaluation"] = other.get("evaluation", changed.config["evaluation"])
    assert compared([a_run(0, 0.8), changed]) is None


def test_another_training_that_is_measured_alike_is_compared_without_a_note() -> None:
    """What evaluation.env says counts, not what env says."""
    runs = [a_run(0, 0.8, env={"hops": [hops], "retriever": retriever}) for hops, retriever in ((1, "bm25"), (2, {"name": "simulated"}))]
    for run in runs:
        run.config["evaluation"]["env"] = {"hops": [2], "retriever": "bm25"}
    comparison = compared(runs)
    assert comparison is not None
    assert (comparison.measured, notes(comparison)) == ({}, [])


def test_what_differs_when_measured_is_told_beneath_the_table() -> None:
    comparison = compared([a_run(0, 0.8, env={"top_k": 1}), a_run(0, 0.8, env={"top_k": 3})])
    assert comparison is not None
    assert comparison.measured == {"top_k=1": {"top_k": 1}, "top_k=3": {"top_k": 3}}
    assert notes(comparison) == [
        "The variants differ in how they were measured too, not in training alone (top_k=1: top_k=1; top_k=3: top_k=3)."
    ]
    comparison = compared([a_run(0, 0.8, env={"reward": "em"}), a_run(0, 0.8, env={"reward": "f1"})])
    assert comparison is not None
    assert notes(comparison) == ["Each variant's reward is its own: the rewards of two variants cannot be compared."]


def test_null_and_a_missing_key_and_one_and_one_point_nought_are_no_difference() -> None:
    old, new = a_run(0, 0.8, algo={"gamma": 1}), a_run(1, 0.9, algo={"gamma": 1.0, "reward_clip": None}, env={"retriever": {"a": None}})
    old.config["env"]["retriever"] = {}
    assert settings_of(old.config) == settings_of(new.config)
    assert labels(old, new) is None
    assert labels(old, a_run(1, 0.9, algo={"gamma": 1.0, "reward_clip": 5.0}, env={"retriever": {}})) == [
        "reward_clip=null",
        "reward_clip=5",
    ]


def test_variants_that_cannot_be_told_apart_by_their_labels_are_not_compared() -> None:
    assert labels(a_run(0, 0.8, env={"top_k": 1}), a_run(0, 0.8, env={"top_k": "1"})) is None
    assert labels(a_run(0, 0.8, algo={"mask": True}), a_run(0, 0.8, algo={"mask": 1})) is None


def test_the_same_seed_twice_in_a_variant_is_refused_with_both_folders() -> None:
    runs = [a_run(0, 0.8), a_run(1, 0.8), a_run(1, 0.9), a_run(1, 0.9, "ppo")]
    for i, run in enumerate(runs):
        run.path = Path(f"runs/{i}")
    with pytest.raises(RunFolderError, match=r"runs/1 and runs/2 .* seed, 1"):
        compared(runs)


def test_the_differences_are_those_of_equal_seeds() -> None:
    found = paired_difference({0: 0.5, 1: 0.6, 2: 0.7, 9: 0.0}, {1: 0.8, 2: 0.8, 0: 0.5, 7: 1.0})  # differences 0, .2, .1
    assert found is not None
    mean, half = found
    assert mean == pytest.approx(0.1)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3))  # sample deviation .1, t with 2 degrees of freedom
    assert difference_text({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.5, 1: 0.8, 2: 0.8}) == "+0.100 (-0.148 to +0.348)"
    assert difference_text({0: 0.5}, {0: 0.25}) == "-0.250"
    assert difference_text({0: 0.5}, {1: 0.25}) == "–"
    assert difference_text({0: 0.5}, {0: math.nan}) == "–"


@given(st.dictionaries(st.integers(0, 9), st.floats(0, 1), min_size=2), st.floats(-0.5, 0.5))
def test_a_variant_that_is_better_by_the_same_at_every_seed_differs_by_just_that(first: dict[int, float], gain: float) -> None:
    found = paired_difference(first, {seed: value + gain for seed, value in first.items()})
    assert found is not None
    mean, half = found
    assert mean == pytest.approx(gain, abs=1e-9)
    assert half == pytest.approx(0.0, abs=1e-7)


def test_the_interval_of_shares_stays_within_what_a_share_can_be() -> None:
    assert interval_text([0.8, 0.9, 1.0], 0.0, 1.0) == "0.652 to 1.000"
    assert interval_text([0.8, 0.9, 1.0]) == "0.652 to 1.148"
    assert interval_text([0.5]) == "–"
    assert interval_text([0.5, math.nan]) == "–"


def three_variants() -> Comparison:
    runs = [a_run(seed, after, "grpo") for seed, after in ((0, 0.8), (1, 0.9))]
    runs += [a_run(seed, after, "ppo") for seed, after in ((0, 0.7), (1, 0.7))]
    sft = a_run(0, 0.6, "sft")
    sft.path = Path("no curve")
    comparison = compared([*runs, sft])
    assert comparison is not None
    return comparison


def test_the_table_by_hand() -> None:
    title, columns, rows = comparison_table(three_variants())
    assert (
        title
        == "By algorithm: 2-hop held-out questions, sampled; mean and each run (seeds 0, 1); differences are from the first, seed by seed"
    )
    assert columns == [
        *("algorithm", "EM before", "EM after", "95% interval", "difference"),
        *("EM while training", "difference while training", "searches", "tokens", "seconds"),
    ]
    assert rows == [
        ["grpo", "0.300", "0.850 (0.800 0.900)", "0.215 to 1.000", "", "0.500", "", "1.25 → 2.00", "1.00 M", "61"],
        [
            "ppo",
            "0.300",
            "0.700",
            "0.700 to 0.700",
            "-0.150 (-0.785 to +0.485)",
            "0.500",
            "+0.000 (+0.000 to +0.000)",
            "1.25 → 2.00",
            "1.00 M",
            "61",
        ],
        ["sft", "0.300", "0.600", "–", "-0.200", "–", "–", "1.25 → 2.00", "1.00 M", "60"],
    ]


def test_values_that_are_missing_are_dashes_with_the_number_of_seeds_that_count() -> None:
    assert mean_of_known([0.5, math.nan, 0.7]) == "0.600 (0.500 – 0.700), 2 of 3 seeds"
    assert mean_of_known([math.nan]) == "–"
    assert interval_text([0.5, math.nan, 0.5]) == "0.500 to 0.500"
    assert difference_text({0: 0.5, 1: 0.5, 2: 0.5}, {0: 0.6, 1: math.nan, 2: 0.6}) == "+0.100 (+0.100 to +0.100), 2 of 3 seeds"
    comparison = three_variants()
    comparison.of("grpo")[1].after["hops=2/sampled/em"] = math.nan
    _, columns, rows = comparison_table(comparison)
    assert rows[0][columns.index("EM after")] == "0.800 (0.800 –), 1 of 2 seeds"
    assert rows[1][columns.index("difference")] == "-0.100, 1 of 2 seeds"


def staged(seed: int, after: float, **changed: Any) -> Run:
    """Measured between two stages as well."""
    run = a_run(seed, after, **changed)
    own = run.summary["measures"]
    run.summary["measures"] = {
        "before": own["before"],
        "after retrieval": {"hops=2/sampled/em": 0.25 + seed / 4, "hops=2/sampled/searches": 1.5},
        "after": own["after"],
    }
    run.summary["titles"] = {"hops=2/sampled/em": "2-hop exact match", "hops=2/sampled/searches": "searches"}
    return run


def test_measures_between_stages_are_a_column_where_a_variant_has_stages() -> None:
    comparison = compared([staged(seed, 0.75, env={"stages": 2}) for seed in (0, 1)] + [a_run(seed, 0.5) for seed in (0, 1)])
    assert comparison is None  # another argument of the environment: other questions
    comparison = compared([staged(seed, 0.75, stages=2, env={"top_k": 1}) for seed in (0, 1)] + [a_run(seed, 0.5) for seed in (0, 1)])
    assert comparison is not None
    _, columns, rows = comparison_table(comparison)
    assert columns[1:4] == ["EM before", "EM after retrieval", "EM after"]
    assert [row[1:4] for row in rows] == [["0.300", "0.375 (0.250 0.500)", "0.750"], ["0.300", "", "0.500"]]
    assert [row[columns.index("searches")] for row in rows] == ["1.25 → 1.50 → 2.00", "1.25 → 2.00"]


def test_the_seeds_of_a_single_variant_are_kept_and_told_with_what_was_measured_between_stages(tmp_path: Path) -> None:
    runs = [staged(seed, 0.5 + seed / 4) for seed in (1, 0)]
    assert compared(runs) is None
    comparison = compared(runs, "searchqa train -m seed=0,1", single=True)
    assert comparison is not None
    assert comparison.settings == {"grpo": {}}
    write_results(tmp_path / "one.json", comparison)
    assert read_results(tmp_path / "one.json") == comparison
    title, columns, rows = comparison_table(comparison)
    assert title == "grpo: held-out questions, mean over 2 runs"
    assert columns == ["", "mean", "95% interval", "seed 0", "seed 1"]
    assert rows == [
        ["2-hop exact match, before", "0.300", "0.300 to 0.300", "0.300", "0.300"],
        ["2-hop exact match, after retrieval", "0.375", "0.000 to 1.000", "0.250", "0.500"],
        ["2-hop exact match, after", "0.625", "0.000 to 1.000", "0.500", "0.750"],
        ["searches, before", "1.250", "1.250 to 1.250", "1.250", "1.250"],
        ["searches, after retrieval", "1.500", "1.500 to 1.500", "1.500", "1.500"],
        ["searches, after", "2.000", "2.000 to 2.000", "2.000", "2.000"],
        ["tokens of training, millions", "1.000", "1.000 to 1.000", "1.000", "1.000"],
        ["seconds of training", "61.000", "48.294 to 73.706", "60.000", "62.000"],  # 12.706 * sqrt(2) / sqrt(2)
    ]
    assert draw_comparison(tmp_path / "one.png", comparison).read_bytes().startswith(b"\x89PNG")
    called = compared([staged(seed, 0.5, name="mine") for seed in (0, 1)], single=True)
    assert called is not None
    assert list(called.settings) == ["mine"]


def test_reward_and_search_rate_are_columns_where_they_were_measured() -> None:
    comparison = three_variants()
    for one in comparison.outcomes:
        one.after["hops=2/sampled/search_rate"] = 1.0
    _, columns, rows = comparison_table(comparison)
    assert "reward" not in columns
    assert rows[0][columns.index("search rate")] == "– → 1.00"


def test_the_file_of_results_gives_back_what_was_written_and_one_run_is_a_line(tmp_path: Path) -> None:
    comparison, file = three_variants(), tmp_path / "deep" / "algorithm.json"
    write_results(file, comparison)
    assert read_results(file) == comparison
    lines = file.read_text().splitlines()
    assert sum('"variant": ' in line for line in lines) == len(comparison.outcomes)
    assert json.loads(file.read_text())["outcomes"][0]["curves"] == {
        "step": [1, 2, 3],
        "em": [0.25, 0.5, 0.75],
        "searches": [2.0, 3.0, 4.0],
    }


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "outcomes": [{"variant": "a"}]}', '{"schema": 1, "outcomes": 3}']
)
def test_another_file_is_no_results(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(RunFolderError, match="no results"):
        read_results(file)


def broken(tmp_path: Path, path: tuple[Any, ...], value: Any) -> Path:
    """Results with one field changed."""
    file = tmp_path / "kept.json"
    write_results(file, three_variants())
    values = json.loads(file.read_text())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(values))
    return file


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("outcomes", 0, "seed"), "a", r"outcomes\[0\].seed must be a whole number, got 'a'"),
        (("outcomes", 1, "seed"), 0, r"outcomes\[1\].seed is 0 a second time in variant 'grpo'"),
        (("outcomes", 1, "variant"), "who", r"outcomes\[1\].variant is 'who'"),
        (("outcomes", 1, "after", "hops=2/sampled/em"), "high", r"outcomes\[1\].after\['hops=2/sampled/em'\] must be a finite number"),
        (("outcomes", 1, "between"), {"after a": 3}, r"outcomes\[1\].after a must be a mapping"),
        (("outcomes", 1, "tokens"), math.inf, r"outcomes\[1\].tokens must be a finite number"),
        (("outcomes", 1, "curves"), {}, r"outcomes\[1\].curves\['step'\] must be a list"),
        (("outcomes", 1, "curves", "em"), [0.5], r"curves\['em'\] has 1 points"),
        (("outcomes", 1, "more"), 1, r"outcomes\[1\] has an unknown field 'more'"),
        (("outcomes",), [], "outcomes has no run of variant 'grpo'"),
        (("settings", "never run"), {}, "outcomes has no run of variant 'never run'"),
        (("settings", "grpo"), 3, r"settings\['grpo'\] must be a mapping"),
        (("measure",), None, "measure must be text"),
    ],
)
def test_a_file_of_results_that_is_broken_is_explained_by_file_and_field(
    tmp_path: Path, path: tuple[Any, ...], value: Any, said: str
) -> None:
    with pytest.raises(RunFolderError, match=rf"kept.json.*{said}"):
        read_results(broken(tmp_path, path, value))


def test_null_in_a_file_of_results_is_a_value_that_is_missing(tmp_path: Path) -> None:
    comparison = read_results(broken(tmp_path, ("outcomes", 0, "after", "hops=2/sampled/em"), None))
    assert comparison_table(comparison)[2][0][2] == "0.900 (– 0.900), 1 of 2 seeds"
    assert draw_comparison(tmp_path / "a.png", comparison).read_bytes().startswith(b"\x89PNG")


def test_a_file_of_results_that_is_not_there_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none.json")]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "none.json cannot be read (No such file or directory)" in error
    assert "--save" in error


@pytest.mark.parametrize("count", [1, 6])
def test_names_with_dollars_and_line_breaks_are_drawn_and_told_as_they_are(tmp_path: Path, count: int) -> None:
    runs = [a_run(seed, 0.5, name=f"cost $\\frac{{{i} $ a\nb", env={"top_k": i}) for i in range(count) for seed in (0, 1)]
    comparison = compared(runs, single=True)
    assert comparison is not None
    assert draw_comparison(tmp_path / "a.png", comparison).read_bytes().startswith(b"\x89PNG")
    title, columns, rows = comparison_table(comparison)
    assert "\n" not in "".join([title, *columns, *(cell for row in rows for cell in row), *notes(comparison)])


def test_runs_without_any_known_value_are_drawn_and_told(tmp_path: Path) -> None:
    runs = [a_run(seed, math.nan, env={"top_k": k}) for k in range(6) for seed in (0, 1)]
    comparison = compared(runs)
    assert comparison is not None
    assert comparison_table(comparison)[2][1][2:5] == ["–", "–", "–"]
    assert draw_comparison(tmp_path / "a.png", comparison).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [2, 7])
def test_the_picture_draws_few_and_many_variants_and_those_without_curves(tmp_path: Path, count: int) -> None:
    settings = {f"variant {i}": {"x": i} for i in range(count)}
    outcomes = [
        Outcome(
            name,
            seed,
            {"sampled/em": 0.1},
            {"sampled/em": 0.5 + seed / 10},
            {"step": [1, 2], "em": [0.1, 0.2]} if i else {"step": []},
            1.0,
            1.0,
        )
        for i, name in enumerate(settings)
        for seed in range(2)
    ]
    file = draw_comparison(tmp_path / "a.png", Comparison("variant", settings, "sampled", outcomes))
    assert file.read_bytes().startswith(b"\x89PNG")


# -- ablations -------------------------------------------------------------------------------------------------------------------------------

MINE = """# @package _global_
# Two ways.
threads: 1
hydra:
  sweeper:
    params:
      variant: one,two
      seed: 5,6
"""
VARIANT = "# @package _global_\nname: way {name}\nenv: {{top_k: {top_k}}}\n"


@pytest.mark.slow
def test_an_ablation_of_ones_own_from_its_files_to_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real multirun; the same line again does nothing; results are kept, and told and drawn from the file alone."""
    conf, sweep, kept = tmp_path / "conf", tmp_path / "sweep", tmp_path / "kept" / "mine.json"
    for group, name, text in (
        ("ablation", "mine", MINE),
        ("variant", "one", VARIANT.format(name="one", top_k=1)),
        ("variant", "two", VARIANT.format(name="two", top_k=2)),
    ):
        (conf / group).mkdir(parents=True, exist_ok=True)
        (conf / group / f"{name}.yaml").write_text(text)
    small = [
        "recipe=smoke",
        "start=shipped",
        "algo.steps=1",
        "env.max_turns=3",
        "env.max_segment_tokens=48",
        "env.hops=1",
        "env.num_worlds=1",
    ]
    small += ["num_envs=8", "evaluation.questions=4"]
    line = ["train", "-m", "ablation=mine", *small, f"run_dir={sweep}", "--config-dir", str(conf)]
    assert main(line) == 0
    names = {f"seed-{seed}_variant-{variant}" for variant in ("one", "two") for seed in (5, 6)}
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == names
    summaries = {name: (sweep / name / "summary.json").read_text() for name in names}
    assert main(line) == 0
    assert capsys.readouterr().out.count("is finished: nothing to do") == 4
    assert {name: (sweep / name / "summary.json").read_text() for name in names} == summaries
    assert main(["report", "--markdown", "--save", str(kept), str(sweep)]) == 0
    table = capsys.readouterr().out
    told, note = table.rstrip("\n").split("\n\n")
    assert [row.split("|")[1].strip() for row in told.splitlines()] == ["variant", "---", "way one", "way two"]
    assert "(way one: top_k=1; way two: top_k=2)" in note
    assert (sweep / "comparison.png").is_file()
    comparison = read_results(kept)
    assert comparison.settings == {"way one": {"env.top_k": 1}, "way two": {"env.top_k": 2}}
    assert comparison.command == f"searchqa train -m ablation=mine {' '.join(small)}"
    assert [one.curves["step"] for one in comparison.outcomes] == [[1]] * 4
    one = kept.with_name("one.json")
    assert main(["report", "--markdown", "--save", str(one), *(str(sweep / f"seed-{seed}_variant-one") for seed in (5, 6))]) == 0
    told = capsys.readouterr().out
    assert told.startswith("|  | mean | 95% interval | seed 5 | seed 6 |")
    assert one.with_suffix(".png").is_file()
    assert main(["report", "--markdown", str(one)]) == 0
    assert capsys.readouterr().out == told
    kept.with_suffix(".png").unlink()
    assert main(["report", "--markdown", str(kept)]) == 0
    assert capsys.readouterr().out == table
    assert main(["report", str(kept)]) == 0
    assert "mine. By variant" in capsys.readouterr().out
    assert kept.with_suffix(".png").is_file()


def test_the_line_wins_over_the_seeds_and_settings_of_an_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("searchqa_agents.train_command.run", lambda config, path: seen.append((config, path)))
    assert main(["train", "-m", "ablation=top_k", "seed=3", "env.top_k=2,5", "algo.steps=7", f"run_dir={tmp_path}"]) == 0
    assert [(config.seed, config.env.top_k, config.algo.steps, config.start) for config, _ in seen] == [
        (3, k, 7, "shipped") for k in (2, 5)
    ]
    assert [path for _, path in seen] == [tmp_path / f"env.top_k-{k}_seed-3" for k in (2, 5)]
    seen.clear()
    assert main(["train", "-m", "ablation=search", "seed=100", f"run_dir={tmp_path}"]) == 0
    assert [(config.name, config.env.retriever) for config, _ in seen] == [("search", None), ("no search", "none")]
    assert [path.name for _, path in seen] == ["seed-100_variant-search", "seed-100_variant-no_search"]


def test_an_ablation_needs_a_multirun(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "ablation=mask"]) == 1
    assert "searchqa train -m ablation=mask" in capsys.readouterr().err


@pytest.mark.parametrize("name", options("ablation"))
def test_every_ablation_says_what_it_compares_with_enough_new_seeds_and_its_variants_exist(name: str) -> None:
    text = (conf_dir() / "ablation" / f"{name}.yaml").read_text()
    assert text.splitlines()[1].startswith("# ")
    parameters = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    seeds = [int(seed) for seed in parameters["seed"].split(",")]
    rests_a_claim = name in ("mask", "algorithm", "stage1", "curriculum", "learning")
    assert len(seeds) >= (5 if rests_a_claim else 3)
    assert not set(seeds) & set(range(5))  # settings were chosen with these in view
    assert len(parameters) == 2
    assert set(parameters.get("variant", "").split(",")) <= {"", *options("variant")}


def composed(name: str, variant: dict[str, str]) -> Any:
    """The configuration of one variant, as Hydra puts it together and checks its keys."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", [f"ablation={name}", *(f"{key}={value}" for key, value in variant.items())])


def variants(name: str) -> list[dict[str, str]]:
    parameters = yaml.safe_load((conf_dir() / "ablation" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    return [{key: value} for key, values in parameters.items() if key != "seed" for value in values.split(",")]


@pytest.mark.parametrize("name", options("ablation"))
def test_the_variants_of_an_ablation_are_known_settings_and_differ(name: str) -> None:
    register()
    register_training()
    configs: list[Any] = [OmegaConf.to_container(composed(name, variant), resolve=False) for variant in variants(name)]
    settings = [settings_of(config) for config in configs]
    assert len(settings) >= 2
    assert all(one != other for i, one in enumerate(settings) for other in settings[:i])
    assert {config["threads"] for config in configs} == {1}
    evaluations = [{key: value for key, value in one.items() if key.startswith("evaluation.")} for one in settings]
    assert all(one == evaluations[0] for one in evaluations)  # measured alike
    names = [config["name"] for config in configs]
    assert len(set(names)) == len(names) or not any("variant" in variant for variant in variants(name))


@pytest.mark.parametrize("words", [["--save"], ["--save", "runs"], ["a.json", "runs"], ["--save", "b.json", "a.json"]])
def test_report_explains_what_it_needs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    assert "--save" in capsys.readouterr().err
