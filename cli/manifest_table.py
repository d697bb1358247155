"""A manifest as ``trimode info`` prints it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from trimode.engine.manifest import Manifest


def print_manifest(engine: Path, manifest: Manifest, as_json: bool) -> None:
    if as_json:
        print(manifest.model_dump_json())
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(engine, manifest).items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _rows(engine: Path, manifest: Manifest) -> dict[str, str]:
    model, precision, limits = manifest.model, manifest.precision, manifest.limits
    ranks = "" if manifest.ranks == 1 else f", divided among {manifest.ranks} ranks"
    passes = "" if limits.max_batch is None else f", batch up to {limits.max_batch}, step up to {limits.max_step}"
    return {
        "engine": f"{engine} (format {manifest.format_version}, target {manifest.target.name})",
        "source": f"{manifest.source}, quantisation {manifest.quantization}",
        "model": f"{manifest.parameters:,} parameters, {model.num_hidden_layers} layers of {model.hidden_size}, "
        f"{model.num_attention_heads} query and {model.num_key_value_heads} KV heads of {model.head_dim}{ranks}",
        "weights": f"{precision.summary()}; embedding {precision.embedding}",
        "activations, KV": f"{precision.activations}, {precision.kv_cache}",
        "draft adapter": "none" if manifest.adapter is None else f"rank {manifest.adapter.rank}",
        "limits": f"{limits.capacity} tokens, prefill in steps of {limits.prefill_step}, top {limits.top_k} logits"
        f"{passes}",
        "on disk": f"{sum(entry.bytes for entry in manifest.files) / 1e6:.1f} MB in {len(manifest.files)} files",
        "built for": manifest.target.summary,
    }
