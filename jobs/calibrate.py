"""Choose the policy of a finished run by another budget, and rewrite its report, without training or evaluating again.

The budget is in the configuration, so change it there or on the command line: policy.max_accuracy_drop=0.5,
policy.budget_gflops=2.5 or policy.budget_milliseconds=8. Register the run again to deploy the new choice.
"""

from __future__ import annotations

from jobs.cli import job_config, job_parser, run_job


def main() -> None:
    config = job_config(job_parser("calibrate", __doc__).parse_intermixed_args())
    from pipeline.cluster.driver import calibrate_run

    result = calibrate_run(config)
    print(f"{result.report['verdict']}\nreport: {result.folder.report / 'report.html'}")


if __name__ == "__main__":
    run_job(main)
