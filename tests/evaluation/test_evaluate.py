"""Metrics against scikit-learn, and that every sample counts exactly once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn import metrics as sk
from torch import Tensor, nn

from lockstep.augment.transform import Transform, build_transform
from lockstep.data.images import SKIPPED_LABEL, Data, build_data
from lockstep.data.loader import EvaluationLoader
from lockstep.evaluation.evaluate import evaluate
from lockstep.evaluation.metrics import METRICS, Predictions
from lockstep.launch.accelerator import Launch
from lockstep.settings.config import AugmentConfig, Config, DataConfig

Batches = Iterator[tuple[Tensor, Tensor, Tensor]]
LAUNCH = Launch(torch.device("cpu"), 1, 0, 0, "no", 1)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


class Recited(nn.Module):
    """Puts out the logits that the one pixel of each image is the number of."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(self.logits[(images.flatten(1)[:, 0] * 255).round().long()])


class Recital:
    """A loader of one-pixel images, sample i is grey i, in batches as given."""

    def __init__(self, labels: Tensor, num_classes: int, batches: list[list[int]]) -> None:
        self.data = labels  # of which only the length is asked for
        self.num_classes, self._batches = num_classes, batches

    def __iter__(self) -> Batches:
        for batch in self._batches:
            samples = torch.tensor(batch)
            yield samples, samples.to(torch.uint8).view(-1, 1, 1, 1), self.data[samples]


PLAIN = Transform(AugmentConfig(), (0.0,), (1.0,), torch.float64)


def recite(
    logits: Tensor, labels: Tensor, accelerator: Accelerator, batches: list[list[int]] | None = None
) -> Predictions:
    loader: Any = Recital(labels, logits.shape[1], batches or [list(range(100)), list(range(100, len(labels)))])
    return evaluate(Recited(logits), loader, PLAIN, accelerator)


def examples(num_classes: int = 12, count: int = 240) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, num_classes - 1, (count,), generator=generator)  # the last class is never seen
    logits = torch.randn(count, num_classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(count), labels] += 1.5
    logits[:, 2] -= 50  # and this one never predicted
    return logits, labels


def test_metrics_are_scikit_learns(accelerator: Accelerator) -> None:
    logits, labels = examples()
    got = recite(logits, labels, accelerator)
    probabilities, predictions = logits.softmax(1).numpy(), logits.argmax(1).numpy()
    every = list(range(12))
    assert got.accuracy == pytest.approx(sk.accuracy_score(labels, predictions), abs=1e-12)
    assert 0.2 < got.accuracy < 0.9
    true = probabilities[np.arange(240), labels]
    assert got.loss == pytest.approx(-np.log(true).mean(), rel=1e-12)
    capped = np.minimum(got.losses, -np.log(np.finfo(float).eps)).mean()  # log_loss keeps away from 0
    assert capped == pytest.approx(sk.log_loss(labels, probabilities, labels=every), rel=1e-6)
    top5 = sk.top_k_accuracy_score(labels, probabilities, k=5, labels=every)
    assert METRICS["top5_accuracy"].compute(got) == pytest.approx(top5)
    assert np.array_equal(got.confusion, sk.confusion_matrix(labels, predictions, labels=every))
    assert got.confusion.dtype.kind == "i"
    scores = sk.precision_recall_fscore_support(labels, predictions, labels=every, zero_division=0)
    for name, expected in zip(("precision", "recall", "f1", "support"), scores, strict=True):
        np.testing.assert_allclose(got.per_class()[name], expected, rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(got.confidences, probabilities.max(1), rtol=1e-12)
    np.testing.assert_allclose(got.losses, -np.log(true), rtol=1e-9)
    assert np.array_equal(got.predicted, predictions) and np.array_equal(got.labels, labels)
    assert np.array_equal(got.samples, np.arange(240))


def test_the_headline_has_top5_where_it_says_something(accelerator: Accelerator) -> None:
    many, few = recite(*examples(), accelerator), recite(*examples(num_classes=10), accelerator)
    assert many.headline() == {name: metric.compute(many) for name, metric in METRICS.items()}
    assert few.headline() == {"loss": few.loss, "accuracy": few.accuracy}


def test_neither_batches_nor_their_order_matter(accelerator: Accelerator) -> None:
    logits, labels = examples()
    order = np.random.default_rng(0).permutation(240).tolist()
    whole = recite(logits, labels, accelerator, [list(range(240))])
    pieces = recite(logits, labels, accelerator, [order[i : i + 7] for i in range(0, 240, 7)])
    for name, value in vars(whole).items():
        assert np.array_equal(value, getattr(pieces, name)), f"{name} differs in some bit"


def test_skipped_samples_are_left_out(accelerator: Accelerator) -> None:
    logits, labels = examples()
    kept = np.arange(240) % 3 > 0
    with_gaps = labels.clone()
    with_gaps[torch.from_numpy(~kept)] = SKIPPED_LABEL
    got, whole = recite(logits, with_gaps, accelerator), recite(logits, labels, accelerator)
    assert np.array_equal(got.samples, np.flatnonzero(kept))
    assert got.confusion.sum() == len(got.samples) == 160
    for name in ("labels", "predicted", "confidences", "losses"):
        assert np.array_equal(getattr(got, name), getattr(whole, name)[kept]), name
    assert got.loss == pytest.approx(whole.losses[kept].mean(), rel=1e-12)
    assert got.accuracy == (whole.predicted == whole.labels)[kept].mean()


def test_nothing_but_skipped_samples_is_an_error(accelerator: Accelerator) -> None:
    logits, labels = examples()
    with pytest.raises(ValueError, match="every image of the set was skipped: there is nothing to evaluate"):
        recite(logits, torch.full_like(labels, SKIPPED_LABEL), accelerator)


def test_a_network_of_nan_has_nothing_right(accelerator: Accelerator) -> None:
    logits, labels = examples()
    got = recite(torch.full_like(logits, torch.nan), labels + 1, accelerator)
    assert np.isnan(got.loss) and got.accuracy == 0 and METRICS["top5_accuracy"].compute(got) == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batches: [*batches, batches[0]],
        lambda batches: [batches[0] + batches[0][:1], *batches[1:]],  # twice within a batch
        lambda batches: batches[1:],
        lambda batches: [batches[0], [*batches[1][:-1], 0]],  # the right number, but not the right ones
    ],
    ids=["a batch twice", "a sample twice", "a batch missing", "one for another"],
)
def test_missing_or_doubled_samples_are_an_error(
    spoil: Callable[[list[list[int]]], list[list[int]]], accelerator: Accelerator
) -> None:
    logits, labels = examples()
    batches = spoil([list(range(120)), list(range(120, 240))])
    count = sum(map(len, batches))
    with pytest.raises(RuntimeError, match=f"counted {count} of 240 samples, some not exactly once"):
        recite(logits, labels, accelerator, batches)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_evaluates_and_then_goes_on_as_it_was(training: bool, accelerator: Accelerator) -> None:
    logits, labels = examples()
    model = Recited(logits).train(training)
    loader: Any = Recital(labels, 12, [list(range(240))])
    first, second = (evaluate(model, loader, PLAIN, accelerator) for _ in range(2))
    assert model.training is training and model.dropout.training is training
    assert np.array_equal(first.losses, second.losses), "dropout was active"
    assert not first.losses.dtype.hasobject and all(p.grad is None for p in model.parameters())


