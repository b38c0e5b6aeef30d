"""What environment.json says of a start."""

import json
import sys
from pathlib import Path

import torch
from logs import configured

from lockstep.run.environment import describe_environment
from lockstep.run.tracker import build_tracker


def test_environment_has_an_entry_per_start(tmp_path: Path) -> None:
    environment = describe_environment()
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert environment["cpu"] and environment["cpu_cores_owned"] >= 1 and environment["memory_gib"] > 0
    assert environment["command"] == sys.argv and set(environment) >= {"git_commit", "git_dirty", "hostname", "gpus"}
    for processes in (1, 2):
        build_tracker(configured(), tmp_path, is_main=True, environment={"processes": processes, **environment})
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [start["processes"] for start in starts] == [1, 2]
