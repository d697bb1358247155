"""LangChain's ChatOpenAI and OpenAI: invoke, stream, batch, a conversation with a tool's turn."""

from __future__ import annotations

import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI


def main(url: str, key: str) -> None:
    model = ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key=key, temperature=0)
    question = HumanMessage("What is 60% of 440?")
    answer = model.invoke([question])
    assert "264" in str(answer.content)
    assert answer.usage_metadata is not None
    assert "".join(str(chunk.content) for chunk in model.stream([SystemMessage(""), question])) == answer.content
    assert len(model.batch([[question], [question]])) == 2
    call = {"name": "f", "args": {"x": 1}, "id": "c1", "type": "tool_call"}
    history = [question, AIMessage("", tool_calls=[call]), ToolMessage("264", tool_call_id="c1"), question]
    assert model.invoke(history).content
    assert OpenAI(model="tiny", base_url=f"{url}/v1", api_key=key, max_tokens=4).invoke("abc")


if __name__ == "__main__":
    main(*sys.argv[1:])
