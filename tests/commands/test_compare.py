"""lockstep compare: what counts as a difference, and the exit code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lockstep.commands.compare import main, relative_differences
from lockstep.settings.config import Config, LogConfig, OptimConfig
from lockstep.settings.yaml import config_to_yaml


def write_run(folder: Path, change: float = 0.0, name: str = "layer.weight") -> str:
    checkpoint = folder / "checkpoints" / "last"
    checkpoint.mkdir(parents=True)
    weights = {name: torch.tensor([1.0, -4.0 - change], dtype=torch.float64), "steps": torch.tensor(3)}
    save_file(weights, checkpoint / "model.safetensors")
    return str(folder)


def test_difference_is_relative_to_the_largest_weight_of_the_tensor() -> None:
    a, b = {"w": torch.tensor([1.0, -4.0])}, {"w": torch.tensor([1.0, -4.5])}
    assert relative_differences(a, b) == {"w": 0.125}
    assert relative_differences(a, a) == {"w": 0.0}
    assert relative_differences({"w": torch.zeros(2)}, {"w": torch.ones(2)}) == {"w": float("inf")}


def test_other_names_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different networks.*v"):
        relative_differences({"w": torch.ones(1)}, {"v": torch.ones(1)})
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\)"):
        relative_differences({"w": torch.ones(1)}, {"w": torch.ones(2)})


def test_exit_code_follows_the_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", change=4e-9)
    assert main(["--weights", a, a]) == 0
    assert "bit for bit equal" in capsys.readouterr().out
    assert main(["--weights", a, b]) == 1
    assert "1e-09 (layer.weight); ABOVE" in capsys.readouterr().out
    assert main(["--weights", a, b, "--tolerance", "1e-8", "--per_tensor"]) == 0
    assert "steps" in capsys.readouterr().out


def test_not_a_number_never_passes(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", change=float("nan"))
    assert main(["--weights", a, b, "--tolerance", "1e9"]) == 1
    assert main(["--weights", b, b, "--tolerance", "1e9"]) == 1


def test_averages_are_compared_too(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for run, value in ((a, 1.0), (b, 2.0)):
        save_file({"w": torch.tensor([value])}, Path(run) / "checkpoints/last/ema.safetensors")
    assert main(["--weights", a, b]) == 1


def test_other_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for run, lr in ((a, 0.1), (b, 0.2)):
        config = Config(optim=OptimConfig(lr=lr), log=LogConfig(project=run))
        (Path(run) / "config.yaml").write_text(config_to_yaml(config))
    assert main(["--weights", a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == ["note: other settings: optim.lr: 0.1 -> 0.2"]
    assert main(["--weights", a, a]) == 0
    assert "note" not in capsys.readouterr().out
