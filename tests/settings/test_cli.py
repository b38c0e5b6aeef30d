"""The command line as a user meets it: what wins, what is refused in one line, and what reloads as it was written."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import UsageError
from lockstep.settings.cli import _ELSEWHERE, RECIPES, Evaluation, parse_config, parse_evaluation
from lockstep.settings.config import Config, settings_digest
from lockstep.settings.yaml import HINTS, config_to_yaml, load_config

ROOT = RECIPES.parent
Refusal = Callable[..., str]


@pytest.fixture(autouse=True)
def first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe file."""

    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def refusal(capfd: pytest.CaptureFixture[str]) -> Refusal:
    """The one line that a command line is refused with."""

    def refused(*arguments: str, parse: Callable[..., Any] = parse_config) -> str:
        with pytest.raises(UsageError) as end:
            parse(list(arguments))
        assert capfd.readouterr() == ("", ""), "only the program speaks, and ends"
        assert "\n" not in str(end.value)
        return str(end.value)

    return refused


def run_program(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a program of the project, without a launcher; returns it and the CPU seconds it spent outside the kernel."""
    child = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "1000", "PYTHONPATH": "src", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout and child.stderr
    with child.stdout, child.stderr:
        out, err = child.stdout.read(), child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return subprocess.CompletedProcess(child.args, child.returncode, out, err), usage.ru_utime


# ---- What wins -------------------------------------------------------------------------------------------------------


def test_without_arguments_the_quick_start_is_trained() -> None:
    config = parse_config([])
    assert config == parse_config(["--config", str(RECIPES / "digits_cnn.yaml")])
    assert config.data.source == "embedded:digits"
    assert config.run.name == f"digits_cnn-{settings_digest(config)}"


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(recipe: Callable[..., Path]) -> None:
    path = recipe("optim: {lr: 0.5, weight_decay: 0.01}")
    config = parse_config(["--config", str(path), "--optim.lr=0.25"])
    assert (config.optim.lr, config.optim.weight_decay, config.optim.name) == (0.25, 0.01, "adamw")
    assert config.run.name == f"mine-{settings_digest(config)}"


def test_the_last_one_wins(recipe: Callable[..., Path]) -> None:
    path = recipe("optim: {lr: 0.5}")
    assert parse_config(["--config", str(path), "--optim.lr=0.1", "--optim.lr", "0.2"]).optim.lr == 0.2
    assert parse_config(["--optim.lr=0.1", f"--config={path}"]).optim.lr == 0.5


def test_several_recipes_follow_one_another(recipe: Callable[..., Path]) -> None:
    first = recipe("optim: {lr: 0.5, weight_decay: 0.01}\ntrain: {epochs: 3}", "first.yaml")
    second = recipe("optim: {lr: 0.25}", "second.yaml")
    config = parse_config(["--config", str(first), "--config", str(second)])
    assert (config.optim.lr, config.optim.weight_decay, config.train.epochs) == (0.25, 0.01, 3)
    assert str(config.run.name).startswith("second-")
    assert parse_config([f"--config={second}", f"--config={first}"]).optim.lr == 0.5


def test_a_given_name_stays() -> None:
    assert parse_config(["--run.name=mine"]).run.name == "mine"
    assert parse_config(["--run.name=007"]).run.name == "007"


def test_the_form_that_wandb_agents_use() -> None:
    arguments = "--optim.lr=1e-05 --train.ema_decay=0.99 --augment.mixup=None --augment.flip=True".split()
    config = parse_config([*arguments, "--augment.jitter=[0.2, 1.0]", "--model.name=timm/resnet18"])
    assert (config.optim.lr, config.train.ema_decay, config.augment.mixup) == (1e-5, 0.99, None)
    assert config.augment.flip is True and config.augment.jitter == (0.2, 1.0) and config.model.name == "timm/resnet18"
    ours = "--optim.lr 0.00001 --train.ema_decay 0.99 --augment.mixup null --augment.flip true".split()
    assert parse_config([*ours, "--augment.jitter", "[0.2,1.0]", "--model.name", "timm/resnet18"]) == config


def test_nothing_is_written_null_or_none(recipe: Callable[..., Path]) -> None:
    path = str(recipe("augment: {mixup: 0.2}\ntrain: {ema_decay: 0.9}"))
    for nothing in ("None", "null"):
        config = parse_config(["--config", path, f"--augment.mixup={nothing}", f"--train.ema_decay={nothing}"])
        assert config.augment.mixup is None and config.train.ema_decay is None
    assert parse_config(["--run.notes=momentum=None"]).run.notes == "momentum=None"


def test_words_that_older_yaml_takes_for_something_else_are_words(recipe: Callable[..., Path]) -> None:
    path = recipe("runtime: {precision: no}\nrun: {notes: 2020-01-01, name: off}")
    config = parse_config(["--config", str(path)])
    assert (config.runtime.precision, config.run.notes, config.run.name) == ("no", "2020-01-01", "off")


def test_yaml_and_flags_take_numbers_as_people_write_them(recipe: Callable[..., Path]) -> None:
    config = parse_config(["--config", str(recipe("optim: {lr: 1e-4}\nrun: {max_hours: 2}")), "--schedule.min_lr=1E-6"])
    assert (config.optim.lr, config.schedule.min_lr, config.run.max_hours) == (1e-4, 1e-6, 2.0)


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--optim.lrr=1"], ["--optim.lrr", "optim.lr"]),
        (["--opt.lr=1"], ["--opt.lr", "optim.lr"]),
        (["--lr=1"], ["--lr", "optim.lr"]),
        (["--train.batchsize=8"], ["--train.batchsize", "train.batch_size"]),
        (["--conf=x"], ["--conf", "config"]),
        (["--augment.mix=0.2"], ["--augment.mix", "augment.mixup"]),  # the beginning of a name is not the name
        (["--print_confg"], ["--print_confg", "print_config"]),
        (["stray"], ["stray"]),
        (["--optim.lr=abc"], ["--optim.lr=abc", "a number"]),
        (["--train.epochs=1.5"], ["--train.epochs=1.5", "a whole number"]),
        (["--augment.flip=maybe"], ["--augment.flip=maybe", "true or false"]),
        (["--run.max_hours=abc"], ["--run.max_hours=abc", "a number or null"]),
        (["--augment.jitter=[a]"], ["--augment.jitter=[a]", "a list of numbers"]),
        (["--augment.jitter=0.3"], ["--augment.jitter=0.3", "a list of numbers"]),
        (["--optim.lr=inf"], ["--optim.lr=inf", "a number"]),
        (["--optim.lr=null"], ["--optim.lr=null", "a number"]),
        (["--augment.noise=.nan"], ["--augment.noise=nan", "a number"]),
        (["--run.seed=true"], ["--run.seed=true", "a whole number"]),
        (["--optim={lrr: 1}"], ["--optim.lrr", "optim.lr"]),
        (["--optim=sgd"], ["--optim=sgd", "--optim.key=value"]),
        (["--run.resume=maybe"], ["--run.resume=maybe", "auto, never, must"]),
        (["--train.epochs=0"], ["--train.epochs=0", "at least 1"]),
        (["--train.batch_size=64", "--train.micro_batch_size=48"], ["=64", "=48", "48 or 96"]),
        (["--train.epochs"], ["--train.epochs", "argument"]),
        (["--config"], ["--config", "argument"]),
        (["--config", "configs/digits_cn.yaml"], ["configs/digits_cn.yaml", "configs/digits_cnn.yaml"]),
        (["--config=configs"], ["configs is not a file"]),
    ],
    ids=lambda value: " ".join(value) if "-" in value[0] else "",
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: list[str], parts: list[str], refusal: Refusal) -> None:
    message = refusal(*arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optimm: {lr: 1}", ["mine.yaml", "optimm", "Did you mean optim"]),
        ("optim: {lrr: 1}", ["mine.yaml", "optim.lrr", "Did you mean optim.lr"]),
        ("lr: 1", ["mine.yaml", "unknown section lr", "optim.lr"]),
        ("1: {a: 2}", ["mine.yaml", "unknown section 1"]),
        ("optim: 3", ["mine.yaml", "section optim", "settings"]),
        ("optim:", ["mine.yaml", "section optim", "settings"]),
        ("- 1", ["mine.yaml", "list"]),
        ("", ["mine.yaml", "nothing"]),
        ("# optim:\n", ["mine.yaml", "nothing"]),
        ("optim: {lr: [1", ["mine.yaml", "not YAML", "line 1"]),
        ("optim:\n\tlr: 1\n", ["mine.yaml", "not YAML", "line 2"]),
        ("optim: {lr: fast}", ["mine.yaml", "--optim.lr=fast", "a number"]),
        ("optim: {lr: 1, lr: 2}", ["mine.yaml", "lr stands there twice"]),
        ("optim: {lr: 1}\noptim: {l1: 1}", ["mine.yaml", "optim stands there twice"]),
        ("optim: {lr: .inf}", ["mine.yaml", "--optim.lr=inf", "a number"]),
        ("schedule: {milestones: [1, .nan]}", ["mine.yaml", "--schedule.milestones=[1, nan]", "a list of numbers"]),
        ("run: {notes: 5}", ["mine.yaml", "--run.notes=5", "text"]),
        ("a: " + "[" * 5000, ["mine.yaml", "nested too deeply"]),
        ("optim: {lr: -1}", ["--optim.lr=-1"]),
        ("augment: {mean: [0.5]}", ["--augment.mean", "--augment.std"]),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(
    text: str, parts: list[str], recipe: Callable[..., Path], refusal: Refusal
) -> None:
    message = refusal("--config", str(recipe(text)))
    assert all(part in message for part in parts), message


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0\x00")
    assert "image.yaml is not YAML" in refusal(f"--config={tmp_path / 'image.yaml'}")


def test_the_second_of_two_recipes_is_checked_too(recipe: Callable[..., Path], refusal: Refusal) -> None:
    good, bad = recipe("optim: {lr: 1}", "good.yaml"), recipe("optim: {lrr: 1}", "bad.yaml")
    assert "bad.yaml" in refusal(f"--config={good}", f"--config={bad}")


# ---- Whole programs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_page() -> tuple[str, float]:
    program, cpu_seconds = run_program("train.py", "--help")
    assert program.returncode == 0 and program.stderr == ""
    return program.stdout, cpu_seconds


def test_help_takes_less_than_a_second(help_page: tuple[str, float]) -> None:
    assert help_page[1] < 1


def test_help_explains_every_setting_in_its_section(help_page: tuple[str, float]) -> None:
    import ast
    import inspect

    import lockstep.settings.config

    flat = " ".join(help_page[0].split())
    for section, values in vars(Config()).items():
        body = ast.parse(inspect.getsource(type(values))).body[0].body  # type: ignore[attr-defined]
        texts = [node.value.value for node in body if isinstance(node, ast.Expr)]
        assert len(texts) == len(fields(values)) + 1
        assert texts[0].rstrip(".") in flat
        for setting, text in zip(fields(values), texts[1:], strict=True):
            place = flat.index(f"--{section}.{setting.name} ")
            assert text in flat[place : place + 400], f"--{section}.{setting.name} is not explained"
    assert lockstep.settings.config.__name__ not in flat, "help should not show Python's names"


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_a_mistake_ends_the_program_with_code_2_and_one_line(script: str) -> None:
    program, cpu_seconds = run_program(script, "--run.sead=1", "--checkpoint=x")
    assert program.returncode == 2 and program.stdout == "" and program.stderr.count("\n") == 1
    assert cpu_seconds < 1, "mistakes should be found before torch is imported"


def test_eval_help_takes_less_than_a_second() -> None:
    program, cpu_seconds = run_program("eval.py", "--help")
    assert program.returncode == 0 and cpu_seconds < 1
    assert all(flag in program.stdout for flag in ("--run", "--checkpoint", "--split"))


def test_parsing_needs_no_torch_and_uses_nothing_deprecated() -> None:
    code = (
        "import sys; from lockstep.settings.cli import parse_config; parse_config(sys.argv[1:]); "
        "sys.exit(', '.join({'torch', 'numpy', 'wandb', 'accelerate'} & set(sys.modules)) or None)"
    )
    program, _ = run_program("-W", "error", "-c", code, "--optim.lr=0.1", "--augment.mixup=None")
    assert (program.returncode, program.stdout, program.stderr) == (0, "", "")


def test_print_run_dir_is_where_the_same_command_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """Job scripts ask for it before they start the launcher."""
    arguments = ["--run.root=elsewhere", "--optim.lr=0.1"]
    with pytest.raises(SystemExit) as end:
        parse_config([*arguments, "--print_run_dir"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"elsewhere/{parse_config(arguments).run.name}\n"


def test_print_config_reads_back_as_an_equal_config(tmp_path: Path) -> None:
    arguments = ["--run.name=mine", "--augment.jitter=[0.2,0.3]", "--train.ema_decay=0.99", "--run.notes=a: b # c"]
    program, _ = run_program("train.py", *arguments, "--print_config")
    assert program.returncode == 0 and program.stderr == ""
    printed = tmp_path / "printed.yaml"
    printed.write_text(program.stdout)
    assert parse_config(["--config", str(printed)]) == parse_config(arguments)


# ---- eval.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a run with two checkpoints, as far as the command line looks."""
    run = tmp_path / "runs" / "digits-abc123"
    for step in (10, 20):
        checkpoint = run / "checkpoints" / f"step_{step:08}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.yaml").write_text(config_to_yaml(parse_config(["--run.name=digits-abc123"])))
    (run / "checkpoints" / "best").symlink_to("step_00000010")
    (run / "checkpoints" / "last").symlink_to("step_00000020")
    (run / "config.yaml").write_text(config_to_yaml(parse_config(["--run.name=digits-abc123", "--train.epochs=7"])))
    return run


