"""What W&B will do, told without a run: nothing, log here, or log to a server that answers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from lockstep.checks import results
from lockstep.checks.finding import Finding, Parts
from lockstep.settings.cli import parse_config


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without W&B login; everything W&B writes stays in tmp_path, and a prompt would fail."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.chdir(tmp_path)


def ask_wandb(mode: str) -> Finding:
    finding = results.check_wandb(Parts(parse_config([f"--log.wandb={mode}"])))
    assert finding is not None
    return finding


@pytest.mark.parametrize(
    ("mode", "status", "text"),
    [
        ("auto", "ok", "no API key: the run will be logged offline"),
        ("online", "warning", "no API key: the run will be logged offline"),
        ("offline", "ok", "offline by --log.wandb=offline"),
        ("disabled", "ok", "disabled by --log.wandb"),
    ],
)
def test_wandb_without_a_login(mode: str, status: str, text: str, wandb_home: None, tmp_path: Path) -> None:
    finding = ask_wandb(mode)
    assert finding.status == status and finding.text.startswith(text)
    assert not (tmp_path / "wandb").exists()


def test_wandb_mode_of_the_environment(wandb_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert ask_wandb("auto") == Finding("ok", "disabled by the environment or `wandb offline`")


def test_an_unreachable_wandb_server_is_a_quick_warning(wandb_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "WANDB_SECONDS", 2)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    started = time.monotonic()
    finding = ask_wandb("auto")
    assert finding.status == "warning" and "will be logged offline" in finding.text
    assert time.monotonic() - started < 20


def test_a_process_of_wandb_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "WANDB_SECONDS", 0.2)
    stubborn = tmp_path / "wandb-stubborn"
    shutil.copy(str(shutil.which("sleep")), stubborn)
    process = subprocess.Popen([str(stubborn), "60"])
    results._end_wandb(process.wait)
    assert process.wait(5) == -signal.SIGKILL


class _WandbServer(BaseHTTPRequestHandler):
    """Answers one question of W&B: who is asking."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        user = {"id": "1", "username": "ada", "entity": "ada", "flags": "{}", "teams": {"edges": []}, "admin": False}
        user |= {"apiKeys": {"edges": []}, "email": "ada@example.org", "name": "ada", "deletedAt": None}
        answer = json.dumps({"data": {"viewer": user}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        """Silent."""


def test_wandb_online(wandb_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), _WandbServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    try:
        finding = ask_wandb("auto")
    finally:
        server.shutdown()
        server.server_close()
    expected = f"online at http://127.0.0.1:{server.server_port} as ada, project lockstep"
    assert finding == Finding("ok", expected)
