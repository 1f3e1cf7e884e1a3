"""Finds and opens the tensors of a Hugging Face folder: one safetensors file, or shards with an index. No pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.errors import InvalidArgument

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def tensor_files(folder: str | Path) -> dict[Path, list[str]]:
    """The tensor names in each safetensors file of the folder, files and names sorted.

    Raises:
        InvalidArgument: there are no safetensors, a shard is absent or broken, or the index disagrees with its shards.
    """
    folder = Path(folder)
    if (folder / INDEX_FILE).is_file():
        return _shards(folder)
    if not (folder / SINGLE_FILE).is_file():
        raise InvalidArgument(
            f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}; convert other weights with save_pretrained, "
            "or use --load-format dummy",
            field="model",
        )
    with open_tensors(folder / SINGLE_FILE) as file:
        return {folder / SINGLE_FILE: sorted(file.keys())}


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped: tensors read from it stay on disk until they are copied.

    Raises:
        InvalidArgument: the file is absent, cut short or otherwise broken; also while it is being read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InvalidArgument(f"{path}: {error}; download the file again", field="model") from error


def _shards(folder: Path) -> dict[Path, list[str]]:
    index = folder / INDEX_FILE
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise InvalidArgument(f"{index}: no weight_map to be read ({error!r})", field="model") from error
    files: dict[Path, list[str]] = {}
    for shard in sorted(set(weight_map.values())):
        listed = sorted(name for name, file in weight_map.items() if file == shard)
        with open_tensors(folder / shard) as file:
            stored = sorted(file.keys())
        if listed != stored:
            differing = ", ".join(sorted(set(listed) ^ set(stored)))
            raise InvalidArgument(f"{index} and {shard} disagree about {differing}; download both again", field="model")
        files[folder / shard] = stored
    return files
