"""`lockstep diagnose RUN`: of finished runs by what they left, of others by a look at their newest checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
from programs import QUICK

from lockstep.commands.diagnose import main
from lockstep.errors import UserError
from lockstep.settings.config import Config
from lockstep.settings.yaml import config_to_yaml

pytestmark = pytest.mark.launch


def folder_of(place: Path, epochs: int, state: str = "running") -> Path:
    """A run of the digits whose loss stays where it is."""
    place.mkdir()
    (place / "config.yaml").write_text(config_to_yaml(Config()))
    (place / "summary.json").write_text(json.dumps({"state": state}))
    line = {"split": "val", "loss": 2.3, "accuracy": 0.1, "train_loss": 2.3, "train_accuracy": 0.1}
    lines = [json.dumps({**line, "epoch": epoch + 1, "step": epoch}) for epoch in range(epochs)]
    (place / "metrics.jsonl").write_text("\n".join(lines))
    return place


def test_runs_without_a_checkpoint_are_judged_by_their_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stuck, begun = folder_of(tmp_path / "stuck", 5, "failed"), folder_of(tmp_path / "begun", 0)
    assert main([str(stuck), str(begun)]) == 0
    first, finding, last = capsys.readouterr().out.splitlines()
    assert first == f"{stuck} (failed, 5 epochs), by its curves alone: there was no look into the network:"
    assert finding.startswith("  loss does not fall: train/loss goes from 2.3 in epoch 1 to 2.3 in epoch 5")
    assert last == f"{begun} (running): nothing to judge by yet: no epoch is over"


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        main([str(tmp_path)])


@pytest.mark.slow
def test_a_checkpoint_is_looked_into_as_the_end_of_training_does(
    quick_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = json.loads((quick_run / "diagnosis.json").read_text())
    main([str(quick_run)])
    of_finished = capsys.readouterr().out
    run = tmp_path / "copy"
    shutil.copytree(quick_run, run, symlinks=True)
    (run / "diagnosis.json").unlink()
    main([str(run)])
    assert capsys.readouterr().out == of_finished.replace(str(quick_run), str(run))
    from lockstep.commands.diagnose import _look
    from lockstep.settings.yaml import load_config

    seen = _look(run, load_config(run / "config.yaml")).probe
    assert (
        seen is not None
        and seen.silent == kept["probe"]["silent"]
        and seen.moved == pytest.approx(kept["probe"]["moved"])
    )


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from programs import launch

    place = tmp_path_factory.mktemp("diagnosed")
    done = launch(*QUICK, "--run.name=run", f"--data.cache_dir={place / 'cache'}", cwd=place, HOME=str(place))
    assert done.returncode == 0, done.stderr
    return place / "runs" / "run"
