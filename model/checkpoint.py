"""A checkpoint folder. Names, types and shapes of its tensors are checked against its config before any is read.

Formats: the family's Hugging Face folder (one or several safetensors files, the ``linear_spec_lora`` adapter folder),
and the same with ModelOpt's int4 weights. Weights are read from safetensors files only: nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, which safetensors needs
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from safetensors import SafetensorError, safe_open

from trimode.common.errors import TriModeError
from trimode.common.records import read_json, read_json_object, read_json_record
from trimode.model import int4
from trimode.model.config import CONFIG, ModelConfig
from trimode.model.quantization import QUANT_CONFIG_FILE, read_quantization
from trimode.model.tokenizer import TEMPLATE_FOLDER

ADAPTER_FOLDER = "linear_spec_lora"
HEAD = "diffusion_head"
# In `config.json` of a quantised checkpoint: the name of the checkpoint that it was made from.
SOURCE_NAME = "base_model"
FLOAT_DTYPES = ("F32", "F16", "BF16")
# The name of one of several files that hold a model's weights.
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


class AdapterConfig(BaseModel):
    """The fields of peft's ``adapter_config.json`` that the draft adapter uses."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    peft_type: Literal["LORA"] = "LORA"
    r: PositiveInt
    lora_alpha: PositiveFloat
    target_modules: tuple[Literal["o_proj"]] = ("o_proj",)
    bias: Literal["none"] = "none"
    use_rslora: Literal[False] = False
    use_dora: Literal[False] = False
    lora_bias: Literal[False] = False
    # Ranks or alphas of single layers, and adapters of some layers only, are not supported.
    rank_pattern: Annotated[dict[str, int], Field(max_length=0)] = Field(default_factory=dict)
    alpha_pattern: Annotated[dict[str, float], Field(max_length=0)] = Field(default_factory=dict)
    layers_to_transform: None = None

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.r


@dataclass(frozen=True)
class DenseWeight:
    """A 16- or 32-bit matrix [out, in]."""

    array: NDArray[Any]

    def to_float32(self) -> NDArray[np.float32]:
        return self.array.astype(np.float32)


@dataclass(frozen=True)
class Int4Weight:
    """y = W (x * input_scale) with W = integers * scale; one scale for each row and group of input channels."""

    packed: NDArray[np.uint8]  # [out / 2, in], see trimode.model.int4
    scale: NDArray[np.float32]  # [out, in / group]
    input_scale: NDArray[np.float32] | None  # [in]; AWQ's, unless it is folded into a norm

    def to_float32(self) -> NDArray[np.float32]:
        """The matrix that acts on the unscaled input, [out, in]."""
        weight = int4.dequantize(int4.unpack(self.packed), self.scale)
        return weight if self.input_scale is None else weight * self.input_scale


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every matrix that multiplies activations, by module name, in the order of their use."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, int]] = {}
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layers.{index}"
        shapes[f"{layer}.self_attn.q_proj"] = (config.query_width, hidden)
        shapes[f"{layer}.self_attn.k_proj"] = (config.kv_width, hidden)
        shapes[f"{layer}.self_attn.v_proj"] = (config.kv_width, hidden)
        shapes[f"{layer}.self_attn.o_proj"] = (hidden, config.query_width)
        shapes[f"{layer}.mlp.gate_proj"] = (mlp, hidden)
        shapes[f"{layer}.mlp.up_proj"] = (mlp, hidden)
        shapes[f"{layer}.mlp.down_proj"] = (hidden, mlp)
    shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def vector_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the embedding and the norms, by tensor name."""
    shapes: dict[str, tuple[int, ...]] = {"encoder.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for index in range(config.num_hidden_layers):
        shapes[f"encoder.layers.{index}.input_layernorm.weight"] = (config.hidden_size,)
        shapes[f"encoder.layers.{index}.post_attention_layernorm.weight"] = (config.hidden_size,)
    shapes["encoder.norm.weight"] = (config.hidden_size,)
    return shapes


def adapter_shapes(config: ModelConfig, rank: int) -> dict[str, tuple[int, int]]:
    """Shapes of the draft adapter's tensors, by peft's names: A [rank, in] and B [out, rank] of every o_proj."""
    shapes: dict[str, tuple[int, int]] = {}
    for index in range(config.num_hidden_layers):
        prefix = f"base_model.model.encoder.layers.{index}.self_attn.o_proj"
        shapes[f"{prefix}.lora_A.weight"] = (rank, config.query_width)
        shapes[f"{prefix}.lora_B.weight"] = (config.hidden_size, rank)
    return shapes


class TensorFiles:
    """Several safetensors files as one set of tensors. They are memory-mapped; reading copies a tensor."""

    def __init__(self, files: list[Path]) -> None:
        self._owner: dict[str, tuple[Path, Any]] = {}
        for path in files:
            try:
                handle: Any = safe_open(path, framework="np")
            except FileNotFoundError:
                raise TriModeError(f"{path} is missing") from None
            except (SafetensorError, OSError) as error:
                raise TriModeError(
                    f"{path} is not a complete safetensors file ({error}); download or write it again"
                ) from None
            for name in handle.keys():  # noqa: SIM118 - a handle is not a mapping
                if name in self._owner:
                    raise TriModeError(f"{path}: tensor {name} is also in {self._owner[name][0].name}")
                self._owner[name] = (path, handle)

    def names(self) -> set[str]:
        return set(self._owner)

    def file_of(self, name: str) -> Path:
        return self._owner[name][0]

    def described(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype, by safetensors' name, and the shape. The tensor is not read."""
        part = self._owner[name][1].get_slice(name)
        return part.get_dtype(), tuple(part.get_shape())

    def read(self, name: str) -> NDArray[Any]:
        """Read a tensor. Raises TriModeError if a float tensor has NaN or infinite values."""
        path, handle = self._owner[name]
        array: NDArray[Any] = handle.get_tensor(name)
        if self.described(name)[0] in FLOAT_DTYPES:
            bad = array.size - int(np.isfinite(array).sum())
            if bad:
                raise TriModeError(
                    f"{path}: tensor {name} holds {bad} NaN or infinite values of {array.size}; the file is damaged"
                )
        return array


