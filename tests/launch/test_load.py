"""What the nodes of a launch tell of their load."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from lockstep.launch import load
from lockstep.launch.accelerator import Launch
from lockstep.launch.load import node_loads

ALONE = Launch(torch.device("cpu"), 1, 0, 0, "no", 1)


@dataclass(frozen=True)
class TwoNodes(Launch):
    """Four processes, two on each of two nodes, as rank 0 hears of them."""

    def gather(self, own: Any) -> list[Any]:
        busy = {"cpu_percent": 30.0, "memory_percent": 40.0, "gpu_percent": 50.0, "gpu_memory_percent": 60.0}
        return [own, (1, busy), (0, busy), (1, busy | {"cpu_percent": 99.0})]


def test_one_process_tells_of_its_machine() -> None:
    node_loads(ALONE)
    torch.randn(600, 600) @ torch.randn(600, 600)
    loads = node_loads(ALONE)
    assert set(loads) == {"node0/cpu_percent", "node0/memory_percent"}
    assert 0 <= loads["node0/cpu_percent"] <= 100 and 0 < loads["node0/memory_percent"] < 100


def test_each_node_is_told_of_once_and_each_gpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(load, "_own_load", lambda launch: {"cpu_percent": 10.0, "memory_percent": 20.0})
    loads = node_loads(TwoNodes(**{**vars(replace(ALONE, num_processes=4))}))
    assert loads == {
        "node0/cpu_percent": 10.0,
        "node0/memory_percent": 20.0,
        "node0/gpu1_percent": 50.0,
        "node0/gpu1_memory_percent": 60.0,
        "node1/cpu_percent": 30.0,
        "node1/memory_percent": 40.0,
        "node1/gpu0_percent": 50.0,
        "node1/gpu0_memory_percent": 60.0,
        "node1/gpu1_percent": 50.0,
        "node1/gpu1_memory_percent": 60.0,
    }
