"""Random requests and random words on a pair's control stream: nonsense of every degree, from a source of randomness.

Most are nearly right: what is wrong at first sight never gets far.
"""

from __future__ import annotations

import math
import random

from google.protobuf.message import Message

from pdserve.v1 import decode_pb2, router_pb2, types_pb2

_U32 = (0, 1, 2, 3, 7, 16, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_U64 = (*_U32, 2**32, 2**48, 2**63 - 1, 2**63, 2**64 - 1)
_DOUBLES = (0.0, -0.0, 0.5, 1.0, 2.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan)
_TEXTS = ("", "a", "Once", "\x00", "é" * 3, "\U0001f600", "a" * 300, " " * 2000, "{{ x }}", "</s>", "\ufffd", "nan")
VOCAB = 2048


def uint(draw: random.Random, choices: tuple[int, ...] = _U32) -> int:
    return draw.choice(choices) if draw.random() < 0.7 else draw.randrange(choices[-1] + 1)


def text(draw: random.Random) -> str:
    if draw.random() < 0.6:
        return draw.choice(_TEXTS)
    highest = draw.choice((127, 0xD800))
    return "".join(chr(draw.randrange(highest)) for _ in range(draw.randrange(40)))


def maybe(draw: random.Random, probability: float = 0.3) -> bool:
    return draw.random() < probability


def generate_request(draw: random.Random) -> router_pb2.GenerateRequest:
    """Nearly every second one can be served, in a few tokens."""
    request = router_pb2.GenerateRequest()
    match draw.randrange(8):
        case 0:
            request.prompt = text(draw)
        case 1:
            for _ in range(draw.randrange(4)):
                request.chat.messages.add(role=draw.choice(("user", "system", text(draw))), content=text(draw))
            if maybe(draw):
                request.chat.template_kwargs[text(draw)] = draw.choice(("1", "[" * 5000, "{", '"x"', text(draw)))
        case 2:
            pass
        case _:
            count = draw.choice((2047, 2048, 2100) if maybe(draw, 0.05) else (1, 3, 5, 17, 40, 100))
            request.prompt_token_ids.ids.extend(draw.randrange(3, VOCAB) for _ in range(count))
            if maybe(draw, 0.1):
                request.prompt_token_ids.ids[draw.randrange(count)] = uint(draw)
    # Short outputs: a long one is no nonsense, and costs seconds.
    request.stopping.max_tokens = draw.randrange(1, 6) if maybe(draw, 0.97) else draw.choice((0, 60))
    if maybe(draw):
        request.request_id = text(draw)
    if maybe(draw, 0.1):
        request.model = draw.choice(("tiny", text(draw)))
    if maybe(draw):
        request.priority = draw.choice((-101, -100, 0, 5, 100, 101, -(2**31), 2**31 - 1))
    if maybe(draw):
        request.cache_salt = text(draw)
    for name in ("num_logprobs", "num_prompt_logprobs"):
        if maybe(draw, 0.2):
            setattr(request, name, draw.choice((0, 1, 20, 21, uint(draw))))
    _spoil_params(draw, request.sampling, probability=0.15)
    _spoil_params(draw, request.stopping, probability=0.05)
    return request


def _spoil_params(draw: random.Random, params: Message, *, probability: float) -> None:
    for field in params.DESCRIPTOR.fields:
        if not maybe(draw, probability) or field.name == "max_tokens":
            continue
        if field.name == "logit_bias":
            for _ in range(draw.randrange(3)):
                params.logit_bias[uint(draw)] = draw.choice(_DOUBLES)
        elif field.is_repeated:
            values = [text(draw) if field.type == field.TYPE_STRING else uint(draw) for _ in range(draw.randrange(20))]
            getattr(params, field.name).extend(values)
        elif field.type == field.TYPE_BOOL:
            setattr(params, field.name, maybe(draw))
        elif field.type in (field.TYPE_DOUBLE, field.TYPE_FLOAT):
            setattr(params, field.name, draw.choice(_DOUBLES) if maybe(draw) else draw.random() * 1.5)
        else:
            setattr(params, field.name, uint(draw, _U64 if field.type == field.TYPE_UINT64 else _U32))


def header(
    draw: random.Random, keys: list[tuple[int, int]], sequence_number: int, *, block_bytes: int
) -> decode_pb2.ConnectPairRequest:
    """What prefill may say. `keys` are reservations and attempts that exist, `sequence_number` is the one due."""
    request = decode_pb2.ConnectPairRequest()
    reservation, attempt = draw.choice(keys) if keys and maybe(draw, 0.8) else (uint(draw, _U64), uint(draw))
    if maybe(draw, 0.1):
        attempt = uint(draw)
    match draw.randrange(12):
        case 0 | 1 | 2:
            request.begin.reservation, request.begin.attempt = reservation, attempt
        case 3 | 4 | 5 | 6 | 7:
            said = request.announcement
            said.sequence_number = sequence_number if maybe(draw, 0.9) else uint(draw, _U64)
            said.reservation, said.attempt = reservation, attempt
            said.first_layer = draw.choice((0, 1, uint(draw)))
            said.num_layers = draw.choice((1, 1, 2, uint(draw)))
            said.first_block = draw.choice((0, 1, uint(draw)))
            said.num_blocks = draw.choice((1, 2, uint(draw)))
            right = said.num_layers * said.num_blocks * block_bytes
            said.num_bytes = right if right < 2**20 and maybe(draw, 0.7) else uint(draw, _U64)
            said.checksum = uint(draw, _U64)
        case 8 | 9:
            commit = request.commit
            commit.reservation, commit.attempt, commit.num_bytes = reservation, attempt, uint(draw, _U64)
            commit.first_token_id = draw.choice((5, uint(draw)))
            if maybe(draw):
                commit.first_token_logprob.CopyFrom(_logprob(draw))
            if maybe(draw):
                commit.prompt_logprobs.extend(_logprob(draw) for _ in range(draw.randrange(50)))
        case 10:
            request.abandon.reservation, request.abandon.attempt = reservation, attempt
        case _:
            match draw.randrange(6):
                case 0:
                    request.goodbye.reason = text(draw)
                case 1:
                    request.hello.prefill_worker = text(draw)
                case _:
                    request.begin.reservation = uint(draw, _U64)
    return request


def _logprob(draw: random.Random) -> types_pb2.TokenLogprob:
    top = [types_pb2.TopLogprob(token_id=uint(draw), logprob=draw.choice(_DOUBLES)) for _ in range(draw.randrange(3))]
    return types_pb2.TokenLogprob(token_id=uint(draw), logprob=draw.choice(_DOUBLES), rank=uint(draw), top=top)


def spoilt(draw: random.Random, raw: bytes, probability: float = 0.1) -> bytes:
    """`raw`, or what is left of it after bytes were changed, cut off, doubled or put in."""
    if not maybe(draw, probability):
        return raw
    bent = bytearray(raw)
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(bent) + 1)
        match draw.randrange(4):
            case 0:
                bent[place : place + 1] = draw.randbytes(1)
            case 1:
                del bent[place:]
            case 2:
                bent[place:place] = bent[:place]
            case 3:
                bent[place:place] = draw.randbytes(draw.randrange(1, 9))
    return bytes(bent[: 2**20])
