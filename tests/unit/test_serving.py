from __future__ import annotations

import ast
import asyncio
import copy
import json
import os
import shutil
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from torch import nn

from pipeline.models.backbone import build_backbone
from pipeline.models.cost import measure_costs
from pipeline.models.drnet import DRNet
from pipeline.models.norms import fold_batch_norms
from pipeline.policies.route import Images, route
from pipeline.serving import pyfunc, runtime
from pipeline.serving.export import export_model, fitted_policies
from pipeline.serving.package import code_files, write_code
from pipeline.serving.runtime import Placement, RoutedNetwork
from pipeline.serving.runtime.classifier import IMAGES_AT_ONCE, Classifier, program_queue
from pipeline.serving.runtime.policy import NEVER, Policy
from pipeline.serving.runtime.programs import META_FILE, PREDICTOR_FILE, load_program, split
from pipeline.training.checkpoint import load_model, save_model
from tests.unit.pictures import encoded, jpeg
from tests.unit.test_runtime_images import BAD, center_crops
from tests.unit.tracking_fixtures import POLICIES, make_config, make_model, random_crops, routed_logits


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> DRNet:
    return make_model(make_config(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def programs(model, tmp_path_factory) -> Path:
    folder = exported(model, make_config(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("programs"))
    write_code(folder)
    return folder


@pytest.fixture(scope="module")
def network(programs) -> RoutedNetwork:
    return RoutedNetwork(programs)


@pytest.fixture(scope="module")
def served(programs):
    model = pyfunc.RoutedClassifier()
    model.load_context(SimpleNamespace(artifacts={pyfunc.FOLDER_ARTIFACT: str(programs)}, model_config={}))
    yield model
    model.classifier.close()


def exported(model: DRNet, config, folder: Path) -> Path:
    save_model(folder / "model.pt", model, config, classes=list("abcde"))
    export_model(load_model(folder / "model.pt"), folder)
    return folder


def frame(images: list) -> pd.DataFrame:
    return pd.DataFrame({"image": pd.Series(images, dtype=object)})


def test_the_stored_files_import_nothing_of_this_project():
    third_party = set()
    for file in code_files():
        tree = ast.parse(file.read_text())
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        own = {path.stem for path in code_files()}
        assert {str(node.module) for node in imports if node.level} <= own
        modules |= {str(node.module) for node in imports if not node.level}
        third_party |= {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    assert third_party == {"mlflow", "numpy", "pandas", "torch", "PIL"}


@pytest.mark.parametrize("name", ["resnet18", "timm/test_efficientnet", "densenet121"])
def test_a_folded_program_equals_the_network(name):
    """In densenet most batch norms come before a convolution; in timm's networks some hold an activation."""
    torch.manual_seed(1)
    network = randomized(build_backbone(name, 7, 1).eval()).at(0)
    before = copy.deepcopy(network.state_dict())
    images = torch.randn(3, 3, 64, 64)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    num_folded = fold_batch_norms(program)
    left = [node for node in program.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    assert len(left) == len(norms) - num_folded
    assert num_folded > 10
    assert bool(left) == (name == "densenet121")
    with torch.inference_mode():
        expected, answer = network(images), program.module()(images)
    scale = expected.abs().max().item()
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4 * scale)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


class Mixed(nn.Module):
    """A batch norm after each kind of convolution that cannot take it in, and after one that can."""

    def __init__(self):
        super().__init__()
        self.shared, self.twice, self.plain = (nn.Conv2d(3, 3, 3, padding="same", bias=False) for _ in range(3))
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(4)])

    def forward(self, images):
        features = self.norms[0](self.shared(images)) + self.norms[1](self.shared(images + 1))
        convolved = self.twice(features)
        return self.norms[3](self.plain(self.norms[2](convolved) + convolved))


def test_only_a_convolution_that_nothing_else_uses_is_folded():
    torch.manual_seed(1)
    network, images = randomized(Mixed().eval()), torch.randn(2, 3, 8, 8)
    program = torch.export.export(network, (images,))
    assert fold_batch_norms(program) == 1
    torch.testing.assert_close(program.module()(images), network(images), rtol=1e-4, atol=1e-4)


def randomized(network):
    """Give every batch norm values that are not its first ones."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            for values in (layer.weight, layer.bias, layer.running_var):
                nn.init.uniform_(values, 0.7, 1.3)
    return network


@pytest.mark.parametrize("count", [1, 2, 3, 41])
def test_predictions_are_those_of_the_trained_model(model, network, count):
    crops = random_crops(model, count)
    logits_NK, choice_N = routed_logits(model, crops)
    routed = network.classify(crops)
    assert torch.equal(routed.choice_N, choice_N)
    assert torch.equal(routed.logits_NK.argmax(dim=1), logits_NK.argmax(dim=1))
    torch.testing.assert_close(routed.logits_NK, logits_NK, rtol=1e-4, atol=1e-4)
    if count == 41:
        assert set(choice_N.tolist()) == {0, 1}, "the images must use both resolutions, or this test shows nothing"


def test_each_resolution_has_its_own_batch_norm(model, network):
    crops = random_crops(model, 8)
    with torch.inference_mode():
        wrong = model.backbone(model.normalize(crops[model.resolutions[0]]), 1)
        right = network.logits(0, crops[model.resolutions[0]])
    assert not torch.allclose(wrong, right, atol=1e-2)


def test_one_resolution_needs_no_predictor(tmp_path):
    config = make_config(tmp_path, model={"resolutions": [32]}, stages={"predictor": None, "joint": None})
    model = make_model(config)
    folder = exported(model, config, tmp_path)
    assert not (folder / PREDICTOR_FILE).exists()
    network = RoutedNetwork(folder)
    crops = random_crops(model, 6)
    with torch.inference_mode():
        expected = model.static_logits(crops, 0)
    torch.testing.assert_close(network.classify({32: crops[32]}).logits_NK, expected, rtol=1e-4, atol=1e-4)
    assert (
        network.cost(network.default_policy, [0]) == json.loads((folder / META_FILE).read_text())["backbone_gflops"][0]
    )


def test_the_programs_hold_no_pickle(programs):
    for path in programs.glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            contents = {member.filename: archive.read(member) for member in archive.infolist()}
        assert not [name for name, content in contents.items() if name.endswith((".pt", ".pkl")) and content]
        assert b'"use_pickle": true' not in b"".join(contents.values())


@pytest.mark.parametrize("kind", ["sample inputs", "weight", "custom object"])
def test_a_program_with_a_pickle_in_it_is_refused(programs, tmp_path, kind):
    altered = tmp_path / PREDICTOR_FILE
    with zipfile.ZipFile(programs / PREDICTOR_FILE) as source, zipfile.ZipFile(altered, "w") as target:
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
        load_program(altered)


def test_a_budget_bias_moves_images_to_other_costs(model, network):
    logits_NR = network.predictor_logits(random_crops(model, 41)[model.predictor_size])

    def choose(bias: float) -> torch.Tensor:
        return network.first_resolution(network.predictor_policy(bias), logits_NR, 41)

    assert torch.equal(choose(0.0), logits_NR.argmax(dim=1))
    at_bias = [choose(bias) for bias in (-1e6, -0.05, 0, 0.05, 1e6)]
    assert set(at_bias[0].tolist()) == {1}, "the last resolution is the cheapest"
    assert set(at_bias[-1].tolist()) == {0}
    shares = [(choice_N == 0).float().mean().item() for choice_N in at_bias]
    assert shares == sorted(shares)
    gap = logits_NR[:, 1].double() - logits_NR[:, 0]
    assert torch.equal(choose(0.05) == 0, gap < 0.05)


@pytest.fixture(scope="module")
def with_policies(model, programs, tmp_path_factory):
    """The network's folder as it is registered with fitted policies."""
    folder = tmp_path_factory.mktemp("policies") / "programs"
    shutil.copytree(programs, folder)
    meta = json.loads((folder / META_FILE).read_text()) | fitted_policies({"policies": POLICIES, "budget_curve": [{}]})
    (folder / META_FILE).write_text(json.dumps(meta))
    return RoutedNetwork(folder)


def test_a_cascade_gives_the_answers_that_evaluation_states(model, with_policies):
    crops, network = random_crops(model, 41), with_policies
    with torch.inference_mode():
        logits_NRK = torch.stack([model.static_logits(crops, j) for j in range(2)], dim=1).numpy()
    sure_N = Images.of(logits_NRK, np.zeros(41, int), None, measure_costs(model)).confidence_NR[:, 1]
    policy = Policy((1, 0), (float(np.median(sure_N)) + 1e-6,))
    images = Images.of(logits_NRK, np.zeros(41, int), None, measure_costs(model))
    expected, found = route(policy, images), network.classify(crops, policy)
    assert found.ran_NR.numpy().tolist() == expected.ran_NR.tolist()
    assert found.choice_N.tolist() == expected.last_N.tolist()
    assert {1, 0} == set(found.choice_N.tolist())
    last_NK = logits_NRK[np.arange(41), expected.last_N]
    torch.testing.assert_close(found.logits_NK.numpy(), last_NK, rtol=1e-4, atol=1e-4)
    classifier = runtime.Classifier(network)
    whole = [crops[model.sides[0]][n].numpy() for n in range(41)]
    answers = list(classifier.classify(whole, policy))
    classifier.close()
    gflops_N = expected.gflops_N(measure_costs(model))
    for n, answer in enumerate(answers):
        ran = [int(side) for side in answer.resolutions.split(",")]
        assert ran in ([32], [32, 48])
        assert answer.resolution == ran[-1]
        assert answer.error is None
        if ran == ([32, 48] if expected.ran_NR[n, 0] else [32]):  # resized crops may differ at the threshold
            assert answer.gflops == pytest.approx(gflops_N[n])


def test_an_image_without_more_pixels_stops(model, with_policies):
    network, policy = with_policies, Policy((1, 0), (NEVER,), stops_exhausted=True)
    classifier = runtime.Classifier(network)
    shorter = [int(side / network.crop_fraction) for side in (20, 32, 48, 96)]
    files = [jpeg(side + 9, side) for side in shorter] + [random_crops(model, 1)[side][0].numpy() for side in (32, 48)]
    expected = ["32", "32", "32,48", "32,48", "32", "32,48"]
    assert [answer.resolutions for answer in classifier.classify(files, policy)] == expected
    assert {answer.resolutions for answer in classifier.classify(files, Policy((1, 0), (NEVER,)))} == {"32,48"}
    classifier.close()
    extents_N = torch.tensor([20.0, 32.0, 33.0, 48.0])
    found = network.classify(random_crops(model, 4), policy, extents_N)
    assert found.choice_N.tolist() == [1, 1, 0, 0]
    assert network.classify(random_crops(model, 4), policy).choice_N.tolist() == [0, 0, 0, 0]


def test_a_policy_has_a_name(with_policies):
    network = with_policies
    assert network.named_policy("registered") == network.default_policy
    assert network.named_policy("predictor") == Policy((1, 0), (0.0,), 0.0)
    assert [network.named_policy(str(side)) for side in network.resolutions] == [Policy((0,)), Policy((1,))]
    with pytest.raises(ValueError, match="policy is '40'; give one of registered, predictor, 48, 32"):
        network.named_policy("40")


def test_a_predictor_that_was_not_trained_is_never_used(with_policies, programs, tmp_path):
    shutil.copytree(programs, tmp_path / "programs")
    meta = json.loads((programs / META_FILE).read_text())
    meta |= fitted_policies({"policies": POLICIES, "budget_curve": []})
    meta["policy"] = {"members": [1, 0], "thresholds": [0.5]}
    (tmp_path / "programs" / META_FILE).write_text(json.dumps(meta))
    network = RoutedNetwork(tmp_path / "programs")
    assert network.default_policy == Policy((1, 0), (0.5,))
    with pytest.raises(ValueError, match="predictor was not trained; omit budget_bias"):
        network.policy_for(budget_bias=0.5)
    with pytest.raises(ValueError, match="policy is 'predictor'; give one of registered, 48, 32"):
        network.named_policy("predictor")


def test_a_network_runs_the_programs_that_it_is_given(programs, network, model):
    part = RoutedNetwork(programs, files=[network.backbone_file(1)])
    crops = random_crops(model, 3)[model.resolutions[1]]
    assert torch.equal(part.logits(1, crops), network.logits(1, crops))
    with pytest.raises(KeyError, match="backbone_48"):
        part.logits(0, random_crops(model, 3)[48])


def test_a_request_names_a_budget(with_policies):
    network = with_policies
    assert network.default_policy == Policy((1, 0), (0.0,), 0.0)
    assert network.policy_for(budget_gflops=0.025) == Policy((1, 0), (0.5,))
    assert network.policy_for(budget_gflops=1.0) == Policy((0,))
    assert network.policy_for(max_accuracy_drop=0.0) == Policy((0,))
    assert network.policy_for(max_accuracy_drop=100.0) == Policy((1,))
    assert network.policy_for(budget_bias=0.5).start_bias == 0.5
    for wish, message in (
        ({"budget_gflops": 0.001}, r"give at least 0\.01, the cheapest policy"),
        ({"max_accuracy_drop": -2.0}, "give points, 0 or more"),
        ({"budget_gflops": 1.0, "budget_bias": 0.1}, "not several"),
    ):
        with pytest.raises(ValueError, match=message):
            network.policy_for(**wish)


def test_a_model_without_fitted_policies_follows_its_predictor(network):
    assert network.default_policy == network.predictor_policy()
    with pytest.raises(ValueError, match="no fitted policies; register its run again"):
        network.policy_for(budget_gflops=1.0)


def test_the_same_call_gives_the_same_bits(model, network):
    crops = random_crops(model, 41)
    first, second = network.classify(crops), network.classify(crops)
    assert torch.equal(first.logits_NK, second.logits_NK)


def test_bfloat16_is_close(model, programs, network):
    crops = random_crops(model, 41)
    rough = RoutedNetwork(programs, Placement(device="cpu", precision="bfloat16"))
    exact_NK, rough_NK = network.logits(0, crops[48]), rough.logits(0, crops[48])
    assert rough_NK.dtype == torch.float32
    assert not torch.equal(exact_NK, rough_NK)
    torch.testing.assert_close(rough_NK, exact_NK, rtol=0.05, atol=0.05 * exact_NK.abs().max().item())


@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # by imports of torch's compiler
def test_a_compiled_network_gives_the_same_logits(model, programs, network):
    crops = random_crops(model, 9)
    compiled = RoutedNetwork(programs, Placement(device="cpu", compiled=True)).classify(crops)
    torch.testing.assert_close(compiled.logits_NK, network.classify(crops).logits_NK, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("count", "side", "sizes"),
    [(1, 224, [1]), (16, 224, [16]), (21, 224, [11, 10]), (64, 112, [64]), (2, 1000, [1, 1])],
)
def test_a_cpu_runs_equal_parts_of_limited_size(count, side, sizes):
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(count, side, side, 3)
    assert [len(part) for part in split(images, torch.device("cpu"))] == sizes
    assert [len(part) for part in split(images, torch.device("cuda"))] == [count]


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"'half' is not one of float32, bfloat16"):
        Placement(precision="half")


def test_bad_images_do_not_fail_the_others(served):
    good = [jpeg(60, 50, seed=seed) for seed in range(3)]
    bad = [image for image, _ in BAD.values()]
    mixed = [good[0], *bad, good[1], bad[1], good[2]]
    rows = served.predict(None, frame(mixed))
    alone = served.predict(None, frame(good))
    sound = rows["error"].isna()
    assert sound.tolist() == [True, *(False for _ in bad), True, False, True]
    pd.testing.assert_frame_equal(rows[sound].reset_index(drop=True), alone, check_exact=False, rtol=1e-4)
    assert rows[~sound].drop(columns=["error", "gflops"]).isna().all(axis=None)
    assert (rows["gflops"][~sound] == 0).all()
    only_bad = served.predict(None, frame(bad))
    assert only_bad["error"].notna().all()


def test_rows_hold_the_answer_and_its_cost(served, model, programs):
    files = [jpeg(60, 50, seed=seed) for seed in range(12)]
    rows = served.predict(None, frame(files))
    meta = json.loads((programs / META_FILE).read_text())
    assert meta["relative_costs"] == [1, 0]
    for row, file in zip(rows.to_dict("records"), files, strict=True):
        crops = center_crops(file, model.sides, 0.875)
        logits_NK, choice_N = routed_logits(model, {side: torch.tensor(crop)[None] for side, crop in crops.items()})
        index, choice = int(logits_NK.argmax()), int(choice_N)
        assert (row["class_index"], row["label"]) == (index, "abcde"[index])
        assert row["probability"] == pytest.approx(float(logits_NK.softmax(dim=1).max()), rel=1e-4)
        assert row["resolution"] == model.resolutions[choice]
        assert row["gflops"] == pytest.approx(meta["backbone_gflops"][choice] + meta["predictor_gflops"])


def test_the_budget_bias_is_a_parameter_of_a_call(served):
    files = [jpeg(60, 50, seed=seed) for seed in range(6)]
    sides = [set(served.predict(None, frame(files), {"budget_bias": bias})["resolution"]) for bias in (-1e6, 1e6)]
    assert sides == [{32}, {48}]
    trained = served.predict(None, frame(files))
    for absent in (None, {}, {"budget_bias": None}, {"budget_bias": 0}):
        pd.testing.assert_frame_equal(served.predict(None, frame(files), absent), trained, check_exact=False)
    for bias in (float("nan"), float("inf"), "1", [1.0], 10**400):
        with pytest.raises(MlflowException, match=r"budget_bias is .*; give a finite number") as raised:
            served.predict(None, frame(files), {"budget_bias": bias})
        assert raised.value.get_http_status_code() == 400


def test_crops_are_used_unchanged(served, model):
    crops = random_crops(model, 9)[48].numpy()
    rows = served.predict(None, frame(list(crops)), {"budget_bias": 1e6})
    with torch.inference_mode():
        expected_NK = model.static_logits({48: torch.from_numpy(crops)}, 0)
    assert rows["class_index"].tolist() == expected_NK.argmax(dim=1).tolist()
    assert rows["probability"].to_numpy(float) == pytest.approx(expected_NK.softmax(dim=1).amax(dim=1), rel=1e-4)
    mixed = served.predict(None, frame([crops[0], encoded_png(crops[1])]))
    assert mixed["error"].isna().all()


def test_large_images_of_many_calls_are_decoded_one_per_thread_and_small_ones_do_not_wait(network):
    """A call with one image decodes it on the thread of the call."""
    classifier = Classifier(network, num_threads=1)
    large = encoded(Image.new("L", (2000, 1001)), "PNG")
    with ThreadPoolExecutor(1) as pool:
        with classifier._large:  # as while another call decodes a large image
            waiting = pool.submit(lambda: list(classifier.classify([large])))
            assert next(classifier.classify([jpeg(60, 50)])).error is None
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
        assert waiting.result()[0].error is None
    classifier.close()


def encoded_png(crop: np.ndarray) -> bytes:
    return encoded(Image.fromarray(crop), "PNG")


@pytest.mark.parametrize("count", [0, 1, IMAGES_AT_ONCE, IMAGES_AT_ONCE + 1, 3 * IMAGES_AT_ONCE])
def test_any_number_of_images_keeps_its_order(served, count):
    files = [jpeg(40, 30, seed=seed) for seed in range(count)]
    rows = served.predict(None, frame(files))
    assert len(rows) == count
    assert list(rows.columns) == list(pyfunc.OUTPUT_COLUMNS)
    backwards = served.predict(None, frame(files[::-1]))
    assert rows["class_index"].tolist() == backwards["class_index"].tolist()[::-1]


@pytest.mark.slow
def test_ten_thousand_images_in_a_call(served):
    files = [jpeg(40, 30, seed=seed) for seed in range(10)]
    bad = [b"", b"text"]
    rows = served.predict(None, frame((files + bad) * 834))
    assert len(rows) == 10_008
    assert rows["error"].isna().sum() == 8_340
    first = rows["class_index"][:10].tolist()
    assert all(rows["class_index"][start : start + 10].tolist() == first for start in range(0, 10_008, 12))


def test_the_next_images_are_decoded_while_a_program_runs(network, monkeypatch):
    """The first call of a program waits until all images of two groups are open."""
    opened = threading.Semaphore(0)

    class Counted(runtime.classifier.Picture):
        def __init__(self, *args):
            super().__init__(*args)
            opened.release()

    class Waiting:
        def __init__(self):
            self.queue, self.missing = program_queue(network), 2 * IMAGES_AT_ONCE

        def submit(self, program, images):
            while self.missing and opened.acquire(timeout=60):
                self.missing -= 1
            assert self.missing == 0
            return self.queue.submit(program, images)

        def close(self):
            self.queue.close()

    monkeypatch.setattr(runtime.classifier, "Picture", Counted)
    classifier = Classifier(network, programs=Waiting())
    answers = list(classifier.classify([jpeg(60, 50)] * 2 * IMAGES_AT_ONCE))
    classifier.close()
    assert [answer.error for answer in answers] == [None] * 2 * IMAGES_AT_ONCE


def test_the_server_has_threads_for_many_concurrent_requests(monkeypatch):
    monkeypatch.setattr(asyncio, "to_thread", asyncio.to_thread)  # to be restored
    together = threading.Barrier(pyfunc.REQUESTS_AT_ONCE)

    async def serve() -> None:
        await asyncio.gather(*(asyncio.to_thread(together.wait, 60) for _ in range(pyfunc.REQUESTS_AT_ONCE)))

    pyfunc.widen_server()  # before a loop exists, as when MLflow's server loads the model
    asyncio.run(serve())


def test_a_class_name_that_is_not_utf8_can_be_answered(model, tmp_path):
    names = [*"abcd", os.fsdecode(b"caf\xe9")]
    save_model(tmp_path / "model.pt", model, make_config(tmp_path), classes=names)
    export_model(load_model(tmp_path / "model.pt"), tmp_path)
    assert RoutedNetwork(tmp_path).classes == (*"abcd", "caf\\xe9")


def test_models_of_other_versions_run_in_one_process(programs, tmp_path):
    other = tmp_path / "other"
    write_code_with(other, "IMAGES_AT_ONCE = 64", "IMAGES_AT_ONCE = 3")
    ours, theirs = pyfunc.load_code(programs / pyfunc.CODE_FOLDER), pyfunc.load_code(other / pyfunc.CODE_FOLDER)
    assert ours.classifier.IMAGES_AT_ONCE == 64
    assert theirs.classifier.IMAGES_AT_ONCE == 3


def write_code_with(folder: Path, old: str, new: str) -> None:
    write_code(folder)
    file = folder / pyfunc.CODE_FOLDER / "classifier.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
