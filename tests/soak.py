"""Kill a training with SIGKILL at random moments until it is finished, and compare it with one that was left alone.

    python tests/soak.py --kills 100 --seed 0        # or: make soak

A round starts the same command again and again, each time on a number of processes drawn by lot: kills it a few times,
then lets it finish. What it must equal, bit for bit, was made by one process. Most rounds are forked from a process
that has imported torch already, which leaves out the seconds in which nothing can go wrong; the others are started by
`accelerate launch`. What a training is doing is read off its run folder, so that nothing in it is changed.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from fork_server import ForkServer, rank_variables
from programs import environment, launch_command
from runs import differences

# 20 steps in 4 epochs on half of the digits; the other half is for validation, so that it takes as long as an epoch.
STEPS, STEPS_PER_EPOCH = 20, 5
TINY = (
    "--run.name=tiny",
    "--model.name=tiny_cnn",
    "--data.val_fraction=0.5",
    "--train.batch_size=128",
    "--train.micro_batch_size=32",
    "--train.epochs=4",
    "--checkpoint.every_epochs=1",
    "--train.ema_decay=0.9",
    "--augment.mixup=0.2",
    "--schedule.name=plateau",
    "--checkpoint.every_steps=2",
    "--runtime.threads=1",
    "--runtime.rendezvous_seconds=10",
    "--log.every_steps=1",
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
)
STREAMED = ("--data.memory_budget=0", "--data.workers=1", "--augment.mean=[0.3]", "--augment.std=[0.4]")
BF16 = ("--runtime.precision=bf16",)
ANY_NUMBER = (1, 2, 3, 4)
"""Of processes: a step has 4 microbatches, so that 3 processes have uneven shares of it"""
PHASES = ("start-up", "step", "save", "evaluation", "end")
FINISH_SECONDS = 240.0
LEAVE_SECONDS = 90.0
"""What is left after a kill must be gone by then: ranks that lost their launcher save first"""


ACCUSATION = "ranks wait for|no sign of life"


@dataclass(frozen=True)
class Form:
    """A way to start the tiny run."""

    processes: tuple[int, ...] = ANY_NUMBER
    """Each start takes one of these numbers by lot"""
    launcher: bool = False
    settings: tuple[str, ...] = ()

    @property
    def alone(self) -> "Form":
        """The way to make what its runs are compared with."""
        return Form((1,), settings=self.settings)


FORMS = {
    "elastic": Form(),
    "elastic in bf16": Form(settings=BF16),
    "elastic with workers": Form(settings=STREAMED),
    "four": Form((4,)),  # DDP deals its buckets anew after the first step of each start
    "launched": Form(launcher=True),
    "launched pair in bf16": Form((2,), launcher=True, settings=BF16),
}


@dataclass(frozen=True)
class Kill:
    """What was killed, out of how many processes, and what the training was doing."""

    victim: str
    phase: str
    processes: int


@dataclass
class Round:
    """What happened to one training until it was finished."""

    run: Path
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0
    """Of the last start"""


# ---- starting


class Training:
    """One start of a form in a folder of its own, which is the working directory of all its processes and no other."""

    def __init__(
        self, form: Form, place: Path, server: ForkServer, *more: str, moments: random.Random | None = None
    ) -> None:
        """`moments` draw the number of processes; without it, the form's first one counts."""
        processes = moments.choice(form.processes) if moments else form.processes[0]
        self.processes, self.place, self.run = processes, place, place / "runs" / "tiny"
        self._server = server
        self._strays, self._starts = set(_strays(self.run)), _starts(self.run)
        place.mkdir(parents=True, exist_ok=True)
        self._begun = time.monotonic()
        arguments = [*TINY, *form.settings, f"--data.cache_dir={place / 'cache'}", *more]
        self._popen: subprocess.Popen[bytes] | None = None
        self._codes: dict[psutil.Process, int | None] = {}  # of the ranks that were forked
        if form.launcher:
            with (place / "output.txt").open("ab") as output:
                command = [*launch_command(processes, "train.py"), *arguments]
                self._popen = subprocess.Popen(
                    command, cwd=place, env=environment(), stdout=output, stderr=output, start_new_session=True
                )
        else:
            for variables in rank_variables(processes):
                self._codes[psutil.Process(server.start(place, arguments, environment(**variables)))] = None
                self._begun = time.monotonic()  # the server's own start does not count

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    @property
    def is_running(self) -> bool:
        if self._popen is not None:
            return self._popen.poll() is None
        return bool(self._forked())

    def _forked(self) -> list[psutil.Process]:
        """The forked ranks that run."""
        for process, code in self._codes.items():
            if code is None:
                self._codes[process] = self._server.poll(process.pid)
        return [process for process, code in self._codes.items() if code is None]

    @property
    def launcher(self) -> psutil.Process | None:
        return None if self._popen is None else psutil.Process(self._popen.pid)

    @property
    def ranks(self) -> list[psutil.Process]:
        if self._popen is None:
            return self._forked()
        return [process for process in processes_in(self.place) if _is_rank(process)]

    def phase(self) -> str:
        """One of PHASES, from what lies in the run folder."""
        if _starts(self.run) <= self._starts:
            return "start-up"
        if set(_strays(self.run)) - self._strays:
            return "save"
        last = last_line(self.run)
        if last.get("split") == "test":
            return "end"
        waits = last.get("split") == "train" and last["step"] % STEPS_PER_EPOCH == 0
        return "evaluation" if waits or (last.get("split") == "val" and last["step"] == STEPS) else "step"

    def finish(self) -> int:
        """Wait for its end; returns the exit code, after which no process may be left."""
        while self.is_running:
            if self.seconds > FINISH_SECONDS:
                self.kill()
                raise AssertionError(f"not finished after {FINISH_SECONDS:.0f} s: {self.output()}")
            time.sleep(0.02)
        self.leave()
        codes = [self._popen.returncode] if self._popen else [code or 0 for code in self._codes.values()]
        return max(codes, key=abs)

    def leave(self) -> None:
        """Wait until nothing of this run is left; what stays is an orphan."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while left := self._left():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {LEAVE_SECONDS:.0f} s: {left}: {self.output()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL to everything."""
        while left := self._left():
            for process in left:
                send(process, signal.SIGKILL)
            time.sleep(0.005)

    def output(self) -> str:
        """The end of what all starts in this folder have printed."""
        return (self.place / "output.txt").read_text(errors="replace")[-3000:]

    def _left(self) -> list[psutil.Process]:
        if self._popen is not None:
            self._popen.poll()  # or a zombie would stay
        return list({*self._forked(), *processes_in(self.place)})


