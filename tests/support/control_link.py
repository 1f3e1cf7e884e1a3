"""What stands between prefill workers and one decode worker's `ConnectPair`, and may lose, repeat or falsify messages.

Give the decode worker its address as pair_endpoint. KV itself does not pass: it has a process group of its own.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum

import grpc

from common.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS
from pdserve.v1 import decode_pb2, decode_pb2_grpc


class Fault(Enum):
    """Of one message."""

    DROPPED_ACKNOWLEDGEMENT = "dropped acknowledgement"
    DUPLICATED_ACKNOWLEDGEMENT = "duplicated acknowledgement"
    # Decode finds that the chunk is not what was announced.
    WRONG_CHECKSUM = "wrong checksum"


class ControlLink(decode_pb2_grpc.DecodeServiceServicer):
    """Each fault that is armed strikes one message."""

    def __init__(self) -> None:
        # Of the decode worker, which may start later.
        self.target = ""
        self.address = ""
        self.dealt: Counter[Fault] = Counter()
        self._armed: deque[Fault] = deque()

    def arm(self, fault: Fault) -> None:
        self._armed.append(fault)

    def ConnectPair(
        self, request_iterator: Iterator[decode_pb2.ConnectPairRequest], context: grpc.ServicerContext
    ) -> Iterator[decode_pb2.ConnectPairResponse]:
        with grpc.insecure_channel(self.target, options=CHANNEL_OPTIONS) as channel:
            call = decode_pb2_grpc.DecodeServiceStub(channel).ConnectPair(map(self._request, request_iterator))
            context.add_callback(call.cancel)
            try:
                for response in call:
                    yield from [response] * self._times(response)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

    def _request(self, request: decode_pb2.ConnectPairRequest) -> decode_pb2.ConnectPairRequest:
        if request.HasField("announcement") and self._strikes(Fault.WRONG_CHECKSUM):
            request.announcement.checksum ^= 1
        return request

    def _times(self, response: decode_pb2.ConnectPairResponse) -> int:
        """How often it is passed on."""
        if not response.HasField("acknowledgement"):
            return 1
        if self._strikes(Fault.DROPPED_ACKNOWLEDGEMENT):
            return 0
        return 2 if self._strikes(Fault.DUPLICATED_ACKNOWLEDGEMENT) else 1

    def _strikes(self, fault: Fault) -> bool:
        if not self._armed or self._armed[0] is not fault:
            return False
        self.dealt[self._armed.popleft()] += 1
        return True


@contextlib.contextmanager
def control_link() -> Iterator[ControlLink]:
    """It listens, and `target` is to be set before anybody connects."""
    link = ControlLink()
    with ThreadPoolExecutor(max_workers=8) as threads:
        server = grpc.server(threads, options=SERVER_OPTIONS)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(link, server)
        link.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield link
        finally:
            server.stop(grace=None).wait()
