"""benchmarks/speed.py: every program runs, and the table says what was measured."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import speed
from programs import ROOT, finish, start
from speed import CASES, Bench, table_of, usual_cases


def test_ratios_are_taken_round_by_round() -> None:
    """A slow round of the machine slows both."""
    table = table_of("net-bf16", {"train.py": [100.0, 50.0, 120.0], "other": [50.0, 25.0, 40.0]}).splitlines()
    assert table[0].startswith("| net-bf16 | images/s |")
    assert table[2:] == [
        "| train.py | 100 | 1.00 times as fast | 1.00 | 1.00 |",
        "| other | 40 | 2.00 times as fast | 2.00 | 3.00 |",
    ]


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "no")])
def test_the_precision_is_one_that_this_cpu_is_quick_in(fast: bool, precision: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(speed, "has_fast_bf16", lambda on_cpu: fast)
    cases = [CASES[name] for name in usual_cases()]
    assert [case.model for case in cases] == ["cifar10_cnn", "simple_cnn", "fashion_cnn"]
    assert {case.precision for case in cases} == {precision}


@pytest.mark.parametrize("name", CASES)
def test_every_program_trains_in_the_precision_of_its_case(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    commands: list[list[str]] = []

    def note(_: Bench, program: list[str], arguments: list[str]) -> None:
        commands.append([*program, *arguments])
        (tmp_path / "speeds.json").write_text('{"images_per_second": [1, 2]}')

    monkeypatch.setattr(Bench, "_start", note)
    case, bench = CASES[name], Bench(tmp_path, None)
    for program in case.programs.values():
        bench.speed(case, program)
    assert len(commands) == len(case.programs)
    for command in commands:
        assert {f"--precision={case.precision}", f"--mixed_precision={case.precision}"} & set(command), command


@pytest.mark.slow
def test_a_round_of_programs_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    program = [sys.executable, str(ROOT / "benchmarks/speed.py")]
    (case,) = (name for name in usual_cases() if CASES[name].model == "simple_cnn")
    done = finish(start([*program, "--rounds=1", "--cases", case, f"--out={out}"], tmp_path), 240)
    assert done.returncode == 0, done.stderr[-3000:]
    speeds = json.loads(out.read_text())["speeds"][case]
    assert list(speeds) == ["train.py", "a first loop by hand, fp32, no workers", "bare step"]
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in speeds.values())
    assert "| bare step | " in done.stdout
