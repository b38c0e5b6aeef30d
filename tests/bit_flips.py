"""Flip a bit of one weight on one of three processes, as bad memory does, and see that the log names it.

    python tests/bit_flips.py --flips 100 --seed 0

As many runs are left alone and must not be accused. Where, when and on which rank is drawn by lot.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from fork_server import ForkServer
from programs import environment

PROCESSES, STEPS, LOG_EVERY_STEPS = 3, 8, 2
TINY = (
    "--model.name=tiny_cnn",
    "--train.batch_size=64",
    "--train.micro_batch_size=16",
    f"--train.max_steps={STEPS}",
    f"--log.every_steps={LOG_EVERY_STEPS}",
    "--train.ema_decay=0.9",
    "--optim.name=sgd",
    "--optim.momentum=0.9",
    "--runtime.threads=1",
    "--log.wandb=disabled",
    "--log.tensorboard=false",
    "--log.figures=false",
)
# Becomes train.py with an optimizer step that damages a weight afterwards.
FLIPPER = """
import os, runpy, sys
import torch
from lockstep.training import optim

train, rank, step, place, bit = sys.argv.pop(1), *map(int, sys.argv.pop(1).split(","))
update, steps = optim.update, 0


def damaging_update(optimizer, bad):
    global steps
    update(optimizer, bad)
    steps += 1
    if steps == step and int(os.environ["RANK"]) == rank:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        at = place % sum(weight.numel() for weight in weights)
        for weight in weights:
            if 0 <= at < weight.numel():
                memory = weight.detach().as_strided((weight.numel(),), (1,)).view(torch.int32)
                memory[at] ^= -(1 << 31) if bit == 31 else 1 << bit
            at -= weight.numel()


optim.update = damaging_update
sys.argv[0] = train
runpy.run_path(train, run_name="__main__")
"""


def names_the_damaged_rank(server: ForkServer, place: Path, draws: random.Random) -> bool:
    """Damage one weight of a run; whether the next line of the log ended it and named the rank."""
    rank, step = draws.randrange(PROCESSES), draws.randint(1, STEPS)
    printed = _run(server, place, f"{rank},{step},{draws.randrange(1 << 30)},{draws.randrange(32)}", code=1)
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    seen_at = -(-step // LOG_EVERY_STEPS) * LOG_EVERY_STEPS
    return len(errors) == 1 and f"error: rank {rank} (" in errors[0] and f" at step {seen_at}," in errors[0]


def leaves_a_sound_run_alone(server: ForkServer, place: Path) -> bool:
    return "error" not in _run(server, place, "0,0,0,0", code=0)


def _run(server: ForkServer, place: Path, flip: str, code: int) -> str:
    place.mkdir()
    flipper = place / "flipper.py"
    flipper.write_text(FLIPPER)
    train = str(Path(__file__).resolve().parents[1] / "train.py")
    arguments = (train, flip, *TINY, f"--data.cache_dir={place.parent / 'cache'}")
    return server.run(PROCESSES, place, *arguments, program=flipper, code=code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder, ForkServer(environment(OMP_NUM_THREADS="1")) as server:
        place, numbers = Path(folder), range(options.flips)
        named = sum(names_the_damaged_rank(server, place / f"flip {number}", draws) for number in numbers)
        print(f"{named} of {options.flips} flipped bits named at the next line of the log", flush=True)
        sound = sum(leaves_a_sound_run_alone(server, place / f"sound {number}") for number in numbers)
        print(f"{options.flips - sound} false alarms in {options.flips} runs left alone", flush=True)
    return 0 if named == sound == options.flips else 1


if __name__ == "__main__":
    sys.exit(main())
