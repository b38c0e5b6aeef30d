"""What a run writes down: metrics.jsonl, its copies in W&B and TensorBoard, and the lines or the bar on the console.

metrics.jsonl is the source of truth and the only one whose failure ends training. A copy that fails is dropped with
one warning line. Records are dictionaries like
`{"step": 150, "epoch": 4, "position": 9600, "split": "train", "loss": 0.12, "accuracy": 0.961, "lr": 0.001}`:
`epoch` counts from 1 (or is a fraction of epochs completed), `accuracy` is a share in [0, 1], and `split` is train,
val or test. Any other field is kept too; numbers become scalars named `<split>/<field>`.
"""

import contextlib
import copy
import io
import json
import math
import os
import platform
import secrets
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lockstep.settings.config import Config

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn
    from tqdm import tqdm

# An unreachable W&B server must not hold up training, nor its end, for longer than this.
WANDB_INIT_SECONDS = 30.0
WANDB_FINISH_SECONDS = 120.0

_PACKAGES = ("torch", "torchvision", "accelerate", "timm", "datasets", "numpy", "wandb")
_AXES = ("step", "epoch", "position")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


# ---- Files -----------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by `replace_file`.

    NaN and infinities become the strings "NaN", "Infinity" and "-Infinity".
    """
    replace_file(path, (json.dumps(_plain(value), indent=2) + "\n").encode())


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """All records of `<run_dir>/metrics.jsonl` in order; empty if there is none, without a line cut off by a crash.

    Non-finite numbers come back as floats.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [record for record in map(_parse, lines) if record is not None]


def truncate_history(run_dir: Path, step: int) -> None:
    """Cut metrics.jsonl back to `step`: drop later records and a half-written line, atomically; 0 drops everything."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    old = path.read_bytes()
    kept = []
    for line in old.splitlines():
        record = _parse(line)
        # A test line at this step was written after its checkpoint, and will be written again.
        if record is not None and 0 < step and record.get("step", 0) <= step and record.get("split") != "test":
            kept.append(line + b"\n")
    if (new := b"".join(kept)) != old:
        replace_file(path, new)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file such that a reader, or a crash, sees the old one or the whole new one.

    Raises OSError, naming the file, when the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")  # the same after a kill: the next writer takes it over
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk comes without a name
    finally:
        aside.unlink(missing_ok=True)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    return {key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def _plain(value: Any) -> Any:
    """The value in JSON's own types; tensors and arrays as numbers or lists, non-finite floats as strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The fields that are single numbers; 0-d tensors and arrays count, flags and texts do not."""
    items = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in values.items()}
    return {key: item for key, item in items.items() if isinstance(item, int | float) and not isinstance(item, bool)}


# ---- Copies ----------------------------------------------------------------------------------------------------------


class _Sink(Protocol):
    """A place that gets a copy; it may raise anything at any time."""

    name: str

    def scalars(self, step: int, axes: dict[str, float], values: dict[str, float]) -> None: ...
    def histogram(self, step: int, name: str, values: "np.ndarray") -> None: ...
    def image(self, step: int, name: str, path: Path) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def graph(self, model: "nn.Module", images: "torch.Tensor") -> None: ...
    def close(self, summary: dict[str, Any], exit_code: int) -> None: ...


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, config: Config, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._config = config
        # TensorBoard hides what earlier event files hold from purge_step on: no point is drawn twice after a restart.
        purge_step = resume_step + 1 if resume_step else 0
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def scalars(self, step: int, axes: dict[str, float], values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def histogram(self, step: int, name: str, values: "np.ndarray") -> None:
        self._writer.add_histogram(name, values, global_step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), global_step=step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, global_step=step)

    def graph(self, model: "nn.Module", images: "torch.Tensor") -> None:
        # A copy on the CPU: tracing must not touch the running statistics, the device or its memory.
        self._writer.add_graph(copy.deepcopy(model).cpu().eval(), images[:1].detach().cpu())

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        if summary.get("state", "finished") == "finished" and exit_code == 0:
            settings = {
                f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
                for section, values in asdict(self._config).items()
                for key, value in values.items()
            }
            final = {f"final/{key}": value for key, value in _numbers(summary).items()}
            self._writer.add_hparams(settings, final, run_name=".")
        self._writer.close()


