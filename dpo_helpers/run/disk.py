"""Folders on disk that are written whole or not at all, with a manifest of hashes that detects any damage.

A folder is written under a temporary name beside its place, flushed to disk, and then renamed into place in one
step, so a reader never sees half of one. `manifest.json` holds what it was made from and the sha256 of each file;
`manifest.sha256` beside it holds the sha256 of what the manifest says, however it is laid out. While a folder is
made, its maker holds a lock, and a second process is told who that is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..errors import ArtefactError
from ..show.files import flush, refused, temporary_name, whole

MANIFEST, SEAL = "manifest.json", "manifest.sha256"
FROZEN = "frozen"  # folder of a run for the frozen blocks' output, which may be deleted at any time
_REFUSALS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "EIO", "EEXIST", "ENOTDIR", "ENAMETOOLONG")
_DISK_ERRORS = {getattr(errno, name) for name in _REFUSALS if hasattr(errno, name)}  # not all on each system
WAIT_SECONDS = float(os.environ.get("DPO_WAIT_SECONDS", "5"))  # for a process that holds a lock: a small artefact


_HASHES: dict[tuple[int, ...], str] = {}  # of files as they were when they were read, by what changes with them
SETTLED = 2.0  # seconds after its last change, from when on a file's times tell whether it changed again


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex. A settled file is read once per process as long as it is not changed."""
    found = path.stat()
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    is_settled = time.time() - max(found.st_mtime, found.st_ctime) >= SETTLED
    if is_settled and key in _HASHES:
        return _HASHES[key]
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if is_settled:  # before, the same times may come to belong to another content
        _HASHES[key] = digest.hexdigest()
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """sha256 of a JSON value, in hex; independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def set_aside(folder: Path) -> Path:
    """Rename an artefact to the next free <name>.old-<n>, so that making it again loses nothing."""
    n = 1
    while (target := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    folder.rename(target)
    return target


def require_idle(run_dir: Path, mine: Path | None = None) -> None:
    """ArtefactError, saying who it is, if a process is making something in a run, which may need what is there now.

    mine: what this process itself is making.
    """
    for lock in run_dir.rglob(".*.lock"):
        folder = lock.with_name(lock.name[1:].removesuffix(".lock"))
        if folder != mine:
            with holding(folder):
                pass


def start_over(run_dir: Path) -> None:
    """Move a run aside, so that the next one begins with nothing; a printed line says where it is now.

    The frozen blocks' output, which any run makes again, is deleted. Raises ArtefactError if a process is making
    something in it, or the disk refuses.
    """
    if not run_dir.exists():
        return
    require_idle(run_dir)
    shutil.rmtree(run_dir / FROZEN, ignore_errors=True)  # up to some gigabytes, of no use to a run that is set aside
    try:
        print(f"{run_dir} is moved aside to {set_aside(run_dir)}")
    except OSError as error:
        raise refused(run_dir, error) from error


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the right to make an artefact; what a killed maker left half-written is removed.

    Raises ArtefactError where another process holds it, saying which one, since when and what to do, or where the disk
    refuses.
    """
    holder = folder.with_name(f".{folder.name}.holder")
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=WAIT_SECONDS)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ArtefactError(
            f"{folder} is being made by {_who(holder)}: wait until it is done and run this again, or use another "
            "--runs-dir"
        ) from None
    except OSError as error:
        raise refused(folder, error) from error
    try:
        remove_halves(folder)
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        with suppress(OSError):  # a note for people: the lock works without it
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            note = f"process {os.getpid()} on {socket.gethostname()} ({command}), since {since}"
            holder.write_text(note, encoding="utf-8", errors="backslashreplace")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _who(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return "another process"


def remove_halves(folder: Path) -> None:
    """Remove what a killed process left of `writing` this folder; only its one maker may call this."""
    for left in folder.parent.glob(f".{folder.name}-????????"):  # as `temporary_name` does
        shutil.rmtree(left, ignore_errors=True)


@dataclass
class Draft:
    """A folder that is being written: `folder` is to be filled, `about` may be added to until the end."""

    folder: Path
    about: dict[str, Any] = field(default_factory=dict)


@contextmanager
def writing(folder: Path, made_from: Mapping[str, Any]) -> Iterator[Draft]:
    """Write a folder: yields a `Draft` in a temporary place; on success that becomes `folder`, with its manifest.

    made_from: what decides the content (settings, hashes of inputs), compared by `changed_keys`. The draft's `about` is
    what is good to know (versions, device, time). An earlier folder of that name is set aside. On an error the
    temporary place is removed and nothing else has changed; ArtefactError names the path where the disk refuses.
    """
    temporary = temporary_name(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        draft = Draft(temporary)
        yield draft
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        hashes = {p.relative_to(temporary).as_posix(): file_hash(p) for p in files}
        manifest = {"made_from": dict(made_from), "about": draft.about, "files": hashes}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        (temporary / SEAL).write_text(json_hash(manifest) + "\n", encoding="utf-8")
        for path in files:  # safetensors gives its own to their owner alone, whatever the umask says
            path.chmod(stat.S_IMODE((temporary / SEAL).stat().st_mode))
        for path in (*files, temporary / MANIFEST, temporary / SEAL, temporary):
            flush(path)
        if folder.exists():
            set_aside(folder)
        os.replace(temporary, folder)
        flush(folder.parent)
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise refused(folder, error) from error
        raise ArtefactError(f"making {folder} failed: {type(error).__name__}: {error}") from error
    except SafetensorError as error:  # what the library makes of a full disk, among other things
        raise ArtefactError(
            f"making {folder} failed: {error}; is the disk full? If so, use another --runs-dir"
        ) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write one text file whole or not at all; ArtefactError names the path where the disk refuses."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete, undamaged artefact; None where there is no artefact.

    It is read as JSON: nothing in it is imported, evaluated, or followed out of the folder. Raises ArtefactError naming
    the file that is missing, or whose content is not what was written.
    """
    path, seal = folder / MANIFEST, folder / SEAL
    if not folder.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        expected = {str(name): str(digest) for name, digest in manifest["files"].items()}
        if not isinstance(manifest["made_from"], dict) or not isinstance(manifest["about"], dict):
            raise TypeError
        if json_hash(manifest) + "\n" != seal.read_text(encoding="utf-8", errors="replace"):
            raise ArtefactError(f"{path} is damaged: its content's sha256 is not that in {SEAL}")
    except OSError as error:
        where = error.filename or path
        raise ArtefactError(f"{where} is missing or cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"{path} is no manifest of this course ({type(error).__name__})") from error
    for name, digest in expected.items():
        _check_file(folder, name, digest)
    return manifest


def _check_file(folder: Path, name: str, digest: str) -> None:
    file = folder / name
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ArtefactError(f"{folder / MANIFEST} names {name!r}, which lies outside its folder")
        if not file.is_file():
            raise ArtefactError(f"{file} is missing")
        is_damaged = file_hash(file) != digest
    except (OSError, ValueError) as error:  # of the disk; of a name that can be none
        raise ArtefactError(f"{file} cannot be read ({error})") from error
    if is_damaged:
        raise ArtefactError(f"{file} is damaged: its sha256 is not the manifest's")


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two `made_from` records differ, as "key: old → new", inner keys as "plan.epochs"."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(new)))
    changes: list[str] = []
    for key in sorted({*old, *plain}):
        before, after = old.get(key), plain.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after and json.dumps(before) != json.dumps(after):  # 5.0 is 5 by one, NaN is NaN by the other
            changes.append(f"{prefix}{key}: {_short(before)} → {_short(after)}")
    return changes


def _short(value: Any) -> str:
    """A value as a person reads it: a hash by its first digits."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
