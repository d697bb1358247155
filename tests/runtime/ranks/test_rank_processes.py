"""Two ranks in processes of their own, with MPI between them: texts, sockets, and what happens when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from scripts.serving.server_process import KEY, serving
from tests.support import scripted_rank
from tests.support.command import run_here
from tests.support.executor_texts import conversations
from tests.support.patience import HANG_SECONDS, wait_until
from tests.support.random_checkpoint import write_random_checkpoint
from trimode import LLM, SamplingParams
from trimode.build.cpu.target import CpuTarget
from trimode.build.engine_builder import build_engine
from trimode.common.errors import TriModeError
from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint
from trimode.runtime.executor import ExecutorLostError
from trimode.runtime.ranks import ranked_executor
from trimode.runtime.ranks.messages import Load
from trimode.runtime.ranks.processes import READY_VARIABLE, RankProcesses
from trimode.runtime.ranks.ranked_executor import RankedExecutor
from trimode.runtime.request.errors import EngineDeadError

pytest.importorskip("mpi4py", reason="needs the extra [mpi]")

ROOT = Path(__file__).resolve().parents[3]
MODES: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 16},
    {"mode": "linear_spec", "block_length": 7, "draft_threshold": 0.5, "adapter": False},
    {"mode": "linear_spec", "block_length": 8, "tree_width": 16},
    {"mode": "auto", "lookup": True},
    {"mode": "diffusion", "block_length": 8},
    {"mode": "ar", "temperature": 0.8, "seed": 5},
    {"mode": "linear_spec", "temperature": 0.8, "seed": 5},
]


@pytest.fixture(scope="module")
def engine(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny engine, divided among two ranks."""
    out = tmp_path_factory.mktemp("ranks") / "engine"
    build_engine(Checkpoint(tiny_engine.parent / "w4a16"), out, target=CpuTarget(tp=2))
    return out


