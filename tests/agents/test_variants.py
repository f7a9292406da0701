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
    assert interval_text([0.8, 0.9, 1.0]) == "0.652 to 1.000"
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
    assert [row.split("|")[1].strip() for row in table.splitlines()] == ["variant", "---", "way one", "way two"]
    assert (sweep / "comparison.png").is_file()
    comparison = read_results(kept)
    assert comparison.settings == {"way one": {"env.top_k": 1}, "way two": {"env.top_k": 2}}
    assert comparison.command == f"searchqa train -m ablation=mine {' '.join(small)}"
    assert [one.curves["step"] for one in comparison.outcomes] == [[1]] * 4
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
