"""Train the stages of a configuration on Ray, then evaluate and report.

If it is interrupted, the same command resumes from the last checkpoint. If the run is finished, it does nothing.
"""

from __future__ import annotations

from jobs.cli import job_config, job_parser, run_job


def main() -> None:
    config = job_config(job_parser("train", __doc__).parse_intermixed_args())
    # Ray, torch and MLflow take seconds to import; report a mistyped key before that.
    from pipeline.cluster.driver import train_run

    result = train_run(config)
    if result.already_finished:
        print(f"The run {config.name} is already finished. To train again, choose another name or remove its folder.")
    print(f"{result.report['verdict']}\nreport: {result.folder.report / 'report.html'}")


if __name__ == "__main__":
    run_job(main)
