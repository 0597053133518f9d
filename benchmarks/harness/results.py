"""Result files: written beside and renamed, so that none is ever half written."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_beside(path: str | Path, write: Callable[[Path], object]) -> None:
    """`write(part)` makes the file under another name, then it takes its own. Folders are made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, result: Mapping[str, Any]) -> None:
    """Strict JSON: NaN and infinities, which it cannot hold, become null."""
    text = json.dumps(_finite(result), indent=2, allow_nan=False) + "\n"
    write_beside(path, lambda part: part.write_text(text))


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
