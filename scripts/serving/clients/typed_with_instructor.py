"""instructor: instances by tools, by JSON schema and by plain JSON; lists, partial instances, several answers."""

from __future__ import annotations

import sys
from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel, Field

QUESTION: Any = [{"role": "user", "content": "What is the weather in Rome?"}]


class Sky(BaseModel):
    sunny: bool
    wind: Literal["none", "some", "much"]
    days: int = Field(ge=1, le=9)


def main(url: str, key: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    asked: Any = {"model": "tiny", "messages": QUESTION, "max_retries": 0}
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        found = instructor.from_openai(client, mode=mode).chat.completions.create(response_model=Sky, **asked)
        assert isinstance(found, Sky), mode
    tools = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    assert list(tools.chat.completions.create_partial(response_model=Sky, **asked))[-1].days
    flat = instructor.from_openai(client, mode=instructor.Mode.RESPONSES_TOOLS)
    assert isinstance(flat.chat.completions.create(response_model=Sky, **asked), Sky)


if __name__ == "__main__":
    main(*sys.argv[1:])
