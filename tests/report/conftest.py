"""What an untrained network makes of the digits, for all tests of reports."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from lockstep.augment.transform import build_transform
from lockstep.data.images import Data, build_data
from lockstep.data.loader import EvaluationLoader
from lockstep.evaluation.evaluate import evaluate
from lockstep.evaluation.metrics import Predictions
from lockstep.launch.accelerator import Launch
from lockstep.settings.config import Config, DataConfig


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Predictions]:
    """Digits, and what an untrained network with two classes too many makes of them."""
    folder = tmp_path_factory.mktemp("report")
    config = Config(data=DataConfig(cache_dir=str(folder / "cache"), num_classes=12))
    data = build_data(config, folder, write=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    loader = EvaluationLoader(data.test, 12, Launch(torch.device("cpu"), 1, 0, 0, "no", 1), config)
    transform = build_transform(config, data.mean, data.std, data.num_classes, precropped=False)
    return data, evaluate(model, loader, transform, Accelerator(cpu=True), with_probabilities=True)
