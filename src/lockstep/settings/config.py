"""Every setting: one frozen dataclass per section, one default each.

Nothing here knows the command line, torch or the file system. Values of another type than a field's hint, and
contradictions between settings, are refused when a section is made, naming the flags. The text under a field is what
`--help` shows. Names of networks, optimizers and the like are not listed here: their registries know them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_type_hints

from lockstep.errors import UserError
from lockstep.settings.types import checked, is_name


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class _Section:
    """What sections share: every value is of its field's type."""

    _name: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for setting in fields(self):
            value = checked(f"{self._name}.{setting.name}", getattr(self, setting.name), hints[setting.name])
            object.__setattr__(self, setting.name, value)
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        """Raise UserError where values of this section do not go together."""


def _require_fraction(flag: str, value: float, *, one_allowed: bool = True) -> None:
    inside = 0 <= value <= 1 if one_allowed else 0 <= value < 1
    _require(inside, f"--{flag}={value} must lie in [0, 1{']' if one_allowed else ')'}")


@dataclass(frozen=True)
class RunConfig(_Section):
    """What the run is called, where it lives and how it starts."""

    _name = "run"

    name: str | None = None
    """Folder under run.root; default: the recipe's name and six hex digits of the settings that shape the result"""
    root: str = "runs"
    """Folder that holds all runs"""
    seed: int = 0
    """The one seed: initial weights, order, augmentation, dropout and the validation split follow from it"""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue an unfinished run; never: refuse an existing folder; must: refuse a missing one"""
    from_run: str | None = None
    """Begin with the newest weights, average and optimizer state of this run folder; the schedule begins anew"""
    max_hours: float | None = None
    """Save and stop (to be continued) after this many hours"""
    notes: str = ""
    """Free text for W&B and config.yaml"""
    tags: tuple[str, ...] = ()
    """Words to find the run by in W&B"""
    group: str | None = None
    """W&B group, for example a sweep's name"""

    def _refuse_contradictions(self) -> None:
        _require(self.seed >= 0, f"--run.seed={self.seed} must not be negative")
        _require(self.from_run != "", "--run.from_run= names no run: leave it out, or name one")
        _require(self.max_hours is None or self.max_hours > 0, f"--run.max_hours={self.max_hours} must be positive")
        if self.name is not None:
            unusual = self.name in (".", "..") or "/" in self.name or not is_name(self.name)
            _require(not unusual, f"--run.name={self.name!r} must be one folder name; set --run.root for the place")
            length = len(self.name.encode())
            _require(length <= 200, f"--run.name has {length} bytes: a folder's name may have 200 at most")


@dataclass(frozen=True)
class DataConfig(_Section):
    """Which images, and how they reach the network."""

    _name = "data"

    source: str = "embedded:digits"
    """embedded:digits, torchvision:<Name>, hf:<hub name or folder>, folder:<path>, tar:<folder> or synthetic:HxWxCxN"""
    root: str = "data"
    """Folder that torchvision data sets are downloaded to"""
    cache_dir: str = "~/.cache/lockstep"
    """Folder for decoded uint8 images, and the index of tar shards"""
    val_fraction: float = 0.1
    """Share of the training set held out for validation, stratified by class; unused if the source has its own"""
    test_fraction: float = 0.2
    """Share held out before that if the source has no test split, the same for every run.seed; 0: validation tests"""
    folds: int | None = None
    """Cross-validation: cut the training set into this many parts, stratified by class; one of them validates"""
    fold: int = 0
    """Number of the part that validates, from 0 to folds - 1; leave run.seed alone between them"""
    samples_per_class: int | None = None
    """Train on this many samples of each class, drawn from what is not held out; default: all"""
    image_column: str | None = None
    """Column of the images in hf: sources, their extension in tar: ones; default: the first of images"""
    label_column: str | None = None
    """Column of the labels in hf: sources (default: label or alike), extension or JSON key in tar: ones (cls, label)"""
    workers: int = -1
    """Processes that decode images of a streamed set; -1: a core each but one, as far as shared memory has room"""
    memory_budget: float = 2.0
    """GiB; a set that fits is decoded once and kept in memory (or on the device), a larger one streams"""
    on_error: Literal["raise", "skip"] = "raise"
    """An unreadable image ends the run with its path, or is skipped and counted"""
    num_classes: int | None = None
    """Classes of the network if more than the data set shows"""
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    """shuffle: every sample once per epoch; balanced: every class equally often"""
    repeats: int = 1
    """Repeated augmentation: each chosen sample appears this many times in its global batch"""

    def _refuse_contradictions(self) -> None:
        _require_fraction("data.val_fraction", self.val_fraction, one_allowed=False)
        _require_fraction("data.test_fraction", self.test_fraction, one_allowed=False)
        folds, few = self.folds, self.samples_per_class
        _require(folds is None or folds >= 2, f"--data.folds={folds} must be at least 2")
        _require(folds is not None or self.fold == 0, f"--data.fold={self.fold} needs --data.folds")
        _require(0 <= self.fold < (folds or 1), f"--data.fold={self.fold} must lie in 0..{(folds or 1) - 1}")
        _require(few is None or few >= 1, f"--data.samples_per_class={few} must be at least 1")
        for name in ("image_column", "label_column"):
            value = getattr(self, name)
            has_columns = self.source.startswith(("hf:", "tar:"))
            _require(
                value is None or has_columns, f"--data.{name}={value} has no meaning for --data.source={self.source}"
            )
        _require(self.workers >= -1, f"--data.workers={self.workers} must be -1 (choose for me), 0 or more")
        _require(self.memory_budget >= 0, f"--data.memory_budget={self.memory_budget} must not be negative")
        _require(self.repeats >= 1, f"--data.repeats={self.repeats} must be at least 1")
        classes = self.num_classes
        _require(classes is None or classes >= 2, f"--data.num_classes={classes} must be at least 2")


