"""A Hugging Face hub on disk."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn


def put_on_hub(model: nn.Module, cache: Path, repository: str, **described: Any) -> None:
    """A repository with these weights, and timm's description of them, in the hub's cache."""
    place = cache / f"models--{repository}"
    (place / "snapshots" / "0").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0")
    save_file(model.state_dict(), place / "snapshots" / "0" / "model.safetensors")
    (place / "snapshots" / "0" / "config.json").write_text(json.dumps(described))
