"""All that is to be known of a GPU, in one command: tests, bits, costs, speed, memory, recipes.

    python benchmarks/gpu.py --out results --cifar10 folder:data/cifar10       # again until everything is done
    python benchmarks/gpu.py --pieces bits-fp32,waits --minutes 5
    python benchmarks/gpu.py --device cpu                                      # a rehearsal, without meaning

Pieces run in processes of their own, the most valuable first; each writes its result to results.json and table.md in
`--out` as it ends. A piece that fails is noted with its last lines, and the next goes on. Started again with the same
`--out`, it does what is left. docs/performance.md says what the pieces are.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
LARGEST_PIECE_SECONDS = 500


def _piece(module: str, function: str, *arguments: Any, **options: Any) -> Callable[[Any], dict[str, Any]]:
    """The function of a module in pieces/, imported when it is called."""
    return lambda place: getattr(import_module(f"pieces.{module}"), function)(place, *arguments, **options)


_launched, _measured = partial(_piece, "launched"), partial(_piece, "measured")
_NETWORKS = ("resnet50", "cifar10_resnet18", "fashion_cnn", "simple_cnn")
PIECES = {
    "tests": _launched("gpu_tests"),
    "bits-fp32": _launched("bits", "no"),
    "bits-bf16": _launched("bits", "bf16"),
    "exact-resnet50": _measured("exact", "resnet50"),
    "waits": _measured("waits"),
    **{f"busy-{name}": _measured("busy", name) for name in ("resnet50", "cifar10_resnet18")},
    **{f"speed-{name}": _measured("speed", name, compiled=False) for name in _NETWORKS},
    "fp16": _launched("fp16"),
    "fsdp": _launched("fsdp"),
    "auto": _launched("auto"),
    "out_of_memory": _launched("out_of_memory"),
    "cifar10_resnet18": _launched("recipe", "cifar10_resnet18", 0.95),
    "cifar10_fast": _launched("recipe", "cifar10_fast", 0.94),
    **{f"compiled-{name}": _measured("speed", name, compiled=True) for name in _NETWORKS},
    "exact-cifar10_resnet18": _measured("exact", "cifar10_resnet18"),
}
"""The most valuable first"""


def run_here(name: str, options: argparse.Namespace) -> None:
    """Do a piece in this process, and print what came of it as the last line."""
    from pieces.launched import last_error
    from pieces.place import Place, Skipped

    options.scratch.mkdir(parents=True, exist_ok=True)
    try:
        found = PIECES[name](Place(options.device, options.scratch.resolve(), options.cifar10))
        result = {"state": "passed" if found.pop("passed") else "failed", **found}
    except Skipped as reason:
        result = {"state": "skipped", "reason": str(reason)}
    except Exception:
        result = {"state": "failed", "error": last_error(traceback.format_exc())}
    print("\n" + json.dumps(result), flush=True)


def run_apart(name: str, arguments: list[str], surroundings: dict[str, str], seconds: float) -> dict[str, Any]:
    """Do a piece in a process of its own; `unfinished` if it is not done after so many seconds, and then killed."""
    command = [sys.executable, __file__, *arguments, "--piece", name]
    process = subprocess.Popen(
        command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
        return json.loads(printed.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"state": "unfinished", "error": f"not done after {seconds:.0f} s"}
    except (ValueError, IndexError):
        return {"state": "failed", "error": f"exit code {process.returncode}: {printed[-500:]}"}
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a piece and of the programs it started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.communicate()


def table_of(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    rows = ["| piece | result | |", "|---|---|---|"]
    for name in PIECES:
        result = dict(results["pieces"].get(name, {"state": "not yet run"}))
        state = result.pop("state")
        result.pop("attempts", None)
        cells = [f"{key} {_shown(value)}" for key, value in result.items()]
        rows.append(f"| {name} | {state} | {'; '.join(cells).replace(chr(10), ' ')} |")
    return f"{results['device']}, torch {results['torch']}\n\n" + "\n".join(rows) + "\n"


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def write(results: dict[str, Any], out: Path) -> None:
    """Both files, whole or as they were."""
    for name, text in (("results.json", json.dumps(results, indent=1)), ("table.md", table_of(results))):
        (out / f".{name}").write_text(text)
        (out / f".{name}").replace(out / name)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    shared = ROOT.parent / "shared" / "data" / "cifar10-jpeg"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs", "gpu_results"), help="folder for results.json and table.md"
    )
    parser.add_argument("--scratch", type=Path, default=Path("runs", "gpu"), help="folder for runs and caches")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal on small sizes")
    parser.add_argument("--pieces", default=",".join(PIECES), help="names with commas between; default: all")
    parser.add_argument(
        "--minutes", type=float, default=9, help="end after this time, in the middle of a piece if need be"
    )
    parser.add_argument(
        "--cifar10", default=f"hf:{shared}" if shared.exists() else "", help="as --data.source takes it"
    )
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.pieces.split(",")) - set(PIECES)
    if unknown:
        parser.error(f"no such piece: {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu rehearses")
    return options


def main() -> None:
    options = options_of()
    if options.piece:
        return run_here(options.piece, options)
    deadline = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    device = torch.cuda.get_device_name() if options.device == "cuda" else "a rehearsal on a CPU"
    fresh = {"device": device, "torch": torch.__version__, "pieces": {}}
    results = json.loads(file.read_text()) if file.exists() else fresh
    done = results["pieces"]
    left = [name for name in PIECES if name in options.pieces.split(",")]
    left = [name for name in left if done.get(name, {}).get("state", "unfinished") == "unfinished"]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "benchmarks")))}
    if options.device == "cpu":
        surroundings["ACCELERATE_USE_CPU"] = "true"
    for name in sorted(left, key=lambda name: done.get(name, {}).get("attempts", 0)):  # one that is too long comes last
        seconds = min(deadline - time.monotonic(), LARGEST_PIECE_SECONDS)
        if seconds < 1:
            break
        begun = time.monotonic()
        result = run_apart(name, sys.argv[1:], surroundings, seconds)
        attempts = done.get(name, {}).get("attempts", 0) + 1
        done[name] = {**result, "seconds": time.monotonic() - begun, "attempts": attempts}
        write(results, options.out)
        print(f"{name}: {result['state']}", flush=True)
    print(table_of(results))


if __name__ == "__main__":
    main()