@dataclass(frozen=True)
class AugmentConfig(_Section):
    """What happens to training images; evaluation only resizes, crops and normalises."""

    _name = "augment"

    image_size: int | None = None
    """Height and width the network sees; default: the data set's own"""
    eval_crop: float = 1.0
    """Evaluation and caching resize the shorter side to image_size / eval_crop, then cut the centre"""
    resized_crop: float = 0.0
    """Smallest area share of a random crop that is resized to image_size (ImageNet: 0.08); 0: off"""
    crop_padding: int = 0
    """Pad by this many pixels, then cut a random window of the old size"""
    flip: bool = False
    """Mirror left-right with probability 1/2"""
    vertical_flip: bool = False
    """Mirror top-bottom with probability 1/2"""
    rotation: float = 0.0
    """Rotate by up to this many degrees either way"""
    translate: float = 0.0
    """Shift by up to this share of the image size"""
    zoom: float = 0.0
    """Scale by a factor from 1 - zoom to 1 + zoom"""
    shear: float = 0.0
    """Shear by up to this many degrees either way"""
    perspective: float = 0.0
    """Move the corners by up to this share of half the image size"""
    policy: str = "none"
    """none, randaugment, autoaugment, trivialaugment, augmix, three_augment: random operations on each image"""
    policy_ops: int = 2
    """Operations of randaugment, one after the other"""
    policy_magnitude: float | None = None
    """Strength of randaugment (default: 9) or severity of augmix (1 to 10; default: 3)"""
    policy_magnitude_std: float = 0.0
    """Standard deviation of a normal number added to the magnitude of each operation of randaugment"""
    policy_space: Literal["torchvision", "timm", "timm_inc"] = "torchvision"
    """randaugment's operations: torchvision's (magnitude 0 to 30), or timm's rand, or rand with inc1 (0 to 10)"""
    jitter: tuple[float, ...] = ()
    """Strengths of brightness, contrast, saturation and hue jitter, as many as wanted: [0.2, 0.2]"""
    grayscale: float = 0.0
    """Probability of losing all colour"""
    blur: float = 0.0
    """Probability of a Gaussian blur (sigma 0.1 to 2 pixels)"""
    noise: float = 0.0
    """Standard deviation of added Gaussian noise, for images in [0, 1]"""
    erasing: float = 0.0
    """Probability of erasing a rectangle (area 0.02-0.33, aspect 0.3-3.3)"""
    erasing_mode: Literal["const", "rand", "pixel"] = "const"
    """What is seen there: the mean colour, one random colour, or a random colour for each pixel"""
    erasing_count: int = 1
    """Erase one to this many rectangles, of as small a part of the area each"""
    mixup: float | None = None
    """Mix pairs of images with a weight from Beta(mixup, mixup)"""
    cutmix: float | None = None
    """Paste rectangles between images, area from Beta(cutmix, cutmix)"""
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    """One weight and box for the whole microbatch, for each pair of images, or for each image"""
    mix_prob: float = 1.0
    """Probability that a microbatch, pair or image is mixed at all"""
    mix_switch_prob: float = 0.5
    """With mixup and cutmix: probability of cutmix"""
    mix_off_epoch: int | None = None
    """Mix no longer from the end of this many epochs on; default: to the end"""
    progressive_size: int | None = None
    """Width of training images in the first epoch, from which it grows to the full one; default: always full"""
    progressive_epochs: int | None = None
    """Epochs until training images have their full size"""
    progressive_step: int = 32
    """Pixels by which the width of training images grows at a time"""
    tta: Literal["none", "flip"] = "none"
    """flip: evaluation takes the mean of the probabilities of each image and its mirror image"""
    mean: tuple[float, ...] | None = None
    """Per-channel mean for images in [0, 1]; default: measured on the training set (ImageNet's when it streams)"""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation, as for mean"""
    from_pretrained: bool = False
    """Take image_size, eval_crop (if it is 1), mean and std, where not set, from those of the published weights"""

    def _refuse_contradictions(self) -> None:
        for name in ("resized_crop", "grayscale", "blur", "erasing", "mix_prob", "mix_switch_prob"):
            _require_fraction(f"augment.{name}", getattr(self, name))
        for name in ("translate", "zoom", "perspective"):
            _require_fraction(f"augment.{name}", getattr(self, name), one_allowed=False)
        for name in ("crop_padding", "rotation", "shear", "noise"):
            _require(getattr(self, name) >= 0, f"--augment.{name}={getattr(self, name)} must not be negative")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"--augment.{name}={value} must not be negative")
        _require(self.erasing_count >= 1, f"--augment.erasing_count={self.erasing_count} must be at least 1")
        off = self.mix_off_epoch
        _require(off is None or off >= 1, f"--augment.mix_off_epoch={off} must be at least 1")
        self._refuse_policy_contradictions()
        for name in ("progressive_size", "progressive_epochs", "progressive_step"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--augment.{name}={value} must be at least 1")
        _require(
            (self.progressive_size is None) == (self.progressive_epochs is None),
            "--augment.progressive_size and --augment.progressive_epochs belong together: set both or neither",
        )
        _require(0 < self.eval_crop <= 1, f"--augment.eval_crop={self.eval_crop} must lie in (0, 1]")
        _require(self.image_size is None or self.image_size > 0, f"--augment.image_size={self.image_size} must be > 0")
        _require(len(self.jitter) <= 4, "--augment.jitter takes at most brightness, contrast, saturation and hue")
        _require(min(self.jitter, default=0) >= 0, f"--augment.jitter={list(self.jitter)} must not be negative")
        _require(len(self.jitter) < 4 or self.jitter[3] <= 0.5, "--augment.jitter: hue must lie in [0, 0.5]")
        _require(
            (self.mean is None) == (self.std is None),
            "--augment.mean and --augment.std belong together: set both or neither",
        )
        _require(self.std is None or min(self.std) > 0, f"--augment.std={self.std} must be positive")

    def _refuse_policy_contradictions(self) -> None:
        _require(self.policy_ops >= 1, f"--augment.policy_ops={self.policy_ops} must be at least 1")
        deviation, magnitude = self.policy_magnitude_std, self.policy_magnitude
        _require(deviation >= 0, f"--augment.policy_magnitude_std={deviation} must not be negative")
        if magnitude is not None and self.policy == "augmix":
            is_level = 1 <= magnitude <= 10 and magnitude.is_integer()
            _require(is_level, f"--augment.policy_magnitude={magnitude} of augmix must be a whole number from 1 to 10")
        elif magnitude is not None:
            top = 30 if self.policy_space == "torchvision" else 10
            _require(
                0 <= magnitude <= top,
                f"--augment.policy_magnitude={magnitude} must lie in [0, {top}] for "
                f"--augment.policy_space={self.policy_space}",
            )


@dataclass(frozen=True)
class ModelConfig(_Section):
    """Which network."""

    _name = "model"

    name: str = "fashion_cnn"
    """mlp[_dropout], tiny_cnn, simple_cnn, fashion_cnn, cifar10_cnn, vgg_small, resnet9, resnet_basic or timm/<name>"""
    dropout: float | None = None
    """Dropout probability; default: the network's own"""
    drop_path: float = 0.0
    """Stochastic depth of timm networks that have it"""
    width: int | None = None
    """Channels of the first convolution (or neurons of a one-layer mlp); default: the network's own"""
    hidden: tuple[int, ...] = ()
    """Hidden layer sizes of mlp_dropout; default: its own"""
    batch_norm: bool = True
    """Batch norm in networks of ours that have it"""
    noise: float = 0.0
    """Standard deviation of Gaussian noise that hidden linear layers of our networks add to their input in training"""
    init: Literal["default", "kaiming_normal", "xavier_uniform", "xavier_normal", "constant"] = "default"
    """Initial weights of convolutions and linear layers; default: the network's own"""
    stem: Literal["auto", "cifar", "imagenet"] = "auto"
    """First layers of a timm ResNet; auto: cifar (3x3, no pooling) up to 64 pixels, imagenet above"""
    global_pool: str | None = None
    """Pooling before the last layer of a timm network: avg, max, avgmax, catavgmax, ...; default: its own"""
    pretrained: bool = False
    """Start from timm's published weights (network or hub cache needed), if checkpoint names no others"""
    checkpoint: str | None = None
    """Start from this .safetensors file, checkpoint, run or hf_hub:<name>; for other classes the last layer is new"""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters or layers that do not learn, nor batch norms' statistics there: [conv1, "layer[12]*"]"""
    grad_checkpointing: bool = False
    """Compute activations of timm's blocks anew in the backward pass: less memory, more time, the same bits"""
    summary: bool = False
    """Print the layer table, parameters and FLOPs"""

    def _refuse_contradictions(self) -> None:
        if self.dropout is not None:
            _require_fraction("model.dropout", self.dropout, one_allowed=False)
        _require_fraction("model.drop_path", self.drop_path, one_allowed=False)
        _require(self.noise >= 0, f"--model.noise={self.noise} must not be negative")
        _require(self.checkpoint != "", "--model.checkpoint= names no file: leave it out, or name one")
        _require(self.width is None or self.width > 0, f"--model.width={self.width} must be positive")
        _require(min(self.hidden, default=1) > 0, f"--model.hidden={list(self.hidden)} must be positive")
        _require("" not in self.freeze, "--model.freeze has an empty pattern: it matches nothing")

    @property
    def published_weights(self) -> bool:
        """Whether the first weights come from a hub: timm's own, or those that `checkpoint` names there."""
        return self.hub_weights is not None or (self.pretrained and self.checkpoint is None)

    @property
    def hub_weights(self) -> str | None:
        """The repository that `checkpoint` names on the Hugging Face hub, in timm's spelling, or none."""
        place = self.checkpoint or ""
        prefix = next((prefix for prefix in ("hf_hub:", "hf-hub:") if place.startswith(prefix)), None)
        return None if prefix is None else place.removeprefix(prefix)


