"""What is hostile or unlucky in a run folder, a setting, the surroundings: a line a case.

Each goes on, or ends with one line; none hangs. To add one to CASES: a function of the run folder that does the damage,
and what the line says, or GOES_ON; to SETTINGS: arguments, or the text of a recipe; to SURROUNDINGS: variables.
"""

import json
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer, rank_variables
from PIL import Image
from programs import QUICK, environment
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


LONG = "x" * 300
# Written out, a billion words.
BOMB = "run: {tags: [&f0 [x]" + "".join(f", &f{n} [{', '.join([f'*f{n - 1}'] * 10)}]" for n in range(1, 10)) + "]}"
RECIPES: dict[str, tuple[str, str]] = {
    "a bomb": ("run: {tags: &a [[x, x], [x, x]]}", "run.tags=.*expected a list of words"),
    "a bomb of nine floors": (BOMB, "run.tags=.*expected a list of words"),
    "itself": ("run: {tags: &a [*a]}", "run.tags=.*expected a list of words"),
    "a zero byte": ('data: {source: "folder:a\\0b"}', "data.source=.*expected text"),
    "a number of 20,000 digits": ("train: {epochs: " + "9" * 20_000 + "}", "is not YAML|a number of"),
    "a hexadecimal number": ("train: {epochs: 0x10}", "train.epochs=0x10: expected a whole number"),
    "an octal number": ("train: {epochs: 010}", "train.epochs=010: expected a whole number"),
    "base 60": ("run: {seed: 1:30}", "run.seed=1:30: expected a whole number"),
    "a seed of 300 digits": ("run: {seed: " + "9" * 300 + "}", "run.seed=.a number of 997 bits"),
    "nothing": ("", "must hold sections"),
    "a merge": ("optim: {<<: {lr: 1}, lr: 2}", "is not YAML"),
}
SETTINGS: dict[str, tuple[tuple[str, ...], str]] = {
    "a long name": ((f"--run.name={LONG}",), "has 300 bytes"),
    "a name of two lines": (("--run.name=a\nb",), "one folder name"),
    "a name that is no text": (("--run.name=a\udce9",), "expected text or null"),
    "a long root": ((f"--run.root={LONG}",), "File name too long"),
    "a root that is a file": (("--run.root=/etc/passwd",), "Not a directory"),
    "a long recipe": (("--config", "x" * 5000), "does not exist"),
    "a recipe that is a folder": (("--config", "/tmp"), "is not a file"),
    "a recipe that is a device": (("--config", "/dev/zero"), "is not a file"),
    "a large L1": (("--optim.l1=1e300",), r"optim.l1=1e\+300: expected a number"),
    "a seed beyond 64 bits": ((f"--run.seed={2**64}",), "expected a whole number"),
    "classes beyond 64 bits": ((f"--data.num_classes={10**20}",), "expected a whole number"),
    "no checkpoint": (("--model.checkpoint=",), "names no file"),
    "no such user": (("--data.source=folder:~nobody_at_all/x",), "there is no folder"),
    "a useless rate": (("--optim.lr=1e38", "--train.max_steps=4"), "diverged|not finite"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_ends_with_one_line(case: str, tmp_path: Path, train_here: Any) -> None:
    text, message = RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(text)
    _ends_with(message, lambda: train_here("--config", str(tmp_path / "recipe.yaml")))


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_ends_with_one_line(case: str, train_here: Any) -> None:
    arguments, message = SETTINGS[case]
    _ends_with(message, lambda: train_here(*QUICK, "--model.name=tiny_cnn", *arguments))


def _ends_with(message: str, start: Callable[[], Any]) -> None:
    signal.alarm(LONGEST_SECONDS)
    try:
        with pytest.raises((UserError, OSError), match=message) as refusal:
            start()
    finally:
        signal.alarm(0)
    assert str(refusal.value).count("\n") == 0 and len(str(refusal.value)) < 800


TOGETHER = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
SURROUNDINGS: dict[str, tuple[dict[str, str], str | None]] = {
    "a size that is no number": ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' in the environment"),
    "an empty size": ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment"),
    "a size alone": ({"WORLD_SIZE": "2"}, "but no RANK"),
    "a rank alone": ({"RANK": "1"}, "but no WORLD_SIZE"),
    "a local rank alone": ({"LOCAL_RANK": "0"}, "but no RANK"),
    "a size of one": ({"WORLD_SIZE": "1", "RANK": "0"}, GOES_ON),
    "no address": (TOGETHER | {"MASTER_ADDR": ""}, "but no MASTER_ADDR"),
    "a port that is no number": (TOGETHER | {"MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
    "a port below zero": (TOGETHER | {"MASTER_PORT": "-5"}, "MASTER_PORT='-5'"),
    "a port beyond all": (TOGETHER | {"MASTER_PORT": "99999"}, "do not go together"),
    "a rank beyond all": (TOGETHER | {"RANK": "2"}, "do not go together"),
    "no local processes": ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 in the environment"),
    "local processes of words": ({"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE='many'"),
    "cores of words": ({"SLURM_CPUS_PER_TASK": "many"}, GOES_ON),
    "accumulation": ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "would divide every gradient"),
    "a compiler": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--runtime.compile=default"),
    "a CPU that is maybe": ({"ACCELERATE_USE_CPU": "maybe"}, "Accelerate cannot use"),
    "a terminal of ASCII": ({"PYTHONIOENCODING": "ascii"}, GOES_ON),
}


@pytest.mark.launch
@pytest.mark.parametrize("case", SURROUNDINGS)
def test_surroundings_are_harmless_or_one_line(case: str, server: ForkServer, tmp_path: Path, cache_dir: Path) -> None:
    variables, message = SURROUNDINGS[case]
    arguments = [
        *QUICK,
        "--model.name=tiny_cnn",
        "--train.max_steps=1",
        "--run.name=数字",
        f"--data.cache_dir={cache_dir}",
    ]
    pid = server.start(tmp_path, arguments, environment(**variables))
    deadline = time.monotonic() + LONGEST_SECONDS
    while (code := server.poll(pid)) is None:
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.02)
    printed = (tmp_path / "output.txt").read_text(errors="replace")
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == ((0, 0) if message is GOES_ON else (1, 1)), printed
    assert "Traceback" not in printed and (message is GOES_ON or message in errors[0]), printed


def write_photos(folder: Path, shade: int) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (8, 8), (shade, 10 * number, 200 * (name == "cat"))).save(folder / name / f"{number}.bmp")


@pytest.mark.launch
@pytest.mark.parametrize(
    ("shades", "rates", "message"),
    [
        ((9, 99), (0.1, 0.1), r"error: rank 1 \(.*\) has other data than rank 0: content "),
        pytest.param(
            (9, 9),
            (0.1, 0.2),
            r"error: rank 1 \(.*\) has other settings than rank 0: optim.lr 0.1 -> 0.2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_that_are_not_of_one_training_are_refused(
    shades: tuple[int, int], rates: tuple[float, float], message: str, server: ForkServer, tmp_path: Path
) -> None:
    """Two machines, one with an old copy of the data or another command."""
    started = []
    for rank, variables in enumerate(rank_variables(2)):
        machine = tmp_path / str(rank)
        write_photos(machine / "photos", shades[rank])
        arguments = [*QUICK, "--data.source=folder:photos", "--model.name=tiny_cnn", "--train.batch_size=8"]
        arguments += ["--train.micro_batch_size=4", f"--run.root={tmp_path}", "--run.name=x", "--data.cache_dir=cache"]
        started.append(server.start(machine, [*arguments, f"--optim.lr={rates[rank]}"], environment(**variables)))
    deadline = time.monotonic() + LONGEST_SECONDS
    for pid in started:
        while (code := server.poll(pid)) is None:
            assert time.monotonic() < deadline, "it hangs"
            time.sleep(0.02)
        assert code == 1
    printed = (tmp_path / "0" / "output.txt").read_text()
    assert re.search(message, printed) and "Traceback" not in printed, printed
    assert not (tmp_path / "x").exists(), "nothing of it is left"
