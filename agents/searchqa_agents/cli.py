"""The ``searchqa`` command: answers ``--help`` at once, hands the rest of the line to a command's module, and turns errors into messages."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

OK, FAILED, USAGE = 0, 1, 2


class Command(NamedTuple):
    """A command: where its ``main(argv) -> int`` lies, its one line in the list, and its help."""

    module: str
    summary: str
    help: str


_HYDRA_HELP = """
Also:
  -m key=a,b,c             one run per value (with several keys: per combination) in a folder of its own beneath run_dir. A run that fails or is
                           killed does not stop the others; the same line again skips what is finished, goes on with the rest and tries again what
                           failed (retry=false: leaves it). `searchqa report multirun DIR` shows all. Side by side (pip install "searchqa-gym[sweep]"):
                           -m hydra/launcher=joblib hydra.launcher.n_jobs=2 threads=1, or hydra/launcher=submitit_local or submitit_slurm.
                           A search (pip install "searchqa-gym[optuna]"): -m hydra/sweeper=optuna 'algo.learning_rate=tag(log,interval(1e-4,1e-3))'
  --config-dir DIR         a folder of your own YAML files, laid out as this package's: DIR/env/mine.yaml gives env=mine
  --cfg job                print the configuration and stop
  dry_run=true             print the configuration and what would run, and stop
  --debug                  full traces of errors (or SEARCHQA_DEBUG=1)"""

COMMANDS = {
    "train": Command(
        "train_command",
        "train an agent by reinforcement learning and show what it learned",
        """usage: searchqa train [key=value ...]

With no arguments: the main job, on the generated world, from nothing. Induction warm-up, supervised fine-tuning on scripted demonstrations,
evaluation, GRPO (or another algorithm), evaluation again, and once more with the search engine switched off. Ends with a table, a picture and a page.
A run that was stopped or killed goes on from its last checkpoint with resume=; overrides on that line win. So does a sweep; its finished runs stay.

Examples:
  searchqa train                                      from nothing
  searchqa train start=shipped                        from the fine-tuned checkpoint that comes with the package
  searchqa train start=runs/.../checkpoints/sft-000350
  searchqa train algo=ppo algo.learning_rate=3e-4 seed=1
  searchqa train plugins=[my_algorithm.py] algo=mine  an algorithm of your own, which the file registers
  searchqa train recipe=search_r1                     Search-R1 in the small, by PPO; with algo=grpo by GRPO
  searchqa train recipe=r1_searcher                   R1-Searcher in the small, both stages; or as two runs from one warm start:
  searchqa train recipe=r1_searcher start=runs/.../checkpoints/sft-000400 stages=null env.reward=r1_searcher_stage1
  searchqa train recipe=r1_searcher start=runs/.../checkpoints/train-000020 stages=null
  searchqa train run_dir=runs/mine                    the same line again goes on from the last checkpoint
  searchqa train resume=runs/mine
  searchqa train -m algo=grpo,ppo seed=0,1,2 start=shipped run_dir=runs/compare    six runs; then: searchqa report runs/compare""",
    ),
    "sft": Command(
        "sft_command",
        "make the supervised checkpoint that reinforcement learning starts from",
        """usage: searchqa sft [key=value ...]

Induction warm-up and supervised fine-tuning on scripted demonstrations, from nothing. The checkpoint lies in the run's folder.

Examples:
  searchqa sft
  searchqa sft seed=1 sft.steps=500""",
    ),
    "eval": Command(
        "eval_command",
        "measure an agent on a data set",
        """usage: searchqa eval [key=value ...]
       searchqa eval score FILE --style STYLE            score answers that other code made; see searchqa eval score --help
       searchqa eval judge FOLDER_OR_FILE --url URL --model NAME    have a language model judge answers

Plays every question and prints exact match, F1, cover match, recall of the supporting titles, searches, and the stamp that makes the numbers
comparable. The results are in the run's folder: scores.jsonl (a row per episode, without times), times.jsonl, results.parquet, stamp.json.
What was stopped or killed goes on with resume=runs/..., and repeats no episode that has ended; so does the same line with the same run_dir. With resume=,
other sets=, questions= and samples= add to what is played.
A published set is played on the split that results on it are published on (test, or dev where its test answers are hidden), unless env.split= says another.

