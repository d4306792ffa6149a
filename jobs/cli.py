"""What all jobs share: `--config`, overrides, `--help` with every field, and errors without a traceback."""

from __future__ import annotations

import argparse
import io
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from pipeline.config.explain import describe_fields
from pipeline.config.job_package import job_package, package_problems
from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import Config

_PAGE_START = """\
# Configuration

A run is one YAML file; `jobs/configs` has complete ones. Change any field on the command line with `key.path=value`:
`stages.joint.epochs=20`, `model.resolutions=[224,192,160]`.

- Text and paths on the command line are taken literally: `"data.source=/photos/set #2"`. `null` clears an optional
  field. All other values are YAML.
- `~` at the start of a path is your home folder. A path is never an address such as `s3://...`. Only `data.uri`,
  `tracking.uri` and `jobs.prepare --upload` take addresses.
- Numbers are decimal (`010` is 10, `1e3` is 1000), and dates are text.
- Unknown keys, and keys that a file gives twice, are refused.
- FLOPs are multiply-adds; a GFLOP is 1e9 of them.

`make docs` writes this page.
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


def job_parser(job: str, summary: str | None, *, needs_config: bool = True) -> argparse.ArgumentParser:
    """Build a parser with `--config` and overrides. `summary` is the job module's docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{job}",
        description=textwrap.dedent(summary or "").strip(),
        epilog=field_reference(),
        formatter_class=_Help,
    )
    parser.add_argument("--config", required=needs_config, help="YAML file, or the name of one in jobs/configs")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="change a field; text and paths are literal, null clears an optional one, and other values are YAML",
    )
    return parser


def parsed_config(args: argparse.Namespace) -> Config:
    """Read the configuration file and the overrides that the arguments of a `job_parser` give."""
    return load_config(args.config, args.overrides)


def job_config(args: argparse.Namespace, *, preparing: bool = False) -> Config:
    """Read the configuration for a job that uses files. In a Ray job, refuse paths that would be lost or missing."""
    config, package = parsed_config(args), job_package(Path.cwd())
    problems = list(package_problems(config, package, preparing=preparing)) if package else []
    if problems:
        raise ConfigError(problems, "the Ray job")
    return config


def field_reference() -> str:
    """List every field of the configuration with type, default, meaning and unit."""
    lines = ["configuration fields (key, type, default, meaning):"]
    for key, kind, default, meaning in describe_fields():
        need = "required" if default == "(required)" else f"default {default}"
        head = f"{key}  [{kind}]  {need}"
        lines += textwrap.wrap(
            head,
            width=104,
            initial_indent="  ",
            subsequent_indent=" " * 4,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += textwrap.wrap(meaning, width=104, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def reference_page() -> str:
    """Return docs/configuration.md, with a table of fields for each section."""
    lines: list[str] = [*_PAGE_START.splitlines()]
    section = None
    for key, kind, default, meaning in describe_fields():
        parent, _, name = key.rpartition(".")
        if parent != section:
            section = parent
            lines += ["", f"## {parent or 'The run'}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        cells = (f"`{name}`", kind, default, " ".join(meaning.split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def run_job(main: Callable[[], None]) -> None:
    """Run a job's main. An error that a user can fix ends it with one message and exit code 2, without a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # escape a name that the terminal cannot show, do not fail
    try:
        main()
    except BrokenPipeError:  # for example `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  for the interpreter's own flush at exit
        sys.exit(141)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    sys.stdout.write(reference_page())
