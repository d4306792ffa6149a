"""Train the stages of a configuration on Ray, then evaluate and report.

Interrupted, the same command goes on from the last checkpoint; finished, it says so and does nothing.
"""

from __future__ import annotations

from jobs.cli import job_config, job_parser, run_job


def main() -> None:
    config = job_config(job_parser("train", __doc__).parse_intermixed_args())
    # Ray, torch and MLflow take seconds to import: a mistyped key is answered before.
    from pipeline.cluster.driver import train_run

    result = train_run(config)
    if result.already_finished:
        print(f"The run {config.name} is already finished; to train again choose another name, or remove its folder.")
    print(f"{result.report['verdict']}\nreport: {result.folder.report / 'report.html'}")


if __name__ == "__main__":
    run_job(main)
