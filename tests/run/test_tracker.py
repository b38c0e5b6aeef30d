import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lockstep.run import tracker as tracking
from lockstep.run.tracker import (
    build_tracker,
    describe_environment,
    read_history,
    replace_file,
    truncate_history,
    write_json,
)
from lockstep.settings.config import Config, LogConfig, RunConfig

QUIET = LogConfig(wandb="disabled", tensorboard=False)


def configured(**log) -> Config:
    return Config(log=replace(QUIET, **log), run=RunConfig(tags=("a", "b"), notes="a note"))


def train_record(step: int, **more) -> dict:
    return {
        "step": step,
        "epoch": 1,
        "position": step * 8,
        "split": "train",
        "loss": 1 / (step + 1),
        "lr": 0.01,
        **more,
    }


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_log_writes_one_line_at_once_and_reads_back(tmp_path: Path) -> None:
    tracker = build_tracker(configured(), tmp_path / "run", is_main=True)
    first = train_record(1, loss=torch.tensor(0.5), accuracy=np.float32(0.25), per_class=np.array([1, 2]))
    tracker.log(first)
    tracker.log(train_record(2, loss=math.nan, gradient_norm=math.inf, low=-math.inf))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # before finish: nothing may wait in a buffer
    tracker.finish({})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == [1, 2]
    one, two = read_history(tmp_path / "run")
    assert (one["loss"], one["accuracy"], one["per_class"]) == (0.5, 0.25, [1, 2])
    assert math.isnan(two["loss"]) and two["gradient_norm"] == math.inf and two["low"] == -math.inf


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to play a full disk")
def test_a_full_disk_ends_training_and_names_the_file(tmp_path: Path) -> None:
    tracker = build_tracker(configured(), tmp_path, is_main=True)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker.finish({})
    tracker = tracking.Tracker(tmp_path, tracking._Console(1))
    with pytest.raises(OSError, match=r"cannot write metrics: No space left on device: .*metrics\.jsonl"):
        tracker.log(train_record(1))


