"""How busy every node is: processor, memory and GPUs, by what each tells the others."""

from contextlib import suppress
from typing import Any

import psutil
import torch

from lockstep.launch.accelerator import Launch


def node_loads(launch: Launch) -> dict[str, float]:
    """`node<number>/cpu_percent` since the last call, `memory_percent`, and of each GPU that a process of it uses.

    Every process must take part. Nodes count from 0, as the launcher's machine ranks do; GPUs have the number of the
    process on the node. How busy a GPU is, is known where nvidia-ml-py is installed.
    """
    loads: dict[str, float] = {}
    node = -1
    for local_index, own in launch.gather((launch.local_process_index, _own_load(launch))):
        node += local_index == 0
        of_machine = () if local_index == 0 else ("cpu_percent", "memory_percent")  # once is enough
        names = {name: f"gpu{local_index}_{name[4:]}" if name.startswith("gpu_") else name for name in own}
        loads |= {f"node{node}/{names[name]}": value for name, value in own.items() if name not in of_machine}
    return loads


def _own_load(launch: Launch) -> dict[str, float]:
    load: dict[str, Any] = {"cpu_percent": psutil.cpu_percent(), "memory_percent": psutil.virtual_memory().percent}
    if launch.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(launch.device)
        load["gpu_memory_percent"] = 100 * (1 - free / total)
        with suppress(Exception):  # NVML has errors of its own, and a rank that ends here would be waited for
            load["gpu_percent"] = float(torch.cuda.utilization(launch.device))
    return load
