"""Every command and every program that README and docs show is run here, or has a reason in one of the tables below."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.support.pages import README, Shown, commands, programs
from tests.support.processes import free_port, running_cluster, running_services

BIN = Path(sys.executable).parent
COMMAND_S = 100

# Pattern of a command, from its beginning, and why it is not run.
NOT_RUN = {
    r"make (run|serve)\b": "takes the default ports of this machine; CI runs it as it stands",
    r"make (install|test|constraints)\b": "minutes, and it changes this checkout",
    r"python3 -m venv|\S*pip install": "makes an environment, as make install does",
    r"\S+python -m (router|prefill_service|decode_service)\b": "serves until it is stopped; its flags are checked",
    r"\S+python -m benchmarks\.": "needs a GPU",
    r"docker ": "no Docker; tests/images builds and runs the same Dockerfile",
    r"kubectl ": "no cluster; tests/k8s renders the same overlays and runs what is rendered",
    r"mkdir -p stubs|compiler/bin/python|npm |PATH=\S+ compiler": "makes stubs with compilers of other package indexes",
    r"\S*pdserve top( --router .*)?$": "shows until q is pressed; tests/pdserve/test_top.py does so",
    r"\S*pdserve bench --compare ": "takes two files of one's own; tests/pdserve/test_cli_bench.py has some",
    r".* --tls-ca ": "needs certificates of one's own; tests/integration/test_tls.py has some",
}
FIRST_PAGES = ("README.md", "quickstart.md")
# Programs that are pieces of a larger one, by a line of them.
NOT_RUN_PROGRAMS: dict[str, str] = {}


def reason(shown: Shown) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, shown.text)), None)


def is_slow(shown: Shown) -> bool:
    """What a newcomer types first is tried by `make test`, the rest by `make test-all`."""
    return shown.page.name not in FIRST_PAGES


def marked(shown: Iterable[Shown]) -> list[ParameterSet]:
    return [pytest.param(one, marks=[pytest.mark.slow] if is_slow(one) else [], id=one.id) for one in shown]


RUN = [shown for shown in commands() if not reason(shown)]
PROGRAMS = [shown for shown in programs() if not any(line in shown.text for line in NOT_RUN_PROGRAMS)]


class Running:
    """Services on free ports, in the place of those that pages name."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self._addresses = addresses

    def translated(self, text: str) -> str:
        """With the addresses of these services, and of programs those that are installed beside this Python."""
        shown = re.compile("|".join(map(re.escape, self._addresses)))
        text = shown.sub(lambda match: self._addresses[match[0]], text)
        return re.sub(r"(^|\s)\.venv/bin/|^(?=pdserve )", rf"\1{BIN}/", text)

    def command(self, text: str) -> list[str]:
        words = shlex.split(self.translated(text), comments=True)
        if words[0] == "grpcurl":
            return buf_curl(words[1:])
        if words[1:2] == ["bench"]:
            words += ["--warmup", "0.5"]
            if "--num-requests" in words:
                words[words.index("--num-requests") + 1] = "20"
            else:
                words += ["--duration", "2"]
        if Path(words[0]).name == "pdserve" and asks_the_default_router(words):
            words += ["--router", self._addresses["127.0.0.1:50051"]]
        return words


def asks_the_default_router(words: list[str]) -> bool:
    done = subprocess.run([BIN / "pdserve", words[1], "--help"], capture_output=True, text=True, check=True)
    return "--router" in done.stdout and "--router" not in words


def buf_curl(arguments: list[str]) -> list[str]:
    """What grpcurl is told, told to buf, which is an independent client too. grpcurl itself is in no package index."""
    plaintext, *options, address, method = arguments
    assert plaintext == "-plaintext", arguments
    listing = ["--list-services"] if method == "list" else []
    url = f"http://{address}" + ("" if listing else f"/{method}")
    return [str(BIN / "buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *listing, *options, url]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    metrics = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    of_router, of_prefill, of_decode = (("--metrics-listen", address) for address in metrics)
    http = f"127.0.0.1:{free_port()}"
    of_router = (*of_router, "--http-listen", http)
    with running_services(router_args=of_router, prefill_args=of_prefill, decode_args=of_decode) as services:
        grpc = (services.router.address, services.prefill.address, services.decode.address)
        shown = [f"127.0.0.1:{port}" for port in (50051, 50052, 50053, 9101, 9102, 9103)]
        addresses = dict(zip(shown, (*grpc, *metrics), strict=True)) | {"127.0.0.1:8000": http}
        # Routers of other machines.
        addresses |= {f"10.0.0.{number}:50051": services.router.address for number in (1, 2)}
        yield Running(addresses)


@pytest.fixture
def for_itself(running, request) -> Iterator[Running]:
    """A drain ends a worker for good: the one that it is for is asked by nobody else."""
    if " drain " not in request.node.callspec.params["shown"].text:
        yield running
        return
    with running_cluster(num_prefill=0, num_decode=1, num_routers=0) as alone:
        yield Running({"127.0.0.1:50053": alone.decodes[0].address})


def run(words: list[str], folder: Path) -> str:
    """Its output. What it writes goes to `folder`."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=COMMAND_S)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("shown", marked(RUN))
def test_a_command_that_is_shown_runs_and_says_something(for_itself, shown, tmp_path):
    words = for_itself.command(shown.text)
    if words[0] == "curl" and not shutil.which("curl"):
        pytest.skip("there is no curl")
    assert run(words, tmp_path).strip()


@pytest.mark.parametrize("shown", marked(PROGRAMS))
def test_a_program_that_is_shown_runs(running, shown, tmp_path):
    run([sys.executable, "-c", running.translated(shown.text)], tmp_path)


def test_the_example_with_stubs_proves_its_path(running, tmp_path):
    (example,) = (shown for shown in PROGRAMS if shown.page == README)
    assert "bytes over gloo" in run([sys.executable, "-c", running.translated(example.text)], tmp_path)


def test_every_reason_is_needed():
    texts = [shown.text for shown in commands()]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, text) for text in texts), pattern
    for line in NOT_RUN_PROGRAMS:
        assert any(line in shown.text for shown in programs()), line


def test_most_commands_of_clients_are_run():
    first = {Path(shlex.split(shown.text)[0]).name for shown in RUN}
    assert {"grpcurl", "pdserve"} <= first
