"""Where a model or a data set comes from: the package, a file, a folder, or the Hub. Decided here, once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CourseError
from ..settings import EMBEDDED, Settings
from ..worlds import embedded
from .disk import file_hash

UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".ckpt")  # pickled weights
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")  # of data
FILES = (*SUFFIXES, *UNSAFE, ".gguf")  # a name that ends so is meant as a file, also where there is none
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """What `--model` or `--dataset` names.

    what: "model" or "dataset"; kind: "embedded", "file", "folder" or "hub"; name: as it was given; revision: the commit
    that was asked for, of the Hub.
    """

    what: str
    kind: str
    name: str
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The file or folder."""
        return Path(self.name)

    @property
    def label(self) -> str:
        """A name to show: nothing of this machine's folders is in it."""
        return self.path.name if self.kind in ("file", "folder") else self.name

    @property
    def hub_id(self) -> str | None:
        """The name, where it is of the Hub and has the form of its names; None elsewhere."""
        return self.name if self.kind == "hub" and _HUB_ID.fullmatch(self.name) else None

    def commit(self) -> str | None:
        """The 40-hex commit on the Hub: the one asked for, else the newest, looked up once; None from elsewhere.

        Raises CourseError where the name is no Hub id, the revision is no commit, or the Hub cannot be reached.
        """
        return _commit(self.what, self.name, self.revision) if self.kind == "hub" else None

    def identity(self, files: list[Path]) -> dict[str, Any]:
        """What decides the content: name and commit, or the sha256 of each of these files (of a file or folder)."""
        if self.kind == "embedded":
            return {"name": EMBEDDED, "sha256": embedded.fingerprint()}
        if self.kind == "hub":
            return {"name": self.name, "revision": self.revision}
        if self.kind == "file":
            return {"name": self.label, "sha256": file_hash(self.path)}
        return {"name": self.label, "sha256": {f.relative_to(self.path).as_posix(): file_hash(f) for f in files}}


def source_of(settings: Settings, what: str) -> Source:
    """The source of the settings' "model" or "dataset"."""
    name, revision = getattr(settings, what), getattr(settings, f"{what}_revision")
    if name == EMBEDDED:
        return Source(what, "embedded", name)
    if os.path.isdir(name):
        return Source(what, "folder", name)
    if os.path.exists(name) or name.lower().endswith(FILES):
        return Source(what, "file", name)
    return Source(what, "hub", name, revision)


@cache  # one answer per process: weights, tokenizer and the record must be of the same commit
def _commit(what: str, name: str, revision: str | None) -> str:
    if not _HUB_ID.fullmatch(name):
        raise CourseError(f"{what} {name!r} is neither an existing path nor a Hub id (owner/name)")
    if revision is not None:
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise CourseError(f"{what}_revision is {revision!r}, but must be a commit of 40 hex digits")
        return revision
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name) if what == "model" else HfApi().dataset_info(name)
    except Exception as error:  # network, HTTP and offline errors have no common base
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CourseError(
            f"cannot look up {what} {name!r} on the Hub ({first}); check the name and the network, or give "
            f"--{what}-revision with a commit that is in the local cache"
        ) from error
    return str(info.sha)
