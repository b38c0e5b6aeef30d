"""The page of a run: what it shows, and that nothing in a run folder can break or misuse it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lockstep.report.run_page import write_run_page
from lockstep.settings.config import Config, OptimConfig, RunConfig
from lockstep.settings.yaml import config_to_yaml


class Text(HTMLParser):
    """Texts and tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def lines_of(epochs: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        place = {"step": 10 * epoch, "epoch": epoch}
        train = {"loss": 1 / epoch, "accuracy": 0.5, "lr": 0.1, "grad_norm": 1.0, "digest": f"{epoch:016x}"}
        lines.append({**place, "split": "train", **train})
        lines.append(
            {**place, "split": "val", "loss": 1 / epoch, "accuracy": 0.25, "train_loss": 2.3, "train_accuracy": 0.5}
        )
    return lines


def run_folder(folder: Path, config: Config, **start: Any) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config_to_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(8)))
    (folder / "summary.json").write_text(json.dumps({"threads": 2, "state": "finished", "test_accuracy": 0.9876}))
    (folder / "environment.json").write_text(json.dumps([{"hostname": "node7", "step": 0, **start}]))
    finding = {"sign": "overfitting", "evidence": "seen", "advice": "--x=1"}
    (folder / "diagnosis.json").write_text(
        json.dumps({"findings": [finding], "classes": 10, "probe": None, "doubt": None})
    )
    return folder


def page_of(folder: Path) -> Text:
    return Text(write_run_page(folder).read_text())


def test_a_page_shows_result_settings_epochs_digests_and_starts(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim:\n  lr: 0.25\n  momentum: 0.5\n")
    config = Config(optim=OptimConfig(lr=0.125, momentum=0.5), run=RunConfig(name="mine"))
    versions = {"torch": "2.15.0"}
    command = ["train.py", "--config", str(recipe), "--optim.lr=0.125"]
    texts = page_of(run_folder(tmp_path / "run", config, command=command, versions=versions)).texts
    assert texts[texts.index("test accuracy") + 1] == "98.76%"
    assert texts.index("test accuracy") < texts.index("threads")  # the result comes first
    settings = texts.index("Settings that differ from recipe.yaml")
    assert texts[settings + 1 : settings + 7] == ["setting", "there", "here", "optim.lr", "0.25", "0.125"]
    assert texts[settings + 7] == "Epochs"
    assert texts[texts.index("Epochs") + 7 :][:6] == ["1", "10", "2.3000", "50.00%", "1.0000", "25.00%"]
    assert [text for text in texts if re.fullmatch("[0-9a-f]{16}", text)] == [f"{n:016x}" for n in (1, 2, 3, 6, 7, 8)]
    assert "node7" in texts and "torch 2.15.0" in texts and " ".join(command) in texts


def test_without_its_recipe_a_run_is_compared_with_the_defaults(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", Config(), command=["train.py", "--config=gone.yaml"])
    texts = page_of(folder).texts
    assert texts[texts.index("Settings that differ from the defaults") + 1] == "None."
    assert "Settings that differ from digits_cnn.yaml" in page_of(run_folder(tmp_path / "other", Config())).texts


def test_findings_are_those_of_the_rules_of_now(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", Config())
    assert "Nothing to complain about." not in (texts := page_of(folder).texts) and "loss does not fall" in texts
    (folder / "diagnosis.json").unlink()
    assert "Not diagnosed." in page_of(folder).texts


def test_pictures_are_in_the_page_as_long_as_there_is_room(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", Config())
    (folder / "figures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (800, 900, 3)).astype(np.uint8)  # 2 MB as PNG
    for name in ("curves", "samples"):
        Image.fromarray(noise).save(folder / "figures" / f"{name}.png")
    page = page_of(folder)
    assert page.tags.count("img") == 1 and "Too large for this page: figures/samples.png" in page.texts
    assert (folder / "report.html").stat().st_size < 3_000_000


def test_hostile_texts_stay_texts_and_nothing_is_fetched(tmp_path: Path) -> None:
    script = "<script>alert(1)</script>"
    config = Config(run=RunConfig(notes=script))
    folder = run_folder(tmp_path / "a<b>&c", config, hostname=script, command=[script])
    text = write_run_page(folder).read_text()
    assert script not in text and "script" not in Text(text).tags
    assert "default-src 'none'" in text and not re.search(r"(src|href)=\"(?!data:)", text)
    assert "a&lt;b&gt;&amp;c" in text


@pytest.mark.parametrize("name", ["environment.json", "summary.json", "metrics.jsonl", "diagnosis.json"])
def test_a_page_is_written_without_some_files(tmp_path: Path, name: str) -> None:
    folder = run_folder(tmp_path / "run", Config())
    (folder / name).unlink()
    assert write_run_page(folder).is_file()
    (folder / name).write_text("[[1], {}]" if name != "metrics.jsonl" else '{"split": "val", "train_loss": "NaN"}\n')
    if name != "metrics.jsonl":
        assert write_run_page(folder).is_file()
