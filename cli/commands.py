"""The ``trimode`` command: quantize, build, compile, export, info, audit, doctor, generate, serve, triton.

What a user can mend is told in one line on stderr, with exit code 2. Long work shows its progress on stderr, so that
stdout stays the answer alone.
"""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args

import click
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from trimode.cli.examination import examine
from trimode.common.errors import TriModeError
from trimode.common.progress import Progress
from trimode.common.version import __version__
from trimode.engine.manifest import Manifest
from trimode.engine.targets import SECTIONS
from trimode.engine.targets.cpu import Activations
from trimode.model.checkpoint import open_checkpoint
from trimode.runtime.api.llm import LLM, RequestOutput
from trimode.runtime.request.outputs import CompletionOutput
from trimode.runtime.request.sampling_params import Mode, SamplingParams
from trimode.runtime.triton.repository import MODEL_NAME, write_repository

USAGE_ERROR = 2

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


def main() -> None:
    """Every error that is not a bug of ours ends in one line; Ctrl-C is left to :mod:`trimode.cli.command`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        commands.main(standalone_mode=False)
    except TriModeError as error:
        _fail(str(error), USAGE_ERROR)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help())
        sys.exit(USAGE_ERROR)
    except click.ClickException as error:
        _fail(error.format_message(), USAGE_ERROR)
    except click.Abort:
        raise KeyboardInterrupt from None
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody to tell.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", USAGE_ERROR)


def _fail(message: str, code: int) -> NoReturn:
    print(f"trimode: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _integers(_context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Numbers with commas between them."""
    if text is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers", param=parameter) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version=__version__, prog_name="trimode")
def commands() -> None:
    """Build and run tri-mode language models: AR, block diffusion and self-speculation from one checkpoint."""


@commands.command()
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--method", type=click.Choice(["awq", "rtn"]), default="awq", show_default=True)
@click.option("--group", default=128, show_default=True, help="Input channels that share a scale.")
@click.option("--head", type=click.Choice(["int4", "16bit"]), default="16bit", show_default=True)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="JSONL of texts or conversations for AWQ [default: the checkpoint's calibration.jsonl].",
)
@json_option
def quantize(
    checkpoint: str, out: Path, method: Any, group: int, head: Any, calibration: Path | None, as_json: bool
) -> None:
    """Quantise CHECKPOINT (a folder or a hub id) to w4a16, into the new folder OUT."""
    from trimode.quantize import quantize_checkpoint

    with _progress() as progress:
        report = quantize_checkpoint(
            open_checkpoint(checkpoint),
            out,
            method=method,
            group=group,
            head=head,
            calibration=calibration,
            progress=progress,
        )
    if as_json:
        print(report.model_dump_json())
        return
    worst = max(report.weight_error, key=lambda module: report.weight_error[module])
    mean = sum(report.weight_error.values()) / len(report.weight_error)
    print(f"{out}: {len(report.weight_error)} matrices to int4 by {method}, groups of {group}")
    print(f"relative weight error: mean {mean:.4f}, worst {report.weight_error[worst]:.4f} ({worst})")


