"""Which versions pdserve needs, from its own package metadata."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement


def unmet(package: str, version: str) -> str:
    """What pdserve needs of `package` when `version` is not that; empty when it is, or in a checkout not installed."""
    try:
        declared = [Requirement(line) for line in metadata.requires("pdserve") or ()]
    except metadata.PackageNotFoundError:
        return ""
    wanted = [one.specifier for one in declared if one.name == package and one.specifier]
    return next((str(one) for one in wanted if not one.contains(version, prereleases=True)), "")
