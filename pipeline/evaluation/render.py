"""The report for readers: Markdown, and one self-contained HTML file."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from pipeline.evaluation.figures import Tile
from pipeline.evaluation.style import resolution_colors
from pipeline.evaluation.tables import (
    BUDGET_NOTE,
    attribute_table,
    budget_table,
    by_chosen_table,
    cell,
    comparison_table,
    confusion_table,
    cost_cells,
    cost_headers,
    cost_words,
    gflops,
    markdown_figure,
    markdown_table,
    method_notes,
    percent,
    provenance,
    reference_table,
    result_table,
    signed,
)

TEMPLATE = "report.html.j2"
CAPTIONS = {
    "tradeoff": "Accuracy against cost",
    "budget": "What a budget bias does",
    "shares": "What the predictor chooses",
    "attribute": "What decides the resolution",
    "gallery": "Images by chosen resolution",
}


def render_markdown(report: Mapping[str, Any], figures: Collection[str]) -> str:
    """The report as Markdown; `figures` are the PNG files that lie beside it."""
    details = [f"- {sentence}" for sentence in report["verdict_details"]]
    parts = [f"# {cell(report['name'])}", f"**{report['verdict']}**", "\n".join(details)]
    parts.append(_figure("tradeoff", figures))
    parts += ["## Results", markdown_table(*result_table(report))]
    if report["references"]:
        parts += ["Published elsewhere, under other protocols:", markdown_table(*reference_table(report))]
    if report["comparisons"] is not None:
        parts += ["## The routed network against the others", markdown_table(*comparison_table(report))]
        parts += ["## Budget curve", _figure("budget", figures), BUDGET_NOTE, markdown_table(*budget_table(report))]
        parts += ["## What the predictor does", _figure("shares", figures)]
        parts += [
            "Static top-1 of the images that were sent to each resolution:",
            markdown_table(*by_chosen_table(report)),
        ]
        parts += ["Images by chosen resolution and the oracle's:", markdown_table(*confusion_table(report))]
    for name, found in report["attributes"].items():
        parts += [f"## Choice by {cell(name)}", markdown_table(*attribute_table(name, found))]
    parts += [_figure("attribute", figures), _figure("gallery", figures)]
    parts += ["## How it was measured", "\n".join(f"- {cell(note)}" for note in method_notes(report))]
    parts.append(markdown_table(("", ""), provenance(report)))
    return "\n\n".join(part for part in parts if part) + "\n"


def render_html(
    report: Mapping[str, Any],
    light: Mapping[str, bytes],
    dark: Mapping[str, bytes],
    tiles: Sequence[Sequence[Tile]],
) -> str:
    """The report as one HTML file that loads nothing: figures for light and dark, and images, are data addresses.

    Args:
        light, dark: PNG bytes of the figures by name, for both looks.
        tiles: the gallery, one row a resolution; empty leaves it out.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "gflops": gflops, "signed": signed}
    environment.filters["data"] = lambda content: base64.b64encode(content).decode()
    routed = report["comparisons"] is not None
    return environment.get_template(TEMPLATE).render(
        report=report,
        rows={row["id"]: row for row in report["rows"]},
        words=cost_words(report),
        cost_headers=cost_headers(report),
        cost_cells=partial(cost_cells, report),
        colors=resolution_colors(len(report["resolutions"])),
        light=light,
        dark=dark,
        tiles=tiles,
        comparison=comparison_table(report) if routed else None,
        budget=budget_table(report) if routed else None,
        budget_note=BUDGET_NOTE,
        attributes={name: attribute_table(name, found) for name, found in report["attributes"].items()},
        notes=method_notes(report),
        provenance=provenance(report),
    )


def _figure(name: str, figures: Collection[str]) -> str:
    return markdown_figure(name, CAPTIONS[name], figures)