def test_other_processes_leave_no_trace(tmp_path: Path, capsys) -> None:
    config = configured(wandb="offline", tensorboard=True)
    tracker = build_tracker(config, tmp_path / "run", is_main=False, environment={"a": 1})
    tracker.start(10, 0)
    tracker.advance(1)
    tracker.log(train_record(1))
    tracker.say("hello")
    tracker.histograms(1, {"w": torch.ones(3)})
    tracker.figure("curves", tmp_path / "missing.png")
    tracker.text("a", "b")
    tracker.graph(nn.Linear(1, 1), torch.ones(1, 1))
    tracker.finish({})
    assert not any(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_write_json_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "summary.json"
    write_json(path, {"loss": math.nan, "steps": np.int64(3), "path": Path("x"), "list": (1, torch.tensor(2.0))})
    assert json.loads(path.read_text()) == {"loss": "NaN", "steps": 3, "path": "x", "list": [1, 2.0]}
    blocked = tmp_path / "blocked.json"
    blocked.mkdir()
    with pytest.raises(OSError):
        write_json(blocked, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["blocked.json", "deep"]


def test_a_kill_while_writing_leaves_a_whole_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    forever = f"while True: replace_file(Path({str(path)!r}), b'x' * 100_000)"
    program = f"from pathlib import Path\nfrom lockstep.run.tracker import replace_file\n{forever}"
    interrupted = 0
    for moment in range(12):
        path.unlink(missing_ok=True)
        writer = subprocess.Popen([sys.executable, "-c", program])
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.003 * moment)
        writer.kill()
        writer.wait()
        assert path.read_bytes() == b"x" * 100_000
        interrupted += len(list(tmp_path.iterdir())) > 1
        replace_file(path, b"after")
        assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"] and path.read_bytes() == b"after"
    assert interrupted, "no kill came while writing: the test shows nothing"


def test_environment_has_an_entry_per_start(tmp_path: Path) -> None:
    environment = describe_environment()
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert environment["cpu"] and environment["cpu_cores_owned"] >= 1 and environment["memory_gib"] > 0
    assert environment["command"] == sys.argv and set(environment) >= {"git_commit", "git_dirty", "hostname", "gpus"}
    for processes in (1, 2):
        build_tracker(configured(), tmp_path, is_main=True, environment={"processes": processes, **environment})
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [start["processes"] for start in starts] == [1, 2]


# ---- Console ---------------------------------------------------------------------------------------------------------


def test_console_prints_a_line_per_record(tmp_path: Path, capsys) -> None:
    tracker = build_tracker(configured(), tmp_path, is_main=True)
    tracker.start(450, 0)
    tracker.advance(150)
    tracker.log(
        {"step": 150, "epoch": 4, "split": "train", "loss": 0.123, "accuracy": 0.961}
        | {"lr": 0.00095, "images_per_second": 5412.3}
    )
    tracker.log({"step": 150, "epoch": 4, "split": "val", "loss": torch.tensor(0.2), "accuracy": 0.95})
    tracker.log({"step": 450, "epoch": 10, "best_step": 300, "split": "test", "loss": 0.2, "accuracy": 0.95})
    tracker.say("saved")
    assert capsys.readouterr().out.splitlines() == [
        "step 150/450  epoch 4/10  loss 0.1230  accuracy 96.1 %  lr 0.00095  5,412 images/s",
        "val    step 150/450  epoch 4/10  loss 0.2000  accuracy 95.0 %",
        "test   step 300/450  loss 0.2000  accuracy 95.0 %",
        "saved",
    ]


def test_terminal_gets_a_bar_that_lines_do_not_break(tmp_path: Path, monkeypatch, capsys) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    tracker = build_tracker(configured(), tmp_path, is_main=True, resume_step=2)
    tracker.start(10, 2)
    tracker.advance(9)
    tracker.log(train_record(9, loss=0.5))
    tracker.advance(10)
    before = len(terminal.getvalue())
    tracker.say("saved")
    assert terminal.getvalue()[before:].startswith("\r "), "the bar is not wiped before the line"
    tracker.finish({})
    assert "2/10" in terminal.getvalue() and "10/10" in terminal.getvalue()
    assert "loss 0.5000" in terminal.getvalue().replace("\n", "")
    assert capsys.readouterr().out.splitlines() == ["saved"]


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def board(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 2))


def test_tensorboard_gets_scalars_histograms_pictures_graph_and_results(tmp_path: Path) -> None:
    from PIL import Image

    tracker = build_tracker(configured(tensorboard=True), tmp_path, is_main=True)
    tracker.log(train_record(3, train_val_loss_ratio=0.8, note="text is no scalar", flag=True))
    tracker.histograms(
        3, {"weight": torch.tensor([1.0, math.nan, 2.0], dtype=torch.bfloat16), "lost": torch.tensor([])}
    )
    Image.new("RGBA", (20, 10), "red").save(tmp_path / "red.png")
    tracker.figure("samples", tmp_path / "red.png")
    tracker.text("config", "lr: 0.1")
    model, random_state = small_network(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tracker.graph(model, torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    tracker.finish({"best_accuracy": 0.9, "state": "finished"})

    events = board(tmp_path)
    assert {tag for tag in events.Tags()["scalars"] if not tag.startswith("final/")} == {
        "train/loss",
        "train/lr",
        "train_val_loss_ratio",
    }
    point = events.Scalars("train/loss")[0]
    assert (point.step, point.value) == (3, pytest.approx(1 / 4))
    assert events.Histograms("weight")[0].histogram_value.num == 2 and events.Tags()["histograms"] == ["weight"]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].step) == (20, 3)
    assert b"lr: 0.1" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert events.Tags()["graph"] and "BatchNorm2d" in str(events.Graph())
    assert events.Scalars("final/best_accuracy")[0].value == pytest.approx(0.9)
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tensorboard_shows_no_point_twice_after_a_restart(tmp_path: Path) -> None:
    for resume_step, steps in ((0, (0, 1, 2, 3)), (2, (3, 4)), (0, (0, 1))):
        tracker = build_tracker(configured(tensorboard=True), tmp_path, is_main=True, resume_step=resume_step)
        for step in steps:
            tracker.log(train_record(step))
        tracker.finish({"state": "preempted", "best_accuracy": 0.5})
        expected = [*range(resume_step + 1 if resume_step else 0), *steps]
        assert [point.step for point in board(tmp_path).Scalars("train/loss")] == expected
        time.sleep(1.1)  # event files are told apart by their second
    assert not any(tag.startswith("final/") for tag in board(tmp_path).Tags()["scalars"])


