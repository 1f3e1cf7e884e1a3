"""Builds the images of the Dockerfile with buildah, without a registry: on a base made of this machine's Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT

TOOLS = ("buildah", "runc")
# What the base has beside Python: the programs that the Dockerfile calls, and what wheels expect of every Linux.
PROGRAMS = ("/bin/sh", "/bin/chmod")
LIBRARIES = ("libstdc++.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "libresolv.so.2")
TIMESTAMP = "315532800"
BUILD_S = 400


def missing() -> str:
    """Why images cannot be built here; empty when they can."""
    if absent := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"{' and '.join(absent)} missing: apt-get install {' '.join(TOOLS)}"
    if os.geteuid() != 0:
        return "only root can build and run images here"
    if not metadata.version("torch").endswith("+cpu"):
        return "no CPU build of torch is installed here, and an image with CUDA takes gigabytes"
    return ""


def command(*words: str | Path, timeout_s: float = 60) -> str:
    """Its output. Raises RuntimeError with all of it when it fails."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"{words[:3]} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout.strip()


def base_root(root: Path) -> None:
    """The least root file system with Python: interpreter, standard library, a shell, and the libraries they load."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = root / "usr/local/lib" / version
    leave = shutil.ignore_patterns(
        "site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "config-*"
    )
    shutil.copytree(sysconfig.get_path("stdlib"), library, ignore=leave)
    binary = root / "usr/local/bin" / version
    binary.parent.mkdir(parents=True)
    shutil.copy(Path(sys.base_prefix) / "bin" / version, binary)
    for name in ("python3", "python"):
        (binary.parent / name).symlink_to(version)
    loaded = [*PROGRAMS, str(binary), *map(str, (library / "lib-dynload").glob("*.so"))]
    cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    also = [re.search(rf"{re.escape(name)} .*x86-64.*=> (\S+)", cache)[1] for name in LIBRARIES]
    listed = subprocess.run(["ldd", *loaded, *also], capture_output=True, text=True).stdout
    for path in {*PROGRAMS, *also, *re.findall(r"(?:=> |^\s+)(/\S+) \(", listed, re.MULTILINE)}:
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    for folder in ("etc", "proc", "sys", "dev", "tmp"):
        (root / folder).mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")


def download_wheels(folder: Path) -> None:
    """Everything that both images install, in the versions of the constraints."""
    pip = [Path(sys.executable), "-m", "pip", "download", "-q", "-d", folder]
    for constraints, arguments in (("build-constraints.txt", ("build",)), ("constraints.txt", ("run", "gpu"))):
        listed = folder / f"{arguments[0]}.txt"
        listed.write_text(command(sys.executable, "images/requirements.py", *arguments))
        command(*pip, "-c", f"images/{constraints}", "-r", listed, timeout_s=BUILD_S)


@dataclass(frozen=True)
class Store:
    """What buildah keeps, in a folder of its own."""

    folder: Path
    base: str
    wheels: Path

    @classmethod
    def new(cls, folder: Path, root: Path, wheels: Path) -> Store:
        """With a base image of this root file system alone."""
        store = cls(folder, "localhost/base", wheels)
        container = store.buildah("from", "scratch")
        store.buildah("add", "-q", container, root, "/")
        store.buildah("commit", "-q", "--rm", "--timestamp", TIMESTAMP, container, store.base)
        return store

    def buildah(self, *words: str | Path, timeout_s: float = 60) -> str:
        return command("buildah", "--root", self.folder, "--runroot", self.folder / "run", *words, timeout_s=timeout_s)

    def build(self, target: str, *flags: str) -> str:
        """Id of the image `target`. It is for CPUs, and of no other time than TIMESTAMP."""
        arguments = [f"BASE_IMAGE={self.base}", "PIP_NO_INDEX=1", "COMPILER="]
        # Without a namespace of its own for each step: fewer demands on the machine.
        options = ["--isolation", "chroot", "--timestamp", TIMESTAMP, "--build-context", f"wheels={self.wheels}"]
        options += [word for argument in arguments for word in ("--build-arg", argument)]
        return self.buildah("build", "-q", *options, *flags, "--target", target, ".", timeout_s=BUILD_S)

    def described(self, image: str) -> dict[str, Any]:
        """What OCI says of an image: `config`, `rootfs` with its layers, `history`."""
        return json.loads(self.buildah("inspect", "--type", "image", image))["OCIv1"]
