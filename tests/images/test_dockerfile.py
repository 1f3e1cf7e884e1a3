"""What can be said of the images without building them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.images import command
from tests.support.processes import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def pins(name: str) -> dict[str, list[str]]:
    """Versions by package; more than one where they differ between Pythons."""
    lines = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "images" / name).read_text(), re.MULTILINE)
    return {package: [version for other, version in lines if other == package] for package, _ in lines}


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("constraints", "arguments"),
    [("build-constraints.txt", ("build",)), ("constraints.txt", ("run", "gpu", "flash-attn-3", "flashinfer"))],
)
def test_every_requirement_has_a_version_that_satisfies_it(constraints, arguments):
    known = pins(constraints)
    for line in command(sys.executable, "images/requirements.py", *arguments).splitlines():
        requirement = Requirement(line)
        versions = known[requirement.name]
        assert versions, line
        assert all(requirement.specifier.contains(version) for version in versions), f"{line}: {versions}"


def test_the_router_is_asked_for_nothing_of_the_workers():
    assert "torch" not in command(sys.executable, "images/requirements.py", "run")
    assert "torch" in command(sys.executable, "images/requirements.py", "run", "gpu")


def test_labels_have_the_version_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.findall(r'image\.version="(.+)"', DOCKERFILE) == [project["version"]] * 2


def test_every_package_of_the_project_is_copied():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    for package in packages:
        assert f"\nCOPY {package} {package}\n" in DOCKERFILE
        assert f"!{package}" in ignored
