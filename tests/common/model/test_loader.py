from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import InvalidArgument
from common.model.loader import load_model
from common.model.qwen3 import Qwen3ForCausalLM
from tests.common.model.folders import config_folder, reference_model

FILE = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


def stored(model: Qwen3ForCausalLM) -> dict[str, Tensor]:
    """The model's weights under their checkpoint names; of a broadcast destination, each row must agree."""
    tensors = {}
    for name, shape, destination in model.stored_tensors():
        tensor = destination.reshape(-1, *shape)[0] if destination.ndim > len(shape) else destination
        assert torch.equal(tensor.expand(destination.shape), destination)
        tensors[name] = tensor
    return tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tied model, as Transformers saves it."""
    reference_model().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: Tensor | None) -> Path:
    """Replaces, adds or (None) removes tensors; `__` stands for a dot in a name."""
    tensors = load_file(folder / FILE)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / FILE)
    return folder


def dotted(name: str) -> str:
    return name.replace(".", "__")


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_the_file_lands_in_the_model(tied: bool, tmp_path: Path) -> None:
    reference = reference_model(tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    expected = dict(reference.named_parameters())
    loaded = stored(model)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert (model.head_VD is model.model.embedding_VD) == tied


def test_shards_load_like_one_file(folder: Path, tmp_path: Path) -> None:
    reference_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded, whole = stored(load_model(tmp_path / "sharded")), stored(load_model(folder))
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


@pytest.mark.parametrize("in_file", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_from_the_files_dtype_to_the_wanted_one(
    in_file: torch.dtype, wanted: str, tmp_path: Path
) -> None:
    reference_model().to(in_file).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=wanted)
    assert model.dtype == getattr(torch, wanted)
    for name, tensor in load_file(tmp_path / FILE).items():
        assert torch.equal(stored(model)[name], tensor.to(model.dtype))


def test_a_tied_checkpoint_may_hold_its_head_twice(folder: Path) -> None:
    embedding = load_file(folder / FILE)["model.embed_tokens.weight"]
    model = load_model(rewrite(folder, lm_head__weight=embedding.clone()))
    assert model.head_VD is model.model.embedding_VD
    assert torch.equal(model.head_VD, embedding)


def test_a_head_that_contradicts_the_tie_is_refused(folder: Path) -> None:
    embedding = load_file(folder / FILE)["model.embed_tokens.weight"]
    with pytest.raises(InvalidArgument, match=r"lm_head\.weight differs .*set tie_word_embeddings to false"):
        load_model(rewrite(folder, lm_head__weight=embedding + 1))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"lacks {Q_PROJ}$"):
        load_model(rewrite(folder, **{dotted(Q_PROJ): None}))


def test_a_missing_head_is_named_with_its_remedy(folder: Path) -> None:
    config_folder(folder, tie_word_embeddings=False)
    with pytest.raises(InvalidArgument, match=r"lacks lm_head\.weight; .*tie_word_embeddings"):
        load_model(folder)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no place for model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(rewrite(folder, model__layers__0__self_attn__q_proj__bias=torch.zeros(64)))


def test_a_mis_shaped_tensor_is_named_with_both_shapes(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match=rf"{UP_PROJ} has shape \[47, 32\], config\.json asks for \[48, 32\]"):
        load_model(rewrite(folder, **{dotted(UP_PROJ): torch.zeros(47, 32)}))


def test_a_tensor_of_integers_is_named(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"{UP_PROJ} is I8"):
        load_model(rewrite(folder, **{dotted(UP_PROJ): torch.zeros(48, 32, dtype=torch.int8)}))


def test_many_missing_tensors_are_counted_not_listed(folder: Path) -> None:
    config_folder(folder, num_hidden_layers=4)
    with pytest.raises(InvalidArgument, match=r"model\.layers\.2\.\S+ and 17 more$"):
        load_model(folder)


def test_a_folder_without_safetensors_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (config_folder(tmp_path) / "pytorch_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(InvalidArgument, match=r"neither model\.safetensors nor .*save_pretrained.*dummy"):
        load_model(tmp_path)


def test_a_file_cut_short_is_named(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:-10])
    with pytest.raises(InvalidArgument, match=r"model\.safetensors: .*download the file again"):
        load_model(folder)


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    reference_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = max(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(InvalidArgument, match=f"{shard.name}: .*download"):
        load_model(tmp_path)


def test_an_index_that_disagrees_with_its_shard_names_the_tensor(tmp_path: Path) -> None:
    reference_model().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(Q_PROJ, "model.layers.9.self_attn.q_proj.weight"))
    with pytest.raises(InvalidArgument, match=r"disagree about model\.layers\.1.*model\.layers\.9"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}"])
def test_an_index_that_cannot_be_read_is_named(content: str, tmp_path: Path) -> None:
    (config_folder(tmp_path) / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InvalidArgument, match=r"index\.json: no weight_map"):
        load_model(tmp_path)


def test_an_unknown_load_format_names_those_there_are(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="'pickle': expected one of auto, dummy"):
        load_model(folder, load_format="pickle")


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_progress_grows_to_the_total(load_format: str, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(folder, load_format=load_format, progress=lambda done, total: seen.append((done, total)))
    done_bytes = [done for done, _ in seen]
    assert done_bytes == sorted(set(done_bytes))
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


def test_dummy_weights_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    config_folder(tmp_path / "a")
    config_folder(tmp_path / "b", num_hidden_layers=5, tie_word_embeddings=False)
    first, again = (stored(load_model(tmp_path / "a", load_format="dummy", seed=3)) for _ in range(2))
    larger = stored(load_model(tmp_path / "b", load_format="dummy", seed=3))
    other = stored(load_model(tmp_path / "a", load_format="dummy", seed=4))
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], larger[name]) for name in first)
    assert not torch.equal(first[Q_PROJ], other[Q_PROJ])
    assert not torch.equal(first[Q_PROJ], first[Q_PROJ.replace("layers.1", "layers.0")])


def test_dummy_weights_are_the_same_however_they_are_chunked_or_laid_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stored(load_model(config_folder(tmp_path), load_format="dummy"))
    monkeypatch.setattr("common.model.dummy.CHUNK_ELEMENTS", 100)
    chunked = stored(load_model(tmp_path, load_format="dummy"))
    rounded = stored(load_model(tmp_path, load_format="dummy", dtype="bfloat16"))
    assert all(torch.equal(chunked[name], whole[name]) for name in whole)
    assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)


def test_dummy_matrices_look_like_a_fresh_initialisation(tmp_path: Path) -> None:
    model = load_model(config_folder(tmp_path, hidden_size=256, vocab_size=4000), load_format="dummy")
    noise = model.model.embedding_VD
    assert noise.mean().abs() < 1e-4
    assert noise.std().item() == pytest.approx(0.02, rel=0.01)
    assert len(noise.unique()) > 0.9 * noise.numel()
    # Neighbouring rows and columns are not alike.
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        assert torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].abs() < 5e-3
    assert torch.equal(model.model.norm_D, torch.ones(256))
