"""Compare the registered model with the trained one, over a finished run's whole validation set.

    python -m benchmarks.agreement --run runs/glyphs --data data/glyphs

Both run the policy that the run's budget chose: once on the same crops as evaluation in training, for which all answers
must be equal, and once from the JPEG bytes, which Pillow decodes instead of the loader's kernels.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.runs import images_of
from datasets.beton import VALIDATION, beton_path, read_jpeg
from datasets.loading.loader import CenterCrop, MultiResolutionLoader
from pipeline.config.run_folder import RunFolder
from pipeline.evaluation.predictions import Predictions
from pipeline.models.cost import measure_costs
from pipeline.policies.route import route
from pipeline.serving.export import export_model, fitted_policies
from pipeline.serving.runtime import Classifier, RoutedNetwork
from pipeline.training.checkpoint import LoadedModel, load_model

BATCH = 64
Answers = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The class and the index of the resolution of each image, int64 (N,) each."""


def agreement(run: Path, data: Path) -> list[str]:
    """Return lines that say how many of the registered model's answers equal those in the run's predictions.npz."""
    files = RunFolder(run)
    loaded, predictions = load_model(files.model), Predictions.load(files.predictions)
    beton, policies = beton_path(data, VALIDATION), fitted_policies(json.loads(files.report_json.read_text()))
    with TemporaryDirectory(prefix="agreement-") as folder:
        export_model(loaded, Path(folder), policies)
        network = RoutedNetwork(Path(folder))
        chosen_N = route(network.default_policy, images_of(predictions, measure_costs(loaded.model))).last_N
        trained = predictions.classes_NR[np.arange(len(chosen_N)), chosen_N], chosen_N
        from_crops = _from_crops(network, loaded, beton, predictions)
        from_bytes = _from_bytes(network, [read_jpeg(beton, int(index)) for index in predictions.indices_N])
    return [
        _line("the same crops", trained, from_crops, predictions.labels_N),
        _line("JPEG bytes", trained, from_bytes, predictions.labels_N),
    ]


def _from_crops(network: RoutedNetwork, loaded: LoadedModel, beton: Path, predictions: Predictions) -> Answers:
    indices_N, extents_N = predictions.indices_N, torch.empty(predictions.num_images, dtype=torch.float64)
    extents_N[indices_N] = torch.from_numpy(predictions.extents_N)
    classes, choices = np.full(len(indices_N), -1), np.full(len(indices_N), -1)
    crop = CenterCrop(loaded.validation_crop)
    with closing(MultiResolutionLoader(beton, loaded.model.sides, BATCH, crop=crop, shuffle=False)) as loader:
        for batch in loader.epoch(0):
            rows = np.asarray(batch.indices)
            crops = {side: torch.as_tensor(images) for side, images in batch.images.items()}
            found = network.classify(crops, extents_N=extents_N[rows])
            classes[rows], choices[rows] = found.logits_NK.argmax(dim=1).numpy(), found.choice_N.numpy()
    return classes[indices_N], choices[indices_N]


def _from_bytes(network: RoutedNetwork, files: list[bytes]) -> Answers:
    with closing(Classifier(network)) as classifier:
        answers = list(classifier.classify(files))
    classes = [-1 if answer.class_index is None else answer.class_index for answer in answers]
    choices = [-1 if answer.resolution is None else network.resolutions.index(answer.resolution) for answer in answers]
    return np.array(classes), np.array(choices)


def _line(what: str, trained: Answers, found: Answers, labels_N: NDArray[np.int64]) -> str:
    same_class, same_choice = (one == other for one, other in zip(trained, found, strict=True))
    return (
        f"from {what}, {len(labels_N):,} images: {same_class.mean():.2%} the same class, {same_choice.mean():.2%} the "
        f"same resolution; top-1 {(found[0] == labels_N).mean():.2%}, trained {(trained[0] == labels_N).mean():.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="a finished run")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="its prepared data")
    args = parser.parse_args()
    print("\n".join(agreement(args.run, args.data)))


if __name__ == "__main__":
    main()
