"""What happened to a run that its config does not tell: `history.jsonl` in the run folder."""

import json
import time
from pathlib import Path
from typing import Any


def record_event(run_dir: Path, event: str, step: int, **details: Any) -> None:
    """Appends one line; for rank 0."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "history.jsonl", "a", encoding="utf-8") as lines:
        lines.write(json.dumps({"time": time.time(), "event": event, "step": step, "details": details}) + "\n")
