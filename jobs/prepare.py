"""Write the betons and the manifest of a data set.

Runs in parallel; doing it again with the same images and settings does nothing.
"""

from __future__ import annotations

from datasets.beton import SPLITS, Manifest, verify_betons
from datasets.glyphs import GlyphSettings
from datasets.prepare import prepare
from jobs.cli import job_parser, parsed_config, run_job


def main() -> None:
    parser = job_parser("prepare", __doc__)
    parser.add_argument("--force", action="store_true", help="prepare again whatever the folder holds")
    parser.add_argument("--verify", action="store_true", help="only compare every byte of the betons to the manifest")
    args = parser.parse_intermixed_args()
    data = parsed_config(args).data
    if args.verify:
        manifest = verify_betons(data.folder, full=True)
        print(f"{data.folder}: every byte is as it was prepared (SHA-256 of {' and '.join(manifest.splits)})")
        return
    arguments = data.model_dump(exclude={"glyphs"})
    done = prepare(**arguments, glyphs=GlyphSettings(**data.glyphs.model_dump()), force=args.force, show_progress=True)
    if done.unchanged:
        print(f"{data.folder} is already prepared from these images with these settings; nothing to do")
    else:
        rate = done.num_images / done.seconds
        print(f"{data.folder}: {done.num_images:,} images in {done.seconds:.1f} s ({rate:,.0f} images/s)")
    print(summary(done.manifest))


def summary(manifest: Manifest) -> str:
    """The data set in a few lines: splits, classes, statistics, licence."""
    lines = []
    for name in SPLITS:
        split = manifest.splits[name]
        fewest, most = min(split.class_counts), max(split.class_counts)
        each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
        lines.append(f"  {name:<11}{split.count:>9,} images, {each} a class, {split.size_bytes / 1e6:,.1f} MB")
    shown = ", ".join(manifest.classes[:10]) + (", ..." if len(manifest.classes) > 10 else "")
    lines.append(f"  {'classes':<11}{len(manifest.classes):>9,}: {shown}")
    lines += (
        [f"  {'skipped':<11}{len(manifest.skipped):>9,} bad images, listed in the manifest"] if manifest.skipped else []
    )
    lines.append(f"  mean {list(manifest.mean)}, deviation {list(manifest.std)} (of 1)")
    lines.append(f"  licence: {manifest.licence}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main)
