"""Starts `python train.py` without the ten seconds of its imports: a process that has them forks one for each start.

with ForkServer() as server:
    pid = server.start(folder, arguments, variables)
    code = server.poll(pid)  # None while it runs, minus the signal's number if it was killed
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parents[1] / "train.py"
_PRELOADED = (
    "torchvision.transforms.v2",
    "torch.utils.data",
    "lockstep.report.milestones",
    "lockstep.training.memory",
    "lockstep.data.loader",
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

    def start(self, folder: Path, arguments: list[str], variables: dict[str, str]) -> int:
        """Start train.py in a folder, in a session of its own; it writes to output.txt there. Returns its pid."""
        return self._ask({"folder": str(folder), "arguments": arguments, "variables": variables})

    def poll(self, pid: int) -> int | None:
        """The exit code, once, or None."""
        return self._ask({"pid": pid})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _become_train(request: dict[str, Any]) -> None:
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, target in ((0, nothing), (1, output), (2, output)):
        os.dup2(target, number)
    sys.argv = [str(PROGRAM), *request["arguments"]]
    runpy.run_path(str(PROGRAM), run_name="__main__")


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
            return _become_train(request)
        else:
            print(pid, flush=True)


if __name__ == "__main__":
    serve()
