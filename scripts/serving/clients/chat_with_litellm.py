"""LiteLLM: completion, stream, text completion, and the error of a prompt that is too long."""

from __future__ import annotations

import sys

import litellm


def main(url: str, key: str) -> None:
    options = {"api_base": f"{url}/v1", "api_key": key}
    messages = [{"role": "user", "content": "What is 60% of 440?"}]
    answer = litellm.completion(model="openai/tiny", messages=messages, temperature=0, **options)
    assert "264" in answer.choices[0].message.content
    stream = litellm.completion(model="openai/tiny", messages=messages, temperature=0, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.choices[0].message.content
    hosted = litellm.completion(model="hosted_vllm/tiny:ar", messages=messages, max_tokens=4, top_k=-1, **options)
    assert hosted.usage.completion_tokens == 4
    text = litellm.text_completion(model="text-completion-openai/tiny", prompt="abc", max_tokens=4, **options)
    assert text.choices[0].text
    try:
        litellm.completion(model="openai/tiny", messages=[{"role": "user", "content": "word " * 5000}], **options)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("LiteLLM did not recognise a prompt that is too long")


if __name__ == "__main__":
    main(*sys.argv[1:])
