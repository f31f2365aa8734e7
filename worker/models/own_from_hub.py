"""Makes models of the operator's own from the Hugging Face Hub: of a repository in diffusers' layout, or of a file in one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from imagemill.shared.errors import ConfigurationError, ServiceUnavailable, UsageError
from imagemill.shared.settings import WeightsSettings
from imagemill.worker.models import hugging_face, own_diffusion
from imagemill.worker.models.adding import Made
from imagemill.worker.models.sources import OnHub, format_of
from imagemill.worker.models.tensor_names import Contents


@dataclass(frozen=True)
class AtCommit:
    """A repository, or a file in one, at the commit that a revision resolved to, and the repository's files."""

    place: OnHub
    commit: str
    files: Sequence[str]

    @property
    def source(self) -> str:
        """Where the model is from, for its record."""
        return f"{self.place.called}@{self.commit}"


def resolved(place: OnHub, revision: str, settings: WeightsSettings) -> AtCommit:
    """Ask the hub. Raises ConfigurationError if it doesn't have this, and ServiceUnavailable if it can't be reached."""
    commit, files = hugging_face.files_at(place.repository, settings, revision)
    if place.file is not None and place.file not in files:
        raise ConfigurationError(f"{place.repository} at {revision} has no {place.file}")
    return AtCommit(place, commit, files)


def make(
    name: str,
    found: AtCommit,
    settings: WeightsSettings,
    vae: str | None,
    control: str | None,
    check: Callable[[Contents], Contents],
    work: Path,
) -> Made:
    """A model from the hub, made in the folder `work`. `check` returns its contents, or raises what it has against them.

    Raises ConfigurationError, UsageError if something has to be done first, and ServiceUnavailable if the hub stops answering;
    after the latter two, complete files are kept for the next try.
    """
    place, weights = found.place, settings.folder.expanduser()
    with _kept_for_retry(work.with_name(f".fetching-{name}")) as download:
        if place.file is not None:
            path = hugging_face.fetched(place.repository, found.commit, [escape(place.file)], settings, download) / place.file
            if format_of(path) == "onnx":
                raise ConfigurationError(f"{place.called} is not a file of tensors: download it and add the file")
            contents = check(own_diffusion.contents_of(path, place.called))
            return own_diffusion.from_file(name, path, contents, weights, vae, control, work, place.called)
        folder = hugging_face.fetched(place.repository, found.commit, hugging_face.SMALL, settings, download)
        contents = check(own_diffusion.contents_of_folder(folder, found.files, place.called))
        hugging_face.fetched(place.repository, found.commit, [*map(escape, contents.files)], settings, download)
        return own_diffusion.from_folder(name, folder, contents, weights, vae, control, work, place.called)


@contextmanager
def _kept_for_retry(folder: Path) -> Iterator[Path]:
    """A folder for downloads, which is deleted unless the same command can succeed later."""
    try:
        yield folder
    except (KeyboardInterrupt, UsageError):
        raise
    except ServiceUnavailable as error:
        raise ServiceUnavailable(f"{error.message}; complete files are kept in {folder} until you try again") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)
