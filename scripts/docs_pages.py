"""What the documentation site shows besides docs/: pages of environments from their docstrings, notebooks, sources that pages link to.

``python scripts/docs_pages.py`` writes docs/environments/ again. ``scripts/docs_hook.py`` does the rest while the site is built.
"""

from __future__ import annotations

import base64
import inspect
import json
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MADE = "<!-- Made by scripts/docs_pages.py from docstrings and registries in envs/: change those. -->\n\n"

# Links ---------------------------------------------------------------------------------------------------------------------------------

_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", flags=re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)(\))")


def outside_code(change: Callable[[str], str], markdown: str) -> str:
    """``markdown`` with ``change`` done to what is neither fenced nor between backticks."""
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_outside_inline_code(change, markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, _outside_inline_code(change, markdown[end:])])


def _outside_inline_code(change: Callable[[str], str], text: str) -> str:
    kept: list[str] = []

    def put_away(code: re.Match[str]) -> str:
        kept.append(code.group())
        return f"\0{len(kept) - 1}\0"

    return re.sub("\0(\\d+)\0", lambda mark: kept[int(mark.group(1))], change(_CODE.sub(put_away, text)))


def links(markdown: str) -> list[str]:
    """The targets of links and pictures, in order, those in code left out."""
    found: list[str] = []

    def note(text: str) -> str:
        found.extend(match.group(2) for match in _LINK.finditer(text))
        return text

    outside_code(note, markdown)
    return found


def is_elsewhere(link: str) -> bool:
    """Whether a link leads to another host."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*:|//", link))


def place_in_site(path: str) -> str:
    """Where a file of the repository stands in the site's sources: pages as they are, notebooks as pages, all else below ``source/``."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("notebooks/") and path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    return f"source/{path}" + ("" if path.endswith(".md") else ".md")


def for_site(markdown: str, path: str) -> str:
    """``markdown`` of the file at ``path`` in the repository, with links between files of the repository leading to their places in the site."""
    folder, own = posixpath.dirname(path), posixpath.dirname(place_in_site(path))

    def moved(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        target, mark, anchor = link.partition("#")
        if is_elsewhere(link) or not target:
            return match.group()
        there = place_in_site(posixpath.normpath(posixpath.join(folder, target)))
        return before + posixpath.relpath(there, own or ".") + mark + anchor + after

    return outside_code(lambda text: _LINK.sub(moved, text), markdown)


def linked_files(markdown: str, path: str) -> Iterator[str]:
    """The files outside docs/ that a page links to, by their paths in the repository."""
    for link in links(markdown):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link.partition("#")[0]))
        if not is_elsewhere(link) and not link.startswith("#") and not target.startswith("docs/"):
            yield target


def source_page(path: str, text: str) -> str:
    """The page that shows a file of the repository; Markdown as it is, anything else as code, which the search leaves out."""
    if path.endswith(".md"):
        return for_site(text, path)
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    language = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json", ".toml": "toml"}.get(posixpath.splitext(path)[1], "text")
    fence = "`" * (longest + 1)
    return (
        f"---\nsearch:\n  exclude: true\n---\n\n# {posixpath.basename(path)}\n\n`{path}`\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"
    )


# What a built page loads ---------------------------------------------------------------------------------------------------------------


class _Loads(HTMLParser):
    """Collects what a browser loads for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        key = {"link": "href", "object": "data"}.get(tag, "src")
        if (
            tag in ("script", "link", "img", "iframe", "source", "video", "audio", "embed", "object")
            and given.get(key)
            and given.get("rel") != "canonical"
        ):
            self.addresses.append(str(given[key]))


def loaded(html: str) -> list[str]:
    """The addresses that a browser loads for a page by itself: scripts, styles, pictures, frames."""
    parser = _Loads()
    parser.feed(html)
    return parser.addresses


def styles_from_elsewhere(css: str) -> list[str]:
    """The addresses on other hosts that a style sheet loads."""
    found = re.findall(r"(?:url\(\s*|@import\s+)['\"]?((?:https?:|//)[^'\")\s;]+)", css)
    return list(dict.fromkeys(found))


def prose(html: str) -> str:
    """The text of a page that is not code."""
    parser = _Prose()
    parser.feed(html)
    return "".join(parser.parts)


class _Prose(HTMLParser):
    """Collects text outside code, scripts and styles."""

    NOT_PROSE = ("pre", "code", "script", "style")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._inside = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside += tag in self.NOT_PROSE

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag in self.NOT_PROSE

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.parts.append(data)


def left_over(html: str) -> list[str]:
    """Marks of reStructuredText that a page shows as they are: rules of tables, double backticks, also in a type's place, and roles."""
    found = re.findall(r"={20,}|(?<!`)``(?!`)|:(?:func|class|data|meth|mod|attr|exc):", prose(html))
    # a text where a docstring should have a type is set as code, and keeps its marks
    typed = re.findall(r"<code[^>]*>[^\n]*?</code>", re.sub(r"<pre\b.*?</pre>", "", html, flags=re.DOTALL))
    return found + [mark for code in typed for mark in re.findall(r"(?<!`)``(?!`)|:(?:func|class|data|meth|mod|attr|exc):`", code)]


