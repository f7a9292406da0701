"""Download of published sets from the hub: pinned or recorded revision, checked sums, nothing half-done taken for whole."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from searchqa_envs.datasets.location import RECORD_NAME, SetFiles, cache_data_root, find_set, read_record
from searchqa_envs.datasets.registry import COLLECTIONS, DATASETS, HubFiles
from searchqa_envs.errors import ConfigurationError, DataError

logger = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TIMEOUT_S = 10.0


class DownloadError(DataError):
    """A download could not be made or finished; the message says why and what to do. What was there before is unharmed."""


class ChecksumError(DownloadError):
    """A file that arrived, or that lies here, is not the one its checksum names."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository, and the hash that it must have (sha256 for large files, else git's blob sha1)."""

    path: str
    size: int
    sha256: str | None
    blob_sha1: str


def hub_files(name: str, origin: str | None = None) -> HubFiles:
    """Where a set (or one of the other things to download) is on the hub. ``origin`` chooses among several; default: the first."""
    if name in COLLECTIONS and origin is None:
        return COLLECTIONS[name]
    if name not in DATASETS:
        raise ConfigurationError(f"what can be downloaded is one of {', '.join([*DATASETS, *COLLECTIONS])}; got {name!r}.")
    info = DATASETS[name]
    if origin is None:
        return info.hub
    if origin not in info.other_hubs:
        others = ", ".join(info.other_hubs) or "no other"
        raise ConfigurationError(f"{name} comes from {info.hub.repo}; other origins: {others}; got {origin!r}.")
    return info.other_hubs[origin]


def download_set(
    name: str, root: Path | None = None, *, revision: str | None = None, origin: str | None = None, force: bool = False
) -> SetFiles:
    """Download a set and return its files; see :func:`download_files`."""
    root = cache_data_root() if root is None else root
    folder = download_files(name, root, revision=revision, origin=origin, force=force)
    found = find_set(name, root)
    if found is None:
        raise DownloadError(
            f"{folder} holds no question files after the download of {name}. Its repository may have changed: give revision=<older one>."
        )
    return found


def download_files(name: str, root: Path, *, revision: str | None = None, origin: str | None = None, force: bool = False) -> Path:
    """Download a set (or ``wiki18``, ``nq_hotpotqa_train``) to ``<root>/<name>`` and return that folder.

    The revision is the one given, else the one recorded at the first download, else the one pinned, else the newest, which is recorded in
    ``searchqa-data.json`` beside the files. Files are fetched to a folder of their own, resumed when the connection breaks, compared with
    the hub's checksum, and moved to their place when all of them are there. A finished download is not repeated unless ``force``.

    Raises
    ------
    DownloadError
        The hub cannot be reached or refuses, a file does not match its checksum, or the disk is full.
    """
    hub = hub_files(name, origin)
    folder, staging = root / name, root / ".partial" / name
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"cannot make the folder {root}: {error}. Set SEARCHQA_CACHE or give --data-dir to choose another.") from error
    from filelock import FileLock

    with FileLock(root / f".{name}.lock"):
        record = read_record(folder)
        if not record and folder.is_dir() and any(folder.iterdir()):
            raise DownloadError(
                f"{folder} has files that were not downloaded, and they are left alone. Choose another --data-dir, or move them."
            )
        if record and record.get("repo") != hub.repo:
            raise DownloadError(
                f"{folder} has the files of {record.get('repo')}, not of {hub.repo}. Choose another --data-dir, or delete that folder."
            )
        recorded = record.get("revision")
        if not force and record.get("complete") and revision in (None, recorded) and all(_same_size(folder, record)):
            return folder
        wanted = revision or recorded or hub.revision
        with _typed_errors(name, hub, wanted):
            commit, files = _list_files(hub, wanted)
            _check_space(name, root, staging, files)
            unfinished = {"repo": hub.repo, "revision": commit, "complete": False, "files": {}}
            if not record.get("complete"):
                # On record before the first byte, so that a download taken up again later is of the same revision.
                write_record(folder, unfinished)
            logger.info("downloading %s from %s at %s to %s", name, hub.repo, commit, folder)
            sums = {file.path: _fetch(hub.repo, commit, file, staging) for file in files}
            write_record(folder, unfinished)
            entries = {}
            for file in files:
                relative = file.path.removeprefix(f"{hub.folder}/") if hub.folder else file.path
                target = folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / file.path, target)
                entries[relative] = {"sha256": sums[file.path], "size": file.size}
            for stale in set(record.get("files", {})) - set(entries):
                (folder / stale).unlink(missing_ok=True)
            write_record(folder, {"repo": hub.repo, "revision": commit, "complete": True, "files": entries})
            shutil.rmtree(staging)
    return folder


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a folder's record, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RECORD_NAME}.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    os.replace(temporary, folder / RECORD_NAME)


def file_sums(path: Path) -> tuple[str, str]:
    """The sha256 of a file, and the sha1 that git gives it as a blob."""
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def _same_size(folder: Path, record: dict[str, Any]) -> Iterator[bool]:
    for relative, entry in record.get("files", {}).items():
        path = folder / relative
        yield path.is_file() and path.stat().st_size == entry.get("size")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None  # read now: the library reads it only once, when imported


