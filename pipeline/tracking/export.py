"""A trained DRNet -> the folder that serving.py runs: exported programs and a description."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.models.cost import measure_costs
from pipeline.models.drnet import DRNet
from pipeline.tracking.serving import BACKBONE_FILE, META_FILE, PREDICTOR_FILE
from pipeline.training.checkpoint import LoadedModel


class _FromPixels(nn.Module):
    """uint8 images (N, S, S, 3) -> logits of `network`."""

    def __init__(self, model: DRNet, network: nn.Module):
        super().__init__()
        self.normalize, self.network = model.normalize, network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images))


def export_model(loaded: LoadedModel, folder: Path) -> None:
    """Write meta.json, a backbone_SIDE.pt2 for each resolution and, for more than one, predictor.pt2 into `folder`.

    The programs take uint8 (N, S, S, 3) for any N >= 1, normalise inside, and hold no pickle. `loaded` is on the CPU.
    """
    model = loaded.model.eval()
    costs = measure_costs(model)
    routed = len(model.resolutions) > 1
    if routed:
        _export(_FromPixels(model, model.predictor), model.predictor_size, folder / PREDICTOR_FILE)
    for index, side in enumerate(model.resolutions):
        _export(_FromPixels(model, model.backbone.at(index)), side, folder / BACKBONE_FILE.format(side=side))
    meta = {
        "classes": loaded.classes,
        "resolutions": model.resolutions,
        "predictor_size": model.predictor_size,
        "validation_crop": loaded.validation_crop,
        "mean": loaded.mean,
        "std": loaded.std,
        "backbone_gflops": costs.backbone_gflops,
        "predictor_gflops": costs.predictor_gflops if routed else 0.0,
    }
    (folder / META_FILE).write_text(json.dumps(meta, indent=1))


def _export(program: _FromPixels, side: int, path: Path) -> None:
    # A batch of one would be taken for a constant, and weights in channels_last are not written whole.
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    program.to(memory_format=torch.contiguous_format)  # ty: ignore[no-matching-overload]  # torch's stubs lack it
    with torch.no_grad():
        exported = torch.export.export(
            program.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
    exported.example_inputs = None  # would be stored as a pickle
    torch.export.save(exported, path)
