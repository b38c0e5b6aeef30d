"""Stands for a training: `stand_in.py RUN_FOLDER BEHAVIOUR ACCURACIES`, one accuracy an epoch of 0.05 s.

It goes on after the epochs that metrics.jsonl has, and saves and stops as train.py does. BEHAVIOUR is finish, fail
or deaf (to all but SIGKILL). When it was there is noted in `times` beside the run folder.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder, behaviour, accuracies = Path(sys.argv[1]), sys.argv[2], [float(word) for word in sys.argv[3].split(",")]
stops: list[int] = []
signal.signal(signal.SIGTERM, (lambda *_: None) if behaviour == "deaf" else lambda number, _: stops.append(number))
folder.mkdir(parents=True, exist_ok=True)
(folder / "stop").unlink(missing_ok=True)
began = time.time()
print("training", folder.name)
if behaviour == "fail":
    print("error: no luck today", flush=True)
    print("a line of the launcher's", flush=True)
    sys.exit(3)
history = folder / "metrics.jsonl"
done = len(history.read_text().splitlines()) if history.exists() else 0
for epoch in range(done, len(accuracies)):
    line = {"step": epoch + 1, "epoch": epoch + 1, "split": "val", "accuracy": accuracies[epoch], "loss": 1.0}
    with history.open("a") as file:
        print(json.dumps(line), file=file)
    time.sleep(0.05)
    if stops or (folder / "stop").exists():
        (folder / "preempted").write_text("{}")
        (folder / "summary.json").write_text(json.dumps({"state": "preempted"}))
        sys.exit(85)
(folder / "preempted").unlink(missing_ok=True)
summary = {"state": "finished", "test_accuracy": accuracies[-1], "wall_seconds": 1.0}
(folder / "summary.json").write_text(json.dumps(summary))
with (folder.parent / "times").open("a") as file:
    print(began, time.time(), os.getpid(), file=file)