# ---- looking


def processes_in(place: Path) -> list[psutil.Process]:
    """All processes on this machine that work in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(place) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _is_rank(process: psutil.Process) -> bool:
    """Whether a launcher started it; workers are further down."""
    try:
        command, above = " ".join(process.cmdline()), " ".join(psutil.Process(process.ppid()).cmdline())
    except psutil.Error:
        return False
    return "train.py" in command and "accelerate.commands" not in command and "accelerate.commands" in above


def send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def _strays(run: Path) -> Iterator[tuple[str, int]]:
    for path in (run / "checkpoints").glob(".tmp_step_*"):
        try:
            yield path.name, path.stat().st_ino
        except FileNotFoundError:
            continue


def _starts(run: Path) -> int:
    path = run / "environment.json"
    return len(json.loads(path.read_bytes())) if path.exists() else 0


def last_line(run: Path) -> dict[str, Any]:
    """The last whole record of a file that may be growing."""
    path = run / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(whole[-1]) if whole else {}


# ---- killing


@dataclass(frozen=True)
class Plan:
    """How often a training is to be killed, and when."""

    kills: int
    moments: random.Random
    usual_seconds: float
    """Of one process"""
    victims: Sequence[str]
    """all, launcher or rank, in turn; all where there is no such thing"""


def strike(training: Training, plan: Plan, victim: str) -> Kill | None:
    """Kill at a moment that is random over the usual duration or within a save or an evaluation, or at the end.

    None if it was too late.
    """
    moments = plan.moments
    aim = moments.choice((None, None, "save", "evaluation"))
    moment = moments.uniform(0, plan.usual_seconds * (1 + training.processes) / 2)
    while training.is_running and (phase := training.phase()) != "end":
        if training.seconds >= moment if aim is None else phase == aim:
            break
        if training.seconds > FINISH_SECONDS:
            training.kill()
            raise AssertionError(f"not finished after {FINISH_SECONDS:.0f} s: {training.output()}")
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.01) if aim else 0)
    if not training.is_running:
        return None
    ranks = training.ranks
    if victim == "launcher" and training.launcher:
        send(training.launcher, signal.SIGKILL)
    elif victim == "rank" and len(ranks) > 1:
        send(moments.choice(ranks), signal.SIGKILL)
    else:
        victim = "all"
        training.kill()
    phase = training.phase()
    training.leave()
    return Kill(victim, phase, training.processes)


def run_until_finished(form: Form, place: Path, server: ForkServer, plan: Plan | None = None) -> Round:
    """Start the tiny run until it is finished, killed as planned on the way."""
    done = Round(place / "runs" / "tiny")
    while True:
        training = Training(form, place, server, moments=plan.moments if plan else None)
        done.starts += 1
        try:
            if plan is not None and len(done.kills) < plan.kills:
                kill = strike(training, plan, plan.victims[len(done.kills) % len(plan.victims)])
                if kill is not None:
                    done.kills.append(kill)
                    continue
            code = training.finish()
            assert code == 0, f"exit code {code}: {training.output()}"
            done.seconds = training.seconds
            return done
        finally:
            training.kill()


# ---- the long version


@dataclass
class Soak:
    """Rounds of all forms, and what they came to."""

    place: Path
    seed: int
    server: ForkServer
    rounds: list[Round] = field(default_factory=list)
    failures: int = 0
    _references: dict[tuple[str, ...], Round] = field(default_factory=dict)

    @property
    def hits(self) -> list[Kill]:
        return [kill for done in self.rounds for kill in done.kills]

    def run_round(self, kills: int) -> None:
        """One run of a form drawn by lot, killed up to so many times; prints a line."""
        number = len(self.rounds) + self.failures
        moments = random.Random(self.seed * 1000 + number)
        # Starts by the launcher take ten times as long, so the others come twice as often.
        name = moments.choice([name for name, form in FORMS.items() for _ in range(1 if form.launcher else 2)])
        form = FORMS[name]
        if form.settings not in self._references:
            place = self.place / f"reference {len(self._references)}"
            self._references[form.settings] = run_until_finished(form.alone, place, self.server)
        reference = self._references[form.settings]
        plan = Plan(min(moments.randint(2, 6), kills), moments, reference.seconds, ("all", "launcher", "rank"))
        try:
            done = run_until_finished(form, self.place / f"round {number}", self.server, plan)
            wrong = differences(done.run, reference.run)
            assert not wrong, "; ".join(wrong)
            output = (done.run.parents[1] / "output.txt").read_text(errors="replace")
            assert not re.search(ACCUSATION, output), f"a process was accused that did not stand still: {output}"
        except AssertionError as error:
            self.failures += 1
            print(f"round {number} ({name}) DIFFERS: {error}", flush=True)
            return
        self.rounds.append(done)
        story = ", ".join(f"{kill.victim} of {kill.processes} in {kill.phase}" for kill in done.kills)
        print(f"round {number} ({name}): equal after kills of {story or 'nothing'}", flush=True)

    def summary(self) -> str:
        phases, victims = Counter(kill.phase for kill in self.hits), Counter(kill.victim for kill in self.hits)
        where = ", ".join(f"{phases[phase]} in {phase}" for phase in PHASES)
        what = ", ".join(f"{victims[victim]} {victim}" for victim in ("all", "launcher", "rank"))
        sizes = Counter(kill.processes for kill in self.hits)
        among = ", ".join(f"{sizes[size]} of {size}" for size in ANY_NUMBER)
        starts = sum(done.starts for done in self.rounds)
        return (
            f"{len(self.hits)} kills ({where}; {what}; {among} processes) of {len(self.rounds)} runs in {starts} "
            f"starts: all as if never killed, no process accused; {self.failures} other runs"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ForkServer(environment(OMP_NUM_THREADS="1")) as server:
        soak = Soak(Path(folder).resolve(), options.seed, server)
        while len(soak.hits) < options.kills and soak.failures < 3:
            soak.run_round(options.kills - len(soak.hits))
        print(f"{soak.summary()}; {time.monotonic() - begun:.0f} s", flush=True)
    return 0 if soak.failures == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
