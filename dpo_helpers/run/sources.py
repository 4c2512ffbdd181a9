"""Where a model or a data set comes from: the package, a file, a folder, or the Hub. Decided here, once."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

from ..errors import CourseError, DataError, ModelError
from ..settings import EMBEDDED, Settings
from ..untrusted import visible
from ..worlds import embedded
from .disk import file_hash

UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".ckpt")  # pickled weights
ROWS = (".jsonl", ".jsonl.gz", ".parquet")  # of data, and of nothing else
SUFFIXES = (*ROWS, ".json", ".csv")  # of data
FILES = (*SUFFIXES, *UNSAFE, ".gguf")  # a name that ends so is meant as a file, also where there is none
SILENCE = 30.0  # seconds without a byte from the Hub after which it is given up
PATIENCE = 5.0  # seconds after which a line says that the Hub is waited for
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # "./model" is a path


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


class _Visible(io.TextIOBase):
    """Standard output as it is, but for text that would act."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        return int(self.stream.write(visible(text)))

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def opening() -> Iterator[None]:
    """While inside, what libraries log, warn of or print is `untrusted.visible`: it quotes the files that they open.

    Standard error keeps the progress bars, which move the cursor; what is logged or warned of gets there filtered.
    """
    record, warning = logging.getLogRecordFactory(), warnings.formatwarning

    def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = record(*args, **kwargs)
        made.msg, made.args = visible(made.getMessage()), None
        return made

    logging.setLogRecordFactory(_record)
    warnings.formatwarning = lambda *args, **kwargs: visible(warning(*args, **kwargs))
    try:
        with redirect_stdout(sys.stdout and _Visible(sys.stdout)):  # there is none where it was closed
            yield
    finally:
        logging.setLogRecordFactory(record)
        warnings.formatwarning = warning


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
        with _asking(what, name):
            info = HfApi().model_info(name) if what == "model" else HfApi().dataset_info(name)
    except Exception as error:  # network, HTTP and offline errors have no common base
        raise CourseError(
            f"cannot look up {what} {name!r} on the Hub ({first_line(error)}); check the name and the network, or give "
            f"--{what}-revision with a commit that is in the local cache"
        ) from error
    return str(info.sha)


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


@contextmanager
def _asking(what: str, name: str) -> Iterator[None]:
    """What is asked of the Hub in here ends with a TimeoutError once no byte comes for SILENCE seconds.

    The library's own limits differ by request, some have none, and each is tried six times. A line says it when this
    takes longer than PATIENCE.
    """
    from huggingface_hub import get_session

    asked: dict[tuple[str, str, str | None], float] = {}  # when each request was made first

    def _key(request: Any) -> tuple[str, str, str | None]:  # with the place where a download goes on
        return request.method, str(request.url), request.headers.get("range")

    def _limit(request: Any) -> None:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), SILENCE)
        now = time.monotonic()
        if now - asked.setdefault(_key(request), now) >= SILENCE:
            raise TimeoutError(f"it sent nothing for {SILENCE:g} seconds")

    def _refused(response: Any) -> None:  # an answer too: "later", for example
        if response.status_code >= 400:
            asked.pop(_key(response.request), None)
            for wish in ("retry-after", "ratelimit"):  # the library would sleep as long as it says: hours, if it likes
                response.headers.pop(wish, None)

    hooks, logger = get_session().event_hooks, logging.getLogger("huggingface_hub")
    level = logger.level
    line = f"waiting for the Hub: {what} {name}; it is given up when nothing comes for {SILENCE:g} seconds"
    notice = Timer(PATIENCE, print, [line], {"flush": True})
    notice.daemon = True
    notice.start()
    hooks["request"].append(_limit)
    hooks["response"].append(_refused)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        notice.cancel()
        hooks["request"].remove(_limit)
        hooks["response"].remove(_refused)
        logger.setLevel(level)


def fetched(source: Source, wanted: tuple[str, ...]) -> Path:
    """The folder of a Hub model or data set in the Hub's cache, at its commit, fetched if it is not there yet.

    wanted: patterns of the names of its files. Each is what the Hub says it is, whenever it was fetched. Raises
    ModelError or DataError where one is damaged, or where they cannot be had.
    """
    from huggingface_hub import snapshot_download

    what, commit = source.what, source.commit()
    kind = ModelError if what == "model" else DataError
    try:
        with _asking(what, source.name):
            folder = Path(snapshot_download(source.name, repo_type=what, revision=commit, allow_patterns=list(wanted)))
    except Exception as error:  # network, HTTP and offline errors have no common base
        raise kind(
            f"cannot get {'model' if what == 'model' else 'data set'} {source.name!r} from the Hub or its cache "
            f"({first_line(error)}); check --{what}, the network, HF_ENDPOINT and HF_HUB_OFFLINE, or use "
            + ("--profile mini, which needs no network" if what == "model" else "--dataset FILE")
        ) from error
    for file in folder.rglob("*"):
        blob = file.resolve()
        if blob.is_file() and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name) and blob.name != _hub_name(blob):
            raise kind(f"{blob} in the Hub's cache is damaged (its name is its hash): delete it and run this again")
    return folder


def _hub_name(blob: Path) -> str:
    """The name that the Hub's cache gives to a file of this content: sha256 of a large file, git's sha1 of a small."""
    if len(blob.name) == 64:
        return file_hash(blob)
    content = blob.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
