"""`pdserve token`: a new token, and what the file of identities says of it. It is kept nowhere."""

from __future__ import annotations

import argparse
import json

from common.identities import MAX_NAME_BYTES, hash_of, new_token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", type=_name, metavar="NAME", help="whose it is")


async def run(args: argparse.Namespace) -> int:
    token = new_token()
    print(f"token  {token}")
    print(f'line   {json.dumps(args.name, ensure_ascii=False)} = "sha256:{hash_of(token)}"')
    return 0


def _name(text: str) -> str:
    if not 0 < len(text.encode()) <= MAX_NAME_BYTES:
        raise argparse.ArgumentTypeError(f"a name has 1 to {MAX_NAME_BYTES} bytes")
    return text
