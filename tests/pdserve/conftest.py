from __future__ import annotations

import pytest

from pdserve.cli import parse


@pytest.fixture
def pdserve(capsys):
    """`exit_code, stdout, stderr = await pdserve("workers", ...)`: the command, on this event loop."""

    async def run(*argv: str) -> tuple[int, str, str]:
        args = parse(argv)
        exit_code = await args.run(args)
        return exit_code, *capsys.readouterr()

    return run
