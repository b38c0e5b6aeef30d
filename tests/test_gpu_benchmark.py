"""benchmarks/gpu.py, rehearsed on the CPU: pieces apart, results as they come, the rest at the next start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, environment


def rehearse(out: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What it prints, and the results by piece."""
    places = ["--out", str(out), "--scratch", str(out.with_name("scratch")), "--device", "cpu"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *places, *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "table.md"]
    return done.stdout, json.loads((out / "results.json").read_text())["pieces"]


@pytest.mark.slow
@pytest.mark.launch
def test_a_rehearsal_does_each_piece_once_and_notes_what_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, found = rehearse(out, "--pieces", "waits", "--minutes", "0.03")
    assert (found["waits"]["state"], found["waits"]["attempts"]) == ("unfinished", 1)

    pieces = "waits,out_of_memory,cifar10_resnet18,speed-simple_cnn,bits-fp32"
    printed, found = rehearse(out, "--pieces", pieces, "--cifar10", "folder:/nowhere")
    assert printed.index("bits-fp32: ") < printed.index("out_of_memory: ") < printed.index("waits: "), "tried last"
    assert found["waits"]["state"] == "passed" and found["waits"]["waits_per_step"] == 0
    assert found["out_of_memory"]["state"] == "skipped" and "needs a GPU" in found["out_of_memory"]["reason"]
    assert found["cifar10_resnet18"]["state"] == "failed" and "/nowhere" in found["cifar10_resnet18"]["error"]
    bits, speed = found["bits-fp32"], found["speed-simple_cnn"]
    assert bits["state"] == speed["state"] == "passed"
    assert bits["4 processes"] == bits["killed and continued on 2"] == "equal to the last bit through step 8"
    assert all(speed[figure] > 0 for figure in ("images_per_second", "bare step", "plain script", "share_of_peak"))
    assert speed["peak_memory_gb"] > 0.1

    printed, again = rehearse(out, "--pieces", pieces)
    assert again == found and ": " not in printed.split("|")[0], "all are done"
    assert "| compiled-resnet50 | not yet run |  |" in (out / "table.md").read_text()