def evaluation(*arguments: str) -> Evaluation:
    return parse_evaluation(list(arguments))


def test_a_run_is_evaluated_by_its_best_checkpoint_on_the_test_split(trained: Path) -> None:
    request = evaluation("--run", str(trained))
    assert request.checkpoint == trained / "checkpoints" / "best" and request.folder == trained
    assert request.split == "test" and request.config == load_config(trained / "config.yaml")
    assert evaluation(f"--run={trained}", "--checkpoint=last").checkpoint.resolve().name == "step_00000020"


def test_a_checkpoint_alone_brings_its_own_settings(trained: Path) -> None:
    checkpoint = trained / "checkpoints" / "step_00000020"
    request = evaluation("--checkpoint", str(checkpoint), "--split", "val")
    assert (request.checkpoint, request.folder, request.split) == (checkpoint, checkpoint, "val")
    assert request.config.train.epochs != 7


def test_a_temperature_is_given_or_fitted(trained: Path) -> None:
    assert evaluation("--run", str(trained)).temperature is None
    assert evaluation("--run", str(trained), "--temperature", "fit").temperature == "fit"
    assert evaluation("--run", str(trained), "--temperature=1.5").temperature == 1.5


def test_the_average_of_the_weights_or_the_weights_themselves(trained: Path, refusal: Refusal) -> None:
    best = trained / "checkpoints" / "best"
    (best / "model.safetensors").touch()
    assert evaluation("--run", str(trained), "--ema=false").checkpoint == best / "model.safetensors"
    assert "no" in refusal("--run", str(trained), "--ema=true", parse=parse_evaluation)
    (best / "ema.safetensors").touch()
    assert evaluation("--run", str(trained), "--ema=true").checkpoint == best / "ema.safetensors"
    assert evaluation("--run", str(trained)).checkpoint == best
    file = f"--checkpoint={best}/ema.safetensors"
    assert "chooses a file of a" in refusal("--run", str(trained), file, "--ema=false", parse=parse_evaluation)


