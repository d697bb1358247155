"""Stream two answers concurrently, and cancel a third.

Usage: python examples/async_streaming.py checkpoints/tiny
"""

import argparse
import asyncio

from trimode import LLM, SamplingParams


async def stream(llm: LLM, name: str, question: str, params: SamplingParams) -> None:
    """Print each update as it arrives, with the number of tokens that it brought."""
    chat = [{"role": "user", "content": question}]
    async for update in llm.generate_async(chat, params, streaming=True):
        output = update.outputs[0]
        print(f"{name} +{len(output.token_ids_diff)}: {output.text_diff!r}")
    print(f"{name} finished: {output.text}")


async def cancel_early(llm: LLM) -> None:
    """Abort an answer after its first update; its slot is free within one cycle."""
    answer = llm.generate_async([200, 201], SamplingParams(max_tokens=1000, ignore_eos=True), streaming=True)
    async for _ in answer:
        answer.abort()
    print(f"third finished: {answer.outputs[0].finish_reason}")


async def run(model: str) -> None:
    with LLM(model) as llm:
        await asyncio.gather(
            stream(llm, "first", "What is 60% of 440?", SamplingParams(max_tokens=128, mode="linear_spec")),
            stream(
                llm, "second", "Which month is 6 months before December?", SamplingParams(max_tokens=128, mode="ar")
            ),
            cancel_early(llm),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="engine directory, checkpoint folder or hub id")
    asyncio.run(run(parser.parse_args().model))


if __name__ == "__main__":
    main()
