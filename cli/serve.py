"""``trimode serve``."""

from __future__ import annotations

from typing import get_args

import click

from trimode.cli.extras import requires_extra
from trimode.cli.parameters import build_options
from trimode.common.progress_bars import progress_bars
from trimode.llm import LLM
from trimode.model.quantization import Method
from trimode.runtime.api.llm import DEFAULT_PREFIX_CACHE_BYTES
from trimode.runtime.openai_server.server_log import LogLevel
from trimode.runtime.openai_server.tools.syntaxes import SYNTAXES
from trimode.runtime.request.sampling_params import Mode


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free port.")
@click.option("--api-key", envvar="TRIMODE_API_KEY", help="Key that clients must send [default: none].")
@click.option(
    "--served-model-name",
    "model_names",
    multiple=True,
    help="Name of the model for clients; repeatable [default: the engine's source].",
)
@click.option(
    "--mode",
    type=click.Choice(get_args(Mode)),
    default="auto",
    show_default=True,
    help="Mode of requests that do not set it.",
)
@click.option("--block-length", type=click.IntRange(min=1), help="Block length of requests that do not set it.")
@click.option(
    "--enable-thinking/--no-enable-thinking",
    default=None,
    help="Whether the model thinks in requests that do not set it [default: the chat template's].",
)
@click.option(
    "--tool-call-parser",
    type=click.Choice(list(SYNTAXES)),
    help="How the model writes tool calls [default: as its chat template shows].",
)
@click.option("--strict-fields", is_flag=True, help="Refuse unknown request fields instead of ignoring them.")
@click.option("--allowed-origins", multiple=True, help="Origin of web pages that may use the server; repeatable.")
@click.option("--root-path", default="", help="Path under which a proxy publishes the server.")
@click.option(
    "--log-level",
    type=click.Choice(get_args(LogLevel)),
    default="warning",
    show_default=True,
    help="info logs every request.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    help="Most sequences that run at once [default: 16, or what the engine was built for if that is less].",
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
    "--max-body", type=click.IntRange(min=1), default=4 << 20, show_default=True, help="Largest request in bytes."
)
@click.option(
    "--request-seconds",
    type=click.FloatRange(min=1),
    default=600,
    show_default=True,
    help="Most seconds that an answer may take.",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=7,
    show_default=True,
    help="Seconds to finish running answers after SIGTERM.",
)
@click.option(
    "--update-seconds",
    type=click.FloatRange(min=0),
    default=0.04,
    show_default=True,
    help="Least seconds between two events of a stream. The last event is never delayed.",
)
@build_options
def command(
    model: str,
    host: str,
    port: int,
    api_key: str | None,
    model_names: tuple[str, ...],
    mode: Mode,
    block_length: int | None,
    enable_thinking: bool | None,
    tool_call_parser: str | None,
    strict_fields: bool,
    allowed_origins: tuple[str, ...],
    root_path: str,
    log_level: LogLevel,
    max_batch: int | None,
    max_queue: int,
    max_seq_len: int | None,
    kv_cache_bytes: int | None,
    prefix_cache_bytes: int,
    threads: int | None,
    max_body: int,
    request_seconds: float,
    drain_seconds: float,
    update_seconds: float,
    target: str | None,
    method: Method | None,
    group: int | None,
) -> None:
    """Serve MODEL over the OpenAI API, with a playground at /.

    MODEL is an engine directory, a checkpoint folder, or a Hugging Face model ID. A checkpoint is quantised and built
    once, into the cache (see `trimode cache`).
    """
    with requires_extra("serve"):
        from trimode.runtime.openai_server.server import ServerOptions, serve

    options = ServerOptions(
        host=host,
        port=port,
        api_key=api_key,
        model_names=model_names,
        strict_fields=strict_fields,
        tool_call_parser=tool_call_parser,
        allowed_origins=allowed_origins,
        root_path=root_path,
        log_level=log_level,
        max_body=max_body,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
    )
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
            mode=mode,
            block_length=block_length,
            enable_thinking=enable_thinking,
            update_seconds=update_seconds,
            progress=progress,
        )
    with llm:
        serve(llm, options)
