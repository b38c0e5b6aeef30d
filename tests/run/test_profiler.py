"""The trace of a few steps."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from lockstep.launch.accelerator import Launch
from lockstep.run.profiler import Profiler, operations_table
from lockstep.settings.config import RuntimeConfig

MAIN = Launch(torch.device("cpu"), 2, 0, 0, "no", 1)


def run_steps(config: RuntimeConfig, folder: Path, launch: Launch) -> list[Path]:
    profiler = Profiler(config, folder, launch)
    for step in range(18):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(2) + 1
        profiler.step()
    return list(folder.glob("profile/*.json"))


def test_steps_10_to_15_of_the_main_process_are_traced(tmp_path: Path) -> None:
    (trace,) = run_steps(RuntimeConfig(profile=True), tmp_path, MAIN)
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {f"step {step}" for step in range(18)} & events == {f"step {step}" for step in range(9, 15)}  # from 0


def test_a_table_says_what_took_the_time_of_those_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Profiler(RuntimeConfig(profile=True), tmp_path, MAIN)
    matrix = torch.ones(400, 400)
    for _ in range(18):
        matrix @ matrix @ matrix
        torch.ones(2) + 1
        profiler.step()
    table = (tmp_path / "profile" / "operations.md").read_text().splitlines()
    assert table[0] == "| operation | share of CPU time | ms a step | calls a step |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    calls = {name: float(count) for name, _, _, count in cells}
    assert cells[0][0] == "aten::mm" and calls["aten::mm"] == 2 and calls["aten::add"] == 1
    assert sum(float(share.strip("%")) for _, share, _, _ in cells) == pytest.approx(100, abs=1)
    assert "profiled 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "said"), [(14, "steps 10 to 15 of a start: this one had fewer"), (15, "")])
def test_too_few_steps_are_told(steps: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Profiler(RuntimeConfig(profile=True), tmp_path, MAIN)
    for _ in range(steps):
        profiler.step()
    capsys.readouterr()
    profiler.close()
    out = capsys.readouterr().out
    assert said in out and bool(out) == bool(said) != bool(list(tmp_path.glob("profile/*.json")))


def test_a_kernel_counts_with_its_operation_and_not_once_more() -> None:
    """As a GPU's profile has it: the operation with the time of its kernels, and the kernels beside it."""
    event = {"self_cpu_time_total": 5.0, "count": 6, "is_user_annotation": False}
    events = [
        SimpleNamespace(key="aten::mm", device_type=DeviceType.CPU, self_device_time_total=900.0, **event),
        SimpleNamespace(key="aten::add", device_type=DeviceType.CPU, self_device_time_total=100.0, **event),
        SimpleNamespace(key="gemm_kernel", device_type=DeviceType.CUDA, self_device_time_total=900.0, **event),
    ]
    done: Any = SimpleNamespace(key_averages=lambda: events)
    assert operations_table(done, 6).splitlines()[2:] == [
        "| aten::mm | 90.0% | 0.15 | 1 |",
        "| aten::add | 10.0% | 0.02 | 1 |",
    ]


def test_nothing_is_traced_without_being_asked_or_elsewhere(tmp_path: Path) -> None:
    assert run_steps(RuntimeConfig(), tmp_path, MAIN) == []
    assert run_steps(RuntimeConfig(profile=True), tmp_path, replace(MAIN, process_index=1)) == []