def test_a_network_that_cannot_be_traced_is_a_note(tmp_path: Path, capsys) -> None:
    tracker = build_tracker(configured(tensorboard=True), tmp_path, is_main=True)
    tracker.graph(nn.Linear(3, 3), torch.ones(1, 4))
    tracker.log(train_record(1))
    tracker.finish({})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("note: no graph of the network in TensorBoard (") and len(lines) == 2
    assert board(tmp_path).Tags()["scalars"]


def test_a_copy_that_fails_is_dropped_with_one_warning(tmp_path: Path, capsys) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    tracker = build_tracker(configured(tensorboard=True), tmp_path, is_main=True)
    tracker.log(train_record(1))
    tracker.finish({})
    assert capsys.readouterr().out.startswith("warning: TensorBoard is off (")

    (tmp_path / "tensorboard").unlink()
    tracker = build_tracker(configured(tensorboard=True), tmp_path, is_main=True, resume_step=1)
    tracker.figure("curves", tmp_path / "missing.png")
    tracker.figure("curves", tmp_path / "missing.png")
    tracker.log(train_record(2))
    tracker.finish({})
    assert capsys.readouterr().out.count("warning: TensorBoard stopped (") == 1
    assert [record["step"] for record in read_history(tmp_path)] == [1, 2]


# ---- W&B -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch) -> Path:
    """A machine without W&B login; everything W&B writes stays in tmp_path."""
    import wandb

    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(sys, "stdin", None)  # a prompt would fail
    yield tmp_path / "home"
    wandb.teardown()


def wandb_data(run_dir: Path) -> bytes:
    """The records of the newest start of the offline run."""
    import wandb

    wandb.teardown()  # as at the end of a process: the last bytes are written when W&B's own process ends
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))[-1].read_bytes()


def test_wandb_without_a_key_runs_offline_and_says_so(tmp_path: Path, wandb_home: Path, capsys) -> None:
    from PIL import Image

    run_dir = tmp_path / "runs" / "digits"
    tracker = build_tracker(configured(wandb="auto"), run_dir, is_main=True, environment={"processes": 2})
    lines = capsys.readouterr()
    assert lines.out.splitlines() == [f"W&B: offline, to be uploaded with: wandb sync {run_dir}/wandb/offline-run-*"]
    assert lines.err == ""
    tracker.log(train_record(1, loss=0.625, note="not a number"))
    tracker.log({"step": 1, "split": "val", "accuracy": 0.5})
    tracker.histograms(1, {"weights": torch.ones(4)})
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    tracker.figure("samples", tmp_path / "picture.png")
    tracker.finish({"best_accuracy": 0.875})
    data = wandb_data(run_dir)
    for expected in (b"train/loss", b"0.625", b"val/accuracy", b"best_accuracy", b"0.875", b"processes", b"a note"):
        assert expected in data, expected
    assert b"weights" in data and list(run_dir.glob("wandb/*/files/media/images/samples*.png"))
    assert len((run_dir / "wandb" / "run_id").read_text()) == 8
    assert "warning" not in capsys.readouterr().out


