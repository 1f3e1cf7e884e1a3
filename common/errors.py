"""Every error a caller can meet, and the one table that maps it to a gRPC status.

    PdserveError
    ├── InvalidArgument        what the caller sent can never work: names the field and the limit
    ├── NotFound               no such model
    ├── AlreadyExists          a request of this id is in flight
    ├── ResourceExhausted      queue or KV full; carries a retry delay
    ├── Unavailable            no worker, draining, or a peer was lost; trying again may help
    ├── FailedPrecondition     wrong role, another fingerprint, layout or protocol version
    ├── DeadlineExceeded       the caller's time is up
    ├── Cancelled              the caller left
    ├── Aborted                a fenced attempt: a newer one exists
    ├── DataLoss               a checksum did not hold
    ├── Unauthenticated        nobody knows who the caller is
    ├── PermissionDenied       the caller may not do this
    └── Internal               a bug, and only a bug

Services raise these; `common.rpc` turns them into statuses with google.rpc details, and back into the same classes at a
client.
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "pdserve"

# The message travels up to three times in the trailers (percent-encoded, in the details, and in BadRequest), and gRPC
# puts a status of its own in place of one whose trailers exceed 8 KiB.
_MAX_TEXT_BYTES = 1024


class PdserveError(Exception):
    """Base of all errors that cross a service boundary.

    `field` names the request field at fault (`sampling.top_p`), `retry_after_s` when trying again makes sense,
    `reason` is a machine-readable name (UPPER_SNAKE_CASE) that defaults to the class's own.
    """

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.reason = reason or self.default_reason


class InvalidArgument(PdserveError):
    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_ARGUMENT"


class NotFound(PdserveError):
    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class AlreadyExists(PdserveError):
    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "ALREADY_EXISTS"


class ResourceExhausted(PdserveError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = 1.0, reason: str = "") -> None:
        super().__init__(message, field=field, retry_after_s=retry_after_s, reason=reason)


class Unavailable(PdserveError):
    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class FailedPrecondition(PdserveError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class DeadlineExceeded(PdserveError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(PdserveError):
    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class Aborted(PdserveError):
    code = grpc.StatusCode.ABORTED
    default_reason = "ATTEMPT_FENCED"


class DataLoss(PdserveError):
    code = grpc.StatusCode.DATA_LOSS
    default_reason = "CHECKSUM_MISMATCH"


class Unauthenticated(PdserveError):
    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(PdserveError):
    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class Internal(PdserveError):
    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


BY_CODE: dict[grpc.StatusCode, type[PdserveError]] = {cls.code: cls for cls in PdserveError.__subclasses__()}

_NUMBER_OF: dict[grpc.StatusCode, int] = {code: code_pb2.Code.Value(code.name) for code in grpc.StatusCode}


def to_status(error: BaseException) -> rpc_status._Status:
    """A gRPC status with google.rpc details: ErrorInfo always, BadRequest for a field, RetryInfo for a delay.

    Anything that is not a PdserveError is a bug and becomes INTERNAL.
    """
    if not isinstance(error, PdserveError):
        error = Internal(f"{type(error).__name__}: {error}")
    message = _clip(error.message)
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return rpc_status.to_status(status_pb2.Status(code=_NUMBER_OF[error.code], message=message, details=packed))


def _clip(text: str) -> str:
    raw = text.encode("utf-8", errors="replace")
    return text if len(raw) <= _MAX_TEXT_BYTES else raw[:_MAX_TEXT_BYTES].decode("utf-8", errors="ignore") + " …"


def from_rpc_error(error: grpc.RpcError) -> PdserveError:
    """The domain error behind a failed call, with what its details carry."""
    code, message = error.code(), error.details() or ""
    field, reason, retry_after_s = "", "", None
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info, bad, retry = (
                    error_details_pb2.ErrorInfo(),
                    error_details_pb2.BadRequest(),
                    error_details_pb2.RetryInfo(),
                )
                if detail.Unpack(info):
                    reason = info.reason
                elif detail.Unpack(bad) and bad.field_violations:
                    field = bad.field_violations[0].field
                elif detail.Unpack(retry):
                    retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    if code is grpc.StatusCode.INTERNAL and not reason:
        # No service of ours said so: gRPC itself lost the call.
        return Unavailable(f"the call was lost: {message}", reason="CALL_LOST")
    return BY_CODE.get(code, Internal)(message, field=field, reason=reason, retry_after_s=retry_after_s)
