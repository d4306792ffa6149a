"""Kill and resume runs, and compare them with an uninterrupted one: `python -m tests.killed_runs FOLDER` prints them.

Every rank is a process, forked from one that has imported torch and computed nothing. A run kills itself right after a
given step, or a given epoch of crops of a logit table, so every attempt is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.models.drnet import DRNet
from pipeline.training.checkpoint import TrainingState
from pipeline.training.loop import train
from pipeline.training.run import TABLE, Progress
from tests.synthetic import config_of, run_of, without_timings

ROUTED = {"epochs": 1, "lr": 0.05, "alpha_gflops": 0.0006, "eta": 0.5, "ema_decay": 0.5}
STAGES = {
    "backbone": {"epochs": 2, "lr": 0.05, "schedule": "cosine", "distillation": "learned", "ema_decay": 0.5}
    | {"freeze_epochs": 0.5, "head_lr_scale": 2.0},
    "predictor": ROUTED | {"epochs": 2, "optimizer": "adamw", "lr": 0.01, "logits": "table"},
    "joint": ROUTED | {"clip_grad_norm": 1.0},
}
"""Stages that use everything that a state stores."""

Pair = tuple[str, int]
"""A stage and its number of finished steps, or TABLE and its number of finished epochs of crops."""

STEPS_OF = {"backbone": 6, TABLE: 3, "predictor": 6, "joint": 3}
ENDS_OF = {"backbone": (1, 2, 3, 6), TABLE: (1, 3), "predictor": (1, 2, 6), "joint": (1, 3)}
PAIRS: dict[int, list[Pair]] = {
    1: [(what, count) for what, counts in ENDS_OF.items() for count in counts],
    2: [("backbone", 3), (TABLE, 2), ("predictor", 2), ("joint", 3)],
}
"""Where runs die, by number of ranks: first and last steps of each stage, and others. An epoch has three steps."""


class FileReporter:
    """Write the last state, and a line for each step and epoch, to a folder, as the loop's Reporter."""

    def __init__(self, folder: Path, rank: int, dies_after: Pair | None):
        self.folder, self.rank, self.dies_after = folder, rank, dies_after
        self._crop_epochs = 0

    def step(self, progress: Progress, loss: Tensor) -> None:
        done = progress.epoch * progress.steps + progress.step
        self._write([progress.stage, done], loss.item())
        self._die_after((progress.stage, done))

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        self._write([progress.stage, f"epoch {progress.epoch}"], without_timings(values))

    def message(self, text: str) -> None:
        if text.startswith("logit table"):
            self._crop_epochs += 1
            self._die_after((TABLE, self._crop_epochs))

    def keep(self, name: str, model: DRNet) -> None:
        pass

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        if self.rank == 0:
            state.save(self.folder / "state.pt")

    def _die_after(self, pair: Pair) -> None:
        if pair == self.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, when: list, value: Any) -> None:
        with (self.folder / f"events-{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps([when, value]) + "\n")


def attempt_run(folder: Path, attempt: int, rank: int, world_size: int, dies_after: Pair | None) -> None:
    """Run one rank of one attempt: train from the last state, if any, to the end or to `dies_after`."""
    torch.set_num_threads(1)
    if world_size > 1:
        rendezvous = f"file://{folder}/rendezvous-{attempt}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    run = run_of(config_of(stages=STAGES), FileReporter(folder, rank, dies_after), folder / "tables")
    state = folder / "state.pt"
    train(run, TrainingState.load(state) if state.exists() else None)
    digest = hashlib.sha256()
    for name, value in run.model.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    (folder / f"sha256-{rank}").write_text(digest.hexdigest())


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a forked process, and return the process's id."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def run_to_the_end(folder: Path, world_size: int, dies_after: Pair | None) -> dict[str, Any]:
    """Run as many attempts as it takes; return how they ended, what the run resumed from, and its result."""
    folder.mkdir(parents=True)
    ended, resumed_from = [], "nothing"
    for attempt, pair in enumerate([dies_after, None] if dies_after else [None]):
        ranks = [
            forked(lambda rank=rank, attempt=attempt, pair=pair: attempt_run(folder, attempt, rank, world_size, pair))
            for rank in range(world_size)
        ]
        ended.append([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks])
        if pair and (folder / "state.pt").exists():
            resumed_from = TrainingState.load(folder / "state.pt").name
    events = [json.loads(line) for line in (folder / "events-0.jsonl").read_text().splitlines()]
    return {
        "ranks": world_size,
        "died_after": dies_after,
        "resumed_from": resumed_from,
        "ended": ended,
        "sha256": [(folder / f"sha256-{rank}").read_text() for rank in range(world_size)],
        "events": sorted({json.dumps(event) for event in events}),
    }


def name_of(world_size: int, pair: Pair | None) -> str:
    return f"{world_size}-{'-'.join(map(str, pair)) if pair else 'undisturbed'}"


def run_cases(folder: Path, world_size: int, cases: Sequence[Pair | None]) -> None:
    """Run each case to the end in a folder of its own, print its result, and write it to a file beside the folder."""
    for pair in cases:
        name = name_of(world_size, pair)
        found = run_to_the_end(folder / name, world_size, pair)
        (folder / f"{name}.json").write_text(json.dumps(found))
        killed = f"{pair[0]:<9} {'crop_epoch' if pair[0] == TABLE else 'step'} {pair[1]}" if pair else "undisturbed"
        print(f"{world_size} rank(s)  {killed:<18}  {found['resumed_from']:<34}  {found['sha256'][0]}", flush=True)


def main(folder: Path) -> None:
    """Run all cases. Those with one rank run two at a time."""
    results = []
    for world_size, pairs in PAIRS.items():
        cases = [None, *pairs]
        shares = [cases[0::2], cases[1::2]] if world_size == 1 else [cases]
        helpers = [forked(lambda share=share, size=world_size: run_cases(folder, size, share)) for share in shares]
        ended = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in helpers]
        if any(ended):
            raise SystemExit(f"the processes that run the cases with {world_size} rank(s) ended with {ended}")
        results += [json.loads((folder / f"{name_of(world_size, pair)}.json").read_text()) for pair in cases]
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
