"""NVIDIA's own client and plain HTTP against a real tritonserver: TensorRT-LLM's tensors, streams, errors, metrics."""

from __future__ import annotations

import itertools
import json
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc

from scripts.serving.triton_server import Ports, triton_server
from tests.support.patience import HANG_SECONDS, wait_until
from tests.support.tritonserver import free_port
from trimode.runtime.triton.tensors import OPTIONAL_INPUTS, OUTPUTS, TEXT_INPUT

ANSWER = "10% of 440 is 44. Ones: 4x6=24, carry 2. Tens: 4x6=24, 24+2=26. So 60% of 440 is 264."
PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat is 60% of 440?<|im_end|>\n"
    "<|im_start|>assistant\n<think></think>"
)
PERIOD_SECONDS = 0.5  # between two tellings of the metrics
DTYPES: dict[str, tuple[str, Any]] = {
    "TYPE_STRING": ("BYTES", np.object_),
    "TYPE_BOOL": ("BOOL", np.bool_),
    "TYPE_INT32": ("INT32", np.int32),
    "TYPE_UINT64": ("UINT64", np.uint64),
    "TYPE_FP32": ("FP32", np.float32),
}
# With n above 1 no machine is done with it while a test looks.
LONG = {"sampling_param_max_tokens": 1900, "ignore_eos": True, "mode": "ar", "sampling_param_temperature": 1.0}
BY_NAME = {tensor.name: tensor for tensor in (TEXT_INPUT, *OPTIONAL_INPUTS)}


def generate(ports: Ports, kind: str = "generate", **fields: Any) -> httpx.Response:
    body = {"text_input": PROMPT, "sampling_param_max_tokens": 200} | fields
    return httpx.post(f"http://127.0.0.1:{ports.http}/v2/models/tensorrt_llm/{kind}", json=body, timeout=HANG_SECONDS)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]


def as_input(name: str, value: Any) -> grpc.InferInput:
    kind, dtype = DTYPES[BY_NAME[name].dtype]
    values = value if isinstance(value, list) else [value]
    array = np.array([v.encode() if isinstance(v, str) else v for v in values], dtype)
    found = grpc.InferInput(name, array.shape, kind)
    found.set_data_from_numpy(array)
    return found


class Stream:
    """A gRPC stream; ``next`` gives (request id, texts, final), or raises the error of Triton."""

    def __init__(self, client: grpc.InferenceServerClient) -> None:
        self._client = client
        self._results: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: self._results.put((result, error)))

    def ask(self, request_id: str, **fields: Any) -> None:
        inputs = {"text_input": PROMPT, "streaming": True, "sampling_param_max_tokens": 200} | fields
        self._client.async_stream_infer(
            "tensorrt_llm",
            [as_input(name, value) for name, value in inputs.items()],
            request_id=request_id,
            enable_empty_final_response=True,
        )

    def next(self) -> tuple[str, list[str], bool]:
        result, error = self._results.get(timeout=HANG_SECONDS)
        if error is not None:
            raise error
        response = result.get_response()
        texts = result.as_numpy("text_output")
        final = response.parameters["triton_final_response"].bool_param
        return response.id, [] if texts is None else [text.decode() for text in texts], final


@contextmanager
def stream_to(ports: Ports) -> Iterator[Stream]:
    with grpc.InferenceServerClient(f"127.0.0.1:{ports.grpc}") as client:
        try:
            yield Stream(client)
        finally:
            client.stop_stream(cancel_requests=True)


def metrics(ports: Ports) -> dict[str, float]:
    lines = httpx.get(f"http://127.0.0.1:{ports.metrics}/metrics", timeout=HANG_SECONDS).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("trimode_")]
    return {name: float(value) for name, value in pairs}


def wait_for_metrics(ports: Ports, **expected: float) -> None:
    """The model reports them twice a second."""
    wait_until(lambda: all(metrics(ports)[f"trimode_{name}"] == value for name, value in expected.items()))


