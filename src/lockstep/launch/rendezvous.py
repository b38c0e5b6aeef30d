"""Waiting until all processes of a launch have come, and saying who has not."""

import os
import platform
from datetime import timedelta
from typing import Any

from torch import distributed

from lockstep.errors import UserError


def meet(wait_seconds: int) -> Any:
    """Wait for all processes that the launcher has announced; raises UserError, naming those that have not come.

    Where torch's process groups are built next, in the same store, they find everybody there. Keep what is returned
    until they are. None for one process.
    """
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if processes == 1:
        return None
    address, port, wait = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=wait_seconds)
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = distributed.TCPStore(
            address, port, processes, hosts_store, timeout=wait, wait_for_workers=False, multi_tenant=True
        )
    except (distributed.DistNetworkError, distributed.DistStoreError) as failure:
        if "EADDRINUSE" in str(failure):
            raise UserError(
                f"port {port} is taken (EADDRINUSE), by another run perhaps: launch with another --main_process_port"
            ) from failure
        raise UserError(
            f"rank {rank} ({platform.node()}) waited {wait_seconds} s (--runtime.rendezvous_seconds) for rank 0, which "
            f"should be at {address}:{port} and has not come"
        ) from failure
    # A launcher that starts its ranks again goes on with its store.
    place = f"lockstep/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store.set(f"{place}/{rank}", platform.node())
    try:
        store.wait([f"{place}/{other}" for other in range(processes)], wait)
    except (distributed.DistNetworkError, distributed.DistStoreError) as failure:
        raise UserError(_describe_absence(store, place, processes, wait_seconds)) from failure
    return store


def _describe_absence(store: Any, place: str, processes: int, wait_seconds: int) -> str:
    """Who has not come, and where those are who have."""
    try:
        there = [rank for rank in range(processes) if store.check([f"{place}/{rank}"])]
        hosts = dict.fromkeys(store.get(f"{place}/{rank}").decode() for rank in there)
    except (distributed.DistNetworkError, distributed.DistStoreError, RuntimeError):
        return f"rank 0, which all others meet at, went away while they waited (up to {wait_seconds} s) for one another"
    absent = [rank for rank in range(processes) if rank not in there]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    nodes = dict.fromkeys(rank // local for rank in absent)
    names = ", ".join(map(str, absent[:8])) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    return (
        f"rank{'s' * (len(absent) > 1)} {names} of {processes} (on node {', '.join(map(str, nodes))} of "
        f"{-(-processes // local)}) did not come within {wait_seconds} s (--runtime.rendezvous_seconds); "
        f"{len(there)} came, from {', '.join(list(hosts)[:8])}"
    )
