"""Log lines that can be searched: who wrote them (service, instance) and what about (request, pair).

    12:03:44.107 INFO  decode-host-50053 decode_service.engine: sequence finished  request_id=7f3a num_tokens=128

`bound(request_id=...)` adds fields to every line logged inside it, across awaits and in tasks started there;
`extra={...}` adds them to one line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

# Libraries that have nothing to say below a warning.
QUIET = ("asyncio", "filelock", "grpc", "httpcore", "httpx", "torch", "transformers", "urllib3")

_fields: ContextVar[Mapping[str, Any]] = ContextVar("log_fields", default=MappingProxyType({}))
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(level: str, format: str, *, service: str, instance: str) -> None:
    """Sets up logging to stderr for the whole process. `level`: debug to error; `format`: "text" or "json"."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter(service, instance) if format == "json" else _TextFormatter(instance))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


@contextlib.contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Adds `fields` to every line logged meanwhile, here and in what is awaited or started here."""
    token = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return {**_fields.get(), **extra}


class _TextFormatter(logging.Formatter):
    def __init__(self, instance: str) -> None:
        super().__init__()
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={_quoted(value)}" for name, value in _fields_of(record).items())
        message = record.getMessage()
        line = f"{at}.{int(record.msecs):03d} {record.levelname:<5} {self._instance} {record.name}: {message}"
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return line + (" " + fields if fields else "") + trace


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._identity = {"service": service, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self._identity,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c.isspace() or c in '"=' for c in text) else text
