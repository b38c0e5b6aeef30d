"""Processes that stand still, by the harness that lets them do so twenty times each in `make soak`."""

import os
import random
import shutil
from pathlib import Path

import pytest
from fork_server import ForkServer
from soak import Form, run_until_finished
from stalls import ENDED_WITHIN_SECONDS, NAMED_WITHIN_SECONDS, STALLS, stall

pytestmark = pytest.mark.launch
TOOLS = {"disk": ("fsfreeze", "mkfs.ext4"), "node": ("ip",)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STALLS)
def test_who_stands_still_is_named_and_the_same_command_goes_on(kind: str, server: ForkServer, tmp_path: Path) -> None:
    missing = [tool for tool in TOOLS.get(kind, ()) if shutil.which(tool) is None]
    if missing or (kind in TOOLS and os.geteuid() != 0):
        pytest.skip(f"needs root and {', '.join(TOOLS[kind])}")
    reference = run_until_finished(Form((1,)), tmp_path / "reference", server).run
    # The harness is stricter; a machine that runs other tests beside it is slower.
    assert (
        stall(kind, tmp_path / kind, reference, server, random.Random(0)) < NAMED_WITHIN_SECONDS + ENDED_WITHIN_SECONDS
    )
