"""The documentation: links and anchors of pages lead somewhere, every page is in the navigation, pages made from docstrings are those of today."""

import base64
import importlib.util
import json
import os
import posixpath
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import searchqa_envs
from searchqa_agents import cli

ROOT = Path(__file__).resolve().parents[1]


def loaded_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = loaded_script("docs_pages")


class Settings(yaml.SafeLoader):
    """mkdocs.yml without the Python objects that it names."""


Settings.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)

SETTINGS = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Settings)
DOCS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted(f"notebooks/{file.name}" for file in (ROOT / "notebooks").glob("*.ipynb"))


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def markdown_of(path: str) -> str:
    if path.endswith(".ipynb"):
        return "\n\n".join("".join(cell["source"]) for cell in json.loads(text_of(path))["cells"] if cell["cell_type"] == "markdown")
    return text_of(path)


def anchors(markdown: str) -> set[str]:
    """The anchors of a page's headings, as git hosting sites and the built site name them."""
    found: Counter[str] = Counter()
    names = set(re.findall(r'<a (?:id|name)="([^"]+)"', markdown))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL), re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(slug if not found[slug] else f"{slug}-{found[slug]}")
        found[slug] += 1
    return names


def navigation(entries: list[Any]) -> list[str]:
    found: list[str] = []
    for entry in entries:
        below = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += navigation(below) if isinstance(below, list) else [below]
    return found


NAVIGATION = navigation(SETTINGS["nav"])

# Links ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", *DOCS, *NOTEBOOKS])
def test_links_pictures_and_anchors_of_a_page_lead_somewhere(page: str) -> None:
    broken = []
    for link in pages.links(markdown_of(page)):
        target, _, anchor = link.partition("#")
        if pages.is_elsewhere(link):
            continue
        there = posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page
        known = not anchor or not there.endswith((".md", ".ipynb")) or anchor in anchors(markdown_of(there))
        if there.startswith("..") or not (ROOT / there).exists() or not known:
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", DOCS)
def test_a_page_links_to_files_not_to_folders_so_that_the_site_can_show_them(page: str) -> None:
    assert not [path for path in pages.linked_files(text_of(page), page) if not (ROOT / path).is_file()]


def test_links_in_code_are_not_links() -> None:
    markdown = "[a](one.md) `[b](two.md)` ``[c](`three.md)`` ![d](four.png)\n\n```python\nx = [e](five.md)\n```\n[f `code`](six.md#g)"
    assert pages.links(markdown) == ["one.md", "four.png", "six.md#g"]


@given(st.text(alphabet="a`~[]()\n \0#1", max_size=60))
def test_what_is_not_changed_comes_back_as_it_was(text: str) -> None:
    if "\0" not in text:
        assert pages.outside_code(lambda part: part, text) == text


@pytest.mark.parametrize(
    ("page", "link", "moved"),
    [
        ("docs/a.md", "b.md#c", "b.md#c"),
        ("docs/systems/a.md", "../b.png", "../b.png"),
        ("docs/a.md", "../tests/examples/ppo.py", "source/tests/examples/ppo.py.md"),
        ("docs/systems/a.md", "../../README.md#install", "../source/README.md#install"),
        ("docs/a.md", "../notebooks/1_x.ipynb", "notebooks/1_x.md"),
        ("notebooks/1_x.ipynb", "../docs/systems/b.md#c", "../systems/b.md#c"),
        ("notebooks/1_x.ipynb", "2_y.ipynb", "2_y.md"),
        ("README.md", "docs/b.md", "../b.md"),
        ("docs/a.md", "#here", "#here"),
        ("docs/a.md", "https://arxiv.org/abs/2503.09516", "https://arxiv.org/abs/2503.09516"),
    ],
)
def test_a_link_between_files_of_the_repository_leads_to_their_places_in_the_site(page: str, link: str, moved: str) -> None:
    assert pages.for_site(f"x [t]({link}) `[t]({link})` y", page) == f"x [t]({moved}) `[t]({link})` y"


def test_a_source_that_holds_fences_is_shown_whole() -> None:
    page = pages.source_page("tests/x.py", 'TEXT = """\n```\n"""\n')
    front, _, page = page.partition("---\n\n")
    assert yaml.safe_load(front.removeprefix("---")) == {"search": {"exclude": True}}
    assert page == '# x.py\n\n`tests/x.py`\n\n````python\nTEXT = """\n```\n"""\n````\n'


# Navigation and build ------------------------------------------------------------------------------------------------------------------


def test_every_page_and_every_notebook_is_in_the_navigation_once() -> None:
    there = [pages.place_in_site(path) for path in DOCS + NOTEBOOKS]
    assert sorted(NAVIGATION) == sorted(there)


