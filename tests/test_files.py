"""Files are whole or not there, whatever happens meanwhile."""

import errno
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.files import remove_unfinished, replace_file, write_json, written_aside


def test_write_json_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "summary.json"
    write_json(path, {"loss": math.nan, "steps": np.int64(3), "path": Path("x"), "list": (1, torch.tensor(2.0))})
    assert json.loads(path.read_text()) == {"loss": "NaN", "steps": 3, "path": "x", "list": [1, 2.0]}
    blocked = tmp_path / "blocked.json"
    blocked.mkdir()
    with pytest.raises(OSError):
        write_json(blocked, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["blocked.json", "deep"]


def test_a_kill_while_writing_leaves_a_whole_file_and_one_that_can_be_told(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    forever = f"while True: replace_file(Path({str(path)!r}), b'x' * 100_000)"
    program = f"from pathlib import Path\nfrom lockstep.files import replace_file\n{forever}"
    interrupted = 0
    for moment in range(12):
        path.unlink(missing_ok=True)
        writer = subprocess.Popen([sys.executable, "-c", program])
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.003 * moment)
        writer.kill()
        writer.wait()
        assert path.read_bytes() == b"x" * 100_000
        interrupted += len(list(tmp_path.iterdir())) > 1
        remove_unfinished(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert interrupted, "no kill came while writing: the test shows nothing"


def test_no_link_that_somebody_put_in_the_way_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link at the place of the unfinished file would be written through, into whatever it leads to."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    monkeypatch.setattr("lockstep.files.secrets.token_hex", lambda _: "known")
    (tmp_path / ".config.yaml.known.tmp").symlink_to(precious)
    with pytest.raises(OSError, match="config.yaml"):
        replace_file(tmp_path / "config.yaml", b"x")
    assert precious.read_text() == "mine" and not (tmp_path / "config.yaml").exists()


def test_where_nothing_can_be_written_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not its passing name, of which a read-only file system complains once more."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a passing name")

    monkeypatch.setattr("lockstep.files.os.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError) as caught:
        replace_file(tmp_path / "config.yaml", b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(tmp_path / "config.yaml"))


def test_two_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_aside(path) as first:
        first.write(b"first")
        replace_file(path, b"second")
        first.write(b" still")
    assert path.read_bytes() == b"first still" and [file.name for file in tmp_path.iterdir()] == ["file"]
