"""The doctor finds what would stop or spoil a long job, names the remedy, and leaves nothing behind."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import LAUNCHER, finish, free_port, launch_command, start

from lockstep.__main__ import main as lockstep
from lockstep.commands import doctor
from lockstep.commands.doctor import CHECKS
from lockstep.data.images import build_data
from lockstep.run.folder import Run
from lockstep.settings.cli import parse_config

MLP = ("--model.name=mlp", "--model.dropout=null", "--log.wandb=disabled")
SMALL = ("--train.batch_size=8", "--train.micro_batch_size=4")
DOCTOR = ("-m", "lockstep", "doctor")

Doctor = Callable[..., tuple[int, dict[str, tuple[str, str]]]]


def read(output: str) -> dict[str, tuple[str, str]]:
    """Name of the check -> status and text; no check speaks twice."""
    found: dict[str, tuple[str, str]] = {}
    for line in output.splitlines():
        name = line[9:20].strip()
        if name in CHECKS:
            assert name not in found, f"{name} was told twice:\n{output}"
            found[name] = (line[:8].strip(), line[21:])
    return found


@pytest.fixture
def examine(
    fresh_accelerate: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Doctor]:
    """`lockstep doctor` in this process, in an empty folder: the exit code and what each check found."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    threads = torch.get_num_threads()

    def run(*arguments: str) -> tuple[int, dict[str, tuple[str, str]]]:
        code = doctor.main([*MLP, *arguments])
        return code, read(capsys.readouterr().out)

    yield run
    torch.set_num_threads(threads)


def write_images(folder: Path, count: int) -> None:
    """`count` images of each of two classes."""
    random = np.random.default_rng(count)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / label / f"{i}.png")


def statuses(found: dict[str, tuple[str, str]], *names: str) -> list[str]:
    return [found[name][0] for name in names]


# ---- one process


def test_a_good_setup_passes_and_leaves_nothing_behind(examine: Doctor) -> None:
    code, found = examine("--data.cache_dir=cache")
    assert code == 0
    assert list(found) == [name for name in CHECKS if name not in ("all-reduce", "same data")]  # one process alone
    assert set(statuses(found, "batch", "cores", "run", "data", "network", "step", "disk", "W&B")) == {"ok"}
    assert "1 process on cpu in fp32" in found["launch"][1] or torch.accelerator.is_available()
    assert found["data"][1] == "1294 train, 144 val, 359 test images of 8x8x1 in 10 classes"
    assert found["cache"] == ("skipped", "train and test images are decoded at the first start")
    assert "mlp with 9,472 parameters" in found["network"][1]
    # Weights and AdamW's two moments of 9,472 float32 values, and the counters.
    assert "4 checkpoints of 111 KiB need 444 KiB" in found["disk"][1]
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(("fast", "status"), [(True, "warning"), (False, "ok")])
def test_fp32_where_bf16_is_fast_is_a_warning(
    fast: bool, status: str, examine: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep.launch.guards.has_fast_bf16", lambda on_cpu: fast)  # no machine has and lacks it
    assert examine()[1]["launch"][0] == status


def test_a_network_that_cannot_take_the_images(examine: Doctor) -> None:
    code, found = examine("--model.name=cifar10_cnn")
    assert code == 1
    assert found["network"][0] == "failed" and "8" in found["network"][1]
    assert found["step"] == ("skipped", "there is no network")
    assert statuses(found, "data", "disk") == ["ok", "ok"]


def test_an_unreadable_image_is_named_and_the_other_checks_go_on(examine: Doctor, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 40)
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"not a picture")
    code, found = examine(f"--data.source=folder:{tmp_path / 'images'}", *SMALL)
    assert code == 1
    assert found["data"][0] == "failed" and "cat/0.png cannot be decoded" in found["data"][1]
    assert statuses(found, "network", "step", "disk") == ["skipped", "skipped", "ok"]


def test_a_damaged_image_of_the_cache_is_named_and_left_as_it_is(examine: Doctor, tmp_path: Path) -> None:
    settings = (f"--data.cache_dir={tmp_path / 'cache'}", *SMALL)
    build_data(parse_config([*MLP, *settings]), None, write=False)
    assert examine(*settings)[1]["cache"] == ("ok", "1797 decoded images checked")
    (file,) = (tmp_path / "cache").glob("test-*.npy")
    content = bytearray(file.read_bytes())
    content[-65] ^= 4  # in the last image but one
    file.write_bytes(content)
    code, found = examine(*settings)
    assert (code, found["cache"][0]) == (0, "warning")
    assert f"{file}: 1 of 359 images are damaged, the first: " in found["cache"][1]
    assert file.read_bytes() == content


