"""Seconds from the command to the first step of the quick start, from its last step to its exit, and where they go.

    python benchmarks/start_seconds.py                                  # some minutes on two cores
    python benchmarks/start_seconds.py --roots ../before . --repeats 7  # two versions of this repository, in turns

`python train.py` and `accelerate launch train.py` with the embedded digits and nothing else set but the number of
steps: W&B and TensorBoard, figures and report are on. The first start of each, which fills caches, is not counted.
`import torch` by a process of its own is measured beside them. Medians over repeats; docs/performance.md has some.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ("-m", "accelerate.commands.launch", "--quiet", "--num_processes=1", "--num_machines=1")
PROGRAMS = {"python": (), "launcher": (*LAUNCH, "--mixed_precision=no", "--dynamo_backend=no")}
# Becomes train.py, and notes when which part of it is done.
MARKER = """
import json, os, runpy, sys, time

place = sys.argv.pop(1)
modules = {
    "lockstep.launch.accelerator": ("build_accelerator", "end_program"),
    "lockstep.data.images": ("build_data",),
    "lockstep.training.learner": ("build_learner",),
    "lockstep.report.summary": ("open_tracker",),
    "lockstep.training.optim": ("update",),
}


def mark(name):
    with open(place, "a") as file:
        print(json.dumps([name, time.time()]), file=file)


def note(module, name):
    function = getattr(module, name)

    def call(*arguments, **named):
        mark(f"{name} begins")
        result = function(*arguments, **named)
        mark(name)
        return result

    setattr(module, name, call)


def parse_config():
    settings = parse()
    mark("settings")
    for module in modules:
        __import__(module)
    for module, names in modules.items():
        for name in names:
            note(sys.modules[module], name)
    return settings


mark("started")
from lockstep.settings import cli

parse, cli.parse_config = cli.parse_config, parse_config
sys.argv[0] = os.path.join(os.environ["LOCKSTEP_ROOT"], "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PARTS = {
    "python or launcher": ("command", "started"),
    "settings": ("started", "settings"),
    "imports": ("settings", "build_accelerator begins"),
    "accelerator": ("build_accelerator begins", "build_accelerator"),
    "data": ("build_accelerator", "build_data"),
    "network and optimizer": ("build_data", "build_learner"),
    "trackers": ("build_learner", "open_tracker"),
    "to the end of the first step": ("open_tracker", "first step"),
    "command to first step": ("command", "first step"),
    "test, figures, report": ("last step", "end_program begins"),
    "exit": ("end_program begins", "exit"),
    "last step to exit": ("last step", "exit"),
}


def start(root: Path, place: Path, launcher: tuple[str, ...], steps: int) -> dict[str, float]:
    """The parts of one start and end, in seconds."""
    program, marks = place / "marker.py", place / "marks"
    program.write_text(MARKER)
    marks.write_text("")
    shutil.rmtree(place / "runs", ignore_errors=True)
    settings = [f"--train.max_steps={steps}", f"--data.cache_dir={place / 'cache'}"]
    environment = {**os.environ, "LOCKSTEP_ROOT": str(root), "PYTHONPATH": str(root / "src")}
    moments = {"command": time.time()}
    subprocess.run(
        [sys.executable, *launcher, str(program), str(marks), *settings],
        cwd=place,
        env=environment,
        check=True,
        capture_output=True,
    )
    moments["exit"] = time.time()
    for name, moment in map(json.loads, marks.read_text().splitlines()):
        if name == "update":
            moments.setdefault("first step", moment)
            moments["last step"] = moment
        else:
            moments.setdefault(name, moment)
    return {part: moments[end] - moments[begin] for part, (begin, end) in PARTS.items()}


def import_torch() -> float:
    """Seconds of a process that only imports torch."""
    begin = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roots", type=Path, nargs="+", default=[ROOT])
    parser.add_argument("--by", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    columns = [(root.resolve(), by) for by in options.by for root in options.roots]
    results: dict[tuple[Path, str], list[dict[str, float]]] = {column: [] for column in columns}
    torch_seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(1 + options.repeats):
            torch_seconds.append(import_torch())
            for number, (root, by) in enumerate(columns):
                place = Path(folder).resolve() / str(number)
                place.mkdir(exist_ok=True)
                parts = start(root, place, PROGRAMS[by], options.steps)
                if repeat:
                    results[root, by].append(parts)
    print(f"import torch: {statistics.median(torch_seconds[1:]):.1f} s")
    width = max(map(len, PARTS))
    print(" " * width, *(f"{root.name + ', ' + by:>20}" for root, by in columns), sep="  ")
    for part in PARTS:
        medians = [statistics.median(parts[part] for parts in results[column]) for column in columns]
        print(f"{part:<{width}}", *(f"{seconds:20.2f}" for seconds in medians), sep="  ", flush=True)


if __name__ == "__main__":
    main()
