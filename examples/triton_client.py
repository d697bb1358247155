"""Ask Triton Inference Server with NVIDIA's gRPC client: one streamed request to the model tensorrt_llm.

Usage: make triton ENGINE=engines/tiny-cpu
       python examples/triton_client.py --url 127.0.0.1:8001
"""

import argparse
import queue

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import triton_to_np_dtype

# The model takes the prompt as it is: the chat template is the client's task.
PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat is 60% of 440?<|im_end|>\n"
    "<|im_start|>assistant\n<think></think>"
)
SECONDS = 60


def tensor(name: str, dtype: str, value: bytes | bool | int) -> grpc.InferInput:
    """One value as an input of shape [1]; dtype is Triton's."""
    array = np.array([value], triton_to_np_dtype(dtype))
    found = grpc.InferInput(name, array.shape, dtype)
    found.set_data_from_numpy(array)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="127.0.0.1:8001", help="address of the gRPC port")
    url = parser.parse_args().url

    responses: queue.Queue[tuple[grpc.InferResult | None, Exception | None]] = queue.Queue()
    inputs = [
        tensor("text_input", "BYTES", PROMPT.encode()),
        tensor("streaming", "BOOL", True),
        tensor("sampling_param_max_tokens", "INT32", 128),
        tensor("mode", "BYTES", b"linear_spec"),
    ]
    with grpc.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer("tensorrt_llm", inputs, enable_empty_final_response=True)
        while True:
            result, error = responses.get(timeout=SECONDS)
            if error is not None:
                raise error
            texts = result.as_numpy("text_output")
            if texts is not None and len(texts):
                print(texts[0].decode())  # the whole text so far
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
        client.stop_stream()


if __name__ == "__main__":
    main()