def test_published_weights_are_evaluated_without_a_run() -> None:
    flags = ("--model.name=timm/resnet18", "--model.pretrained=true", "--data.source=folder:photos", "--split=val")
    request = evaluation(*flags)
    assert request.checkpoint is None and request.split == "val" and request.config.augment.from_pretrained
    assert request.folder.parent == Path("runs") and request.folder.name.startswith("resnet18-")
    assert request.folder != evaluation(*flags, "--model.drop_path=0.1").folder


def test_what_published_weights_do_not_have_is_refused(trained: Path, refusal: Refusal) -> None:
    flags = ("--model.name=timm/resnet18", "--model.pretrained=true", "--ema=true")
    assert "no average" in refusal(*flags, parse=parse_evaluation)
    for place in (trained, trained / "checkpoints" / "best"):  # whose classes and normalisation would be others
        assert "give --run runs/NAME" in refusal(f"--model.checkpoint={place}", parse=parse_evaluation)


def test_one_setting_can_be_changed_for_an_evaluation(trained: Path) -> None:
    request = evaluation("--run", str(trained), "--data.source=folder:/elsewhere", "--augment.mean=None")
    assert request.config.data.source == "folder:/elsewhere" and request.config.train.epochs == 7


def test_an_evaluation_uses_the_precision_of_the_last_start(trained: Path) -> None:
    (trained / "environment.json").write_text('[{"precision": "no"}, {"precision": "bf16"}]')
    assert evaluation("--run", str(trained)).config.runtime.precision == "bf16"
    assert evaluation("--run", str(trained), "--runtime.precision=no").config.runtime.precision == "no"
    (trained / "environment.json").write_text("[")
    assert evaluation("--run", str(trained)).config.runtime.precision == "launch"