@pytest.fixture(scope="module")
def ranked(engine: Path) -> Iterator[LLM]:
    with LLM(engine, threads=2, max_batch_size=4, verify=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network with 8 KV heads, int4 in groups of 32."""
    folder = tmp_path_factory.mktemp("eight")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 16}
    write_random_checkpoint(folder / "bf16", **sizes)
    quantize_checkpoint(Checkpoint(folder / "bf16"), folder / "w4a16", method="rtn", group=32, head="int4")
    return folder / "w4a16"


def pids(llm: LLM) -> list[int]:
    return llm._executor.pids  # type: ignore[attr-defined]


def running(processes: list[int]) -> list[int]:
    """Those that run or were not reaped."""
    return [process for process in processes if psutil.pid_exists(process)]


def wait_until_gone(processes: list[int]) -> None:
    wait_until(lambda: running(processes) == [])


def test_the_ranks_emit_the_whole_engines_tokens(ranked: LLM, tiny_engine: Path, heldout: list[dict]) -> None:
    """All modes share a batch of four, and later prompts reuse the rows of earlier ones."""
    prompts = [prompt for prompt in conversations(heldout)[:3] for _ in MODES]
    params = [SamplingParams(max_tokens=40, **mode) for mode in MODES] * 3
    with LLM(tiny_engine, threads=1, max_batch_size=4, verify=False) as whole:
        expected = [output.outputs[0].token_ids for output in whole.generate(prompts, params)]
    found = [output.outputs[0] for output in ranked.generate(prompts, params)]
    assert [output.token_ids for output in found] == expected
    assert sum(output.counts.cached_tokens for output in found) > 0


def test_four_ranks_of_two_heads_emit_the_whole_engines_tokens(eight_heads: Path, tmp_path: Path) -> None:
    prompts = [np.random.default_rng(seed).integers(101, 768, 20).tolist() for seed in range(2) for _ in MODES]
    params = [SamplingParams(max_tokens=24, **mode) for mode in MODES] * 2
    texts = []
    for tp in (1, 4):
        build_engine(Checkpoint(eight_heads), tmp_path / str(tp), target=CpuTarget(tp=tp), capacity=256)
        with LLM(tmp_path / str(tp), threads=tp, max_batch_size=4, verify=False) as llm:
            assert tp == 1 or len(pids(llm)) == 4
            texts.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert texts[0] == texts[1]


def test_a_grammar_and_logprobs_see_the_whole_vocabulary(ranked: LLM, tiny_engine: Path, heldout: list[dict]) -> None:
    """Token masks and asked ids of tokens on both ranks."""
    from trimode import GuidedDecodingParams

    params = SamplingParams(max_tokens=12, guided_decoding=GuidedDecodingParams(regex=r"[0-9a-z ]+"), logprobs=3)
    prompt = conversations(heldout)[0]
    with LLM(tiny_engine, threads=1, max_batch_size=1, verify=False) as whole:
        expected = whole.generate(prompt, params).outputs[0]
    found = ranked.generate(prompt, params).outputs[0]
    assert found.token_ids == expected.token_ids
    assert found.logprobs is not None
    assert expected.logprobs is not None
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one.keys() == other.keys()
        for token in one:
            assert one[token].logprob == pytest.approx(other[token].logprob, abs=1e-3)


def test_no_process_listens_on_a_port(ranked: LLM) -> None:
    """Neither MPI nor its start-up opens one."""
    for process in pids(ranked):
        assert psutil.Process(process).net_connections("inet") == []


def test_idle_ranks_take_no_processor_time(ranked: LLM) -> None:
    ranked.generate([200, 201, 202], SamplingParams(max_tokens=2))

    def used() -> list[float]:
        return [sum(psutil.Process(process).cpu_times()[:2]) for process in pids(ranked)]

    def idle() -> bool:
        """On a busy machine, ranks need some time until they sleep."""
        before = used()
        time.sleep(0.5)
        return max(late - early for late, early in zip(used(), before, strict=True)) <= 0.05

    wait_until(idle)


def test_a_rank_that_dies_ends_the_engine(engine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LLM(engine, threads=2, verify=False, measure_passes=False) as llm:
        processes = pids(llm)
        output = llm.generate_async([200, 201, 202], SamplingParams(max_tokens=1500, ignore_eos=True), streaming=True)
        next(iter(output))
        os.kill(processes[1], signal.SIGKILL)
        reason = "the engine has stopped: rank 1 of 2 has ended .signal 9, SIGKILL."
        with pytest.raises(EngineDeadError, match=reason):
            output.result()
        wait_until_gone(processes)
        with pytest.raises(EngineDeadError, match=reason):
            llm.generate([200], SamplingParams(max_tokens=1))
        assert llm.failure is not None
    assert "Traceback" not in capfd.readouterr().err


def test_a_rank_that_dies_while_idle_ends_the_others(engine: Path) -> None:
    with LLM(engine, threads=2, verify=False, measure_passes=False) as llm:
        processes = pids(llm)
        os.kill(processes[0], signal.SIGKILL)
        wait_until_gone(processes)
        assert llm.failure == "rank 0 of 2 has ended (signal 9, SIGKILL)"
        with pytest.raises(EngineDeadError, match="rank 0 of 2 has ended"):
            llm.generate([200], SamplingParams(max_tokens=1))


def test_shutting_down_ends_the_ranks(engine: Path) -> None:
    with LLM(engine, threads=2, verify=False, measure_passes=False) as llm:
        processes = pids(llm)
    assert running(processes) == []


def test_ranks_end_with_the_process_that_started_them(engine: Path) -> None:
    """It is killed in the middle of an answer, so it cannot end them."""
    program = (
        "import sys; from trimode import LLM, SamplingParams\n"
        f"llm = LLM({str(engine)!r}, threads=2, verify=False, measure_passes=False)\n"
        "output = llm.generate_async([200], SamplingParams(max_tokens=1500, ignore_eos=True), streaming=True)\n"
        "next(iter(output)); print(*llm._executor.pids, flush=True); output.result()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        processes = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(processes) == 2
    wait_until_gone(processes)


def test_an_error_of_a_rank_while_loading_is_one_line(engine: Path) -> None:
    with pytest.raises(TriModeError, match=r"kv_cache_bytes is .* raise it"):
        LLM(engine, threads=2, verify=False, kv_cache_bytes=64)


def test_ranks_that_hang_while_loading_end_a_command_with_one_line(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_module: str, *arguments: Any, **options: Any) -> RankedExecutor:
        return RankedExecutor(scripted_rank.MODULE, *arguments, **options)

    monkeypatch.setattr(ranked_executor, "RankedExecutor", start)
    monkeypatch.setenv(scripted_rank.SCRIPT, "hang hang")
    monkeypatch.setenv(READY_VARIABLE, "0.5")
    ended = run_here("generate", engine, "--prompt", "7 + 8")
    assert ended.returncode == 2
    reason = f"ranks 0, 1 of 2 not ready after 0.5 s; if loading takes longer, set {READY_VARIABLE}"
    assert ended.stderr.splitlines()[-1].endswith(f"{engine} cannot be loaded: {reason}")
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_a_rank_that_ends_slowly_ends_the_others_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason waits until its process has ended: it names the exit code."""
    monkeypatch.setenv(scripted_rank.SCRIPT, "hang close")
    ranks = RankProcesses(scripted_rank.MODULE, 2)
    order = Load(Path("engine"), ranks=2, threads=1, kv_cache_bytes=None)
    with pytest.raises(ExecutorLostError, match=r"rank 1 of 2 has ended \(exit code 7\)"):
        ranks.load(order)
    assert running(ranks.pids) == []


def test_a_server_whose_rank_dies_exits(engine: Path) -> None:
    """Its requests get an error, and its exit code is 1, so that a supervisor starts it again."""
    with serving(engine, "--threads", "2") as served:
        ranks = [child.pid for child in psutil.Process(served.process.pid).children()]
        body = {"model": "tiny", "prompt": "7 + 8", "max_tokens": 4}
        headers = {"authorization": f"Bearer {KEY}"}
        assert (
            httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=HANG_SECONDS).status_code
            == 200
        )
        os.kill(ranks[1], signal.SIGKILL)
        assert served.process.wait(HANG_SECONDS) == 1
        wait_until_gone(ranks)
    assert any("rank 1 of 2 has ended (signal 9, SIGKILL)" in line for line in served.log)
