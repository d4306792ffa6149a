"""Render a report as Markdown and as one self-contained HTML file."""

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
    class_table,
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
    policy_note,
    policy_table,
    provenance,
    reference_table,
    result_table,
    signed,
)

TEMPLATE = "report.html.j2"
CAPTIONS = {
    "tradeoff": "Accuracy against cost",
    "budget": "What a budget bias does",
    "shares": "Resolutions of the answers",
    "attribute": "Chosen resolution by attribute",
    "gallery": "Images by chosen resolution",
}


def render_markdown(report: Mapping[str, Any], figures: Collection[str]) -> str:
    """Return the report as Markdown. `figures` lists the names of the PNG files in the same folder."""
    details = [f"- {sentence}" for sentence in report["verdict_details"]]
    parts = [f"# {cell(report['name'])}", f"**{report['verdict']}**", "\n".join(details)]
    parts.append(_figure("tradeoff", figures))
    parts += ["## Results", markdown_table(*result_table(report))]
    if report["references"]:
        parts += ["Published elsewhere, under other protocols:", markdown_table(*reference_table(report))]
    if report["comparisons"] is not None:
        parts += ["## The routed network against the others", markdown_table(*comparison_table(report))]
        parts += ["## Policies", policy_note(report), markdown_table(*policy_table(report))]
        if report["budget_curve"]:
            parts += ["## Budget curve of the predictor", _figure("budget", figures), BUDGET_NOTE]
            parts.append(markdown_table(*budget_table(report)))
        parts += ["## Resolutions of the answers", _figure("shares", figures)]
        parts += [
            "Static top-1 of the images routed to each resolution:",
            markdown_table(*by_chosen_table(report)),
        ]
        parts += ["Images by chosen resolution and by the oracle's choice:", markdown_table(*confusion_table(report))]
    parts += ["## Classes", markdown_table(*class_table(report))]
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
    """Return the report as one HTML file that loads nothing from outside: figures and images are data URLs.

    Args:
        light, dark: PNG bytes of the figures by name, for the light and the dark theme.
        tiles: images of the gallery, one row per resolution; empty for no gallery.
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
        policies=policy_table(report) if routed else None,
        policy_note=policy_note(report) if routed else None,
        classes=class_table(report),
        attributes={name: attribute_table(name, found) for name, found in report["attributes"].items()},
        notes=method_notes(report),
        provenance=provenance(report),
    )


def _figure(name: str, figures: Collection[str]) -> str:
    return markdown_figure(name, CAPTIONS[name], figures)
