"""LangChain: bound tools, streamed calls, structured output by each method, and an agent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

QUESTION = HumanMessage("What is the weather in Rome?")


@tool
def weather(city: Literal["Paris", "Rome"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    return f"{city}: sunny for {days} days"


class Sky(BaseModel):
    """The sky."""

    sunny: bool
    wind: Literal["none", "some", "much"]
    days: int = Field(ge=1, le=9)


@wrap_model_call
def call_first(request: Any, handler: Callable[[Any], Any]) -> Any:
    """The tool is called once; then the model answers."""
    called = any(isinstance(message, ToolMessage) for message in request.messages)
    return handler(request if called else request.override(tool_choice="weather"))


def main(url: str, key: str) -> None:
    for responses in (False, True):
        options: Any = {"model": "tiny", "base_url": f"{url}/v1", "api_key": key, "temperature": 0, "max_retries": 0}
        model = ChatOpenAI(**options, use_responses_api=responses)
        bound = model.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
        (call,) = bound.invoke([QUESTION]).tool_calls
        assert call["name"] == "weather"
        joined = AIMessageChunk("")
        for chunk in bound.stream([QUESTION]):
            joined += chunk
        assert [found["args"] for found in joined.tool_calls] == [call["args"]]
        for method in ("json_schema", "function_calling", "json_mode"):
            structured = model.with_structured_output(Sky if method != "json_mode" else None, method=method)
            found = structured.invoke([QUESTION])
            assert isinstance(found, dict if method == "json_mode" else Sky), (method, found)
        agent = create_agent(model, [weather], middleware=[call_first])
        turns = agent.invoke({"messages": [QUESTION]})["messages"]
        assert [turn.type for turn in turns] == ["human", "ai", "tool", "ai"], turns
        assert "sunny for" in turns[2].content
        for strategy in (ToolStrategy(Sky), ProviderStrategy(Sky)):
            answered = create_agent(model, [], response_format=strategy).invoke({"messages": [QUESTION]})
            assert isinstance(answered["structured_response"], Sky)


if __name__ == "__main__":
    main(*sys.argv[1:])