def test_a_mistake_in_an_evaluation_is_one_line(trained: Path, refusal: Refusal) -> None:
    def refused(*arguments: str) -> str:
        return refusal(*arguments, parse=parse_evaluation)

    assert "--run" in refused()
    misspelt = refused("--run", str(trained.with_name("digits-abc12")))
    assert "no run" in misspelt and f"Did you mean {trained}?" in misspelt
    assert "no checkpoint" in refused("--run", str(trained), "--checkpoint=nowhere")
    (trained / "checkpoints" / "best").unlink()
    assert "best yet" in refused("--run", str(trained))
    assert "config.yaml" in refused("--checkpoint", str(trained / "checkpoints"))
    unknown = refused("--run", str(trained), "--checkpoint=last", "--optim.lrr=1")
    assert "--optim.lrr" in unknown and "optim.lr" in unknown
    choice = refused("--run", str(trained), "--split=tset")
    assert "--split" in choice and "'tset'" in choice and "'train', 'val', 'test'" in choice
    assert "--run" in refused("--run")
    for wrong in ("hot", "0", "-1", "nan", "inf"):
        assert f"'{wrong}' is neither fit nor a number above 0" in refused(f"--run={trained}", f"--temperature={wrong}")


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--learning_rate=1", "--optim.lr"),
        ("--train.lerning-rate=1", "--optim.lr"),
        ("--num_workers=2", "--data.workers"),
        ("--gradient_accumulation_steps=4", "--train.micro_batch_size"),
        ("--weight_decay=0", "Did you mean optim.weight_decay"),
    ],
)
def test_what_other_programs_call_a_setting_is_answered_with_its_name_here(flag: str, ours: str) -> None:
    with pytest.raises(UsageError, match=ours):
        parse_config([flag])


def test_every_name_of_other_programs_stands_for_a_setting() -> None:
    assert set(_ELSEWHERE.values()) <= set(HINTS)
