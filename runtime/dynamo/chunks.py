"""An answer's updates as the chunks that Dynamo's frontend reads."""

from __future__ import annotations

from typing import Any

from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.request.outputs import Logprob

Chunk = dict[str, Any]


def chunk_of(answer: RequestOutput, *, begun: int, link: dict[str, str], logprobs: bool) -> Chunk | None:
    """The chunk of the latest update; None if it has nothing new.

    begun: tokens that another worker has sent. link: for the worker that may have to continue the answer. logprobs:
    whether they were requested.
    """
    (output,) = answer.outputs
    sent = output.length - len(output.token_ids_diff)
    skipped = max(0, begun - sent)
    tokens = output.token_ids_diff[skipped:]
    if not tokens and output.finish_reason is None:
        return None
    chunk: Chunk = {"token_ids": tokens, "index": 0, "worker_trace_link": link}
    if logprobs and tokens:
        rows = output.logprobs_diff[skipped:]
        chunk["log_probs"] = [row[token].logprob for token, row in zip(tokens, rows, strict=True)]
        chunk["top_logprobs"] = [_alternatives(row) for row in rows]
    if output.finish_reason is not None:
        chunk["finish_reason"] = output.finish_reason
        if output.stop_reason is not None:
            chunk["stop_reason"] = output.stop_reason
        chunk["completion_usage"] = _usage(answer)
        if answer.prompt_logprobs is not None:
            chunk["engine_data"] = {"prompt_logprobs": [_prompt_entry(row) for row in answer.prompt_logprobs]}
    return chunk


def _alternatives(row: dict[int, Logprob]) -> list[Chunk]:
    return [
        {"rank": one.rank or len(row), "token_id": token, "logprob": one.logprob}
        for token, one in sorted(row.items(), key=lambda item: -item[1].logprob)
    ]


def _prompt_entry(row: dict[int, Logprob] | None) -> Chunk | None:
    if row is None:
        return None
    return {
        str(token): {"logprob": one.logprob} | ({} if one.rank is None else {"rank": one.rank})
        for token, one in row.items()
    }


def _usage(answer: RequestOutput) -> Chunk:
    prompt, completion = len(answer.prompt_token_ids), answer.outputs[0].length
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answer.outputs[0].counts.cached_tokens},
    }
