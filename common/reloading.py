"""Files that may be replaced while the process runs: certificates, and who may call."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from common.settings import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")
# Modification time, size and inode of each file.
Version = tuple[tuple[int, int, int], ...]


class Reloading(Generic[T]):
    """What some files say, read again whenever one of them has changed. Any thread may ask.

    Files that cannot be used are complained about once and left for the next time: what was read before holds on.
    """

    def __init__(self, files: Mapping[str, str], read: Callable[[], T]) -> None:
        """`files`: the path behind each setting. Raises ConfigError, as `read` does, for what cannot be used."""
        self._files = files
        self._read = read
        self._complaint = ""
        self._version = self._look()
        self._value = read()

    @property
    def value(self) -> T:
        """As the files are."""
        self.refresh()
        return self._value

    @property
    def version(self) -> Version:
        """Another one whenever the files have been read again."""
        self.refresh()
        return self._version

    def refresh(self) -> bool:
        """Reads the files again if they have changed; whether it did."""
        try:
            version = self._look()
            if version == self._version:
                return False
            value = self._read()
        except ConfigError as error:
            if str(error) != self._complaint:
                log.error("going on with what was read before: %s", error)
            self._complaint = str(error)
            return False
        self._version, self._value, self._complaint = version, value, ""
        log.info("read again: %s", ", ".join(self._files))
        return True

    def _look(self) -> Version:
        return tuple(
            (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            for stat in (_stat(name, path) for name, path in self._files.items())
        )


def _stat(name: str, path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise ConfigError(f"{name}={path!r}: {error.strerror}") from None
