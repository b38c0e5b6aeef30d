"""An exponential moving average of a network's weights, used for evaluation."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lockstep.errors import UserError
from lockstep.launch.sharding import local, part_of
from lockstep.settings.config import Config

Warmup = Literal["ratio", "power", "none"]


class ExponentialAverage:
    """Averages of everything in a network's state dict, each `average += (1 - decay) * (value - average)` per step.

    Floating buffers are averaged like parameters (as in timm's ModelEmaV3): the running statistics of batch norm then
    belong to the averaged weights, to first order, and not to the newest ones. Integer buffers hold counts, which have
    no average: they are copied. Averages have the dtype, device and memory layout of what they average.

    Of the bare network, outside DDP and torch.compile, whose wrappers rename the entries.
    """

    def __init__(
        self, model: nn.Module, decay: float, warmup: Warmup = "ratio", *, averages_are_given: bool = False
    ) -> None:
        """Starts from the present weights. `decay` in [0, 1) is that of a long training, see `decay_at`.

        `averages_are_given`: those of a training before this one will be loaded, and are not to fade quickly.
        """
        assert 0 <= decay < 1, decay
        self.decay, self.warmup, self._given = decay, warmup, averages_are_given
        # The parameters and buffers themselves, once: to make a state dict in every step takes longer than to average.
        self._values: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._averages = {name: value.detach().clone() for name, value in self._values.items()}
        self._floating = [name for name, value in self._values.items() if value.is_floating_point()]
        self._counts = [name for name, value in self._values.items() if not value.is_floating_point()]

    def decay_at(self, step: int) -> float:
        """The decay after `step` updates: smaller in the first ones, so that the initial weights fade quickly.

        min(decay, (1 + step) / (10 + step)), the rule of TensorFlow's ExponentialMovingAverage with `num_updates`:
        https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
        Warm-up `power` is min(decay, 1 - step ** (-2/3)), and `none` the full decay, both 0 at the first step, which
        takes the weights as they are: timm's ModelEmaV3 with and without its warm-up.
        """
        if self._given:
            return self.decay
        if self.warmup == "ratio":
            return min(self.decay, (1 + step) / (10 + step))
        if step <= 1:
            return 0.0
        return min(self.decay, 1 - step ** (-2 / 3)) if self.warmup == "power" else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the network. `step` counts optimizer updates, the one just done included."""
        averages, values = (
            [local(tensors[name]) for name in self._floating] for tensors in (self._averages, self._values)
        )
        torch._foreach_lerp_(averages, values, 1 - self.decay_at(step))
        _copy(self._values, self._averages, self._counts)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the `with` block the network holds the averages; afterwards, error or not, its own values bit for bit.

        Values are copied into the tensors in place, so that DDP, compiled graphs and optimizers keep their hold on
        them. Costs one more copy of the weights while the block lasts. Do not train inside.
        """
        own = {name: value.detach().clone() for name, value in self._values.items()}
        _copy(self._averages, self._values, own)
        try:
            yield
        finally:
            _copy(own, self._values, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, contiguous and without shared memory among them, as safetensors wants them.

        Names are those of the network's own state dict: `model.load_state_dict` takes it too. Contiguous entries are
        the live averages, not copies: the next `update` changes them.
        """
        return {name: average.contiguous() for name, average in self._averages.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replaces the averages. Raises UserError, and changes nothing, if names or shapes are not this network's."""
        different = sorted(self._averages.keys() ^ state.keys()) or [
            name for name, average in self._averages.items() if average.shape != state[name].shape
        ]
        if different:
            raise UserError(
                f"the saved averages (--train.ema_decay) belong to another network: {len(different)} entries differ, "
                f"the first is {different[0]}; resume with the settings they were saved with"
            )
        parts = {name: part_of(state[name], average) for name, average in self._averages.items()}
        _copy(parts, self._averages, parts)


@torch.no_grad()
def _copy(values: dict[str, Tensor], targets: dict[str, Tensor], names: Collection[str]) -> None:
    if names:
        torch._foreach_copy_([local(targets[name]) for name in names], [local(values[name]) for name in names])


def build_average(config: Config, model: nn.Module) -> ExponentialAverage | None:
    """The average that `train.ema_decay` asks for, of the bare network."""
    if config.train.ema_decay is None:
        return None
    goes_on = config.run.from_run is not None
    return ExponentialAverage(model, config.train.ema_decay, config.train.ema_warmup, averages_are_given=goes_on)
