"""What is wrong with a run, if anything: `lockstep diagnose RUN [RUN ...]`.

Of a finished run, by what it left (diagnosis.json); of any other, by its curves and its newest checkpoint, into which a
few training images are passed. Each finding comes with its evidence and one thing to try.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from lockstep.data.images import Data, build_data
from lockstep.errors import UserError, print_line
from lockstep.evaluation.probe import Probe, probe
from lockstep.models.network import load_network
from lockstep.report.comparison import find_runs
from lockstep.report.diagnosis import Evidence, diagnose, read_evidence
from lockstep.run.checkpoint import find_newest
from lockstep.run.folder import read_summary
from lockstep.run.history import read_history
from lockstep.settings.config import Config
from lockstep.settings.yaml import load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings of each run, or that there are none."""
    parser = argparse.ArgumentParser(prog="lockstep diagnose", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, folders of them, globs in quotes")
    for run in find_runs(parser.parse_args(arguments).runs):
        if not (run / "config.yaml").is_file():
            raise UserError(f"there is no run in {run}")
        print_line(_verdict(run))
    return 0


def _verdict(run: Path) -> str:
    """Of one run, a line for each finding."""
    config = load_config(run / "config.yaml")
    evidence = read_evidence(run, config) or _look(run, config)
    state = read_summary(run).get("state", "unknown")
    if not evidence.epochs:
        return f"{run} ({state}): nothing to judge by yet: no epoch is over"
    judged = f"{run} ({state}, {evidence.epochs[-1].number} epochs)"
    if evidence.probe is None:
        judged += ", by its curves alone: there was no look into the network"
    lines = [str(finding) for finding in diagnose(evidence)]
    return "\n  ".join([f"{judged}:", *lines]) if lines else f"{judged}: nothing to complain about"


def _look(run: Path, config: Config) -> Evidence:
    """The evidence of a run that has left none."""
    data = build_data(config, run, write=False)
    return Evidence(config, data.num_classes, read_history(run), _probe(run, config, data))


def _probe(run: Path, config: Config, data: Data) -> Probe | None:
    """Into the weights of the newest checkpoint, if there is one."""
    checkpoint = find_newest(run / "checkpoints")
    if checkpoint is None:
        return None
    weights = checkpoint / "model.safetensors"  # not the average
    model = load_network(config.model, data.image_shape, data.num_classes, weights)
    model = model.to(getattr(torch, config.runtime.dtype)).to(memory_format=torch.channels_last)
    micro_batch_size = read_summary(run).get("micro_batch_size")
    return probe(config, data, model, micro_batch_size if isinstance(micro_batch_size, int) else 64)
