"""A stand-in for `lory train` that keeps its contract (lory_trainer/events.py) and trains nothing.

What it does is told by the seed of its configuration: see PLANS.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType

NUM_STEPS = 4
SLOW, FAILING, DYING, HUNGRY, DEAF, TELLING, HUNGRY_CHILD = range(1001, 1008)
"""Seeds: steps that take 0.4 s; ends in an error; kills itself; takes 300 MB; hears no SIGTERM;
names its folder in what it says; has a child that takes 300 MB."""
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Run:
    def __init__(self, arguments: list[str]) -> None:
        self.config = json.loads(Path(arguments[0]).read_text())
        options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        self.output, self.run = Path(options["--output"]), Path(options["--run"])
        self.resumes = "--resume" in arguments
        self.seed = self.config["seed"]
        self.stopped = False

    def say(self, kind: str, step: int, **fields: object) -> None:
        line = {"type": kind, "time": time.time(), "step": step, "num_steps": NUM_STEPS, **fields}
        with (self.run / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def first_step(self) -> int:
        done = [int(path.name.partition("-")[2]) for path in self.run.glob("checkpoint-*")]
        return max(done, default=0) if self.resumes else 0

    def checkpoint(self, step: int) -> None:
        folder = self.run / f"checkpoint-{step}"
        write_adapter(folder)
        (folder / "optimizer.pt").write_text("not for serving")
        self.say("checkpoint", step, path=folder.name, loss=1.0 / step, eval_loss=None)

    def go(self) -> int:
        first = self.first_step()
        self.say("started", first, resumed_from=first or None, name=self.output.name)
        for step in range(first + 1, NUM_STEPS + 1):
            self.one_step(step)
            if self.stopped:
                self.say("failed", step, code="stopped", error="stopped", checkpoint="x")
                return 130
        write_adapter(self.output)
        self.say("finished", NUM_STEPS, output=str(self.output), loss=0.25)
        return 0

    def one_step(self, step: int) -> None:
        time.sleep(0.4 if self.seed in (SLOW, DEAF) else 0.0)
        if step == 2 and self.seed == FAILING:
            self.say("failed", step, code="data", error="row 7 is too long", checkpoint=None)
            sys.exit(1)
        if step == 2 and self.seed == TELLING:
            self.say("message", step, level="warning", text=f"look at {self.run}/log")
            self.say(
                "failed", step, code="output", error=f"no room: {self.output}/x and {self.run}"
            )
            sys.exit(1)
        if step == 2 and self.seed == DYING:
            print("about to die", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and self.seed == HUNGRY_CHILD and os.fork():
            time.sleep(30)
        if step == 2 and self.seed in (HUNGRY, HUNGRY_CHILD):
            held = bytearray(300 * 2**20)
            held[::4096] = b"x" * len(held[::4096])
            time.sleep(30)
        self.say("step", step, loss=1.0 / step, learning_rate=1e-3, grad_norm=0.5,
                 learned_tokens=10 * step, seconds=0.1 * step)  # fmt: skip
        self.checkpoint(step)


def write_adapter(folder: Path) -> None:
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name in FILES:
        (draft / name).write_text("{}")
    draft.rename(folder)


def main() -> int:
    run = Run(sys.argv[1:])

    def stop(number: int, frame: FrameType | None) -> None:
        run.stopped = True

    signal.signal(signal.SIGTERM, signal.SIG_IGN if run.seed == DEAF else stop)
    return run.go()


if __name__ == "__main__":
    sys.exit(main())
