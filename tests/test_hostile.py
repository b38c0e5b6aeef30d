"""What is hostile or unlucky in a run folder: a line a case. Each goes on, or ends with one line; none hangs.

To add one: a function of the run folder that does the damage, and what the line says, or GOES_ON.
"""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import QUICK
from safetensors.torch import save_file

from lockstep.errors import UserError
from lockstep.files import write_manifest

GOES_ON = None
ARGUMENTS = (*QUICK, "--model.name=tiny_cnn", "--run.name=x", "--checkpoint.every_steps=2", "--checkpoint.keep_last=9")
# 10 steps; what is damaged is a run that was killed after step 4
LONGEST_SECONDS = 60
NESTED = "[" * 100_000


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def replace(name: str, by: Callable[[Path], Any]) -> Callable[[Path], None]:
    """With something that is no file."""

    def damage(run: Path) -> None:
        place = run / name
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink(missing_ok=True)
        by(place)

    return damage


def in_checkpoints(file: str, content: str | bytes | Callable[[Path], Any], *, honest: bool = False) -> Any:
    """In every checkpoint; `honest`: a manifest that knows of it is written, as an attacker would."""

    def damage(run: Path) -> None:
        for folder in (run / "checkpoints").glob("step_*"):
            if callable(content):
                content(folder / file)
            else:
                write(file, content)(folder)
            if honest:
                (folder / "manifest.json").unlink()
                write_manifest(folder)

    return damage


def progress(**changes: Any) -> Any:
    """Other values in progress.json, with an honest manifest."""

    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return in_checkpoints("progress.json", change, honest=True)


def listed(**names: Any) -> Any:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **names}))

    return in_checkpoints("manifest.json", change)


def dereferenced(run: Path) -> None:
    """As `cp -rL` leaves it."""
    copy = run.with_name("copy")
    shutil.copytree(run, copy, symlinks=False)
    shutil.rmtree(run)
    copy.rename(run)


class Intruder:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/intruder_was_here",)


def no_link(place: Path) -> None:
    place.symlink_to("nowhere")


