"""Artefacts on disk: written whole or not at all, with a manifest of hashes that detects any damage.

An artefact is a folder. It is written under a temporary name beside its place, flushed to disk, and then
renamed into place in one step, so a reader never sees half of one. `manifest.json` holds what it was made
from and the sha256 of each file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ArtefactError

MANIFEST = "manifest.json"


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """sha256 of a JSON value, in hex; independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder to flush it
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(folder: Path) -> Path:
    """Rename an artefact to the next free <name>.old-<n>, so that making it anew loses nothing."""
    n = 1
    while (target := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    folder.rename(target)
    return target


@contextmanager
def writing(folder: Path, made_from: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[Path]:
    """Write an artefact: yields a temporary folder to fill; on success it becomes `folder`, with its manifest.

    made_from: what decides the artefact's content (settings, hashes of inputs), compared by `load_manifest`.
    about: what is good to know (versions, device, time). An earlier artefact of that name is set aside.
    On an error the temporary folder is removed and nothing else has changed; ArtefactError names the path
    where the disk refuses.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        temporary.chmod(0o755)
        yield temporary
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        hashes = {p.relative_to(temporary).as_posix(): file_hash(p) for p in files}
        manifest = {"made_from": dict(made_from), "about": dict(about), "files": hashes}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in (*files, temporary / MANIFEST, temporary):
            _flush(path)
        if folder.exists():
            set_aside(folder)
        os.replace(temporary, folder)
        _flush(folder.parent)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {folder}: {error.strerror or error}; free space or use --runs-dir"
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write one text file whole or not at all; ArtefactError names the path where the disk refuses."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}; free space or use --runs-dir") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete, undamaged artefact; None where there is no artefact.

    Raises ArtefactError naming the file that is missing, or whose content is not what was written.
    """
    path = folder / MANIFEST
    if not folder.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        expected = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} is missing or damaged ({type(error).__name__})") from error
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file():
            raise ArtefactError(f"{file} is missing")
        if file_hash(file) != digest:
            raise ArtefactError(f"{file} is damaged: its sha256 is not the manifest's")
    return manifest


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ between two `made_from` records, as "key: old → new"."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(new)))
    keys = sorted({*old, *plain})
    return [f"{k}: {old.get(k)!r} → {plain.get(k)!r}" for k in keys if old.get(k) != plain.get(k)]
