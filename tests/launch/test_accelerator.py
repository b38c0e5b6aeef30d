"""Guards on the launch: what is not what it seems is refused, with a line that says what to do."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from programs import finish, free_port, start

from lockstep.launch import accelerator, guards
from lockstep.launch.accelerator import Launch, build_accelerator
from lockstep.launch.guards import resolve_precision, resolve_sharding
from lockstep.launch.machine import has_fast_bf16
from lockstep.settings.config import RuntimeConfig

LAUNCHER = (
    "ACCELERATE_MIXED_PRECISION MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE EXPECTED_WORLD_SIZE"
).split()


@pytest.fixture(autouse=True)
def alone_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after `python train.py` on a machine without a GPU."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    Accelerator(cpu=True)  # so that no variable set below can make this process wait for others
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def refusal(config: RuntimeConfig | None = None) -> str:
    with pytest.raises(ValueError) as error:
        build_accelerator(config or RuntimeConfig())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_gloo_is_used_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(**options: Any) -> Any:
        asked.append(options["kwargs_handlers"][0].to_kwargs().get("backend"))
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(accelerator, "Accelerator", note)
    for backend in ("auto", "gloo"):
        accelerator._connect(RuntimeConfig(backend=backend), "no", True)
    assert asked == [None, "gloo"]


# ---- precision


@pytest.mark.parametrize("launched", [None, "no", "bf16"])
def test_the_launchers_precision_is_taken(launched: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert precision_in_force(RuntimeConfig()) == (launched or "no")


def precision_in_force(config: RuntimeConfig) -> str:
    return resolve_precision(config, on_cpu=True)  # Accelerate takes one precision per process


@pytest.mark.parametrize("launched", ["no", "bf16", "fp16", "fp8"])
def test_a_setting_overrules_the_launcher(launched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert precision_in_force(RuntimeConfig(precision="no")) == "no"
    assert precision_in_force(RuntimeConfig(precision="bf16")) == "bf16"


def test_auto_is_what_this_cpu_does_well(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = open("/proc/cpuinfo").read().split() if os.path.exists("/proc/cpuinfo") else []
    fast = bool({"amx_bf16", "avx512_bf16"} & set(flags))
    assert has_fast_bf16(on_cpu=True) == fast
    assert precision_in_force(RuntimeConfig(precision="auto")) == ("bf16" if fast else "no")
    for capability, expected in (("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "no")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capability=capability: {capability: True})
        assert precision_in_force(RuntimeConfig(precision="auto")) == expected, capability


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("setting", ["launch", "no", "bf16", "auto"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_slow_precision_is_told_unless_it_was_asked_for(
    precision: str, setting: Any, fast: bool, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "has_fast_bf16", lambda on_cpu: fast)
    advice = guards.quicker_precision(RuntimeConfig(precision=setting), precision, on_cpu) or ""
    assert ("--runtime.precision=no" in advice) == (precision == "bf16" and on_cpu and not fast)
    assert ("--runtime.precision=auto" in advice) == (precision == "no" and setting == "launch" and fast)


@pytest.mark.parametrize("fast", [True, False])
def test_portable_kernels_are_of_fp32(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "has_fast_bf16", lambda on_cpu: fast)
    assert precision_in_force(RuntimeConfig(portable=True, precision="auto")) == "no"
    assert guards.quicker_precision(RuntimeConfig(portable=True), "no", on_cpu=True) is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="--runtime.portable=true: launch with --mixed_precision no"):
        resolve_precision(RuntimeConfig(portable=True), on_cpu=True)


def test_float64_is_not_told_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "has_fast_bf16", lambda on_cpu: True)
    assert guards.quicker_precision(RuntimeConfig(dtype="float64"), "no", on_cpu=True) is None


def test_fp16_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(RuntimeConfig(precision="fp16")).startswith("--runtime.precision=fp16: a CPU cannot train in fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    line = refusal()
    assert line.startswith("--runtime.precision=launch (fp16): a CPU cannot") and line.endswith("use bf16")


def test_a_precision_that_is_none_of_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert refusal() == "--runtime.precision=launch (fp8) is not supported: use no, bf16 or fp16"


def test_float64_with_a_launchers_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "(bf16) cannot be combined with --runtime.dtype=float64" in refusal(RuntimeConfig(dtype="float64"))
    assert precision_in_force(RuntimeConfig(dtype="float64", precision="no")) == "no"


# ---- the launch


def test_a_plain_start_is_one_process() -> None:
    accelerator, launch = build_accelerator(RuntimeConfig(threads=1))
    assert (launch.num_processes, launch.process_index, launch.local_process_index) == (1, 0, 0)
    assert launch.is_main and launch.precision == "no" and launch.device == accelerator.device == torch.device("cpu")
    facts = {"device": "cpu", "processes": 1, "accumulation": 4, "fsdp": False, "precision": "no", "threads": 1}
    assert launch.as_dict(microbatches=4) == facts
    assert accelerator.gradient_accumulation_steps == 1


def test_a_launcher_that_started_one_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    build_accelerator(RuntimeConfig())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    line = refusal()
    assert line.startswith("the launcher was told of several processes but started one")
    assert "--config_file accelerate_configs/cpu_2proc.yaml" in line


def test_another_number_of_processes_than_expected_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPECTED_WORLD_SIZE", "1")
    build_accelerator(RuntimeConfig())
    monkeypatch.setenv("EXPECTED_WORLD_SIZE", "2")
    said = "EXPECTED_WORLD_SIZE says 2 processes, but this process is one of 1: each would train alone."
    assert refusal().startswith(said)


LATE = """
import os, pathlib, time
from torch import distributed
from lockstep.settings.config import RuntimeConfig
from lockstep.launch.accelerator import build_accelerator
pathlib.Path(os.environ["RANK"]).touch()
while not all(pathlib.Path(rank).exists() for rank in "01"):  # until both have imported torch
    time.sleep(0.01)
