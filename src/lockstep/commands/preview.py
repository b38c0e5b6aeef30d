"""Look at what a training would see, before it: `lockstep preview [train.py's arguments]`.

The first batch (shape, range, mean and deviation of each channel, before and after augmentation and normalisation), how
many images a class has in each split, images that are there twice, within splits and between them, the learning rate
of every step, samples, and what augmentation makes of them. A few lines are printed, pictures and numbers are in
preview/<name of the run>/. Nothing is trained, and no run folder is made or touched.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from lockstep.data.images import build_data
from lockstep.errors import print_line
from lockstep.report.preview import describe, draw_preview, look
from lockstep.settings.cli import parse_config, run_dir_of
from lockstep.training.learner import complete

FOLDER = Path("preview")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the lines for a command line of train.py (default: sys.argv), draw, and say where the pictures are."""
    config = complete(parse_config(arguments), say=print_line)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lockstep").setLevel(logging.INFO)  # decoding may take minutes: say that it goes on
    data = build_data(config, run_dir_of(config), write=False)
    preview = look(config, data)
    print_line("\n".join(describe(config, data, preview)))
    folder = FOLDER / str(config.run.name)
    paths = draw_preview(folder, config, data, preview)
    print_line(f"pictures: {folder}: {', '.join(path.name for path in paths)}")
    return 0
