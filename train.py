"""Train an image classifier: read the settings, build the parts, loop, save, close.

    accelerate launch train.py                                                       # handwritten digits, a minute
    accelerate launch train.py --config configs/cifar10_cnn.yaml --optim.lr=0.002    # a recipe, one setting changed
    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml train.py --config configs/imagenet_resnet50.yaml

The same command again continues an unfinished run and shows the result of a finished one.
"""

from lockstep.settings.cli import one_line_errors, parse_config

if __name__ == "__main__":
    # Before the imports below, so that --help and a misspelt setting answer at once, without waiting for torch.
    settings = parse_config()

import sys
from contextlib import nullcontext

from accelerate import Accelerator

from lockstep.augment.transform import build_transform
from lockstep.data.images import build_data
from lockstep.data.loader import EvaluationLoader, TrainLoader
from lockstep.data.sampler import build_sampler
from lockstep.evaluation.evaluate import evaluate
from lockstep.launch.accelerator import Launch, Profiler, build_accelerator, end_program, resolve_micro_batch_size
from lockstep.launch.preemption import Preemption
from lockstep.launch.sharding import prepare, shard
from lockstep.models.network import build_network
from lockstep.models.summary import summarize_model
from lockstep.randomness import seed_microbatch, seed_run
from lockstep.report.summary import Diverged, open_tracker, report_divergence, report_pause, report_training
from lockstep.run.checkpoint import Checkpointer, find_newest
from lockstep.run.folder import Run, open_run
from lockstep.settings.config import Config
from lockstep.training.batchnorm import RunningStatistics
from lockstep.training.ema import build_average
from lockstep.training.loss import build_loss, total
from lockstep.training.memory import find_micro_batch_size, out_of_memory_explained
from lockstep.training.optim import build_optimizer, finish_gradients, histograms_of, set_lr, update
from lockstep.training.progress import Meter, Stopwatch, build_calendar, test_record, train_record, val_record
from lockstep.training.schedule import build_schedule


def train(config: Config) -> int:
    """Returns the exit code: 0, or REQUEUE_CODE if the run was asked to stop and waits to be continued.

    Raises ValueError for what the user can mend.
    """
    accelerator, launch = build_accelerator(config.runtime)
    run = open_run(config, launch)
    if run.is_finished:
        launch.say(run.describe_result())
        return 0
    preemption = Preemption(config.run, run.path, launch)
    with run.failure_noted(launch), out_of_memory_explained(config):
        try:
            return fit(config, run, accelerator, launch, preemption)
        except Diverged as divergence:
            launch.say(f"warning: {divergence}. Going back to the last checkpoint, once")
        accelerator.wait_for_everyone()
        accelerator.free_memory()
        return fit(config, run, accelerator, launch, preemption)


