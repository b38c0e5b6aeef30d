"""`lockstep export`: each form gives the network's predictions, its card is true, and the card's snippet runs."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from programs import QUICK, ROOT, environment, read_lines
from safetensors.torch import load_file, save_file
from torch import Tensor

from lockstep.commands.export import main
from lockstep.data.images import Data, build_data
from lockstep.errors import UsageError, UserError
from lockstep.export import formats
from lockstep.export.card import source_name
from lockstep.export.classifier import load_exported
from lockstep.export.formats import FORMATS, Outputs
from lockstep.export.preprocessing import read_preprocessing
from lockstep.files import write_manifest
from lockstep.models.network import build_model
from lockstep.settings.cli import parse_config
from lockstep.settings.config import Config
from lockstep.settings.yaml import config_to_yaml, load_config


def untrained(run: Path, *arguments: str) -> Path:
    """A run folder with a checkpoint of first weights."""
    config = parse_config([f"--data.cache_dir={run / 'cache'}", f"--run.name={run.name}", *arguments])
    data = data_of(run, config)
    torch.manual_seed(0)
    model = build_model(config.model, data.image_shape, data.num_classes)
    checkpoint = run / "checkpoints" / "best"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(config_to_yaml(config))
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    write_manifest(checkpoint)
    return run


def data_of(run: Path, config: Config | None = None) -> Data:
    return build_data(config or load_config(run / "config.yaml"), run, write=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Digits, a network of ours, mirrored in evaluation."""
    return untrained(tmp_path / "ours", "--model.name=tiny_cnn", "--augment.tta=flip")


def export(run: Path, form: str, output: Path, *arguments: str) -> Path:
    for package in FORMATS[form].needs:
        pytest.importorskip(package)
    assert main([str(run), "--to", form, "--output", str(output), *arguments]) == 0
    return output


def put_image(data: Data, folder: Path) -> Tensor:
    """A test image as a file in the folder; returns it as networks take it."""
    pixels = data.test.load(3)
    assert pixels is not None
    Image.fromarray(pixels.numpy().squeeze()).save(folder / "image.png")
    return pixels.permute(2, 0, 1)[None].float() / 255


