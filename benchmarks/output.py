"""Tables for people and JSON for programs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console whose tables keep their columns when the output is not a terminal."""
    probe = Console(stderr=stderr)
    return probe if probe.is_terminal else Console(stderr=stderr, width=190)


def write_json(path: Path | str, document: Any) -> None:
    """Writes strict JSON: numbers that are not finite become null."""
    Path(path).write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spread(stats: dict[str, Any], digits: int = 3) -> str:
    """``median (min..max)``."""
    return f"{stats['median']:.{digits}f} ({stats['min']:.{digits}f}..{stats['max']:.{digits}f})"


def integers(text: str) -> list[int]:
    """A comma list of positive integers."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError("must be positive")
    return values
