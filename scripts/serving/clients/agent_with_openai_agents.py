"""openai-agents: a forced call, its result, the answer; streamed; typed output; both APIs."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel

QUESTION = "What is the weather in Rome?"


@function_tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"{city}: sunny"


class Sky(BaseModel):
    sunny: bool
    wind: Literal["none", "some", "much"]


async def main(url: str, key: str) -> None:
    set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model: Any = kind("tiny", client)
        settings = ModelSettings(tool_choice="required", parallel_tool_calls=False, temperature=0)
        agent = Agent("helper", instructions="Answer.", tools=[weather], model=model, model_settings=settings)
        whole = await Runner.run(agent, QUESTION)
        assert [item.type for item in whole.new_items] == [
            "tool_call_item",
            "tool_call_output_item",
            "message_output_item",
        ]
        streamed = Runner.run_streamed(agent, QUESTION)
        kinds = {event.type async for event in streamed.stream_events()}
        assert {"raw_response_event", "run_item_stream_event"} <= kinds
        assert streamed.final_output == whole.final_output
        typed = await Runner.run(Agent("sky", model=model, output_type=Sky), QUESTION)
        assert isinstance(typed.final_output, Sky)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
