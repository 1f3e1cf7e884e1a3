"""From a config dataclass to `--help`, and from a TOML file and flags to an instance of it.

Each field is declared with `setting()`, which carries its help text and range. Flags stand over the file, the file over
the defaults. Whatever does not fit raises ConfigError, naming the key, the value and what was expected.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import tomllib
import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.address import Address

T = TypeVar("T")


class ConfigError(ValueError):
    """What the operator configured cannot work. The message names the key, the value and the remedy."""


class _Meta(typing.NamedTuple):
    help: str
    choices: tuple[str, ...]
    minimum: float
    maximum: float
    above: float
    form: str


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    form: typing.Literal["", "listen", "listen or empty", "target", "target or empty"] = "",
) -> Any:
    """One field of a config dataclass.

    `minimum` and `maximum` are inclusive, `above` is exclusive. A `form` makes the value (each value of a list) a
    HOST:PORT; a target's port is not 0. Units stand in the field's name.
    """
    meta = _Meta(help, tuple(choices), minimum, maximum, above, form)
    return dataclasses.field(default=default, metadata={"setting": meta})


def load(cls: type[T], argv: Sequence[str]) -> T:
    """The configuration that `argv` (without the program's name) asks for. `--help` prints every setting and exits."""
    parser = _parser(cls)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"unknown argument {unknown[0]!r}" + _nearest(unknown[0].partition("=")[0], parser._option_string_actions)
        )
    given = vars(flags)
    file = given.pop("config", None)
    values = _read_file(cls, Path(file)) if file else {}
    values.update({name: _from_text(cls, name, value) for name, value in given.items()})
    return cls(**values)


def validate(config: Any) -> None:
    """Raises ConfigError for the first field of a config dataclass whose type, range, choice or form is wrong."""
    for field in dataclasses.fields(config):
        meta: _Meta = field.metadata["setting"]
        value = getattr(config, field.name)
        if not _has_type(value, _type_of(type(config), field.name)):
            _refuse(type(config), field.name, value)
        for one in value if isinstance(value, tuple) else (value,):
            _check(field.name, one, meta)
        if isinstance(value, tuple) and not value:
            raise ConfigError(f"{field.name}: expected at least one value")


def _check(name: str, value: Any, meta: _Meta) -> None:
    if meta.choices and value not in meta.choices:
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(meta.choices)}")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not (math.isfinite(value) and meta.minimum <= value <= meta.maximum and value > meta.above):
        raise ConfigError(f"{name}={value!r}: expected {_range(meta)}")
    if meta.form and (value or "empty" not in meta.form):
        try:
            address = Address.parse(value)
        except ValueError as error:
            raise ConfigError(f"{name}={value!r}: {error}") from None
        if meta.form.startswith("target") and address.port == 0:
            raise ConfigError(f"{name}={value!r}: port 0 cannot be dialled")


def _range(meta: _Meta) -> str:
    bounds = [
        f"more than {meta.above:g}" if meta.above > -math.inf else "",
        f"at least {meta.minimum:g}" if meta.minimum > -math.inf else "",
        f"at most {meta.maximum:g}" if meta.maximum < math.inf else "",
    ]
    return " and ".join(filter(None, bounds)) or "a finite number"


def _read_file(cls: type, path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--config {path}: not a TOML file: {error}") from None
    names = [field.name for field in dataclasses.fields(cls)]
    for key in table:
        if key not in names:
            raise ConfigError(f"{path}: unknown key {key!r}" + _nearest(key, names))
    return {key: _from_toml(cls, key, value) for key, value in table.items()}


def _from_toml(cls: type, name: str, value: Any) -> Any:
    expected = _type_of(cls, name)
    if typing.get_origin(expected) is tuple and isinstance(value, list):
        value = tuple(value)
    if not _has_type(value, expected):
        _refuse(cls, name, value)
    return value


def _from_text(cls: type, name: str, text: Any) -> Any:
    expected = _type_of(cls, name)
    if expected in (int, float):
        try:
            return expected(text)
        except ValueError:
            _refuse(cls, name, text)
    return tuple(text) if isinstance(text, list) else text


def _refuse(cls: type, name: str, value: Any) -> NoReturn:
    expected = _type_of(cls, name)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    raise ConfigError(f"{name}={value!r}: expected {words.get(expected, 'a list of strings')}")


def _has_type(value: Any, expected: Any) -> bool:
    if typing.get_origin(expected) is tuple:
        return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    return type(value) is expected or (expected is float and type(value) is int)


def _type_of(cls: type, name: str) -> Any:
    return _types_of(cls)[name]


@functools.cache
def _types_of(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else "; --help lists them all"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser(cls: type) -> _Parser:
    parser = _Parser(
        description=(cls.__doc__ or "").strip().splitlines()[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file whose keys are the names below with underscores; flags stand over it",
    )
    for field in dataclasses.fields(cls):
        meta: _Meta = field.metadata["setting"]
        flag = "--" + field.name.replace("_", "-")
        expected, default = _type_of(cls, field.name), field.default
        help = f"{meta.help} (default: {_shown(default)})".replace("%", "%%")
        if expected is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        elif typing.get_origin(expected) is tuple:
            metavar = "{" + ",".join(meta.choices) + "}" if meta.choices else "HOST:PORT"
            parser.add_argument(flag, action="append", metavar=metavar, help=help + "; repeatable")
        else:
            metavar = (
                "{" + ",".join(meta.choices) + "}"
                if meta.choices
                else ("HOST:PORT" if meta.form else expected.__name__.upper())
            )
            parser.add_argument(flag, metavar=metavar, help=help)
    return parser


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(default)
    if isinstance(default, bool):
        return "yes" if default else "no"
    return str(default) if default != "" else "empty"
