from __future__ import annotations

import asyncio
import json
import logging

import pytest

from common import logs

log = logging.getLogger("decode_service.engine")


@pytest.fixture
def configured(capsys):
    """`lines = configured(format)` sets logging up; `lines()` are those written since."""
    root = logging.getLogger()
    before = root.level, root.handlers[:], {name: logging.getLogger(name).level for name in logs.QUIET}

    def configure(format, level="info"):
        logs.configure(level, format, service="decode", instance="decode-0")
        return lambda: capsys.readouterr().err.splitlines()

    yield configure
    logging.captureWarnings(False)
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)


def test_a_json_line_says_who_and_what_about(configured):
    lines = configured("json")
    with logs.bound(request_id="r1"):
        log.info("finished %d tokens", 3, extra={"pair": 7})
    line = json.loads(lines()[0])
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "service": "decode",
        "instance": "decode-0",
        "logger": "decode_service.engine",
        "message": "finished 3 tokens",
        "request_id": "r1",
        "pair": 7,
    }


def test_a_text_line_can_be_read_and_searched(configured):
    lines = configured("text")
    with logs.bound(request_id="r1"):
        log.warning("lost a pair", extra={"reason": "peer left"})
    (line,) = lines()
    assert line.endswith('WARNING decode-0 decode_service.engine: lost a pair  request_id=r1 reason="peer left"')


def test_a_traceback_stays_with_its_line(configured):
    lines = configured("json")
    try:
        raise ValueError("oops")
    except ValueError:
        log.exception("bug")
    (line,) = lines()
    assert "ValueError: oops" in json.loads(line)["traceback"]


async def test_bound_fields_follow_into_tasks_and_end_with_their_block(configured):
    lines = configured("json")

    async def work():
        log.info("inside")

    with logs.bound(request_id="r1"), logs.bound(attempt=2):
        task = asyncio.create_task(work())
    await task
    log.info("outside")
    inside, outside = (json.loads(line) for line in lines())
    assert (inside["request_id"], inside["attempt"]) == ("r1", 2)
    assert "request_id" not in outside


def test_libraries_are_quiet_and_the_level_is_kept(configured):
    lines = configured("text", level="debug")
    logging.getLogger("transformers.loading").info("chatter")
    log.debug("ours")
    assert [line.split(": ")[-1] for line in lines()] == ["ours"]
