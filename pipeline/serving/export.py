"""Export a trained DRNet to a folder that runtime/ can run: programs and a description."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pipeline.models.cost import measure_costs
from pipeline.models.drnet import DRNet
from pipeline.models.norms import fold_batch_norms
from pipeline.serving.runtime.policy import Policy
from pipeline.serving.runtime.programs import BACKBONE_FILE, FORMAT, META_FILE, PREDICTOR_FILE
from pipeline.training.checkpoint import LoadedModel


class _FromPixels(nn.Module):
    """Compute the logits of `network` from uint8 images (N, S, S, 3), normalized as DRNet.normalize does."""

    scale: Tensor
    bias: Tensor

    def __init__(self, model: DRNet, network: nn.Module):
        super().__init__()
        self.register_buffer("scale", (255 * model.std).reciprocal().view(1, 3, 1, 1))
        self.register_buffer("bias", (-model.mean / model.std).view(1, 3, 1, 1))
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for uint8 images (N, S, S, 3)."""
        return self.network(images.permute(0, 3, 1, 2).float() * self.scale + self.bias)


def export_model(loaded: LoadedModel, folder: Path, policies: Mapping[str, Any] | None = None) -> None:
    """Write meta.json, a backbone_SIDE.pt2 for each resolution and, with several resolutions, predictor.pt2.

    The programs take uint8 (N, S, S, 3) for any N >= 1, normalize inside, and contain no pickle. Batch norms are folded
    into the convolutions before them, which saves a pass over memory at every layer. Each resolution has its own batch
    norms, so its program has its own weights: R times the backbone on disk and in memory.

    Args:
        loaded: the trained model, on the CPU.
        folder: where the files are written.
        policies: the result of `fitted_policies`; None leaves the predictor's choices as the only policy.
    """
    model = loaded.model.eval()
    costs = measure_costs(model)
    routed = len(model.resolutions) > 1
    if routed:
        torch.export.save(exported(model, model.predictor, model.predictor_size), folder / PREDICTOR_FILE)
    for index, side in enumerate(model.resolutions):
        program = exported(model, model.backbone.at(index), side)
        torch.export.save(program, folder / BACKBONE_FILE.format(side=side))
    meta = {
        "format": FORMAT,
        "classes": loaded.classes,
        "resolutions": model.resolutions,
        "predictor_size": model.predictor_size,
        "validation_crop": loaded.validation_crop,
        "mean": loaded.mean,
        "std": loaded.std,
        "backbone_gflops": costs.backbone_gflops,
        "predictor_gflops": costs.predictor_gflops if routed else 0.0,
        "relative_costs": costs.relative,
    }
    (folder / META_FILE).write_text(json.dumps(meta | dict(policies or {}), indent=1))


def fitted_policies(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the policies that a registered model stores, from the report of its run.

    `policy` is the policy that the run's budget chose. `policies` is the Pareto front from which a request may choose.
    Each of its entries has `policy`, its mean `gflops` on the held-out images, and its expected `accuracy` on the
    images that it was fitted on. `predictor_is_trained` says whether a request may use the predictor. The result is
    empty if the report has no policies. A report of an earlier version may lack a field of `Policy`.
    """
    found = report["policies"]
    if found is None:
        return {}
    names = [field.name for field in fields(Policy)]

    def policy_of(point: Mapping[str, Any]) -> dict[str, Any]:
        return {name: point[name] for name in names if name in point}

    return {
        "policy": policy_of(found["chosen"]),
        "predictor_is_trained": bool(report["budget_curve"]),
        "policies": [
            {"policy": policy_of(point), "gflops": point["gflops"], "accuracy": point["accuracy"]}
            for point in found["front"]
        ],
    }


def exported(model: DRNet, network: nn.Module, side: int) -> ExportedProgram:
    """Export a copy of `network` as a program uint8 (N, S, S, 3) -> logits, with batch norms folded."""
    # torch.export treats a batch of one as a constant and does not write channels_last weights completely.
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    pixels = _FromPixels(model, copy.deepcopy(network)).eval()
    pixels.to(memory_format=torch.contiguous_format)  # ty: ignore[no-matching-overload]  # torch's stubs lack it
    with torch.no_grad():
        program = torch.export.export(pixels, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    fold_batch_norms(program)
    program.example_inputs = None  # they would be stored as a pickle
    return program