@commands.command()
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(list(SECTIONS)), default="cpu", show_default=True)
@click.option(
    "--capacity",
    type=click.IntRange(min=1),
    help="Longest sequence in tokens [default: the model's on cpu, 4096 on GPUs].",
)
@click.option(
    "--prefill-step", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens a prefill pass."
)
@click.option("--top-k", type=click.IntRange(min=1), help="Candidates a row reports [default: 64 on cpu, 4 on GPUs].")
@click.option(
    "--activations",
    type=click.Choice(get_args(Activations)),
    help="cpu. int8: faster int4 products on large models, less exact [default: fp32].",
)
@click.option(
    "--sm",
    "sms",
    callback=_integers,
    help="GPUs by compute capability, 121 for 12.1, with commas [default: 121,120,89; on tensorrt this "
    "machine's, with --emit-only also 100,90].",
)
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), help="GPUs. Activations and KV pool [default: bf16].")
@click.option("--max-batch", type=click.IntRange(min=1), help="GPUs. Sequences a pass [default: 8].")
@click.option("--max-step", type=click.IntRange(min=1), help="GPUs. Tokens a sequence and pass [default: 256].")
@click.option(
    "--emit-only", is_flag=True, default=None, help="tensorrt. Write all but the plans: `trimode compile` makes them."
)
@json_option
def build(
    checkpoint: str,
    out: Path,
    target: str,
    capacity: int | None,
    prefill_step: int,
    top_k: int | None,
    as_json: bool,
    **of_target: Any,
) -> None:
    """Build the AR and the diffusion engine of CHECKPOINT into the new folder OUT."""
    try:
        from trimode.build.engine_builder import CpuOptions, RtxOptions, TensorrtOptions, build_engine
    except ModuleNotFoundError as error:
        raise TriModeError(f"building needs the package {error.name}: pip install 'trimode[build]'") from None

    kind = {"cpu": CpuOptions, "rtx": RtxOptions, "tensorrt": TensorrtOptions}[target]
    given = {name: value for name, value in of_target.items() if value is not None}
    for name in given.keys() - {field.name for field in dataclasses.fields(kind)}:
        raise TriModeError(f"--{'sm' if name == 'sms' else name.replace('_', '-')} is no option of target {target}")
    with _progress() as progress:
        manifest = build_engine(
            open_checkpoint(checkpoint),
            out,
            target=kind(**given),
            capacity=capacity,
            prefill_step=prefill_step,
            top_k=top_k,
            progress=progress,
        )
    _print_manifest(out, manifest, as_json)


@commands.command("compile")
@click.argument("emitted", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@json_option
def compile_emitted(emitted: Path, out: Path, as_json: bool) -> None:
    """Compile EMITTED, which `trimode build --target tensorrt --emit-only` wrote, for this machine's GPU into OUT."""
    from trimode.build.tensorrt.compile import compile_engine

    with _progress() as progress:
        manifest = compile_engine(emitted, out, progress)
    _print_manifest(out, manifest, as_json)


@commands.command()
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["trtllm"]), required=True, help="trtllm: for TensorRT-LLM's LLM.")
@json_option
def export(checkpoint: str, out: Path, form: str, as_json: bool) -> None:
    """Write the autoregressive half of CHECKPOINT, for another program, into the new folder OUT."""
    from trimode.quantize import export_trtllm

    with _progress() as progress:
        report = export_trtllm(open_checkpoint(checkpoint), out, progress)
    if as_json:
        print(report.model_dump_json())
        return
    print(
        f"{out}: {report.tensors} tensors, {report.bytes / 1e6:.1f} MB, quantisation {report.quantization}, "
        f"for {form}; the same network up to {report.max_tokens} tokens"
    )


@commands.command()
@click.argument("engine", type=click.Path(path_type=Path))
@json_option
def info(engine: Path, as_json: bool) -> None:
    """Say what the engine directory ENGINE is."""
    _print_manifest(engine, Manifest.read(engine), as_json)


