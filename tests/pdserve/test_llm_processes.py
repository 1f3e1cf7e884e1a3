"""The services of an `LLM` as processes: how they start, why they do not, and that none stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time

import psutil
import pytest

from common.errors import Unavailable
from common.settings import ConfigError
from pdserve import gpus, llm
from pdserve.llm import LLM
from pdserve.local_services import LocalServices
from tests.support.processes import ROOT

PATIENCE_S = 100.0


def services_of(pid: int) -> list[psutil.Process]:
    """The children of a process that are services, by their command lines."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [one for one in psutil.Process(pid).children() if "pdserve.tied" in one.cmdline()]
    return []


def wait_for_services(pid: int) -> list[psutil.Process]:
    deadline_s = time.monotonic() + PATIENCE_S
    while len(services := services_of(pid)) < 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return services


def assert_all_end(services: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(services, timeout=PATIENCE_S)
    assert alive == []


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path):
    """No process; logs of what failed do, as its errors say."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert services_of(os.getpid()) == []


def test_no_process_is_left_when_the_owner_is_killed(spawn, tmp_path):
    owner = spawn("-c", "from pdserve import LLM; LLM(device='cpu')", TMPDIR=str(tmp_path))
    services = wait_for_services(owner.pid)
    owner.send_signal(signal.SIGKILL)
    assert_all_end(services)


def test_a_service_whose_owner_is_killed_ends_in_order(spawn, tmp_path):
    (tmp_path / "waiting.py").write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('in order', flush=True)))\n"
        "print(*sys.argv[1:], flush=True)\n"
        "signal.pause()\n"
    )
    start = """
import os, subprocess, sys
subprocess.run([sys.executable, "-m", "pdserve.tied", str(os.getpid()), "waiting", "--flag"])
"""
    owner = spawn("-c", start, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert owner.stdout.readline() == "--flag\n"
    owner.send_signal(signal.SIGKILL)
    # Ends with the service, which has the other end.
    assert owner.stdout.read() == "in order\n"


def test_what_a_service_cannot_work_with_is_a_configuration_error_with_its_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^(router|prefill|decode): .* \(log: .*\.log\)$"):
        LLM(tmp_path, device="cpu")


def test_a_service_that_dies_is_an_error_that_shows_its_log(tmp_path):
    def kill() -> None:
        (decode,) = (one for one in wait_for_services(os.getpid()) if "decode_service" in one.cmdline())
        decode.kill()

    killing = threading.Thread(target=kill)
    killing.start()
    with pytest.raises(Unavailable, match=r"decode ended with signal 9; its log, .*decode\.log, ends so:") as caught:
        LLM(device="cpu", log_folder=str(tmp_path / "logs"))
    killing.join()
    assert caught.value.reason == "SERVICE_ENDED"
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["decode.log", "prefill.log", "router.log"]


def test_services_that_take_too_long_are_named_and_ended(monkeypatch):
    folders = []
    monkeypatch.setattr(llm, "LocalServices", lambda *a, **k: folders.append(LocalServices(*a, **k)) or folders[0])
    with pytest.raises(Unavailable, match=r"prefill was not ready within 0.1 s; its log: .*prefill.log") as caught:
        LLM(device="cpu", start_timeout_s=0.1)
    assert caught.value.reason == "NOT_READY"


def test_a_driver_that_does_not_work_is_not_taken_for_no_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "_COUNT", "raise SystemExit('cuInit returned 999')")
    with pytest.raises(ConfigError, match=r"the CUDA driver does not work: cuInit returned 999; .*device='cpu'"):
        gpus.num_gpus()


def test_gpus_are_counted_without_torch():
    torch = pytest.importorskip("torch")
    assert gpus.num_gpus() == torch.cuda.device_count()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "is_tidy"),
    [("1 / 0", True), ("del llm", True), ("import os; os.kill(os.getpid(), 9)", False)],
)
def test_however_the_owner_ends_while_it_serves_no_process_is_left(spawn, tmp_path, end, is_tidy):
    code = f"""
from pdserve import LLM
llm = LLM(device="cpu")
llm.generate("Hello", use_tqdm=False)
print("ready", flush=True)
input()
{end}
print("ended", flush=True)
input()
"""
    owner = spawn("-c", code, TMPDIR=str(tmp_path))
    assert owner.stdout.readline() == "ready\n", owner.stderr.read()
    services = wait_for_services(owner.pid)
    print("go on", file=owner.stdin, flush=True)
    if end == "del llm":
        assert owner.stdout.readline() == "ended\n", owner.stderr.read()
        assert_all_end(services)
    owner.communicate("\n", timeout=PATIENCE_S)
    assert_all_end(services)
    assert not is_tidy or list(tmp_path.glob("pdserve-llm-*")) == []


@pytest.mark.slow
def test_the_example_runs(spawn):
    process = spawn(str(ROOT / "examples" / "offline.py"), PYTHONPATH=str(ROOT))
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    assert stdout.count(" bytes over ") == 3
    assert "Pipeline statistics\n  Total tokens: " in stdout
