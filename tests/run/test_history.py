"""A history goes on where training does."""

import json
from pathlib import Path

from logs import configured, train_record

from lockstep.run.history import read_history, truncate_history
from lockstep.run.tracker import build_tracker


def test_history_is_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(train_record(step)) + "\n" for step in (1, 2, 3, 4)) + '{"step": 2, "lo')
    assert len(read_history(tmp_path)) == 4
    tracker = build_tracker(configured(), tmp_path, is_main=True, resume_step=2)
    tracker.log(train_record(3))
    tracker.finish({})
    assert [record["step"] for record in read_history(tmp_path)] == [1, 2, 3]
    assert path.read_text().endswith("\n") and sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_start_from_step_0_begins_a_new_history(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 5}\n')
    build_tracker(configured(), tmp_path, is_main=True).finish({})
    assert read_history(tmp_path) == []


def test_a_history_that_needs_no_cut_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    before = path.stat().st_ino
    truncate_history(tmp_path, 5)
    assert path.stat().st_ino == before
    truncate_history(tmp_path / "missing", 5)
    assert read_history(tmp_path / "missing") == []
