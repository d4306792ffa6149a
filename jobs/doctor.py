"""Look whether a cluster is fit for a run: versions, room, storage, data, GPUs, tracking server, secrets.

It looks at every node of the cluster of RAY_ADDRESS (as in a Ray job) or, without it, at this machine, and changes
nothing. Problems are listed together, each with what to change; the exit code is then 2. `train` and `evaluate` begin
with the quick part of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.cli import job_config, job_parser, run_job
from pipeline.config.load import ConfigError

if TYPE_CHECKING:
    from pipeline.cluster.doctor import Diagnosis


def main() -> None:
    config = job_config(job_parser("doctor", __doc__).parse_intermixed_args())
    from pipeline.cluster.doctor import examine

    found = examine(config)
    print(summary(found))
    if found.problems:
        raise ConfigError(found.problems, "the cluster")
    print("No problems: the cluster is fit for this run.")


def summary(found: Diagnosis) -> str:
    """The nodes and the notes, a line each."""
    lines = []
    for node in found.nodes:
        answer, place = node.answer, ", driver" if node.is_driver else ""
        lines.append(
            f"{node.name}{place}: {node.cpus} CPUs, {node.gpus} GPUs, {answer.memory_bytes / 1e9:.0f} GB of memory; "
            f"free: {answer.storage_free_bytes / 1e9:.0f} GB of storage, {answer.data_free_bytes / 1e9:.0f} GB for data"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


if __name__ == "__main__":
    run_job(main)
