"""Evaluate a run or a checkpoint, exactly: accuracy, loss, all that a paper gives beside them, and every class.

    accelerate launch eval.py --run runs/<name>                             # best checkpoint, test split
    accelerate launch eval.py --run runs/<name> --checkpoint last --split val
    accelerate launch eval.py --run runs/<name> --temperature fit           # calibrated on the validation split, too
    accelerate launch eval.py --checkpoint runs/<name>/checkpoints/step_00000400

Settings are those of the training, its precision included; --section.key=value changes one.
"""

from lockstep.errors import UserError, one_line_errors
from lockstep.settings.cli import parse_evaluation

if __name__ == "__main__":
    # Before the imports below, so that --help and a misspelt setting answer at once, without waiting for torch.
    with one_line_errors():
        request = parse_evaluation()

from dataclasses import replace

import torch

from lockstep.augment.transform import build_transform
from lockstep.data.images import ImageSet, build_data
from lockstep.data.loader import EvaluationLoader
from lockstep.data.sources.source import Identity
from lockstep.evaluation.calibration import fit_temperature
from lockstep.evaluation.evaluate import evaluate
from lockstep.evaluation.metrics import Predictions
from lockstep.launch.accelerator import build_accelerator, end_program
from lockstep.models.network import build_model
from lockstep.models.weights import load_weights, put_weights
from lockstep.report.evaluation import Evaluated, report_evaluation
from lockstep.run.folder import difference_of_data
from lockstep.settings.cli import Evaluation


def evaluate_checkpoint(request: Evaluation) -> None:
    config = request.config
    accelerator, launch = build_accelerator(config.runtime)

    def accept(identity: Identity) -> None:
        launch.require_alike("data", identity)
        if note := difference_of_data(request.folder, config, identity):
            launch.say(note)

    data = build_data(config, request.folder, write=False, accept=accept)
    model = build_model(replace(config.model, pretrained=False, checkpoint=None), data.image_shape, data.num_classes)
    put_weights(model, load_weights(request.checkpoint), str(request.checkpoint))
    model = model.to(launch.device, getattr(torch, config.runtime.dtype)).to(memory_format=torch.channels_last)
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    transform = build_transform(config, data.mean, data.std, data.num_classes, precropped=False)

    def predict(split: str) -> tuple[ImageSet, Predictions]:
        images = {"train": data.train, "val": data.val, "test": data.test}[split]
        if images is None:
            raise UserError(f"this run has no {split} split (data.val_fraction=0)")
        loader = EvaluationLoader(images, data.num_classes, launch, config)
        predictions = evaluate(model, loader, transform, accelerator, with_probabilities=True)
        assert predictions is not None, "nothing interrupts an evaluation here"
        return images, predictions

    temperature = None
    if request.temperature == "fit":
        temperature = fit_temperature(predict("val")[1]), "fitted to the val split"
    elif request.temperature is not None:
        temperature = request.temperature, "as given"
    images, predictions = predict(request.split)

    if launch.is_main:
        how = f"{launch.precision_name}, {launch.num_processes} process{'es' * (launch.num_processes > 1)}"
        done = Evaluated(config, request.folder, request.checkpoint, request.split, images, data, predictions)
        report_evaluation(replace(done, temperature=temperature), how)


if __name__ == "__main__":
    with one_line_errors():
        evaluate_checkpoint(request)
        end_program()
