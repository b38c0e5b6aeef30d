"""What happens at milestones: here, what is not seen in whole trainings."""

import gc
import time
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lockstep.errors import UserError
from lockstep.report import milestones
from lockstep.report.milestones import Training, matplotlib_imported, require_same_weights, young_garbage
from lockstep.run.folder import LostFolder
from lockstep.settings.config import Config, RuntimeConfig
from lockstep.training.stopwatch import Spent


@dataclass
class Gathering:
    """A launch whose other processes have these digests, each on a host of its own."""

    digests: list[int]

    def gather(self, own: Any) -> list[Any]:
        return [(digest, f"host{rank}", own[2] if rank == 0 else None) for rank, digest in enumerate(self.digests)]


def training(*digests: int, problem: str | None = None) -> Training:
    parts = {
        "launch": Gathering([*digests]),
        "lease": SimpleNamespace(problem=lambda: problem),
        "checkpointer": SimpleNamespace(wait=lambda: None),
        "progress": SimpleNamespace(step=12),
        "run": SimpleNamespace(path="runs/x", checkpoints="runs/x/checkpoints"),
    }
    return cast(Training, SimpleNamespace(**parts))


def test_equal_digests_are_nothing_to_speak_of() -> None:
    assert require_same_weights(training(5, 5, 5), 5) == 5


def test_the_process_that_differs_is_named() -> None:
    with pytest.raises(UserError, match=r"^rank 1 \(host1\) holds other weights than the rest at step 12") as found:
        require_same_weights(training(5, 6, 5), 5)
    assert "goes on from the last checkpoint in runs/x/checkpoints" in str(found.value)


def test_of_two_that_differ_nobody_knows_which_is_right() -> None:
    with pytest.raises(UserError, match=r"^rank 0 \(host0\) and rank 1 \(host1\) hold other weights"):
        require_same_weights(training(5, 6), 5)


def test_a_folder_that_is_lost_ends_the_training() -> None:
    with pytest.raises(LostFolder, match="^runs/x was removed while it was trained here"):
        require_same_weights(training(5, 5, problem="was removed"), 5)


class Ring:
    """Refers to itself: garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


def test_the_end_of_a_run_collects_its_own_garbage_alone() -> None:
    old = weakref.ref(Ring())
    with pytest.raises(UserError), young_garbage():
        young = weakref.ref(Ring())
        gc.collect()
        assert old() is not None and young() is None
        raise UserError("no end is like another")
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("wanted", [True, False])
def test_matplotlib_is_imported_when_what_is_done_beside_it_is_over(
    wanted: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def slow_and_broken(width: float, height: float) -> None:
        seen.append("begins")
        time.sleep(0.2)
        seen.append("ends")
        raise ImportError("no font in this house")

    monkeypatch.setattr(milestones, "new_figure", slow_and_broken)
    with matplotlib_imported(wanted=wanted):
        time.sleep(0.1)
        seen.append("tested")
    assert seen == (["begins", "tested", "ends"] if wanted else ["tested"])
    assert capfd.readouterr() == ("", ""), "what cannot be drawn is said when it is drawn"


@pytest.mark.parametrize("portable", [True, False])
def test_portable_kernels_are_no_measure_of_the_machine(portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products of matrices are slow: a training was at 120 % of such a peak."""
    monkeypatch.setattr(milestones, "share_of_peak", lambda *_: 0.5)
    spent = Spent(2.0, 10, {"compute": 1.0})
    parts = {
        "launch": SimpleNamespace(is_main=True, is_sharded=False),
        "run": SimpleNamespace(config=Config(runtime=RuntimeConfig(portable=portable))),
        "gradients": SimpleNamespace(pace=SimpleNamespace(waited_seconds=0.0)),
        "stopwatch": SimpleNamespace(spent=lambda _: spent, started_seconds=3.0),
        "calendar": SimpleNamespace(batch_size=64),
        "learner": SimpleNamespace(model=None),
        "data": SimpleNamespace(image_shape=(1, 8, 8)),
    }
    account = milestones.account_of(cast(Training, SimpleNamespace(**parts)))
    assert account == {"compute_share": 1.0, "started_seconds": 3.0} | ({} if portable else {"peak_share": 0.5})