@commands.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can build and run."""
    found = examine()
    if as_json:
        print(found.model_dump_json())
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, finding in found.lines():
        table.add_row(name, finding)
    Console(highlight=False).print(table)


@commands.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--batch", default=1, show_default=True)
@click.option("--step", "steps", default="1,8,32", show_default=True, callback=_integers, help="Tokens a sequence.")
@click.option("--window", "windows", default="512,4096", show_default=True, callback=_integers, help="KV rows.")
@click.option("--gpu", default="dgx-spark", show_default=True, help="Whose time floors to tell.")
@click.option("--acceptance", default=6.82, show_default=True, help="Tokens a self-speculation cycle.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write bytes by kind of kernel to this PNG.")
@json_option
def audit(engine: Path, plot: Path | None, as_json: bool, **shapes: Any) -> None:
    """Say kernel by kernel and byte by byte what the engine directory ENGINE (target rtx) will run on a GPU."""
    try:
        from trimode.build.audit.report import audit_engine, print_report, write_plot
    except ModuleNotFoundError as error:
        raise TriModeError(f"auditing needs the package {error.name}: pip install 'trimode[build]'") from None

    report = audit_engine(engine, **shapes)
    if plot is not None:
        write_plot(report, plot)
    if as_json:
        print(report.model_dump_json())
    else:
        print_report(report, Console(highlight=False))


@commands.command()
@click.option("--engine", required=True, type=click.Path(path_type=Path), help="Engine directory.")
@click.option("--prompt", required=True, help="The user's message, or - to read it from stdin.")
@click.option("--mode", type=click.Choice(get_args(Mode)), default="linear_spec", show_default=True)
@click.option("--block-length", type=int, help="Tokens of a block [default: 32].")
@click.option("--threshold", type=float, help="Confidence that settles a diffusion token [default: 0.9].")
@click.option(
    "--draft-threshold",
    type=float,
    help="The same in self-speculation's drafts; 0 drafts a block in one pass [default: 0].",
)
@click.option("--max-tokens", default=256, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", default=0, show_default=True)
@click.option("--no-adapter", is_flag=True, help="Draft without the adapter.")
@click.option("--no-chat-template", is_flag=True, help="Give the prompt to the model as it is.")
@json_option
def generate(
    engine: Path, prompt: str, no_adapter: bool, no_chat_template: bool, as_json: bool, **decoding: Any
) -> None:
    """Answer one prompt."""
    params = SamplingParams(**decoding)
    if no_adapter:
        if not params.uses_adapter:
            raise TriModeError(f"--no-adapter has no meaning in mode {params.mode}, which does not draft")
        params = dataclasses.replace(params, adapter=False)
    text = _read_prompt(prompt)
    with _progress() as progress:
        measure = params.mode == "auto"
        llm = LLM(engine, max_batch_size=1, prefix_cache_bytes=0, measure_passes=measure, progress=progress)
    with llm:
        asked: Any = text if no_chat_template else [{"role": "user", "content": text}]
        answer = llm.generate_async(asked, params, streaming=not as_json)
        for update in answer:
            if not as_json:
                print(update.outputs[0].text_diff, end="", flush=True)
    output = answer.outputs[0]
    if as_json:
        print(json.dumps(_summary(answer, output, params.mode), ensure_ascii=False))
        return
    print()
    accepted = "-" if output.mean_acceptance is None else f"{output.mean_acceptance:.2f}"
    print(
        f"[{params.mode}: {output.length} tokens in {output.seconds:.2f} s, {accepted} tokens a cycle, "
        f"{output.finish_reason}]",
        file=sys.stderr,
    )


def _summary(answer: RequestOutput, output: CompletionOutput, mode: Mode) -> dict[str, Any]:
    counts = output.counts
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "mode": mode,
        "prompt_tokens": len(answer.prompt_token_ids),
        "completion_tokens": output.length,
        "passes": {kind: getattr(counts, kind) for kind in ("prefill", "draft", "denoise", "commit")},
        "cycles": counts.cycles,
        "drafted": counts.drafted,
        "accepted": counts.accepted,
        "tokens_per_forward": output.tokens_per_forward,
        "mean_acceptance": output.mean_acceptance,
        "time_to_first_token": output.time_to_first_token,
        "seconds": output.seconds,
    }


@commands.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="TRIMODE_API_KEY", help="What clients must send [default: none].")
@click.option("--model-name", help="What clients call the model [default: the engine's source].")
@click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True, help="Answers at once.")
@click.option("--max-queue", type=click.IntRange(min=1), default=1024, show_default=True, help="Answers that may wait.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of a pass [default: all cores].")
@click.option("--max-body", type=click.IntRange(min=1), default=4 << 20, show_default=True, help="Bytes of a request.")
@click.option("--request-seconds", type=click.FloatRange(min=1), default=600, show_default=True, help="Longest answer.")
@click.option(
    "--drain-seconds", type=click.FloatRange(min=0), default=7, show_default=True, help="To finish after SIGTERM."
)
@click.option(
    "--update-seconds",
    type=click.FloatRange(min=0),
    default=0.04,
    show_default=True,
    help="Between a stream's events at least; an answer's end never waits.",
)
def serve(
    engine: Path, max_batch: int, max_queue: int, threads: int | None, update_seconds: float, **options: Any
) -> None:
    """Answer OpenAI's API over ENGINE, with a playground at /."""
    try:
        from trimode.runtime.openai_server.server import ServerOptions
        from trimode.runtime.openai_server.server import serve as run_server
    except ModuleNotFoundError as error:
        raise TriModeError(f"serving needs the package {error.name}: pip install 'trimode[serve]'") from None

    with _progress() as progress:
        llm = LLM(
            engine,
            threads=threads,
            max_batch_size=max_batch,
            max_queue_size=max_queue,
            update_seconds=update_seconds,
            progress=progress,
        )
    with llm:
        run_server(llm, ServerOptions(**options))


