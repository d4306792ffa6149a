"""Search the predictor's size for a trained backbone, finetune the best candidates and choose one by a budget.

The backbone comes from the run of the same configuration, or from search.backbone. If the search is interrupted, the
same command resumes it; if it is finished, the command only chooses again.
"""

from __future__ import annotations

from jobs.cli import job_config, job_parser, run_job


def main() -> None:
    parser = job_parser("tune", __doc__)
    parser.add_argument("--budget-gflops", type=float, help="instead of search.budget_gflops")
    parser.add_argument("--max-accuracy-drop", type=float, help="points, instead of search.max_accuracy_drop")
    parser.add_argument("--dry-run", action="store_true", help="print what the search would try and the estimated time")
    parser.add_argument("--register", action="store_true", help="register the chosen model")
    args = parser.parse_intermixed_args()
    given = {"budget_gflops": args.budget_gflops, "max_accuracy_drop": args.max_accuracy_drop}
    args.overrides += [f"search.{key}={value}" for key, value in given.items() if value is not None]
    config = job_config(args)
    if args.dry_run:
        from pipeline.search.checks import describe_search

        print(describe_search(config))
        return
    if args.register and config.search.budget_gflops is None and config.search.max_accuracy_drop is None:
        raise ValueError("--register needs a rule to choose by. Give --budget-gflops or --max-accuracy-drop")
    if args.register and config.search.finetuned == 0:
        raise ValueError(
            "--register registers a finetuned candidate, but search.finetuned=0 finetunes none. Omit --register, or "
            "set search.finetuned to 1 or more (this needs stages.joint)"
        )
    from pipeline.search.driver import register_chosen, search_run
    from pipeline.search.report import verdict

    result = search_run(config)
    print(f"{verdict(result.report)}\nreport: {result.folder.report / 'report.md'}")
    if args.register:
        model = register_chosen(result.chosen)
        print(f"{model.name} version {model.version}: {model.uri}")
        if model.champion != model.version and result.chosen is not None:
            from pipeline.config.run_folder import RunFolder

            file = RunFolder.of(result.chosen.config).config
            print(
                f"models:/{model.name}@{model.alias} stays version {model.champion}. To compare the two and move it: "
                f"python -m jobs.register --config {file} --alias {model.alias} --promote"
            )


if __name__ == "__main__":
    run_job(main)
