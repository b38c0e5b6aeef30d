"""What happens at the milestones of a training: a line of the log, a validation, a save, a pause, the end."""

import gc
import math
import platform
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from lockstep.data.images import Data
from lockstep.data.loader import TrainLoader
from lockstep.errors import UserError
from lockstep.evaluation.probe import Probe, probe
from lockstep.launch.accelerator import Launch
from lockstep.launch.load import node_loads
from lockstep.launch.preemption import Preemption
from lockstep.lease import Lease
from lockstep.report.account import describe_account, share_of_peak
from lockstep.report.canvas import new_figure
from lockstep.report.summary import not_fatal, report_divergence, report_findings, report_pause, report_training
from lockstep.run.checkpoint import Checkpointer
from lockstep.run.digest import as_text, digest
from lockstep.run.folder import LostFolder, Run
from lockstep.run.profiler import Profiler
from lockstep.run.tracker import Tracker
from lockstep.training.batchnorm import RunningStatistics
from lockstep.training.calendar import Calendar
from lockstep.training.gradients import Gradients
from lockstep.training.learner import Learner
from lockstep.training.meter import Meter
from lockstep.training.progress import Progress
from lockstep.training.records import test_record, train_record, val_record
from lockstep.training.schedule import Schedule
from lockstep.training.stopwatch import Stopwatch


@dataclass(frozen=True, eq=False)
class Training:
    """What a training has at hand."""

    run: Run
    lease: Lease
    launch: Launch
    preemption: Preemption
    data: Data
    loader: TrainLoader
    learner: Learner
    gradients: Gradients
    statistics: RunningStatistics
    checkpointer: Checkpointer
    progress: Progress
    calendar: Calendar
    schedule: Schedule
    tracker: Tracker
    meter: Meter
    stopwatch: Stopwatch
    profiler: Profiler


def log(t: Training, lr: float, gradient_norm: Tensor) -> None:
    """A line of the log. The host waits for the device here, and nowhere else in a step."""
    weights = digest(t.learner.model, t.learner.average)  # queued on the device before anybody waits for it
    t.meter.read(t.progress)
    lap = t.stopwatch.lap()
    text = as_text(require_same_weights(t, int(weights)))
    record = train_record(t.progress, t.calendar, lr, gradient_norm.item(), text, lap)
    loads = node_loads(t.launch) if t.run.config.log.all_nodes else {}
    with t.stopwatch.errand("logging"):  # the wait for the device, above, was for its steps
        t.tracker.log(record | t.gradients.pace.read(t.launch) | loads)
    t.meter.start_window()
    if t.progress.bad_steps.in_a_row >= t.run.config.train.max_bad_steps:
        t.checkpointer.wait()
        report_divergence(t.run, t.tracker, t.progress, t.loader.sampler)


def require_same_weights(t: Training, own: int) -> int:
    """The digest, if that of every process is the same; raises UserError on all alike if one is not, and names it.

    Or LostFolder if the run folder is no longer this training's.
    Every process makes the same update from the same sums, so another digest is a fault of memory or of a device.
    """
    places = t.launch.gather((own, platform.node(), t.lease.problem()))
    if lost := next((problem for _, _, problem in places if problem), None):
        raise LostFolder(f"{t.run.path} {lost} while it was trained here: this training ends, and leaves it alone")
    counts = Counter(value for value, _, _ in places)
    if len(counts) == 1:
        return own
    t.checkpointer.wait()
    (usual, majority), *_ = counts.most_common()
    names = [f"rank {rank} ({host})" for rank, (value, host, _) in enumerate(places) if value != usual or majority == 1]
    raise UserError(
        f"{' and '.join(names)} hold{'s' * (len(names) == 1)} other weights than the rest at step {t.progress.step}, "
        "though all made the same updates: its memory or device is faulty. Nothing of it was saved; the same command "
        f"goes on from the last checkpoint in {t.run.checkpoints}"
    )


