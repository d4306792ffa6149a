"""Put a finished run's model into the MLflow registry and set an alias on it."""

from __future__ import annotations

from jobs.cli import job_parser, run_job
from pipeline.config_file import load_config


def main() -> None:
    parser = job_parser("register", __doc__)
    parser.add_argument("--alias", help="alias to set, in place of registry.alias")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, [*args.overrides, *([f"registry.alias={args.alias}"] if args.alias else [])])
    from pipeline.run_folder import RunFolder
    from pipeline.tracking.registry import register_model

    folder = RunFolder.of(config)
    model = register_model(config, folder.path, folder.model, folder.report_json)
    print(f"{model.name} version {model.version}{'' if model.is_new else ' (was registered already)'}: {model.uri}")
    print(f"top-1 {100 * float(model.tags['accuracy']):.2f} %, {float(model.tags['gflops']):.4g} GFLOPs an image")


if __name__ == "__main__":
    run_job(main)
