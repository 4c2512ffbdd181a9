"""Single files that are written whole or not at all, whoever else writes the same one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ArtefactError


def temporary_name(path: Path) -> Path:
    """A hidden name beside a file or folder, for it while it is written; two writers of the same get two names."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def refused(path: Path, error: OSError) -> ArtefactError:
    """What the disk's refusal to write a file or folder is called: it names the path, and what to do."""
    return ArtefactError(f"cannot write {path}: {error.strerror or error}; free space or use another --runs-dir")


def flush(path: Path) -> None:
    """Have the system put a file or folder on the disk itself."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder to flush it
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what it may write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields where to write a file: what is there at the end becomes `path`, in one step. Its folder is made if needed.

    On an error nothing has changed; where the disk refuses, it is an ArtefactError that names the path.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
