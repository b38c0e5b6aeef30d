"""Epochs and batch size for a training set of some size, where the settings leave them open."""

from collections.abc import Callable
from dataclasses import replace

from lockstep.data.sources.kinds import open_source
from lockstep.data.split import divide
from lockstep.errors import UserError
from lockstep.settings.config import Config

_STEPS = 600
_FEWEST_EPOCHS, _MOST_EPOCHS = 5, 50
_LARGEST_BATCH = 64
_STEPS_PER_EPOCH = 16
_SMALLEST_MICROBATCH = 8


def choose_portions(config: Config, say: Callable[[str], None]) -> Config:
    """The settings, with -1 in `train.epochs` and `train.batch_size` replaced, and a line to `say` which and why.

    The choice is a function of the number of training images alone. It is for fine-tuning, where a few hundred steps
    do: a batch is two of `train.micro_batch_size` (so that two processes can train; one in a set of fewer images), or
    4, 8, ... of them, up to 64 samples, as long as an epoch has 16 steps; 600 steps, in 5 to 50 epochs. Raises
    UserError for data that cannot be opened, or are fewer than a batch.
    """
    train = config.train
    if -1 not in (train.epochs, train.batch_size):
        return config
    source = open_source(config.data)
    count = len(divide(source.splits["train"].labels, source.division(config.data), config.run.seed)[0])
    batch_size = train.batch_size
    if batch_size == -1:
        batch_size = _batch_size(count, train.micro_batch_size, config.data.repeats)
    if count < batch_size:
        raise UserError(
            f"{source.name} has {count} training images, and a step takes at least {batch_size}: add images, or set "
            f"--train.batch_size={count} --train.micro_batch_size={count}"
        )
    epochs = train.epochs
    if epochs == -1:
        epochs = min(max(-(-_STEPS // (count // batch_size)), _FEWEST_EPOCHS), _MOST_EPOCHS)
    steps = epochs * (count // batch_size)
    chosen = [f"--train.batch_size={batch_size}"] * (train.batch_size == -1)
    chosen += [f"--train.epochs={epochs}, which is {steps} steps"] * (train.epochs == -1)
    say(f"{count} training images in {len(source.classes)} classes: chose {' and '.join(chosen)}")
    return replace(config, train=replace(train, epochs=epochs, batch_size=batch_size))


def _batch_size(count: int, micro_batch_size: int | str | None, repeats: int) -> int:
    """A microbatch, doubled at least once if there are as many images, and further while 16 steps an epoch are left."""
    base = micro_batch_size if isinstance(micro_batch_size, int) else _SMALLEST_MICROBATCH
    base *= repeats
    batch_size = 2 * base if count >= 2 * base else base
    while 2 * batch_size <= _LARGEST_BATCH and count >= 2 * batch_size * _STEPS_PER_EPOCH:
        batch_size *= 2
    return batch_size
