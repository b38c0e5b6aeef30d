"""Look, in seconds, at everything a long job needs: `lockstep doctor [train.py's arguments]`.

Put it where train.py stands, `accelerate launch [options] -m lockstep doctor [...]`, to examine that very launch. Every
process runs every check and the main process prints one line for each: ok, warning, failed or skipped, what was found,
and what to do. The exit code is 1 if something failed. No run folder is made and nothing is left behind, except
downloads of the data set and pretrained weights, and the index of tar shards. All training is thrown away, and no image
is decoded that one step does not need.
"""

import time
from collections.abc import Sequence

from accelerate.utils import gather_object

from lockstep.checks.finding import Check, Finding, Parts, combine, line_of, time_limit
from lockstep.checks.launch import check_all_reduce, check_batch, check_cores, check_launch, check_port
from lockstep.checks.results import check_disk, check_wandb
from lockstep.checks.training import (
    check_cache,
    check_choices,
    check_data,
    check_network,
    check_run,
    check_same_data,
    check_step,
)
from lockstep.errors import UserError, first_line, is_first_of_machine
from lockstep.settings.cli import parse_config
from lockstep.settings.config import Config

CHECK_SECONDS = 900.0  # for one check on the slowest process: it may download a data set
_FIRST_PROCESS_SPEAKS_SECONDS = 30

CHECKS: dict[str, Check] = {
    "launch": check_launch,
    "names": check_choices,
    "batch": check_batch,
    "cores": check_cores,
    "port": check_port,
    "all-reduce": check_all_reduce,
    "run": check_run,
    "data": check_data,
    "same data": check_same_data,
    "cache": check_cache,
    "network": check_network,
    "step": check_step,
    "disk": check_disk,
    "W&B": check_wandb,
}


def examine(config: Config) -> dict[str, Finding]:
    """Run all checks and print a line for each on the main process; what they found, the same on every process."""
    parts = Parts(config)
    findings = {}
    for name, check in CHECKS.items():
        with time_limit(CHECK_SECONDS, name, "no end on some process"):
            own = _guarded(check, parts)
            finding = combine(gather_object([own]) if parts.launch else [own])
        if finding is None:
            continue
        findings[name] = finding
        if parts.launch is None and name == "launch" and not is_first_of_machine():
            time.sleep(_FIRST_PROCESS_SPEAKS_SECONDS)  # if the first process fails alike, it speaks and ends all
        if parts.is_main:
            print(line_of(name, finding), flush=True)
    if parts.accelerator is not None:
        parts.accelerator.end_training()
    return findings


def _guarded(check: Check, parts: Parts) -> Finding | None:
    """Run a check; whatever goes wrong in it is a failure that is told like the others."""
    try:
        return check(parts)
    except UserError as mistake:
        return Finding("failed", str(mistake))
    except Exception as problem:
        return Finding("failed", f"{type(problem).__name__}: {first_line(problem)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine the launch and the settings of a command line (train.py's); 1 if something failed, else 0."""
    findings = examine(parse_config(arguments))
    return int(any(finding.status == "failed" for finding in findings.values()))