@dataclass(frozen=True)
class OptimConfig(_Section):
    """How gradients become updates."""

    _name = "optim"

    name: str = "adamw"
    """Optimizer (sgd, adamw, lamb, muon, ...), with torch's or timm's own defaults for what is not set here"""
    lr: float = 1e-3
    """Highest learning rate"""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply lr by train.batch_size / lr_base_batch_size, or by its square root"""
    lr_base_batch_size: int = 256
    """The global batch that lr is meant for, with lr_scaling"""
    layer_decay: float | None = None
    """Factor of the learning rate from each layer of a timm network to the one before it, as 0.75; default: none"""
    weight_decay: float = 0.0
    """L2 penalty (decoupled for adamw)"""
    decay_all: bool = True
    """false: no weight decay on biases and norm layers"""
    momentum: float = 0.0
    """Momentum of sgd, rmsprop and their like"""
    nesterov: bool = False
    """Nesterov momentum for sgd"""
    betas: tuple[float, ...] = ()
    """Decay rates of Adam's moments and of their like; default: the optimizer's own"""
    eps: float | None = None
    """What optimizers add to a denominator; default: the optimizer's own"""
    alpha: float | None = None
    """Decay rate of rmsprop's mean square; default: the optimizer's own (rmsprop 0.99, rmsprop_tf 0.9)"""
    l1: float = 0.0
    """L1 penalty on all weights, added to the gradient; the logged loss is without it"""
    clip_norm: float | None = None
    """Largest gradient norm of a step, or what clip_mode makes of it; default: no clipping"""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """clip_norm bounds the norm of all gradients, each number (value), or unit norms as shares of weights' (agc)"""

    def _refuse_contradictions(self) -> None:
        _require(self.lr > 0, f"--optim.lr={self.lr} must be positive")
        for name in ("weight_decay", "l1"):
            _require(getattr(self, name) >= 0, f"--optim.{name}={getattr(self, name)} must not be negative")
        _require_fraction("optim.momentum", self.momentum, one_allowed=False)
        _require(not self.nesterov or self.momentum > 0, "--optim.nesterov=true needs --optim.momentum above 0")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"--optim.clip_norm={self.clip_norm} must be positive (leave it out for no clipping)",
        )
        _require(
            self.clip_mode == "norm" or self.clip_norm is not None,
            f"--optim.clip_mode={self.clip_mode} needs --optim.clip_norm, its bound (agc: for example 0.01)",
        )
        for beta in self.betas:
            _require(0 <= beta < 1, f"--optim.betas={list(self.betas)} must lie in [0, 1)")
        _require(self.eps is None or self.eps > 0, f"--optim.eps={self.eps} must be positive")
        if self.alpha is not None:
            _require_fraction("optim.alpha", self.alpha, one_allowed=False)
        decay = self.layer_decay
        _require(decay is None or 0 < decay <= 1, f"--optim.layer_decay={decay} must lie in (0, 1]")
        base = self.lr_base_batch_size
        _require(base >= 1, f"--optim.lr_base_batch_size={base} must be at least 1")
        _require(
            self.lr_scaling != "none" or base == 256,
            f"--optim.lr_base_batch_size={base} means nothing without --optim.lr_scaling=linear or sqrt",
        )


