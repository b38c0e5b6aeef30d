"""Let one of several processes stand still, and see that it is named, that all end, and that the same command goes on.

    python tests/stalls.py --stalls 20 --seed 0        # of each kind; needs root for `disk` and `node`

A process is stopped by SIGSTOP; the disk of the run is frozen; a process takes a branch that the others do not take; a
node (a network namespace) loses its network and dies. Which process, and when, is drawn by lot.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fork_server import ForkServer, rank_variables
from programs import ROOT, environment
from runs import differences
from soak import TINY, Form, last_line, processes_in, run_until_finished, send

PROCESSES, STUCK_SECONDS = 3, 10
# Steps enough for a stall to come before the end, and a line a step.
SETTINGS = (*TINY, f"--runtime.stuck_seconds={STUCK_SECONDS}")
NAMED_WITHIN_SECONDS = 10.0
ENDED_WITHIN_SECONDS = 30.0
# Becomes train.py with a process that asks the others something at one step, and they do not.
BRANCH = """
import os, runpy, sys
from lockstep.launch.preemption import Preemption

train, rank, step = sys.argv.pop(1), *map(int, sys.argv.pop(1).split(","))
agreed, calls = Preemption.agreed, 0


def unequal(self, *, wait=False):
    global calls
    calls += 1
    if calls == step and int(os.environ["RANK"]) == rank:
        self._launch.gather("is anybody there?")
    return agreed(self, wait=wait)


Preemption.agreed = unequal
sys.argv[0] = train
runpy.run_path(train, run_name="__main__")
"""


@dataclass
class Trial:
    """One run that stands still, in a folder of its own."""

    place: Path
    server: ForkServer
    draws: random.Random
    pids: dict[int, int] = field(default_factory=dict)
    """By rank, of those that were forked"""
    codes: dict[int, int] = field(default_factory=dict)
    """By rank, of those that have ended"""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.place / "runs" / "tiny"

    def start(self, *wrapper: str) -> None:
        """Start all ranks; `wrapper` is a program around train.py, and its arguments."""
        self.place.mkdir(exist_ok=True)
        program = Path(wrapper[0]) if wrapper else ROOT / "train.py"
        arguments = [*wrapper[1:], *SETTINGS, f"--data.cache_dir={self.place / 'cache'}"]
        for rank, variables in enumerate(rank_variables(PROCESSES)):
            self.pids[rank] = self.server.start(self.place, arguments, environment(**variables), program)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while last_line(self.run).get("step", 0) < step:
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.001)

    def output(self) -> str:
        return (self.place / "output.txt").read_text(errors="replace")

    def seconds_until(self, sign: str, longest: float) -> tuple[float, str]:
        """How long it takes until a line that matches is printed, and the line."""
        begun = time.monotonic()
        while not (found := re.search(f"^.*{sign}.*$", self.output(), re.MULTILINE)):
            assert time.monotonic() - begun < longest, f"no line like {sign!r} in {longest:.0f} s: {self.output()}"
            time.sleep(0.02)
        return time.monotonic() - begun, found[0]

    def ends(self, ranks: list[int]) -> None:
        """These must end by themselves, with code 1."""
        deadline = time.monotonic() + ENDED_WITHIN_SECONDS
        for rank in ranks:
            while not self._has_ended(rank):
                assert time.monotonic() < deadline, f"rank {rank} has not ended: {self.output()}"
                time.sleep(0.02)
            assert self.codes[rank] == 1, f"rank {rank} ended with code {self.codes[rank]}: {self.output()}"

    def _has_ended(self, rank: int) -> bool:
        if rank not in self.codes and (code := self.server.poll(self.pids[rank])) is not None:
            self.codes[rank] = code
        return rank in self.codes

    def kill(self) -> None:
        """Whatever is left."""
        while left := processes_in(self.place):
            for process in left:
                send(process, signal.SIGKILL)
            time.sleep(0.01)
        for process in self.started:
            process.wait()
        while not all(map(self._has_ended, self.pids)):
            time.sleep(0.01)


def stopped(trial: Trial) -> float:
    """SIGSTOP to any rank; returns the seconds until it is named."""
    trial.start()
    victim = trial.draws.randrange(PROCESSES)
    trial.wait_for_step(trial.draws.randint(1, 12))
    os.kill(trial.pids[victim], signal.SIGSTOP)
    seconds, _ = trial.seconds_until(rf"no sign of life .* from rank {victim} \(", 2 * NAMED_WITHIN_SECONDS)
    trial.seconds_until(
        rf"error: no sign of life .* from rank {victim} .*stuck_seconds={STUCK_SECONDS}", ENDED_WITHIN_SECONDS
    )
    trial.ends([rank for rank in range(PROCESSES) if rank != victim])
    return seconds


def frozen_disk(trial: Trial) -> float:
    """The disk of the run folder stops in the middle of a training: rank 0, which writes, is named."""
    with _disk(trial.place) as disk:
        trial.start()
        trial.wait_for_step(trial.draws.randint(1, 12))
        subprocess.run(["fsfreeze", "--freeze", str(disk)], check=True)
        try:
            seconds, line = trial.seconds_until(r"2 of 3 ranks wait for rank 0 \(", 2 * NAMED_WITHIN_SECONDS)
            assert re.search(r"rank 0 \(\S+ \[\d+ s in (save|log|evaluation) of step \d+, at \S+:\d+ ", line), line
            trial.seconds_until(f"error: .*stuck_seconds={STUCK_SECONDS}", ENDED_WITHIN_SECONDS)
            trial.ends([1, 2])
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", str(disk)], check=True)
        trial.ends([0])  # which no signal can end before
        trial.kill()
        goes_on(trial)
    return seconds


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[Path]:
    """`runs` on a file system of its own."""
    place.mkdir()
    image, disk = place / "disk.img", place / "runs"
    disk.mkdir()
    image.write_bytes(bytes(16 << 20))
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def unequal_branch(trial: Trial) -> float:
    """A rank asks, and the others do not answer: they wait for one another."""
    trial.place.mkdir()
    victim, call = trial.draws.randrange(PROCESSES), trial.draws.randint(2, 12)
    wrapper = trial.place / "branch.py"
    wrapper.write_text(BRANCH)
    trial.start(str(wrapper), str(ROOT / "train.py"), f"{victim},{call}")
    trial.wait_for_step(call - 1)
    seconds, line = trial.seconds_until(r"all ranks wait for one another", 2 * NAMED_WITHIN_SECONDS)
    assert re.search(rf"rank {victim} \(\S+ \[\d+ s in loop of step {call - 1}, at \S+:\d+ all_gather", line), line
    assert re.search(
        r"rank \d \(\S+ and rank \d \(\S+ \[\d+ s in (gradient exchange|question whether to stop) of step", line
    ), line
    trial.seconds_until(f"error: all ranks wait.*stuck_seconds={STUCK_SECONDS}", ENDED_WITHIN_SECONDS)
    trial.ends(list(range(PROCESSES)))
    return seconds


def dead_node(trial: Trial) -> float:
    """The last rank is on a node of its own, whose network goes down before it dies: no word reaches the others."""
    trial.place.mkdir()
    with _node(trial.draws.randrange(1, 250)) as (name, address, links):
        ranks = rank_variables(PROCESSES)
        for rank, variables in enumerate(ranks):
            inside = ["ip", "netns", "exec", name] if rank == PROCESSES - 1 else []
            variables |= {"MASTER_ADDR": address, "GLOO_SOCKET_IFNAME": links[bool(inside)]}
            arguments = [*SETTINGS, f"--data.cache_dir={trial.place / 'cache'}"]
            with (trial.place / "output.txt").open("ab") as output:
                command = [*inside, sys.executable, str(ROOT / "train.py"), *arguments]
                process = subprocess.Popen(
                    command, cwd=trial.place, env=environment(**variables), stdout=output, stderr=output
                )
            trial.started.append(process)
        trial.wait_for_step(trial.draws.randint(1, 12))
        subprocess.run(["ip", "-n", name, "link", "set", links[1], "down"], check=True)
        *others, victim = trial.started
        victim.kill()
        sign = rf"no sign of life .* from rank {PROCESSES - 1} \("
        seconds, _ = trial.seconds_until(sign, 2 * NAMED_WITHIN_SECONDS)
        trial.seconds_until(f"error: {sign}.*stuck_seconds={STUCK_SECONDS}", ENDED_WITHIN_SECONDS)
        assert [process.wait(ENDED_WITHIN_SECONDS) for process in others] == [1] * len(others), trial.output()
    return seconds


@contextlib.contextmanager
def _node(number: int) -> Iterator[tuple[str, str, tuple[str, str]]]:
    """A network namespace with a cable to this one: its name, this side's address, and both ends of the cable."""
    name, near, far = f"stall{os.getpid()}", f"near{os.getpid()}", f"far{os.getpid()}"
    commands = f"""
        netns add {name}
        link add {near} type veth peer name {far} netns {name}
        address add 10.77.{number}.1/24 dev {near}
        -n {name} address add 10.77.{number}.2/24 dev {far}
        link set {near} up
        -n {name} link set {far} up
    """
    try:
        for command in filter(None, map(str.split, commands.splitlines())):
            subprocess.run(["ip", *command], check=True)
        yield name, f"10.77.{number}.1", (near, far)
    finally:
        subprocess.run(["ip", "link", "delete", near], check=False)
        subprocess.run(["ip", "netns", "delete", name], check=False)


