"""Ask a TriMode server with OpenAI's client: whole and streamed answers, with TriMode's fields in extra_body.

Usage: trimode serve checkpoints/tiny &
       python examples/openai_client.py --url http://127.0.0.1:8000/v1
"""

import argparse
import os

from openai import OpenAI

QUESTION = [{"role": "user", "content": "What is 60% of 440?"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    url = parser.parse_args().url

    client = OpenAI(base_url=url, api_key=os.environ.get("TRIMODE_API_KEY", "none"))
    model = client.models.list().data[0].id
    print(f"model: {model}")

    for mode in ("ar", "diffusion", "linear_spec"):
        answer = client.chat.completions.create(
            model=model, messages=QUESTION, max_tokens=128, temperature=0, extra_body={"mode": mode}
        )
        print(f"{mode}: {answer.choices[0].message.content}")

    print("streamed: ", end="")
    for chunk in client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=128, temperature=0, stream=True, extra_body={"block_length": 16}
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
