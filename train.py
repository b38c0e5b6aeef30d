"""Train an image classifier: read the settings, build the parts, loop, save, close.

    accelerate launch train.py                                                       # handwritten digits, a minute
    accelerate launch train.py --config configs/cifar10_cnn.yaml --optim.lr=0.002    # a recipe, one setting changed
    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml train.py --config configs/imagenet_resnet50.yaml

The same command again continues an unfinished run and shows the result of a finished one.
"""

from lockstep.errors import one_line_errors
from lockstep.settings.cli import parse_config

if __name__ == "__main__":
    # Before the imports below, so that --help and a misspelt setting answer at once, without waiting for torch.
    with one_line_errors():
        settings = parse_config()

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from accelerate import Accelerator

from lockstep.data.images import build_data
from lockstep.data.loader import TrainLoader
from lockstep.data.sampler import build_sampler, resolve_micro_batch_size
from lockstep.launch.accelerator import Launch, build_accelerator, end_program
from lockstep.launch.kernels import missing_kernels_explained
from lockstep.launch.preemption import Preemption
from lockstep.launch.threads import keep_threads
from lockstep.lease import Lease
from lockstep.models.summary import summarize_model
from lockstep.randomness import seed_microbatch
from lockstep.report.exhibits import layer_table
from lockstep.report.milestones import Training, finish, log, pause, save, validate
from lockstep.report.summary import Diverged, changed_numerics, open_tracker
from lockstep.run.accelerate import require_trackers
from lockstep.run.checkpoint import Checkpointer, find_checkpoint
from lockstep.run.folder import Run, open_run
from lockstep.run.profiler import Profiler
from lockstep.settings.config import Config, common_settings
from lockstep.training.batchnorm import RunningStatistics, single_values_explained
from lockstep.training.calendar import build_calendar
from lockstep.training.gain import say_gain_of_compiling
from lockstep.training.gradients import Gradients
from lockstep.training.learner import build_learner, check_names, complete
from lockstep.training.loss import total
from lockstep.training.memory import find_micro_batch_size, out_of_memory_explained
from lockstep.training.meter import Meter
from lockstep.training.optim import finish_gradients, histograms_of, set_lr, update
from lockstep.training.schedule import build_schedule
from lockstep.training.stopwatch import Stopwatch


def train(config: Config) -> int:
    """Returns the exit code: 0, or REQUEUE_CODE if the run was asked to stop and waits to be continued.

    Raises UserError for what the user can mend.
    """
    check_names(config)
    require_trackers(config.log.trackers)
    accelerator, launch = build_accelerator(config.runtime)
    config = complete(config, launch.say)
    launch.require_alike("settings", common_settings(config))
    run = open_run(config, launch)
    if run.is_finished:
        launch.say(run.describe_result())
        if note := changed_numerics(run.path, config.runtime, launch):
            launch.say(f"note: this start would be another training, bit for bit: {note}")
        return 0
    preemption = Preemption(config.run, run.path, launch)
    with run.owned(launch) as lease:
        with run.failure_noted(launch), mistakes_explained(config):
            try:
                return fit(begin(run, lease, accelerator, launch, preemption))
            except Diverged as divergence:
                launch.say(f"warning: {divergence}. Going back to the last checkpoint, once")
            accelerator.wait_for_everyone()
            accelerator.free_memory()
            return fit(begin(open_run(config, launch), lease, accelerator, launch, preemption))


@contextmanager
def mistakes_explained(config: Config) -> Iterator[None]:
    """Within it, what torch says of settings that cannot work is one line with what to change."""
    with out_of_memory_explained(config), missing_kernels_explained(), single_values_explained():
        yield