def goes_on(trial: Trial) -> None:
    """The same command finishes the run."""
    trial.server.run(PROCESSES, trial.place, *SETTINGS, f"--data.cache_dir={trial.place / 'cache'}")


STALLS = {"stop": stopped, "disk": frozen_disk, "branch": unequal_branch, "node": dead_node}


def stall(kind: str, place: Path, reference: Path, server: ForkServer, draws: random.Random) -> float:
    """Let one run stand still and finish it; returns the seconds until a line said who.

    Raises AssertionError if nobody was named, if a process did not end, or if the run became another one.
    """
    trial = Trial(place, server, draws)
    try:
        seconds = STALLS[kind](trial)
    finally:
        trial.kill()
    if kind != "disk":
        goes_on(trial)
        wrong = differences(trial.run, reference)
        assert not wrong, "; ".join(wrong)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stalls", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", default=list(STALLS), choices=list(STALLS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws, failures = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder, ForkServer(environment(OMP_NUM_THREADS="1")) as server:
        place = Path(folder).resolve()
        reference = run_until_finished(Form((1,)), place / "reference", server).run
        for kind in options.kinds:
            named: list[float] = []
            for number in range(options.stalls):
                try:
                    named.append(stall(kind, place / f"{kind} {number}", reference, server, draws))
                except AssertionError as error:
                    failures += 1
                    print(f"{kind} {number}: {error}", flush=True)
            slowest = f", the slowest after {max(named):.1f} s" if named else ""
            print(f"{kind}: {len(named)} of {options.stalls} named and continued{slowest}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
