"""An engine directory that is incomplete, changed or for another machine is refused in one line that names the file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from trimode.build.engine_builder import build_engine
from trimode.common.errors import TriModeError
from trimode.engine.files import hash_file
from trimode.engine.manifest import Manifest
from trimode.model.checkpoint import Checkpoint
from trimode.model.tokenizer import Tokenizer
from trimode.runtime.executor import BidirectionalStep, CausalStep
from trimode.runtime.loading import load_engine


def flip(path: str) -> Callable[[Path], None]:
    """Change one byte in the middle."""

    def apply(engine: Path) -> None:
        data = bytearray((engine / path).read_bytes())
        data[len(data) // 2] ^= 1
        (engine / path).write_bytes(data)

    return apply


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change fields of the manifest. If it is still valid, its hash is updated."""

    def apply(engine: Path) -> None:
        changed = json.loads((engine / "manifest.json").read_text()) | changes
        (engine / "manifest.json").write_text(json.dumps(changed))
        with contextlib.suppress(ValidationError):
            Manifest.model_validate(changed).write(engine)

    return apply


def edit_target(**changes: Any) -> Callable[[Path], None]:
    """Change fields of the target's section, and update the manifest's hash."""

    def apply(engine: Path) -> None:
        manifest = Manifest.read(engine)
        manifest.model_copy(update={"target": manifest.target.model_copy(update=changes)}).write(engine)

    return apply


def cut(path: str) -> Callable[[Path], None]:
    def apply(engine: Path) -> None:
        data = (engine / path).read_bytes()
        (engine / path).write_bytes(data[:-1])

    return apply


