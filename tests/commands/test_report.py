"""`lockstep report RUN`: a page of any run, also of one that did not end well."""

import json
from pathlib import Path

import pytest

from lockstep.commands.report import main
from lockstep.errors import UserError
from lockstep.settings.config import Config
from lockstep.settings.yaml import config_to_yaml


def failed_run(place: Path, *lines: dict[str, object]) -> Path:
    place.mkdir()
    (place / "config.yaml").write_text(config_to_yaml(Config()))
    (place / "summary.json").write_text(json.dumps({"state": "failed", "error": "out of <memory>"}))
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def test_a_run_that_failed_gets_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = failed_run(tmp_path / "begun")
    line = {"split": "val", "epoch": 1, "step": 20, "loss": 2.3, "accuracy": 0.125, "train_loss": 2.5}
    some = failed_run(tmp_path / "some", {**line, "train_accuracy": 0.1})
    assert main([str(begun), str(some)]) == 0
    assert capsys.readouterr().out.split() == [f"{begun}/report.html", f"{some}/report.html"]
    pages = [(run / "report.html").read_text() for run in (begun, some)]
    assert all("<dd>failed</dd>" in page and "out of &lt;memory&gt;" in page for page in pages)
    assert "<h2>Curves" not in pages[0] and "<h2>Curves" in pages[1] and "12.50%" in pages[1]
    assert not (begun / "figures").exists()


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        main([str(tmp_path)])
