"""What a loaded engine can serve at once, from its KV memory and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from trimode.runtime.kv.slots import KvSlots
from trimode.runtime.request.sampling_params import DEFAULT_BLOCK_LENGTH, Mode


class Defaults(NamedTuple):
    """Values for requests that leave a field open. block_length: None for the mode's own default. enable_thinking: None
    leaves it to the chat template.
    """

    mode: Mode = "auto"
    block_length: int | None = None
    enable_thinking: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Lengths in tokens, a prompt and its answer together.

    context: of the longest request, running alone. built_context: that the engine was built for; ``context`` is less
    where ``max_seq_len`` or KV memory limits it. slots: answers that run at once. slot_context: of each answer when all
    slots are in use. kv_cache_bytes: that the KV pool may take, None if nothing limits it. threads: of a pass on the
    CPU, None on a GPU.
    """

    model: str
    target: str
    context: int
    built_context: int
    slots: int
    slot_context: int
    kv_cache_bytes: int | None
    kv_bytes_per_token: int
    prefix_cache_bytes: int
    threads: int | None
    defaults: Defaults

    @classmethod
    def of(
        cls,
        pool: KvSlots,
        *,
        model: str,
        target: str,
        built_context: int,
        max_seq_len: int | None,
        slots: int,
        prefix_cache_bytes: int,
        threads: int | None,
        defaults: Defaults,
    ) -> Capacity:
        context = min(max_seq_len or built_context, pool.most_rows(1))
        return cls(
            model=model,
            target=target,
            context=context,
            built_context=built_context,
            slots=slots,
            slot_context=min(context, pool.most_rows(slots)),
            kv_cache_bytes=pool.limit_bytes,
            kv_bytes_per_token=pool.row_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            threads=threads,
            defaults=defaults,
        )

    def default_max_tokens(self, prompt_tokens: int) -> int:
        """Answer tokens for a request that does not say: its slot's share of the KV memory, so that it does not keep
        others waiting, but at least half a share behind a long prompt; 0 if the prompt leaves no room.
        """
        share = max(self.slot_context - prompt_tokens, self.slot_context // 2)
        return max(0, min(self.context - prompt_tokens, share))

    def __str__(self) -> str:
        """One line for logs."""
        context = f"context {self.context:,} tokens"
        if self.context < self.built_context:
            context += f" of {self.built_context:,}"
        slots = f"{self.slots} slots"
        if self.slot_context < self.context:
            slots += f" ({self.slot_context:,} tokens each when all are in use)"
        memory = "unlimited" if self.kv_cache_bytes is None else _size(self.kv_cache_bytes)
        mode, block_length, enable_thinking = self.defaults
        parts = [
            f"{self.model} on {self.target}",
            context,
            slots,
            f"KV cache {memory} at {_size(self.kv_bytes_per_token)} a token",
            f"prefix cache {_size(self.prefix_cache_bytes)}",
        ]
        if self.threads is not None:
            parts.append(f"{self.threads} threads")
        parts.append(f"mode {mode}" + ("" if mode == "ar" else f", blocks of {block_length or DEFAULT_BLOCK_LENGTH}"))
        if enable_thinking is not None:
            parts.append(f"thinking {'on' if enable_thinking else 'off'}")
        return "; ".join(parts)


def _size(count: int) -> str:
    """Bytes in the largest binary unit of which there is at least one, e.g. ``1.5 GiB``."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.4g} {units[0]}"