def swap(path: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(engine: Path) -> None:
        text = (engine / path).read_text()
        assert old in text
        (engine / path).write_text(text.replace(old, new))

    return apply


def add(path: str, text: str = "x") -> Callable[[Path], None]:
    def apply(engine: Path) -> None:
        (engine / path).parent.mkdir(parents=True, exist_ok=True)
        (engine / path).write_text(text)

    return apply


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda engine: (engine / "manifest.json").unlink(), "is not an engine directory"),
    "manifest that is not JSON": (
        lambda engine: (engine / "manifest.json").write_text("{"),
        r"manifest\.json is not valid JSON",
    ),
    "another format": (
        edit(format_version=1),
        r"has format 1, this version reads \d+; build the engine again: trimode build",
    ),
    "another target's section": (edit(target={"name": "rtx"}), r"target\..*tensorrt_rtx"),
    "an unknown target": (edit(target={"name": "abacus"}), "target: name must be one of cpu, cuda, rtx, tensorrt"),
    "a former section": (edit(target="cpu"), "target: name must be one of cpu"),
    "changed token id": (
        swap("manifest.json", '"mask_token_id": 100', '"mask_token_id": 101'),
        r"manifest\.json was changed",
    ),
    "changed limit": (swap("manifest.json", '"top_k": 768', '"top_k": 764'), r"manifest\.json was changed"),
    "a template that would be read": (
        add("tokenizer/chat_template.jinja"),
        r"tokenizer/chat_template\.jinja is not part of the engine; remove it, or build the engine again",
    ),
    "a named template that would be read": (
        add("tokenizer/additional_chat_templates/tool_use.jinja"),
        r"additional_chat_templates/tool_use\.jinja is not part of the engine",
    ),
    "special tokens that would be read": (
        add("tokenizer/special_tokens_map.json", "{}"),
        r"special_tokens_map\.json is not part of the engine",
    ),
    "kernels that would be read": (add("kernels/sm_90/index.json"), r"sm_90/index\.json is not part of the engine"),
    "unlisted files": (edit(files=[]), "files lacks"),
    "changed pool": (flip("weights/pool.bin"), r"weights/pool\.bin was changed after the build"),
    "changed graph": (flip("ar/model.onnx"), r"ar/model\.onnx was changed"),
    "changed adapter": (flip("weights/adapter.safetensors"), r"weights/adapter\.safetensors was changed"),
    "changed tokenizer": (flip("tokenizer/tokenizer.json"), r"tokenizer/tokenizer\.json was changed"),
    "truncated pool": (cut("weights/pool.bin"), r"weights/pool\.bin has \d+ bytes, the manifest says"),
    "missing graph": (lambda engine: (engine / "diffusion/model.onnx").unlink(), r"diffusion/model\.onnx is missing"),
    "another processor": (edit_target(instruction_set="riscv64:"), "built for another processor"),
    "another onnxruntime": (edit_target(onnxruntime="1.0.0"), r"built with onnxruntime 1\.0\.0"),
    "a file outside": (edit(files=[{"path": "../x", "bytes": 1, "sha256": "0" * 64}]), "leaves the engine directory"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_engine_is_refused_by_name(random_engine: Path, tmp_path: Path, case: str) -> None:
    engine = Path(shutil.copytree(random_engine, tmp_path / "engine"))
    damage, message = BROKEN[case]
    damage(engine)
    with pytest.raises(TriModeError, match=message) as caught:
        load_engine(engine)
    assert "\n" not in str(caught.value)


FOREIGN = (
    "README.md",
    ".gitattributes",
    ".DS_Store",
    "._manifest.json",
    ".cache/huggingface/.gitignore",
    ".cache/huggingface/download/ar/model.onnx.metadata",
    ".cache/huggingface/download/tokenizer/chat_template.jinja.lock",
    "ar/.nfs000000000000000100000001",
    "ar/.DS_Store",
    "tokenizer/.DS_Store",
    "tokenizer/._tokenizer.json",
    "tokenizer/._chat_template.jinja",
    "tokenizer/README.md",
    "tokenizer/vocab.json",
    "tokenizer/additional_chat_templates/.DS_Store",
    "tokenizer/additional_chat_templates/._tool_use.jinja",
    "weights/pool.bin.bak",
    "kernels/.DS_Store",
    "diffusion/model.onnx_data",
)


def test_foreign_files_that_nothing_reads_do_no_harm(random_engine: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(random_engine, tmp_path / "engine"))
    for path in FOREIGN:
        add(path)(engine)
    assert answer_of(engine) == answer_of(random_engine)


def test_a_hub_caches_links(random_engine: Path, tmp_path: Path) -> None:
    """The layout of huggingface_hub: every file is a link to a blob with another name."""
    snapshot = tmp_path / "models--me--engine/snapshots/abc"
    blobs = tmp_path / "models--me--engine/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in random_engine.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(random_engine)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert answer_of(snapshot) == answer_of(random_engine)
    (tmp_path / "link").symlink_to(snapshot)
    assert answer_of(tmp_path / "link") == answer_of(random_engine)
    assert all(path.is_file() for path in blobs.iterdir())


def test_a_hub_cache_that_cannot_be_written(
    random_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Path(shutil.copytree(random_engine, tmp_path / "engine"))
    (engine / "weights/pool.bin").rename(tmp_path / "blob")
    (engine / "weights/pool.bin").symlink_to(tmp_path / "blob")

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(TriModeError, match=r"pool\.bin is a symlink, and .* cannot be written .*: cp -rL"):
        load_engine(engine)
    assert {path.name for path in tmp_path.iterdir()} == {"engine", "blob"}


def answer_of(engine: Path) -> list[int]:
    """The likeliest tokens of a causal pass over four tokens."""
    executor, ids, first = load_engine(engine).executor, np.arange(200, 204)[None], np.array([0])
    return list(executor.run(CausalStep.chain(0, ids, first, np.array([[3]]))).tokens[0, 0, :5])


def test_without_verification_a_damaged_graph_is_still_one_line(random_engine: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(random_engine, tmp_path / "engine"))
    (engine / "ar/model.onnx").write_bytes(b"nothing")
    with pytest.raises(TriModeError, match=r"ar/model\.onnx cannot be loaded") as caught:
        load_engine(engine, verify=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_of_the_manifest_is_detected(random_engine: Path, tmp_path: Path, seed: int) -> None:
    """At any position: in a name, a number, or white space."""
    whole = (random_engine / "manifest.json").read_bytes()
    random = np.random.default_rng(seed)
    for at, bit in zip(random.integers(0, len(whole), 100), random.integers(0, 8, 100), strict=True):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << bit
        (tmp_path / "manifest.json").write_bytes(flipped)
        with pytest.raises(TriModeError, match=r"manifest\.json"):
            Manifest.read(tmp_path)


def test_other_servers_can_read_the_tokenizer_folder(random_checkpoint: Path, tmp_path: Path) -> None:
    """transformers loads it and finds the end tokens, which equal the manifest's."""
    checkpoint = Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))
    add("generation_config.json", '{"eos_token_id": [11, 2]}')(checkpoint)
    add("additional_chat_templates/rag.jinja")(checkpoint)
    build_engine(Checkpoint(checkpoint), tmp_path / "engine")
    folder = tmp_path / "engine/tokenizer"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "nemotron_labs_diffusion"
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [11, 2]}
    assert (folder / "additional_chat_templates/rag.jinja").read_text() == "x"
    assert load_engine(tmp_path / "engine").manifest.model.eos_token_id == (11, 2)
    assert AutoTokenizer.from_pretrained(folder)("Hi").input_ids == Tokenizer.from_folder(folder).encode("Hi")


def test_an_engine_can_be_moved_and_is_not_written(random_checkpoint: Path, tmp_path: Path) -> None:
    """No file contains the folder in which it was built, and a pass of either engine writes nothing."""
    build_engine(Checkpoint(random_checkpoint), tmp_path / "former")
    engine = (tmp_path / "former").rename(tmp_path / "elsewhere")

    def state() -> dict[Path, tuple[str, int]]:
        return {path: (hash_file(path), path.stat().st_mtime_ns) for path in engine.rglob("*") if path.is_file()}

    before = state()
    executor, ids, first = load_engine(engine).executor, np.arange(200, 204)[None], np.array([0])
    executor.run(CausalStep.chain(0, ids, first, np.array([[3]])))
    executor.run(BidirectionalStep.block(0, ids, first, np.array([[3]]), np.array([4]), np.array([True])))
    assert state() == before