class _Wandb:
    name = "W&B"

    def __init__(self, run: Any) -> None:
        self._run = run
        # W&B drops points whose own step counter goes back, as after a restart. An axis of ours has no such rule.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def scalars(self, step: int, axes: dict[str, float], values: dict[str, float]) -> None:
        self._run.log({**axes, **values, "step": step})

    def histogram(self, step: int, name: str, values: "np.ndarray") -> None:
        import numpy as np
        import wandb

        self._run.log({"step": step, name: wandb.Histogram(np_histogram=np.histogram(values, bins=64))})

    def image(self, step: int, name: str, path: Path) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Image(str(path))})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.summary[name] = text

    def graph(self, model: "nn.Module", images: "torch.Tensor") -> None:
        """W&B has no picture of a network."""

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        def finish() -> None:
            self._run.summary.update(summary)
            self._run.finish(exit_code=exit_code)

        try:
            _within(1.25 * WANDB_FINISH_SECONDS, finish)  # W&B's own limit comes first, if it works
        except TimeoutError:
            _abandon_wandb()
            raise


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Run an action that may hang; raises what it raises, or TimeoutError."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no end after {seconds:.0f} seconds")
    if errors:
        raise errors[0]


def _abandon_wandb() -> None:
    """End W&B's own process, for which Python would wait at its exit without limit; what it has written is on disk."""
    import psutil
    import wandb

    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb-core"):
            child.kill()
    with contextlib.suppress(Exception, SystemExit):  # it complains about the end of that process
        wandb.teardown()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started within it never get the signals by which a scheduler stops every process of a job.

    They would die of them at once, with what they still hold in memory; this process tells them when it ends.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_wandb(config: Config, run_dir: Path, environment: dict[str, Any] | None, say: Callable[[str], None]) -> Any:
    """The W&B run of this run folder, or None where W&B is switched off; offline where online is not possible."""
    import wandb

    wanted = config.log.wandb
    quiet: dict[str, Any] = {"silent": True, "console": "off"}
    forced: dict[str, Any] = {} if wanted == "auto" else {"mode": wanted}
    session = wandb.setup(wandb.Settings(**quiet, **forced)).settings
    if session.mode == "disabled":  # auto, and WANDB_MODE=disabled
        return None
    options: dict[str, Any] = {
        "id": _wandb_id(run_dir, session.run_id),
        "resume": "allow",
        "dir": str(run_dir),
        "name": run_dir.name,
        "project": config.log.project,
        "group": config.run.group,
        "tags": config.run.tags,
        "notes": config.run.notes,
        "config": {**asdict(config), "environment": _plain(environment or {})},
        "allow_val_change": True,
        "settings": wandb.Settings(**quiet, init_timeout=WANDB_INIT_SECONDS, finish_timeout=WANDB_FINISH_SECONDS),
    }
    if session.mode not in ("offline", "dryrun"):  # WANDB_MODE and `wandb offline` count where the flag says auto
        try:
            # Only with an API key at hand: wandb.init would ask for one.
            if wandb.login(verify=False, prompt=False):
                run = wandb.init(mode="online", **options)
                say(f"W&B: {run.url}")
                return run
            if wanted == "online":
                say("warning: W&B has no API key: going on offline; run `wandb login` once to log online")
        except Exception as error:
            say(f"warning: W&B is not reachable ({_first_line(error)}); going on offline")
            wandb.teardown()  # the half-open run keeps its id taken until then
    run = wandb.init(mode="offline", **options)
    say(f"W&B: offline, to be uploaded with: wandb sync {run_dir / 'wandb'}/offline-run-*")
    return run


