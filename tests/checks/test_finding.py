"""What several ranks have found, as one finding."""

from lockstep.checks.finding import Finding, combine


def test_findings_of_several_ranks_become_one() -> None:
    good, bad, worse = Finding("ok", "fine"), Finding("warning", "full"), Finding("failed", "gone")
    assert combine([good, Finding("ok", "fine too")]) == good
    assert combine([bad, bad]) == bad
    assert combine([good, bad, bad]) == Finding("warning", "ranks 1, 2: full")
    both = combine([bad, worse, Finding("failed", "away"), worse])
    assert both == Finding("failed", "ranks 1, 3: gone; rank 2: away")
    assert combine([bad, None, None]) == bad, "a check of the main process alone names no rank"
    assert combine([None, None]) is None
