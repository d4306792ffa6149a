"""torch.compile for the backbone's passes in training."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.models.backbone import ResolutionBackbone

GRAPHS_PER_RESOLUTION = 16
"""that torch.compile may make: some 4 kinds of passes, for sizes 0, 1, the first one and any"""


def compile_backbone(backbone: ResolutionBackbone, backend: str | Callable = "inductor") -> None:
    """Have torch.compile run the backbone's passes.

    Each resolution has graphs of its own, for passes with and without gradient and for both kinds of batch-norm
    statistics. The size of sub-batches, which changes from step to step, becomes a variable of a graph as soon as a
    second one is seen. That is more than the 8 graphs that torch allows by default, beyond which it would go on
    uncompiled.
    """
    limit = GRAPHS_PER_RESOLUTION * backbone.num_resolutions
    backbone.compile(backend=backend, recompile_limit=limit, isolate_recompiles=True)