@dataclass(frozen=True)
class ScheduleConfig(_Section):
    """The learning rate as a function of the step."""

    _name = "schedule"

    name: str = "constant"
    """Shape (constant, step, cosine, plateau, onecycle, ...); combine with warmup_epochs for a linear warm-up"""
    warmup_epochs: float = 0.0
    """Linear warm-up from 1 % of the learning rate, or from warmup_lr"""
    warmup_lr: float | None = None
    """The learning rate of the first step of a warm-up; default: 1 % of the highest"""
    warmup_prefix: bool = True
    """cosine, cosine_restarts, polynomial, tanh begin when warm-up is over; false: with it, as in timm's default"""
    cooldown_epochs: float = 0.0
    """The last so many epochs at min_lr (cosine, cosine_restarts, polynomial, tanh)"""
    per_epoch: bool = False
    """Change the learning rate at the beginning of an epoch only, as timm does by default"""
    min_lr: float = 0.0
    """Floor of cosine, cosine_restarts, cyclic, onecycle, polynomial, tanh and plateau"""
    period_epochs: float = 10.0
    """Epochs between drops (step), restarts (cosine_restarts; the first period) or valleys (cyclic)"""
    period_factor: float = 1.0
    """How much longer each period of cosine_restarts is than the one before it"""
    period_decay: float = 1.0
    """Factor of the highest learning rate from one period of cosine_restarts to the next"""
    k_decay: float = 1.0
    """Exponent of the share of training that is done (cosine, cosine_restarts, polynomial; arXiv:2004.05909)"""
    milestones: tuple[float, ...] = ()
    """Epochs at which multistep drops"""
    gamma: float = 0.1
    """Factor of each drop (step, multistep, plateau) or of each epoch (exponential)"""
    patience: int = 3
    """Epochs without a lower validation loss before plateau drops"""
    power: float = 0.9
    """Exponent of polynomial"""
    peak: float = 0.3
    """Share of training at which onecycle reaches the highest learning rate"""

    def _refuse_contradictions(self) -> None:
        for name in ("warmup_epochs", "cooldown_epochs", "min_lr", "patience"):
            _require(getattr(self, name) >= 0, f"--schedule.{name}={getattr(self, name)} must not be negative")
        first = self.warmup_lr
        _require(first is None or first >= 0, f"--schedule.warmup_lr={first} must not be negative")
        _require(first is None or self.warmup_epochs > 0, "--schedule.warmup_lr needs --schedule.warmup_epochs above 0")
        _require(self.period_factor >= 1, f"--schedule.period_factor={self.period_factor} must be at least 1")
        for name in ("period_epochs", "period_decay", "k_decay", "gamma", "power"):
            _require(getattr(self, name) > 0, f"--schedule.{name}={getattr(self, name)} must be positive")
        _require(0 < self.peak < 1, f"--schedule.peak={self.peak} must lie between 0 and 1")
        _require(
            list(self.milestones) == sorted(self.milestones),
            f"--schedule.milestones={list(self.milestones)} must ascend",
        )
        _require(
            self.name != "multistep" or len(self.milestones) > 0,
            "--schedule.name=multistep needs --schedule.milestones, for example [30, 60, 80]",
        )


