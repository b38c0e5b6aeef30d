"""What learns: network, optimizer, average and loss, assembled in one place."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from lockstep.augment.policy import POLICIES
from lockstep.augment.transform import Transform, build_transform
from lockstep.data.images import Data, ImageSet
from lockstep.data.loader import Batch, EvaluationLoader, crops_while_decoding
from lockstep.data.portions import choose_portions
from lockstep.evaluation.evaluate import evaluate
from lockstep.evaluation.metrics import Predictions
from lockstep.launch.accelerator import Launch
from lockstep.launch.sharding import prepare, shard
from lockstep.models.network import (
    build_network,
    find_network,
    require_smaller_images,
    with_pretrained_input,
)
from lockstep.randomness import seed_microbatch, seed_run
from lockstep.settings.config import Config
from lockstep.settings.registry import choose, look_up
from lockstep.training.ema import ExponentialAverage, build_average
from lockstep.training.loss import LOSSES, Loss, build_loss, total, weights_of_classes
from lockstep.training.optim import OPTIMIZERS, build_optimizer
from lockstep.training.schedule import SHAPES


@dataclass(frozen=True, eq=False)
class Learner:
    """The parts of a training step."""

    model: nn.Module
    """The bare network: what is evaluated and saved"""
    network: nn.Module
    """The network that trains: in mixed precision, and wrapped by DDP or FSDP2 where there are several processes"""
    optimizer: AcceleratedOptimizer
    average: ExponentialAverage | None
    transform: Transform
    loss_of: Loss
    accelerator: Accelerator
    launch: Launch
    config: Config

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Of the bare network, by name. To find them anew in every step takes as long as their norm."""
        return dict(self.model.named_parameters())

    def evaluate(
        self, images: ImageSet, num_classes: int, interrupted: Callable[[], bool], *, with_probabilities: bool = False
    ) -> Predictions | None:
        """What the network as it is now does on a set, every process taking part; None if interrupted on any."""
        loader = EvaluationLoader(images, num_classes, self.launch, self.config)
        return evaluate(
            self.model, loader, self.transform, self.accelerator, interrupted, with_probabilities=with_probabilities
        )

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the network holds the averages of its weights, if there are any."""
        return nullcontext() if self.average is None else self.average.applied()

    def rehearse(self, batch: Batch) -> Tensor:
        """One microbatch forward and backward, as in training; returns its mean loss, on the device."""
        last_epoch = (self.config.train.epochs - 1) * self.transform.steps_per_epoch  # when images have their full size
        images, targets = self.transform.train_batch(*batch, (0, last_epoch, 0))
        seed_microbatch(0, 0, 0)
        losses = self.loss_of(self.network.train()(images), targets)
        self.accelerator.backward(total(losses) / len(losses))
        return losses.detach().mean()


def build_learner(config: Config, data: Data, accelerator: Accelerator, launch: Launch, *, resumes: bool) -> Learner:
    """Build all parts, with first weights that follow from `run.seed`; every process of `launch` must take part.

    Published weights are not fetched if the run `resumes`. Raises UserError for settings that do not go with one
    another or with the data.
    """
    check_names(config)
    seed_run(config.run.seed)
    model = build_network(config, data, launch.device, resumes=resumes, say=launch.say)
    require_smaller_images(model, config, data.image_shape)
    shard(model, launch, compress_gradients=config.runtime.compress_gradients)
    average = build_average(config, model)
    bare_optimizer = build_optimizer(config.optim, model, may_fuse=not launch.fsdp)
    optimizer = accelerator.prepare_optimizer(bare_optimizer, device_placement=False)
    network = prepare(accelerator, launch, model, config.runtime)
    precropped = crops_while_decoding(data.train, config.augment)
    transform = build_transform(
        config,
        data.mean,
        data.std,
        data.num_classes,
        precropped=precropped,
        steps_per_epoch=max(1, len(data.train) // config.train.batch_size),
    )
    weights = weights_of_classes(config, data.train.drawn_labels, data.num_classes)
    loss_of = build_loss(config.train, None if weights is None else weights.to(launch.device, torch.float32))
    return Learner(model, network, optimizer, average, transform, loss_of, accelerator, launch, config)


def check_names(config: Config) -> None:
    """Raise UserError if the settings name a network, an optimizer, a schedule, a loss or a policy that there is not.

    Quick, for the beginning of a program, before data are read.
    """
    find_network(config.model)
    choose(OPTIMIZERS, "optim.name", config.optim)
    choose(LOSSES, "train.loss", config.train)
    choose(POLICIES, "augment.policy", config.augment)
    look_up(SHAPES, "schedule.name", config.schedule.name)


def complete(config: Config, say: Callable[[str], None]) -> Config:
    """The settings, checked as `check_names` does, with what they leave to data and pretrained weights filled in.

    `say` is told what was chosen.
    """
    check_names(config)
    return choose_portions(with_pretrained_input(config), say)


def blank_batch(data: Data, size: int, device: torch.device) -> Batch:
    """So many black images of class 0, of the data's shape."""
    channels, height, width = data.image_shape
    images = torch.zeros(size, height, width, channels, dtype=torch.uint8, device=device)
    numbers = torch.zeros(size, dtype=torch.int64, device=device)
    return Batch(images, numbers, numbers)
