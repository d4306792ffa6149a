"""Evaluate a finished run's model on the validation images and rewrite its report."""

from __future__ import annotations

from jobs.cli import job_config, job_parser, run_job


def main() -> None:
    parser = job_parser("evaluate", __doc__)
    parser.add_argument(
        "--cost", choices=("flops", "milliseconds"), help="unit of cost in the report, instead of the run's own"
    )
    args = parser.parse_intermixed_args()
    config = job_config(args)
    from pipeline.cluster.driver import evaluate_run

    result = evaluate_run(config, args.cost)
    print(f"{result.report['verdict']}\nreport: {result.folder.report / 'report.html'}")


if __name__ == "__main__":
    run_job(main)
