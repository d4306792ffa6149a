from __future__ import annotations

import ast
import io
import json
import sys
import zipfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from datasets.loader import CenterCrop, MultiResolutionLoader
from pipeline.models.drnet import DRNet
from pipeline.tracking import serving
from pipeline.tracking.export import export_model
from pipeline.training.checkpoint import load_model, save_model
from tests.betons import jpeg_bytes, photograph, write_images
from tests.unit.pictures import jpeg, png_bomb, smooth_rgb
from tests.unit.tracking_fixtures import make_config, make_model, random_crops, routed_logits


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> DRNet:
    return make_model(make_config(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def programs(model, tmp_path_factory) -> Path:
    return exported(model, make_config(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def network(programs) -> serving.RoutedNetwork:
    return serving.RoutedNetwork(programs)


@pytest.fixture
def classifier(network) -> serving.RoutedClassifier:
    classifier = serving.RoutedClassifier()
    classifier.network = network
    return classifier


def exported(model: DRNet, config, folder: Path) -> Path:
    about = {"classes": list("abcde"), "mean": (0.5, 0.4, 0.6), "std": (0.25, 0.2, 0.3)}
    save_model(folder / "model.pt", model, config, **about)
    export_model(load_model(folder / "model.pt"), folder)
    return folder


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_file_imports_nothing_of_this_project():
    tree = ast.parse(Path(serving.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    third_party = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    assert third_party == {"mlflow", "numpy", "pandas", "torch", "PIL"}


@pytest.mark.parametrize("count", [1, 2, 3, 41])
def test_predictions_are_those_of_the_trained_model(model, network, count):
    crops = random_crops(model, count)
    logits_NK, choice_N = routed_logits(model, crops)
    routed = network.classify(crops)
    assert torch.equal(routed.choice_N, choice_N)
    assert torch.equal(routed.logits_NK.argmax(dim=1), logits_NK.argmax(dim=1))
    torch.testing.assert_close(routed.logits_NK, logits_NK, rtol=1e-4, atol=1e-4)
    if count == 41:
        assert set(choice_N.tolist()) == {0, 1}, "the images must be routed differently, or this shows nothing"


def test_each_resolution_has_its_own_batch_norm(model, network):
    crops = random_crops(model, 8)
    with torch.inference_mode():
        wrong = model.backbone(model.normalize(crops[model.resolutions[0]]), 1)
        right = network._backbones[0](crops[model.resolutions[0]])
    assert not torch.allclose(wrong, right, atol=1e-2)


def test_one_resolution_needs_no_predictor(tmp_path):
    config = make_config(tmp_path, model={"resolutions": [32]}, stages={"predictor": None, "joint": None})
    model = make_model(config)
    folder = exported(model, config, tmp_path)
    assert not (folder / serving.PREDICTOR_FILE).exists()
    network = serving.RoutedNetwork(folder)
    crops = random_crops(model, 6)
    with torch.inference_mode():
        expected = model.static_logits(crops, 0)
    torch.testing.assert_close(network.classify({32: crops[32]}).logits_NK, expected, rtol=1e-4, atol=1e-4)
    assert network.gflops == tuple(json.loads((folder / serving.META_FILE).read_text())["backbone_gflops"])


def test_the_programs_hold_no_pickle(programs):
    for path in programs.glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            contents = {member.filename: archive.read(member) for member in archive.infolist()}
        assert not [name for name, content in contents.items() if name.endswith((".pt", ".pkl")) and content]
        assert b'"use_pickle": true' not in b"".join(contents.values())


@pytest.mark.parametrize("kind", ["sample inputs", "weight", "custom object"])
def test_a_program_with_a_pickle_in_it_is_refused(programs, tmp_path, kind):
    altered = tmp_path / serving.PREDICTOR_FILE
    with zipfile.ZipFile(programs / serving.PREDICTOR_FILE) as source, zipfile.ZipFile(altered, "w") as target:
        for member in source.infolist():
            content = source.read(member)
            if kind == "sample inputs" and member.filename.endswith("sample_inputs/model.pt"):
                content = b"a pickle"
            if kind == "weight" and member.filename.endswith("weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
            target.writestr(member.filename, content)
        if kind == "custom object":
            target.writestr("predictor/data/constants/custom_obj_0", b"a pickle")
    with pytest.raises(ValueError, match="pickled"):
        serving.load_program(altered)


def test_the_crops_are_the_loaders(tmp_path):
    images = [photograph(120, 90, seed=1), photograph(333, 500, seed=2), photograph(64, 64, seed=3)]
    sides, fraction = (64, 48, 32), 0.875
    beton = write_images(tmp_path / "validation.beton", images)
    with closing(MultiResolutionLoader(beton, sides, 3, crop=CenterCrop(fraction), shuffle=False)) as loader:
        (loaded,) = [{side: batch.images[side].clone() for side in sides} for batch in loader.epoch(0)]
    for index, image in enumerate(images):
        crops = serving.centre_crops(serving.decode(jpeg_bytes(image)), sides, fraction)
        for side in sides:
            assert crops[side].shape == (side, side, 3)
            # A large JPEG is decoded at a fraction of its size by the loader, the others as here.
            limit = 2.5 if index == 1 else 0.5
            assert np.abs(crops[side].astype(int) - loaded[side][index].numpy()).mean() < limit, (index, side)


def test_odd_kinds_of_files_become_upright_rgb():
    rgb = Image.fromarray(smooth_rgb(40, 20))
    pixels = np.asarray(rgb).astype(int)
    grey = Image.fromarray(np.linspace(0, 255, 800).astype(np.uint8).reshape(20, 40))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    assert np.array_equal(serving.decode(encoded(rgb)), pixels)
    assert np.array_equal(serving.decode(encoded(grey)), np.stack([grey] * 3, axis=2))
    assert np.array_equal(serving.decode(encoded(deep)), np.stack([grey] * 3, axis=2))
    assert np.abs(np.asarray(serving.decode(encoded(rgb.convert("CMYK"), "JPEG", quality=95))) - pixels).mean() < 8
    turned = serving.decode(encoded(rgb, "JPEG", quality=95, exif=exif))
    assert np.abs(np.asarray(turned).astype(int) - np.rot90(pixels, -1)).mean() < 8
    clear = Image.merge("RGBA", (*rgb.split(), Image.new("L", rgb.size, 0)))
    assert np.asarray(serving.decode(encoded(clear))).min() == 255
    palette = rgb.quantize(16)
    palette.info["transparency"] = 0
    assert serving.decode(encoded(palette)).mode == "RGB"


BAD = {
    "empty": (b"", "empty"),
    "text": (b"hello", "not a JPEG or PNG file"),
    "truncated": (jpeg(64, 64)[:500], "."),
    "a gif": (encoded(Image.fromarray(smooth_rgb()), "GIF"), "not a JPEG or PNG file"),
    "bomb": (png_bomb(), "pixels"),
    "no bytes": ("text", "given as str"),
    "nothing": (None, "given as NoneType"),
}


@pytest.mark.parametrize(("file", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_bytes_have_a_reason(file, reason):
    with pytest.raises(serving.BadImageError, match=reason):
        serving.decode(file)


def test_bad_images_do_not_fail_the_others(classifier):
    good = [jpeg(60, 50, seed=seed) for seed in range(3)]
    bad = [file for file, _ in BAD.values()]
    mixed = [good[0], *bad, good[1], bad[1], good[2]]
    rows = classifier.predict(None, pd.DataFrame({"image": mixed}))
    alone = classifier.predict(None, pd.DataFrame({"image": good}))
    sound = rows["error"].isna()
    assert sound.tolist() == [file in good for file in mixed]
    pd.testing.assert_frame_equal(rows[sound].reset_index(drop=True), alone, check_exact=False, rtol=1e-4)
    assert rows[~sound].drop(columns=["error", "gflops"]).isna().all(axis=None)
    assert (rows["gflops"][~sound] == 0).all()


def test_rows_say_what_was_found_and_what_it_cost(classifier, model, programs):
    files = [jpeg(60, 50, seed=seed) for seed in range(12)]
    rows = classifier.predict(None, pd.DataFrame({"image": files}))
    meta = json.loads((programs / serving.META_FILE).read_text())
    for row, file in zip(rows.to_dict("records"), files, strict=True):
        crops = serving.centre_crops(serving.decode(file), model.sides, 0.875)
        logits_NK, choice_N = routed_logits(model, {side: torch.tensor(crop)[None] for side, crop in crops.items()})
        index, choice = int(logits_NK.argmax()), int(choice_N)
        assert (row["class_index"], row["label"]) == (index, "abcde"[index])
        assert row["probability"] == pytest.approx(float(logits_NK.softmax(dim=1).max()), rel=1e-4)
        assert row["resolution"] == model.resolutions[choice]
        assert row["gflops"] == pytest.approx(meta["backbone_gflops"][choice] + meta["predictor_gflops"])


@pytest.mark.parametrize("count", [0, serving.IMAGES_AT_ONCE, serving.IMAGES_AT_ONCE + 1])
def test_any_number_of_images_keeps_its_order(classifier, count):
    files = [jpeg(40, 30, seed=seed) for seed in range(count)]
    rows = classifier.predict(None, pd.DataFrame({"image": pd.Series(files, dtype=object)}))
    assert len(rows) == count
    assert list(rows.columns) == list(serving.OUTPUT_COLUMNS)
    if count:
        backwards = classifier.predict(None, pd.DataFrame({"image": files[::-1]}))
        assert rows["class_index"].tolist() == backwards["class_index"].tolist()[::-1]


def test_the_context_names_the_programs(programs):
    classifier = serving.RoutedClassifier()
    classifier.load_context(SimpleNamespace(artifacts={serving.FOLDER_ARTIFACT: str(programs)}))
    assert classifier.network.classes == tuple("abcde")
