"""The copy of a run in W&B: one W&B run for life, offline where there is no server, never a prompt.

An unreachable server, or one that hangs, holds up neither training nor its end for longer than the limits below.
"""

import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import wandb
from torch import nn

from lockstep.errors import first_line
from lockstep.evaluation.ranking import rank_class
from lockstep.files import plain, replace_file
from lockstep.run.exhibit import Artifact, Confusion, Exhibit, Gallery, Scores, Table
from lockstep.settings.config import Config

QUIET: dict[str, Any] = {"silent": True, "console": "off"}
INIT_SECONDS = 30.0
CALL_SECONDS = 60.0
FINISH_SECONDS = 120.0
_CURVE_POINTS = 200


def open_wandb(config: Config, run_dir: Path, environment: dict[str, Any] | None, say: Callable[[str], None]) -> Any:
    """The W&B run of this run folder, or None where W&B is switched off; offline where online is not possible."""
    return _open_run(config.log.wandb, run_dir, describe_run(config, run_dir, environment), say)


def open_evaluation(config: Config, folder: Path, what: str, say: Callable[[str], None]) -> Any:
    """The W&B run of one evaluation: `what` names checkpoint and split. The same again is the same W&B run.

    It stands in the training's group, or in one of the run's name, and lies in `wandb/eval`, where it does not pass
    for the training's newest part. None where W&B is switched off.
    """
    trained = folder / "wandb" / "run_id"
    of_run = trained.read_text().strip() if trained.is_file() else sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    described = describe_run(config, folder, None)
    described |= {"job_type": "eval", "name": f"{described['name']} {what}", "id": f"{of_run}-{what}"}
    described["group"] = described["group"] or folder.resolve().name
    place = folder / "wandb" / "eval"
    place.mkdir(parents=True, exist_ok=True)
    return _open_run(config.log.wandb, place, described, say)


def _open_run(wanted: str, run_dir: Path, described: dict[str, Any], say: Callable[[str], None]) -> Any:
    with _signals_held():  # W&B's own process would not wait for the end of the step
        return _open_held(wanted, run_dir, described, say)


def _open_held(wanted: str, run_dir: Path, described: dict[str, Any], say: Callable[[str], None]) -> Any:
    forced: dict[str, Any] = {} if wanted == "auto" else {"mode": wanted}
    session = wandb.setup(wandb.Settings(**QUIET, **forced)).settings
    if session.mode == "disabled":  # auto, and WANDB_MODE=disabled
        return None
    # Copies of tables and artifacts belong to the run, not into a home that may be full.
    os.environ.setdefault("WANDB_DATA_DIR", str(run_dir.resolve() / "wandb"))
    options = {
        **described,
        "id": described.get("id") or run_id(run_dir, session.run_id),
        "resume": "allow",
        "dir": str(run_dir),
        "settings": wandb.Settings(**QUIET, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS),
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
            say(f"warning: W&B is not reachable ({first_line(error)}); going on offline")
            wandb.teardown()  # the half-open run keeps its id taken until then
    run = wandb.init(mode="offline", **options)
    say(f"W&B: offline, to be uploaded with: wandb sync {run_dir / 'wandb'}/offline-run-*")
    return run


def describe_run(config: Config, run_dir: Path, environment: dict[str, Any] | None) -> dict[str, Any]:
    """What `wandb.init` is told of a training, live or later: its name, where it belongs, and its settings."""
    return {
        "name": run_dir.resolve().name,
        "project": config.log.project,
        "group": config.run.group,
        "job_type": "train",
        "tags": config.run.tags,
        "notes": config.run.notes,
        "config": {**asdict(config), "environment": plain(environment or {})},
        "allow_val_change": True,
    }


def run_id(run_dir: Path, given: str | None = None) -> str:
    """The id of the run's one W&B run: the stored one, else the one a sweep agent gave, else a new one; stored."""
    path = run_dir / "wandb" / "run_id"
    if path.exists() and (stored := path.read_text().strip()):
        return stored
    return store_run_id(run_dir, given or secrets.token_hex(4))


def store_run_id(run_dir: Path, fresh: str) -> str:
    """From now on this is the id of the run's one W&B run."""
    replace_file(run_dir / "wandb" / "run_id", fresh.encode())
    return fresh


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


class Wandb:
    """A sink: see `tracker.Sink`."""

    name = "W&B"

    def __init__(self, run: Any) -> None:
        self._run = run
        # W&B drops points whose own step counter goes back, as after a restart. An axis of ours has no such rule.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def scalars(self, step: int, axes: dict[str, float], values: dict[str, float]) -> None:
        self._log(step, lambda: {**axes, **values})

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self._log(step, lambda: {name: wandb.Histogram(np_histogram=np.histogram(values, bins=64))})

    def image(self, step: int, name: str, path: Path) -> None:
        self._log(step, lambda: {name: wandb.Image(str(path))})

    def text(self, step: int, name: str, text: str) -> None:
        _limited(CALL_SECONDS, lambda: self._run.summary.update({name: text}))

    def graph(self, model: nn.Module, images: torch.Tensor) -> None:
        """W&B has no picture of a network."""

    def exhibit(self, step: int, name: str, item: Exhibit) -> None:
        if isinstance(item, Artifact):
            _limited(CALL_SECONDS, lambda: self._keep(f"{name}-{self._run.id}", item))
        elif isinstance(item, Scores):
            self._log(step, lambda: _as_curves(item))
        else:
            self._log(step, lambda: {name: _as_media(item)})

    def alert(self, title: str, text: str) -> None:
        if not self._run.offline:  # later it would be news of the past
            _limited(CALL_SECONDS, lambda: self._run.alert(title, text))

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        def finish() -> None:
            self._run.summary.update(summary)
            self._run.finish(exit_code=exit_code)

        _limited(1.25 * FINISH_SECONDS, finish)  # W&B's own limit comes first, if it works

    def _log(self, step: int, build: Callable[[], dict[str, Any]]) -> None:
        _limited(CALL_SECONDS, lambda: self._run.log({**build(), "step": step}))

    def _keep(self, name: str, item: Artifact) -> None:
        artifact = wandb.Artifact(name, item.kind)
        for path in item.files:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact, aliases=list(item.aliases))


