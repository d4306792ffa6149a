"""Tests of collecting, merging and storing the logits of every validation image."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config.schema import ModelConfig
from pipeline.evaluation.predictions import DIRECTIONS, Predictions, collect_predictions, merge, shifted
from pipeline.models.drnet import DRNet, build_drnet

NUM_CLASSES = 5


@pytest.fixture(scope="module")
def model() -> DRNet:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="small_resnet",
        backbone_width=0.25,
        resolutions=(48, 32),
        predictor={"architecture": 3, "input_size": 32, "width": 0.125},
    )
    return build_drnet(config, NUM_CLASSES, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def batches_of(model: DRNet, sizes: list[int], seed: int = 0) -> list[SimpleNamespace]:
    generator = torch.Generator().manual_seed(seed)
    found, start = [], 0
    for size in sizes:
        images = {
            side: torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=generator)
            for side in model.sides
        }
        labels = torch.randint(0, NUM_CLASSES, (size,), generator=generator)
        found.append(SimpleNamespace(images=images, labels=labels, indices=torch.arange(start, start + size)))
        start += size
    return found


def random_predictions(indices: list[int], R: int = 2, K: int = 3) -> Predictions:
    """Return predictions whose values depend on the index, so that a part can be recognized after a merge."""
    logits = np.array([np.random.default_rng(abs(index)).normal(size=(R, K)) for index in indices], np.float32)
    predictor = np.array([np.random.default_rng(1000 + index).normal(size=R) for index in indices], np.float32)
    return Predictions(
        tuple(range(32 * R, 0, -32)),
        np.array([index % K for index in indices]),
        np.array(indices),
        logits.reshape(-1, R, K),
        predictor.reshape(-1, R),
        extents_N=np.array(indices) + 0.5,
    )


def assert_equal(first: Predictions, second: Predictions) -> None:
    assert first.resolutions == second.resolutions
    for name in ("labels_N", "indices_N", "logits_NRK", "predictor_logits_NR", "shifted_classes_NV", "extents_N"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
        assert getattr(first, name).dtype == getattr(second, name).dtype


def test_collect_runs_every_image_at_every_resolution_and_through_the_predictor(model):
    batches = batches_of(model, [3, 2])
    found = collect_predictions(model, batches)
    model.eval()
    with torch.no_grad():
        for index in range(2):
            expected = torch.cat([model.static_logits(batch.images, index) for batch in batches])
            np.testing.assert_array_equal(found.logits_NRK[:, index], expected.numpy())
        expected = torch.cat([model.predictor_logits(batch.images) for batch in batches])
    np.testing.assert_array_equal(found.predictor_logits_NR, expected.numpy())
    np.testing.assert_array_equal(found.labels_N, torch.cat([batch.labels for batch in batches]).numpy())
    assert found.indices_N.tolist() == [0, 1, 2, 3, 4]


def test_the_looks_of_a_placebo_are_answers_for_shifted_crops_at_the_largest_resolution(model):
    batches = batches_of(model, [3, 2])
    side = max(model.resolutions)
    found = collect_predictions(model, batches, placebo=True)
    assert found.shifted_classes_NV.shape == (5, len(model.resolutions) - 1)
    model.eval()
    with torch.inference_mode():
        moved = [shifted(batch.images[side], *DIRECTIONS[0]) for batch in batches]
        expected = [model.static_logits({side: pixels}, model.resolutions.index(side)) for pixels in moved]
    assert found.shifted_classes_NV[:, 0].tolist() == torch.cat(expected).argmax(dim=1).tolist()
    (plain,) = {collect_predictions(model, batches).shifted_classes_NV.shape}
    assert plain == (5, 0)


def test_a_shifted_crop_repeats_its_edge():
    pixels = torch.arange(4, dtype=torch.uint8).view(1, 1, 4, 1).expand(1, 4, 4, 3)
    right, left = shifted(pixels, 0, 1), shifted(pixels, 0, -1)
    assert right[0, 0, :, 0].tolist() == [0, 0, 1, 2]
    assert left[0, 0, :, 0].tolist() == [1, 2, 3, 3]
    assert torch.equal(shifted(pixels.transpose(1, 2), 1, 0), right.transpose(1, 2))


def test_a_file_of_an_earlier_version_has_no_shifted_crops_and_no_extents(tmp_path):
    predictions = random_predictions([0, 1, 2])
    predictions.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as file:
        added = {"shifted_classes_NV", "extents_N"}
        np.savez(tmp_path / "old.npz", **{name: file[name] for name in file if name not in added})
    found = Predictions.load(tmp_path / "old.npz")
    assert_equal(found, replace(predictions, extents_N=np.full(3, np.inf)))
    assert found.shifted_correct_NV.shape == (3, 0)


def test_collect_skips_empty_batches(model):
    assert_equal(
        collect_predictions(model, batches_of(model, [0, 3, 0, 2])),
        collect_predictions(model, batches_of(model, [3, 2])),
    )


def test_collect_restores_every_training_flag_and_changes_no_buffer(model):
    model.train()
    model.backbone.eval()
    flags = [layer.training for layer in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect_predictions(model, batches_of(model, [4]))
    assert [layer.training for layer in model.modules()] == flags
    assert len(set(flags)) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_collect_restores_the_training_flags_after_an_error(model):
    model.train()

    def failing():
        yield from batches_of(model, [2])
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        collect_predictions(model, failing())
    assert all(layer.training for layer in model.modules())


def test_collect_does_not_keep_the_loaders_memory(model):
    labels, indices = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)

    def reusing():
        for position, batch in enumerate(batches_of(model, [2, 2])):
            labels.copy_(batch.labels)
            indices.fill_(position)
            yield SimpleNamespace(images=batch.images, labels=labels, indices=indices)

    assert collect_predictions(model, reusing()).indices_N.tolist() == [0, 0, 1, 1]


def test_a_rank_without_images_merges_with_the_others(model):
    empty, full = collect_predictions(model, []), collect_predictions(model, batches_of(model, [3]))
    assert (empty.num_images, empty.chosen_N.shape, empty.correct_NR.shape) == (0, (0,), (0, 2))
    assert_equal(merge([empty, full, empty]), full)
    with pytest.raises(ValueError, match="every part is empty"):
        merge([empty])


def test_merge_sorts_by_index():
    merged = merge([random_predictions([4, 0, 2]), random_predictions([3, 1])], num_images=5)
    assert_equal(merged, random_predictions([0, 1, 2, 3, 4]))


@pytest.mark.parametrize(
    ("parts", "num_images", "message"),
    [
        ([[0, 1], [1, 2]], None, "1 of 3 images are predicted more than once, the first: 1"),
        ([[0, 1], [3]], None, "1 of 4 images are missing, the first: 2"),
        ([[0, 1]], 4, "2 of 4 images are missing, the first: 2, 3"),
        ([[0, 1, 2]], 2, "contain image 2, but the validation set has indices 0 to 1"),
        ([[-1, 0]], None, "contain image -1"),
    ],
)
def test_merge_rejects_missing_repeated_and_unknown_images(parts, num_images, message):
    with pytest.raises(ValueError, match=message):
        merge([random_predictions(indices) for indices in parts], num_images)


def test_merge_rejects_different_models():
    with pytest.raises(ValueError, match=r"different models.*\[64, 32\] px with 3 classes.*\[96, 64, 32\] px"):
        merge([random_predictions([0]), random_predictions([1], R=3)])
    with pytest.raises(ValueError, match=r"with 3 classes.*with 4 classes"):
        merge([random_predictions([0]), random_predictions([1], K=4)])


def test_save_and_load_round_trip(tmp_path):
    path = tmp_path / "predictions.npz"
    written = random_predictions([0, 1, 2])
    written.save(path)
    assert_equal(Predictions.load(path), written)
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.npz"]


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "pickle", "other arrays", "other format"])
def test_load_names_the_damaged_file(tmp_path, damage):
    path = tmp_path / "predictions.npz"
    random_predictions(list(range(50))).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "text":
        path.write_text("not predictions")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        np.savez(path, format=np.array([{}], dtype=object))
    elif damage == "other arrays":
        np.savez(path, format=1, other=np.zeros(3))
    else:
        np.savez(path, format=99)
    with pytest.raises(ValueError, match=r"predictions\.npz is not a predictions file"):
        Predictions.load(path)


def test_load_of_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Predictions.load(tmp_path / "none.npz")


def test_choice_and_correctness_follow_the_argmax():
    found = Predictions(
        (64, 32),
        np.array([1, 0]),
        np.array([0, 1]),
        np.array([[[0, 1], [1, 0]], [[2, 1], [5, 3]]], np.float32),
        np.array([[0, 1], [3, -2]], np.float32),
    )
    assert found.classes_NR.tolist() == [[1, 0], [0, 0]]
    assert found.correct_NR.tolist() == [[True, False], [True, True]]
    assert found.chosen_N.tolist() == [1, 0]


def arrays() -> dict[str, np.ndarray]:
    return {
        "labels_N": np.zeros(4, np.int64),
        "indices_N": np.arange(10, 14),
        "logits_NRK": np.zeros((4, 2, 3), np.float32),
        "predictor_logits_NR": np.zeros((4, 2), np.float32),
    }


@pytest.mark.parametrize("name", ["logits_NRK", "predictor_logits_NR"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_rejected_with_the_image(name, value):
    given = arrays()
    given[name][2, 1] = value
    with pytest.raises(ValueError, match=f"{name} is NaN or infinite for 1 images, the first at index 12"):
        Predictions((64, 32), **given)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes_are_rejected(label):
    given = arrays()
    given["labels_N"][1] = label
    with pytest.raises(ValueError, match="expected 0 to 2"):
        Predictions((64, 32), **given)


def test_all_wrong_shapes_and_dtypes_are_named():
    given = arrays()
    given["indices_N"] = given["indices_N"][:3]
    given["predictor_logits_NR"] = given["predictor_logits_NR"].astype(np.float64)
    with pytest.raises(ValueError, match=r"indices_N is int64 \(3,\), expected int64 \(4,\); predictor_logits_NR is"):
        Predictions((64, 32), **given)
    with pytest.raises(ValueError, match=r"logits_NRK is float32 \(4, 2, 3\), expected float32 \(4, 3, 3\)"):
        Predictions((96, 64, 32), **arrays())
    with pytest.raises(ValueError, match=r"expected \(N, R, K\)"):
        Predictions((64, 32), **arrays() | {"logits_NRK": np.zeros((4, 2), np.float32)})
