"""Evaluate a finished run's model on the validation images and write its report anew."""

from __future__ import annotations

from jobs.cli import job_parser, parsed_config, run_job


def main() -> None:
    config = parsed_config(job_parser("evaluate", __doc__).parse_intermixed_args())
    from pipeline.cluster.launch import evaluate_run

    result = evaluate_run(config)
    print(f"{result.report['verdict']}\nreport: {result.folder.report / 'report.html'}")


if __name__ == "__main__":
    run_job(main)
