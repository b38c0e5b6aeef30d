"""The assembly of what learns: the same first weights everywhere, settings that do not go together, a rehearsal."""

from pathlib import Path

import pytest
import torch

from lockstep.data.images import build_data
from lockstep.errors import UserError
from lockstep.launch.accelerator import build_accelerator
from lockstep.settings.cli import parse_config
from lockstep.training.learner import Learner, blank_batch, build_learner, check_names


def learner(tmp_path: Path, *settings: str) -> Learner:
    config = parse_config([f"--data.cache_dir={tmp_path}", "--model.name=tiny_cnn", *settings])
    accelerator, launch = build_accelerator(config.runtime)
    return build_learner(config, build_data(config, tmp_path, write=False), accelerator, launch, resumes=False)


def test_first_weights_follow_from_the_seed_alone(tmp_path: Path, fresh_accelerate: None) -> None:
    weights = [learner(tmp_path, f"--run.seed={seed}").model.state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_the_average_is_there_if_asked_for_and_leaves_the_weights_alone(tmp_path: Path, fresh_accelerate: None) -> None:
    assert learner(tmp_path).average is None
    averaging = learner(tmp_path, "--train.ema_decay=0.9")
    before = {name: value.clone() for name, value in averaging.model.state_dict().items()}
    with torch.no_grad():
        for parameter in averaging.model.parameters():
            parameter.add_(1)
    with averaging.averaged():
        assert all(torch.equal(value, before[name]) for name, value in averaging.model.state_dict().items())
    first = next(iter(before))
    assert torch.equal(averaging.model.state_dict()[first], before[first] + 1)


def test_a_rehearsal_leaves_gradients_and_nothing_else(tmp_path: Path, fresh_accelerate: None) -> None:
    one = learner(tmp_path)
    config = parse_config([f"--data.cache_dir={tmp_path}"])
    batch = blank_batch(build_data(config, tmp_path, write=False), 4, torch.device("cpu"))
    before = {name: value.clone() for name, value in one.model.named_parameters()}
    assert one.rehearse(batch).isfinite()
    assert all(parameter.grad is not None for parameter in one.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in one.model.named_parameters())


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("model.name=tiny_cn", "tiny_cnn"),
        ("optim.name=adamm", "adam"),
        ("train.loss=cross_entrop", "cross_entropy"),
        ("schedule.name=cosin", "cosine"),
        ("augment.policy=randaug", "randaugment"),
    ],
)
def test_a_misspelt_name_is_answered_before_data_are_read(setting: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"--{setting}.*[Dd]id you mean {nearest}"):
        check_names(parse_config([f"--{setting}", "--data.source=folder:nowhere"]))
