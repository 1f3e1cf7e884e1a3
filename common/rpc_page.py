"""`python -m common.rpc_page` prints docs/rpc.md, all calls and messages, from the comments in protos/."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

HEAD = """\
# RPC reference

Every call and message of package `pdserve.v1`, printed from the comments in [protos/](../protos/pdserve/v1) by
`make docs`. All three services answer server reflection, so that `grpcurl` and `buf curl` need no files, and
`grpc.health.v1.Health`. What a failed call tells is in [errors.md](errors.md).

A field marked optional is told apart when it is unset; any other that is unset has the value zero, empty or false.
"""

FILES = ("router", "types", "decode", "prefill", "worker")
ROOT = Path(__file__).resolve().parent.parent
# Numbers of fields in descriptor.proto, of which the paths to comments consist.
MESSAGES, ENUMS, SERVICES, SYNTAX = 4, 5, 6, 12
FIELDS, VALUES, METHODS = 2, 2, 2

Place = tuple[int, ...]


def page() -> str:
    """Raises CalledProcessError when the protos do not compile."""
    files = {file.name: file for file in described().file}
    chosen = [File(files[f"pdserve/v1/{name}.proto"]) for name in FILES]
    return "\n".join([HEAD, *(line for file in chosen for line in file.lines())])


def described() -> FileDescriptorSet:
    """The protos with their comments, as buf compiles them."""
    buf = Path(sys.executable).parent / "buf"
    done = subprocess.run([buf, "build", "-o", "-#format=binpb"], cwd=ROOT, capture_output=True, check=True)
    return FileDescriptorSet.FromString(done.stdout)


class File:
    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {tuple(one.path): one for one in file.source_code_info.location}

    def lines(self) -> Iterator[str]:
        yield f"## {Path(self._file.name).name}\n"
        yield f"{self._comment((SYNTAX,), paragraphs=True)}\n"
        for number, service in enumerate(self._file.service):
            yield from self._service(service, (SERVICES, number))
        for number, message in enumerate(self._file.message_type):
            yield from self._message(message, (MESSAGES, number))
        for number, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (ENUMS, number))

    def _service(self, service: ServiceDescriptorProto, path: Place) -> Iterator[str]:
        yield f"### {service.name}\n"
        rows = [
            (f"`{method.name}`", _signature(method), self._comment((*path, METHODS, number)))
            for number, method in enumerate(service.method)
        ]
        yield from _table(("call", "takes, and gives", "what it does"), rows)

    def _message(self, message: DescriptorProto, path: Place) -> Iterator[str]:
        yield from self._titled(message.name, path)
        if not message.field:
            yield "No fields.\n"
            return
        rows = [
            (f"`{field.name}`", _type(field, message), self._comment((*path, FIELDS, number)))
            for number, field in enumerate(message.field)
        ]
        yield from _table(("field", "type", "what it says"), rows)

    def _enum(self, enum: EnumDescriptorProto, path: Place) -> Iterator[str]:
        yield from self._titled(enum.name, path)
        rows = [
            (f"`{value.name}`", str(value.number), self._comment((*path, VALUES, number)))
            for number, value in enumerate(enum.value)
        ]
        yield from _table(("value", "number", "what it says"), rows)

    def _titled(self, name: str, path: Place) -> Iterator[str]:
        yield f"### {name}\n"
        if comment := self._comment(path):
            yield f"{comment}\n"

    def _comment(self, path: Place, *, paragraphs: bool = False) -> str:
        text = self._comments[path].leading_comments if path in self._comments else ""
        joined = [" ".join(part.split()) for part in text.split("\n\n")]
        return ("\n\n" if paragraphs else " ").join(joined).replace("|", r"\|")


def _signature(method: MethodDescriptorProto) -> str:
    takes, gives = (_link(name) for name in (method.input_type, method.output_type))
    stream = ["stream of " if streams else "" for streams in (method.client_streaming, method.server_streaming)]
    return f"{stream[0]}{takes} → {stream[1]}{gives}"


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    entry = next((one for one in message.nested_type if one.name == field.type_name.rpartition(".")[2]), None)
    if entry is not None:
        key, value = (_plain(one) for one in entry.field)
        return f"map from {key} to {value}"
    kind = _plain(field)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    if field.proto3_optional:
        return f"optional {kind}"
    if field.HasField("oneof_index"):
        return f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return kind


def _plain(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return _link(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _link(full_name: str) -> str:
    name = full_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
