"""Griffe extension: docstrings reach mkdocstrings as Markdown, whatever reStructuredText there is in them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from docs_pages import plain_markdown


class MarkdownDocstrings(griffe.Extension):
    """Changes every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **arguments: Any) -> None:
        """Before the docstring of ``obj`` is cut into sections."""
        if obj.docstring is not None:
            obj.docstring.value = plain_markdown(obj.docstring.value)