@dataclass(frozen=True)
class TrainConfig(_Section):
    """How much training, in which portions."""

    _name = "train"

    batch_size: int = 64
    """Samples of one step over all processes: the global batch; -1: choose by the number of training images"""
    micro_batch_size: int | Literal["auto"] | None = None
    """Samples of one forward/backward on one process; auto: the most that fit; default: batch_size / processes"""
    epochs: int = 10
    """Passes over the training set; -1: choose by the number of training images"""
    max_steps: int | None = None
    """Stop after this many steps even if epochs remain; the schedule stays that of all epochs"""
    loss: str = "cross_entropy"
    """cross_entropy, bce (binary cross-entropy of each class), or nll, which is cross-entropy in two steps"""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes"""
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"
    """Weights of the classes in the loss, only their ratios count; balanced: the rarer the heavier"""
    bce_target_threshold: float | None = None
    """bce: targets above this become 1, all others 0; default: soft targets stay as they are"""
    bce_sum: bool = False
    """bce: the loss of a sample is the sum over classes, not their mean"""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, used for evaluation; default: none"""
    ema_warmup: Literal["ratio", "power", "none"] = "ratio"
    """Decay after n steps is at most (1 + n) / (10 + n), TensorFlow's rule; power: 1 - n**(-2/3), timm's; none: full"""
    validate_every_epochs: int = 1
    """Validate every this many epochs, and at the end; the best of these weights are the result"""
    best_from_epoch: int = 1
    """Weights of earlier epochs do not compete for the best: a small validation set may favour them by chance"""
    early_stop_epochs: int | None = None
    """Stop at a validation that comes this many epochs after the last better one; default: never"""
    max_bad_steps: int = 20
    """Steps without a finite gradient are skipped; after this many in a row, back to the last checkpoint, once"""

    def _refuse_contradictions(self) -> None:
        for name in ("batch_size", "epochs"):
            value = getattr(self, name)
            _require(value == -1 or value >= 1, f"--train.{name}={value} must be at least 1, or -1 (choose for me)")
        for name in ("validate_every_epochs", "best_from_epoch", "max_bad_steps"):
            _require(getattr(self, name) >= 1, f"--train.{name}={getattr(self, name)} must be at least 1")
        for name in ("micro_batch_size", "max_steps", "early_stop_epochs"):
            value = getattr(self, name)
            _require(value in (None, "auto") or value >= 1, f"--train.{name}={value} must be at least 1")
        _require_fraction("train.label_smoothing", self.label_smoothing, one_allowed=False)
        if self.bce_target_threshold is not None:
            _require_fraction("train.bce_target_threshold", self.bce_target_threshold, one_allowed=False)
        if self.ema_decay is not None:
            _require_fraction("train.ema_decay", self.ema_decay, one_allowed=False)
        _require(
            self.ema_warmup == "ratio" or self.ema_decay is not None,
            f"--train.ema_warmup={self.ema_warmup} needs --train.ema_decay",
        )
        if not isinstance(self.class_weights, str):
            heavy = len(self.class_weights) > 1 and max(self.class_weights) > 0 and min(self.class_weights) >= 0
            weights = list(self.class_weights)
            _require(heavy, f"--train.class_weights={weights} must be numbers of which none is negative, one a class")
        micro = self.micro_batch_size
        if isinstance(micro, int) and self.batch_size > 0 and self.batch_size % micro:
            below = self.batch_size - self.batch_size % micro
            nearest = [str(size) for size in (below, below + micro) if size > 0]
            raise UserError(
                f"--train.batch_size={self.batch_size} is not a multiple of "
                f"--train.micro_batch_size={micro}: the nearest that is: {' or '.join(nearest)}"
            )


