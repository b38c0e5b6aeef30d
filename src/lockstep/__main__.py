"""`lockstep <command>`, an installed program, and `python -m lockstep <command>`."""

import importlib
import sys
from collections.abc import Sequence

from lockstep.errors import UsageError, did_you_mean, one_line_errors

COMMANDS = {
    "doctor": "look, in seconds, at everything a long job needs",
    "prepare": "fetch data and weights for machines without internet",
    "preview": "look at what a training would see: batches, labels, duplicates, augmentation, learning rate",
    "report": "write the page of any run anew, report.html",
    "sweep": "list the tasks of a sweep file, train one of them, or all and compare them",
    "compare": "any number of runs: results over seeds, speed, cost, settings, and whether their bits are equal",
    "diagnose": "what is wrong with a run, if anything, and one thing to try",
    "explain": "pictures of what a trained network sees: Grad-CAM, feature maps, kernels, features of images",
    "export": "a trained network for others: safetensors, torch.export, ONNX or a folder for the hub",
    "upload": "write runs to W&B anew, each from its run folder",
    "verify": "recompute a part of a run and compare it bit by bit",
}
"""Each is a module in `commands/` with a `main(arguments)` that returns the exit code"""


_AS_TRAINING = ("doctor", "prepare", "preview")
"""Those that take train.py's arguments"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that comes first in `arguments` (default: the program's own) with the rest of them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (given[0], given[1:]) if given else ("", [])
    if name in ("", "-h", "--help"):
        lines = [f"  {command:<9} {text}" for command, text in COMMANDS.items()]
        print("\n".join(["usage: lockstep <command> [...]; more by lockstep <command> --help", "", *lines]))
        return 0
    with one_line_errors():
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name}: {', '.join(COMMANDS)}.{did_you_mean(name, COMMANDS)}")
        command = importlib.import_module(f"lockstep.commands.{name}")
        if name in _AS_TRAINING and {"-h", "--help"} & set(rest):
            print(f"{command.__doc__}\nIt takes train.py's arguments:\n")
        return command.main(rest)


if __name__ == "__main__":
    sys.exit(main())
