"""The rules of a pair, and what its two state machines tell their drivers to do. No clocks, threads or sockets.

An attempt at prefill (`sending_protocol`):

    begin ─▶ OPEN ─ commit ─▶ COMMITTED ─ commit acknowledgement ──────────────▶ Finish: decode's status
              └─ abandon, reservation gone, a chunk not OK ─▶ STOPPED ─ last ack ─▶ Finish: FENCED, or as the chunk
    the pair ends, in any state ───────────────────────────────────────────────▶ Finish: status None

An announced chunk at decode (`receiving_protocol`):

    header ─▶ Receive into a slot ─▶ checksum ─▶ Deliver to the engine ─▶ landed ─▶ Free, acknowledgement, credit
                                        └─ CORRUPT ─────────────────────────┘

Credits are a standing window. Decode grants as many as it has staging slots; a header costs one, and a slot that is
free again gives one back. An announced chunk is always sent and always received, whatever becomes of its attempt;
abandoning and fencing act between chunks. Nothing of an attempt follows its commit or its AbandonAttempt.

Events go in, actions come out, to be performed in order. A machine whose peer breaks these rules ends its pair, naming
the rule; once ended it asks for nothing more than to free slots.
"""

from __future__ import annotations

from typing import NamedTuple

from common.transport.messages import (
    AbandonAttempt,
    AttemptBegin,
    AttemptKey,
    AttemptOutcome,
    ChunkHeader,
    Commit,
    FromDecode,
    FromPrefill,
)


class Send(NamedTuple):
    """Put a message on the control stream. The payload of a ChunkHeader follows on the process group."""

    message: FromPrefill | FromDecode


class Finish(NamedTuple):
    """Tell an attempt's owner how it ended. Its source blocks are not needed any more."""

    key: AttemptKey
    outcome: AttemptOutcome


class Receive(NamedTuple):
    """Post a receive into a free staging slot; there is one."""

    header: ChunkHeader


class Deliver(NamedTuple):
    """Hand to the engine: an attempt that began, a payload that arrived whole, a commit, an attempt that is over."""

    event: AttemptBegin | ChunkHeader | Commit | AbandonAttempt


class Free(NamedTuple):
    """The staging slot of this chunk may be used again."""

    sequence_number: int


class End(NamedTuple):
    """The pair is over. Comes once, last."""

    reason: str


SendingAction = Send | Finish | End
ReceivingAction = Send | Receive | Deliver | Free | End