@dataclass(frozen=True)
class RuntimeConfig(_Section):
    """How the hardware is used; what of it changes more of the result than rounding is part of a run's name."""

    _name = "runtime"

    precision: Literal["launch", "auto", "no", "bf16", "fp16"] = "launch"
    """launch: what accelerate launch was told; auto: the fastest that this device does well; or set outright"""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of weights; float64 is for proofs of equality"""
    exact: bool = True
    """The same bits on any number of processes: one order of sums, deterministic kernels; false: faster on GPUs"""
    portable: bool = False
    """On CPUs, in fp32: kernels whose bits depend on no maker or model of x86-64 with AVX2, with as many threads"""
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] | bool = "off"
    """torch.compile the network, in this mode (true: default); each start measures what it gains: on CPUs a loss"""
    threads: int | None = None
    """CPU threads per process; default: the cores this process owns"""
    sync_batchnorm: bool = False
    """Batch statistics over all processes; leaves the promise of equal training on every launch"""
    compress_gradients: bool = False
    """Send gradients between processes as bf16: half the bytes; leaves the promise, too"""
    fsdp: bool = False
    """Each process keeps a part of weights, average and optimizer state (FSDP2); true if the launcher says FSDP"""
    backend: Literal["auto", "gloo"] = "auto"
    """auto: NCCL between GPUs, gloo between CPUs; gloo: also for processes that share a GPU, which NCCL refuses"""
    bucket_view: bool = True
    """DDP: gradients live in the buffers that are sent, which saves a copy of them"""
    static_graph: bool = False
    """DDP: take the graph of the first step for granted; not with accumulation"""
    rendezvous_seconds: int = 300
    """How long processes wait for one another at the start before they give up"""
    stuck_seconds: int = 600
    """All processes end when they have waited this long for one that stands still, which is named after 10 s"""
    profile: bool = False
    """Write a torch profiler trace of steps 10 to 15 to the run folder, and a table of what took their time"""

    def __post_init__(self) -> None:
        if isinstance(self.compile, bool):  # as runs have it that were begun before there were modes
            object.__setattr__(self, "compile", "default" if self.compile else "off")
        super().__post_init__()

    def _refuse_contradictions(self) -> None:
        _require(self.threads is None or self.threads >= 1, f"--runtime.threads={self.threads} must be at least 1")
        seconds = self.rendezvous_seconds
        _require(seconds >= 1, f"--runtime.rendezvous_seconds={seconds} must be at least 1")
        _require(self.stuck_seconds >= 10, f"--runtime.stuck_seconds={self.stuck_seconds} must be at least 10")
        _require(
            self.dtype == "float32" or self.precision in ("launch", "no"),
            f"--runtime.dtype=float64 cannot be combined with --runtime.precision={self.precision}",
        )
        for setting, value, fits in (
            ("dtype", self.dtype, self.dtype == "float32"),
            ("exact", "false", self.exact),
            ("compile", self.compile, self.compile == "off"),
            ("precision", self.precision, self.precision not in ("bf16", "fp16")),
        ):
            _require(
                fits or not self.portable,
                f"--runtime.portable=true cannot be combined with --runtime.{setting}={value}",
            )


@dataclass(frozen=True)
class CheckpointConfig(_Section):
    """When the state is saved, and how much of it is kept."""

    _name = "checkpoint"

    every_steps: int | None = None
    """Save every this many steps; default: at the ends of epochs only"""
    every_epochs: int = 1
    """Save at the end of every this many epochs, beside the best and the last"""
    keep_last: int = 2
    """Newest checkpoints to keep beside the best one"""
    keep_every_steps: int | None = None
    """Also keep, for good, the checkpoints of steps that this divides; default: none"""

    def _refuse_contradictions(self) -> None:
        for name in ("every_steps", "every_epochs", "keep_last", "keep_every_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--checkpoint.{name}={value} must be at least 1")


@dataclass(frozen=True)
class LogConfig(_Section):
    """What is written down while training."""

    _name = "log"

    every_steps: int = 50
    """Read loss and accuracy from the device, and log them, every this many steps"""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online after wandb login, offline otherwise; never a prompt, never a reason to stop"""
    project: str = "lockstep"
    """W&B project"""
    tensorboard: bool = True
    """Write TensorBoard event files"""
    trackers: tuple[str, ...] = ()
    """Others that get the scalars, by Accelerate's names: mlflow, trackio, comet_ml, aim, clearml, dvclive, swanlab"""
    histogram_every_steps: int | None = None
    """Write histograms of gradients and weights every this many steps; default: never"""
    figures: bool = True
    """Draw the run's pictures (curves, confusion matrix, samples) and write its page, report.html"""
    artifacts: bool = False
    """Give W&B the best and the last weights and a split that was drawn, as versioned artifacts: they are uploaded"""
    all_nodes: bool = False
    """Write processor, memory and GPU load of every node into each training line; W&B alone knows its own machine's"""

    def _refuse_contradictions(self) -> None:
        _require(self.every_steps >= 1, f"--log.every_steps={self.every_steps} must be at least 1")
        _require(
            self.histogram_every_steps is None or self.histogram_every_steps >= 1,
            f"--log.histogram_every_steps={self.histogram_every_steps} must be at least 1",
        )


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _require(
            self.train.batch_size == -1 or self.train.batch_size % self.data.repeats == 0,
            f"--train.batch_size={self.train.batch_size} is not a multiple of --data.repeats={self.data.repeats}",
        )
        _require(
            self.train.batch_size == -1 or self.schedule.min_lr <= self.lr,
            f"--schedule.min_lr={self.schedule.min_lr} is above --optim.lr={self.optim.lr}"
            + ("" if self.optim.lr_scaling == "none" else f", which is {self.lr:.6g} for this batch size"),
        )
        _require(
            not self.augment.from_pretrained or self.model.name.startswith("timm/"),
            f"--augment.from_pretrained=true needs a network of timm, not --model.name={self.model.name}",
        )
        _require(
            not (self.data.sampling == "balanced" and self.train.class_weights == "balanced"),
            "--data.sampling=balanced and --train.class_weights=balanced do the same twice: choose one",
        )
        _require(
            self.run.from_run is None or not (self.model.pretrained or self.model.checkpoint),
            "--run.from_run brings the first weights: leave out --model.pretrained and --model.checkpoint",
        )
        _require(
            self.train.epochs == -1 or (self.augment.progressive_epochs or 0) <= self.train.epochs,
            f"--augment.progressive_epochs={self.augment.progressive_epochs} is more than "
            f"--train.epochs={self.train.epochs}: images would never have their full size",
        )
        _require(
            not (self.runtime.sync_batchnorm and self.train.micro_batch_size == "auto"),
            "--train.micro_batch_size=auto cannot be tried with --runtime.sync_batchnorm=true: set a number",
        )
        _require(
            not (self.runtime.static_graph and self.train.micro_batch_size == "auto"),
            "--train.micro_batch_size=auto may accumulate, which --runtime.static_graph=true forbids: set a number",
        )

    @property
    def lr(self) -> float:
        """The highest learning rate: `optim.lr`, scaled to the global batch if `optim.lr_scaling` says so."""
        exponent = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[self.optim.lr_scaling]
        return self.optim.lr * (self.train.batch_size / self.optim.lr_base_batch_size) ** exponent