def validate(t: Training) -> None:
    """Validate, and save the weights if they are the best or the step's are due; nothing if a stop is asked for."""
    assert t.data.val is not None
    progress = t.progress
    with t.stopwatch.errand("validation"), t.learner.averaged():
        predictions = t.learner.evaluate(t.data.val, t.data.num_classes, t.preemption.wanted)
    if predictions is None:
        return
    epoch, is_last = t.calendar.epoch_of(progress.step), progress.step == t.calendar.total_steps
    competes = epoch >= t.run.config.train.best_from_epoch or (is_last and progress.best_step == 0)
    is_best = progress.judge(epoch, predictions.loss, predictions.accuracy, competes=competes)
    t.tracker.log(val_record(t.meter.read(progress), t.calendar, predictions))
    t.meter.start_epoch()
    if is_best or t.calendar.after(progress.step).save or t.calendar.is_over(progress):
        save(t, is_best=is_best)
    t.stopwatch.skip()
    t.gradients.pace.restart()


def save(t: Training, *, is_best: bool) -> None:
    """Save a checkpoint, in the background, if all processes hold the same weights."""
    require_same_weights(t, int(digest(t.learner.model, t.learner.average)))
    t.stopwatch.read()
    with t.stopwatch.errand("saving"):
        t.checkpointer.save(t.meter.read(t.progress), is_best=is_best)


def pause(t: Training) -> int:
    """Save and close a run that was asked to stop; returns the exit code."""
    t.profiler.close()
    save(t, is_best=False)
    t.checkpointer.wait(must_succeed=True)
    return report_pause(t.run, t.tracker, t.progress, t.calendar, t.preemption)


@contextmanager
def young_garbage() -> Iterator[None]:
    """Within it, collections of garbage leave alone what is there already: a walk through torch took 0.16 s."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def matplotlib_imported(*, wanted: bool) -> Iterator[None]:
    """Beside what is done within it, and when that is over: seen, two threads that import it at once find it half done.

    An error waits for the first picture.
    """
    with ThreadPoolExecutor(1) as beside:
        if wanted:
            beside.submit(new_figure, 1, 1)
        yield


@young_garbage()
def finish(t: Training) -> int:
    """Test the best weights and close the run; returns the exit code."""
    t.profiler.close()
    require_same_weights(t, int(digest(t.learner.model, t.learner.average)))
    if t.meter.read(t.progress).bad_steps.total == t.progress.step:  # fewer than max_bad_steps, but all there were
        t.checkpointer.wait()
        report_divergence(t.run, t.tracker, t.progress, t.loader.sampler)
    account = account_of(t)
    figures = t.run.config.log.figures
    with matplotlib_imported(wanted=t.launch.is_main and figures):
        seen = look(t)
        t.checkpointer.load_best()
        predictions = t.learner.evaluate(
            t.data.test, t.data.num_classes, t.preemption.wanted, with_probabilities=figures
        )
    t.stopwatch.read()
    if predictions is None:
        return report_pause(t.run, t.tracker, t.progress, t.calendar, t.preemption)
    if not math.isfinite(predictions.loss):  # of weights that are finite, and useless
        report_divergence(t.run, t.tracker, t.progress, t.loader.sampler)
    t.tracker.log(test_record(t.progress, t.calendar, predictions) | account)
    report_findings(t.run, t.tracker, t.data.num_classes, seen, predictions)
    if account:
        t.tracker.say(describe_account(account, t.launch, streams=t.data.train.images is None))
    report_training(t.run, t.tracker, t.progress, t.calendar, predictions, t.data)
    return 0


def account_of(t: Training) -> dict[str, float]:
    """What the time of this start went into, on the main process; empty on others, and if there was no step."""
    spent = t.stopwatch.spent(t.gradients.pace.waited_seconds)
    if not (t.launch.is_main and spent.steps):
        return {}
    account = {f"{name}_share": share for name, share in spent.shares.items()}
    account["started_seconds"] = t.stopwatch.started_seconds
    # Products of matrices are slower than convolutions among portable kernels, and no measure of the machine.
    if spent.shares["compute"] and not t.launch.is_sharded and not t.run.config.runtime.portable:
        with not_fatal("the share of the machine's peak could not be found"):
            images = spent.steps * t.calendar.batch_size / (spent.seconds * spent.shares["compute"])
            account["peak_share"] = share_of_peak(t.learner.model, t.data.image_shape, images, t.launch)
    return account


def look(t: Training) -> Probe | None:
    """Into the network as training left it; on the main process alone."""
    if not t.launch.is_main:
        return None
    with not_fatal(f"{t.run.path} could not be looked into"):
        return probe(t.run.config, t.data, t.learner.model, t.loader.sampler.micro_batch_size)
    return None
