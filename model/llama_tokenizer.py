"""The tokenizer of SentencePiece checkpoints whose class is ``LlamaTokenizer``, as transformers builds it.

transformers takes only the vocabulary, the merges and the post-processor from ``tokenizer.json``. The class itself
defines how text is split and how spaces become ``▁``. The file's normalizer would add a space after special tokens.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
DEFAULT_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_SPACE = "▁"


def is_llama_tokenizer(class_name: Any, file: Tokenizer) -> bool:
    """Whether transformers builds the tokenizer of ``tokenizer.json`` anew for a checkpoint with this class."""
    on_bytes = any("ByteLevel" in repr(part) for part in (file.pre_tokenizer, file.decoder))
    return class_name in CLASSES and isinstance(file.model, models.BPE) and not on_bytes


def build_llama_tokenizer(file: Tokenizer, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer without its added tokens. config: ``tokenizer_config.json``."""
    model = json.loads(file.to_str())["model"]
    merges: list[tuple[str, str]] = [(left, right) for left, right in model["merges"]]
    adds_space = config.get("add_prefix_space") in (None, True)
    scheme = "never" if not adds_space else "always" if config.get("legacy", False) else "first"
    built = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, fuse_unk=True, byte_fallback=True))
    built.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if adds_space else steps)
    if file.post_processor is not None:
        built.post_processor = file.post_processor
    return built
