"""The launch files: only hardware, each with its command, each understood by accelerate, CPU ones started."""

import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from programs import LAUNCHER, QUICK, ROOT, environment, finish, free_port, start

FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
HARDWARE = {
    "distributed_type",
    "use_cpu",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "rdzv_backend",
    "same_network",
    "mixed_precision",
    "fsdp_config",
}

by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_every_shape_has_a_file() -> None:
    names = {path.stem for path in FILES}
    gpus = {"gpu", "gpu_bf16", "gpu_fp16", "ddp_2gpu", "ddp_8gpu", "ddp_8gpu_bf16", "fsdp2_8gpu"}
    assert names == {"cpu", "cpu_2proc", "multi_node", "mps"} | gpus


@by_name
def test_is_hardware_only_with_its_command(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert set(content) <= HARDWARE
    comment = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert f"--config_file accelerate_configs/{path.name}" in comment and "train.py" in comment


@by_name
def test_accelerate_reads_it(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == content["num_processes"] and loaded.mixed_precision == content["mixed_precision"]
    several = content["num_processes"] > 1
    expected = "FSDP" if path.stem.startswith("fsdp") else "MULTI_GPU"
    assert (str(loaded.distributed_type).endswith(expected)) == several


def test_values_can_be_given_on_the_command_line() -> None:
    """A dry look at what the launcher makes of multi_node.yaml: it must not need the file's own address or counts."""
    program = (
        "from accelerate.commands.launch import launch_command_parser, _validate_launch_command\n"
        f"arguments = ['--config_file', {str(ROOT / 'accelerate_configs/multi_node.yaml')!r}, '--num_machines', '4',\n"
        "  '--num_processes', '32', '--machine_rank', '3', '--main_process_ip', 'head',\n"
        "  '--main_process_port', '20001', 'train.py']\n"
        "a, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))\n"
        "print(a.num_machines, a.num_processes, a.machine_rank, a.main_process_ip, a.main_process_port)\n"
    )
    command = [LAUNCHER[0], "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.stdout.split() == ["4", "32", "3", "head", "20001"], done.stderr


@pytest.mark.launch
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cpu_2proc", "fp32, 2 processes,"),
        pytest.param("fsdp2_8gpu", "bf16, 2 processes (FSDP2)", marks=pytest.mark.slow),
    ],
)
def test_two_processes_start_and_can_compress_gradients(name: str, line: str, tmp_path: Path) -> None:
    file = str(ROOT / "accelerate_configs" / f"{name}.yaml")
    options = ["--config_file", file, "--num_processes", "2", "--main_process_port", str(free_port())]
    settings = (*QUICK, "--train.max_steps=2", "--runtime.compress_gradients=true")
    done = finish(start([*LAUNCHER, *options, str(ROOT / "train.py"), *settings], tmp_path), 120)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout and done.stdout.count("test accuracy") == 1
