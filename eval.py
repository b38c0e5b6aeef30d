"""Evaluate a run or a checkpoint, exactly: accuracy, loss, all that a paper gives beside them, and every class.

    accelerate launch eval.py --run runs/<name>                             # best checkpoint, test split
    accelerate launch eval.py --run runs/<name> --checkpoint last --split val
    accelerate launch eval.py --run runs/<name> --temperature fit           # calibrated on the validation split, too
    accelerate launch eval.py --checkpoint runs/<name>/checkpoints/step_00000400
    accelerate launch eval.py --run runs/<name> --images photos/            # the classes of images without labels
    accelerate launch eval.py --model.name=timm/resnet50 --model.pretrained=true --data.source=folder:data/imagenet

Settings are those of the training, its precision included; --section.key=value changes one.
"""

from lockstep.errors import UserError, one_line_errors
from lockstep.settings.cli import parse_evaluation

if __name__ == "__main__":
    # Before the imports below, so that --help and a misspelt setting answer at once, without waiting for torch.
    with one_line_errors():
        request = parse_evaluation()

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from lockstep.augment.transform import build_transform
from lockstep.data.images import ImageSet
from lockstep.data.loader import EvaluationLoader, evaluation_batch
from lockstep.data.loose import load_files
from lockstep.evaluation.calibration import fit_temperature
from lockstep.evaluation.evaluate import evaluate
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.predict import predict
from lockstep.launch.accelerator import Launch, build_accelerator, end_program
from lockstep.models.network import load_network, with_pretrained_input
from lockstep.report.evaluation import Evaluated, report_evaluation
from lockstep.report.loose_images import LoosePredictions, report_images
from lockstep.run.folder import results_folder
from lockstep.run.inputs import NetworkInput, input_of, loose_differences, open_data, read_input
from lockstep.settings.cli import Evaluation


def load_model(request: Evaluation, accelerator: Accelerator, launch: Launch, images: NetworkInput) -> nn.Module:
    config = request.config
    model = load_network(config.model, images.image_shape, images.num_classes, request.checkpoint)
    model = model.to(launch.device, getattr(torch, config.runtime.dtype)).to(memory_format=torch.channels_last)
    return accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)


def evaluate_split(request: Evaluation, accelerator: Accelerator, launch: Launch) -> None:
    config = request.config
    data = open_data(request.folder, config, launch, request.split)
    if request.checkpoint is None:
        launch.say(f"note: outputs are taken in the order of the classes: {', '.join(data.classes[:3])}, ...")
    model = load_model(request, accelerator, launch, input_of(data))
    transform = build_transform(config, data.mean, data.std, data.num_classes, precropped=False)

    @cache
    def judge(split: str) -> tuple[ImageSet, Predictions]:
        images = {"train": data.train, "val": data.val, "test": data.test}[split]
        if images is None:
            raise UserError(f"this run has no {split} split (data.val_fraction=0)")
        loader = EvaluationLoader(images, data.num_classes, launch, config)
        predictions = evaluate(model, loader, transform, accelerator, with_probabilities=True)
        assert predictions is not None, "nothing interrupts an evaluation here"
        return images, predictions

    temperature = None
    if request.temperature == "fit":
        temperature = fit_temperature(judge("val")[1]), "fitted to the val split"
    elif request.temperature is not None:
        temperature = request.temperature, "as given"
    images, predictions = judge(request.split)
    if launch.is_main:
        folder = results_folder(request.folder, config)
        how = f"{launch.precision_name}, {launch.num_processes} process{'es' * (launch.num_processes > 1)}"
        done = Evaluated(config, folder, request.checkpoint, request.split, images, data, predictions)
        report_evaluation(replace(done, temperature=temperature), how)


def predict_images(request: Evaluation, accelerator: Accelerator, launch: Launch) -> None:
    assert request.images is not None
    trained = read_input(request.folder) or input_of(open_data(request.folder, request.config, launch))
    used = trained.under(request.config.augment)
    for note in loose_differences(trained, used):
        launch.say(note)
    model = load_model(request, accelerator, launch, used)
    transform = build_transform(request.config, used.mean, used.std, used.num_classes, precropped=False)
    if not launch.is_main:
        return
    found = LoosePredictions(used.names)
    temperature = request.temperature if isinstance(request.temperature, float) else 1.0
    for batch in load_files(request.images, used.image_shape, used.resize_size, evaluation_batch(used.image_shape)):
        read = [image.pixels for image in batch if image.pixels is not None]
        probabilities = predict(model, transform, np.stack(read), launch.device, temperature) if read else np.empty(0)
        found.add(batch, probabilities)
    report_images(request.folder, found)


def evaluate_checkpoint(request: Evaluation) -> None:
    if request.checkpoint is None:
        request = replace(request, config=with_pretrained_input(request.config))
    accelerator, launch = build_accelerator(request.config.runtime)
    (evaluate_split if request.images is None else predict_images)(request, accelerator, launch)


if __name__ == "__main__":
    with one_line_errors():
        evaluate_checkpoint(request)
        end_program()
