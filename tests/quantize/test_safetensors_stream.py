"""Files written tensor by tensor are ordinary safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from trimode.quantize.safetensors_stream import TensorSpec, write_tensors

ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "c": np.linspace(-1, 1, 10).astype(ml_dtypes.bfloat16),
    "d": np.linspace(-1, 1, 8).astype(np.float16).reshape(2, 2, 2),
}
SPECS = [TensorSpec(name, array.dtype, array.shape) for name, array in ARRAYS.items()]


def test_the_library_reads_one_file_back(tmp_path: Path) -> None:
    write_tensors(tmp_path, SPECS, ARRAYS.values())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    _same(load_file(tmp_path / "model.safetensors"))


def test_shards_contain_each_tensor_once_and_the_index_lists_them(tmp_path: Path) -> None:
    write_tensors(tmp_path, SPECS, ARRAYS.values(), shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        **dict.fromkeys("bcd", "model-00002-of-00002.safetensors"),
    }
    shards = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
    assert sum(map(len, shards.values())) == len(ARRAYS)
    _same({name: shards[file][name] for name, file in index["weight_map"].items()})


def test_a_tensor_larger_than_a_shard_gets_a_separate_one(tmp_path: Path) -> None:
    write_tensors(tmp_path, SPECS, ARRAYS.values(), shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(ARRAYS)


def test_a_strided_slice_is_written_in_row_major_order(tmp_path: Path) -> None:
    array = ARRAYS["a"].T
    write_tensors(tmp_path, [TensorSpec("a", array.dtype, array.shape)], [array])
    assert np.array_equal(load_file(tmp_path / "model.safetensors")["a"], array)


@pytest.mark.parametrize("given", [np.zeros((6, 4), np.float32), np.zeros((4, 6), np.float16)], ids=["shape", "dtype"])
def test_a_tensor_that_differs_from_its_declaration_is_an_error(tmp_path: Path, given: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected, .* found"):
        write_tensors(tmp_path, SPECS[:1], [given])


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        write_tensors(tmp_path, SPECS, list(ARRAYS.values())[:-1])


def _same(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
