"""openai for Python: chat, stream, completions, several choices, logprobs, models, errors."""

from __future__ import annotations

import sys

import openai

QUESTION = [{"role": "user", "content": "What is 60% of 440?"}]


def main(url: str, key: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    names = [model.id for model in client.models.list()]
    assert names[0] == "tiny", names
    whole = client.chat.completions.create(model="tiny", messages=QUESTION)
    assert "264" in (whole.choices[0].message.content or "")
    history = [*QUESTION, whole.choices[0].message, {"role": "user", "content": "Spell planet."}]
    stream = client.chat.completions.create(
        model="tiny:diffusion", messages=history, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None
    several = client.chat.completions.create(model="tiny", messages=QUESTION, n=2, logprobs=True, max_tokens=8)
    assert len(several.choices) == 2
    assert several.choices[0].logprobs is not None
    assert client.completions.create(model="tiny", prompt="abc", max_tokens=4).choices[0].text
    try:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 5000}])
    except openai.BadRequestError as error:
        code = error.code
    else:
        raise AssertionError("a prompt that is too long was not refused")
    assert code == "context_length_exceeded"


if __name__ == "__main__":
    main(*sys.argv[1:])
