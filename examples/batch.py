"""Answer several prompts at once, each in its own mode.

Usage: python examples/batch.py checkpoints/tiny
"""

import argparse

from trimode import LLM, SamplingParams

QUESTIONS = {
    "What is 60% of 440?": SamplingParams(max_tokens=128, mode="ar"),
    "Which month is 6 months before December?": SamplingParams(max_tokens=128, mode="linear_spec", block_length=16),
    "Make a JSON object: Oskar, football, Berlin, age 84.": SamplingParams(max_tokens=128, mode="auto"),
    "Write a short story about Milo, who finds 37 stones and later 90 more.": SamplingParams(
        max_tokens=256, mode="diffusion", block_length=16
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="engine directory, checkpoint folder or hub id")
    model = parser.parse_args().model

    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with LLM(model) as llm:
        answers = llm.generate(chats, list(QUESTIONS.values()))
    for (question, params), answer in zip(QUESTIONS.items(), answers, strict=True):
        output = answer.outputs[0]
        print(f"{question}\n  {params.mode}: {output.text}")
        print(f"  {output.length} tokens, {output.mean_acceptance:.1f} a cycle, ended by {output.finish_reason}")


if __name__ == "__main__":
    main()
