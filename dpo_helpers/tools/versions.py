"""Are the installed versions new enough? The floors are those of the installed package's own metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from ..errors import CourseError


class InstalledVersion(NamedTuple):
    """One package that the course needs: `installed` is None where it is missing, `wanted` such as ">=5.5"."""

    package: str
    installed: str | None
    wanted: str
    good: bool


def installed_versions() -> list[InstalledVersion]:
    """A row for each package that pyproject.toml names as needed on this system; extras are left out."""
    try:
        needs = [Requirement(line) for line in requires("dpo-helpers") or []]
    except PackageNotFoundError:
        raise CourseError(
            "dpo-helpers itself is not installed, so what it needs is not known: "
            "run make course, or pip install -e . in its folder"
        ) from None
    return [_compare(need) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def _compare(need: Requirement) -> InstalledVersion:
    try:
        installed = version(need.name)
        good = need.specifier.contains(installed, prereleases=True)
    except PackageNotFoundError:
        installed, good = None, False
    except InvalidVersion:
        good = False
    return InstalledVersion(need.name, installed, str(need.specifier), good)


def check_versions() -> list[InstalledVersion]:
    """The rows of `installed_versions`. Raises CourseError naming each package that is missing or below its floor."""
    rows = installed_versions()
    bad = [row for row in rows if not row.good]
    if bad:
        faults = ", ".join(f"{row.package} {row.installed or 'is missing'} (wanted: {row.wanted})" for row in bad)
        wanted = " ".join(f"'{row.package}{row.wanted}'" for row in bad)
        raise CourseError(f"not the versions that the course needs: {faults}; run python -m pip install {wanted}")
    return rows
