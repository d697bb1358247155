"""The prefix cache's blocks as Dynamo's KV events, by which its router finds the worker that knows a prompt."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Protocol

from trimode.runtime.kv.prefix_cache import BLOCK, BlockRemoved, BlockStored

log = logging.getLogger(__name__)


class Publisher(Protocol):
    """Dynamo's ``KvEventPublisher``. Hashes are signed 64-bit integers."""

    def publish_stored(
        self, token_ids: list[int], num_block_tokens: list[int], block_hashes: list[int], parent_hash: int | None
    ) -> None: ...

    def publish_removed(self, block_hashes: list[int]) -> None: ...


class BlockEvents:
    """Takes the prefix cache's events on the scheduler's thread and publishes them in order on its own thread.

    Dynamo's router knows whole blocks only; short last blocks of a text are left out. blocks: that are stored now.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self._events: queue.SimpleQueue[BlockStored | BlockRemoved | None] = queue.SimpleQueue()
        self._whole: set[bytes] = set()
        self._thread: threading.Thread | None = None

    def take(self, event: BlockStored | BlockRemoved) -> None:
        """The listener of the prefix cache."""
        if isinstance(event, BlockStored):
            if len(event.tokens) < BLOCK:
                return
            self._whole.add(event.key)
        elif event.key in self._whole:
            self._whole.remove(event.key)
        else:
            return
        self.blocks = len(self._whole)
        self._events.put(event)

    def publish(self, publisher: Publisher) -> None:
        """Start the thread. Events that came before are published first."""
        self._thread = threading.Thread(target=self._run, args=(publisher,), name="trimode-kv-events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Publish what is left, and end the thread."""
        if self._thread is not None:
            self._events.put(None)
            self._thread.join()
            self._thread = None

    def _run(self, publisher: Publisher) -> None:
        while (event := self._events.get()) is not None:
            try:
                if isinstance(event, BlockStored):
                    parent = None if event.parent is None else block_hash(event.parent)
                    publisher.publish_stored(
                        token_ids=list(event.tokens),
                        num_block_tokens=[len(event.tokens)],
                        block_hashes=[block_hash(event.key)],
                        parent_hash=parent,
                    )
                else:
                    publisher.publish_removed(block_hashes=[block_hash(event.key)])
            except Exception:
                log.exception("a KV event could not be published")


def block_hash(key: bytes) -> int:
    return int.from_bytes(key[:8], "little", signed=True)
