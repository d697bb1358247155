"""Measure llama.cpp for `make peers`, in its own environment.

    python -m scripts.bench.llama_worker write SHAPE.json OUT.gguf      a Q4_0 model of random weights
    python -m scripts.bench.llama_worker run OUT.gguf THREADS           milliseconds of passes, one a line

``run`` reads a number of tokens from each line of stdin, and prints the milliseconds of one pass over that many tokens
after :data:`KV_ROWS` cached tokens, with the logits of every token. The script needs llama-cpp-python and gguf, but not
TriMode.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

KV_ROWS = 256
MOST_TOKENS = 32
# A block of Q4_0: 32 weights in 16 bytes, and a scale of 2 bytes.
BLOCK_WEIGHTS, BLOCK_BYTES = 32, 18


def write(shape: dict[str, Any], path: Path) -> None:
    """Write a GGUF file of Llama's architecture in the sizes of ``shape``, the fields of a ``config.json``."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    head_dim, rope = shape["head_dim"], shape["rope_parameters"]
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_context_length(4096)
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = rng.integers(0, 256, (rows, columns // BLOCK_WEIGHTS, BLOCK_BYTES), np.uint8)
        scale = np.full((rows, columns // BLOCK_WEIGHTS), 0.004, np.float16)
        blocks[..., :2] = scale.view(np.uint8).reshape(*scale.shape, 2)
        data = blocks.reshape(rows, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape["hidden_size"], np.float32))

    hidden, mlp = shape["hidden_size"], shape["intermediate_size"]
    query, kv = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim
    matrix("token_embd", shape["vocab_size"], hidden)
    for index in range(shape["num_hidden_layers"]):
        layer = f"blk.{index}"
        norm(f"{layer}.attn_norm")
        norm(f"{layer}.ffn_norm")
        matrix(f"{layer}.attn_q", query, hidden)
        matrix(f"{layer}.attn_k", kv, hidden)
        matrix(f"{layer}.attn_v", kv, hidden)
        matrix(f"{layer}.attn_output", hidden, query)
        matrix(f"{layer}.ffn_gate", mlp, hidden)
        matrix(f"{layer}.ffn_up", mlp, hidden)
        matrix(f"{layer}.ffn_down", hidden, mlp)
    norm("output_norm")
    matrix("output", shape["vocab_size"], hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peer:
    """A llama.cpp model with :data:`KV_ROWS` tokens in its cache."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._context = self._llama.ctx
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        self._decode(KV_ROWS, 0)

    def milliseconds(self, tokens: int) -> float:
        """Time of one pass. Afterwards, not timed, the cache is cropped to :data:`KV_ROWS` tokens."""
        start = time.perf_counter()
        self._decode(tokens, KV_ROWS)
        self._library.llama_get_logits_ith(self._context, tokens - 1)
        seconds = time.perf_counter() - start
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_seq_rm(memory, 0, KV_ROWS, -1)
        return seconds * 1e3

    def _decode(self, tokens: int, first: int) -> None:
        batch = self._batch
        batch.n_tokens = tokens
        for index in range(tokens):
            batch.token[index] = 200 + index
            batch.pos[index] = first + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = True
        if self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed for {tokens} tokens")


def main() -> None:
    action, *rest = sys.argv[1:]
    if action == "write":
        write(json.loads(Path(rest[0]).read_text(encoding="utf-8")), Path(rest[1]))
        return
    peer = Peer(Path(rest[0]), int(rest[1]))
    print(f"llama-cpp-python {peer._library.__version__}", flush=True)
    for line in sys.stdin:
        print(peer.milliseconds(int(line)), flush=True)


if __name__ == "__main__":
    main()
