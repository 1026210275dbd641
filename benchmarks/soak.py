"""Trains a tiny model through half an hour of trouble, and compares it with an undisturbed run.

    python benchmarks/soak.py --folder runs/soak --minutes 30

The run is started again and again, always with the same command but for the number of processes
(1 x 8, 2 x 4 or 4 x 2 simulated devices) and of data workers, and meets at random:

* `kill`: SIGKILL while it starts, at a step, or inside a save; `terminate`: SIGTERM; `interrupt`:
  Ctrl-C; each to all processes or to one of them;
* `full`: its disk has no room left; a small file system is mounted for it, which takes root or user
  namespaces (the report says so where neither is permitted);
* `images`: all training images are replaced while it is down, looked at by `data check`, and put
  back; `held_out`: the validation images are replaced while it runs;
* `second`: the same command is started twice; `stall`: all processes stand still for a while;
* slow storage: half of the images are in an object store, the emulator of the tests, which stalls,
  refuses and cuts answers (needs the extra `test`).

A quarter of the time it is left alone, for the sake of its memory. Then an undisturbed run is made
with the same numbers of processes over the same steps: sums over processes have another order than
sums inside one, so that bits can be compared only where they agree.

FOLDER gets report.json, report.txt and logs/. The exit status is 1 if a check of the report fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # this checkout, whatever is installed

import soak_checks  # noqa: E402
import soak_world as world  # noqa: E402
from soak_checks import Start  # noqa: E402

from internvlx_jax.checkpoints.run_format import finished_steps  # noqa: E402
from internvlx_jax.core.line_log import read_whole  # noqa: E402

# Processes, and devices of each; the more processes, the longer a start takes.
LAYOUTS = (*((1, 8),) * 3, *((2, 4),) * 2, (4, 2))
KINDS = (*("kill",) * 4, *("terminate",) * 2, *("interrupt",) * 2, *("full",) * 2, "images",
         "held_out", "second", "stall")  # fmt: skip
SAME_SHARE = 0.5  # of the starts, which have as many processes as the one before
STEPS = 1_000_000
PATIENCE = 400.0  # seconds until something that has to happen must have happened
GRACE = 240.0  # until the others have noticed that one has ended: jax waits 100 s for a heartbeat
LONG_SHARE = 0.25  # of the time, in which nothing happens
PREEMPTED = 75
UNFINISHED = "*orbax-checkpoint-tmp*"


class Soak:
    """Starts the run, disturbs it, and remembers what happened."""

    def __init__(self, folder: Path, generator: random.Random, save_every: int):
        self.folder, self.generator, self.save_every = folder, generator, save_every
        self.logs, self.scratch = folder / "logs", folder / "tmp"
        for each in (self.logs, self.scratch):
            each.mkdir()
        self.disk = world.Disk(folder / "disk")
        emulated = importlib.util.find_spec("gcp_storage_emulator") is not None
        self.store = world.Store() if emulated else None
        self.pages = world.Pages(folder / "data", self.store)
        self.run, self.straight = self.disk.folder / "run", folder / "straight"
        self.configs = {
            run: world.write_config(
                world.tiny_run(run, self.pages, STEPS, save_every), folder / f"{run.name}.py"
            )
            for run in (self.run, self.straight)
        }
        self.mark = f"SOAK_OF={folder}"
        self.starts: list[Start] = []

    # --- processes --------------------------------------------------------------------------------

    def begin(
        self, run: Path, layout: tuple[int, int], name: str, *flags: str
    ) -> list[subprocess.Popen]:
        """Starts `train` in several processes, each with a log of its own."""
        processes, devices = layout
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        several = ["--coordinator", f"localhost:{port}", "--num_processes", str(processes)]
        begun, environment = [], world.environment(self.folder, self.store, devices)
        for process in range(processes):
            peers = [*several, "--process_id", str(process)] if processes > 1 else []
            with (self.logs / f"{name}-{process}.log").open("w") as log:
                begun.append(subprocess.Popen(
                    [sys.executable, ROOT / "train.py", "--config", self.configs[run], *peers,
                     *flags],
                    env=environment, stdout=log, stderr=log))  # fmt: skip
        return begun

    def check_data(self, name: str) -> int:
        """Runs `data check` over the training pages, which measures what has changed."""
        with (self.logs / f"{name}-check.log").open("w") as log:
            command = [sys.executable, "-m", "internvlx_jax", "data", "check", self.pages.meta]
            command += ["--config", self.configs[self.run], "--out", self.folder / "check"]
            return subprocess.run(
                command,
                env=world.environment(self.folder, self.store, 1),
                stdout=log,
                stderr=log,
                cwd=ROOT,
            ).returncode

    def complete(self) -> int:
        return max(finished_steps(self.run), default=0)

    def logged(self) -> int:
        rows = [line for line in read_whole(self.run / "metrics.jsonl").split(b"\n")[:-1] if line]
        return json.loads(rows[-1])["step"] if rows else 0

    def _begun(self) -> int:
        return read_whole(self.run / "starts.jsonl").count(b"\n")

    # --- one start --------------------------------------------------------------------------------

    def start(self, kind: str, seconds: float = 0.0) -> Start:
        """Starts the run, lets it meet `kind`, and waits until all its processes have ended."""
        generator, number = self.generator, len(self.starts)
        layout, workers = generator.choice(LAYOUTS), generator.choice((0, 0, 1))
        if self.starts and generator.random() < SAME_SHARE:
            layout = self.starts[-1].layout
        slow = generator.choice(world.SLOW) if kind != "long" else {}
        moment = generator.choice(("start", "step", "step", "save"))
        moment = "step" if kind in ("long", "last", "stall", "held_out") else moment
        first, surprise = self.complete(), ""
        if self.store:
            self.store.faults(slow)
        name = f"{number:03d}-{kind}"
        if kind == "images":
            surprise = self._replaced_while_down(name, layout)
        begun = self._begun()
        processes = self.begin(self.run, layout, name, "--set", f"data.num_workers={workers}")
        started, watch = time.monotonic(), world.Watch(processes)
        try:
            surprise = surprise or self._await(processes, moment, begun, first)
            reached = time.monotonic() - started
            if not surprise and kind == "long":
                surprise = self._unless_ended(processes, seconds)
            if not surprise:
                surprise = getattr(self, f"_{kind}", self._terminate)(processes, moment)
            codes, hung = self._ended(processes)
        finally:
            self.disk.empty()
            self.pages.restore()
            readings = watch.end()
            for process in processes:
                process.kill()
        orphans = world.end_marked(self.mark, patience=20)
        self.starts.append(Start(
            number, kind, moment, layout, workers, slow, first, self.complete(), self.logged(),
            codes, surprise or hung or soak_checks.unexpected(kind, moment, codes), orphans,
            reached, readings))  # fmt: skip
        return self.starts[-1]

    def _await(
        self, processes: Sequence[subprocess.Popen], moment: str, begun: int, first: int
    ) -> str:
        """Waits for a moment of a start; returns what came instead."""
        if moment == "start":
            return self._unless_ended(processes, self.generator.uniform(0.5, 15))
        target = first + self.generator.randrange(1, 3 * self.save_every)
        folder = self.run / "checkpoints"

        def reached() -> bool:
            if self._begun() <= begun:
                return False
            if moment == "save" and folder.is_dir():
                return any(folder.glob(UNFINISHED)) and self.logged() >= min(target, first + 5)
            return self.logged() >= target

        return self._wait(processes, reached, 0.0005 if moment == "save" else 0.02)

    def _wait(
        self,
        processes: Sequence[subprocess.Popen],
        reached: Callable[[], bool],
        every: float,
        patience: float = PATIENCE,
    ) -> str:
        until = time.monotonic() + patience
        while not reached():
            codes = [process.poll() for process in processes]
            if any(code is not None for code in codes):
                return f"ended by itself: {codes}"
            if time.monotonic() > until:
                return f"nothing came within {patience:.0f} s"
            time.sleep(every)
        return ""

    def _unless_ended(self, processes: Sequence[subprocess.Popen], seconds: float) -> str:
        until = time.monotonic() + seconds
        return self._wait(processes, lambda: time.monotonic() >= until, 0.05, seconds + 1)

    def _ended(self, processes: Sequence[subprocess.Popen]) -> tuple[list[int], str]:
        """Waits until all have ended; returns their exit statuses and what did not end."""
        until, hung = time.monotonic() + GRACE, ""
        for process in processes:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                hung = f"process {processes.index(process)} did not end within {GRACE:.0f} s"
                process.kill()
        return [process.wait() for process in processes], hung

    # --- what a start meets -----------------------------------------------------------------------

    def _send(self, processes: Sequence[subprocess.Popen], number: int, moment: str) -> str:
        """Sends a signal to all processes, or to one that takes the others with it."""
        one = moment != "start" and self.generator.random() < 0.5
        for process in [self.generator.choice(processes)] if one else processes:
            process.send_signal(number)
        return ""

    def _kill(self, processes: Sequence[subprocess.Popen], moment: str) -> str:
        time.sleep(self.generator.uniform(0, 0.005 if moment == "save" else 0.2))
        for process in processes:
            process.kill()
        return ""

    def _terminate(self, processes: Sequence[subprocess.Popen], moment: str) -> str:
        return self._send(processes, signal.SIGTERM, moment)

    def _interrupt(self, processes: Sequence[subprocess.Popen], moment: str) -> str:
        return self._send(processes, signal.SIGINT, moment)

    def _full(self, processes: Sequence[subprocess.Popen], moment: str) -> str:
        # From nothing at all to less than a checkpoint.
        self.disk.fill(self.generator.choice((0, 4096, 50_000, 300_000)))
        time.sleep(0.1)
        return ""

    def _stall(self, processes: Sequence[subprocess.Popen], moment: str) -> str:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                process.send_signal(number)
            time.sleep(self.generator.uniform(1, 15) if number == signal.SIGSTOP else 0)
        return self._unless_ended(processes, 3) or self._terminate(processes, moment)

    def _held_out(self, processes: Sequence[subprocess.Popen], moment: str) -> str:
        self.pages.replace("val")
        every = 2 * self.save_every  # steps between two validations
        target = (self.logged() // every + 1) * every + 1
        waited = self._wait(processes, lambda: self.logged() >= target, 0.05)
        return waited or self._terminate(processes, moment)

    def _second(self, processes: Sequence[subprocess.Popen], moment: str) -> str:
        """Starts the same command again, which has to be refused."""
        name = f"{len(self.starts):03d}-refused"
        other = self.begin(self.run, (1, 8), name)
        codes, hung = self._ended(other)
        log = (self.logs / f"{name}-0.log").read_text()
        if hung or codes != [1] or "is in use by process" not in log:
            return f"a second start in the folder was not refused: {codes} {hung}"
        return self._kill(processes, "step")

    def _images(self, processes: Sequence[subprocess.Popen], moment: str) -> str:
        return self._terminate(processes, moment)

    def _replaced_while_down(self, name: str, layout: tuple[int, int]) -> str:
        """Replaces images, has them measured, expects a refusal, and puts them back."""
        if not self.complete():
            return ""
        self.pages.replace("train")
        checked = self.check_data(name)
        refused = self.begin(self.run, layout, f"{name}-refused")
        codes, hung = self._ended(refused)
        self.pages.restore()
        log = (self.logs / f"{name}-refused-0.log").read_text()
        if checked or hung or set(codes) != {1} or "changed since this checkpoint" not in log:
            return f"a start with other images was not refused: check {checked}, {codes} {hung}"
        return ""

    # --- the whole --------------------------------------------------------------------------------

    def disturb(self, minutes: float, only: str | None) -> None:
        """Runs until the time is over, and stops with a checkpoint."""
        kinds = [kind for kind in KINDS if only is None or kind in only.split(",")]
        kinds = [kind for kind in kinds if kind != "full" or self.disk.mounted]
        order = [*dict.fromkeys(kinds), *kinds]
        self.generator.shuffle(order)
        begun, last = time.monotonic(), 60 * minutes
        long = LONG_SHARE * last if only is None else 0.0
        while (passed := time.monotonic() - begun) < last - 15:
            if long and passed > last / 2:
                kind = "long"
            else:
                kind = order.pop() if order else self.generator.choice(kinds)
            done = self.start(kind, long)
            long = 0.0 if kind == "long" else long
            print(soak_checks.line(done), flush=True)
        while not self.starts or self.starts[-1].codes != [PREEMPTED] * len(self.starts[-1].codes):
            print(soak_checks.line(self.start("last")), flush=True)

    def replay(self) -> list[tuple[tuple[int, int], int]]:
        """Makes the undisturbed run; returns its processes and the step up to which they ran."""
        if self.store:
            self.store.faults({})
        segments: list[tuple[tuple[int, int], int]] = []
        for done in self.starts:
            if done.last > done.first:
                if segments and segments[-1][0] == done.layout:
                    segments.pop()
                segments.append((done.layout, done.last))
        step = 0
        for number, (layout, last) in enumerate(segments):
            processes = self.begin(
                self.straight, layout, f"straight-{number:03d}", "--stop_after", str(last - step)
            )
            codes = [process.wait() for process in processes]
            if any(codes):
                raise RuntimeError(f"the undisturbed run ended with {codes}, see {self.logs}")
            step = last
        return segments


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="is emptied before")
    parser.add_argument("--minutes", type=float, default=30.0, help="of trouble (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    text = "steps between two saves (%(default)s)"
    parser.add_argument("--save_every", type=int, default=20, help=text)
    parser.add_argument("--only", metavar="KIND,...", help="of what may happen; all by default")
    parser.add_argument("--own_namespace", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None and not set(args.only.split(",")) <= set(KINDS):
        parser.error(f"--only {args.only}: choose from {', '.join(dict.fromkeys(KINDS))}")
    if not args.own_namespace and world.may_mount():
        # A mount of this program ends with it, whatever ends it.
        command = [*world.own_namespace(), sys.executable, __file__, "--own_namespace"]
        os.execvp(command[0], [*command, *sys.argv[1:]])
    # A shell lets its background jobs ignore Ctrl-C, and their children inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = args.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    soak = Soak(folder, random.Random(args.seed), args.save_every)
    begun = time.monotonic()
    soak.disturb(args.minutes, args.only)
    disturbed = time.monotonic() - begun
    segments = soak.replay()
    report = soak_checks.report(soak, segments, args.minutes, disturbed, args.seed)
    if soak.store:
        soak.store.close()
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    text = soak_checks.text(report)
    (folder / "report.txt").write_text(text)
    print(text)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
