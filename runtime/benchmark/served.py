"""A server of OpenAI's API as the target of a benchmark."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from trimode.common.errors import TriModeError
from trimode.runtime.benchmark.prompts import BenchmarkPrompt
from trimode.runtime.benchmark.targets import Answered, StreamClock

# Bytes of a line; an event may hold a long text.
_LONGEST_LINE = 1 << 22
_LONGEST_ERROR = 1000


class ServedTarget:
    """url: with or without ``/v1``. model: as the server names it; None for its default. Raises TriModeError for what
    is no URL.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        try:
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise TriModeError(f"{url}: the port is not a number below 65536") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TriModeError(f"{url} is no URL of a server; give http://HOST:PORT")
        self._host, self._name = parts.hostname, parts.netloc
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._model = model
        self._api_key = api_key

    async def answer(self, prompt: BenchmarkPrompt, fields: dict[str, Any]) -> Answered:
        asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        body = {**asked, **fields, "stream": True, "stream_options": {"include_usage": True}}
        if self._model is not None:
            body["model"] = self._model
        path = "completions" if isinstance(prompt, str) else "chat/completions"
        clock, usage = StreamClock(), None
        try:
            async for event in self._events(f"{self._root}/v1/{path}", body):
                usage = event.get("usage") or usage
                if any(map(_has_tokens, event.get("choices", ()))):
                    clock.update()
        except OSError as error:
            raise TriModeError(f"{self._name}: {error.strerror or error}") from None
        if usage is None:
            raise TriModeError(f"{self._name}: a stream ended without the usage")
        return Answered(usage["completion_tokens"], usage["prompt_tokens"], clock.first, clock.seconds, clock.gaps)

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """One connection a request. In HTTP/1.0 the response is not chunked and ends with the connection."""
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=_LONGEST_LINE)
        try:
            writer.write(self._request(path, json.dumps(body).encode()))
            status = (await reader.readline()).decode("latin-1").split(" ")[1:2]
            while (await reader.readline()).strip():
                pass
            if status != ["200"]:
                reason = (await reader.read(_LONGEST_ERROR)).decode(errors="replace")
                raise TriModeError(f"{self._name}: status {''.join(status) or 'missing'}: {_message(reason)}")
            while line := await reader.readline():
                data = line.decode(errors="replace").strip().removeprefix("data:").strip()
                if line.startswith(b"data:") and data != "[DONE]":
                    yield self._event(data)
        finally:
            writer.close()

    def _event(self, data: str) -> dict[str, Any]:
        try:
            event: dict[str, Any] = json.loads(data)
        except ValueError:
            raise TriModeError(f"{self._name}: an event is not JSON") from None
        if "error" in event:
            raise TriModeError(f"{self._name}: {_message(data)}")
        return event

    def _request(self, path: str, payload: bytes) -> bytes:
        head = [f"POST {path} HTTP/1.0", f"Host: {self._name}", "Content-Type: application/json"]
        head += [f"Content-Length: {len(payload)}"]
        if self._api_key:
            head.append(f"Authorization: Bearer {self._api_key}")
        return "\r\n".join([*head, "", ""]).encode() + payload


def _has_tokens(choice: dict[str, Any]) -> bool:
    """Whether a chunk's choice has text. The first one of a chat has the role only."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))


def _message(text: str) -> str:
    """The message of an error's body, or the body."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return " ".join(text.split()) or "no reason given"
