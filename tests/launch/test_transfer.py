"""Copies to a device: from pinned memory to a GPU, and never waited for."""

import pytest
import torch
from torch import Tensor

from lockstep.launch.transfer import to_device


@pytest.mark.parametrize(("device", "pins"), [("cuda", 1), ("cpu", 0)])
def test_a_copy_is_not_waited_for_and_goes_to_a_gpu_by_pinned_memory(
    device: str, pins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: done.append("pinned") or tensor)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *to, **how: done.append((*to, how)) or tensor)
    numbers = torch.arange(3)
    assert to_device(numbers, torch.device(device)) is numbers
    assert done == ["pinned"] * pins + [(torch.device(device), {"non_blocking": True})]
