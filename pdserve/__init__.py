"""What users import and type.

    Client, AsyncClient       talk to routers          pdserve.sync_client, pdserve.client
    WorkerClient              asks one worker          pdserve.worker_client
    LLM, SamplingParams       services of one's own    pdserve.llm, pdserve.sampling
    PdserveError and leaves   what calls raise         common.errors, which draws the tree
    ConfigError               what cannot work         common.settings
    pdserve.v1                the stubs of `protos/`, generated at install
    pdserve.cli               the command

Each name is imported when it is first asked for: the stubs alone need grpcio and protobuf, and nothing needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.errors import Aborted as Aborted
    from common.errors import AlreadyExists as AlreadyExists
    from common.errors import Cancelled as Cancelled
    from common.errors import DataLoss as DataLoss
    from common.errors import DeadlineExceeded as DeadlineExceeded
    from common.errors import FailedPrecondition as FailedPrecondition
    from common.errors import Internal as Internal
    from common.errors import InvalidArgument as InvalidArgument
    from common.errors import NotFound as NotFound
    from common.errors import PdserveError as PdserveError
    from common.errors import PermissionDenied as PermissionDenied
    from common.errors import ResourceExhausted as ResourceExhausted
    from common.errors import Unauthenticated as Unauthenticated
    from common.errors import Unavailable as Unavailable
    from common.params import TokenLogprob as TokenLogprob
    from common.params import TopLogprob as TopLogprob
    from common.settings import ConfigError as ConfigError
    from pdserve.access import Access as Access
    from pdserve.client import AsyncClient as AsyncClient
    from pdserve.llm import LLM as LLM
    from pdserve.request import Chat as Chat
    from pdserve.request import Message as Message
    from pdserve.results import Chunk as Chunk
    from pdserve.results import Completion as Completion
    from pdserve.results import Reply as Reply
    from pdserve.results import ServingPath as ServingPath
    from pdserve.results import Usage as Usage
    from pdserve.retrying import RetryPolicy as RetryPolicy
    from pdserve.sampling import SamplingParams as SamplingParams
    from pdserve.sync_client import Client as Client
    from pdserve.worker_client import WorkerClient as WorkerClient

_NAMES = {
    "common.errors": (
        "Aborted AlreadyExists Cancelled DataLoss DeadlineExceeded FailedPrecondition Internal InvalidArgument "
        "NotFound PdserveError PermissionDenied ResourceExhausted Unauthenticated Unavailable"
    ),
    "common.params": "TokenLogprob TopLogprob",
    "common.settings": "ConfigError",
    "pdserve.access": "Access",
    "pdserve.client": "AsyncClient",
    "pdserve.llm": "LLM",
    "pdserve.request": "Chat Message",
    "pdserve.results": "Chunk Completion Reply ServingPath Usage",
    "pdserve.retrying": "RetryPolicy",
    "pdserve.sampling": "SamplingParams",
    "pdserve.sync_client": "Client",
    "pdserve.worker_client": "WorkerClient",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pdserve' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
