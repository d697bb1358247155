"""``trimode bench``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console

from trimode.cli.extras import requires_extra
from trimode.cli.parameters import PATH, build_options, integers, json_option
from trimode.common.errors import TriModeError
from trimode.common.progress import Progress
from trimode.common.progress_bars import progress_bars
from trimode.common.version import __version__
from trimode.llm import LLM
from trimode.model.quantization import Method
from trimode.runtime.api.batch_size import DEFAULT_BATCH_SIZE
from trimode.runtime.benchmark.load import Load, measure
from trimode.runtime.benchmark.prompts import BenchmarkPrompt, read_prompts, synthetic_prompts
from trimode.runtime.benchmark.served import ServedTarget
from trimode.runtime.benchmark.settings import Setting, settings_of
from trimode.runtime.benchmark.summary import Point, print_points
from trimode.runtime.benchmark.targets import EngineTarget, Target
from trimode.runtime.request.sampling_params import Mode, SamplingParams

MODES: tuple[Mode, ...] = ("ar", "linear_spec", "auto")
LOADS = (1, 4, 16)
REQUESTS, DEFAULT_WORDS = 32, 64
# Unmeasured requests before each point, at most.
WARM_UP = 4


@click.command()
@click.argument("model", metavar="MODEL|URL")
@click.option("--prompts", type=PATH, help='JSON lines {"messages": [...]} or {"prompt": "..."} [default: synthetic].')
@click.option(
    "--words", type=click.IntRange(min=1), help=f"Random words of a synthetic prompt [default: {DEFAULT_WORDS}]."
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    help=f"Requests of each measurement [default: the file's prompts, or {REQUESTS}].",
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(get_args(Mode)),
    multiple=True,
    help=f"Mode to measure; repeatable [default: {', '.join(MODES)}; for a URL, the server's default].",
)
@click.option(
    "--block-length",
    "block_lengths",
    callback=integers,
    metavar="N,N,...",
    help="Block lengths of linear_spec and diffusion [default: the engine's].",
)
@click.option(
    "--concurrency",
    callback=integers,
    metavar="N,N,...",
    help=f"Loads, as numbers of concurrent requests [default: {','.join(map(str, LOADS))}].",
)
@click.option(
    "--rate",
    "rates",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    help="Load as requests per second with random arrivals, in place of --concurrency; repeatable.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens of an answer."
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--ignore-eos", is_flag=True, help="Give every answer --max-tokens tokens.")
@click.option(
    "--max-batch", type=click.IntRange(min=1), help="Most answers that run at once [default: the largest load]."
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of a pass [default: all CPUs that the process may use]."
)
@click.option("--api-key", envvar="TRIMODE_API_KEY", show_envvar=True, help="Key of the server at URL.")
@click.option("--model-name", help="Model of the server at URL [default: the server's default].")
@click.option("--plot", type=PATH, help="Write the curves to this PNG.")
@build_options
@json_option
def command(
    model: str,
    prompts: Path | None,
    words: int | None,
    requests: int | None,
    modes: tuple[Mode, ...],
    block_lengths: tuple[int, ...] | None,
    concurrency: tuple[int, ...] | None,
    rates: tuple[float, ...],
    max_tokens: int,
    temperature: float,
    ignore_eos: bool,
    max_batch: int | None,
    threads: int | None,
    api_key: str | None,
    model_name: str | None,
    plot: Path | None,
    target: str | None,
    method: Method | None,
    group: int | None,
    as_json: bool,
) -> None:
    """Measure throughput and latency by mode, block length and load.

    MODEL is an engine directory, a checkpoint folder or a Hugging Face model ID. It runs in this process, without a
    prefix cache. URL is a server with OpenAI's API. Every answer is streamed.
    """
    if plot is not None:
        with requires_extra("build"):
            from trimode.runtime.benchmark.plot import write_plot
    loads = _loads(concurrency, rates)
    asked = _prompts(prompts, words, requests)
    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    if ignore_eos:
        fields["ignore_eos"] = True
    if is_url := model.startswith(("http://", "https://")):
        settings = settings_of(modes, block_lengths or ()) if modes else [Setting("default", {})]
    else:
        settings = settings_of(modes or MODES, block_lengths or ())
    for setting in settings:
        SamplingParams(**fields, **setting.fields)  # raises if they are not valid
    if block_lengths and not any("block_length" in setting.fields for setting in settings):
        raise TriModeError("--block-length has no effect without mode linear_spec or diffusion; leave it out")
    with progress_bars() as progress:
        if is_url:
            server = ServedTarget(model, model=model_name, api_key=api_key)
            measured = _measure(server, asked, settings, loads, fields, progress)
        else:
            slots = max_batch or max(load.concurrency or DEFAULT_BATCH_SIZE for load in loads)
            llm = LLM(
                model,
                target=target,
                method=method,
                group=group,
                threads=threads,
                max_batch_size=slots,
                max_queue_size=max(len(asked), slots),
                prefix_cache_bytes=0,
                progress=progress,
            )
            with llm:
                measured = _measure(EngineTarget(llm, streaming=True), asked, settings, loads, fields, progress)
    if plot is not None:
        write_plot(measured, plot)
    if as_json:
        points = [dataclasses.asdict(point) for point in measured]
        print(json.dumps({"trimode": __version__, "model": model, **fields, "points": points}, indent=2))
    else:
        print_points(measured, Console(width=120))


def _loads(concurrency: tuple[int, ...] | None, rates: tuple[float, ...]) -> list[Load]:
    if concurrency is not None and rates:
        raise TriModeError("--concurrency and --rate are two kinds of load; give one of them")
    if any(number < 1 for number in concurrency or ()):
        raise TriModeError("--concurrency must be at least 1")
    if rates:
        return [Load(rate=rate) for rate in dict.fromkeys(rates)]
    return [Load(concurrency=number) for number in concurrency or LOADS]


def _prompts(path: Path | None, words: int | None, requests: int | None) -> list[BenchmarkPrompt]:
    """As many as requests; those of a file are repeated."""
    if path is None:
        return synthetic_prompts(requests or REQUESTS, words or DEFAULT_WORDS)
    if words is not None:
        raise TriModeError("--words is for synthetic prompts; leave out --words or --prompts")
    found = read_prompts(path)
    return [found[number % len(found)] for number in range(requests or len(found))]


def _measure(
    target: Target,
    prompts: Sequence[BenchmarkPrompt],
    settings: Sequence[Setting],
    loads: Sequence[Load],
    fields: dict[str, Any],
    progress: Progress,
) -> list[Point]:
    points: list[Point] = []
    for load in loads:
        for setting in settings:
            progress("bench", len(points), len(loads) * len(settings))
            of_setting = fields | setting.fields
            measure(target, prompts[:WARM_UP], of_setting, Load(concurrency=WARM_UP))
            points.append(Point.of(setting.name, load, measure(target, prompts, of_setting, load)))
    progress("bench", len(points), len(points))
    return points