def begin(run: Run, lease: Lease, accelerator: Accelerator, launch: Launch, preemption: Preemption) -> Training:
    """Build everything, and go to where the run was."""
    config = run.config
    micro_batch_size = resolve_micro_batch_size(config, launch.num_processes, run.micro_batch_size)
    keep_threads(config.runtime, run.threads, launch.cores, on_cpu=launch.device.type == "cpu")
    with preemption.at_once():
        accept = partial(run.require_same_data, launch=launch)
        data = build_data(config, run.path, write=launch.is_main, accept=accept)
    if config.train.micro_batch_size == "auto" and run.micro_batch_size is None:
        micro_batch_size = find_micro_batch_size(config, data, accelerator, launch)
    say_gain_of_compiling(config, data, accelerator, launch, micro_batch_size)
    sampler = build_sampler(config, data.train.drawn_labels, micro_batch_size)
    loader = TrainLoader(data.train, sampler, launch, config)

    checkpoint = find_checkpoint(run, launch)
    learner = build_learner(config, data, accelerator, launch, resumes=checkpoint is not None)
    if config.model.summary:
        launch.say(summarize_model(learner.model, data.image_shape))
    checkpointer = Checkpointer(run, launch, accelerator, learner.model, learner.optimizer, learner.average)
    progress = checkpointer.restore(checkpoint)
    launch.follow(lambda: progress.step)
    leaves = sampler.microbatches_per_step
    gradients = Gradients(learner.network, loader.numbers, leaves, launch, config.runtime)
    statistics = RunningStatistics(learner.model, leaves, launch)
    calendar = build_calendar(config, sampler.steps_per_epoch, has_validation=data.val is not None)
    schedule = build_schedule(config.schedule, config.lr, sampler.steps_per_epoch, calendar.planned_steps)

    tracker = open_tracker(run, launch, data, sampler, progress, calendar)
    if progress.step == 0:
        tracker.graph(learner.model, next(learner.model.parameters()).new_zeros(1, *data.image_shape))
        tracker.exhibit("layers", lambda: layer_table(learner.model))
    meter = Meter(progress, loader.numbers, leaves, accelerator)
    stopwatch, profiler = Stopwatch(progress), Profiler(config.runtime, run.path, launch)
    return Training(
        run, lease, launch, preemption, data, loader, learner, gradients, statistics, checkpointer, progress, calendar,
        schedule, tracker, meter, stopwatch, profiler,
    )  # fmt: skip


def fit(t: Training) -> int:
    """The loop, until all steps are done or the run is asked to stop; returns the exit code."""
    config, learner, progress, calendar = t.run.config, t.learner, t.progress, t.calendar
    batches = t.loader.batches(range(progress.step, calendar.total_steps), learner.transform.rearrange)
    while True:
        validates = calendar.validates(progress)
        if validates:
            validate(t)
        if t.preemption.agreed(wait=validates):
            return pause(t)
        if calendar.is_over(progress):
            return finish(t)

        step = progress.step
        lr = set_lr(learner.optimizer, t.schedule.lr_at(step, progress.validations))
        for number in t.loader.numbers:
            batch = t.stopwatch.next_of(batches)
            images, targets = learner.transform.train_batch(*batch, (config.run.seed, step, number))
            seed_microbatch(config.run.seed, step, number)
            with t.gradients.microbatch(number):  # which adds them up, and with the last one over all processes
                logits = learner.network(images)
                losses = learner.loss_of(logits, targets)
                learner.accelerator.backward(total(losses) / config.train.batch_size)
            t.statistics.collect(number)
            t.meter.add(number, losses, logits, targets)

        # On the device, and the same on all processes; the host does not wait for them.
        gradient_norm, bad = finish_gradients(learner.accelerator, learner.parameters, config.optim)
        due = calendar.after(step + 1)
        if due.histograms:
            t.tracker.histograms(step + 1, histograms_of(learner.model))
        update(learner.optimizer, bad)
        learner.optimizer.optimizer.zero_grad()  # Accelerate's own takes 0.1 ms to call it
        t.statistics.commit(bad)
        t.meter.finish_step(bad)
        if learner.average:
            learner.average.update(step + 1)
        progress.step = step + 1
        t.tracker.advance(progress.step)
        t.profiler.step()

        if due.log:
            log(t, lr, gradient_norm)
        if due.epoch_ends and t.data.val is None:
            t.meter.start_epoch()
        if due.save and not due.validate:
            save(t, is_best=t.data.val is None)


if __name__ == "__main__":
    with one_line_errors():
        end_program(train(settings))
