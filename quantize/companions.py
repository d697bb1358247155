"""Files of a checkpoint folder other than its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trimode.model.quantization import QUANT_CONFIG_FILE
from trimode.model.tokenizer import TEMPLATE_FOLDER
from trimode.quantize.report import REPORT_FILE
from trimode.quantize.safetensors_stream import INDEX

COPIED = ("*.json", "*.jinja", f"{TEMPLATE_FOLDER}/*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
# Written anew, or valid for the source only.
NOT_COPIED = {"config.json", INDEX, QUANT_CONFIG_FILE, REPORT_FILE}


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence."""
    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.is_file() and path.name not in NOT_COPIED and not path.name.startswith("."):
                (folder / path.relative_to(source)).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / path.relative_to(source))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