@commands.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("repository", type=click.Path(path_type=Path))
@click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True, help="Answers at once.")
@click.option("--max-queue", type=click.IntRange(min=1), default=1024, show_default=True, help="Answers that may wait.")
@click.option(
    "--decoupled/--no-decoupled",
    default=True,
    show_default=True,
    help="Streams, or one answer to each request, as TensorRT-LLM's own client asks for it.",
)
def triton(engine: Path, repository: Path, **options: Any) -> None:
    """Write the new folder REPOSITORY, from which Triton Inference Server serves ENGINE."""
    Manifest.read(engine)
    write_repository(engine, repository, **options)
    print(f"{repository}: model {MODEL_NAME}")


def _read_prompt(prompt: str) -> str:
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise TriModeError(f"the prompt on stdin is not UTF-8 (byte {error.start})") from None
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise TriModeError("the prompt is not valid text: it holds bytes that are no UTF-8") from None
    if not prompt.strip():
        raise TriModeError("the prompt is empty; give some text to --prompt")
    return prompt


def _print_manifest(engine: Path, manifest: Manifest, as_json: bool) -> None:
    if as_json:
        print(manifest.model_dump_json())
        return
    model, precision, limits = manifest.model, manifest.precision, manifest.limits
    stored = sum(entry.bytes for entry in manifest.files)
    rows = {
        "engine": f"{engine} (format {manifest.format_version}, target {manifest.target.name})",
        "made from": f"{manifest.source}, quantisation {manifest.quantization}",
        "model": f"{manifest.parameters:,} parameters, {model.num_hidden_layers} layers of {model.hidden_size}, "
        f"{model.num_attention_heads} query and {model.num_key_value_heads} KV heads of {model.head_dim}",
        "weights": f"{precision.summary()}; embedding {precision.embedding}",
        "activations, KV": f"{precision.activations}, {precision.kv_cache}",
        "draft adapter": "none" if manifest.adapter is None else f"rank {manifest.adapter.rank}",
        "limits": f"{limits.capacity} tokens, prefill by {limits.prefill_step}, "
        f"{limits.top_k} candidates a row"
        + ("" if limits.max_batch is None else f", batch to {limits.max_batch}, step to {limits.max_step}"),
        "on disk": f"{stored / 1e6:.1f} MB in {len(manifest.files)} files",
        "made for": manifest.target.summary,
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Bars on stderr, one for each stage that the work reports."""
    columns = (
        bars.TextColumn("{task.description:>10}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
    )
    # The stream itself: `sys.stderr` may be redirected while ModelOpt is kept quiet.
    console = Console(file=sys.stderr)
    with bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        tasks: dict[str, bars.TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done, total=total)

        yield report