def test_wandb_keeps_its_id_over_restarts(tmp_path: Path, wandb_home: Path) -> None:
    ids = []
    for resume_step in (0, 1):
        tracker = build_tracker(configured(wandb="offline"), tmp_path, is_main=True, resume_step=resume_step)
        tracker.log(train_record(resume_step + 1))
        tracker.finish({}, exit_code=resume_step)
        ids.append((tmp_path / "wandb" / "run_id").read_text())
        assert ids[0].encode() in wandb_data(tmp_path)
        time.sleep(1.1)  # W&B names folders by the second
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2


def test_wandb_online_without_a_key_never_asks(tmp_path: Path, wandb_home: Path, capsys) -> None:
    tracker = build_tracker(configured(wandb="online"), tmp_path, is_main=True)
    tracker.log(train_record(1))
    tracker.finish({})
    assert capsys.readouterr().out.splitlines()[0].startswith("warning: W&B has no API key: going on offline")
    assert b"train/loss" in wandb_data(tmp_path)


@pytest.mark.parametrize("netrc", [False, True])
def test_wandb_with_an_unreachable_server_goes_on_offline(
    netrc: bool, tmp_path: Path, wandb_home: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(tracking, "WANDB_INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # discard: nobody listens
    if netrc:
        (tmp_path / "no-netrc").write_text(f"machine 127.0.0.1:9 login user password {'0' * 40}\n")
        (tmp_path / "no-netrc").chmod(0o600)
    else:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    started = time.monotonic()
    tracker = build_tracker(configured(wandb="auto"), tmp_path / "run", is_main=True)
    tracker.log(train_record(1))
    tracker.finish({})
    assert time.monotonic() - started < 20
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warning: W&B is not reachable (") and lines[1].startswith("W&B: offline")
    assert b"train/loss" in wandb_data(tmp_path / "run")


@pytest.mark.parametrize(("mode", "made"), [("disabled", False), ("offline", True)])
def test_wandb_mode_of_the_environment_is_honoured(
    mode: str, made: bool, tmp_path: Path, wandb_home: Path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    build_tracker(configured(wandb="auto"), tmp_path, is_main=True).finish({})
    assert (tmp_path / "wandb").exists() == made


def test_wandb_that_cannot_start_is_one_warning(tmp_path: Path, wandb_home: Path, capsys) -> None:
    (tmp_path / "wandb").write_text("a file where the folder should be")
    tracker = build_tracker(configured(wandb="offline"), tmp_path, is_main=True)
    tracker.log(train_record(1))
    tracker.finish({})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warning: W&B is off (") and len(lines) == 2
    assert len(read_history(tmp_path)) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")
def test_wandb_that_hangs_holds_up_neither_the_end_nor_the_exit(tmp_path: Path, wandb_home: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import psutil
from lockstep.run import tracker as tracking
from lockstep.settings.config import Config, LogConfig
config = Config(log=LogConfig(wandb="offline", tensorboard=False))
tracker = tracking.build_tracker(config, Path({str(tmp_path / "run")!r}), is_main=True)
tracking.WANDB_FINISH_SECONDS = 1.0
service = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
assert service
for process in service:
    process.suspend()
tracker.finish({{}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "warning: W&B stopped (no end after 1 seconds)" in done.stdout


def test_wandb_disabled_is_not_even_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from lockstep.settings.config import Config, LogConfig
from lockstep.run.tracker import build_tracker
config = Config(log=LogConfig(wandb="disabled", tensorboard=False))
tracker = build_tracker(config, Path({str(tmp_path)!r}), is_main=True)
tracker.log({{"step": 1, "split": "train", "loss": 1.0}})
tracker.finish({{}})
late = [name for name in ("wandb", "torch", "tensorboard", "matplotlib", "tqdm", "numpy") if name in sys.modules]
assert not late, late
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