# Docstrings ----------------------------------------------------------------------------------------------------------------------------

_RULE = re.compile(r"^ *={3,}(?: +={3,})+ *$")


def plain_markdown(docstring: str) -> str:
    """A docstring with its reStructuredText as Markdown: ``:role:`~a.b``` and double backticks as code, simple tables as tables.

    Raises
    ------
    ValueError
        Where a table has a text across two columns, or no last rule.
    """
    text = re.sub(r":(\w+):`~?([^`]+)`", lambda role: f"`{_name_of(role.group(1), role.group(2))}`", _with_tables(docstring))
    return re.sub(r"(?<!`)``(?!`)(.+?)(?<!`)``(?!`)", r"`\1`", text, flags=re.DOTALL)


def _name_of(role: str, target: str) -> str:
    return target if role == "mod" else target.rpartition(".")[2]


def _with_tables(docstring: str) -> str:
    """``docstring`` with simple tables (columns under rules of ``===``) as Markdown's; a row without a first cell goes on with the one above."""
    lines, written = docstring.splitlines(), []
    while lines:
        line = lines.pop(0)
        if not _RULE.match(line):
            written.append(line)
            continue
        starts = [column.start() for column in re.finditer("=+", line)]
        parts: list[list[list[str]]] = [[]]  # the rows between rules
        while lines and lines[0].strip():
            row = lines.pop(0)
            if _RULE.match(row):
                parts.append([])
                continue
            if any(row[start - 1 : start].strip() for start in starts[1:]):
                raise ValueError(f"A text across two columns of a table: {row!r}.")
            cells = [row[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
            if cells[0]:
                parts[-1].append(cells)
            else:
                parts[-1][-1] = [f"{above} {more}".strip() for above, more in zip(parts[-1][-1], cells, strict=True)]
        if len(parts) not in (2, 3) or parts[-1]:
            raise ValueError(f"A table without a last rule, below {line!r}.")
        margin = " " * starts[0]
        head, rows = (parts[0][0], parts[1]) if len(parts) == 3 else ([""] * len(starts), parts[0])
        written += [
            f"{margin}| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
            for cells in (head, ["---"] * len(starts), *rows)
        ]
    return "\n".join(written)


# Notebooks -----------------------------------------------------------------------------------------------------------------------------


def notebook_page(path: str, text: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the pictures that it shows by file name. Outputs are those stored in it: text, Markdown, PNG pictures; each stands
    in an element of the class ``output``. A link behind the first cell leads to the notebook itself."""
    stem = posixpath.basename(path).removesuffix(".ipynb")
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(for_site(source, path))
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            shown = _outputs(cell["outputs"], stem, pictures)
            parts += [f'<div class="output" markdown="1">\n\n{output}\n\n</div>' for output in shown]
    parts.insert(1, f"[Download this notebook]({stem}.ipynb){{ download }}")
    return "\n\n".join(part for part in parts if part.strip()) + "\n", pictures


def _outputs(outputs: list[dict[str, Any]], stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{stem}-{len(pictures) + 1}.png"
            pictures[name] = base64.b64decode("".join(data["image/png"]))
            yield f"![Output]({name})"
        elif "text/markdown" in data:
            yield "".join(data["text/markdown"])
        elif written := "".join(output.get("text", data.get("text/plain", []))):
            yield "```text\n" + re.sub("\x1b\\[[0-9;]*m", "", written).rstrip() + "\n```"


# Environments --------------------------------------------------------------------------------------------------------------------------


def docstring_markdown(thing: object, level: int = 2) -> str:
    """A docstring as Markdown: roles and double backticks as code, numpy's sections as headings, terms with indented texts as lists."""
    text = plain_markdown(inspect.getdoc(thing) or "")
    text = re.sub(r"^(\w[\w ]*)\n-{3,}$", lambda head: f"## {head.group(1)}", text, flags=re.MULTILINE)
    lines = text.splitlines()
    written: list[str] = []
    for place, line in enumerate(lines):
        following = lines[place + 1] if place + 1 < len(lines) else ""
        if line.startswith("## "):
            written += ["", "#" * level + line.removeprefix("##"), ""]
        elif re.match(r"\w", line) and (re.match(r" {4}\S", following) or re.match(r"\w+ : ", line)):
            names, _, kind = line.partition(" : ")
            if written and written[-1] and not written[-1].startswith(("- ", "  ")):
                written.append("")
            colon = ":" if following.startswith(" ") else ""
            written.append("- " + ", ".join(f"`{name}`" for name in names.split(", ")) + (f" ({kind})" if kind else "") + colon)
        else:
            written.append(line.replace("    ", "  ", 1) if line.startswith("    ") else line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(written)).strip() + "\n"


def environment_pages() -> dict[str, str]:
    """The pages of docs/environments/, by file name."""
    from searchqa_envs.datasets.registry import DATASETS
    from searchqa_envs.env import SearchQAEnv

    pages = {"index.md": _index_page(docstring_markdown(SearchQAEnv)), "world.md": _world_page(), "custom.md": _custom_page()}
    for info in DATASETS.values():
        pages[f"{info.name}.md"] = _set_page(info)
    pages["views.md"] = _views_page()
    pages["dialects_and_rewards.md"] = _dialects_and_rewards_page()
    return {name: MADE + page for name, page in pages.items()}


def _index_page(reference: str) -> str:
    rows = [f"| [`{env_id}`]({name}.md) | `{name}` | {text} |" for env_id, name, text in _environments()]
    return "\n".join(
        [
            "# Environments",
            "",
            "One class, `searchqa_envs.SearchQAEnv`, registered once for each set of questions. `import searchqa_envs` registers the ids; every argument",
            "has a default. Many at once, fixed shapes, text, and one token a step: [vectors and wrappers](views.md). What `dialect=`, `prompt=` and `reward=`",
            "may be: [dialects and rewards](dialects_and_rewards.md).",
            "",
            "| id | Hydra name (`env=`) | questions |",
            "|---|---|---|",
            *rows,
            "",
            reference,
        ]
    )


def _environments() -> Iterator[tuple[str, str, str]]:
    import gymnasium as gym

    import searchqa_envs
    from searchqa_envs.datasets.registry import DATASETS

    for env_id in searchqa_envs.ENV_IDS:
        name = gym.spec(env_id).kwargs["dataset"]
        if name == "world":
            text = "generated, embedded: needs no data"
        elif name == "custom":
            text = "your own questions and passages"
        else:
            info = DATASETS[name]
            text = f"{info.title}: " + ", ".join(f"{split} {size:,}" for split, size in info.sizes.items())
        yield env_id, name, text


def _id_of(name: str) -> str:
    return next(env_id for env_id, dataset, _ in _environments() if dataset == name)


def _defaults(name: str) -> str:
    """The table of the defaults that depend on the set."""
    from searchqa_envs.configuration import build_rules, default_budgets
    from searchqa_envs.dialects import get_dialect
    from searchqa_envs.tokenizers import build_tokenizer

    said = {key: argument.default for key, argument in inspect.signature(build_rules).parameters.items() if argument.default is not None}
    tokenizer = "world" if name == "world" else "byte"
    segment, observation, context = default_budgets(name, build_tokenizer(tokenizer), get_dialect(said["dialect"]))
    rows = {
        "tokenizer": tokenizer,
        "dialect": said["dialect"],
        "prompt": "bare" if name == "world" else "published",
        "retriever": said["retriever"],
        "top_k": "the preset's" if name == "world" else 3,
        "reward": said["reward"],
        "max_turns": said["max_turns"],
        "max_segment_tokens": segment,
        "max_observation_tokens": observation,
        "max_context_tokens": context,
    }
    return "\n".join(
        [
            "| argument | default |",
            "|---|---|",
            *(f"| `{key}` | {f'{value:,}' if isinstance(value, int) else value} |" for key, value in rows.items()),
        ]
    )


_INTERFACE = "Spaces, rewards, ends, `info` and all arguments: [environments](index.md)."


def _set_page(info: Any) -> str:
    env_id = _id_of(info.name)
    passages = (
        "its own contexts make its corpus; `corpus.jsonl[.gz]` beside the questions comes first"
        if info.has_contexts
        else "none of its own: `corpus.jsonl[.gz]` beside the questions, or a search server (`retriever=`)"
    )
    hub = "; ".join([f"`{info.hub.repo}`", *(f"also `{files.repo}` (`--origin {name}`)" for name, files in info.other_hubs.items())])
    return f"""# {info.title}

| | |
|---|---|
| id | `{env_id}` |
| Hydra name | `{info.name}` |
| splits, questions as published | {", ".join(f"{split} {size:,}" for split, size in info.sizes.items())} (default: {info.default_split}); `all`, `extra` |
| passages | {passages} |
| on the hub | {hub} |
| licence | {info.licence} |
| source | {info.citation} |

```python
import gymnasium as gym
import searchqa_envs  # registers the ids

env = gym.make("{env_id}", data_dir="data")  # data/{info.name}/questions.jsonl[.gz], corpus.jsonl[.gz]
observation, info = env.reset(seed=0)
```

```bash
searchqa data download {info.name}        # into the user's cache; data_dir= and $SEARCHQA_DATA come first
searchqa play env={info.name}             # be the agent
searchqa eval env={info.name} env.split={"dev" if "dev" in info.sizes else "test"} agent=search_once
```

{_INTERFACE}

## Defaults

{_defaults(info.name)}
"""


def _world_page() -> str:
    from searchqa_envs.world import PRESETS
    from searchqa_envs.world.source import WorldSource

    rows, examples = [], []
    for preset in PRESETS.values():
        asked: dict[str, list[int]] = {}
        for kind, hops, _ in preset.questions:
            asked.setdefault(kind.replace("_", "/"), []).append(hops)
        kinds = "; ".join(f"{kind} {', '.join(map(str, hops))}" for kind, hops in asked.items())
        rows.append(
            f"| `{preset.name}` | {preset.entities} | {preset.questions_per_world} | {kinds} | {preset.style} | {preset.aliases:.0%} | {preset.top_k} |"
        )
        examples.append(f"| `{preset.name}` | {_world_question(preset.name)} |")
    return "\n".join(
        [
            "# The generated world",
            "",
            f"`{_id_of('world')}`, Hydra name `world`. {_INTERFACE}",
            "",
            "```python",
            "import gymnasium as gym",
            "import searchqa_envs  # registers the ids",
            "",
            f'env = gym.make("{_id_of("world")}", preset="medium", hops=[2, 3], split="train")',
            "observation, info = env.reset(seed=0)",
            "```",
            "",
            "## Presets",
            "",
            "| `preset=` | pages in a world | questions in a world | kinds, by hops | style | with a second name | `top_k` |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "A question of each (the first after `reset(seed=0)`):",
            "",
            "| `preset=` | |",
            "|---|---|",
            *examples,
            "",
            "## An episode",
            "",
            "`hops=2`, `reset(seed=0)`, played along the question's gold chain:",
            "",
            "```text",
            _world_episode(),
            "```",
            "",
            "## Questions and worlds",
            "",
            docstring_markdown(WorldSource, 3),
            "## Defaults",
            "",
            _defaults("world"),
            "",
        ]
    )


def _world_question(preset: str) -> str:
    import gymnasium as gym

    env = gym.make(_id_of("world"), preset=preset)
    question: str = env.reset(seed=0)[1]["question"]
    env.close()
    return question


def _world_episode() -> str:
    import gymnasium as gym

    env = gym.make(_id_of("world"), hops=2, render_mode="ansi")
    world: Any = env.unwrapped
    env.reset(seed=0)
    question = world.episode_view().question
    for link in question.metadata["chain"]:
        env.step(world.tokenizer.encode(f"<search> {link['query']} </search>"))
    _, reward, *_ = env.step(world.tokenizer.encode(f"<answer> {question.golden_answers[0]} </answer>"))
    text = str(env.render()).rstrip()
    env.close()
    return f"{text}\nreward {reward}"


def _custom_page() -> str:
    from searchqa_envs.datasets import load_custom

    return f"""# Your own files

`{_id_of("custom")}`, Hydra name `custom`: the arguments `questions` and `corpus`. {_INTERFACE}

Save this as `questions.jsonl`:

```json
{{"id": "1", "question": "In what year was the university where Sergei Tokarev taught founded?", "golden_answers": ["1755"]}}
```

and this as `corpus.jsonl`:

```json
{{"id": "a", "title": "Sergei Tokarev", "text": "Sergei Tokarev was a professor at Moscow State University."}}
{{"id": "b", "title": "Moscow State University", "text": "Moscow State University was founded in 1755."}}
```

```python
import gymnasium as gym
import searchqa_envs  # registers the ids

env = gym.make("{_id_of("custom")}", questions="questions.jsonl", corpus="corpus.jsonl")
observation, info = env.reset(seed=0)
```

```bash
searchqa play env=custom env.questions=questions.jsonl env.corpus=corpus.jsonl
searchqa eval env=custom env.questions=questions.jsonl env.corpus=corpus.jsonl agent=search_once
```

Other corpora and their formats: [corpora](../retrieval/corpora.md).

## What the files may be

{docstring_markdown(load_custom, 3)}
## Defaults

{_defaults("custom")}
"""


def _views_page() -> str:
    from searchqa_envs import wrappers
    from searchqa_envs.vector import SearchQAVectorEnv

    views = (wrappers.PaddedTokens, wrappers.TextView, wrappers.TokenLevel)
    return "\n".join(
        [
            "# Vectors and wrappers",
            "",
            "## SearchQAVectorEnv",
            "",
            "```python",
            "import gymnasium as gym",
            "import searchqa_envs  # registers the ids",
            "",
            f'venv = gym.make_vec("{_id_of("world")}", num_envs=64, autoreset_mode="DISABLED")',
            "```",
            "",
            docstring_markdown(SearchQAVectorEnv, 3),
            *(f"## {view.__name__}\n\n`searchqa_envs.wrappers.{view.__name__}(env)`\n\n{docstring_markdown(view, 3)}" for view in views),
        ]
    )


def _dialects_and_rewards_page() -> str:
    from searchqa_envs.dialects import DIALECTS
    from searchqa_envs.rewards import PRESETS

    tags, prompts = [], []
    for dialect in DIALECTS.values():
        shown = (f"{dialect.search_open} {dialect.search_close}", f"{dialect.information_open} {dialect.information_close}")
        written = " | ".join(f"`{text}`".replace("|", "\\|") for text in (*shown, f"{dialect.answer_open} {dialect.answer_close}"))
        otherwise = "ends the episode" if dialect.invalid_text is None else "costs a turn and is answered with the published reply"
        tags.append(f"| `{dialect.name}` | {written} | {otherwise} | {', '.join(f'`{name}`' for name in dialect.prompts)} |")
        prompts.append(f"`{dialect.name}`:\n\n````text\n{dialect.prompts['published'].rstrip()}\n````\n")
    rewards = []
    for name, preset in PRESETS.items():
        options = [f"`{option}={default:g}`" for option, default in preset.options.items()]
        meaning = " ".join(docstring_markdown(preset.function).partition("\n\n")[0].split()).replace("|", "\\|")
        rewards.append(f"| `{name}` | {', '.join(f'`{term}`' for term in preset.terms)} | {', '.join(options)} | {meaning} |")
    return "\n".join(
        [
            "# Dialects and rewards",
            "",
            "## Dialects",
            "",
            "| `dialect=` | search | passages | answer | a segment that is no action | `prompt=` |",
            "|---|---|---|---|---|---|",
            *tags,
            "",
            "`prompt=` also takes a template of your own with `{question}`; `bare` is the question alone. The published prompts:",
            "",
            *prompts,
            "## Rewards",
            "",
            '`reward=` takes a name, a mapping with options (`{"name": "em", "wrong": -1}`), a list of them, or',
            "[a function of your own](../concepts.md#rewards); `reward_weights=` weighs terms by name.",
            "",
            "| `reward=` | terms | options | what it is |",
            "|---|---|---|---|",
            *rewards,
            "",
        ]
    )


def main() -> None:
    folder = ROOT / "docs" / "environments"
    folder.mkdir(exist_ok=True)
    pages = environment_pages()
    for name, page in pages.items():
        (folder / name).write_text(page, encoding="utf-8")
    sys.stdout.write(f"Wrote {len(pages)} pages to {folder.relative_to(ROOT)}.\n")


if __name__ == "__main__":
    main()
