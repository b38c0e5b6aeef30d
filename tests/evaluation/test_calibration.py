"""Reliability by hand, and temperatures that are known."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lockstep.errors import UserError
from lockstep.evaluation.calibration import at_temperature, fit_temperature, reliability
from lockstep.evaluation.metrics import Predictions


def rows_of(logits: np.ndarray, labels: np.ndarray) -> Predictions:
    shifted = logits - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    losses, probabilities = -logs[np.arange(len(labels)), labels], np.exp(logs)
    return Predictions(
        np.arange(len(labels)), labels, logs.argmax(1), probabilities.max(1), losses, (logs > -losses[:, None]).sum(1),
        logits.shape[1], probabilities=probabilities.astype(np.float32),
    )  # fmt: skip


def drawn(temperature: float, count: int = 20_000, classes: int = 7) -> tuple[np.ndarray, Predictions]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    random = np.random.default_rng(1)
    logits = 3 * random.normal(size=(count, classes))
    labels = (logits / temperature + random.gumbel(size=logits.shape)).argmax(1)
    return logits, rows_of(logits, labels)


def bare(confidences: list[float], right: list[bool]) -> Predictions:
    labels = np.zeros(len(right), np.int64)
    predicted, confidence = np.where(right, 0, 1), np.array(confidences)
    return Predictions(np.arange(len(right)), labels, predicted, confidence, -np.log(confidence), labels, 3)


def test_bins_hold_their_upper_edge() -> None:
    shown = reliability(bare([0.4, 0.5, 0.50001, 1.0, 0.9], [True, False, True, True, False]), bins=2)
    assert shown.counts.tolist() == [2, 3]
    assert shown.accuracy == pytest.approx([1 / 2, 2 / 3]) and shown.confidence == pytest.approx([0.45, 2.40001 / 3])
    assert shown.error == pytest.approx((2 * 0.05 + 3 * (2.40001 / 3 - 2 / 3)) / 5)
    assert reliability(bare([1 / 15, 2 / 15, 3 / 15, 1.0], [True] * 4)).counts.tolist() == [1, 1, 1] + [0] * 11 + [1]


def test_an_empty_bin_is_no_error() -> None:
    shown = reliability(bare([1.0], [True]))
    assert shown.error == 0 and shown.counts.sum() == 1 and len(shown.counts) == 15


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    logits, rows = drawn(temperature)
    found = fit_temperature(rows)
    assert found == pytest.approx(temperature, rel=0.03)

    def loss(t: float) -> float:
        return rows_of(logits / t, rows.labels).loss

    best = minimize_scalar(loss, bracket=(0.5, 3), options={"xtol": 1e-10})
    assert found == pytest.approx(best.x, rel=1e-4)  # of float32 probabilities, against float64 logits
    after = at_temperature(rows, found)
    assert after.loss == pytest.approx(loss(found), abs=1e-6) and after.loss <= rows.loss
    if temperature != 1:
        assert reliability(after).error < 0.015 < 0.05 < reliability(rows).error
    assert np.array_equal(after.predicted, rows.predicted) and after.accuracy == rows.accuracy


def test_a_temperature_of_1_changes_nothing_and_another_divides_logits() -> None:
    logits, rows = drawn(1.0, count=500)
    same, warm = at_temperature(rows, 1.0), at_temperature(rows, 2.0)
    assert rows.probabilities is not None and same.probabilities is not None and warm.probabilities is not None
    np.testing.assert_allclose(same.probabilities, rows.probabilities, rtol=1e-5)
    expected = rows_of(logits / 2, rows.labels)
    np.testing.assert_allclose(warm.probabilities, expected.probabilities, rtol=1e-4)
    np.testing.assert_allclose(warm.losses, expected.losses, atol=1e-5)
    np.testing.assert_allclose(warm.confidences, expected.confidences, rtol=1e-5)


def test_no_temperature_is_beyond_the_limits() -> None:
    right = rows_of(10 * np.eye(4)[[0, 1, 2, 3]], np.arange(4))
    assert fit_temperature(right) == 0.01
    assert fit_temperature(rows_of(10 * np.eye(4)[[0, 1, 2, 3]], (np.arange(4) + 1) % 4)) == 100.0


def test_chunks_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    _, rows = drawn(2.0, count=1000)
    whole = fit_temperature(rows)
    monkeypatch.setattr("lockstep.evaluation.calibration._CHUNK", 70)
    assert fit_temperature(rows) == pytest.approx(whole, rel=1e-10)


def test_what_cannot_be_fitted_is_one_line() -> None:
    _, rows = drawn(1.0, count=50)
    with pytest.raises(UserError, match="--temperature: .* more than 1 GiB"):
        fit_temperature(replace(rows, probabilities=None))
    with pytest.raises(UserError, match="not finite"):
        fit_temperature(replace(rows, losses=np.full(50, np.nan)))
