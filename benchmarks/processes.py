"""Part of a benchmark in a process of its own: an engine's memory on the GPU goes only with its process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

EXIT_S = 30.0


def in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns there.

    Raises:
        RuntimeError: the process ended without a result; its traceback is on stderr.
    """
    spawn = multiprocessing.get_context("spawn")
    results, told = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_tell, args=(told, function, args, kwargs))
    process.start()
    told.close()
    try:
        return results.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed in its process; see the traceback above") from None
    finally:
        process.join(EXIT_S)
        process.kill()
        process.join()


def _tell(connection: Connection, function: Callable[..., object], args: tuple, kwargs: dict[str, object]) -> None:
    connection.send(function(*args, **kwargs))
