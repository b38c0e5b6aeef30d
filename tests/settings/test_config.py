"""Every contradiction is refused with its flag and numbers, and a run's digest knows what shapes its result."""

import ast
import inspect
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any, get_args

import pytest

import lockstep.settings.config
from lockstep.settings.config import Config, settings_digest, shaping_settings

SECTIONS = {name: type(section) for name, section in vars(Config()).items()}
SETTINGS = [(section, setting.name) for section, cls in SECTIONS.items() for setting in fields(cls)]


def configured(**settings: Any) -> Config:
    """A Config from `section__key=value`."""
    config = Config()
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, key = name.split("__")
        by_section.setdefault(section, {})[key] = value
    return replace(config, **{name: SECTIONS[name](**values) for name, values in by_section.items()})


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"run__seed": -1}, ["--run.seed=-1"]),
        ({"run__name": ""}, ["--run.name=''"]),
        ({"run__name": ".."}, ["--run.name='..'", "--run.root"]),
        ({"run__name": "a/b"}, ["--run.name='a/b'", "--run.root"]),
        ({"data__val_fraction": -0.1}, ["--data.val_fraction=-0.1", "[0, 1)"]),
        ({"data__val_fraction": 1.0}, ["--data.val_fraction=1.0", "[0, 1)"]),
        ({"data__workers": -2}, ["--data.workers=-2", "-1"]),
        ({"data__memory_budget": -0.5}, ["--data.memory_budget=-0.5"]),
        ({"data__repeats": 0}, ["--data.repeats=0", "at least 1"]),
        ({"augment__resized_crop": 1.5}, ["--augment.resized_crop=1.5", "[0, 1]"]),
        ({"augment__grayscale": -0.1}, ["--augment.grayscale=-0.1"]),
        ({"augment__blur": 2.0}, ["--augment.blur=2.0"]),
        ({"augment__erasing": 1.01}, ["--augment.erasing=1.01"]),
        ({"augment__translate": 1.0}, ["--augment.translate=1.0", "[0, 1)"]),
        ({"augment__zoom": 1.0}, ["--augment.zoom=1.0", "[0, 1)"]),
        ({"augment__perspective": -0.5}, ["--augment.perspective=-0.5"]),
        ({"augment__crop_padding": -1}, ["--augment.crop_padding=-1"]),
        ({"augment__rotation": -5.0}, ["--augment.rotation=-5.0"]),
        ({"augment__shear": -5.0}, ["--augment.shear=-5.0"]),
        ({"augment__noise": -0.1}, ["--augment.noise=-0.1"]),
        ({"augment__mixup": -0.2}, ["--augment.mixup=-0.2"]),
        ({"augment__cutmix": -1.0}, ["--augment.cutmix=-1.0"]),
        ({"augment__eval_crop": 0.0}, ["--augment.eval_crop=0.0", "(0, 1]"]),
        ({"augment__eval_crop": 1.1}, ["--augment.eval_crop=1.1", "(0, 1]"]),
        ({"augment__image_size": 0}, ["--augment.image_size=0"]),
        ({"augment__jitter": (0.1,) * 5}, ["--augment.jitter", "at most"]),
        ({"augment__jitter": (0.2, -0.1)}, ["--augment.jitter=[0.2, -0.1]"]),
        ({"augment__jitter": (0.0, 0.0, 0.0, 0.6)}, ["--augment.jitter", "[0, 0.5]"]),
        ({"augment__from_pretrained": True}, ["--augment.from_pretrained=true", "--model.name=fashion_cnn"]),
        ({"data__test_fraction": 1.0}, ["--data.test_fraction=1.0", "[0, 1)"]),
        ({"data__folds": 1}, ["--data.folds=1", "at least 2"]),
        ({"data__fold": 1}, ["--data.fold=1", "needs --data.folds"]),
        ({"data__folds": 5, "data__fold": 5}, ["--data.fold=5", "0..4"]),
        ({"data__samples_per_class": 0}, ["--data.samples_per_class=0"]),
        ({"data__image_column": "x"}, ["--data.image_column=x", "--data.source=embedded:digits"]),
        ({"data__label_column": "x"}, ["--data.label_column=x", "--data.source=embedded:digits"]),
        ({"model__freeze": ("",)}, ["--model.freeze"]),
        ({"optim__clip_mode": "agc"}, ["--optim.clip_mode=agc", "--optim.clip_norm"]),
        ({"optim__betas": (0.9, 1.0)}, ["--optim.betas=[0.9, 1.0]"]),
        ({"optim__eps": 0.0}, ["--optim.eps=0.0"]),
        ({"optim__alpha": 1.0}, ["--optim.alpha=1.0"]),
        ({"optim__layer_decay": 1.5}, ["--optim.layer_decay=1.5", "(0, 1]"]),
        ({"optim__lr_base_batch_size": 64}, ["--optim.lr_base_batch_size=64", "--optim.lr_scaling"]),
        (
            {"optim__lr": 0.1, "optim__lr_scaling": "linear", "schedule__min_lr": 0.05, "train__batch_size": 64},
            ["--schedule.min_lr=0.05", "--optim.lr=0.1", "0.025"],
        ),
        ({"schedule__warmup_lr": 0.1}, ["--schedule.warmup_lr", "--schedule.warmup_epochs"]),
        ({"schedule__cooldown_epochs": -1.0}, ["--schedule.cooldown_epochs=-1.0"]),
        ({"schedule__period_factor": 0.5}, ["--schedule.period_factor=0.5", "at least 1"]),
        ({"train__ema_warmup": "power"}, ["--train.ema_warmup=power", "--train.ema_decay"]),
        ({"train__class_weights": (1.0, -1.0)}, ["--train.class_weights=[1.0, -1.0]"]),
        (
            {"train__class_weights": "balanced", "data__sampling": "balanced"},
            ["--data.sampling=balanced", "--train.class_weights=balanced"],
        ),
        ({"augment__mix_prob": 1.1}, ["--augment.mix_prob=1.1", "[0, 1]"]),
        ({"augment__mix_switch_prob": -0.1}, ["--augment.mix_switch_prob=-0.1", "[0, 1]"]),
        ({"augment__erasing_count": 0}, ["--augment.erasing_count=0", "at least 1"]),
        ({"augment__progressive_size": 0, "augment__progressive_epochs": 1}, ["--augment.progressive_size=0"]),
        ({"augment__progressive_size": 16}, ["--augment.progressive_size", "--augment.progressive_epochs"]),
        (
            {"augment__progressive_size": 16, "augment__progressive_epochs": 11},
            ["--augment.progressive_epochs=11", "--train.epochs=10"],
        ),
        ({"augment__mix_off_epoch": 0}, ["--augment.mix_off_epoch=0", "at least 1"]),
        ({"train__bce_target_threshold": 1.0}, ["--train.bce_target_threshold=1.0", "[0, 1)"]),
        ({"augment__policy_ops": 0}, ["--augment.policy_ops=0", "at least 1"]),
        ({"augment__policy_magnitude_std": -1.0}, ["--augment.policy_magnitude_std=-1.0"]),
        ({"augment__policy_magnitude": 31.0}, ["--augment.policy_magnitude=31.0", "[0, 30]"]),
        (
            {"augment__policy_magnitude": 11.0, "augment__policy_space": "timm"},
            ["--augment.policy_magnitude=11.0", "[0, 10]", "--augment.policy_space=timm"],
        ),
        (
            {"augment__policy": "augmix", "augment__policy_magnitude": 2.5},
            ["--augment.policy_magnitude=2.5", "1 to 10"],
        ),
        ({"augment__mean": (0.5,)}, ["--augment.mean", "--augment.std"]),
        ({"augment__std": (0.5,)}, ["--augment.mean", "--augment.std"]),
        ({"augment__mean": (0.5,), "augment__std": (0.0,)}, ["--augment.std=(0.0,)"]),
        ({"model__dropout": 1.0}, ["--model.dropout=1.0", "[0, 1)"]),
        ({"model__drop_path": -0.1}, ["--model.drop_path=-0.1"]),
        ({"model__noise": -0.1}, ["--model.noise=-0.1"]),
        ({"model__width": 0}, ["--model.width=0"]),
        ({"model__hidden": (64, 0)}, ["--model.hidden=[64, 0]"]),
        ({"optim__lr": 0.0}, ["--optim.lr=0.0"]),
        ({"optim__lr": float("nan")}, ["--optim.lr=nan", "a number"]),
        ({"optim__weight_decay": -1e-4}, ["--optim.weight_decay=-0.0001"]),
        ({"optim__l1": -1e-4}, ["--optim.l1=-0.0001"]),
        ({"optim__name": "sgd", "optim__momentum": 1.0}, ["--optim.momentum=1.0", "[0, 1)"]),
        ({"optim__name": "sgd", "optim__nesterov": True}, ["--optim.nesterov", "--optim.momentum"]),
        ({"optim__clip_norm": 0.0}, ["--optim.clip_norm=0.0"]),
        ({"schedule__warmup_epochs": -1.0}, ["--schedule.warmup_epochs=-1.0"]),
        ({"schedule__min_lr": -1.0}, ["--schedule.min_lr=-1.0"]),
        ({"schedule__patience": -1}, ["--schedule.patience=-1"]),
        ({"schedule__period_epochs": 0.0}, ["--schedule.period_epochs=0.0"]),
        ({"schedule__gamma": 0.0}, ["--schedule.gamma=0.0"]),
        ({"schedule__power": -2.0}, ["--schedule.power=-2.0"]),
        ({"schedule__peak": 0.0}, ["--schedule.peak=0.0"]),
        ({"schedule__peak": 1.0}, ["--schedule.peak=1.0"]),
        ({"schedule__milestones": (3.0, 2.0)}, ["--schedule.milestones=[3.0, 2.0]"]),
        ({"schedule__name": "multistep"}, ["--schedule.name=multistep", "--schedule.milestones"]),
        ({"train__batch_size": 0}, ["--train.batch_size=0"]),
        ({"train__epochs": 0}, ["--train.epochs=0"]),
        ({"train__micro_batch_size": 0}, ["--train.micro_batch_size=0"]),
        ({"train__max_steps": 0}, ["--train.max_steps=0"]),
        ({"train__validate_every_epochs": 0}, ["--train.validate_every_epochs=0"]),
        ({"train__best_from_epoch": 0}, ["--train.best_from_epoch=0"]),
        ({"train__early_stop_epochs": 0}, ["--train.early_stop_epochs=0"]),
        ({"train__label_smoothing": 1.0}, ["--train.label_smoothing=1.0", "[0, 1)"]),
        ({"train__ema_decay": 1.0}, ["--train.ema_decay=1.0", "[0, 1)"]),
        (
            {"train__batch_size": 100, "train__micro_batch_size": 48},
            ["--train.batch_size=100", "--train.micro_batch_size=48", "96 or 144"],
        ),
        ({"train__batch_size": 32, "train__micro_batch_size": 48}, ["=32", "=48", "nearest that is: 48"]),
        ({"runtime__threads": 0}, ["--runtime.threads=0"]),
        ({"runtime__rendezvous_seconds": 0}, ["--runtime.rendezvous_seconds=0"]),
        ({"runtime__stuck_seconds": 9}, ["--runtime.stuck_seconds=9"]),
        (
            {"runtime__dtype": "float64", "runtime__precision": "bf16"},
            ["--runtime.dtype=float64", "--runtime.precision=bf16"],
        ),
        ({"runtime__portable": True, "runtime__dtype": "float64"}, ["--runtime.portable", "--runtime.dtype=float64"]),
        ({"runtime__portable": True, "runtime__exact": False}, ["--runtime.portable", "--runtime.exact=false"]),
        (
            {"runtime__portable": True, "runtime__compile": "default"},
            ["--runtime.portable", "--runtime.compile=default"],
        ),
        ({"runtime__portable": True, "runtime__precision": "bf16"}, ["--runtime.portable", "--runtime.precision=bf16"]),
        ({"checkpoint__every_steps": 0}, ["--checkpoint.every_steps=0"]),
        ({"checkpoint__keep_every_steps": 0}, ["--checkpoint.keep_every_steps=0"]),
        ({"train__max_bad_steps": 0}, ["--train.max_bad_steps=0"]),
        ({"run__max_hours": 0.0}, ["--run.max_hours=0.0"]),
        ({"data__num_classes": 1}, ["--data.num_classes=1"]),
        ({"schedule__min_lr": 0.2, "optim__lr": 0.1}, ["--schedule.min_lr=0.2", "--optim.lr=0.1"]),
        (
            {"train__micro_batch_size": "auto", "runtime__sync_batchnorm": True},
            ["--train.micro_batch_size=auto", "--runtime.sync_batchnorm"],
        ),
        ({"checkpoint__every_epochs": 0}, ["--checkpoint.every_epochs=0"]),
        ({"checkpoint__keep_last": 0}, ["--checkpoint.keep_last=0"]),
        ({"log__every_steps": 0}, ["--log.every_steps=0"]),
        ({"log__histogram_every_steps": 0}, ["--log.histogram_every_steps=0"]),
        ({"train__batch_size": 64, "data__repeats": 3}, ["--train.batch_size=64", "--data.repeats=3"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_contradiction_names_the_flag_and_the_numbers(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        configured(**settings)
    message = str(refusal.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "settings",
    [
        {"data__val_fraction": 0.0, "data__memory_budget": 0.0, "data__workers": -1},
        {"augment__resized_crop": 1.0, "augment__erasing": 1.0, "augment__eval_crop": 1.0, "augment__mixup": 0.0},
        {"augment__jitter": (0.4, 0.4, 0.4, 0.5), "augment__mean": (0.0,), "augment__std": (0.1,)},
        {"optim__name": "sgd", "optim__momentum": 0.9, "optim__nesterov": True},
        {"optim__name": "rmsprop", "optim__momentum": 0.9},
        {"schedule__name": "multistep", "schedule__milestones": (1.0, 1.0, 2.5), "schedule__patience": 0},
        {"train__batch_size": 96, "train__micro_batch_size": 32, "data__repeats": 3},
        {"train__loss": "nll", "train__ema_decay": 0.0},
        {"runtime__dtype": "float64", "runtime__precision": "no"},
        {"model__pretrained": True, "model__hidden": (1,)},
        {"model__pretrained": True, "model__checkpoint": "x"},
        {"train__batch_size": -1, "train__micro_batch_size": 7, "optim__lr_scaling": "sqrt", "data__repeats": 2},
        {"train__epochs": -1, "augment__progressive_size": 8, "augment__progressive_epochs": 20},
        {"data__folds": 2, "data__fold": 1, "data__test_fraction": 0.0},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_the_edge_of_what_makes_sense_is_accepted(settings: dict[str, Any]) -> None:
    config = configured(**settings)
    for name, value in settings.items():
        section, key = name.split("__")
        assert getattr(getattr(config, section), key) == value


def other_value(value: Any, annotation: Any) -> Any:
    """A valid value that differs from a default."""
    if isinstance(value, bool):
        return not value
    choices = [c for c in get_args(annotation) if isinstance(c, str)]
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, int | float):
        return value * 2 or 1
    if isinstance(value, tuple):
        return ("other",) if get_args(annotation)[0] is str else (1,)
    return {str: "other", type(None): None}[type(value)]


CHANGES = {
    "runtime.compile": "default",
    "data.workers": 3,
    "run.name": "other", "run.max_hours": 1.0, "run.group": "other", "data.num_classes": 12, "data.val_fraction": 0.2,
    "augment.image_size": 16, "augment.mixup": 0.2, "augment.cutmix": 1.0, "augment.mean": (0.4,), "augment.std": (1,),
    "augment.mix_prob": 0.5, "augment.mix_off_epoch": 3, "train.bce_target_threshold": 0.2,
    "augment.policy_magnitude": 5.0, "augment.progressive_size": 16, "augment.progressive_epochs": 4,
    "augment.translate": 0.1, "augment.zoom": 0.1, "augment.perspective": 0.1, "augment.eval_crop": 0.9,
    "run.from_run": "x", "data.folds": 5, "data.fold": 1, "data.samples_per_class": 5,
    "data.image_column": "x", "data.label_column": "x",
    "model.dropout": 0.1, "model.drop_path": 0.1, "model.width": 8, "model.checkpoint": "x", "optim.momentum": 0.9,
    "optim.clip_norm": 1.0, "train.micro_batch_size": 16, "train.max_steps": 5,
    "train.ema_decay": 0.9, "checkpoint.keep_every_steps": 5,
    "train.label_smoothing": 0.1, "train.early_stop_epochs": 2, "runtime.threads": 3, "checkpoint.every_steps": 5,
    "log.histogram_every_steps": 5, "schedule.min_lr": 1e-5, "schedule.warmup_lr": 1e-5,
    "model.global_pool": "max", "optim.layer_decay": 0.75, "optim.betas": (0.9, 0.95), "optim.eps": 1e-3,
    "optim.alpha": 0.9, "train.class_weights": (1.0, 2.0),
}  # fmt: skip
# A setting that is valid only beside another is changed from a Config that already has the other.
COMPANIONS = {
    "data.fold": {"data__folds": 5},
    "data.image_column": {"data__source": "hf:x"},
    "data.label_column": {"data__source": "hf:x"},
    "augment.progressive_size": {"augment__progressive_size": 8, "augment__progressive_epochs": 4},
    "augment.progressive_epochs": {"augment__progressive_size": 8, "augment__progressive_epochs": 3},
    "optim.momentum": {"optim__name": "sgd"},
    "optim.nesterov": {"optim__name": "sgd", "optim__momentum": 0.9},
    "augment.mean": {"augment__mean": (0.5,), "augment__std": (0.5,)},
    "augment.std": {"augment__mean": (0.5,), "augment__std": (0.5,)},
    "augment.from_pretrained": {"model__name": "timm/resnet18", "model__pretrained": True},
    "optim.lr_base_batch_size": {"optim__lr_scaling": "linear"},
    "optim.clip_mode": {"optim__clip_norm": 0.01},
    "schedule.warmup_lr": {"schedule__warmup_epochs": 2.0},
    "train.ema_warmup": {"train__ema_decay": 0.9},
}
SHAPELESS = {
    "run.name", "run.root", "run.resume", "run.max_hours", "run.notes", "run.tags", "run.group",
    "data.root", "data.cache_dir", "data.workers", "model.summary", "model.grad_checkpointing", "train.max_bad_steps",
    "runtime.compile", "runtime.threads", "runtime.profile", "runtime.fsdp",
    "runtime.backend", "runtime.bucket_view", "runtime.static_graph", "runtime.rendezvous_seconds",
    "runtime.stuck_seconds",
    "checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.keep_last", "checkpoint.keep_every_steps",
    "log.every_steps", "log.wandb", "log.project", "log.tensorboard", "log.histogram_every_steps", "log.figures",
    "log.artifacts", "log.trackers", "log.all_nodes",
}  # fmt: skip


@pytest.mark.parametrize(("section", "key"), SETTINGS, ids=[".".join(setting) for setting in SETTINGS])
def test_the_digest_changes_with_what_shapes_the_result_and_with_nothing_else(section: str, key: str) -> None:
    flag = f"{section}.{key}"
    before = configured(**COMPANIONS.get(flag, {}))
    annotation = SECTIONS[section].__annotations__[key]
    value = CHANGES.get(flag, other_value(getattr(getattr(before, section), key), annotation))
    after = replace(before, **{section: replace(getattr(before, section), **{key: value})})
    assert after != before
    assert (settings_digest(after) == settings_digest(before)) == (flag in SHAPELESS)


def test_the_learning_rate_is_a_function_of_the_batch_size() -> None:
    assert configured(optim__lr=0.1, train__batch_size=1024).lr == 0.1
    linear = configured(optim__lr=0.1, optim__lr_scaling="linear", train__batch_size=1024)
    assert linear.lr == pytest.approx(0.4)
    root = configured(optim__lr=0.1, optim__lr_scaling="sqrt", optim__lr_base_batch_size=64, train__batch_size=16)
    assert root.lr == pytest.approx(0.05)


def test_a_digest_is_six_hex_digits_and_the_same_for_equal_settings() -> None:
    digest = settings_digest(Config())
    assert len(digest) == 6 and int(digest, 16) >= 0
    assert settings_digest(configured(optim__lr=1e-3)) == digest


def test_shaping_settings_are_named_as_on_the_command_line() -> None:
    flags = {f"{section}.{key}" for section, key in SETTINGS}
    assert set(shaping_settings(Config())) == flags - SHAPELESS
    assert SHAPELESS < flags


def test_a_setting_at_its_default_leaves_the_digest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a new setting renames no run that does not use it."""
    before = settings_digest(configured(optim__lr=0.5))

    def without(config: Config) -> dict[str, Any]:
        return {key: value for key, value in shaping_settings(config).items() if key != "optim.l1"}

    monkeypatch.setattr(lockstep.settings.config, "shaping_settings", without)
    assert settings_digest(configured(optim__lr=0.5)) == before != settings_digest(Config())


@pytest.mark.parametrize("cls", SECTIONS.values(), ids=SECTIONS)
def test_every_setting_is_explained_in_a_line_below_it(cls: type) -> None:
    body = ast.parse(inspect.getsource(cls)).body[0].body
    for statement, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            explained = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            assert explained, f"{cls.__name__}.{ast.unparse(statement.target)} has no docstring"
            text = below.value.value
            assert len(text) > 5 and "\n" not in text
    assert cls.__doc__


def test_every_section_is_frozen_and_has_a_default_for_all_its_settings() -> None:
    config = Config()
    for name, section in vars(config).items():
        assert is_dataclass(section) and section == SECTIONS[name]()
        setting = fields(section)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(section, setting, None)
    with pytest.raises(FrozenInstanceError):
        config.run = config.run  # type: ignore[misc]


def test_settings_know_nothing_of_torch_or_files() -> None:
    tree = ast.parse(inspect.getsource(lockstep.settings.config))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"hashlib", "json", "dataclasses", "typing", "lockstep.errors", "lockstep.settings.types"}
