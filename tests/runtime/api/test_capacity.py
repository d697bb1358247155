"""What a loaded engine says that it can serve, and the lengths and defaults that follow from it."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest

from trimode import LLM, SamplingParams
from trimode.common.errors import TriModeError
from trimode.runtime import loading
from trimode.runtime.api.capacity import Capacity, Defaults
from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.cpu import cpu_executor
from trimode.runtime.kv import default_budget
from trimode.runtime.kv.host_kv_pool import KvPool
from trimode.runtime.request.errors import ContextLengthError

ROW_BYTES = 16


def capacity(rows: int | None, slots: int = 4, built: int = 1000, max_seq_len: int | None = None) -> Capacity:
    """Of a pool whose limit allows so many rows."""
    pool = KvPool(1, 1, 2, built, None if rows is None else rows * ROW_BYTES)
    return Capacity.of(
        pool,
        model="a model",
        target="cpu",
        built_context=built,
        max_seq_len=max_seq_len,
        slots=slots,
        prefix_cache_bytes=256 << 20,
        threads=2,
        defaults=Defaults(),
    )


def test_memory_shortens_the_context() -> None:
    found = capacity(rows=600)
    assert (found.context, found.slot_context) == (600, 150)
    assert (found.kv_cache_bytes, found.kv_bytes_per_token) == (600 * ROW_BYTES, ROW_BYTES)
    assert str(found) == (
        "a model on cpu; context 600 tokens of 1,000; 4 slots (150 tokens each when all are in use); "
        "KV cache 9.375 KiB at 16 bytes a token; prefix cache 256 MiB; 2 threads; mode auto, blocks of 32"
    )
    assert (capacity(rows=None).context, capacity(rows=None).slot_context) == (1000, 1000)
    assert "KV cache 1 KiB at" in str(capacity(rows=64))
    assert "KV cache 2048 TiB at" in str(capacity(rows=1 << 47))
    limited = capacity(rows=None, max_seq_len=200)
    assert (limited.context, limited.slot_context) == (200, 200)


@pytest.mark.parametrize(
    ("defaults", "ending"),
    [
        (Defaults(), "2 threads; mode auto, blocks of 32"),
        (Defaults("ar"), "2 threads; mode ar"),
        (Defaults("linear_spec", 8), "2 threads; mode linear_spec, blocks of 8"),
        (Defaults("ar", enable_thinking=True), "mode ar; thinking on"),
        (Defaults("diffusion", None, False), "mode diffusion, blocks of 32; thinking off"),
    ],
)
def test_the_line_ends_with_the_defaults_of_requests(defaults: Defaults, ending: str) -> None:
    line = str(dataclasses.replace(capacity(rows=600), defaults=defaults))
    assert line.endswith("; " + ending)
    assert ("thinking" in line) == (defaults.enable_thinking is not None)


def test_the_line_leaves_out_what_says_nothing() -> None:
    whole = capacity(rows=None)
    assert str(dataclasses.replace(whole, threads=None)) == (
        "a model on cpu; context 1,000 tokens; 4 slots; KV cache unlimited at 16 bytes a token; "
        "prefix cache 256 MiB; mode auto, blocks of 32"
    )
    for count, size in ((0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (1536 << 20, "1.5 GiB")):
        assert f"prefix cache {size};" in str(dataclasses.replace(whole, prefix_cache_bytes=count))


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [(1, 149), (50, 100), (100, 75), (500, 75), (560, 40), (599, 1), (600, 0), (700, 0)],
)
def test_the_default_length_is_a_slots_share(prompt: int, answer: int) -> None:
    """150 rows for each of the slots; half of that behind a long prompt; never past the context of 600."""
    assert capacity(rows=600).default_max_tokens(prompt) == answer


def test_without_a_limit_the_default_length_is_the_context() -> None:
    assert capacity(rows=None).default_max_tokens(10) == 990


def test_an_open_length_takes_what_memory_allows(random_engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trimode")
    with LLM(random_engine, max_batch_size=2, kv_cache_bytes=1 << 19, measure_passes=False) as llm:
        context = llm.capacity.context
        assert str(llm.capacity) in caplog.messages
        open_length = SamplingParams(max_tokens=None, ignore_eos=True)
        answers = llm.generate([[300], [301], [302]], open_length, use_tqdm=False)
        assert [answer.outputs[0].length for answer in answers] == [context // 2 - 1] * 3
        assert answers[0].outputs[0].finish_reason == "length"
        with pytest.raises(ContextLengthError, match="no room for an answer"):
            llm.generate([300] * context, open_length)
        long = llm.generate([300] * (context - 5), open_length)
        assert long.outputs[0].length == 5


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear_spec", "auto"])
def test_defaults_of_requests(random_engine: Path, mode: Any) -> None:
    with LLM(random_engine, mode=mode, block_length=4, max_seq_len=50, measure_passes=False) as llm:
        assert llm.capacity.context == 50
        found = llm.generate([300], SamplingParams(max_tokens=9, ignore_eos=True)).outputs[0]
        block = {} if mode == "ar" else {"block_length": 4}
        expected = llm.generate([300], SamplingParams(max_tokens=9, ignore_eos=True, mode=mode, **block)).outputs[0]
        assert found.token_ids == expected.token_ids
        if mode != "auto":  # which chooses anew each time
            assert found.counts.drafted == expected.counts.drafted
        explicit = llm.generate([300], SamplingParams(max_tokens=9, ignore_eos=True, mode="ar")).outputs[0]
        assert explicit.counts.draft + explicit.counts.denoise == 0
        with pytest.raises(ContextLengthError, match="max_tokens can be at most 49"):
            llm.generate([300], SamplingParams(max_tokens=50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 8193}, "max_seq_len is 8193, but the engine was built for 8192"),
        ({"max_seq_len": 1}, "max_seq_len is 1; it must be at least 2"),
        ({"kv_cache_bytes": 1}, "kv_cache_bytes is 1, but one token's keys and values take"),
        ({"mode": "fast"}, "mode is 'fast'; it must be one of"),
        ({"block_length": 0}, "block_length is 0; it must be at least 1"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"max_batch_size": 0}, "max_batch_size is 0; it must be at least 1"),
        ({"max_queue_size": 0}, "max_queue_size is 0; it must be at least 1"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes is 0; it must be at least 1"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes is -1; it must be at least 0"),
        ({"update_seconds": -0.5}, "update_seconds is -0.5; it must be at least 0"),
    ],
)
def test_options_that_cannot_be(random_engine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TriModeError, match=message):
        LLM(random_engine, measure_passes=False, verify=False, **options)


def test_options_at_their_least(random_engine: Path) -> None:
    least: dict[str, Any] = {"threads": 1, "max_batch_size": 1, "max_queue_size": 1, "max_seq_len": 2}
    with LLM(random_engine, prefix_cache_bytes=0, update_seconds=0, measure_passes=False, **least) as llm:
        assert (llm.capacity.context, llm.capacity.slots, llm.max_answers) == (2, 1, 2)
        assert llm.generate([300], SamplingParams(max_tokens=1)).outputs[0].length == 1
        assert llm.stats().prefix_cache_bytes == 0
    with LLM(random_engine, max_seq_len=8192, measure_passes=False) as llm:
        assert llm.capacity.context == 8192


def test_what_an_engine_does_unless_it_is_told() -> None:
    """Servers and users rely on these values."""
    named = {name: parameter.default for name, parameter in inspect.signature(EngineLLM.__init__).parameters.items()}
    assert {name: named[name] for name in ("max_queue_size", "prefix_cache_bytes", "update_seconds", "mode")} == {
        "max_queue_size": 1024,
        "prefix_cache_bytes": 256 * 2**20,
        "update_seconds": 0,
        "mode": "auto",
    }
    assert named["measure_passes"] is named["verify"] is True
    assert inspect.signature(EngineLLM.generate_async).parameters["streaming"].default is False
    assert inspect.signature(EngineLLM.generate).parameters["use_tqdm"].default is True


def test_the_default_limit_is_a_share_of_available_memory(random_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(entry.bytes for entry in loading.Manifest.read(random_engine).files)
    monkeypatch.setattr(default_budget, "available_memory", lambda: weights + (1 << 20))
    with LLM(random_engine, measure_passes=False) as llm:
        assert llm.capacity.kv_cache_bytes == int(default_budget.KV_SHARE * (1 << 20))


@pytest.mark.parametrize(("threads", "used"), [(None, 2), (1, 1), (2, 2), (64, 2)])
def test_threads_do_not_exceed_the_cpus(
    random_engine: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None, used: int
) -> None:
    monkeypatch.setattr(cpu_executor, "usable_cpus", lambda: 2)
    with LLM(random_engine, threads=threads, measure_passes=False) as llm:
        assert llm.capacity.threads == used