def _wandb_id(run_dir: Path, given: str | None) -> str:
    """The id of the run's one W&B run: the stored one, else the one a sweep agent gave, else a new one; stored."""
    path = run_dir / "wandb" / "run_id"
    if path.exists() and (stored := path.read_text().strip()):
        return stored
    fresh = given or secrets.token_hex(4)
    replace_file(path, fresh.encode())
    return fresh


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- Console ---------------------------------------------------------------------------------------------------------


class _Console:
    """A progress bar on a terminal, a line per record elsewhere."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._total_steps: int | None = None
        self._bar: tqdm | None = None

    def start(self, total_steps: int, step: int) -> None:
        self._total_steps = total_steps
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, record: dict[str, Any]) -> None:
        if self._bar is not None and record.get("split") == "train":
            self._bar.set_postfix_str(self._line(record, bar=True), refresh=False)
        else:
            self.say(self._line(record))

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, record: dict[str, Any], *, bar: bool = False) -> str:
        """`step 150/450  epoch 4/12  loss 0.1230  accuracy 96.1 %  lr 0.00095  5,412 images/s`; a bar has the step."""
        total = "" if self._total_steps is None else f"/{self._total_steps}"
        if "best_step" in record:  # whose weights were tested
            record = {**record, "step": record["best_step"], "epoch": None}
        shown = {
            "step": f"step {{}}{total}",
            "epoch": f"epoch {{:.4g}}/{self._epochs}",
            "loss": "loss {:.4f}",
            "accuracy": "accuracy {:.1%}",
            "lr": "lr {:.3g}",
            "bad_steps": "bad steps skipped: {}",
            "images_per_second": "{:,.0f} images/s",
        }
        parts = [
            form.format(record[key]).replace("%", " %")
            for key, form in shown.items()
            if record.get(key) is not None and not (bar and key == "step")
        ]
        split = record.get("split", "train")
        return "  ".join(parts if split == "train" else [f"{split:<5}", *parts])


# ---- Tracker ---------------------------------------------------------------------------------------------------------


class Tracker:
    """Everything a run writes down; made by `build_tracker`. On a process that is not main all methods do nothing."""

    def __init__(
        self, run_dir: Path, console: _Console | None = None, sinks: Sequence[_Sink] = (), *, step: int = 0
    ) -> None:
        self._step = step
        self._path = run_dir / "metrics.jsonl"
        self._console = console
        self._sinks = list(sinks)
        # Unbuffered: a record is in the hands of the operating system when log returns, whatever happens then.
        self._file = None if console is None else open(self._path, "ab", buffering=0)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self._console is not None

    def start(self, total_steps: int, step: int) -> None:
        """Begin the progress display: `step` of `total_steps` are done."""
        if self._console is not None:
            self._console.start(total_steps, step)

    def advance(self, step: int) -> None:
        """Move the progress display; cheap enough for every step."""
        if self._console is not None:
            self._console.advance(step)

    def say(self, text: str) -> None:
        """Print one line, without breaking the bar."""
        if self._console is not None:
            self._console.say(text)

    def log(self, record: dict[str, Any]) -> None:
        """Append one record (see the module's text) to metrics.jsonl, copy its numbers, and show it.

        `train_val_loss_ratio` keeps its plain name in the copies. Raises OSError, naming the file, if it cannot be
        written: a full disk.
        """
        if self._file is None:
            return
        try:
            self._file.write((json.dumps(_plain(record)) + "\n").encode())
        except OSError as error:
            raise OSError(error.errno, f"cannot write metrics: {error.strerror}", str(self._path)) from error
        numbers = _numbers(record)
        self._step = int(numbers.get("step", self._step))
        axes = {key: numbers.pop(key) for key in _AXES if key in numbers}
        split = record.get("split", "train")
        values = {key if key == "train_val_loss_ratio" else f"{split}/{key}": value for key, value in numbers.items()}
        self._each(lambda sink: sink.scalars(self._step, axes, values))
        if self._console is not None:
            self._console.show(record)

    def histograms(self, step: int, tensors: dict[str, "torch.Tensor"]) -> None:
        """Copy the distribution of each tensor (any shape) to W&B and TensorBoard, without its NaN and infinities."""
        import numpy as np

        for name, tensor in tensors.items() if self._sinks else ():
            values = tensor.detach().float().flatten().cpu().numpy()
            values = values[np.isfinite(values)]
            if values.size:
                self._each(lambda sink, name=name, values=values: sink.histogram(step, name, values))  # type: ignore[misc]

    def figure(self, name: str, path: Path) -> None:
        """Copy a PNG file to W&B and TensorBoard, at the step of the last record."""
        self._each(lambda sink: sink.image(self._step, name, path))

    def text(self, name: str, text: str) -> None:
        """Copy a text (Markdown in TensorBoard) to W&B and TensorBoard."""
        self._each(lambda sink: sink.text(self._step, name, text))

    def graph(self, model: "nn.Module", images: "torch.Tensor") -> None:
        """Draw the unwrapped network in TensorBoard, traced with the first image of (N, C, H, W); never fatal.

        The model, its running statistics and all random generators are left as they were.
        """
        for sink in self._sinks:
            try:
                with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    sink.graph(model, images)
            except Exception as error:
                self.say(f"note: no graph of the network in {sink.name} ({_first_line(error)})")

    def finish(self, summary: dict[str, Any], *, exit_code: int = 0) -> None:
        """Hand the final metrics to the copies and close everything; takes a limited time, may be called twice.

        `exit_code` other than 0 marks the W&B run as failed. TensorBoard's table of settings and final metrics is
        written when `summary["state"]` is absent or "finished".
        """
        self._each(lambda sink: sink.close(summary, exit_code))
        self._sinks.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._console is not None:
            self._console.close()

    def _each(self, action: Callable[[_Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                self._sinks.remove(sink)
                self.say(f"warning: {sink.name} stopped ({_first_line(error)}); metrics.jsonl goes on without it")


def _open_sinks(
    config: Config, run_dir: Path, resume_step: int, environment: dict[str, Any] | None, say: Callable[[str], None]
) -> list[_Sink]:
    sinks: list[_Sink] = []
    try:
        if config.log.tensorboard:
            sinks.append(_TensorBoard(config, run_dir, resume_step))
    except Exception as error:
        say(f"warning: TensorBoard is off ({_first_line(error)})")
    try:
        # "disabled" must not even import wandb
        if config.log.wandb != "disabled":
            with _signals_held():  # W&B's own process would not wait for the end of the step
                run = _start_wandb(config, run_dir, environment, say)
            if run:
                sinks.append(_Wandb(run))
    except Exception as error:
        say(f"warning: W&B is off ({_first_line(error)})")
    return sinks


def build_tracker(
    config: Config, run_dir: Path, is_main: bool, resume_step: int = 0, environment: dict[str, Any] | None = None
) -> Tracker:
    """Open the run for training from `resume_step` on; what was logged after that step is dropped.

    `is_main`: false gives a tracker that does nothing, not even make a file. `environment` is appended to
    `<run_dir>/environment.json`, a list with one entry per start, and kept in the W&B config. W&B: one run for life,
    its id in `<run_dir>/wandb/run_id`; without an API key or a server it goes offline, says so, and never asks.
    """
    if not is_main:
        return Tracker(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    truncate_history(run_dir, resume_step)
    if environment is not None:
        path = run_dir / "environment.json"
        starts = json.loads(path.read_bytes()) if path.exists() else []
        write_json(path, [*starts, environment])
    console = _Console(config.train.epochs)
    sinks = _open_sinks(config, run_dir, resume_step, environment, console.say)
    return Tracker(run_dir, console, sinks, step=resume_step)


# ---- Environment -----------------------------------------------------------------------------------------------------


def describe_environment() -> dict[str, Any]:
    """Where and with what this process runs: time, command, host, git commit, versions, hardware; JSON-ready."""
    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "hostname": platform.node(),
        "system": platform.platform(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions,
        "cpu": _cpu_model(),
        "cpu_cores_owned": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _git(*arguments: str) -> str | None:
    """Output of git for the folder of this code; None without git or outside a repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