Examples:
  searchqa eval env=world agent=oracle
  searchqa eval sets=all agent=search_once                          the seven published sets
  searchqa eval sets=[nq,hotpotqa] questions=fixed-500 agent=search_once env.top_k=5
  searchqa eval env=hotpotqa agent=search_once env.top_k=5          as sets=[hotpotqa]: its dev questions
  searchqa eval env=world env.split=test agent=lm agent.checkpoint=runs/.../checkpoints/train-000020
  searchqa eval sets=all samples=4 processes=2 agent=lm agent.checkpoint=runs/.../checkpoints/train-000020
  searchqa eval sets=all agent=search_once run_dir=runs/all shard=0/2       by hand, beside shard=1/2; then the line without shard=
  searchqa eval -m env=hotpotqa,musique env.split=all agent=search_once""",
    ),
    "bench": Command(
        "bench_command",
        "run algorithms on a suite of tasks, and compare them",
        """usage: searchqa bench suite=NAME algorithm=NAME[,NAME ...] 'seed=range(5)' [key=value ...]
       searchqa bench compare MINE [OTHER ...]           beside the leaderboard: table with intervals, pictures, one page
       searchqa bench submit MINE                        check that an algorithm's runs are an entry, and write the file to send in
       searchqa bench leaderboard                        the results that come with the package

Trains each algorithm on each task of a suite with each seed, from the task's own policy and with its budget of sampled tokens, and measures it on held-out
questions at each eighth of the budget. A word that ends in .py is a file of yours, and stands for the algorithm that it registers.
The runs lie in runs/bench/SUITE/ALGORITHM/TASK/seed-N. The same line again does what is left. docs/benchmark.md is the protocol;
`searchqa bench compare --help` and so on tell more of the plain steps.

Examples:
  searchqa bench suite=world-v1 algorithm=grpo,ppo 'seed=range(5)'
  searchqa bench suite=world-v1 algorithm=my_algorithm.py 'seed=range(5)'      then: searchqa bench compare mine (the name that the file registers)""",
    ),
    "play": Command(
        "play",
        "be the agent yourself, in a terminal",
        """usage: searchqa play [--question-id ID] [--seed N] [env=NAME] [env.key=value ...]

