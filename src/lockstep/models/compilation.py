"""Networks compiled by torch.compile, in place."""

import logging
import os
from pathlib import Path

from torch import nn

_MODES = {"default": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune-no-cudagraphs"}
"""torch's, but that max-autotune leaves out what reduce-overhead is: sums over microbatches outlive a CUDA graph"""


def compile_network(model: nn.Module, mode: str, cache_dir: Path) -> None:
    """Let calls of `model` run compiled; names of weights, and so checkpoints, stay as they are.

    Dropout draws as without compiling. What is compiled is kept in `cache_dir` for the next start.
    """
    from torch._inductor import list_mode_options  # here, because it takes seconds to import

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # which warns where there is no CUDA
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir.resolve() / "compiled"))
    model.compile(options={**list_mode_options(_MODES[mode]), "fallback_random": True})