_MEANING = 3
"""Raised when a default, or what a setting means, changes: a name must not stand for two trainings"""

# Settings that leave the learned weights as they are, or only say how long and how well watched the run is.
_SHAPELESS = {
    "run": {"name", "root", "resume", "max_hours", "notes", "tags", "group"},
    "data": {"root", "cache_dir", "workers"},
    "model": {"summary", "grad_checkpointing"},
    "train": {"max_bad_steps"},
    "runtime": {
        "compile",
        "threads",
        "profile",
        "fsdp",
        "backend",
        "bucket_view",
        "static_graph",
        "rendezvous_seconds",
        "stuck_seconds",
    },
    "checkpoint": {"every_steps", "every_epochs", "keep_last", "keep_every_steps"},
    "log": {
        "every_steps",
        "wandb",
        "project",
        "tensorboard",
        "histogram_every_steps",
        "figures",
        "artifacts",
        "trackers",
        "all_nodes",
    },
}


def shaping_settings(config: Config) -> dict[str, Any]:
    """Flat `section.key -> value` of the settings that shape the result; a run folder belongs to one such set."""
    return _flat(config, _SHAPELESS)


_PLACES = {"run": {"root"}, "data": {"root", "cache_dir"}}


def common_settings(config: Config) -> dict[str, Any]:
    """The same of those that must be alike on all processes: all but for places on disks."""
    return _flat(config, _PLACES)


def plain_settings(config: Config) -> dict[str, bool | int | float | str]:
    """Flat `section.key -> value` of all, as trackers store them: what is no flag, number or text, as text."""
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in _flat(config, {}).items()
    }


def _flat(config: Config, left_out: dict[str, set[str]]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in asdict(config).items()
        for key, value in values.items()
        if key not in left_out.get(section, ())
    }


def changed_settings(before: Config, now: Config) -> list[str]:
    """`section.key: old -> new` for each difference among the settings that shape the result."""
    old, new = shaping_settings(before), shaping_settings(now)
    return [f"{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]


def settings_digest(config: Config) -> str:
    """Six hex digits of the settings that shape the result and differ from their defaults.

    A new setting leaves the digests of all runs that do not use it as they are.
    """
    default = shaping_settings(Config())
    differing = {key: value for key, value in shaping_settings(config).items() if value != default[key]}
    text = json.dumps([_MEANING, differing], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]
