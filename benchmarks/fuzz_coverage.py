"""Fuzzing by coverage of what parses and judges messages, with `atheris`; takes libFuzzer's flags.

The bytes are a GenerateRequest for the router's intake, a worker's Open, and words of prefill and decode for the two
machines of a pair. Whatever is raised but a refusal is a crash, and libFuzzer keeps the input.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["common", "router"]):
    from common.config import TINY_MODEL
    from common.errors import PdserveError
    from common.tokenization import Tokenizer
    from common.transport import wire
    from common.transport.messages import AttemptKey, PairHello, PairWelcome
    from common.transport.receiving_protocol import ReceivingProtocol
    from common.transport.sending_protocol import SendingProtocol
    from router.fleet import ServedModel
    from router.intake import Intake
    from router.request import Arrival

from google.protobuf.message import DecodeError

from pdserve.v1 import decode_pb2, router_pb2
from tests.support import fuzzing

NUM_SEEDS = 200

INTAKE = Intake(Tokenizer.load(TINY_MODEL), model_id="tiny", max_prompt_tokens=0)
MODEL = ServedModel(frozenset({"tiny"}), 2048, 2048, 4096, frozenset({2}), ("fingerprint",), 1)


def request(raw: bytes) -> None:
    message = router_pb2.GenerateRequest.FromString(raw)
    request_id = INTAKE.check(message)
    admission = INTAKE.admit(message, MODEL, request_id, Arrival("fuzz", 0.0, 1.0))
    # Long texts are tokenised in a thread, which is none of this.
    if len(message.prompt) < 4096:
        asyncio.run(admission)
    else:
        admission.close()


def to_decode(raw: bytes) -> None:
    machine = ReceivingProtocol(2, max_chunk_bytes=4096)
    for part in _parts(raw):
        message = wire.request_from_proto(decode_pb2.ConnectPairRequest.FromString(part))
        if not isinstance(message, PairHello):
            machine.handle(message)
            assert 0 <= machine.num_credits <= 2


def to_prefill(raw: bytes) -> None:
    machine = SendingProtocol(2, max_chunk_bytes=4096)
    machine.begin(AttemptKey(1, 1))
    for part in _parts(raw):
        message = wire.response_from_proto(decode_pb2.ConnectPairResponse.FromString(part))
        if not isinstance(message, PairWelcome):
            machine.handle(message)


def _parts(raw: bytes) -> list[bytes]:
    """Each after a byte with its length."""
    parts = []
    while raw:
        parts.append(raw[1 : 1 + raw[0]])
        raw = raw[1 + raw[0] :]
    return parts


TARGETS = (request, to_decode, to_prefill)


def one_input(raw: bytes) -> None:
    try:
        if raw:
            TARGETS[raw[0] % len(TARGETS)](raw[1:])
    except (PdserveError, DecodeError):
        pass


def write_seeds(folder: Path) -> None:
    """What is nearly right, to begin with."""
    for seed in range(NUM_SEEDS):
        draw = random.Random(seed)
        (folder / f"request-{seed}").write_bytes(b"\0" + fuzzing.generate_request(draw).SerializeToString()[:4000])
        said = [fuzzing.header(draw, [(1, 1)], number, block_bytes=64).SerializeToString() for number in range(6)]
        framed = b"".join(bytes([len(one)]) + one for one in said if len(one) < 256)
        (folder / f"to-decode-{seed}").write_bytes(b"\1" + framed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as seeds:
        write_seeds(Path(seeds))
        atheris.Setup([*sys.argv, seeds], one_input)
        atheris.Fuzz()
