"""llama-index's OpenAILike: chat, stream, completion."""

from __future__ import annotations

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def main(url: str, key: str) -> None:
    options = {"model": "tiny", "api_base": f"{url}/v1", "api_key": key, "context_window": 2048}
    model = OpenAILike(**options, is_chat_model=True, temperature=0)
    question = [ChatMessage(role="user", content="What is 60% of 440?")]
    answer = str(model.chat(question).message.content)
    assert "264" in answer
    assert "".join(str(chunk.delta or "") for chunk in model.stream_chat(question)) == answer
    assert OpenAILike(**options, is_chat_model=False, max_tokens=4).complete("abc").text


if __name__ == "__main__":
    main(*sys.argv[1:])
