"""Starts train.py without the seconds of its imports: a process that has them forks one for each start.

with ForkServer() as server:
    pid = server.start(folder, arguments, variables)
    code = server.poll(pid)  # None while it runs, minus the signal's number if it was killed
    printed = server.run(3, folder, *arguments)  # three processes as one training, to their end
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from programs import ROOT, environment, free_port

PROGRAM = ROOT / "train.py"
_PRELOADED = (
    "torchvision.transforms.v2",
    "torch.utils.data",
    "lockstep.report.milestones",
    "lockstep.training.memory",
    "lockstep.data.loader",
    "lockstep.models.timm_models",
)


class ForkServer:
    """The client's side; one start or question at a time."""

    def __init__(self, variables: dict[str, str]) -> None:
        """`variables`: the server's own environment."""
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, text=True, start_new_session=True
        )

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)

    def start(self, folder: Path, arguments: list[str], variables: dict[str, str], program: Path = PROGRAM) -> int:
        """Start a program in a folder, in a session of its own; it writes to output.txt there. Returns its pid."""
        return self._ask(
            {"folder": str(folder), "program": str(program), "arguments": arguments, "variables": variables}
        )

    def poll(self, pid: int) -> int | None:
        """The exit code, once, or None."""
        return self._ask({"pid": pid})

    def run(
        self,
        processes: int,
        folder: Path,
        *arguments: str,
        program: Path = PROGRAM,
        code: int = 0,
        seconds: float = 240,
    ) -> str:
        """Run a program in some processes until all have ended or, as under a launcher, one has failed.

        `code` is the exit code of the first that failed, or 0. Returns what they print.
        """
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / "output.txt"
        before = output.stat().st_size if output.exists() else 0
        ranks = rank_variables(processes)
        pids = [self.start(folder, list(arguments), environment(**rank), program) for rank in ranks]
        running, failed, deadline = set(pids), 0, time.monotonic() + seconds
        while running:
            time.sleep(0.01)
            for pid in list(running):
                ended = self.poll(pid)
                if ended is not None:
                    running.remove(pid)
                    failed = failed or ended
                elif failed or time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
        printed = output.read_bytes()[before:].decode(errors="replace")
        assert failed == code, f"exit code {failed}: {printed[-3000:]}"
        return printed

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def rank_variables(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each of its ranks."""
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _become(request: dict[str, Any]) -> None:
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, target in ((0, nothing), (1, output), (2, output)):
        os.dup2(target, number)
    sys.argv = [request["program"], *request["arguments"]]
    runpy.run_path(request["program"], run_name="__main__")


def serve() -> None:
    """Answer requests until there are no more; in the children, return as the training ends."""
    for module in _PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif (pid := os.fork()) == 0:
            return _become(request)
        else:
            print(pid, flush=True)


if __name__ == "__main__":
    serve()