Shows a question and reads what you do, a line per turn:
  search: Mako director      ask the search engine (or the dialect's own tags, raw)
  answer: Lisbon             give the answer; the episode ends and the reward's terms are shown
End of input or Ctrl-C leaves.

Examples:
  searchqa play
  searchqa play env=hotpotqa env.split=all
  echo "answer: yes" | searchqa play --seed 3""",
    ),
    "data": Command("data_command", "list, download, verify and merge data sets; write rows for training engines; export episodes", ""),
    "simulator": Command("simulator_command", "make a simulated search engine: collect, label, train, evaluate", ""),
    "index": Command("index_command", "build, look at, measure and verify search indexes", ""),
    "report": Command(
        "report",
        "make picture, page and table of finished runs again; several runs: means over seeds, or variants compared",
        """usage: searchqa report [--markdown] [--save FILE.json] FOLDER [FOLDER ...]
       searchqa report [--markdown] FILE.json [FILE.json ...]
       searchqa report multirun [--markdown] FOLDER
       searchqa report compare A B [C ...] [--allow KEY,KEY] [--metric NAME,NAME] [--markdown] [--json]
       searchqa report page RUN_OR_TRAJECTORIES [...] [--out FILE] [--most N]
       searchqa report published [--system S] [--model M] [--markdown] [--json]

A folder is that of a run, or one with runs beneath it, such as a sweep's. Writes picture and report.html into each run's folder again and prints a
table: learning_curve.png of training, scores.png of an evaluation, whose summary is made again from its results.
Runs that differ in their seed only: the mean and its 95% interval. Training runs that were measured alike and differ in a setting, such as an ablation's:
a row for each variant, with paired differences from the first, and comparison.png in the folder. Otherwise a column for each run.
  --markdown               print the table in Markdown, and nothing else
  --save FILE.json         keep the comparison: one small file, and its picture beside it, from which the table and the picture can be made again

multirun tells of a sweep's jobs: how each ended, what was tried again, what it measured; and writes one page of all.
compare sets evaluations beside each other, with paired differences, and refuses those that were not measured alike; published lists the published tables
of Search-R1, R1-Searcher and ZeroSearch, whose rows can stand in a comparison. `searchqa report compare --help` tells more.
page writes one page of the trajectories of several runs or files: two runs, or two checkpoints, side by side on the same questions.

Examples:
  searchqa report runs/2026-11-20_10-00-00-train-world-grpo
  searchqa report runs/seed0 runs/seed1 runs/seed2
  searchqa report runs/mask --save results/mask.json
  searchqa report --markdown runs/ablation
  searchqa report multirun runs/compare
  searchqa report compare runs/mine runs/baseline
  searchqa report page runs/mine runs/baseline --out both.html
  searchqa report published --system zerosearch""",
    ),
    "recipe": Command(
        "integrations.verl_recipe",
        "write a training configuration as what another engine needs to run it: verl",
        """usage: searchqa recipe verl [--out FOLDER] [--rows] [key=value ...]

key=value are those of `searchqa train`. Prints verl's overrides, and what verl does in another way than the native trainer. What verl cannot do is refused.
  --out FOLDER             write train.sh, agent_loops.yaml and config.yaml there instead of printing the overrides
  --rows                   and the questions, train.parquet and test.parquet; downloads them where they are not on this machine

Examples:
  searchqa recipe verl recipe=published/search_r1_grpo llm=qwen2.5-3b
  searchqa recipe verl --out runs/verl --rows recipe=published/search_r1_ppo llm=qwen2.5-3b
  PYTHON=.venv-engines/bin/python GPUS=8 runs/verl/train.sh""",
    ),
    "serve": Command(
        "serve_command",
        "be a search server over a corpus, for this package and for the clients of Search-R1, R1-Searcher and ZeroSearch",
        """usage: searchqa serve --corpus FILE [--retriever NAME] [--host HOST] [--port PORT] [--top-k K] [--waiting N] [key=value ...]
       searchqa serve env=NAME [env.key=value ...] [--host HOST] [--port PORT] [--top-k K] [--waiting N]

FILE has one passage a line (.jsonl or .jsonl.gz); key=value are options of the retriever, each value in YAML. With env=NAME it serves the retriever
that an environment has by itself; the generated world is searched over HTTP by env.retriever.name=http beside the same other env words.
POST /search is this package's format, /retrieve that of Search-R1 and of ZeroSearch's wiki server, /queries that of R1-Searcher;
GET /health, /ready, /stamp, /metrics. Ctrl-C or SIGTERM stops it, once what is under way has its answer.
  --retriever bm25         any that searches a corpus
  --host 127.0.0.1         another address than loopback needs a token, in $SEARCHQA_RETRIEVER_TOKEN
  --port 8000              0: any that is free
  --top-k 3                passages for each query where a request leaves the number open
  --waiting 16384          searches that may wait; beyond them a request is told to come back (503), as it is with 1,000 connections

Examples:
  searchqa serve --corpus corpus.jsonl
  searchqa serve --corpus corpus.jsonl.gz --retriever bm25 --port 9000 preset=search-r1
  searchqa serve --corpus corpus.jsonl --retriever hybrid retrievers='[bm25, {name: dense}]'
  searchqa serve env=world env.preset=medium                    then, elsewhere:
  searchqa train env=world env.preset=medium env.retriever.name=http env.retriever.url=http://127.0.0.1:8000""",
    ),
}
HYDRA_COMMANDS = ("train", "sft", "eval", "bench")
OF_AGENTS = ("torch", "transformers", "safetensors", "hydra", "omegaconf", "matplotlib", "tensorboard", "yaml", "pyarrow")
"""What the extra ``agents`` installs, which a bare installation has not."""
PLAIN_STEPS = {
    ("eval", "score"): "score_command",
    ("eval", "judge"): "judge_command",
    ("bench", "compare"): "bench_compare_command",
    ("bench", "submit"): "bench_submit_command",
    ("bench", "leaderboard"): "bench_leaderboard_command",
    ("report", "compare"): "compare_command",
    ("report", "page"): "page_command",
    ("report", "published"): "published_results",
    ("report", "multirun"): "multirun_report",
}
"""Commands of two words, and the module that has their ``main``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns 0, or 1 if the run failed, or 2 if the line cannot be understood."""
    line = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in line or os.environ.get("SEARCHQA_DEBUG", "") not in ("", "0")
    line = [word for word in line if word != "--debug"]
    if not line or line[0] in ("-h", "--help", "help"):
        return _help(line[1:])
    if line[0] in ("--version", "-V"):
        from importlib.metadata import version

        _write(f"searchqa-gym {version('searchqa-gym')}")
        return OK
    name, rest = line[0], line[1:]
    if name not in COMMANDS:
        return _unknown(name)
    module = COMMANDS[name].module
    if (name, *rest[:1]) in PLAIN_STEPS:
        module, rest = PLAIN_STEPS[name, rest[0]], rest[1:]
    elif any(word in ("-h", "--help") for word in rest) and name not in ("data", "index", "simulator"):
        return _help([name])
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin cost ten times the work where cores are shared
    if debug:
        return int(import_module(f"searchqa_agents.{module}").main(rest) or OK)
    try:
        return int(import_module(f"searchqa_agents.{module}").main(rest) or OK)
    except KeyboardInterrupt:
        _error("stopped.")
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `searchqa ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        message = explained(error)
        if message is None:
            raise
        _error(message.text)
        return message.code


class Message(NamedTuple):
    """What to tell of an error, and the exit code."""

    text: str
    code: int


class UsageError(Exception):
    """The command line cannot be understood."""


def explained(error: BaseException) -> Message | None:
    """The message of an error that a person can do something about; None for a fault of the program, whose trace is wanted."""
    from searchqa_envs.errors import SearchQAError
    from searchqa_retrievers.types import RetrieverError

    if isinstance(error, UsageError):
        return Message(str(error), USAGE)
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in OF_AGENTS:
        return Message(f"This needs {package}, which is not installed: pip install 'searchqa-gym[agents]'.", FAILED)
    if "hydra" in sys.modules:
        from searchqa_agents.hydra_app import explained_override

        text = explained_override(error)
        if text is not None:
            return Message(text, USAGE)
    ours = type(error).__module__.startswith(("searchqa_agents.", "searchqa_envs.", "searchqa_retrievers."))
    if ours or isinstance(error, (SearchQAError, RetrieverError, OSError)):
        return Message(str(error), FAILED)
    return None


def _help(words: Sequence[str]) -> int:
    if not words:
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
        _write(
            "searchqa: multi-turn search question answering, and agents that learn it\n\n"
            f"usage: searchqa COMMAND [...]\n\n{listed}\n\n"
            "`searchqa COMMAND --help` tells more; `searchqa --version` the version.\n\n"
            "Examples:\n"
            "  searchqa train                                 train an agent on the generated world, from nothing\n"
            "  searchqa eval env=world agent=oracle           the ceiling\n"
            "  searchqa eval env=hotpotqa env.split=all agent=search_once\n"
            "  searchqa play                                  be the agent yourself"
        )
        return OK
    name = words[0]
    if name not in COMMANDS:
        return _unknown(name)
    if name in ("data", "index", "simulator"):
        return int(import_module(f"searchqa_agents.{COMMANDS[name].module}").main(["--help"]) or OK)
    text = COMMANDS[name].help
    if name in HYDRA_COMMANDS or name == "play":
        from searchqa_agents.config_help import algorithms_text, groups_text, keys_text

        if name == "play":
            text += f"\n\n{groups_text('play')}"
        else:
            algorithms = f"\n\n{algorithms_text()}" if name == "train" else ""
            text += f"\n\n{groups_text(name)}\n\n{keys_text(name)}{algorithms}\n{_HYDRA_HELP}"
    _write(text)
    return OK


def _unknown(name: str) -> int:
    close = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    _error(f"There is no command {name!r}.{hint} The commands are: {', '.join(COMMANDS)}. See `searchqa --help`.")
    return USAGE


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


def _error(text: str) -> None:
    from searchqa_agents.launch import place

    here = place()
    which = f", process {here.rank} of {here.world_size}" if here.world_size > 1 else ""
    sys.stderr.write(f"searchqa{which}: {text}\n")


def entry_point() -> NoReturn:
    """For ``python -m searchqa_agents.cli``."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
