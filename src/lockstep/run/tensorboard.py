"""The copy of a run in TensorBoard's event files."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from lockstep.run.exhibit import Exhibit, Scores
from lockstep.run.history import numbers_of
from lockstep.settings.config import Config, plain_settings


class TensorBoard:
    """A sink: see `tracker.Sink`."""

    name = "TensorBoard"

    def __init__(self, config: Config, run_dir: Path, resume_step: int) -> None:
        self._config = config
        # TensorBoard hides what earlier event files hold from purge_step on: no point is drawn twice after a restart.
        purge_step = resume_step + 1 if resume_step else 0
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def scalars(self, step: int, axes: dict[str, float], values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self._writer.add_histogram(name, values, global_step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        # The file as it is: add_image would encode its pixels anew.
        with Image.open(path) as picture:
            shown = Summary.Image(width=picture.width, height=picture.height, encoded_image_string=path.read_bytes())
        events: Any = self._writer.file_writer
        events.add_summary(Summary(value=[Summary.Value(tag=name, image=shown)]), step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, global_step=step)

    def graph(self, model: nn.Module, images: torch.Tensor) -> None:
        # A copy on the CPU: tracing must not touch the running statistics, the device or its memory.
        model, image = copy.deepcopy(model).cpu().eval(), images[:1].detach().cpu()
        # Traced here: add_graph would check its trace by a second pass, and that imports torch.distributed.tensor.
        self._writer.add_graph(torch.jit.trace(model, image, check_trace=False), image)

    def exhibit(self, step: int, name: str, item: Exhibit) -> None:
        """Curves of precision and recall; the figures show the rest."""
        if isinstance(item, Scores):
            for number, shown in item.shown.items():
                positive, scores = item.labels == number, item.probabilities[:, number]
                self._writer.add_pr_curve(f"{name}/{shown}", positive, scores, global_step=step)

    def alert(self, title: str, text: str) -> None:
        """TensorBoard writes to nobody."""

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        if summary.get("state", "finished") == "finished" and exit_code == 0:
            final = {f"final/{key}": value for key, value in numbers_of(summary).items()}
            self._writer.add_hparams(plain_settings(self._config), final, run_name=".")
        self._writer.close()
