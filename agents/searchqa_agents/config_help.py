"""Help on configuration keys, read from the YAML files themselves, so that it cannot differ from them."""

from __future__ import annotations

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


def groups_text(command: str) -> str:
    """The config groups of a command and their options."""
    lines = ["Groups:"]
    for group in GROUPS[command]:
        lines.append(f"  {group}={'|'.join(options(group))}")
        if group == "env":
            lines.append(f"      with {', '.join(key for key, _ in _keys(conf_dir() / 'env' / 'hotpotqa.yaml') if key != 'id')};")
            own = [key for name in ("world", "custom") for key, _ in _keys(conf_dir() / "env" / f"{name}.yaml")][-7:]
            lines.append(f"      the world also {', '.join(own[:5])}; custom also {', '.join(own[5:])}. For example env.top_k=5")
    return "\n".join(lines)


def keys_text(command: str) -> str:
    """The keys of a command, their defaults, and what they mean."""
    listed = [*_keys(conf_dir() / f"{command}.yaml"), *_keys(conf_dir() / "run.yaml")]
    width = max(len(f"{key}={value}") for key, value in ((key, text.partition("#")[0].strip()) for key, text in listed))
    lines = ["Keys:"]
    for key, text in listed:
        value, _, comment = text.partition("#")
        lines.append(f"  {f'{key}={value.strip()}':<{min(width, 46)}}  {comment.strip()}".rstrip())
    return "\n".join(lines)


def _keys(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        key, colon, rest = line.partition(":")
        if colon and key and key[0].isalpha() and key not in ("defaults", "hydra"):
            yield key, rest.strip()