class Adapter:
    """The low-rank draft adapter of every ``o_proj``: o = base(x) + scale * B (A x)."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.config = read_json_record(AdapterConfig, folder / "adapter_config.json")
        self._files = TensorFiles([folder / "adapter_model.safetensors"])
        expected = {name: (FLOAT_DTYPES, shape) for name, shape in adapter_shapes(model, self.config.r).items()}
        _check(self._files, expected, folder)

    def matrices(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A [rank, in] and B [out, rank] as stored, without ``config.scale``."""
        prefix = f"base_model.model.encoder.layers.{layer}.self_attn.o_proj"
        return self._files.read(f"{prefix}.lora_A.weight"), self._files.read(f"{prefix}.lora_B.weight")


class Checkpoint:
    """An opened checkpoint: config, tensors by name, the adapter if there is one.

    name: the model's public name: the argument (a hub id), else the name of the checkpoint that this one was quantised
    from, else the folder's name.

    Raises TriModeError if the folder is not a checkpoint of the family, or its tensors do not match its config.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        if not folder.is_dir():
            raise TriModeError(
                f"{folder} is not a folder; give a checkpoint folder (config.json, *.safetensors) or a Hugging Face "
                "model ID"
            )
        self.folder = folder
        self.config = ModelConfig.of_folder(folder)
        self.name = name or _recorded_name(folder) or folder.resolve().name
        self._files = self._open_files()
        self.quantization = read_quantization(folder, self._group_of_scales())
        if self.quantization is None:
            self._refuse_unstated_quantization()
        _check(self._files, self._expected(), folder)
        self.adapter = Adapter(folder / ADAPTER_FOLDER, self.config) if (folder / ADAPTER_FOLDER).is_dir() else None

    def unmap(self) -> None:
        """Release the mapped pages of the tensors read so far. Tensors can still be read."""
        self._files = self._open_files()

    def is_int4(self, module: str) -> bool:
        """Whether the matrix of that linear layer is int4; each matrix has its own type."""
        return self.quantization is not None and self.quantization.is_int4(module)

    def linear(self, module: str) -> DenseWeight | Int4Weight:
        """The matrix of a linear layer, e.g. ``encoder.layers.0.mlp.up_proj``."""
        weight = self._files.read(f"{module}.weight")
        if not self.is_int4(module):
            return DenseWeight(weight)
        scale = self._files.read(f"{module}.weight_scale").astype(np.float32)
        return Int4Weight(weight, scale, self.input_scale(module))

    def input_scale(self, module: str) -> NDArray[np.float32] | None:
        """The factors of an int4 layer's input, if it has some."""
        name = f"{module}.pre_quant_scale"
        return self._files.read(name).astype(np.float32) if name in self._files.names() else None

    def vector(self, name: str) -> NDArray[Any]:
        """An embedding or norm tensor, as stored."""
        return self._files.read(name)

    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor's dtype, by safetensors' name, and shape, by tensor name. No tensor is read."""
        return {name: self._files.described(name) for name in sorted(self._files.names())}

    def tensors(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Every tensor as stored, one in memory at a time."""
        for name in sorted(self._files.names()):
            yield name, self._files.read(name)

    @cached_property
    def parameters(self) -> int:
        """The number of weights of the network, without the adapter."""
        linear = sum(rows * columns for rows, columns in linear_shapes(self.config).values())
        return linear + sum(int(np.prod(shape)) for shape in vector_shapes(self.config).values())

    def _open_files(self) -> TensorFiles:
        return TensorFiles(_weight_files(self.folder))

    def _refuse_unstated_quantization(self) -> None:
        """Raises TriModeError if tensors are quantised but no file states how."""
        quantised = next((name for name in sorted(self._files.names()) if _is_quantised(name, self._files)), None)
        if quantised is not None:
            raise TriModeError(
                f"{self.folder} is quantised ({quantised} is {self._files.described(quantised)[0]}), but has neither "
                f"{QUANT_CONFIG_FILE} nor quantization_config in {CONFIG}; restore the file"
            )

    def _group_of_scales(self) -> int | None:
        """Input channels that share a scale, from the shape of the first matrix with scales; None without scales."""
        for module, (_, columns) in linear_shapes(self.config).items():
            scale = f"{module}.weight_scale"
            if scale in self._files.names():
                groups = self._files.described(scale)[1][-1:]
                return columns // groups[0] if groups and groups[0] else None
        return None

    def _expected(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
            name: (FLOAT_DTYPES, shape) for name, shape in vector_shapes(self.config).items()
        }
        for module, (rows, columns) in linear_shapes(self.config).items():
            if self.quantization is None or not self.is_int4(module):
                expected[f"{module}.weight"] = (FLOAT_DTYPES, (rows, columns))
                continue
            group = self.quantization.group_size
            if rows % 2 or columns % group:
                raise TriModeError(
                    f"{self.folder}: {module} is {rows} x {columns}; int4 needs even rows and columns in "
                    f"multiples of {group}"
                )
            expected[f"{module}.weight"] = (("U8",), (rows // 2, columns))
            expected[f"{module}.weight_scale"] = (FLOAT_DTYPES, (rows, columns // group))
            if f"{module}.pre_quant_scale" in self._files.names():
                expected[f"{module}.pre_quant_scale"] = (FLOAT_DTYPES, (columns,))
        return expected


def _is_quantised(name: str, files: TensorFiles) -> bool:
    """Whether the tensor is a quantised matrix, or a scale of one or of a quantised KV cache."""
    scales = (".weight_scale", ".weight_scale_2", ".input_scale", ".k_scale", ".v_scale")
    return name.endswith(scales) or (name.endswith("_proj.weight") and files.described(name)[0] not in FLOAT_DTYPES)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a local folder, or download a hub id such as ``nvidia/Nemotron-Labs-Diffusion-8B`` and open that."""
    if is_hub_id(source):
        return Checkpoint(_download(str(source)), str(source))
    return Checkpoint(Path(source))


def is_hub_id(source: str | Path) -> bool:
    """Whether ``source`` is written like a hub id and no such path exists."""
    return not Path(source).exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)) is not None


def _recorded_name(folder: Path) -> str | None:
    """The name in a quantised checkpoint's ``config.json``; of a folder of the hub's cache, the hub id."""
    name = read_json(folder / "config.json").get(SOURCE_NAME)
    if isinstance(name, str) and name:
        return name
    # <cache>/models--<owner>--<name>/snapshots/<commit>
    cached = re.fullmatch(r"models--(.+?)--(.+)", folder.absolute().parent.parent.name)
    return f"{cached[1]}/{cached[2]}" if cached and folder.absolute().parent.name == "snapshots" else None


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise TriModeError(f"{hub_id} is not a local folder; to download it: pip install 'trimode[build]'") from None
    try:
        patterns = ["*.json", "*.jinja", "*.safetensors", f"{ADAPTER_FOLDER}/*", f"{TEMPLATE_FOLDER}/*"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*.bin", "*.pt", "*.py"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TriModeError(f"{hub_id} is not a local folder, and downloading it failed: {reason}") from None


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index lists, or the single one.

    A stale file of another set of weights is refused. Other safetensors files are ignored: hub folders may hold the
    weights a second time in another program's form, such as ``consolidated.safetensors``.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    shards = {path.name for path in folder.glob("model-*.safetensors") if _SHARD.fullmatch(path.name)}
    if not index.exists():
        if shards and not single.exists():
            raise TriModeError(f"{index} is missing; it lists the tensors of {', '.join(sorted(shards)[:3])}")
        _refuse_stale(folder, shards, single.name)
        return [single]
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TriModeError(f"{index}: weight_map is missing or empty")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise TriModeError(f"{index}: weight_map names {name!r}, which is not a plain file name")
    _refuse_stale(folder, (shards | ({single.name} if single.exists() else set())) - set(names), index.name)
    return [folder / name for name in names]


def _refuse_stale(folder: Path, surplus: set[str], kept: str) -> None:
    if surplus:
        raise TriModeError(f"{folder} holds two sets of weights, {min(surplus)} and {kept}; remove the stale one")


def _check(files: TensorFiles, expected: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]], folder: Path) -> None:
    missing, surplus = sorted(set(expected) - files.names()), sorted(files.names() - set(expected))
    for what, names in (("lacks", missing), ("has, unlike its config,", surplus)):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise TriModeError(f"{folder}: the checkpoint {what} {len(names)} tensor(s): {shown}")
    for name, (dtypes, shape) in expected.items():
        dtype, found = files.described(name)
        if found != shape:
            raise TriModeError(
                f"{files.file_of(name)}: tensor {name} has shape {list(found)}, the config requires {list(shape)}"
            )
        if dtype not in dtypes:
            raise TriModeError(f"{files.file_of(name)}: tensor {name} is {dtype}, expected {' or '.join(dtypes)}")
