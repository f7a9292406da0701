"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder of this project's caches: ``$SEARCHQA_CACHE`` where set, else the user's cache folder for ``searchqa``.

    The folder is not created.
    """
    override = os.environ.get("SEARCHQA_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("searchqa", appauthor=False)