def test_streaming_with_workers(examine: Doctor, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 40)
    code, found = examine(
        f"--data.source=folder:{tmp_path / 'images'}", *SMALL, "--data.workers=1",
        "--augment.image_size=6", "--augment.resized_crop=0.5", "--augment.mixup=0.2", "--runtime.precision=bf16",
    )  # fmt: skip
    assert (code, found["step"][0]) == (0, "ok")
    assert found["cache"][0] == "skipped" and found["cache"][1].startswith("test images ")  # training streams
    assert "in bf16" in found["launch"][1]


def test_a_loss_that_is_not_finite(examine: Doctor) -> None:
    code, found = examine("--augment.mean=[0.5]", "--augment.std=[1e-39]")
    assert code == 1
    assert found["step"][0] == "failed" and "--augment.std" in found["step"][1]


def test_a_file_in_the_place_of_the_run_root(examine: Doctor) -> None:
    Path("taken").write_text("a file")
    code, found = examine("--run.root=taken")
    assert code == 1
    assert found["disk"][0] == "failed" and "taken cannot be written to (Not a directory)" in found["disk"][1]
    assert "--run.root" in found["disk"][1] and found["step"][0] == "ok"
    assert [path.name for path in Path().iterdir()] == ["taken"]


def test_too_little_room_for_all_checkpoints(examine: Doctor) -> None:
    code, found = examine("--checkpoint.keep_last=1000000000000", "--train.ema_decay=0.9")
    assert code == 1
    assert found["disk"][0] == "failed" and "checkpoints of 148 KiB need" in found["disk"][1]
    assert "--checkpoint.keep_last" in found["disk"][1]