def test_generate(triton: Ports) -> None:
    found = generate(triton).json()
    assert found["text_output"] == ANSWER
    assert "finish_reason" not in found  # not requested
    full = generate(
        triton,
        return_finish_reason=True,
        return_stop_reason=True,
        return_cumulative_logprob=True,
        sampling_param_return_perf_metrics=True,
        mode="linear_spec",
        block_length=8,
    ).json()
    assert full["text_output"] == ANSWER
    assert full.keys() == {"model_name", "model_version", *(tensor.name for tensor in OUTPUTS)}
    assert (full["finish_reason"], full["stop_reason"]) == ("stop", "None")
    assert full["cumulative_logprob"] < 0
    assert 0.5 < full["acceptance_rate"] <= 1
    assert full["acceptance_rate"] == pytest.approx(full["total_accepted_draft_tokens"] / full["total_draft_tokens"])
    times = [full[f"{moment}_time_ns"] for moment in ("arrival", "first_scheduled", "first_token", "last_token")]
    assert times == sorted(set(times))
    long = {"text_input": PROMPT * 4, "sampling_param_return_perf_metrics": True, "sampling_param_max_tokens": 1}
    once, again = (generate(triton, **long).json() for _ in range(2))
    assert once["kv_cache_hit_rate"] < 0.5 < again["kv_cache_hit_rate"] < 1  # the second time it is known
    assert once["kv_cache_missed_block"] > 1 > again["kv_cache_missed_block"]
    assert again["kv_cache_reused_block"] == once["kv_cache_reused_block"] + once["kv_cache_missed_block"]
    assert again["kv_cache_alloc_new_blocks"] == again["kv_cache_alloc_total_blocks"] == 0


def test_sampling_fields(triton: Ports) -> None:
    stopped = generate(triton, sampling_param_stop=[" Tens", "zebra"], return_stop_reason=True).json()
    assert (stopped["text_output"], stopped["stop_reason"]) == (ANSWER.partition(" Tens")[0], " Tens")
    short = generate(triton, sampling_param_max_tokens=3, return_finish_reason=True).json()
    assert (short["text_output"], short["finish_reason"]) == (ANSWER[:3], "length")
    hot = {"sampling_param_temperature": 3.0, "sampling_param_max_tokens": 12}
    drawn = [generate(triton, sampling_param_seed=seed, **hot).json()["text_output"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert generate(triton, sampling_param_seed=1, n=2, **hot).json()["text_output"] == [drawn[0], drawn[2]]
    with_input = generate(triton, sampling_param_exclude_input_from_output=False).json()["text_output"]
    assert with_input == PROMPT + ANSWER


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "diffusion", "auto"])
def test_generate_stream(triton: Ports, mode: str) -> None:
    found = events(generate(triton, "generate_stream", streaming=True, mode=mode, return_finish_reason=True))
    texts = [event["text_output"] for event in found]
    assert len(texts) >= 2  # the first tokens are sent at once
    for earlier, later in itertools.pairwise(texts):
        assert later.startswith(earlier)
    assert [event["finish_reason"] for event in found] == ["None"] * (len(found) - 1) + ["stop"]
    assert texts[-1] == generate(triton, mode=mode).json()["text_output"]
    assert mode == "diffusion" or texts[-1] == ANSWER


