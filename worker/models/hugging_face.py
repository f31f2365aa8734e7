"""Downloads a repository from the Hugging Face Hub: pinned to a commit, checked against the hub's checksums, recorded."""

from __future__ import annotations

import glob
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelInfo
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from imagemill.shared.errors import ConfigurationError, ImagemillError, ServiceUnavailable, sentence
from imagemill.shared.settings import WeightsSettings
from imagemill.worker.models.catalogue import Repository
from imagemill.worker.models.checksums import read_json, sha256_of, write_json
from imagemill.worker.models.download import LARGEST, MAX_BYTES, Outcome, check_space, mirror_url
from imagemill.worker.models.repositories import RECORD, folder_of, matching, state

HUB = "https://huggingface.co"


def pull(entry: Repository, settings: WeightsSettings, revision: str | None = None, *, most: int = MAX_BYTES) -> Outcome:
    """Make sure that a repository's files are on disk; `present` means that nothing had to be downloaded.

    `revision`, a commit, tag or branch, overrides the pinned commit; the commit it resolves to is recorded. `most` is the
    maximum of bytes. Raises ServiceUnavailable if the hub can't be reached (files that have arrived are kept), and
    ConfigurationError if it doesn't have the files, if they are too large, if a checksum is wrong (the file is deleted) or if
    the folder can't be written.
    """
    weights = settings.folder.expanduser()
    folder, asked = folder_of(weights, entry), revision or entry.revision
    if read_json(folder / RECORD).get("commit") == asked and state(weights, entry) == "there":
        return "present"
    endpoint = mirror_url(settings) or HUB
    try:
        commit, files = _files_at(entry, endpoint, asked)
        folder.mkdir(parents=True, exist_ok=True)
        present = sum(file["size"] or 0 for name, file in files.items() if (folder / name).is_file())
        check_space(folder, entry.name, sum(file["size"] or 0 for file in files.values()), present=present, most=most)
        (folder / RECORD).unlink(missing_ok=True)  # until the folder is complete again
        if not sys.stderr.isatty():
            huggingface_hub.utils.disable_progress_bars()
        huggingface_hub.snapshot_download(
            entry.source,
            revision=commit,
            allow_patterns=[glob.escape(name) for name in files],
            local_dir=folder,
            endpoint=endpoint,
            token=False,
        )
        checked = {name: _checked(folder / name, expected) for name, expected in files.items()}
        write_json(folder / RECORD, {"repository": entry.source, "asked": asked, "commit": commit, "files": checked})
    except ImagemillError:
        raise
    except Exception as error:
        raise _translated(error, f"{entry.source} at {asked}", folder) from error
    return "pulled"


SMALL = ("*.json", "*/*.json", "*/*.txt")
"""Patterns for the files of a repository that say what it is."""


def files_at(source: str, settings: WeightsSettings, revision: str) -> tuple[str, list[str]]:
    """The commit that a revision of any repository resolves to, and its files. Raises as `pull` does."""
    try:
        hub = huggingface_hub.HfApi(endpoint=mirror_url(settings) or HUB, token=False)
        info = hub.model_info(source, revision=revision)
    except Exception as error:
        raise _translated(error, f"{source} at {revision}", settings.folder) from error
    if not info.sha:
        raise ConfigurationError(f"{source} at {revision} has no commit")
    return info.sha, [*_siblings(info)]


def fetched(source: str, commit: str, files: Sequence[str], settings: WeightsSettings, work: Path) -> Path:
    """The folder below `work` with these files of a repository, or those that match, checked. Raises as `pull` does."""
    entry = Repository(source, source, commit, "", tuple(files), 0)
    folder = folder_of(work, entry)
    (folder / RECORD).unlink(missing_ok=True)  # of files that were fetched before
    pull(entry, settings.model_copy(update={"folder": work}), most=LARGEST)
    return folder


def _files_at(entry: Repository, endpoint: str, revision: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The commit that a revision resolves to, and size and checksum of each file to load: SHA-256 in LFS, else git's."""
    hub = huggingface_hub.HfApi(endpoint=endpoint, token=False)
    info = hub.model_info(entry.source, revision=revision, files_metadata=True)
    siblings = _siblings(info)
    missing = [pattern for pattern in entry.files if not matching(siblings, [pattern])]
    if not info.sha or any(pattern.endswith(".safetensors") for pattern in missing):
        raise ConfigurationError(f"{entry.source} at {revision} has no {', '.join(missing) or 'commit'}")
    chosen = [siblings[name] for name in matching(siblings, entry.files)]
    return info.sha, {
        file.rfilename: {"size": file.size, "hub": f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"}
        for file in chosen
    }


def _siblings(info: ModelInfo) -> dict[str, Any]:
    """What the hub says about each file of a repository, by name. Raises ConfigurationError if one would lie elsewhere."""
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    if wrong := [name for name in siblings if name.startswith("/") or ".." in name.split("/")]:
        raise ConfigurationError(f"{info.id} has a file outside of its folder, {wrong[0]!r}")
    return siblings


def _checked(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The record of a file with the right checksum; a file with another one is deleted."""
    sha256, size = sha256_of(path), path.stat().st_size
    actual = f"sha256:{sha256}"
    if expected["hub"].startswith("git:"):  # not in LFS, so small
        blob = f"blob {size}\0".encode() + path.read_bytes()
        actual = f"git:{hashlib.sha1(blob, usedforsecurity=False).hexdigest()}"
    if actual != expected["hub"]:
        path.unlink()
        raise ConfigurationError(f"{path} does not match the hub's checksum, {expected['hub']}, and was deleted")
    return {**expected, "size": size, "sha256": sha256}


def _translated(error: Exception, what: str, folder: Path) -> Exception:
    """Our error for one that the hub's library raised; errors from elsewhere are returned unchanged."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OSError) and error.errno is not None and status is None:
        return ConfigurationError(f"{folder} can't be written: {sentence(error)}")
    if isinstance(error, GatedRepoError):
        return ConfigurationError(
            f"{what} is gated: its owners ask everybody to accept their terms, and imagemill has no account on the hub; "
            "download it with yours, and add the folder or file"
        )
    if isinstance(error, RepositoryNotFoundError):  # also the answer for those that are private
        return ConfigurationError(f"the hub has no {what}, or it is not public")
    if isinstance(error, HFValidationError) or (status is not None and status < 500 and status != 429):
        return ConfigurationError(f"the hub has no {what}: {sentence(error)}")
    from_library = type(error).__module__.startswith(("huggingface_hub", "httpx", "httpcore", "hf_xet"))  # also httpx2
    if isinstance(error, OSError) or status is not None or from_library:
        return ServiceUnavailable(f"the hub did not deliver {what}: {sentence(error)}")
    return error