def test_a_tiny_disk(examine: Doctor, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        code, found = examine(f"--run.root={small}/runs")
        assert (code, found["disk"][0]) == (1, "failed")
        assert f"444 KiB; {small} has 256 KiB free" in found["disk"][1]
        assert list(small.iterdir()) == []
        (small / "filler").write_bytes(b"0" * 2**18)
        code, found = examine(f"--run.root={small}/runs")
        assert (code, found["disk"][0]) == (1, "failed") and "No space left" in found["disk"][1]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_checkpoints_already_there_count(examine: Doctor) -> None:
    Path("runs/again/checkpoints/step_00000010").mkdir(parents=True)
    assert "3 checkpoints of" in examine("--run.name=again")[1]["disk"][1]


def test_a_run_folder_of_other_settings_and_a_finished_run(examine: Doctor) -> None:
    run = Run(Path("runs/mine"), parse_config([*MLP, "--run.name=mine"]), {})
    run.create(micro_batch_size=64, threads=1)
    run.write_summary(state="finished", test_accuracy=0.5)
    code, found = examine("--run.name=mine")
    assert (code, found["run"][0]) == (0, "warning") and "finished" in found["run"][1]
    code, found = examine("--run.name=mine", "--optim.lr=0.5")
    assert (code, found["run"][0]) == (1, "failed") and "optim.lr" in found["run"][1]
    assert found["step"][0] == "ok"


def test_fp16_on_a_cpu_fails_and_what_needs_no_launch_goes_on(examine: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    code, found = examine("--runtime.precision=fp16")
    assert code == 1
    assert found["launch"][0] == "failed" and "use bf16" in found["launch"][1]
    assert set(statuses(found, "batch", "cores", "all-reduce", "run", "step")) == {"skipped"}
    assert set(statuses(found, "data", "network", "disk", "W&B")) == {"ok"}


def test_too_many_threads_and_workers(examine: Doctor, all_cores: set[int]) -> None:
    cores = len(all_cores)
    code, found = examine(f"--runtime.threads={cores + 1}", f"--data.workers={cores + 2}")
    assert code == 0
    assert found["cores"] == (
        "warning",
        f"{cores + 1} CPU threads for {cores} cores per process: set --runtime.threads={cores}; "
        f"{cores + 2} data workers for {cores} cores per process: set --data.workers={cores - 1}",
    )


def test_a_taken_port_is_a_warning_for_one_process(examine: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert examine()[1]["port"][0] == "ok"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        code, found = examine()
    assert (code, found["port"][0]) == (0, "warning") and "--main_process_port" in found["port"][1]


@pytest.mark.parametrize(("variable", "value"), [("LOCAL_RANK", "x"), ("RANK", "-1"), ("LOCAL_WORLD_SIZE", "0")])
def test_odd_ranks_are_one_line_that_nobody_waits_for(
    variable: str, value: str, examine: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    monkeypatch.setattr("lockstep.commands.doctor.time.sleep", naps.append)
    monkeypatch.setenv(variable, value)
    code, found = examine()
    assert (code, found["launch"][0], naps) == (1, "failed", [])
    assert found["launch"][1].startswith(f"{variable}=") and "in the environment must be" in found["launch"][1]


def test_a_misspelt_setting_is_answered_as_by_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        lockstep(["doctor", "--optim.lrr=1"])
    assert ending.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "Did you mean optim.lr" in lines[0]


# ---- several processes


@pytest.mark.launch
def test_two_processes_agree(tmp_path: Path) -> None:
    command = [*launch_command(2, "train.py")[:-1], *DOCTOR, *MLP]
    result = finish(start([*command, "--train.micro_batch_size=16"], tmp_path), 120)
    found = read(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(found) == list(CHECKS)
    assert "2 processes on cpu" in found["launch"][1]
    assert found["batch"][1] == "a step is 64 samples = 4 microbatches of 16, up to 2 for each of 2"
    assert found["all-reduce"][0] == "ok" and "2 processes added up to 3" in found["all-reduce"][1]
    assert found["same data"] == ("ok", "classes, labels and pixels are the same on all 2 processes")
    assert set(statuses(found, "port", "data", "network", "step", "disk")) == {"ok"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.launch
def test_two_processes_with_other_data_and_one_without_a_checkpoint(tmp_path: Path) -> None:
    """As on two machines: the same relative paths lead to other files."""
    write_images(tmp_path / "0" / "images", 40)
    write_images(tmp_path / "1" / "images", 30)
    Image.new("RGB", (8, 8)).save(tmp_path / "0" / "start.safetensors", format="png")
    program = tmp_path / "on_its_machine.py"
    imports = "import os, sys\nfrom lockstep.commands.doctor import main\n"
    go = imports + "os.chdir(os.environ['LOCAL_RANK'])\nsys.exit(main())\n"
    program.write_text(go)
    command = [*launch_command(2, str(program)), *MLP, "--data.source=folder:images", *SMALL]
    result = finish(start([*command, "--model.checkpoint=start.safetensors"], tmp_path), 120)
    found = read(result.stdout)
    assert result.returncode != 0
    status, text = found["same data"]
    assert status == "failed" and text.startswith("rank 1: not the data of rank 0 (train images 43, not 58;")
    assert "train labels" in text and "pixels" in text and "class names" not in text
    status, text = found["network"]
    assert status == "failed" and "rank 0: checkpoint start.safetensors cannot be read" in text
    assert "rank 1: checkpoint start.safetensors does not exist" in text
    assert found["step"] == ("skipped", "there is no network")


@pytest.mark.launch
def test_a_lonely_launch_is_found_out(tmp_path: Path) -> None:
    options = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    result = finish(start([*LAUNCHER, *options, *DOCTOR, *MLP], tmp_path), 120)
    found = read(result.stdout)
    assert result.returncode != 0
    assert found["launch"][0] == "failed" and "cpu_2proc.yaml" in found["launch"][1]
    assert statuses(found, "data", "network", "disk") == ["ok", "ok", "ok"]
    assert list(tmp_path.iterdir()) == []


def as_rank_0_of_2(tmp_path: Path, port: int) -> tuple[subprocess.CompletedProcess[str], float]:
    program = "import sys; from lockstep.checks import launch; launch.CONNECT_SECONDS = 2; "
    program += f"from lockstep.commands.doctor import main; sys.exit(main({list(MLP)}))"
    surroundings = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    surroundings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    started = time.monotonic()
    result = finish(start([sys.executable, "-c", program], tmp_path, **surroundings), 90)
    return result, time.monotonic() - started


@pytest.mark.launch
def test_a_process_that_nobody_joins_gives_up(tmp_path: Path) -> None:
    port = free_port()
    result, seconds = as_rank_0_of_2(tmp_path, port)
    assert result.returncode == 1 and seconds < 60
    status, text = read(result.stdout)["launch"]
    assert status == "failed" and text.startswith(f"not all processes connected at 127.0.0.1:{port}: ")


@pytest.mark.launch
def test_a_taken_port_stops_two_processes(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result, _ = as_rank_0_of_2(tmp_path, port)
    found = read(result.stdout)
    assert result.returncode == 1
    assert found["launch"][0] == "failed"
    assert f"port 127.0.0.1:{port} on the main process is taken: " in found["launch"][1]
    assert "--main_process_port" in found["launch"][1]
    assert statuses(found, "port", "data") == ["skipped", "ok"]
