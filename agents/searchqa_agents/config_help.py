"""Help on configuration keys, read from the YAML files themselves, so that it cannot differ from them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

GROUPS = {"train": ("env", "algo", "recipe"), "sft": ("env",), "eval": ("env", "agent"), "play": ("env",)}


def conf_dir() -> Path:
    """Where the YAML files of this package lie."""
    return Path(str(files("searchqa_conf")))


def options(group: str) -> list[str]:
    """The names that a config group knows, such as env's hotpotqa."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


CONFIG_CLASSES = {
    "sft": (
        ("warmup", "warmup", "WarmupConfig", "warmup/repeated"),
        ("sft", "sft", "SFTConfig", "sft/demonstrations"),
        ("model", "settings", "ModelSettings", ""),
    ),
    "train": (
        ("algo", "grpo", "GRPOConfig", "algo/grpo"),
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


def keys_text(command: str) -> str:
    """The keys of a command, their defaults, and what they mean."""
    listed = [*_keys(conf_dir() / f"{command}.yaml"), *_keys(conf_dir() / "run.yaml")]
    if command != "eval":
        listed += _keys(conf_dir() / "warm_start.yaml")
    entries = []
    for key, text in listed:
        value, _, comment = text.partition("#")
        entries.append((f"{key}={value.strip()}", comment.strip()))
    for key, module, name, file in CONFIG_CLASSES.get(command, ()):
        changed = {field: text.partition("#")[0].strip() for field, text in _keys(conf_dir() / f"{file}.yaml")} if file else {}
        entries += [(f"{key}.{field}={changed.get(field, value)}", comment) for field, value, comment in _fields(module, name)]
    return "\n".join(["Keys:", *(f"  {entry:<40}  {comment}".rstrip() for entry, comment in entries)])


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
