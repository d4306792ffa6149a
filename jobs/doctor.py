"""Check whether a cluster is ready for a run: versions, free space, storage, data, GPUs, tracking server, secrets.

This checks every node of the cluster at RAY_ADDRESS (set in a Ray job) or, without it, this machine. It creates
cluster.storage if that is missing, and changes nothing else. It lists all problems with what to change, and then exits
with code 2. `train`, `evaluate` and `tune` start with the quick checks.
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
    print("No problems: the cluster is ready for this run.")


def summary(found: Diagnosis) -> str:
    """Return one line for each node and each note."""
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