fifo, folder = os.mkfifo, Path.mkdir
CASES: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "nothing": (lambda run: None, GOES_ON),
    "copied without links": (dereferenced, GOES_ON),
    "summary: empty": (write("summary.json", ""), GOES_ON),
    "summary: garbage": (write("summary.json", b"\xff\x00{"), GOES_ON),
    "summary: a list": (write("summary.json", "[]"), GOES_ON),
    "summary: nested": (write("summary.json", NESTED), GOES_ON),
    "summary: numbers as texts": (write("summary.json", '{"micro_batch_size": "x", "threads": "y"}'), GOES_ON),
    "summary: a pipe": (replace("summary.json", fifo), "summary.json"),
    "summary: a folder": (replace("summary.json", folder), "summary.json"),
    "environment: garbage": (write("environment.json", "{{"), GOES_ON),
    "environment: no list": (write("environment.json", "{}"), GOES_ON),
    "environment: other entries": (write("environment.json", '[1, {"numerics": 3}]'), GOES_ON),
    "environment: nested": (write("environment.json", NESTED), GOES_ON),
    "environment: a folder": (replace("environment.json", folder), "environment.json"),
    "metrics: garbage": (write("metrics.jsonl", b"\x00\xff\n[]\n3\n{"), GOES_ON),
    "metrics: nested": (write("metrics.jsonl", NESTED + "\n"), GOES_ON),
    "metrics: steps of other types": (write("metrics.jsonl", '{"step": "x", "split": 3}\n'), GOES_ON),
    "metrics: a folder": (replace("metrics.jsonl", folder), "metrics.jsonl"),
    "split: garbage": (write("split.json", "x"), "split.json is damaged"),
    "split: nested": (write("split.json", NESTED), "split.json is damaged"),
    "split: no indices": (write("split.json", '{"val_indices": [1e400]}'), "split.json is damaged"),
    "split: a list": (write("split.json", "[]"), "split.json is damaged"),
    "split: a folder": (replace("split.json", folder), "split.json"),
    "config: empty": (write("config.yaml", ""), "config.yaml"),
    "config: a list": (write("config.yaml", "[1]"), "config.yaml"),
    "config: no text": (write("config.yaml", b"\xff\xfe\x00"), "config.yaml"),
    "config: an object": (write("config.yaml", "!!python/object/apply:os.system [true]"), "config.yaml"),
    "config: doubled": (write("config.yaml", "run: {}\nrun: {}"), "config.yaml"),
    "preempted: garbage": (write("preempted", b"\xff"), GOES_ON),
    "lease: garbage": (write("lease.json", ""), GOES_ON),
    "lease: a pipe": (replace("lease.json", fifo), "lease.json is not a file"),
    "lease: a folder": (replace("lease.json", folder), "lease.json is not a file"),
    "stray files": (write(".config.yaml.1234.tmp", "x"), GOES_ON),
    "a stop file of before": (write("stop", ""), GOES_ON),
    "checkpoints: gone": (lambda run: shutil.rmtree(run / "checkpoints"), GOES_ON),
    "checkpoints: a file": (replace("checkpoints", Path.touch), "checkpoints"),
    "checkpoints: last leads nowhere": (replace("checkpoints/last", no_link), GOES_ON),
    "checkpoints: last is a file": (replace("checkpoints/last", Path.touch), GOES_ON),
    "checkpoints: last is a folder": (replace("checkpoints/last", folder), GOES_ON),
    "checkpoints: best leads nowhere": (replace("checkpoints/best", no_link), GOES_ON),
    "checkpoints: an empty later one": (lambda run: (run / "checkpoints/step_00000009").mkdir(), GOES_ON),
    "checkpoints: a later one is a file": (write("checkpoints/step_00000009", "x"), GOES_ON),
    "manifest: gone": (in_checkpoints("manifest.json", Path.unlink), GOES_ON),
    "manifest: a list": (in_checkpoints("manifest.json", "[]"), GOES_ON),
    "manifest: nested": (in_checkpoints("manifest.json", NESTED), GOES_ON),
    "manifest: null": (in_checkpoints("manifest.json", '{"model.safetensors": null}'), GOES_ON),
    "manifest: a device": (listed(**{"/dev/zero": {"bytes": 0, "sha256": ""}}), GOES_ON),
    "manifest: elsewhere": (listed(**{"../../config.yaml": {"bytes": 0, "sha256": ""}}), GOES_ON),
    "manifest: a pipe": (in_checkpoints("manifest.json", lambda path: (path.unlink(), fifo(path))), GOES_ON),
    "weights: a pipe": (in_checkpoints("model.safetensors", lambda path: (path.unlink(), fifo(path))), GOES_ON),
    "weights: garbage": (in_checkpoints("model.safetensors", "x", honest=True), "cannot be used"),
    "weights: another's": (
        in_checkpoints("model.safetensors", lambda path: save_file({"a": torch.ones(1)}, path), honest=True),
        "holds another network",
    ),
    "optimizer: a program": (
        in_checkpoints("optimizer.pt", pickle.dumps(Intruder(), 2), honest=True),
        "more than tensors",
    ),
    "optimizer: empty": (in_checkpoints("optimizer.pt", "", honest=True), "cannot be used"),
    "optimizer: a list": (
        in_checkpoints("optimizer.pt", lambda path: torch.save([1], path), honest=True),
        "cannot be used",
    ),
    "optimizer: no groups": (
        in_checkpoints("optimizer.pt", lambda path: torch.save({"optimizer": {}, "scaler": {}}, path), honest=True),
        "cannot be used",
    ),
    "progress: empty": (in_checkpoints("progress.json", "", honest=True), "cannot be used"),
    "progress: a list": (in_checkpoints("progress.json", "[]", honest=True), "cannot be used"),
    "progress: a text": (in_checkpoints("progress.json", '"x"', honest=True), "cannot be used"),
    "progress: nested": (in_checkpoints("progress.json", NESTED, honest=True), "cannot be used"),
    "progress: step of another": (progress(step=9), "cannot be used"),
    "progress: step is a text": (progress(step="4"), "cannot be used"),
    "progress: step is negative": (progress(step=-1), "cannot be used"),
    "progress: no sums": (progress(window=None), "cannot be used"),
    "progress: other sums": (progress(window={"losses": 3}), "cannot be used"),
    "progress: too few losses": (
        progress(window={"losses": [1.0], "hits": 0, "samples": 0, "skipped": 0}),
        "cannot be used",
    ),
    "progress: validations of texts": (progress(validations=[["a", "b"]]), "cannot be used"),
    "progress: counts are texts": (progress(bad_steps={"since_log": "x", "in_a_row": 0, "total": 0}), "cannot be used"),
    "progress: another key": (progress(surprise=1), "cannot be used"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("begun")


@pytest.fixture
def run(begun: Path, tmp_path: Path, train_here: Any) -> Path:
    """A run that was stopped in the middle, the same for all cases."""
    kept = begun / "x"
    if not kept.exists():
        made = train_here(*ARGUMENTS)
        checkpoints, summary = made / "checkpoints", made / "summary.json"
        for step in (6, 8, 10):
            shutil.rmtree(checkpoints / f"step_{step:08d}", ignore_errors=True)
        (checkpoints / "best").unlink()
        (checkpoints / "last").unlink()
        (checkpoints / "last").symlink_to("step_00000004")
        summary.write_text(json.dumps({**json.loads(summary.read_text()), "state": "running"}))
        shutil.copytree(made, kept, symlinks=True)
        shutil.rmtree(made)
    shutil.copytree(kept, tmp_path / "runs" / "x", symlinks=True)
    return tmp_path / "runs" / "x"


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_or_ends_with_one_line(
    case: str, run: Path, train_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = CASES[case]
    damage(run)
    monkeypatch.setattr("lockstep.lease.BEAT_SECONDS", 1.0)  # a lease of garbage is looked at for as long
    signal.alarm(LONGEST_SECONDS)  # nothing may hang
    try:
        if message is GOES_ON:
            summary = json.loads((train_here(*ARGUMENTS) / "summary.json").read_text())
            assert summary["state"] == "finished"
        else:
            with pytest.raises((UserError, OSError), match=message) as refusal:
                train_here(*ARGUMENTS)
            assert isinstance(refusal.value, UserError) or refusal.value.filename, refusal.value
            assert str(refusal.value).count("\n") == 0
    finally:
        signal.alarm(0)
    assert not Path("/tmp/intruder_was_here").exists()