def test_every_registered_environment_has_its_page() -> None:
    index = text_of("docs/environments/index.md")
    for env_id in searchqa_envs.ENV_IDS:
        [name] = re.findall(rf"\[`{env_id}`\]\((\w+\.md)\)", index)
        assert f"environments/{name}" in NAVIGATION
        assert env_id in text_of(f"docs/environments/{name}")


def test_the_pages_of_environments_are_those_of_todays_docstrings() -> None:
    script = "import json, docs_pages; print(json.dumps(docs_pages.environment_pages()))"  # where no test has registered anything
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "scripts", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    kept = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "environments").glob("*.md")}
    assert kept == made, "run `python scripts/docs_pages.py`"


def test_the_build_finds_broken_links_and_asks_no_other_host() -> None:
    assert set(SETTINGS["validation"]["nav"].values()) == {"warn"}
    assert set(SETTINGS["validation"]["links"].values()) == {"warn"}
    assert {"not_found", "anchors", "absolute_links", "unrecognized_links"} <= set(SETTINGS["validation"]["links"])
    assert SETTINGS["theme"]["font"] is False
    assert "repo_url" not in SETTINGS, "its page would ask the hosting site for stars"
    [line] = [line for line in text_of("Makefile").splitlines() if "mkdocs build" in line]
    assert "--strict" in line
    assert "--quiet" not in line, "mkdocs counts no warnings then"
    assert "make docs" in text_of(".ci/run").splitlines()


def test_what_a_page_or_a_style_would_load_is_found() -> None:
    html = (
        '<head><link rel="stylesheet" href="https://fonts.example/css"><link rel="canonical" href="https://own.example/">'
        '<script src="//cdn.example/x.js"></script><script>let a = 1</script></head>'
        '<body><a href="https://linked.example">t</a><img alt="p" src="p.png"><iframe src="https://frame.example"></iframe></body>'
    )
    assert pages.loaded(html) == ["https://fonts.example/css", "//cdn.example/x.js", "p.png", "https://frame.example"]
    css = "@import 'https://a.example/x.css'; @font-face {src: url( \"//b.example/y.woff\" )} b {background: url(data:image/png;base64,AA) url(c.png)}"
    assert pages.styles_from_elsewhere(css) == ["https://a.example/x.css", "//b.example/y.woff"]


# Pages made from something else --------------------------------------------------------------------------------------------------------


def test_a_notebook_becomes_a_page_with_its_outputs() -> None:
    picture = b"\x89PNG"
    cells = [
        {"cell_type": "markdown", "source": ["# One\n", "[a page](../docs/concepts.md)"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "text": ["\x1b[31m1\x1b[0m\n"]},
                {"output_type": "display_data", "data": {"image/png": base64.b64encode(picture).decode(), "text/plain": ["<Figure>"]}},
            ],
        },
        {"cell_type": "code", "source": ["x"], "outputs": [{"data": {"text/markdown": ["**x**"], "text/plain": ["<Markdown>"]}}]},
        {"cell_type": "code", "source": ["y"], "outputs": [{"data": {"text/html": ["<b>y</b>"], "text/plain": ["y"]}}]},
        {"cell_type": "code", "source": ["x = 1"], "outputs": []},
    ]

    def shown(*lines: str) -> str:
        return '<div class="output" markdown="1">\n\n' + "\n".join(lines) + "\n\n</div>"

    text, pictures = pages.notebook_page("notebooks/1_one.ipynb", json.dumps({"cells": cells}))
    assert text == (
        "# One\n[a page](../concepts.md)\n\n[Download this notebook](1_one.ipynb){ download }\n\n"
        f"```python\nprint(1)\n```\n\n{shown('```text', '1', '```')}\n\n{shown('![Output](1_one-1.png)')}\n\n"
        f"```python\nx\n```\n\n{shown('**x**')}\n\n```python\ny\n```\n\n{shown('```text', 'y', '```')}\n\n```python\nx = 1\n```\n"
    )
    assert pictures == {"1_one-1.png": picture}


def test_a_docstring_becomes_markdown() -> None:
    def thing() -> None:
        """Takes a :class:`~package.module.Name` and ``x``.

        Parameters
        ----------
        split : {"train", "dev"}
        first, second : int
            What they are,
            in two lines.

        ## Notes
        None.
        """

    assert pages.docstring_markdown(thing, 3) == (
        'Takes a `Name` and `x`.\n\n### Parameters\n\n- `split` ({"train", "dev"})\n- `first`, `second` (int):\n  What they are,\n  in two lines.\n\n'
        "### Notes\n\nNone.\n"
    )


