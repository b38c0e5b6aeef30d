"""Compare runs in results, settings, speed, cost, and to the last bit: `lockstep compare RUN [RUN ...]`.

RUN is a run folder, a folder of run folders, or a glob in quotes. Runs that differ in nothing but run.seed are a group.
Of runs with the same settings and seed it is told through which step they are equal to the last bit: every training
line of metrics.jsonl has the digest of all weights after its step. Of exactly two runs the weights are compared, too,
and where the runs part, the numerics of both tell why they may. Nothing but the run folders is read.

`lockstep compare --predictions RUN RUN` tells instead whether two networks differ on the same samples by more than
chance, from the predictions that eval.py has written.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.errors import UsageError, UserError
from lockstep.report.comparison import Group, RunRecord, find_runs, group_runs, read_runs
from lockstep.report.tables import (
    Table,
    as_text,
    group_table,
    paired_table,
    parting_table,
    settings_table,
    write_csv,
)
from lockstep.run.history import compare_histories, read_history, read_starts
from lockstep.settings.config import changed_settings
from lockstep.settings.yaml import load_config

if TYPE_CHECKING:
    from torch import Tensor

_TOLERANCE = 1e-12
_WEIGHTS = ("checkpoints", "model.safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; 1 if there are two runs of one training whose weights differ too much, else 0."""
    options = _parser().parse_args(arguments)
    if options.predictions:
        return _compare_predictions(options.runs, options.split)
    folders = find_runs(options.runs)
    named = {Path(text) for text in options.runs}
    is_pair = len(folders) == 2
    if not is_pair:
        folders = list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]
    runs = [] if is_pair and not all(map(_is_run, folders)) else _read(folders, named)
    if runs:
        groups = group_runs(runs, options.by)
        tables = [group_table(groups), settings_table(groups), paired_table(groups), parting_table(runs)]
        tables = [table for table in tables if table.rows]
        print("\n\n".join(as_text(table) for table in tables), end="\n\n" if is_pair else "\n")
        _write_files(options, groups, tables)
    elif options.figure or options.csv or options.html or options.by:
        raise UserError(
            f"{' and '.join(map(str, folders))} are not two runs with a config.yaml: only bits are compared"
        )
    return _compare_pair(folders, options) if is_pair else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, folders of them, globs in quotes")
    parser.add_argument("--by", action="append", default=[], metavar="SETTING", help="group by this setting alone")
    for name, text in {
        "figure": "draw the curves of all groups",
        "csv": "write a row per run",
        "html": "write one page with tables to sort and curves to explore, for any browser, without network",
    }.items():
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=f"{text}; default: not written")
    pair = parser.add_argument_group("of two runs")
    pair.add_argument("--checkpoint", default="last", help="last, best or step_<8 digits>; default: last")
    pair.add_argument("--tolerance", type=float, help="largest accepted difference; default: 1e-12")
    pair.add_argument("--per_tensor", action="store_true", help="one line per tensor")
    text = "only whether their accuracies differ by more than chance, by what eval.py wrote into them"
    pair.add_argument("--predictions", action="store_true", help=text)
    pair.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="of --predictions; default: test"
    )
    return parser


# ---- Any number of runs ----------------------------------------------------------------------------------------------


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _read(folders: Sequence[Path], named: set[Path]) -> list[RunRecord]:
    """The runs in these folders; one that cannot be read is an error where it was named, else left out, and said so."""
    runs, problem = [], ""
    for folder in folders:
        try:
            runs += read_runs([folder])
        except UserError as mistake:
            if folder in named:
                raise
            problem = str(mistake)
            print(f"note: left out: {problem}", file=sys.stderr)
    if not runs:
        raise UserError(problem)
    return runs


def _write_files(options: argparse.Namespace, groups: Sequence[Group], tables: Sequence[Table]) -> None:
    if options.csv:
        write_csv(groups, options.csv)
    if options.figure:
        from lockstep.report.figures import plot_comparison

        plot_comparison(groups, options.figure)
    if options.html:
        from lockstep.report.comparison_page import write_comparison_page

        write_comparison_page(groups, tables, options.html)


# ---- Two runs --------------------------------------------------------------------------------------------------------


def _compare_pair(folders: Sequence[Path], options: argparse.Namespace) -> int:
    """Print in what two runs differ; 1 if their weights do by more than the tolerance, else 0.

    Runs of other settings may differ, unless a tolerance was asked for.
    """
    one, other = folders
    configured, changes = _is_run(one) and _is_run(other), []
    if configured:
        changes = changed_settings(load_config(one / "config.yaml"), load_config(other / "config.yaml"))
        for change in changes:
            print(f"note: other settings: {change}")
    histories = [read_history(run) for run in folders]
    equal = True
    if all(histories):
        verdict = compare_histories(*histories)
        equal = verdict.startswith("equal") and ";" not in verdict
        print(verdict if equal else f"{verdict}\n{_describe_numerics(one, other)}")
    bare = [run for run in folders if not any((run / name).exists() for name in _WEIGHTS)]
    if bare and (all(histories) or configured):  # a digest chain, kept without its weights, or a run just begun
        print(f"weights are not compared: {bare[0]} has no checkpoints")
        return 0 if equal or changes else 1
    if any(change.startswith("model.") for change in changes):
        print("weights are not compared: the runs have different networks")
        return 0
    code = _compare_weights(folders, options)
    return 0 if changes and options.tolerance is None else code


