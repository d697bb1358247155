"""``trimode dynamo``."""

from __future__ import annotations

import os
import signal
from typing import get_args

import click

from trimode.cli.interrupts import exit_on_interrupt
from trimode.cli.parameters import build_options
from trimode.common.errors import TriModeError
from trimode.common.progress_bars import progress_bars
from trimode.llm import LLM
from trimode.model.quantization import Method
from trimode.runtime.api.llm import DEFAULT_PREFIX_CACHE_BYTES
from trimode.runtime.dynamo.block_events import BlockEvents
from trimode.runtime.dynamo.worker_options import (
    DISCOVERIES,
    LOOPBACK,
    Discovery,
    WorkerOptions,
    has_broker,
    listen_on,
)
from trimode.runtime.request.sampling_params import Mode


@click.command()
@click.argument("model")
@click.option("--served-model-name", "model_name", help="Name of the model for clients [default: the engine's source].")
@click.option("--namespace", envvar="DYN_NAMESPACE", default="dynamo", show_default=True, help="Dynamo's namespace.")
@click.option("--component", envvar="DYN_COMPONENT", default="backend", show_default=True, help="Dynamo's component.")
@click.option(
    "--discovery-backend",
    "discovery",
    type=click.Choice(DISCOVERIES),
    envvar="DYN_DISCOVERY_BACKEND",
    default="file",
    show_default=True,
    help="How frontend and workers find each other. file works on one machine only.",
)
@click.option(
    "--host",
    help=f"Address to listen on [default: {LOOPBACK} with file and mem, else as Dynamo chooses].",
)
@click.option(
    "--kv-events/--no-kv-events",
    default=None,
    help="Publish which prompts are cached, for KV-aware routing [default: on, unless that would listen on all "
    "interfaces].",
)
@click.option(
    "--tool-call-parser", envvar="DYN_TOOL_CALL_PARSER", help="Dynamo's parser of tool calls [default: none]."
)
@click.option("--reasoning-parser", envvar="DYN_REASONING_PARSER", help="Dynamo's parser of reasoning [default: none].")
@click.option(
    "--mode",
    type=click.Choice(get_args(Mode)),
    default="auto",
    show_default=True,
    help="Mode of requests that do not set it.",
)
@click.option("--block-length", type=click.IntRange(min=1), help="Block length of requests that do not set it.")
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=16, show_default=True, help="Most sequences that run at once."
)
@click.option(
    "--max-queue", type=click.IntRange(min=1), default=1024, show_default=True, help="Most sequences that may wait."
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(min=2),
    help="Most tokens of a prompt and its answer together [default: the engine's].",
)
@click.option(
    "--kv-cache-bytes",
    type=click.IntRange(min=1),
    help="Memory of the KV cache in bytes [default: most of the available memory].",
)
@click.option(
    "--prefix-cache-bytes",
    type=click.IntRange(min=0),
    default=DEFAULT_PREFIX_CACHE_BYTES,
    show_default=True,
    help="Memory of the prefix cache, which reuses earlier prompts; 0 turns it off.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of a pass [default: all CPUs that the process may use]."
)
@click.option(
    "--update-seconds",
    type=click.FloatRange(min=0),
    default=0.04,
    show_default=True,
    help="Least seconds between two chunks of a stream. The last chunk is never delayed.",
)
@build_options
def command(
    model: str,
    model_name: str | None,
    namespace: str,
    component: str,
    discovery: Discovery,
    host: str | None,
    kv_events: bool | None,
    tool_call_parser: str | None,
    reasoning_parser: str | None,
    mode: Mode,
    block_length: int | None,
    max_batch: int,
    max_queue: int,
    max_seq_len: int | None,
    kv_cache_bytes: int | None,
    prefix_cache_bytes: int,
    threads: int | None,
    update_seconds: float,
    target: str | None,
    method: Method | None,
    group: int | None,
) -> None:
    """Serve MODEL as a worker of NVIDIA Dynamo, behind `python -m dynamo.frontend`.

    MODEL is an engine directory, a checkpoint folder, or a Hugging Face model ID. A checkpoint is quantised and built
    once, into the cache (see `trimode cache`). Dynamo's own settings are environment variables, such as
    $DYN_SYSTEM_PORT for metrics and health.
    """
    try:
        with exit_on_interrupt():
            from trimode.runtime.dynamo.worker import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "trimode":
            raise
        raise TriModeError(
            f"the package {error.name} is not installed; in an environment of its own (`make dynamo-environment`): pip "
            "install 'trimode[dynamo]', then pip install --no-deps ai-dynamo==1.6.1"
        ) from None
    one_machine = discovery in ("file", "mem")
    if host is None and one_machine:
        host = LOOPBACK
    if host is not None:
        listen_on(host, os.environ)
    if kv_events is None:
        kv_events = prefix_cache_bytes > 0 and (not one_machine or has_broker(os.environ))
    events = BlockEvents()
    with progress_bars() as progress:
        llm = LLM(
            model,
            target=target,
            method=method,
            group=group,
            threads=threads,
            max_batch_size=max_batch,
            max_queue_size=max_queue,
            max_seq_len=max_seq_len,
            kv_cache_bytes=kv_cache_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            prefix_cache_listener=events.take,
            mode=mode,
            block_length=block_length,
            update_seconds=update_seconds,
            progress=progress,
        )
    options = WorkerOptions(
        model_name=model_name or llm.manifest.source,
        namespace=namespace,
        component=component,
        discovery=discovery,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        kv_events=kv_events,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # Dynamo's runtime calls handlers that it finds; ours exits at once
    with llm:
        serve(llm, events, options)