def test_restructured_text_becomes_markdown() -> None:
    assert pages.plain_markdown("``a`` of :func:`~b.c.d`, :data:`E`, :mod:`f.g`,\n``h\ni``.") == "`a` of `d`, `E`, `f.g`,\n`h\ni`."
    assert pages.plain_markdown("```python\nx\n```") == "```python\nx\n```"
    headed = (
        "Text.\n\n  ====== ====\n  path   what\n  ====== ====\n  ``/a`` a|b\n         or c\n  /b     d, a long one\n  ====== ====\n\nMore."
    )
    assert (
        pages.plain_markdown(headed)
        == "Text.\n\n  | path | what |\n  | --- | --- |\n  | `/a` | a\\|b or c |\n  | /b | d, a long one |\n\nMore."
    )
    assert pages.plain_markdown("=== ===\na   b\n=== ===") == "|  |  |\n| --- | --- |\n| a | b |"


@pytest.mark.parametrize("table", ["=== ===\na   b", "=== ===\nabc def\nabcd  e\n=== ==="])
def test_a_malformed_table_of_a_docstring_is_an_error(table: str) -> None:
    with pytest.raises(ValueError, match="table"):
        pages.plain_markdown(table)


def test_restructured_text_on_a_built_page_is_found() -> None:
    assert pages.left_over(f"<p>a {'=' * 30} b</p>") == ["=" * 30]
    assert pages.left_over("<p>see :func: and ``x``</p>") == [":func:", "``", "``"]
    assert pages.left_over("<ul><li><code>of :data:`X`, ``y``</code></li></ul>") == [":data:`", "``", "``"]
    assert pages.left_over(f"<pre><code>{'=' * 30} ``x`` :func:`y`</code></pre><p>``` <code>x</code></p><script>``x``</script>") == []


@pytest.mark.slow
def test_no_page_of_the_built_site_shows_restructured_text(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    built = sorted(tmp_path.rglob("*.html"))
    assert len(built) >= len(NAVIGATION)
    assert not {file.name: marks for file in built if (marks := pages.left_over(file.read_text(encoding="utf-8")))}
    assert (tmp_path / NOTEBOOKS[0]).read_bytes() == (ROOT / NOTEBOOKS[0]).read_bytes()


# Troubleshooting -----------------------------------------------------------------------------------------------------------------------


def unregistered(folder: Path) -> None:
    registry = dict(gym.registry)
    try:
        for env_id in searchqa_envs.ENV_IDS:
            gym.registry.pop(env_id)
        gym.make("SearchQA-World-v0")
    finally:
        gym.registry.update(registry)


def no_data(folder: Path) -> None:
    gym.make("SearchQA-HotpotQA-v0", data_dir=str(folder))


def malformed(folder: Path) -> None:
    (folder / "questions.jsonl").write_text('{"id": "1", "question": "x"}\n', encoding="utf-8")
    gym.make("SearchQA-Custom-v0", questions="questions.jsonl", data_dir=str(folder))


def other_tokenizer(folder: Path) -> None:
    from searchqa_agents.loading import shipped_checkpoint
    from searchqa_agents.policy import Policy

    Policy.load(shipped_checkpoint(), gym.make("SearchQA-World-v0", tokenizer="byte").unwrapped.tokenizer)  # type: ignore[attr-defined]


def text_for_ids(folder: Path) -> None:
    env = gym.make("SearchQA-World-v0")
    env.reset(seed=0)
    env.step("<search> x </search>")  # type: ignore[arg-type]


SEEN = [line for line in text_of("docs/troubleshooting.md").splitlines() if line.startswith("- **You see**")]


@pytest.mark.parametrize("do", [unregistered, no_data, malformed, other_tokenizer, text_for_ids])
def test_what_the_page_of_troubleshooting_shows_is_what_is_raised(do: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"\w") as raised:
        do(tmp_path)
    said = re.sub(r"\s+", " ", str(raised.value)).replace("`", "'")
    shown = [re.sub(r"^\w+(Error|NotFound): ", "", text) for line in SEEN for text in re.findall(r"`([^`]+)`", line)]
    patterns = [".*".join(re.escape(part.strip()) for part in text.split("...")) for text in shown if len(text) > 30]
    assert [pattern for pattern in patterns if re.search(pattern, said)], said


# Programs and commands on pages --------------------------------------------------------------------------------------------------------


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), flags=re.MULTILINE | re.DOTALL)


def test_the_episode_of_the_quick_start_is_what_its_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    [program] = [text for text in blocks("docs/quick_start.md", "python") if "TextView" in text]
    exec(compile(program, "one.py", "exec"), {})
    printed = capsys.readouterr().out
    [shown] = blocks("docs/quick_start.md", "text")
    start, mark, end = shown.rpartition(", ...}")
    assert mark
    assert not end.strip()
    assert printed.startswith(start)