def snippet(folder: Path) -> str:
    """What the card's Python prints; in this process, for another would import torch for seconds."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    return said.getvalue()


# torch.export imports for seconds.
QUICK_ONES = ["safetensors", "hub-folder"]
ALL_FORMS = [form if form in QUICK_ONES else pytest.param(form, marks=pytest.mark.slow) for form in FORMATS]


@pytest.mark.parametrize("form", ALL_FORMS)
def test_each_form_says_what_the_network_says(
    form: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(run, form, tmp_path / "out")
    compared, files = capsys.readouterr().out.splitlines()
    expected = r"Compared with the network on 359 test images: probabilities differ by at most \S+, 0 predictions .*"
    assert re.fullmatch(expected, compared)
    for name in ("README.md", "preprocessing.json", FORMATS[form].file):
        assert name in files and (out / name).is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    data, outputs = data_of(run), FORMATS[form].read(out)
    image = put_image(data, out)
    assert torch.equal(read_preprocessing(out)[0].pixels(out / "image.png"), image)
    with torch.no_grad():
        logits = outputs(image)
        assert outputs(image.expand(5, -1, -1, -1)).shape == (5, 10)  # any number of images
    best = data.classes[int(logits.argmax())]
    assert re.search(rf"^\{{?'?{best}\b", snippet(out)), snippet(out)


@pytest.mark.parametrize("name", ["timm/test_resnet.r160_in1k", "timm/test_vit"])
def test_timm_loads_a_hub_folder_of_its_own_networks(name: str, tmp_path: Path) -> None:
    stem = ["--model.stem=imagenet"] if "resnet" in name else []
    size = ["--augment.image_size=48", "--augment.eval_crop=0.9"]
    run = untrained(tmp_path / "run", f"--model.name={name}", *stem, *size)
    out = export(run, "hub-folder", tmp_path / "out", "--images=20")
    described = json.loads((out / "config.json").read_text())
    assert described["architecture"] == name.removeprefix("timm/").split(".")[0]
    assert int(48 / described["pretrained_cfg"]["crop_pct"]) == 53
    data = data_of(run)
    Image.fromarray(np.asarray(data.test.split.read(3).convert("L"))).save(out / "image.png")
    (best, *_) = load_exported(out).classify(out / "image.png")  # the very pixels of evaluation
    assert snippet(out) == f"{best}\n"


def test_a_first_layer_of_ours_is_not_left_to_timm(tmp_path: Path) -> None:
    run = untrained(tmp_path / "run", "--model.name=timm/test_resnet")  # images of 8x8: the stem for CIFAR
    out = export(run, "hub-folder", tmp_path / "out", "--images=20")
    assert json.loads((out / "config.json").read_text())["architecture"] == "lockstep/test_resnet"
    put_image(data_of(run), out)
    assert "0." in snippet(out)


@pytest.mark.slow
def test_resizing_and_cropping_are_in_the_snippet(tmp_path: Path) -> None:
    size = ("--augment.image_size=12", "--augment.eval_crop=0.8")
    run = untrained(tmp_path / "run", "--model.name=tiny_cnn", *size)
    out = export(run, "torch_export", tmp_path / "out")
    data_of(run).test.split.read(3).resize((23, 31)).save(out / "image.png")
    weights = export(run, "safetensors", tmp_path / "weights")
    (best, *_) = load_exported(weights).classify(out / "image.png")
    assert snippet(out) == f"{best}\n"


def test_a_card_is_true(train_here: Callable[..., Path], tmp_path: Path) -> None:
    short = ("--model.name=tiny_cnn", "--train.max_steps=6", "--log.every_steps=1", "--train.ema_decay=0.5")
    run = train_here(*QUICK, "--run.name=digits", *short)
    card = (export(run, "safetensors", tmp_path / "out") / "README.md").read_text()
    lines, summary = read_lines(run), json.loads((run / "summary.json").read_text())
    digests = {line["step"]: line["digest"] for line in lines if "digest" in line}
    assert f"average: `{digests[summary['best_step']]}`" in card
    assert f"| test | 359 | {summary['test_accuracy']:.2%} | {summary['test_loss']:.4f} |" in card
    assert f"| validation (chose the weights) | 144 | {summary['best_val_accuracy']:.2%} |" in card
    assert "train.ema_decay: 0.5\n" in card and "trained on 1,294 images" in card
    assert torch.__version__.split("+")[0] in card and "license: CHOOSE ONE" in card and str(tmp_path) not in card

    exported, average = load_file(tmp_path / "out" / "model.safetensors"), run / "checkpoints" / "best"
    ema = load_file(average / "ema.safetensors")
    assert exported.keys() == ema.keys() and all(torch.equal(exported[name], ema[name]) for name in ema)

    other = export(run, "safetensors", tmp_path / "other", f"--checkpoint={run / 'checkpoints' / 'step_00000005'}")
    assert "Not measured for these weights" in (other / "README.md").read_text()


def test_a_card_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    assert source_name(f"folder:{tmp_path / 'pets'}") == "folder:pets"
    assert source_name("hf:uoft-cs/cifar10") == "hf:uoft-cs/cifar10"
    assert source_name("tar:/private/shards/train-{00..99}.tar") == "tar:train-{00..99}.tar"
    assert source_name("embedded:digits") == "embedded:digits"


def test_what_differs_is_not_exported(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run, "safetensors", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def read(folder: Path) -> Outputs:
        right = load_exported(folder)
        return lambda images: right(images) * (1 + 1e-3 * (images.mean((1, 2, 3)) > 0.3)[:, None])

    monkeypatch.setitem(formats.FORMATS, "safetensors", FORMATS["safetensors"]._replace(read=read))
    with pytest.raises(UserError, match=r"differ by at most .*, 0 predictions changed; --tolerance=1e-07 allows no"):
        main([str(run), "--to", "safetensors", f"--output={tmp_path / 'out'}", "--tolerance=1e-7"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="nothing was exported"):
        main([str(run), "--to", "safetensors", f"--output={tmp_path / 'new'}", "--tolerance=1e-7"])
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "out"}

    def read_badly(folder: Path) -> Outputs:
        right, scales = load_exported(folder), iter([torch.nan])
        return lambda images: right(images) * next(scales, 1.0)  # of the first batch alone

    monkeypatch.setitem(formats.FORMATS, "safetensors", FORMATS["safetensors"]._replace(read=read_badly))
    with pytest.raises(UserError, match="differ by at most nan"):
        main([str(run), "--to", "safetensors", f"--output={tmp_path / 'new'}"])


def test_mistakes_are_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(error: type[UserError], message: str, *arguments: str) -> None:
        with pytest.raises(error, match=message):
            main([str(run), "--to", "safetensors", *arguments])

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    refused(UserError, "holds other files", f"--output={tmp_path / 'full'}")
    refused(UserError, "is a file", f"--output={tmp_path / 'full' / 'thesis.tex'}")
    refused(UsageError, "there is no checkpoint .*last yet", "--checkpoint=last")
    refused(UsageError, "--images=0 must be at least 1", "--images=0")
    with pytest.raises(UsageError, match="there is no run in .*our.*Did you mean .*ours"):
        main([str(tmp_path / "our"), "--to", "onnx"])
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else SimpleNamespace())
    with pytest.raises(UserError, match=r"^--to onnx needs onnxscript: pip install onnxscript$"):
        main([str(run), "--to", "onnx"])
    assert not (run / "export").exists()
    with pytest.raises(UserError, match="preprocessing.json is not the description of an exported network"):
        load_exported(tmp_path / "full")


def test_a_folder_holds_one_form(run: Path, tmp_path: Path) -> None:
    out = export(run, "hub-folder", tmp_path / "out", "--images=5")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for form, found in (("safetensors", "config.json"), ("torch_export", "config.json and model.safetensors")):
        with pytest.raises(UserError, match=f"out holds another form's {found}: name another folder"):
            main([str(run), "--to", form, "--output", str(out)])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    export(run, "hub-folder", out, "--images=5")  # the same form again
    assert {path.name for path in out.iterdir()} == before.keys()


@pytest.mark.parametrize("form", ALL_FORMS)
def test_each_form_names_all_that_it_writes(form: str, run: Path, tmp_path: Path) -> None:
    out = export(run, form, tmp_path / "out", "--images=5")
    assert {path.name for path in out.iterdir()} - {"README.md", "preprocessing.json"} == set(FORMATS[form].files)


def test_the_hub_gets_the_folder_or_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def push(repository: str) -> None:
        main([str(run), "--to", "safetensors", f"--push-to-hub={repository}"])

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="--push-to-hub needs a token: run `hf auth login` once"):
        push("me/digits")
    for name in ("digits", "me/a b", "a/b/c"):
        with pytest.raises(UserError, match="names no repository, as in USER/NAME"):
            push(name)
    assert not (run / "export").exists()  # found before anything was done

    calls = []

    class Hub:
        def create_repo(self, name: str, **more: bool) -> str:
            calls.append((name, more))
            return f"hub:{name}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append((repo_id, {path.name for path in folder_path.iterdir()}))

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    push("me/digits")
    assert capsys.readouterr().out.endswith("hub:me/digits\n")
    assert calls[0] == ("me/digits", {"private": True, "exist_ok": True})
    assert calls[1] == ("me/digits", {"README.md", "model.safetensors", "preprocessing.json"})

    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route\nmore")))
    with pytest.raises(UserError, match=r"the hub did not take it \(no route\); .* is whole, and `hf upload me/digits"):
        push("me/digits")


@pytest.mark.slow
@pytest.mark.launch
def test_the_program_exports_and_its_snippet_runs_alone(run: Path, tmp_path: Path) -> None:
    surroundings = environment(PYTHONPATH=str(ROOT / "src"), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "lockstep", "export", str(run), "--to", "torch_export"]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    alone = Path(shutil.move(run / "export" / "torch_export", tmp_path / "alone"))
    put_image(data_of(run), alone)
    (code,) = re.findall(r"```python\n(.*?)```", (alone / "README.md").read_text(), re.DOTALL)
    said = subprocess.run([sys.executable, "-c", code], cwd=alone, env=surroundings, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.strip() in data_of(run).classes, said.stderr
