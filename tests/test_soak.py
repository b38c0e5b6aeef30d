"""A training killed by SIGKILL at six random moments, by the harness that does it a hundred times in `make soak`."""

import random
from pathlib import Path

import pytest
from fork_server import ForkServer
from runs import differences
from soak import FORMS, PHASES, Plan, Training, processes_in, run_until_finished

pytestmark = pytest.mark.launch


@pytest.mark.parametrize(
    ("form", "kills", "victims"),
    [
        ("elastic in bf16", 2, ("all", "rank")),
        pytest.param("elastic in bf16", 4, ("all", "rank"), marks=pytest.mark.slow),
        pytest.param("launched", 2, ("launcher", "rank"), marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_is_as_never_killed(
    form: str, kills: int, victims: tuple[str, ...], tmp_path: Path, server: ForkServer
) -> None:
    reference = run_until_finished(FORMS[form].alone, tmp_path / "reference", server)
    moments, hits = random.Random(3), 0
    for number in range(kills):  # a run that ended before its time leaves kills for another
        place = tmp_path / f"killed {number}"
        plan = Plan(kills - hits, moments, reference.seconds, victims)
        done = run_until_finished(FORMS[form], place, server, plan)
        assert done.starts == len(done.kills) + 1 and all(kill.phase in PHASES for kill in done.kills)
        assert differences(done.run, reference.run) == []
        assert processes_in(place) == []
        hits += len(done.kills)
        if hits == kills:
            break
    assert hits == kills, "a test that does not kill proves nothing"


def test_the_comparison_would_notice(tmp_path: Path, server: ForkServer) -> None:
    """A line twice, a lost one, another value, a stray file, another seed."""
    alone = FORMS["elastic"].alone
    reference = run_until_finished(alone, tmp_path / "reference", server).run
    run = run_until_finished(alone, tmp_path / "run", server).run
    history = run / "metrics.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    assert differences(run, reference) == []
    for wrong in ([*lines[:3], *lines[2:]], lines[:-2], [*lines[:-1], lines[-1].replace('"loss": ', '"loss": 1')]):
        history.write_text("".join(wrong))
        assert len(differences(run, reference)) == 1
    history.write_text("".join(lines))
    (run / "checkpoints" / ".tmp_step_00000099").mkdir()
    assert differences(run, reference) == ["stray checkpoints/.tmp_step_00000099"]
    other = Training(alone, tmp_path / "other", server, "--run.seed=1")
    assert other.finish() == 0
    assert {"model of last", "ema of best", "optimizer of last"} <= set(differences(other.run, reference))
