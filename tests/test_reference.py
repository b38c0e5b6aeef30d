"""The digest chains of the quick start that are shipped: what `make train` gives on machines that are known."""

from pathlib import Path

import pytest
from fork_server import ForkServer
from programs import ROOT

from lockstep.run.history import compare_histories, read_history, read_starts
from lockstep.settings.cli import parse_config
from lockstep.settings.config import changed_settings
from lockstep.settings.yaml import load_config

CHAINS = sorted((ROOT / "docs" / "reference" / "digits_cnn").iterdir())


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_they_are_of_the_quick_start_as_it_is(chain: Path) -> None:
    assert changed_settings(load_config(chain / "config.yaml"), parse_config([])) == []
    lines = [line for line in read_history(chain) if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(20, 601, 20)) and all(line["digest"] for line in lines)
    assert read_starts(chain)[0]["numerics"]["exact"] is True


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_this_machine_gives_the_same_if_it_is_one_of_them(chain: Path, server: ForkServer, tmp_path: Path) -> None:
    numerics = read_starts(chain)[0]["numerics"]
    quiet = ("--log.wandb=disabled", "--log.tensorboard=false", "--log.figures=false", f"--data.cache_dir={tmp_path}")
    server.run(1, tmp_path, f"--runtime.threads={numerics['threads']}", *quiet, "--run.name=x", seconds=600)
    run = tmp_path / "runs" / "x"
    if (own := read_starts(run)[0]["numerics"]) != numerics:
        pytest.skip(f"this machine is another: {own}")
    assert compare_histories(read_history(chain), read_history(run)) == "equal to the last bit through step 600"
