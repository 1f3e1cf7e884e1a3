"""Fills a model's weights: from safetensors straight into the fused matrices, or with seeded noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from common.errors import InvalidArgument
from common.model.checkpoint import open_tensors, tensor_files
from common.model.config import ModelConfig, resolve_dtype
from common.model.dummy import fill_dummy
from common.model.operations import Operations
from common.model.qwen3 import Qwen3ForCausalLM

# Called with (done_bytes, total_bytes).
Progress = Callable[[int, int], None]

LOAD_FORMATS = ("auto", "dummy")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# As safetensors spells them, with their bytes.
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def load_model(
    folder: str | Path,
    *,
    load_format: str = "auto",
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    operations: Operations | None = None,
) -> Qwen3ForCausalLM:
    """A model ready to run. Weights are allocated once, on the device, and copied out of memory-mapped files.

    `load_format` dummy needs config.json alone and fills in noise of `seed`. `dtype` auto is float32 on a CPU and the
    folder's own elsewhere; `operations` is PyTorch's own by default. `progress(done_bytes, total_bytes)` counts what is
    read, or for dummy weights written.

    Raises:
        InvalidArgument: naming the file, field or tensor at fault; raised before any weight is copied.
    """
    device = torch.device(device)
    report = progress or (lambda done_bytes, total_bytes: None)
    if load_format not in LOAD_FORMATS:
        raise InvalidArgument(
            f"load_format={load_format!r}: expected one of {', '.join(LOAD_FORMATS)}", field="load_format"
        )
    config = ModelConfig.from_folder(folder)
    model_dtype = resolve_dtype(dtype, config, device)
    if load_format == "dummy":
        model = Qwen3ForCausalLM(config, dtype=model_dtype, device=device, operations=operations)
        _fill_with_noise(model, seed, report)
    else:
        files = tensor_files(folder)
        model = Qwen3ForCausalLM(config, dtype=model_dtype, device=device, operations=operations)
        total_bytes = _check(model, files)
        _copy_files(model, files, total_bytes, report)
    return model


def _fill_with_noise(model: Qwen3ForCausalLM, seed: int, report: Progress) -> None:
    tensors = list(model.stored_tensors())
    done_bytes, total_bytes = 0, sum(stored.destination.nbytes for stored in tensors)
    for stored in tensors:
        fill_dummy(stored.destination, stored.name, seed)
        done_bytes += stored.destination.nbytes
        report(done_bytes, total_bytes)


def _copy_files(model: Qwen3ForCausalLM, files: dict[Path, list[str]], total_bytes: int, report: Progress) -> None:
    destinations = {stored.name: stored.destination for stored in model.stored_tensors()}
    done_bytes = 0
    for path, names in files.items():
        with open_tensors(path) as file:
            for name in names:
                tensor = file.get_tensor(name)
                # A tied checkpoint may hold its head a second time.
                if name in destinations:
                    destinations[name].copy_(tensor)
                done_bytes += tensor.nbytes
                report(done_bytes, total_bytes)


def _check(model: Qwen3ForCausalLM, files: dict[Path, list[str]]) -> int:
    """The bytes to read, once every name, shape and dtype is as it must be."""
    shapes = {stored.name: stored.shape for stored in model.stored_tensors()}
    file_of = {name: path for path, names in files.items() for name in names}
    folder = next(iter(files)).parent
    if missing := sorted(shapes.keys() - file_of.keys()):
        hint = "; if the head is the embedding, set tie_word_embeddings in config.json" if HEAD in missing else ""
        raise InvalidArgument(f"{folder}: the checkpoint lacks {_listed(missing)}{hint}", field="model")
    if model.config.tie_word_embeddings and HEAD in file_of:
        _require_tied(file_of)
        shapes[HEAD] = shapes[EMBEDDING]
    if extra := sorted(file_of.keys() - shapes.keys()):
        raise InvalidArgument(
            f"{folder}: the model that config.json describes has no place for {_listed(extra)}", field="model"
        )
    return sum(_check_file(path, names, shapes) for path, names in files.items())


def _check_file(path: Path, names: list[str], shapes: dict[str, tuple[int, ...]]) -> int:
    num_bytes = 0
    with open_tensors(path) as file:
        for name in names:
            entry = file.get_slice(name)
            shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
            if shape != shapes[name]:
                raise InvalidArgument(
                    f"{path}: {name} has shape {list(shape)}, config.json asks for {list(shapes[name])}", field="model"
                )
            if dtype not in FLOAT_BYTES:
                raise InvalidArgument(
                    f"{path}: {name} is {dtype}; use a {', '.join(FLOAT_BYTES)} checkpoint", field="model"
                )
            num_bytes += torch.Size(shape).numel() * FLOAT_BYTES[dtype]
    return num_bytes


def _require_tied(file_of: dict[str, Path]) -> None:
    with open_tensors(file_of[HEAD]) as head_file, open_tensors(file_of[EMBEDDING]) as embedding_file:
        if not torch.equal(head_file.get_tensor(HEAD), embedding_file.get_tensor(EMBEDDING)):
            raise InvalidArgument(
                f"{file_of[HEAD]}: {HEAD} differs from {EMBEDDING} though config.json ties them; "
                "set tie_word_embeddings to false",
                field="model",
            )


def _listed(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"
