"""lockstep compare: up to where two histories are equal, what counts as a difference, and the exit code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lockstep.commands.compare import compare_histories, main, relative_differences
from lockstep.settings.config import Config, LogConfig, OptimConfig
from lockstep.settings.yaml import config_to_yaml

NUMERICS = {"device": "some CPU", "threads": 2, "exact": True}


def write_run(folder: Path, change: float = 0.0, name: str = "layer.weight") -> str:
    checkpoint = folder / "checkpoints" / "last"
    checkpoint.mkdir(parents=True)
    weights = {name: torch.tensor([1.0, -4.0 - change], dtype=torch.float64), "steps": torch.tensor(3)}
    save_file(weights, checkpoint / "model.safetensors")
    return str(folder)


def history(digests: str, **more: Any) -> list[dict[str, Any]]:
    """A training line for every letter, 10 steps apart, and a validation at the end."""
    lines = [
        {"split": "train", "step": 10 * number, "loss": 0.5, "digest": letter, "images_per_second": number}
        for number, letter in enumerate(digests, 1)
    ]
    return [*lines, {"split": "val", "step": 10 * len(digests), "loss": 0.4, **more}]


def write_history(run: str, digests: str, *numerics: dict[str, Any]) -> None:
    (Path(run) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history(digests)))
    (Path(run) / "environment.json").write_text(
        json.dumps([{"numerics": start, "step": 10 * i} for i, start in enumerate(numerics)])
    )


def test_histories_are_equal_through_the_last_line_before_one_that_differs() -> None:
    same, other = history("abc"), history("abd")
    other[0]["images_per_second"] = 1e9  # speeds are no part of it
    assert compare_histories(same, same) == "equal to the last bit through step 30"
    assert compare_histories(same, other) == (
        "equal to the last bit through step 20; the train line of step 30 has digest c in one, d in the other"
    )
    assert compare_histories(same, history("xyz")).startswith("not equal; the train line of step 10")
    assert compare_histories(same, history("ab")) == "equal to the last bit through step 20"
    assert "step 30 has loss 0.4 in one, 0.3 in the other" in compare_histories(same, history("abc", loss=0.3))


def test_without_digests_nothing_is_claimed() -> None:
    lines = [{key: value for key, value in line.items() if key != "digest"} for line in history("abc")]
    assert "nothing can be said" in compare_histories(lines, lines)
    assert "nothing can be said" in compare_histories(history("abc"), [])


def test_runs_that_part_are_told_with_their_numerics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    write_history(a, "abc", NUMERICS)
    write_history(b, "abd", {**NUMERICS, "threads": 1}, {**NUMERICS, "threads": 1, "exact": False})
    main([a, b])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("equal to the last bit through step 20; the train line of step 30")
    assert lines[1] == f"numerics: threads 2 -> 1; changed after step 10 of {b}: exact True -> False"
    write_history(b, "abd", NUMERICS)
    main([a, b])
    assert "numerics are the same" in capsys.readouterr().out
    write_history(b, "abc", NUMERICS)
    main([a, b])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "equal to the last bit through step 30" and "numerics" not in lines[1]


def test_difference_is_relative_to_the_largest_weight_of_the_layer() -> None:
    a, b = {"w": torch.tensor([1.0, -4.0])}, {"w": torch.tensor([1.0, -4.5])}
    assert relative_differences(a, b) == {"w": 0.125}
    assert relative_differences(a, a) == {"w": 0.0}
    assert relative_differences({"w": torch.zeros(2)}, {"w": torch.ones(2)}) == {"w": float("inf")}
    # A running mean that is nothing but rounding is no difference beside its layer's other numbers.
    tiny = {"bn.running_mean": torch.tensor([9e-18]), "bn.running_var": torch.tensor([1.0])}
    assert relative_differences(tiny, {**tiny, "bn.running_mean": torch.tensor([8e-18])})["bn.running_mean"] < 1e-17


def test_a_count_counts_for_itself() -> None:
    a = {"bn.weight": torch.tensor([1000.0]), "bn.num_batches_tracked": torch.tensor(2)}
    b = {**a, "bn.num_batches_tracked": torch.tensor(3)}
    assert relative_differences(a, b)["bn.num_batches_tracked"] == 0.5


def test_other_names_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different networks.*v"):
        relative_differences({"w": torch.ones(1)}, {"v": torch.ones(1)})
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\)"):
        relative_differences({"w": torch.ones(1)}, {"w": torch.ones(2)})


def test_exit_code_follows_the_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", change=4e-9)
    assert main([a, a]) == 0
    assert "bit for bit equal" in capsys.readouterr().out
    assert main([a, b]) == 1
    assert "1e-09 (layer.weight); ABOVE" in capsys.readouterr().out
    assert main([a, b, "--tolerance", "1e-8", "--per_tensor"]) == 0
    assert "steps" in capsys.readouterr().out


def test_not_a_number_never_passes(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", change=float("nan"))
    assert main([a, b, "--tolerance", "1e9"]) == 1
    assert main([b, b, "--tolerance", "1e9"]) == 1


def test_averages_are_compared_too(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for run, value in ((a, 1.0), (b, 2.0)):
        save_file({"w": torch.tensor([value])}, Path(run) / "checkpoints/last/ema.safetensors")
    assert main([a, b]) == 1


def test_other_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for run, lr in ((a, 0.1), (b, 0.2)):
        config = Config(optim=OptimConfig(lr=lr), log=LogConfig(project=run))
        (Path(run) / "config.yaml").write_text(config_to_yaml(config))
    assert main([a, b]) == 0
    assert "note: other settings: optim.lr: 0.1 -> 0.2" in capsys.readouterr().out.splitlines()
    assert main([a, a]) == 0
    assert "note" not in capsys.readouterr().out


def test_a_chain_of_digests_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As docs/reference has some: no weights, and the exit code follows the digests."""
    run, chain = write_run(tmp_path / "run"), str(tmp_path / "chain")
    Path(chain).mkdir()
    write_history(run, "abc", NUMERICS)
    for digests, code in (("abc", 0), ("abd", 1)):
        write_history(chain, digests, NUMERICS)
        assert main([run, chain]) == code
    assert f"weights are not compared: {chain} has no checkpoints" in capsys.readouterr().out
