"""Download of a repository of the hub: pinned to a commit, checked against the hub's own sums, and those put on record."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from imagemill.shared.errors import ConfigurationError, ImagemillError, ServiceUnavailable, sentence
from imagemill.shared.settings import WeightsSettings
from imagemill.shared.urls import shown
from imagemill.worker.models.catalogue import Repository
from imagemill.worker.models.checksums import read_json, write_json
from imagemill.worker.models.download import MAX_BYTES, SPARE
from imagemill.worker.models.repositories import RECORD, folder_of, state, sums, wanted

HUB = "https://huggingface.co"


def pull(one: Repository, settings: WeightsSettings, revision: str | None = None) -> Literal["there", "pulled"]:
    """See to it that a repository's files are there and are those of its commit; `there` means that they were.

    `revision`, a commit, tag or branch, goes before the pinned one; what it was resolved to is put on record. Raises
    ServiceUnavailable where the hub can't be reached (what has come is kept), and ConfigurationError where it has no such
    thing, where a file is not what the hub says it is (which is removed), and where the disk can't take it.
    """
    weights = settings.folder.expanduser()
    folder, asked = folder_of(weights, one), revision or one.revision
    record = read_json(folder / RECORD)
    if record.get("commit") == asked and state(weights, one) == "there":
        return "there"
    endpoint = _endpoint(settings)
    try:
        commit, files = _listed(one, endpoint, asked)
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(one, folder, files)
        (folder / RECORD).unlink(missing_ok=True)  # until all is there again
        if not sys.stderr.isatty():
            huggingface_hub.utils.disable_progress_bars()
        huggingface_hub.snapshot_download(
            one.source, revision=commit, allow_patterns=list(files), local_dir=folder, endpoint=endpoint, token=False
        )
        told = {name: _checked(folder / name, expected) for name, expected in files.items()}
        write_json(folder / RECORD, {"repository": one.source, "asked": asked, "commit": commit, "files": told})
    except ImagemillError:
        raise
    except Exception as error:
        raise _translated(error, f"{one.source} at {asked}", folder) from error
    return "pulled"


def _listed(one: Repository, endpoint: str, revision: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The commit that a revision is, and of the files that are loaded size and sum: of LFS SHA-256, of others git's."""
    info = huggingface_hub.HfApi(endpoint=endpoint, token=False).model_info(one.source, revision=revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    names = wanted(one, siblings)
    missing = [pattern for pattern in one.files if not wanted(one, [*names], pattern)]
    if not info.sha or any(pattern.endswith(".safetensors") for pattern in missing):
        raise ConfigurationError(f"{one.source} at {revision} has no {', '.join(missing) or 'commit'}")
    files = {}
    for name in names:
        found = siblings[name]
        checksum = f"sha256:{found.lfs.sha256}" if found.lfs else f"git:{found.blob_id}"
        files[name] = {"size": found.lfs.size if found.lfs else found.size, "hub": checksum}
    return info.sha, files


def _checked(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """What is put on record of a file that is right; one that isn't is removed."""
    sha256, blob = sums(path)
    kind, _, wanted_sum = expected["hub"].partition(":")
    if wanted_sum != {"sha256": sha256, "git": blob}[kind]:
        path.unlink()
        raise ConfigurationError(f"{path} is not the file that the hub says it is and was removed: {expected['hub']} is wanted")
    return {**expected, "size": path.stat().st_size, "sha256": sha256}


def _check_room(one: Repository, folder: Path, files: dict[str, dict[str, Any]]) -> None:
    needed = sum(told["size"] or 0 for told in files.values())
    if needed > MAX_BYTES:
        raise ConfigurationError(f"{one.source} is {needed / 1e9:.0f} GB large: that is not what was pinned")
    missing = sum(told["size"] or 0 for name, told in files.items() if not (folder / name).is_file())
    free = shutil.disk_usage(folder).free
    if free < missing + SPARE:
        message = f"{folder} has {free / 1e6:.0f} MB free and {one.name} needs {(missing + SPARE) / 1e6:.0f} MB"
        raise ConfigurationError(f"{message}: free some, or set IMAGEMILL_WEIGHTS__FOLDER to a larger disk")


def _endpoint(settings: WeightsSettings) -> str:
    """The hub, or the mirror that has it under its own paths."""
    if settings.mirror is None:
        return HUB
    if urlsplit(settings.mirror).scheme not in ("http", "https") or not urlsplit(settings.mirror).netloc:
        raise ConfigurationError(f"IMAGEMILL_WEIGHTS__MIRROR is no http or https address: {shown(settings.mirror)}")
    return settings.mirror.rstrip("/")


def _translated(error: Exception, what: str, folder: Path) -> Exception:
    """Our error for what the hub's library raises; what is none of its business as it is."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OSError) and error.errno is not None and status is None:
        return ConfigurationError(f"{folder} can't be written: {sentence(error)}")
    if isinstance(error, HFValidationError) or (status is not None and status < 500 and status != 429):
        return ConfigurationError(f"the hub has no {what}: {sentence(error)}")
    library = type(error).__module__.partition(".")[0]
    if (
        isinstance(error, OSError)
        or status is not None
        or library.startswith(("huggingface_hub", "httpx", "httpcore", "hf_xet"))
    ):
        return ServiceUnavailable(f"the hub does not give {what}: {sentence(error)}")
    return error
