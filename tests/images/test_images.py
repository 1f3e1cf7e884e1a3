"""The images, built of the Dockerfile and run: who is in them, what they need, and that they serve."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.support import images
from tests.support.containers import mounted
from tests.support.processes import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(images.missing()), reason=images.missing() or "built here"),
]
WORKERS = ("prefill_service", "decode_service")
FIND = "import importlib.util as u, sys; print(*[u.find_spec(n) and u.find_spec(n).origin for n in sys.argv[1:]])"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root, wheels, kept = (tmp_path_factory.mktemp(name) for name in ("root", "wheels", "store"))
    images.base_root(root)
    images.download_wheels(wheels)
    yield images.Store.new(kept, root, wheels)
    shutil.rmtree(kept)


@pytest.fixture(scope="module")
def router(store):
    with mounted(store, store.build("router")) as container:
        yield container


@pytest.fixture(scope="module")
def worker(store):
    with mounted(store, store.build("worker")) as container:
        yield container


def origins(container, *names: str) -> list[str]:
    return container.run("-c", FIND, *names, entrypoint=["python"]).split()


def test_packages_in_the_images_are_ours(router, worker):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for container in (router, worker):
        assert origins(container, *packages) == [f"/app/{name}/__init__.py" for name in packages]
        script = "import pdserve.v1.router_pb2 as stubs; print(stubs.__file__)"
        assert container.run("-c", script, entrypoint=["python"]) == "/app/pdserve/v1/router_pb2.py"


def test_the_router_has_no_torch_and_the_worker_has(router, worker):
    absent = origins(router, "torch", "numpy", "safetensors", "transformers", "pip", "grpc_tools")
    assert absent == ["None"] * 6
    assert all(path.startswith("/opt/venv/") for path in origins(worker, "torch", "safetensors", "cuda.bindings"))
    assert origins(worker, "transformers", "pip", "grpc_tools") == ["None"] * 3


def test_an_image_says_who_runs_it_and_how_it_ends(router, worker):
    for container, role in ((router, "router"), (worker, "decode_service")):
        config = container.config
        assert (config["User"], config["WorkingDir"], config["StopSignal"]) == ("10001:10001", "/app", "SIGTERM")
        assert config["Entrypoint"] + config["Cmd"] == ["python", "-m", role]
        assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_services_of_the_images_serve_a_prompt_and_end_in_order(router, worker, tmp_path):
    first, second = WORKERS
    with (
        worker.service(first, tmp_path / "prefill.log") as prefill,
        worker.service(second, tmp_path / "decode.log") as decode,
        router.service(
            "router", tmp_path / "router.log", "--prefill", prefill.address, "--decode", decode.address
        ) as front,
    ):
        for service in (prefill, decode, front):
            service.wait_ready()
        flags = ("--router", front.address, "--temperature", "0", "--max-tokens", "8", "--json")
        *_, last = router.run("generate", *flags, "Return a list of", entrypoint=["pdserve"]).splitlines()
        path = json.loads(last)["completion"]["path"]
        assert (path["kv_path"], path["kv_transport"]) == ("REMOTE", "gloo")
        assert [service.stop() for service in (front, prefill, decode)] == [0, 0, 0]


def test_the_same_sources_make_the_same_files(router, worker):
    """The two images were built one after the other, sharing nothing but sources and wheels. Of packages without their
    bytecode, in which Python leaves traces of whatever else it has compiled before."""
    for folder in ("app", "opt/venv"):
        of_router, of_worker = (files(Path(container.root), folder) for container in (router, worker))
        assert len(of_router) > 100
        if folder != "app":
            of_router = {name: file for name, file in of_router.items() if not name.endswith(".pyc")}
        assert of_router.items() <= of_worker.items()


def test_bytecode_is_there_and_believed_without_a_look_at_its_source(router, worker):
    """Else every start would compile everything anew: its files have other times than when they were built."""
    for container in (router, worker):
        for package in ("app/common", "opt/venv/lib"):
            compiled = list((Path(container.root) / package).rglob("*.pyc"))
            assert len(compiled) > 50
            # PEP 552: bit 0 says hash-based, bit 1 that the source is looked at.
            assert {path.read_bytes()[4] for path in compiled} == {1}


def files(root: Path, folder: str) -> dict[str, tuple[bytes, int, int]]:
    """What each file is: digest, mode and time."""
    paths = [path for path in (root / folder).rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).digest(),
            path.stat().st_mode,
            int(path.stat().st_mtime),
        )
        for path in paths
    }