def _list_files(hub: HubFiles, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit that a revision names, and the files of the set in it."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=_endpoint())
    commit = api.dataset_info(hub.repo, revision=revision, timeout=_TIMEOUT_S).sha
    if commit is None:
        raise DownloadError(f"the hub names no commit for {hub.repo} at revision {revision!r}. Give another revision.")
    files = []
    for folder in dict.fromkeys(pattern.rpartition("/")[0] for pattern in hub.patterns):
        for item in api.list_repo_tree(hub.repo, path_in_repo=folder or None, revision=commit, repo_type="dataset"):
            if isinstance(item, RepoFile) and any(fnmatchcase(item.path, pattern) for pattern in hub.patterns):
                files.append(RemoteFile(item.path, item.size, item.lfs.sha256 if item.lfs else None, item.blob_id))  # noqa: PERF401, clearer so
    if not files:
        raise DownloadError(
            f"{hub.repo} at {commit} has no files like {', '.join(hub.patterns)}. The repository may have been rearranged: give an older revision."
        )
    return commit, files


def _check_space(name: str, root: Path, staging: Path, files: list[RemoteFile]) -> None:
    fetched = sum((staging / file.path).stat().st_size for file in files if (staging / file.path).is_file())
    needed, free = sum(file.size for file in files) - fetched, shutil.disk_usage(root).free
    if needed > free:
        raise DownloadError(
            f"{name} needs {needed / 1e9:,.1f} GB more in {root}, and {free / 1e9:,.1f} GB are free. "
            "Free some space, or choose another place with SEARCHQA_CACHE or --data-dir."
        )


def _fetch(repo: str, commit: str, file: RemoteFile, staging: Path) -> str:
    """Fetch one file into the staging folder, check it, and return its sha256."""
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repo, file.path, repo_type="dataset", revision=commit, local_dir=staging, endpoint=_endpoint()))
    sha256, blob = file_sums(path)
    expected, found, kind = (file.sha256, sha256, "sha256") if file.sha256 else (file.blob_sha1, blob, "git blob sha1")
    if found != expected:
        path.unlink()
        raise ChecksumError(
            f"{file.path} of {repo} at {commit} must have the {kind} {expected}, the file that arrived has {found}. It was deleted; run the "
            "download again. If this repeats, a proxy or mirror changes the file: see HF_ENDPOINT and the proxy settings."
        )
    return sha256


@contextmanager
def _typed_errors(name: str, hub: HubFiles, revision: str | None) -> Iterator[None]:
    """Every way in which the hub, the network or the disk can fail, as a :class:`DownloadError` with the way out."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise DownloadError(
            f"downloading {name} needs huggingface_hub, which is not installed: pip install 'searchqa-gym[data]'. Without it: fetch the files "
            f"{', '.join(hub.patterns)} of the data set repository {hub.repo} by hand and set SEARCHQA_DATA to the folder that holds {name}/."
        ) from None
    # The exception that all of the library's HTTP errors, and those of the client it is built on, have in common.
    bases = [base for base in errors.HfHubHTTPError.__mro__ if base.__module__ != "builtins"]
    transport = cast("type[Exception]", bases[-1])
    server = _endpoint() or "the hub"
    try:
        yield
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if _is_offline():
            raise DownloadError(f"HF_HUB_OFFLINE is set, so {name} is not downloaded. Unset it, or copy the files here.") from error
        cause = error.__cause__ or error
        raise DownloadError(
            f"{server} cannot be reached for {hub.repo} ({cause}). Check the network, the proxy, HF_ENDPOINT; then repeat."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{hub.repo} has no revision {revision!r}. Give another one with --revision.") from error
    except errors.GatedRepoError as error:
        raise DownloadError(f"{hub.repo} is open only to those who asked for access. Ask on its page, then run 'hf auth login'.") from error
    except errors.HfHubHTTPError as error:
        raise DownloadError(_status_message(hub.repo, server, error.response.status_code)) from error
    except transport as error:
        raise DownloadError(
            f"{server} cannot be reached for {hub.repo}, or the connection broke ({type(error).__name__}: {error}). "
            "Check the network, the proxy, HF_ENDPOINT; then repeat: files that are complete are kept."
        ) from error
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DownloadError(
                f"the disk is full ({error}). Free some space, or choose another place with SEARCHQA_CACHE or --data-dir; then repeat: files "
                "that are complete are kept."
            ) from error
        raise DownloadError(
            f"{name} could not be stored or did not arrive whole ({error}). Repeat: files that are complete are kept."
        ) from error
    except (ValueError, KeyError) as error:
        raise DownloadError(
            f"{server} does not answer as the hub does ({error!r}). Check HF_ENDPOINT and whether the network asks for a log-in."
        ) from error


def _status_message(repo: str, server: str, status: int) -> str:
    if status == 401:
        return (
            f"{server} refuses {repo} (401): there is no such public data set, or the token is not valid. "
            "Check the token ('hf auth whoami', HF_TOKEN) and HF_ENDPOINT."
        )
    if status == 403:
        return f"{server} forbids {repo} (403). Ask for access on its page, then run 'hf auth login'."
    if status == 404:
        return f"{server} has no {repo}, or not this file of it (404). Check HF_ENDPOINT; a mirror may lack it. Or give another --revision."
    if status == 429:
        return f"{server} asks to slow down (429). Wait some minutes, or log in with 'hf auth login' for a higher limit; then repeat."
    return f"{server} failed with status {status} for {repo}. Repeat later: files that are complete are kept."


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
