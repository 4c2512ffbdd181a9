"""The Hugging Face Hub: which commit of a model or data set is used."""

from __future__ import annotations

import re
from functools import cache

from .errors import CourseError


@cache  # one answer a process: weights, tokenizer and the record must be of the same commit
def resolve_revision(name: str, revision: str | None, kind: str) -> str:
    """The 40-hex commit to load: the one given, else the newest, looked up once and then recorded.

    kind: "model" or "dataset". Raises CourseError where the name is no Hub id, the revision is not a commit,
    or the Hub cannot be reached.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise CourseError(f"{kind} {name!r} is neither an existing path nor a Hub id (owner/name)")
    if revision is not None:
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise CourseError(f"{kind}_revision is {revision!r}, but must be a commit of 40 hex digits")
        return revision
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name) if kind == "model" else HfApi().dataset_info(name)
    except Exception as error:  # network, HTTP and offline errors have no common base
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CourseError(
            f"cannot look up {kind} {name!r} on the Hub ({first}); check the name and the network, or give "
            f"--{kind}-revision with a commit that is in the local cache"
        ) from error
    return str(info.sha)
