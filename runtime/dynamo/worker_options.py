"""What ``trimode dynamo`` sets of a worker."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal, get_args

Discovery = Literal["file", "etcd", "kubernetes", "mem"]
DISCOVERIES: tuple[Discovery, ...] = get_args(Discovery)


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """model_name: under which the frontend serves the model. namespace, component: where the worker registers.
    discovery: how frontend and workers find each other. tool_call_parser, reasoning_parser: Dynamo's names of the
    parsers that the frontend applies to answers; None for none. kv_events: publish which blocks the prefix cache holds.
    """

    model_name: str
    namespace: str = "dynamo"
    component: str = "backend"
    discovery: Discovery = "file"
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    kv_events: bool = True


LOOPBACK = "127.0.0.1"
# Of Dynamo's runtime: where a process listens for requests, for responses, for scrapes and for events.
_HOSTS = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_SYSTEM_HOST", "DYN_EVENT_PLANE_HOST")
BROKER = "DYN_ZMQ_BROKER_URL"


def listen_on(host: str, environment: MutableMapping[str, str]) -> None:
    """Set the variables of Dynamo's runtime that are not set."""
    for name in _HOSTS:
        environment.setdefault(name, host)


def has_broker(environment: Mapping[str, str]) -> bool:
    """Without a broker, Dynamo's event plane listens on all interfaces."""
    return bool(environment.get(BROKER))