accelerator, launch = build_accelerator(RuntimeConfig(rendezvous_seconds=1))
waits = []
for group in (None, launch.host_group):
    begun = time.monotonic()
    time.sleep(3 * launch.process_index)
    distributed.barrier(group=group)
    waits.append(time.monotonic() - begun > 2)
print(launch.num_processes, *waits)
"""


@pytest.mark.slow
def test_the_short_wait_is_for_the_start_only(tmp_path: Path) -> None:
    """One process may prepare data for minutes, later, while the others wait."""
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start([sys.executable, "-c", LATE], tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **rendezvous)
        for rank in range(2)
    ]
    for done in [finish(rank, 60) for rank in ranks]:
        assert done.stdout == "2 True True\n", done.stderr


KILLED = """
import os, signal, sys
from accelerate import Accelerator
from lockstep.settings.config import RuntimeConfig
from lockstep.launch.accelerator import build_accelerator
from lockstep.launch.rendezvous import meet
kept = meet(30)
Accelerator(cpu=True).wait_for_everyone()  # both have the first group
if sys.argv[1:] == ["killed"]:
    os.kill(os.getpid(), signal.SIGKILL)
build_accelerator(RuntimeConfig(rendezvous_seconds=1))
"""


@pytest.mark.slow
def test_a_process_killed_while_the_others_connect_leaves_nobody_waiting(tmp_path: Path) -> None:
    """The other has a process group of two already, and makes the second group alone."""
    (tmp_path / "meet.py").write_text(KILLED)
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    killed = start([sys.executable, "meet.py", "killed"], tmp_path, RANK="1", LOCAL_RANK="1", **rendezvous)
    other = start([sys.executable, "meet.py"], tmp_path, RANK="0", LOCAL_RANK="0", **rendezvous)
    assert finish(killed, 60).returncode == -signal.SIGKILL
    assert "did not reach the others" in finish(other, 30).stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    program = "from lockstep.launch import accelerator as r; r.build_accelerator(r.RuntimeConfig())"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        main = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = finish(start([sys.executable, "-c", program], tmp_path, **main), 60)
    assert f"UserError: port {port} is taken" in done.stderr and "--main_process_port" in done.stderr


def test_the_first_line_says_what_is_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    main = Launch(torch.device("cpu"), 2, 0, 0, "bf16", 4)
    line = main.describe(64, 8)
    for part in ("cpu", "bf16", "2 processes", "64 samples = 8 (microbatch) x 2 (processes) x 4 (accumulation)"):
        assert part in line
    odd = Launch(torch.device("cpu"), 3, 0, 0, "bf16", 4).describe(64, 8)
    assert "64 samples = 8 (microbatch) x 8 (microbatches), at most 3 on one of 3 processes" in odd
    assert Launch(torch.device("cpu"), 1, 0, 0, "no", 4).describe(64, 8).startswith("cpu, fp32, 1 process,")
    main.say("hello")
    Launch(torch.device("cpu"), 2, 1, 1, "no", 4).say("not me")
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize("launched", [False, True])
def test_fsdp_is_asked_for_by_the_setting_or_the_launcher(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RuntimeConfig(fsdp=not launched)
    for precision, shards in (("bf16", True), ("fp16", ValueError)):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", str(launched).lower())
        with pytest.raises(ValueError, match="FSDP cannot train in fp16") if shards is ValueError else nullcontext():
            assert resolve_sharding(config, precision)
        assert "ACCELERATE_USE_FSDP" not in os.environ, "Accelerate must not shard as well"
    with pytest.raises(ValueError, match="FSDP does not go with --runtime.compile=default"):
        resolve_sharding(RuntimeConfig(fsdp=True, compile="default"), "no")
    assert not resolve_sharding(RuntimeConfig(), "fp16")
