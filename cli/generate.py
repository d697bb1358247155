"""``trimode generate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, get_args

import click

from trimode.cli.explanation import explain as explanation_lines
from trimode.cli.parameters import build_options, json_option
from trimode.cli.prompt import read_prompt
from trimode.common.errors import TriModeError
from trimode.common.progress_bars import progress_bars
from trimode.llm import LLM
from trimode.model.chat_template import Message
from trimode.model.quantization import Method
from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.request.sampling_params import (
    DEFAULT_BLOCK_LENGTH,
    DEFAULT_THRESHOLD,
    Mode,
    SamplingParams,
)


@click.command()
@click.argument("model")
@click.option("--prompt", required=True, help="The user's message; - reads it from stdin.")
@click.option("--mode", type=click.Choice(get_args(Mode)), default="auto", show_default=True)
@click.option("--block-length", type=int, help=f"Tokens of a block [default: {DEFAULT_BLOCK_LENGTH}].")
@click.option(
    "--threshold",
    type=float,
    help=f"diffusion: confidence at which a masked position is filled [default: {DEFAULT_THRESHOLD}].",
)
@click.option(
    "--draft-threshold",
    type=float,
    help="linear_spec: least probability of a draft token, else further passes refine the draft [default: 0].",
)
@click.option("--max-tokens", type=int, default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--lookup/--no-lookup",
    default=None,
    help="Copy draft tokens from earlier text where that is expected to be faster.",
)
@click.option("--tree-width", type=int, help="linear_spec: nodes of the draft tree to verify, its root included.")
@click.option("--explain", is_flag=True, help="Print to stderr how the cycles drafted, and what passes cost.")
@click.option("--no-adapter", is_flag=True, help="Draft without the draft adapter.")
@click.option("--no-chat-template", is_flag=True, help="Pass the prompt to the model unchanged.")
@build_options
@json_option
def command(
    model: str,
    prompt: str,
    mode: Mode,
    block_length: int | None,
    threshold: float | None,
    draft_threshold: float | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    lookup: bool | None,
    tree_width: int | None,
    explain: bool,
    no_adapter: bool,
    no_chat_template: bool,
    target: str | None,
    method: Method | None,
    group: int | None,
    as_json: bool,
) -> None:
    """Answer one prompt with MODEL: an engine directory, a checkpoint folder, or a Hugging Face model ID.

    A checkpoint is quantised and built once, into the cache (see `trimode cache`). The text goes to stdout, its counts
    go to stderr.
    """
    params = SamplingParams(
        mode=mode,
        block_length=block_length,
        threshold=threshold,
        draft_threshold=draft_threshold,
        lookup=lookup,
        tree_width=tree_width,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        record_drafts=explain,
    )
    if no_adapter:
        if not params.uses_adapter:
            raise TriModeError(f"--no-adapter has no effect in mode {mode}, which does not draft; leave it out")
        params = dataclasses.replace(params, adapter=False)
    text = read_prompt(prompt)
    inputs: str | list[Message] = text if no_chat_template else [{"role": "user", "content": text}]
    with progress_bars() as progress:
        # Only choices by cost use measured pass costs.
        measure = mode == "auto" or bool(lookup) or explain
        llm = LLM(
            model,
            target=target,
            method=method,
            group=group,
            max_batch_size=1,
            prefix_cache_bytes=0,
            measure_passes=measure,
            progress=progress,
        )
    with llm:
        answer = llm.generate_async(inputs, params, streaming=not as_json)
        for update in answer:
            if not as_json:
                print(update.outputs[0].text_diff, end="", flush=True)
        if explain:
            longest = params.block_length or DEFAULT_BLOCK_LENGTH
            explanation = explanation_lines(answer.outputs[0].cycles, llm.pass_seconds, longest)
    if explain:
        print("\n".join(("", *explanation)), file=sys.stderr)
    if as_json:
        print(json.dumps(_summary(answer, mode), ensure_ascii=False))
        return
    print()
    output = answer.outputs[0]
    accepted = "-" if output.mean_acceptance is None else f"{output.mean_acceptance:.2f}"
    print(
        f"[{mode}: {output.length} tokens in {output.seconds:.2f} s, {accepted} tokens per cycle, "
        f"{output.finish_reason}]",
        file=sys.stderr,
    )


def _summary(answer: RequestOutput, mode: Mode) -> dict[str, Any]:
    output = answer.outputs[0]
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
