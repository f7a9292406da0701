"""Models by name on the model hub: what goes wrong there as typed errors that name the way out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from searchqa_envs.errors import ConfigurationError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WAYS = (
    "Or fetch it elsewhere (hf download {name} --local-dir FOLDER) and give the folder in place of the name: agent.checkpoint=FOLDER, or "
    "start=FOLDER in training."
)


def is_hub_name(name: object) -> bool:
    """Whether it is a name such as owner/model, and no folder of this machine."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and not Path(name).exists()


def check_on_hub(name: str) -> None:
    """Raise ``ConfigurationError`` if neither the hub nor its cache gives out ``name``. Fetches one small file, which the tokenizer needs anyway."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    with hub_errors(name):
        try:
            hf_hub_download(name, "tokenizer_config.json")
        except RemoteEntryNotFoundError:
            return  # the repository is there; what it lacks is said by who needs it
        except LocalEntryNotFoundError:
            if not isinstance(try_to_load_from_cache(name, "tokenizer.json"), str):
                raise


@contextmanager
def hub_errors(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of ``huggingface_hub`` and of transformers' loading inside into ``ConfigurationError``."""
    from huggingface_hub.errors import HfHubHTTPError

    # its versions stand on different HTTP clients, which raise errors of their own for a connection that breaks
    client_error: type[BaseException] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (OSError, ValueError, client_error) as error:
        raise ConfigurationError(_said(os.fspath(name), error)) from error


def _said(name: str, error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    if Path(name).exists():
        return f"The model in {name} cannot be loaded: {error}"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        why = f"{endpoint} gives out {name} only to those who have accepted its conditions: accept them on its page, and set $HF_TOKEN."
    elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        why = f"There is no model {name} on {endpoint}, or it is private: check the name; for a private one set $HF_TOKEN."
    elif any(isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError) for cause in causes) or not isinstance(
        error, OSError | ValueError
    ):
        why = f"{name} is not in the cache of the model hub, and {endpoint} cannot be reached: check the network, $HF_ENDPOINT and $HF_HUB_OFFLINE."
    else:
        why = f"The model {name} of {endpoint} cannot be loaded: {error}"
    return f"{why} {_WAYS.format(name=name)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def hub_revision(name: str) -> str | None:
    """The commit of the hub that a name's files in the cache are of, for stamps; None for a folder, or where none are there."""
    if not is_hub_name(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None