def test_low_precision_logits_are_judged_in_float32(accelerator: Accelerator) -> None:
    logits, labels = examples()
    half = logits.bfloat16()
    got = recite(half, labels, accelerator)
    expected = torch.nn.functional.cross_entropy(half.float(), labels, reduction="none")
    np.testing.assert_allclose(got.losses, expected.numpy(), rtol=1e-6)


# ---- with real data and a real loader


def real(tmp_path: Path, **settings: Any) -> tuple[Config, Data, Transform]:
    config = Config(data=DataConfig(cache_dir=str(tmp_path / "cache"), **settings))
    data = build_data(config, tmp_path, write=False)
    return config, data, build_transform(config, data.mean, data.std, data.num_classes, precropped=False)


def test_digits_as_computed_by_hand(tmp_path: Path, accelerator: Accelerator) -> None:
    config, data, transform = real(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    got = evaluate(model, EvaluationLoader(data.test, data.num_classes, LAUNCH, config), transform, accelerator)
    assert data.test.images is not None
    pixels = data.test.images.take(data.test.rows).float().permute(0, 3, 1, 2) / 255
    logits = model((pixels - data.mean[0]) / data.std[0]).detach()
    assert len(got.samples) == len(data.test) == 359
    assert got.loss == pytest.approx(nn.functional.cross_entropy(logits, data.test.labels).item(), rel=1e-5)
    assert got.accuracy == pytest.approx(sk.accuracy_score(data.test.labels, logits.argmax(1)))


@pytest.mark.parametrize("memory_budget", [2.0, 0.0])
def test_an_unreadable_image_is_left_out_cached_or_streamed(
    tmp_path: Path, memory_budget: float, accelerator: Accelerator
) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(12):
            path = tmp_path / "images" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (6, 6), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "test" / "b" / "3.png").write_bytes(b"not an image")
    config, data, transform = real(
        tmp_path, source=f"folder:{tmp_path / 'images'}", memory_budget=memory_budget, on_error="skip", val_fraction=0.0
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    got = evaluate(model, EvaluationLoader(data.test, 2, LAUNCH, config), transform, accelerator)
    assert len(got.samples) == 11 and got.confusion.sum() == 11
    (missing,) = set(range(12)) - set(got.samples.tolist())
    assert data.test.split.where(missing).endswith("b/3.png")
    assert np.array_equal(got.labels, data.test.split.labels[got.samples])
