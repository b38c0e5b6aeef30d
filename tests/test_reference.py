"""The digest chains of the quick start that are shipped: what `make train` gives on machines that are known.

And that portable kernels give the bits of the same kernels on another CPU, which QEMU emulates.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest
from fork_server import ForkServer
from programs import ROOT, finish, launch, read_lines, start

from lockstep.launch.machine import cpu_model
from lockstep.run.history import compare_histories, read_history, read_starts
from lockstep.settings.cli import parse_config
from lockstep.settings.config import changed_settings
from lockstep.settings.yaml import load_config

CHAINS = sorted((ROOT / "docs" / "reference" / "digits_cnn").iterdir())
QUIET = ("--log.wandb=disabled", "--log.tensorboard=false", "--log.figures=false", "--run.name=x")
TRIED = r"\(25/1, "
"""CPUs on which the portable chain was looked at, by family and model"""


def portable(chain: Path) -> tuple[str, ...]:
    return ("--runtime.portable=true",) * load_config(chain / "config.yaml").runtime.portable


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_they_are_of_the_quick_start_as_it_is(chain: Path) -> None:
    assert changed_settings(load_config(chain / "config.yaml"), parse_config([*portable(chain)])) == []
    lines = [line for line in read_history(chain) if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(20, 601, 20)) and all(line["digest"] for line in lines)
    assert read_starts(chain)[0]["numerics"]["exact"] is True


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_this_machine_gives_the_same_if_it_is_one_of_them(chain: Path, server: ForkServer, tmp_path: Path) -> None:
    numerics = read_starts(chain)[0]["numerics"]
    arguments = (f"--runtime.threads={numerics['threads']}", *QUIET, f"--data.cache_dir={tmp_path}")
    if not portable(chain):
        server.run(1, tmp_path, *arguments, seconds=600)
    elif not re.search(TRIED, cpu_model()):
        pytest.skip(f"portable kernels were not tried on this CPU: {cpu_model()}")
    else:  # a program of its own: libraries choose their kernels once
        done = launch(*portable(chain), *arguments, cwd=tmp_path, timeout_seconds=600)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "x"
    if (own := read_starts(run)[0]["numerics"]) != numerics:
        pytest.skip(f"this machine is another: {own}")
    assert compare_histories(read_history(chain), read_history(run)) == "equal to the last bit through step 600"


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64, which emulates other CPUs")
def test_portable_kernels_give_the_same_bits_on_an_emulated_cpu(tmp_path: Path) -> None:
    """Of another maker, another generation and other caches; where this one was not tried, two that are emulated."""
    settings = (
        *QUIET,
        "--runtime.portable=true",
        "--runtime.threads=1",
        "--model.name=tiny_cnn",
        "--model.dropout=0.1",
    )
    settings += ("--train.batch_size=32", "--train.micro_batch_size=16", "--train.ema_decay=0.9", "--log.every_steps=1")
    program, digests = [sys.executable, str(ROOT / "train.py"), *settings], {}
    amd: list[str] = [] if re.search(TRIED, cpu_model()) else ["qemu-x86_64", "-cpu", "EPYC-Milan"]
    for name, emulator in (("AMD", amd), ("Intel", ["qemu-x86_64", "-cpu", "Haswell"])):
        (tmp_path / name).mkdir()
        places = ["--data.cache_dir=cache", "--train.max_steps=3"]
        done = finish(start([*emulator, *program, *places], tmp_path / name), 600)
        assert done.returncode == 0, done.stderr[-3000:]
        digests[name] = [
            line["digest"] for line in read_lines(tmp_path / name / "runs" / "x") if line["split"] == "train"
        ]
    assert digests["AMD"] == digests["Intel"] and len(digests["AMD"]) == 3
