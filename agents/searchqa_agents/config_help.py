"""Help on configuration keys, read from the YAML files themselves, so that it cannot differ from them."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

GROUPS = {
    "train": ("env", "algo", "alarms", "llm", "recipe", "ablation"),
    "sft": ("env",),
    "eval": ("env", "agent"),
    "bench": ("suite", "task", "algo"),
    "select": ("env", "agent"),
    "play": ("env",),
}


def conf_dir() -> Path:
    """Where the YAML files of this package lie."""
    return Path(str(files("searchqa_conf")))


def options(group: str) -> list[str]:
    """The names that a config group knows, such as env's hotpotqa."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def published_recipes() -> list[str]:
    """The published settings, as options of the group recipe."""
    return [f"published/{name}" for name in options("recipe/published")]


CONFIG_CLASSES = {
    "sft": (
        ("warmup", "warmup", "WarmupConfig", "warmup/repeated"),
        ("sft", "sft", "SFTConfig", "sft/demonstrations"),
        ("model", "settings", "ModelSettings", ""),
    ),
    "train": (
        ("algo", "algorithm", "AlgorithmConfig", "algo/grpo"),
        ("alarms", "alarms", "AlarmConfig", "alarms/default"),
        ("warmup", "warmup", "WarmupConfig", "warmup/repeated"),
        ("sft", "sft", "SFTConfig", "sft/demonstrations"),
        ("model", "settings", "ModelSettings", ""),
    ),
}
"""For each command: key, module and class of the dataclasses whose fields are keys too, and the YAML file that changes some of their defaults."""


def groups_text(command: str) -> str:
    """The config groups of a command and their options."""
    lines = ["Groups:"]
    for group in GROUPS[command]:
        lines.append(f"  {group}={'|'.join(options(group))}")
        if group == "recipe":
            lines += [f"      {name:<42} {_about(group, name)}" for name in published_recipes()]
        if group == "agent":
            lines += [f"      {f'baseline/{name}':<26} {_about('agent/baseline', name)}" for name in options("agent/baseline")]
            lines.append(
                "      published/NAME: a checkpoint from the model hub, asked and limited as in its published evaluation, in bfloat16 on the first GPU"
            )
            lines.append("      (dtype=float32 device=cpu: otherwise). NAME is one of")
            lines += textwrap.wrap(", ".join(options("agent/published")), 140, initial_indent=" " * 8, subsequent_indent=" " * 8)
        if group == "ablation":
            lines.append(
                "      a comparison, all its variants and seeds: searchqa train -m ablation=mask run_dir=runs/mask; then searchqa report runs/mask"
            )
            lines += [f"      {name:<16} {_about(group, name)}" for name in options(group)]
        if group == "env":
            common = [key for key, _ in _keys(conf_dir() / "env" / "common" / "arguments.yaml")]
            own = {
                name: ", ".join(key for key, _ in _keys(conf_dir() / "env" / f"{name}.yaml") if key not in ("id", *common))
                for name in ("world", "custom")
            }
            lines.append(f"      each with {', '.join(common[:8])},")
            lines.append(f"      {', '.join(common[8:])};")
            lines.append(f"      the world also {own['world']}; custom also {own['custom']}. For example env.top_k=5")
    return "\n".join(lines)


def _about(group: str, option: str) -> str:
    """The comment at the beginning of an option's file."""
    lines = (conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# ") and "@package" not in line)


def keys_text(command: str) -> str:
    """The keys of a command, their defaults, and what they mean."""
    listed = [*_keys(conf_dir() / f"{command}.yaml"), *_keys(conf_dir() / "run.yaml")]
    if command not in ("eval", "select"):
        listed += _keys(conf_dir() / "warm_start.yaml")
    entries = []
    for key, text in listed:
        value, _, comment = text.partition("#")
        entries.append((f"{key}={value.strip()}", comment.strip()))
    for key, module, name, file in CONFIG_CLASSES.get(command, ()):
        changed = {field: text.partition("#")[0].strip() for field, text in _keys(conf_dir() / f"{file}.yaml")} if file else {}
        entries += [(f"{key}.{field}={changed.get(field, value)}", comment) for field, value, comment in _fields(module, name)]
    return "\n".join(["Keys:", *(f"  {entry:<40}  {comment}".rstrip() for entry, comment in entries)])


def algorithms_text() -> str:
    """What ``algo=`` can be: each option's own keys, beside those that all have."""
    lines = ["Algorithms:"]
    own = _own_keys()
    for option in options("algo"):
        text = (conf_dir() / "algo" / f"{option}.yaml").read_text(encoding="utf-8")
        base = next(line.strip().removeprefix("- ").removesuffix("_types") for line in text.splitlines() if line.strip().endswith("_types"))
        lines.append(f"  algo={option:<30} {text.splitlines()[0].lstrip('# ')}")
        changed = [f"{key}={value.partition('#')[0].strip()}" for key, value in _keys(conf_dir() / "algo" / f"{option}.yaml")]
        changed = [word for word in changed if not word.startswith(("seed=", "checkpoint_every="))]
        if changed:
            lines.append(f"      is algo={base} with {', '.join(changed)}" if base != option else f"      has {', '.join(changed)}")
        if base == option:
            lines += [f"      {f'algo.{field}={value}':<36}  {comment}".rstrip() for field, value, comment in own.get(option, ())]
    lines.append("  Your own: plugins=[my_algorithm.py] algo=NAME, where the file calls searchqa_agents.algorithm.register(...).")
    return "\n".join(lines)


def _own_keys() -> dict[str, list[tuple[str, str, str]]]:
    """Of each registered algorithm, the fields of its own settings, read from the source of ``algorithms/``."""
    found = {"sft": list(_fields("supervised", "SupervisedConfig"))}
    for path in sorted((Path(__file__).parent / "algorithms").glob("[!_]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Algorithm":
                name, config = node.args[:2]
                if isinstance(name, ast.Constant) and isinstance(config, ast.Name):
                    found[str(name.value)] = list(_fields(f"algorithms/{path.stem}", config.id))
    return found


def _fields(module: str, name: str) -> Iterator[tuple[str, str, str]]:
    """Name, default and the help string of each field of a dataclass, read from its source: importing it would load torch."""
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            about = following.value if isinstance(following, ast.Expr) else None
            value = ast.literal_eval(node.value)
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            yield node.target.id, str(shown), str(about.value) if isinstance(about, ast.Constant) else ""


def _keys(path: Path) -> Iterator[tuple[str, str]]:
    parent = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, colon, rest = line.partition(":")
        if not colon or not key.strip()[:1].isalpha():
            continue
        if not key.startswith(" "):
            parent = key
            if rest and key not in ("defaults", "hydra"):
                yield key, rest.strip()
        elif parent not in ("defaults", "hydra"):
            yield f"{parent}.{key.strip()}", rest.strip()
