"""The training that every launch must make alike, with everything on."""

from pathlib import Path

from fork_server import ForkServer

from lockstep.run.history import read_starts

MICROBATCHES = 8
PROOF = (
    "--runtime.threads=1",
    "--data.sampling=balanced",
    "--data.repeats=2",
    "--train.batch_size=128",
    "--train.micro_batch_size=16",
    "--train.epochs=2",
    "--train.max_steps=12",
    "--train.ema_decay=0.9",
    "--augment.mixup=0.4",
    "--augment.cutmix=1.0",
    "--augment.erasing=0.3",
    "--augment.translate=0.1",
    "--optim.name=sgd",
    "--optim.lr=0.05",
    "--optim.momentum=0.9",
    "--optim.clip_norm=0.5",
    "--schedule.name=plateau",
    "--schedule.patience=0",
    "--checkpoint.every_steps=5",
    "--log.every_steps=1",
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
)
AUGMENTED = (
    "--train.max_steps=16",
    "--train.loss=bce",
    "--train.label_smoothing=0.1",
    "--train.bce_target_threshold=0.2",
    "--augment.policy=randaugment",
    "--augment.policy_space=timm_inc",
    "--augment.policy_magnitude=7",
    "--augment.policy_magnitude_std=0.5",
    "--augment.mix_mode=elem",
    "--augment.mix_prob=0.8",
    "--augment.mix_off_epoch=1",
    "--augment.erasing_mode=pixel",
    "--augment.erasing_count=2",
    "--augment.progressive_size=6",
    "--augment.progressive_epochs=1",
    "--augment.tta=flip",
)
"""Policy, mixing by the image, several erased rectangles; after an epoch images are larger and mix no more"""
NETWORKS = {
    "fashion_cnn": ("--model.name=fashion_cnn", "--model.dropout=0.3"),
    "resnet": ("--model.name=timm/test_resnet", "--model.drop_path=0.2", "--model.dropout=0.2"),
}
FINE_TUNING = (
    "--model.freeze=[conv1, layer1]",
    "--model.global_pool=avgmax",
    "--model.grad_checkpointing=true",
    "--optim.name=rmsprop_tf",
    "--optim.alpha=0.95",
    "--optim.eps=1e-08",
    "--optim.lr=0.02",
    "--optim.lr_scaling=sqrt",
    "--optim.weight_decay=0.01",
    "--optim.decay_all=false",
    "--optim.layer_decay=0.9",
    "--optim.clip_mode=agc",
    "--optim.clip_norm=0.05",
    "--schedule.name=cosine",
    "--schedule.patience=3",
    "--schedule.warmup_epochs=0.5",
    "--schedule.warmup_lr=0.001",
    "--schedule.warmup_prefix=false",
    "--schedule.cooldown_epochs=0.1",
    "--schedule.k_decay=1.5",
    "--train.class_weights=[1, 2, 3, 1, 1, 2, 1, 1, 1, 5]",
    "--train.ema_warmup=power",
)
"""What recipes of timm set, beside what PROOF has"""


def train_on(server: ForkServer, processes: int, place: Path, *settings: str) -> Path:
    """A run of the same name in a folder for each number of processes."""
    folder = place / str(processes)
    server.run(processes, folder, *PROOF, *settings, "--run.name=proof", f"--data.cache_dir={place / 'cache'}")
    run = folder / "runs" / "proof"
    (started,) = read_starts(run)
    # A test that does not see all processes at work proves nothing.
    assert (started["processes"], started["accumulation"]) == (processes, -(-MICROBATCHES // processes))
    return run