BAD = {
    "mode": ({"mode": "fast"}, "mode is 'fast'"),
    "contradiction": ({"mode": "ar", "block_length": 8}, "block_length has no meaning"),
    "too long": ({"sampling_param_max_tokens": 5000}, "max_tokens can be at most"),
    "best_of": ({"sampling_param_best_of": 2}, "best_of"),
    "two prompts": ({"text_input": ["a", "b"]}, "text_input has 2 elements"),
    "lora": ({"lora_id": 1}, "lora_id is not supported: this model has no LoRA"),
    "image": ({"image_url": ["data:,"]}, "image_url is not supported: this model reads text only"),
    "guide type": ({"guided_decoding_guide_type": "xml"}, "guided_decoding_guide_type is 'xml'"),
    "no guide": ({"guided_decoding_guide_type": "regex"}, "needs guided_decoding_guide"),
    "no guide type": ({"guided_decoding_guide": "a"}, "needs guided_decoding_guide_type"),
    "bad grammar": (
        {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a{"},
        "guided_decoding: regex cannot be compiled",
    ),
    "beams": ({"beam_width": 2}, "beam_width is not supported: beam search"),
    "misspelt": ({"block_lenght": 8}, "block_lenght"),
    "stop without an id": ({"stop": True}, "stop needs a request id"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_triton_errors(triton: Ports, case: str) -> None:
    fields, message = BAD[case]
    response = generate(triton, **fields)
    assert response.status_code == 400
    assert message in response.json()["error"]


NEUTRAL = {
    "sampling_param_best_of": 1,
    "sampling_param_stop": ["", ""],
    "bad_words": "",
    "beam_width": 1,
    "image_url": "",
    "length_penalty": 1.0,
    "lora_id": 0,
    "min_tokens": 0,
    "pad_id": 2,
    "return_context_logits": False,
}


def test_neutral_values(triton: Ports) -> None:
    response = generate(triton, **NEUTRAL)
    assert response.status_code == 200, response.text
    assert response.json()["text_output"] == ANSWER


def ensemble(ports: Ports, **fields: Any) -> httpx.Response:
    """The request of TensorRT-LLM's documentation."""
    body = {"text_input": PROMPT, "max_tokens": 200, "bad_words": "", "stop_words": ""} | fields
    return httpx.post(f"http://127.0.0.1:{ports.http}/v2/models/ensemble/generate", json=body, timeout=HANG_SECONDS)


def test_ensemble(triton: Ports, undecoupled: Ports) -> None:
    """TensorRT-LLM's documentation sends requests to this model, with other input names."""
    for ports in (triton, undecoupled):
        found = ensemble(ports)
        assert found.status_code == 200, found.text
        assert (found.json()["model_name"], found.json()["text_output"]) == ("ensemble", ANSWER)
        assert ensemble(ports, stop_words=[" Tens", "zebra"]).json()["text_output"] == ANSWER.partition(" Tens")[0]
        assert ensemble(ports, max_tokens=3).json()["text_output"] == ANSWER[:3]
        hot = {"temperature": 3.0, "top_k": 40, "top_p": 0.95, "max_tokens": 12}
        assert ensemble(ports, seed=1, **hot).json() == ensemble(ports, seed=1, **hot).json()
        assert ensemble(ports, exclude_input_in_output=False).json()["text_output"] == PROMPT + ANSWER
        assert ensemble(ports, beam_width=1, pad_id=2, end_id=2, return_log_probs=False).status_code == 200
        assert "Tens" not in ensemble(ports, bad_words=["Tens", ""]).json()["text_output"]
        assert len(ensemble(ports, min_tokens=120).json()["text_output"]) > len(ANSWER)
        guide = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "(yes|no) [0-9]{3}"}
        assert re.fullmatch("(yes|no) [0-9]{3}", ensemble(ports, **guide).json()["text_output"])
        refused = ensemble(ports, beam_width=2)
        assert refused.status_code == 400
        assert "beam search is not supported" in refused.json()["error"]


def test_ensemble_streams(triton: Ports) -> None:
    url = f"http://127.0.0.1:{triton.http}/v2/models/ensemble/generate_stream"
    response = httpx.post(url, json={"text_input": PROMPT, "max_tokens": 200, "stream": True}, timeout=HANG_SECONDS)
    texts = [event["text_output"] for event in events(response)]
    assert len(texts) >= 2
    assert texts[-1] == ANSWER


@pytest.mark.usefixtures("triton")  # which skips where there is no server
def test_a_stopping_server_finishes_what_runs(tiny_engine: Path) -> None:
    ports = Ports(free_port(), free_port(), free_port())
    found: queue.Queue[httpx.Response] = queue.Queue()
    fields = {"mode": "ar", "ignore_eos": True, "sampling_param_max_tokens": 1900, "return_finish_reason": True}
    with triton_server(tiny_engine, ports) as server:
        thread = threading.Thread(target=lambda: found.put(generate(ports, **fields)))
        thread.start()
        wait_for_metrics(ports, requests_running=1)
        server.terminate()
        thread.join(HANG_SECONDS)
        server.wait(HANG_SECONDS)
    response = found.get(timeout=1)
    assert response.status_code == 200, response.text
    assert response.json()["finish_reason"] == "length"


def test_grpc_streams_share_the_engine(triton: Ports) -> None:
    """More requests on one stream than slots; the first one is long and finishes last."""
    with stream_to(triton) as stream:
        stream.ask("long", mode="ar", ignore_eos=True, sampling_param_max_tokens=1900)
        for number in range(7):
            stream.ask(str(number), mode="ar")
        latest: dict[str, str] = {}
        done: list[str] = []
        while len(done) < 8:
            name, texts, final = stream.next()
            if texts:
                latest[name] = texts[0]
            if final:
                done.append(name)
    assert done[-1] == "long"
    assert [latest[str(number)] for number in range(7)] == [ANSWER] * 7


def test_grpc_errors(triton: Ports) -> None:
    with stream_to(triton) as stream:
        stream.ask("bad", mode="fast")
        with pytest.raises(grpc.InferenceServerException, match="mode is 'fast'"):
            stream.next()


def test_a_client_that_leaves_frees_its_slot(triton: Ports) -> None:
    """The count of computed tokens shows that no long answer was finished."""
    before = metrics(triton)["trimode_tokens_emitted_total"]
    for _ in range(6):  # more than there are slots
        with stream_to(triton) as stream:
            stream.ask("long", n=64, **LONG)
            assert stream.next()[1] != []
    assert generate(triton).json()["text_output"] == ANSWER
    time.sleep(3 * PERIOD_SECONDS)
    wait_for_metrics(triton, requests_running=0, requests_waiting=0)
    assert metrics(triton)["trimode_tokens_emitted_total"] - before < 64 * 1900


def test_stop_by_request_id(triton: Ports) -> None:
    with stream_to(triton) as stream, stream_to(triton) as other:
        stream.ask("one", n=64, **LONG)
        stream.next()
        other.ask("one", stop=True)
        with pytest.raises(grpc.InferenceServerException, match="cancelled"):
            other.next()
        with pytest.raises(grpc.InferenceServerException, match="cancelled"):  # noqa: PT012
            while True:
                stream.next()


class Unary:
    """Sends requests as TensorRT-LLM's own client, `triton_backend/tools/llmapi_client.py`."""

    def __init__(self, client: grpc.InferenceServerClient) -> None:
        self._client = client
        self._results: queue.Queue[Any] = queue.Queue()

    def ask(self, request_id: str, **fields: Any) -> Any:
        inputs = {"text_input": PROMPT, "sampling_param_max_tokens": 200} | fields
        return self._infer(request_id, [as_input(name, value) for name, value in inputs.items()])

    def stop(self, request_id: str) -> None:
        inputs = [grpc.InferInput("text_input", [1], "BYTES"), grpc.InferInput("stop", [1], "BOOL")]
        inputs[0].set_data_from_numpy(np.empty([1], np.bytes_))
        inputs[1].set_data_from_numpy(np.array([True], bool))
        self._infer(request_id, inputs)

    def next(self) -> str:
        """The text of what is answered next, or its error's status."""
        found = self._results.get(timeout=HANG_SECONDS)
        if isinstance(found, grpc.InferenceServerException):
            return str(found.status())
        return str(found.as_numpy("text_output")[0].decode())

    def _infer(self, request_id: str, inputs: list[grpc.InferInput]) -> Any:
        return self._client.async_infer(
            "tensorrt_llm",
            inputs,
            outputs=None,
            request_id=request_id,
            callback=lambda result, error: self._results.put(error or result),
            parameters={"Streaming": False},
        )


CANCELLED = "StatusCode.CANCELLED"


@pytest.fixture
def unary(undecoupled: Ports) -> Iterator[Unary]:
    with grpc.InferenceServerClient(f"127.0.0.1:{undecoupled.grpc}") as client:
        yield Unary(client)


def test_tensorrt_llms_client(unary: Unary) -> None:
    unary.stop("1")  # there is none of this id yet
    assert unary.next() == CANCELLED
    answered = unary.ask("1")
    assert unary.next() == ANSWER
    answered.cancel()
    unary.stop("1")
    assert unary.next() == CANCELLED
    unary.ask("2")
    assert unary.next() == ANSWER


def test_tensorrt_llms_client_stops_and_cancels(unary: Unary, undecoupled: Ports) -> None:
    unary.ask("long", n=64, **LONG)
    wait_for_metrics(undecoupled, requests_running=4)
    unary.stop("long")
    assert [unary.next(), unary.next()] == [CANCELLED, CANCELLED]
    wait_for_metrics(undecoupled, requests_running=0)
    running = unary.ask("longer", n=64, **LONG)
    wait_for_metrics(undecoupled, requests_running=4)
    running.cancel()
    assert unary.next() == CANCELLED
    wait_for_metrics(undecoupled, requests_running=0)
    assert metrics(undecoupled)["trimode_tokens_emitted_total"] < 60 * 1900  # neither was computed to its end


def test_single_answers_share_the_engine_too(unary: Unary) -> None:
    unary.ask("long", n=3, **LONG)
    unary.ask("short")
    assert unary.next() == ANSWER
    unary.stop("long")
    assert [unary.next(), unary.next()] == [CANCELLED, CANCELLED]


def test_single_answers_over_http(undecoupled: Ports) -> None:
    assert generate(undecoupled).json()["text_output"] == ANSWER
    refused = generate(undecoupled, streaming=True)
    assert refused.status_code == 400
    assert "streaming needs a decoupled model" in refused.json()["error"]


def test_metrics(triton: Ports) -> None:
    wait_for_metrics(triton, requests_running=0)
    before = metrics(triton)
    generate(triton, mode="linear_spec")
    wait_for_metrics(triton, answers_total=before["trimode_answers_total"] + 1)
    after = metrics(triton)
    assert after["trimode_tokens_emitted_total"] - before["trimode_tokens_emitted_total"] > 40
    assert after["trimode_tokens_accepted_total"] > before["trimode_tokens_accepted_total"]
    generate(triton, mode="auto")
    wait_for_metrics(triton, answers_total=before["trimode_answers_total"] + 2)
    names = {name.partition("{")[0] for name in metrics(triton)}
    assert {"trimode_auto_choices_total", "trimode_auto_expected_tokens", "trimode_drafting_cycles_total"} <= names
    assert metrics(triton)['trimode_pass_seconds_total{attention="causal"}'] > 0
