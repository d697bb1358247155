"""How often an int4 head and a 16-bit head choose the same token, on the texts of the held-out problems.

    python -m scripts.prove.head_agreement checkpoints/tiny --method awq --group 64

Quantises the checkpoint with each head, builds both engines for target cpu, and reads each prompt with its expected
answer once. Compared are the best tokens behind every token of the answers: the layers are the same, so a difference is
the head's. *margin*: by how much the 16-bit head prefers its token to the int4 head's, in logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.model.quantization import HeadFormat
from trimode.quantize import quantize_checkpoint
from trimode.runtime.executor import Candidates, CausalStep
from trimode.runtime.loading import LoadedEngine, load_engine

HELD_OUT = Path(__file__).resolve().parents[2] / "tests" / "data" / "heldout.jsonl"
HEADS: tuple[HeadFormat, ...] = ("16bit", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--method", choices=["awq", "rtn"], default="awq")
    parser.add_argument("--group", type=int, default=64)
    arguments = parser.parse_args()
    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        engines = []
        for head in HEADS:
            folder = Path(scratch) / head
            quantize_checkpoint(
                Checkpoint(arguments.checkpoint), folder, method=arguments.method, group=arguments.group, head=head
            )
            build_engine(Checkpoint(folder), Path(scratch) / f"{head} engine")
            engines.append(load_engine(Path(scratch) / f"{head} engine"))
            engines[-1].executor.pool.acquire()
        same, margins = 0, []
        for record in records:
            wide, narrow = (_read(engine, record) for engine in engines)
            ids = zip(wide.logits[0], wide.tokens[0], narrow.tokens[0, :, 0], strict=True)
            for logits, tokens, chosen in ids:
                if tokens[0] == chosen:
                    same += 1
                else:
                    found = np.flatnonzero(tokens == chosen)
                    margins.append(float(logits[0] - logits[found[0]]) if len(found) else float("inf"))
    total = same + len(margins)
    print(f"{same} of {total} tokens are the same ({100 * same / total:.2f} %)")
    if margins:
        print(f"margins of the others: median {statistics.median(margins):.2f}, largest {max(margins):.2f}")


def _read(engine: LoadedEngine, record: dict[str, str]) -> Candidates:
    """The candidates behind the prompt's last token and every token of the answer but the last."""
    tokenizer = engine.tokenizer
    prompt = tokenizer.encode(tokenizer.apply_chat_template(record["messages"]))
    answer = tokenizer.encode(record["answer"])
    ids = np.array([[*prompt, *answer[:-1]]])
    rows = np.arange(len(prompt) - 1, ids.shape[1])[None]
    return engine.executor.run(CausalStep.chain(0, ids, np.array([0]), rows))


if __name__ == "__main__":
    main()
