"""The Python API on a real engine: one input or many, blocking, awaited or streamed, and refusals."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.support.patience import HANG_SECONDS
from trimode import LLM, RequestOutput, SamplingParams
from trimode.common.errors import TriModeError
from trimode.runtime.request.errors import ContextLengthError, QueueFullError, ShutDownError
from trimode.runtime.request.outputs import CompletionOutput
from trimode.runtime.request.sampling_params import Mode


@pytest.fixture(scope="module")
def llm(random_engine: Path) -> Iterator[LLM]:
    with LLM(random_engine, max_batch_size=4) as llm:
        yield llm


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "mode": "linear_spec", "block_length": 8} | options)


def test_one_and_many_and_in_every_form(llm: LLM) -> None:
    text = llm.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    ids = llm.tokenizer.encode(text)
    one = llm.generate(text, greedy())
    assert (one.prompt, one.prompt_token_ids, one.finished) == (text, ids, True)
    many = llm.generate([ids, [300, 301]], greedy(), use_tqdm=False)
    chat = llm.generate([{"role": "user", "content": "Hi"}], greedy())
    chats = llm.generate([[{"role": "user", "content": "Hi"}]], [greedy()])
    for answer in (many[0], chat, chats[0]):
        assert answer.outputs[0].token_ids == one.outputs[0].token_ids
    assert many[1].outputs[0].token_ids != one.outputs[0].token_ids
    for prompt in ({"prompt": text}, {"prompt_token_ids": ids}):
        assert llm.generate(prompt, greedy()).outputs[0].token_ids == one.outputs[0].token_ids
        assert llm.generate([prompt], greedy())[0].outputs[0].token_ids == one.outputs[0].token_ids
    thinking = llm.generate([{"role": "user", "content": "Hi"}], greedy(max_thinking_tokens=1), enable_thinking=True)
    assert str(thinking.prompt).endswith("<think>\n")
    assert "forced" in thinking.outputs[0].origins
    assert one.outputs[0].text == llm.tokenizer.decode(one.outputs[0].token_ids)
    assert len({answer.request_id for answer in (one, *many, chat)}) == 4


def test_chats_with_options_of_their_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    source = "{{ tools[0].name }}{{ custom }}{{ messages[0].content }}"
    options = {"chat_template": source, "tools": [{"name": "f"}], "chat_template_kwargs": {"custom": 7}}
    assert llm.generate({"messages": messages, **options}, greedy(max_tokens=1)).prompt == "f7Hi"
    plain = llm.generate({"messages": messages}, greedy(max_tokens=1))
    assert plain.prompt == llm.tokenizer.apply_chat_template(messages)


def test_a_users_mark_opens_no_thought(llm: LLM) -> None:
    """The budget of thinking counts only in a thought that the template or the model opens."""
    params = greedy(max_thinking_tokens=0, max_tokens=4)
    template = "{{ messages[0].content }}"
    messages = [{"role": "user", "content": "<think>"}]
    chat = llm.generate({"messages": messages, "chat_template": template}, params)
    ids = chat.prompt_token_ids
    assert "forced" not in chat.outputs[0].origins
    assert "forced" in llm.generate(ids, params).outputs[0].origins
    assert "forced" not in llm.generate({"prompt_token_ids": ids, "thinking": False}, params).outputs[0].origins


def test_the_default_is_auto_and_greedy(llm: LLM) -> None:
    found = llm.generate([300, 301]).outputs[0]
    assert found.token_ids == llm.generate([300, 301], SamplingParams(mode="ar")).outputs[0].token_ids
    assert found.length == 32


@pytest.mark.parametrize("mode", ["auto", "ar", "linear_spec", "diffusion"])
def test_streamed_pieces_are_the_whole(llm: LLM, mode: Any) -> None:
    params = SamplingParams(max_tokens=30, mode=mode, logprobs=1)

    async def stream() -> tuple[RequestOutput, list[CompletionOutput], int]:
        answer, texts, tokens, logprobs, updates = llm.generate_async([300, 301], params, streaming=True), [], [], [], 0
        async for update in answer:
            texts.append(update.outputs[0].text_diff)
            tokens += update.outputs[0].token_ids_diff
            logprobs += update.outputs[0].logprobs_diff
            updates += 1
        output = answer.outputs[0]
        assert "".join(texts) == output.text
        assert tokens == output.token_ids
        assert logprobs == output.logprobs
        return answer, answer.outputs, updates

    answer, (output,), updates = asyncio.run(stream())
    assert answer.finished
    assert updates >= 1
    assert output.token_ids == llm.generate([300, 301], params).outputs[0].token_ids
    assert len(output.origins) == output.length == len(output.logprobs or [])
    assert output.cumulative_logprob is not None
    assert output.cumulative_logprob < 0
    assert 0 < (output.time_to_slot or 0) < (output.time_to_first_token or 0) <= (output.seconds or 0)


def test_many_are_awaited_together(llm: LLM) -> None:
    async def gather() -> list[RequestOutput]:
        return await asyncio.gather(*(llm.generate_async([300 + i], greedy()) for i in range(12)))

    together = asyncio.run(gather())
    for index, answer in enumerate(together):
        assert answer.outputs[0].token_ids == llm.generate([300 + index], greedy()).outputs[0].token_ids


def test_n_answers_share_the_prompt_and_differ(llm: LLM) -> None:
    prompt = list(range(300, 340))
    params = greedy(n=3, temperature=1.3, seed=5)
    answer = llm.generate(prompt, params)
    assert [output.index for output in answer.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in answer.outputs}) == 3
    for index, output in enumerate(answer.outputs):
        alone = llm.generate(prompt, greedy(temperature=1.3, seed=5 + index)).outputs[0]
        assert output.token_ids == alone.token_ids
    assert [output.counts.cached_tokens for output in answer.outputs[1:]] == [39, 39]


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(llm: LLM) -> None:
    params = greedy(temperature=1.0, seed=9, mode="auto", block_length=None)
    alone = llm.generate([300, 301], params).outputs[0].token_ids
    crowd = [[310 + i] for i in range(7)]
    together = llm.generate([*crowd, [300, 301], *crowd], [greedy(temperature=1.0)] * 7 + [params] + [greedy()] * 7)
    assert together[7].outputs[0].token_ids == alone
    unseeded = {tuple(llm.generate([300], greedy(temperature=1.5)).outputs[0].token_ids) for _ in range(3)}
    assert len(unseeded) == 3


def test_stop_strings_and_tokens_end_the_text_exactly(llm: LLM) -> None:
    whole = llm.generate([300, 301], greedy(max_tokens=60)).outputs[0]
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    first = whole.text.index(stop)
    for mode in ({"mode": "ar", "block_length": None}, {"mode": "linear_spec", "block_length": 32}, {"mode": "auto"}):
        hidden = llm.tokenizer.decode(whole.token_ids[: whole.token_ids.index(whole.token_ids[10])])
        found = llm.generate([300, 301], greedy(max_tokens=60, stop=[stop, "never"], **mode)).outputs[0]
        assert (found.text, found.finish_reason, found.stop_reason) == (whole.text[:first], "stop", stop)
        kept = greedy(max_tokens=60, stop=stop, include_stop_str_in_output=True, **mode)
        assert llm.generate([300, 301], kept).outputs[0].text == whole.text[: first + len(stop)]
        token = whole.token_ids[10]
        found = llm.generate([300, 301], greedy(max_tokens=60, stop_token_ids=[token], **mode)).outputs[0]
        assert found.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
        assert (found.finish_reason, found.stop_reason) == ("stop", token)
        assert found.text == hidden
        kept = greedy(max_tokens=60, stop_token_ids=[token], stop="never", include_stop_str_in_output=True, **mode)
        found = llm.generate([300, 301], kept).outputs[0]
        assert found.text == llm.tokenizer.decode(found.token_ids)
        found = llm.generate([300, 301], greedy(max_tokens=60, stop_token_ids=[token], stop="never", **mode)).outputs[0]
        assert found.text == hidden


def test_stop_strings_end_a_diffusion_text_exactly(llm: LLM) -> None:
    params = greedy(mode="diffusion", max_tokens=60)
    whole = llm.generate([300, 301], params).outputs[0].text
    stop = whole[len(whole) // 2 :][:3]
    found = llm.generate([300, 301], dataclasses.replace(params, stop=stop)).outputs[0]
    assert (found.text, found.finish_reason, found.stop_reason) == (whole[: whole.index(stop)], "stop", stop)


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_may_be_a_special_token(llm: LLM, skip: bool) -> None:
    """In the text or left out of it, its token ends it."""
    special = llm.tokenizer.special_tokens
    assert special["<|im_end|>"] == llm.manifest.model.eos_token_id[0]
    for seed in range(3):
        params = greedy(
            mode="ar",
            block_length=None,
            temperature=1.6,
            seed=seed,
            max_tokens=2000,
            ignore_eos=True,
            stop=list(special),
        )
        found = llm.generate([300], dataclasses.replace(params, skip_special_tokens=skip)).outputs[0]
        assert found.finish_reason == "stop"
        assert special[str(found.stop_reason)] == found.token_ids[-1]
        assert not set(found.token_ids[:-1]) & set(special.values())
        assert found.text == llm.tokenizer.decode(found.token_ids[:-1])


def test_sampled_diffusion_is_the_same_in_a_crowd(llm: LLM) -> None:
    params = greedy(mode="diffusion", temperature=1.0, seed=4, max_tokens=40)
    alone = llm.generate([300, 301], params).outputs[0].token_ids
    crowd = [[310 + i] for i in range(5)]
    together = llm.generate([*crowd, [300, 301], *crowd], [greedy(temperature=1.0)] * 5 + [params] + [greedy()] * 5)
    assert together[5].outputs[0].token_ids == alone
    assert llm.generate([300, 301], dataclasses.replace(params, seed=5)).outputs[0].token_ids != alone


def test_ignoring_the_end_token(llm: LLM) -> None:
    end = llm.manifest.model.eos_token_id[0]
    prompt = next(
        [300 + start]
        for start in range(300)
        if llm.generate([300 + start], greedy(max_tokens=40, temperature=1.6, seed=0)).outputs[0].finish_reason
        == "stop"
    )
    params = greedy(max_tokens=60, temperature=1.6, seed=0, ignore_eos=True, skip_special_tokens=False)
    found = llm.generate(prompt, params).outputs[0]
    assert end in found.token_ids[:-1]
    assert (found.length, found.finish_reason) == (60, "length")
    assert found.text == llm.tokenizer.decode(found.token_ids, skip_special_tokens=False)


def test_an_aborted_request_ends_at_once_and_frees_its_slot(llm: LLM) -> None:
    running = llm.generate_async([300], SamplingParams(max_tokens=4000, mode="ar", ignore_eos=True), streaming=True)
    next(iter(running))
    running.abort()
    output = running.result(timeout=HANG_SECONDS).outputs[0]
    assert output.finish_reason == "cancelled"
    assert 0 < output.length < 4000
    assert llm.stats().running == 0


def test_a_prompt_with_more_answers_than_may_wait_is_rejected(random_engine: Path) -> None:
    with LLM(random_engine, max_batch_size=1, max_queue_size=1) as llm:
        long = SamplingParams(max_tokens=3000, mode="ar", ignore_eos=True)
        first = llm.generate_async([300], long, streaming=True)
        next(iter(first))
        with pytest.raises(QueueFullError, match=r"^0 answers wait already"):
            llm.generate_async([300], greedy(n=2, temperature=1.0))
        first.abort()


def test_steps_longer_than_the_engine_was_built_for_are_rejected(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = llm.manifest.limits.model_copy(update={"max_step": 8})
    monkeypatch.setattr(llm._factory, "manifest", llm.manifest.model_copy(update={"limits": limits}))
    for field in ("block_length", "tree_width"):
        with pytest.raises(TriModeError, match=f"{field} is 9, but the engine was built for steps of 8"):
            llm.generate([300], greedy(**{field: 9}))
    assert llm.generate([300], greedy(max_tokens=1, tree_width=8)).outputs[0].length == 1


def test_back_pressure(random_engine: Path) -> None:
    long = SamplingParams(max_tokens=3000, mode="ar", ignore_eos=True)
    with LLM(random_engine, max_batch_size=1, max_queue_size=2) as llm:
        first = llm.generate_async([300], long, streaming=True)
        next(iter(first))
        waiting = [llm.generate_async([300], long) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 answers wait already; try again later"):
            llm.generate_async([300], long)
        for request in (first, *waiting):
            request.abort()
        for request in (first, *waiting):
            request.result(timeout=HANG_SECONDS)
        # An idle engine accepts what may run and what may wait, each answer of a prompt counted.
        three = llm.generate_async([300], greedy(n=3, temperature=1.0))
        with pytest.raises(QueueFullError):
            llm.generate_async([300], long)
        assert all(output.length for output in three.result().outputs)
        with pytest.raises(TriModeError, match="n is 4, but at most 3 answers may run or wait"):
            llm.generate_async([300], greedy(n=4, temperature=1.0))
        # Whoever waits for all gets through however many they are.
        assert len(llm.generate([[300 + i] for i in range(9)], greedy(max_tokens=2))) == 9


def test_shutdown_ends_what_runs_with_an_error(random_engine: Path) -> None:
    llm = LLM(random_engine, max_batch_size=1)
    long = SamplingParams(max_tokens=4000, mode="ar", ignore_eos=True)
    requests = [llm.generate_async([300], long) for _ in range(3)]
    llm.shutdown()
    for request in requests:
        for _ in range(2):  # also on later calls
            with pytest.raises(ShutDownError, match="before the request was finished"):
                request.result(timeout=HANG_SECONDS)
    with pytest.raises(ShutDownError):
        llm.generate_async([300])
    assert not any(thread.name == "trimode-scheduler" and thread is llm._thread for thread in threading.enumerate())


def test_an_adapter_that_is_not_there_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm._factory, "manifest", llm.manifest.model_copy(update={"adapter": None}))
    with pytest.raises(TriModeError, match="adapter is True, but the engine has no draft adapter"):
        llm.generate_async([300], greedy(adapter=True))
    assert llm.generate([300], greedy()).finished


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ([], {}, TriModeError, "the prompt is empty"),
        ("", {}, TriModeError, "the prompt is empty"),
        ([768], {}, TriModeError, "prompt token 768 is outside the model's vocabulary of 768"),
        ([300, "a"], {}, TriModeError, "prompt token 'a' is outside"),
        ([300] * 8192, {"max_tokens": 5}, ContextLengthError, "8192 tokens, which leave no room"),
        (
            [300] * 8190,
            {"max_tokens": 5},
            ContextLengthError,
            "of 8192 tokens; max_tokens can be at most 2",
        ),
        ([300], {"top_k": 769}, TriModeError, "top_k is 769, but the engine reports 768 candidates a row"),
        ([300], {"logprobs": 800}, TriModeError, "logprobs is 800, but the engine reports 768"),
        (
            [300],
            {"stop_token_ids": [768]},
            TriModeError,
            "stop_token_ids: token 768 is outside the model's vocabulary of 768",
        ),
        ([300], {"stop": "a<|im_end|>"}, TriModeError, r"contains the special token <\|im_end\|>, which"),
        ({"text": "Hi"}, {}, TriModeError, "an input has 'text'; give 'prompt', 'prompt_token_ids' or 'messages'"),
        ({"prompt": "Hi", "tools": []}, {}, TriModeError, "an input has 'prompt', 'tools'; give"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(
    llm: LLM, inputs: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.generate_async(inputs, SamplingParams(**options))
    assert llm.stats().running == 0


def test_the_pool_stays_within_kv_cache_bytes(random_engine: Path) -> None:
    """Whatever pads the passes: long prompts beside short ones, all modes, a burst before a long request."""
    limit = 1 << 20
    with LLM(random_engine, max_batch_size=8, kv_cache_bytes=limit) as llm:
        context = llm.capacity.context
        assert context == limit // llm.capacity.kv_bytes_per_token < llm.manifest.limits.capacity
        with pytest.raises(ContextLengthError, match=f"{context} tokens .the engine's 8192 need more") as refused:
            llm.generate_async([300], SamplingParams(max_tokens=8000))
        assert (refused.value.prompt_tokens, refused.value.max_tokens, refused.value.fits) == (1, 8000, context - 1)
        pool = llm._executor.pool

        def taken() -> int:
            return sum(buffer.nbytes for buffer in pool.buffers)

        params = [SamplingParams(max_tokens=100, mode=mode, ignore_eos=True) for mode in get_args(Mode)]
        prompts = [[300 + i] * (1 if i % 3 else context - 101) for i in range(12)]
        requests = [llm.generate_async(prompt, params[i % 4], streaming=True) for i, prompt in enumerate(prompts)]
        for request in requests:
            for _ in request:
                assert taken() <= limit
            assert request.outputs[0].length == 100
        long = SamplingParams(max_tokens=context - 1, mode="auto", ignore_eos=True)
        answer = llm.generate_async([300], long, streaming=True)
        for _ in answer:
            assert taken() <= limit
        assert answer.outputs[0].length == context - 1


def test_a_second_turn_prefills_only_what_is_new(llm: LLM, random_engine: Path) -> None:
    first = list(range(300, 700)) + list(range(300, 700))
    answer = llm.generate(first, greedy(max_tokens=16, ignore_eos=True)).outputs[0]
    second = [*first, *answer.token_ids, 310, 311, 312]
    found = llm.generate(second, greedy()).outputs[0]
    assert found.counts.cached_tokens == len(first) + len(answer.token_ids) - 1
    assert found.counts.prefill == 1
    with LLM(random_engine, prefix_cache_bytes=0) as fresh:
        assert fresh.generate(second, greedy()).outputs[0].token_ids == found.token_ids


def test_result_waits_no_longer_than_its_timeout(llm: LLM) -> None:
    request = llm.generate_async([300], SamplingParams(max_tokens=8000, mode="ar", ignore_eos=True))
    begun = time.perf_counter()
    with pytest.raises(TimeoutError, match="not finished after"):
        request.result(timeout=0.05)
    assert time.perf_counter() - begun < HANG_SECONDS
    request.abort()
    request.result()
    streamed = llm.generate_async([300], SamplingParams(max_tokens=8000, mode="ar", ignore_eos=True), streaming=True)
    with pytest.raises(TimeoutError):  # however many updates arrive
        streamed.result(timeout=0.2)
    streamed.abort()