def _as_media(item: Table | Gallery | Confusion) -> Any:
    """What W&B draws it with."""
    if isinstance(item, Table):
        return wandb.Table(columns=list(item.columns), data=[list(row) for row in item.rows])
    if isinstance(item, Gallery):
        return [wandb.Image(image, caption=text) for image, text in zip(item.images, item.captions, strict=True)]
    return wandb.plot.confusion_matrix(
        y_true=item.labels.tolist(),
        preds=item.predicted.tolist(),
        class_names=list(item.classes),
        title="Confusion matrix",
    )


def _as_curves(item: Scores) -> dict[str, Any]:
    """W&B's own charts of precision and recall, and of the ROC, with curves of ours.

    Its functions that compute them, too, name the wrong class where one has no sample, and import pandas.
    """
    precisions, rocs = [], []
    for number, name in item.shown.items():
        ranking = rank_class(item.probabilities[:, number], item.labels == number)
        if ranking is None:
            continue
        thin = ranking.thinned(_CURVE_POINTS)
        for recall, precision, false in zip(thin.recall, thin.precision, thin.false_positive_rate, strict=True):
            precisions.append([name, float(recall), float(precision)])
            rocs.append([name, float(false), float(recall)])
    return {
        "pr_curves": _as_area(precisions, "Precision and recall", ("recall", "precision")),
        "roc_curves": _as_area(rocs, "ROC", ("false positive rate", "true positive rate")),
    }


def _as_area(rows: list[list[Any]], title: str, axes: tuple[str, str]) -> Any:
    return wandb.plot_table(
        vega_spec_name="wandb/area-under-curve/v0",
        data_table=wandb.Table(columns=["class", *axes], data=rows),
        fields={"class": "class", "x": axes[0], "y": axes[1]},
        string_fields={"title": title, "x-axis-title": axes[0], "y-axis-title": axes[1]},
    )


def _limited(seconds: float, action: Callable[[], None]) -> None:
    """Run an action of W&B that may hang; raises what it raises, or TimeoutError, and W&B's process is ended then."""
    try:
        _within(seconds, action)
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
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb-core"):
            child.kill()
    with contextlib.suppress(Exception, SystemExit):  # it complains about the end of that process
        wandb.teardown()
