"""What a run shows while it trains: a progress bar on a terminal, a line per record elsewhere."""

import sys
from typing import TYPE_CHECKING, Any

from lockstep.errors import print_line

if TYPE_CHECKING:
    from tqdm import tqdm


class Console:
    """A progress bar on a terminal, a line per record elsewhere."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._total_steps: int | None = None
        self._bar: tqdm | None = None

    def start(self, total_steps: int, step: int) -> None:
        self._total_steps = total_steps
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, record: dict[str, Any]) -> None:
        if self._bar is not None and record.get("split") == "train":
            self._bar.set_postfix_str(self._line(record, bar=True), refresh=False)
        else:
            self.say(self._line(record))

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print_line(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, record: dict[str, Any], *, bar: bool = False) -> str:
        """`step 150/450  epoch 4/12  loss 0.1230  accuracy 96.1 %  lr 0.00095  5,412 images/s`; a bar has the step."""
        total = "" if self._total_steps is None else f"/{self._total_steps}"
        if "best_step" in record:  # whose weights were tested
            record = {**record, "step": record["best_step"], "epoch": None}
        shown = {
            "step": f"step {{}}{total}",
            "epoch": f"epoch {{:.4g}}/{self._epochs}",
            "loss": "loss {:.4f}",
            "accuracy": "accuracy {:.1%}",
            "lr": "lr {:.3g}",
            "bad_steps": "bad steps skipped: {}",
            "images_per_second": "{:,.0f} images/s",
        }
        parts = [
            form.format(record[key]).replace("%", " %")
            for key, form in shown.items()
            if record.get(key) is not None and not (bar and key == "step")
        ]
        split = record.get("split", "train")
        return "  ".join(parts if split == "train" else [f"{split:<5}", *parts])
