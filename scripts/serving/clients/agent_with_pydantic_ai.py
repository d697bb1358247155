"""pydantic-ai: output by a tool, by a schema and as text; a tool's turn; streams; both APIs."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.messages import ModelRequest, ModelResponse, ToolCallPart, ToolReturnPart, UserPromptPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is the weather in Rome?"


class Sky(BaseModel):
    """The sky."""

    sunny: bool
    wind: Literal["none", "some", "much"]
    days: int = Field(ge=1, le=9)


def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"{city}: sunny"


async def main(url: str, key: str) -> None:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key=key)
    models: tuple[Any, ...] = (
        OpenAIChatModel("tiny", provider=provider),
        OpenAIResponsesModel("tiny", provider=provider),
    )
    for model in models:
        for output in (Sky, ToolOutput(Sky), NativeOutput(Sky)):
            assert isinstance((await Agent(model, output_type=output).run(QUESTION)).output, Sky)
            async with Agent(model, output_type=output).run_stream(QUESTION) as streamed:
                assert isinstance(await streamed.get_output(), Sky)
        history = [
            ModelRequest([UserPromptPart(QUESTION)]),
            ModelResponse([ToolCallPart("weather", {"city": "Rome"}, "call_1")]),
            ModelRequest([ToolReturnPart("weather", "Rome: sunny", "call_1")]),
        ]
        agent = Agent(model, tools=[weather])
        assert (await agent.run("Thank you.", message_history=history)).output
        async with agent.run_stream("What is 60% of 440?") as text:
            assert await text.get_output()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