def test_the_files_of_the_page_on_ones_own_files_make_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions, corpus = blocks("docs/environments/custom.md", "json")
    assert [questions, corpus] == blocks("docs/quick_start.md", "json")
    (tmp_path / "questions.jsonl").write_text(questions, encoding="utf-8")
    (tmp_path / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(blocks("docs/environments/custom.md", "python")[0], "custom.py", "exec"), names)
    _, _, _, _, info = names["env"].step(names["env"].unwrapped.tokenizer.encode("<search> Tokarev </search>"))
    assert info["turn_record"].passages[0].title == "Sergei Tokarev"


def test_the_tokens_counted_on_the_page_of_concepts_are_those_of_the_episode() -> None:
    rows = re.findall(r"^\| .*? \| (\d+) \| (\d+) \| ([01]) \|$", text_of("docs/concepts.md"), flags=re.MULTILINE)
    env: Any = gym.make("SearchQA-World-v0", hops=2).unwrapped
    observation, _ = env.reset(seed=0)
    counted = [(len(observation), len(observation), 0)]
    for written in ("<search> Tubu </search>", "<search> Bovi </search>", "<answer> Kila </answer>"):
        ids = env.tokenizer.encode(written)
        counted.append((len(ids), counted[-1][1] + len(ids), 1))
        _, _, _, _, info = env.step(ids)
        record = info["turn_record"]
        if len(record.env_tokens):
            counted.append((len(record.env_tokens), counted[-1][1] + len(record.env_tokens), 0))
    assert [tuple(map(int, row)) for row in rows] == counted
    assert int(record.loss_mask.sum()) == sum(new for new, _, mask in counted if mask) == 15


@pytest.mark.parametrize("page", ["README.md", *DOCS])
def test_commands_on_a_page_exist(page: str) -> None:
    said = [line for block in blocks(page, "bash") for line in re.findall(r"(?:^|&& |; )searchqa ([\w-]+)", block, flags=re.MULTILINE)]
    assert set(said) <= set(cli.COMMANDS)
    targets = set(re.findall(r"^([a-z-]+):.*##", text_of("Makefile"), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks(page, "bash")), flags=re.MULTILINE)) <= targets


def test_algorithms_on_their_page_are_those_that_can_be_named() -> None:
    said = re.findall(r"^\| `(\w+)` \|", text_of("docs/algorithms.md").partition("## Settings")[0], flags=re.MULTILINE)
    assert sorted(said) == sorted(file.stem for file in (ROOT / "conf" / "searchqa_conf" / "algo").glob("*.yaml"))


def lines_of(page: str) -> list[list[str]]:
    """The words of each line of a page that trains or measures; those with something left out, or with files of the reader's, are not among them."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            for part in line.split("&&"):
                if re.match(r" *searchqa (train|sft|eval) ", part) and not re.search(
                    r"\.\.\. |<|resume=|plugins=| --| score | judge ", part
                ):
                    words = shlex.split(part, comments=True)[1:]
                    # of several values for as many runs, the first
                    found.append(
                        [
                            re.sub(r"^([\w.@/]+=[^\[{(,]*),.*$", r"\1", word)
                            for word in words
                            if word != "-m" and not re.search(r"=\w+\(", word)
                        ]
                    )
    return found


def unknown_lines(page: str) -> list[list[str]]:
    return [words for words in lines_of(page) if cli.main([*words, "--cfg", "job"]) != 0]


OFTEN_READ = ["docs/quick_start.md", "docs/algorithms.md", "docs/environments/hotpotqa.md"]


@pytest.mark.parametrize("page", OFTEN_READ)
def test_lines_of_a_page_are_configurations_of_their_command(page: str) -> None:
    assert lines_of(page)
    assert not unknown_lines(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", *(page for page in DOCS if page not in OFTEN_READ)])
def test_lines_of_other_pages_too(page: str) -> None:
    assert not unknown_lines(page)


def test_the_page_of_settings_names_the_defaults() -> None:
    from searchqa_agents.algorithm import AlgorithmConfig

    defaults = AlgorithmConfig()
    rows = re.findall(r"^\| (`algo\..*?) \| (.*?) \|", text_of("docs/algorithms.md"), flags=re.MULTILINE)
    assert len(rows) >= 8
    for names, values in rows:
        for name, said in zip(re.findall(r"`algo\.(\w+)`", names), values.split(", "), strict=True):
            value = getattr(defaults, name)
            assert (said == "null" and value is None) or (said == value if isinstance(value, str) else float(said) == value), name
