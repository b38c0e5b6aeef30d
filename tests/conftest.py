"""Fixtures that several test files share, and one core for each worker of pytest-xdist."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer
from programs import ROOT, environment


def pytest_configure(config: pytest.Config) -> None:
    """Each worker of pytest-xdist gets a core of its own, and so do the programs it starts.

    Processes that share cores spend most of their time in OpenMP's barriers: up to 20 times slower was measured.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(autouse=True)
def usual_log_level() -> Iterator[None]:
    """Commands that take long let more be said; not to the tests after theirs."""
    yield
    logging.getLogger("lockstep").setLevel(logging.NOTSET)


@pytest.fixture
def all_cores() -> Iterator[set[int]]:
    """Lifts that limit for a test that needs several cores; skips it where there are none."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    cores = os.sched_getaffinity(0)
    yield cores if len(cores) > 1 else pytest.skip("needs two cores")
    os.sched_setaffinity(0, own)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """`runs` is 4 MiB of tmpfs: a disk that can be filled, and made read-only."""
    place = tmp_path / "runs"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
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


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test start an Accelerator in this process as if none had been before."""
    from accelerate.state import AcceleratorState, GradientState

    for variable in list(os.environ):
        if variable.startswith(("ACCELERATE_", "MASTER_")) or variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(variable)

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of decoded images for the session, never the user's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Starts trainings without their imports, which take longer than they do."""
    with ForkServer(environment(OMP_NUM_THREADS="1")) as server:
        yield server


@pytest.fixture
def train_here(
    fresh_accelerate: None, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """train.py's `train` in this process: `train_here(*arguments)` returns the run folder."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Path:
        from lockstep.settings.cli import parse_config
        from train import train

        config = parse_config([f"--data.cache_dir={cache_dir}", *arguments])
        train(config)
        return tmp_path / config.run.root / str(config.run.name)

    yield run