def _compare_predictions(runs: Sequence[str], split: str) -> int:
    """Print McNemar's test and the interval of the difference, of what eval.py wrote into two folders."""
    from lockstep.evaluation.chance import pair
    from lockstep.report.predictions import read_predictions, require_same_samples

    if len(runs) != 2:
        raise UsageError(f"--predictions compares two folders, not {len(runs)}")
    first, second = (read_predictions(Path(run), split) for run in runs)
    require_same_samples(first, second)
    found = pair(first.right, second.right)
    low, high = (100 * edge for edge in found.interval)
    width = max(map(len, runs))
    print(f"{found.samples} samples of the {split} split")
    for run, accuracy, alone in zip(
        runs, (found.first, found.second), (found.only_first, found.only_second), strict=True
    ):
        print(f"{run:<{width}}  accuracy {accuracy:.2%}  alone right on {alone}")
    print(
        f"difference {100 * (found.second - found.first):+.2f} points, 95 % interval {low:+.2f} to {high:+.2f} "
        f"(paired bootstrap); McNemar's exact test: p = {found.p:.3g}"
    )
    return 0


def _describe_numerics(one: Path, other: Path) -> str:
    """In what the starts of two runs differ that the bits depend on."""
    from lockstep.launch.numerics import describe_changes

    both = [read_starts(run) or [{}] for run in (one, other)]
    changes = describe_changes(*(starts[0].get("numerics", {}) for starts in both))
    found = [f"numerics: {changes}"] if changes else []
    for run, starts in zip((one, other), both, strict=True):
        for before, now in pairwise(starts):
            if changes := describe_changes(before.get("numerics", {}), now.get("numerics", {})):
                found.append(f"changed after step {now.get('step', '?')} of {run}: {changes}")
    return "; ".join(found) or "numerics are the same"


def _compare_weights(folders: Sequence[Path], options: argparse.Namespace) -> int:
    import torch

    a, b = (_all_weights(run, options.checkpoint) for run in folders)
    steps = [(run / "checkpoints" / options.checkpoint).resolve().name for run in folders]
    if steps[0] != steps[1] and all(step.startswith("step_") for step in steps):
        print(f"note: these are the weights of {steps[0]} and of {steps[1]}")
    differences = relative_differences(a, b)
    if options.per_tensor:
        width = max(map(len, differences))
        for name, difference in differences.items():
            print(f"{name:<{width}}  {difference:.3g}")
    # A difference that is not a number must not pass for a small one.
    worst = max(
        differences, key=lambda name: float("inf") if differences[name] != differences[name] else differences[name]
    )
    equal = all(torch.equal(a[name], b[name]) for name in a)
    tolerance = _TOLERANCE if options.tolerance is None else options.tolerance
    passes = differences[worst] <= tolerance
    verdict = "bit for bit equal" if equal else f"largest relative difference {differences[worst]:.3g} ({worst})"
    within = "within" if passes else "ABOVE"
    print(f"{len(a)} tensors of {options.checkpoint}: {verdict}; {within} the tolerance of {tolerance:g}")
    return 0 if passes else 1


def _all_weights(run: Path, name: str) -> dict[str, "Tensor"]:
    """Weights, running statistics and averages of a run folder's checkpoint, or of a checkpoint folder itself."""
    from lockstep.models.weights import load_weights

    folder = run / "checkpoints" / name if (run / "checkpoints").is_dir() else run
    weights = load_weights(folder / "model.safetensors")
    average = folder / "ema.safetensors"
    if average.is_file():
        weights |= {f"average of {key}": value for key, value in load_weights(average).items()}
    return weights


def relative_differences(a: dict[str, "Tensor"], b: dict[str, "Tensor"]) -> dict[str, float]:
    """For each tensor the largest |a - b|, as a share of the largest number in its layer of `a`.

    Not a number where either has one. Counts, which are whole numbers, are a layer each: they differ or they do not.
    Raises UserError if names or shapes differ.
    """
    if a.keys() != b.keys():
        only = sorted(a.keys() ^ b.keys())
        raise UserError(f"the runs hold different networks: {len(only)} weights are in one only, for example {only[0]}")
    scales: dict[str, float] = {}
    for name, tensor in a.items():
        if tensor.shape != b[name].shape:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)} in one run and {tuple(b[name].shape)} in the other"
            )
        layer = _layer_of(name, tensor)
        scales[layer] = max(scales.get(layer, 0.0), _largest(tensor.double()))
    differences = {}
    for name in a:
        difference = _largest(a[name].double() - b[name].double())
        scale = scales[_layer_of(name, a[name])]
        differences[name] = 0.0 if difference == 0 else difference / scale if scale else float("inf")
    return differences


def _layer_of(name: str, tensor: "Tensor") -> str:
    return name.rpartition(".")[0] if tensor.is_floating_point() else name


def _largest(tensor: "Tensor") -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