def fit(config: Config, run: Run, accelerator: Accelerator, launch: Launch, preemption: Preemption) -> int:
    micro_batch_size = resolve_micro_batch_size(config, launch.num_processes, run.micro_batch_size)
    data = build_data(config, run.path, write=launch.is_main)
    if config.train.micro_batch_size == "auto" and run.micro_batch_size is None:
        micro_batch_size = find_micro_batch_size(config, data, run, accelerator, launch)
    sampler = build_sampler(config, data.train.labels.numpy(), micro_batch_size)
    loader = TrainLoader(data.train, sampler, launch, config)
    val_loader = data.val and EvaluationLoader(data.val, data.num_classes, launch, config)
    test_loader = EvaluationLoader(data.test, data.num_classes, launch, config)
    transform = build_transform(config, data.mean, data.std, data.num_classes, precropped=loader.precropped)
    loss_of = build_loss(config.train)

    seed_run(config.run.seed)
    resumes = find_newest(run.checkpoints, quiet=True) is not None
    model = build_network(config, data, launch.device, resumes=resumes)
    if config.model.summary:
        launch.say(summarize_model(model, data.image_shape))
    shard(model, launch, compress_gradients=config.runtime.compress_gradients)
    average = build_average(config.train, model)
    network, optimizer = prepare(accelerator, model, build_optimizer(config.optim, model))
    checkpointer = Checkpointer(run, accelerator, model, optimizer, average)
    progress = checkpointer.restore()
    statistics = RunningStatistics(model)
    calendar = build_calendar(config, sampler.steps_per_epoch)
    schedule = build_schedule(config.schedule, config.optim.lr, sampler.steps_per_epoch, calendar.planned_steps)

    tracker = open_tracker(run, launch, sampler, progress, calendar)
    tracker.say(f"{run.path}: {launch.describe(config.train.batch_size, micro_batch_size)}")
    if progress.step == 0:
        tracker.graph(model, next(model.parameters()).new_zeros(1, *data.image_shape))
    meter, stopwatch = Meter(progress, accelerator), Stopwatch(progress)
    profiler = Profiler(config.runtime, run.path, launch)
    batches = loader.batches(range(progress.step, calendar.total_steps))

    while True:
        validates = val_loader is not None and calendar.validates(progress)
        if val_loader and validates:
            with average.applied(model) if average else nullcontext():
                metrics = evaluate(model, val_loader, transform, accelerator, preemption.wanted)
            if metrics:
                is_best = progress.judge(metrics.loss, metrics.accuracy)
                tracker.log(val_record(progress, calendar, metrics))
                meter.start_epoch()
                checkpointer.save(meter.read(progress), is_best=is_best)
                stopwatch.skip()
        if preemption.agreed(wait=validates):
            checkpointer.save(meter.read(progress), is_best=False)
            checkpointer.wait(must_succeed=True)
            return report_pause(run, tracker, progress, preemption)
        if calendar.is_over(progress):
            break

        step = progress.step
        lr = set_lr(optimizer, schedule.lr_at(step, progress.val_losses))
        for number in loader.numbers:
            images, targets = transform.train_batch(*next(batches), (config.run.seed, step, number))
            seed_microbatch(config.run.seed, step, number)
            # DDP or FSDP2 averages over processes once per step, together with the last microbatch.
            with nullcontext() if number == loader.numbers[-1] else accelerator.no_sync(network):
                logits = network(images)
                losses = loss_of(logits, targets)
                # Summed over microbatches and averaged over processes, this is the mean over the global batch.
                accelerator.backward(total(losses) * (launch.num_processes / config.train.batch_size))
            statistics.collect()
            meter.add(losses, logits, targets)

        gradient_norm = finish_gradients(accelerator, model, config.optim)
        bad = ~gradient_norm.isfinite()  # on the device, the same on all processes; the host does not wait for it
        due = calendar.after(step + 1)
        if due.histograms:
            tracker.histograms(step + 1, histograms_of(model))
        update(optimizer, bad)
        optimizer.zero_grad()
        statistics.commit(accelerator, bad)
        meter.finish_step(bad)
        if average:
            average.update(model, step + 1)
        progress.step = step + 1
        tracker.advance(progress.step)
        profiler.step()

        if due.log:
            meter.read(progress)  # the host waits for the device here, and nowhere else in a step
            tracker.log(train_record(progress, calendar, lr, gradient_norm.item(), stopwatch.lap()))
            meter.start_window()
            if progress.bad_streak >= config.train.max_bad_steps:
                checkpointer.wait()
                report_divergence(run, tracker, progress, sampler)
        if due.epoch_ends and val_loader is None:
            meter.start_epoch()
        if due.save and not (due.validate and val_loader):
            checkpointer.save(meter.read(progress), is_best=val_loader is None)

    checkpointer.load_best()
    metrics = evaluate(model, test_loader, transform, accelerator, preemption.wanted)
    if metrics is None:
        return report_pause(run, tracker, progress, preemption)
    tracker.log(test_record(progress, calendar, metrics))
    report_training(run, tracker, progress, calendar, metrics, data)
    return 0


if __name__ == "__main__":
    with one_line_errors():
        code = train(settings)
        end_program()
    sys.exit(code)
