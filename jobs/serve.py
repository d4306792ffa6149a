"""Serve a registered model over HTTP with Ray Serve: batches across requests, scaling replicas, rolling upgrades.

This runs on the cluster at RAY_ADDRESS (set in a Ray job), or on this machine until SIGTERM or Ctrl-C. On a cluster the
same command rolls out another version without a failed request. The registry is MLFLOW_TRACKING_URI or, if that is not
set, tracking.uri of --config, or else mlflow.db in the project folder. If DRNET_SERVE_TOKEN or DRNET_SERVE_TOKEN_FILE
is set, requests need the token that it contains.
"""

from __future__ import annotations

from jobs.cli import job_config, job_parser, run_job
from pipeline.config.load import load_serving


def main() -> None:
    parser = job_parser("serve", __doc__, needs_config=False)
    parser.add_argument(
        "--model", help="models:/NAME@ALIAS or models:/NAME/VERSION; default: registry.name of --config"
    )
    parser.add_argument(
        "--follow-alias", action="store_true", help="keep running and roll out the alias's new versions"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the configuration for `serve deploy` and exit; serving.split=auto then means together",
    )
    args = parser.parse_intermixed_args()
    config = job_config(args) if args.config else None
    if config:
        serving, model = config.serving, f"models:/{config.registry.name}@{config.registry.alias}"
    else:
        serving, model = load_serving(args.overrides), None
    model = args.model or model
    if model is None:
        raise ValueError("give --model models:/NAME@ALIAS, or --config with its registry.name")
    if args.follow_alias and "@" not in model:
        raise ValueError(f"--follow-alias needs an alias, but the model is {model}. Give models:/NAME@ALIAS")
    # Ray, MLflow and torch take seconds to import; report a mistyped key before that.
    from pipeline.cluster.serve_model import plan_for, read_token, serve_config, serve_model
    from pipeline.tracking.store import tracking_uri

    token, registry = read_token(), tracking_uri(config)
    if args.dry_run:
        import yaml

        plan = plan_for(model, serving, token, registry=registry)
        print(yaml.safe_dump(serve_config(plan), sort_keys=False), end="")
    else:
        serve_model(model, serving, token, follow_alias=args.follow_alias, registry=registry)


if __name__ == "__main__":
    run_job(main)
