"""Weights from files: which file counts, and what does not fit."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lockstep.errors import UserError
from lockstep.files import write_manifest
from lockstep.models.weights import fit_channels, load_weights, put_weights


def checkpoint(folder: Path, *names: str) -> Path:
    """A folder with a file for each name, whose weights are its place in the list."""
    folder.mkdir()
    for number, name in enumerate(names):
        save_file({"weight": torch.full((2,), float(number))}, folder / f"{name}.safetensors")
    write_manifest(folder)
    return folder


def test_an_average_is_what_is_evaluated(tmp_path: Path) -> None:
    assert load_weights(checkpoint(tmp_path / "a", "model"))["weight"].tolist() == [0, 0]
    assert load_weights(checkpoint(tmp_path / "b", "model", "ema"))["weight"].tolist() == [1, 1]
    assert load_weights(tmp_path / "b" / "model.safetensors")["weight"].tolist() == [0, 0]


def test_damage_is_one_line(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", "model")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for place in (folder, file):
        with pytest.raises(UserError, match="cannot be used: .*model.safetensors"):
            load_weights(place)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(alone)
    with pytest.raises(UserError, match="does not exist"):
        load_weights(tmp_path / "nowhere.safetensors")


def test_weights_of_another_network_are_named_and_nothing_is_changed() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    other = {"weight": torch.zeros(2, 4), "gamma": torch.zeros(2)}
    expected = "there holds another network: weights 1 missing, for example bias; 1 unknown, for example gamma; "
    with pytest.raises(UserError, match=re.escape(expected + "1 of another shape, for example weight")):
        put_weights(model, other, "there")
    assert torch.equal(model.weight, before)
    put_weights(model, {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "here")
    assert torch.equal(model.weight, torch.ones(2, 3))


@pytest.mark.parametrize("name", ["weights.pt", "model.pth", "pytorch_model.bin"])
def test_a_pickle_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is a pickle, .*: save it as .safetensors"):
        load_weights(tmp_path / name)


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UserError, match="pipe.safetensors is not a file"):
        load_weights(tmp_path / "pipe.safetensors")


def network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, classes))


def test_a_head_for_other_classes_begins_anew_where_it_may() -> None:
    model, given = network(5), network(2).state_dict()
    head = model[2].weight.clone()  # type: ignore[index]
    with pytest.raises(UserError, match="2 of another shape"):
        put_weights(model, given, "there")
    assert put_weights(model, given, "there", new_head=True) == ["2.weight", "2.bias"]
    assert torch.equal(model[0].weight, given["0.weight"]) and torch.equal(model[2].weight, head)  # type: ignore[index]
    same = network(2)
    assert put_weights(same, given, "there", new_head=True) == []
    assert torch.equal(same[2].weight, given["2.weight"])  # type: ignore[index]


def test_a_first_convolution_for_colour_is_fitted_to_other_channels() -> None:
    colour, grey, five = (nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Conv2d(4, 2, 3)) for channels in (3, 1, 5))
    weights = colour.state_dict()
    assert fit_channels(grey, weights) == "0.weight"
    assert put_weights(grey, weights, "there") == []
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)))
    assert fit_channels(colour, colour.state_dict()) is None, "nothing to do"
    assert fit_channels(five, colour.state_dict()) == "0.weight"
    assert fit_channels(five, grey.state_dict()) is None, "which says nothing of colours"


def test_another_body_is_no_new_head() -> None:
    wider = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5)).state_dict()
    with pytest.raises(UserError, match="of another shape"):
        put_weights(network(5), wider, "there", new_head=True)
    without_bias = {name: value for name, value in network(2).state_dict().items() if name != "2.bias"}
    with pytest.raises(UserError, match="1 missing, for example 2.bias"):
        put_weights(network(5), without_bias, "there", new_head=True)


def test_a_run_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    best = checkpoint(tmp_path / "run" / "checkpoints" / "step_00000007", "model", "ema")
    (tmp_path / "run" / "checkpoints" / "best").symlink_to(best.name)
    assert load_weights(tmp_path / "run")["weight"].tolist() == [1, 1]
