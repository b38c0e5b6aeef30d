"""From the memory of the host to the device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, in order with what is queued there; the host does not wait.

    From ordinary memory a copy to a GPU would wait for all that is queued, so it goes by pinned memory, which torch
    keeps for the next one.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
