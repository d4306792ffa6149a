"""Prepare a data set: write its betons and its manifest.

The work runs in processes of this machine or, if RAY_ADDRESS is set (as in a Ray job), as tasks on all machines of the
cluster, which then all need the source. Rerun the same command to resume an interrupted preparation. A finished
preparation is not changed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets.beton import Manifest

# Every process of a preparation imports this module again, so functions import other modules only when needed.


def main() -> None:
    from datasets.beton import verify_betons
    from datasets.files import shown_name
    from datasets.prepare.prepare import prepare
    from datasets.sources.glyphs import GlyphSettings
    from datasets.sources.index import counted
    from jobs.cli import job_config, job_parser

    parser = job_parser("prepare", __doc__)
    parser.add_argument("--force", action="store_true", help="prepare again, whatever the folder has")
    parser.add_argument("--download", action="store_true", help="download what data.source lacks (torchvision/...)")
    parser.add_argument("--verify", action="store_true", help="only compare every byte of the betons with the manifest")
    parser.add_argument("--upload", metavar="ADDRESS", help="upload the prepared folder, for data.uri of other runs")
    args = parser.parse_intermixed_args()
    if args.verify and (args.force or args.download or args.upload):
        parser.error("--verify only compares; do not combine it with --force, --download or --upload")
    data = job_config(args, preparing=True).data
    folder = shown_name(data.folder)
    if args.verify:
        manifest = verify_betons(data.folder, full=True)
        print(f"{folder}: every byte matches the manifest (SHA-256 of {' and '.join(manifest.splits)})")
        return
    arguments = data.model_dump(exclude={"glyphs", "uri"})
    arguments |= {"glyphs": GlyphSettings(**data.glyphs.model_dump()), "force": args.force, "show_progress": True}
    arguments["download"] = args.download
    if os.environ.get("RAY_ADDRESS"):
        from pipeline.cluster.connection import map_on_cluster

        arguments["map_chunks"] = map_on_cluster
    try:
        done = prepare(**arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; rerun the same command to resume") from None
    if done.unchanged:
        print(f"{folder} is already prepared from these images with these settings; nothing to do")
    else:
        rate = done.num_images / done.seconds
        before = f", after {done.num_adopted:,} that were done before" if done.num_adopted else ""
        print(f"{folder}: {done.num_images:,} images in {done.seconds:.1f} s ({rate:,.0f} images/s){before}")
    print(summary(done.manifest))
    if done.not_images:
        print(f"  left out {counted(done.not_images)}")
    if args.upload:
        from datasets.staging import upload

        upload(data.folder, args.upload)


def summary(manifest: Manifest) -> str:
    """Describe the data set in a few lines: splits, classes, statistics, license."""
    from datasets.beton import SPLITS
    from datasets.sources.index import listed

    lines = []
    for name in SPLITS:
        split = manifest.splits[name]
        fewest, most = min(split.class_counts), max(split.class_counts)
        each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
        lines.append(f"  {name:<11}{split.count:>9,} images, {each} a class, {split.size_bytes / 1e6:,.1f} MB")
    lines.append(f"  {'classes':<11}{len(manifest.classes):>9,}: {listed(manifest.classes)}")
    if manifest.skipped:
        lines.append(f"  {'skipped':<11}{len(manifest.skipped):>9,} bad images, listed in the manifest")
    lines.append(f"  mean {list(manifest.mean)}, standard deviation {list(manifest.std)}, on a scale of 0 to 1")
    lines.append(f"  license: {manifest.licence}")
    return "\n".join(lines)


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job(main)
