"""A real search on Ray Tune: it finetunes, reports, chooses and registers, and resumes after its driver died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datasets.beton import load_manifest
from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.config.load import ConfigError
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from pipeline.models.drnet import build_drnet
from pipeline.search.driver import register_chosen, search_run
from pipeline.search.records import SearchFolder
from pipeline.training.checkpoint import save_model
from tests.search_cases import config_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A search for a backbone that gives every image the same answer.

    Then all resolutions are correct for the same images, no predictor counts as collapsed, and there is always a
    finalist. Otherwise that would depend on how far the killed driver came.
    """
    folder = tmp_path_factory.mktemp("search")
    config = config_of(folder, max_accuracy_drop=100, num_trials=1)
    prepare(
        "glyphs",
        config.data.folder,
        glyphs=GlyphSettings(num_train=60, num_validation=40, image_size=64),
        num_processes=1,
        show_progress=False,
    )
    manifest = load_manifest(config.data.folder)
    RunFolder.of(config).path.mkdir(parents=True)
    model = build_drnet(config.model, 10, manifest.mean, manifest.std)
    torch.nn.init.zeros_(model.backbone.network.fc.weight)
    save_model(RunFolder.of(config).model, model, config, classes=manifest.classes)
    return config


def renamed(config: Config, name: str) -> Config:
    """Return the same search under another name, for the same backbone."""
    search = config.search.model_copy(update={"backbone": str(RunFolder.of(config).path)})
    return config.model_copy(update={"name": name, "search": search})


def records_of(folder: SearchFolder) -> dict[str, int]:
    """Return the time at which each trial's record was written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in folder.trials.glob("*.json")}


def require_complete(report: dict[str, Any]) -> None:
    """Require two seeds of the paper's four, and one drawn candidate, with a second seed if it is a finalist.

    All with a second seed are compared.
    """
    seeds = sorted((row["paper"] or 0, row["seed"]) for row in report["trials"])
    paper = [(number, seed) for number in (1, 2, 3, 4) for seed in (0, 1)]
    assert seeds in ([(0, 0), *paper], [(0, 0), (0, 1), *paper])
    assert len(report["compared"]) == sum(seed == 1 for _, seed in seeds)


def ended_by(number: signal.Signals, config: Config, file: Path, address: str) -> tuple[int, str]:
    """Write a configuration, run its driver, send it a signal at the first record, and return exit code and output."""
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.tune", "--config", str(file)],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ended = threading.Event()

    def send() -> None:
        while not ended.wait(0.05):
            if records_of(SearchFolder.of(config)):
                os.kill(driver.pid, number)
                return

    sender = threading.Thread(target=send)
    sender.start()
    output, _ = driver.communicate()
    ended.set()
    sender.join()
    return driver.returncode, output


@pytest.mark.chaos
def test_an_interrupted_search_says_how_to_resume(config: Config, ray_cluster: str, tmp_path: Path) -> None:
    code, output = ended_by(signal.SIGTERM, renamed(config, "stopped"), tmp_path / "search.yaml", ray_cluster)
    assert code == 130, output
    assert output.endswith("interrupted; rerun the same command to run the remaining trials\n"), output


@pytest.mark.chaos
def test_a_search_resumes_after_its_driver_is_killed(config: Config, ray_cluster: str, tmp_path: Path) -> None:
    killed = renamed(config, "killed")
    folder = SearchFolder.of(killed)
    code, output = ended_by(signal.SIGKILL, killed, tmp_path / "search.yaml", ray_cluster)
    assert code == -signal.SIGKILL, output
    before = records_of(folder)
    result = search_run(killed)
    after = records_of(folder)
    assert {name: after[name] for name in before} == before, "finished trials were not repeated"
    require_complete(result.report)


def test_a_search_ends_with_a_choice_and_is_not_repeated(config: Config, ray_cluster: str) -> None:
    folder, handler = SearchFolder.of(config), signal.getsignal(signal.SIGINT)
    result = search_run(config)
    assert signal.getsignal(signal.SIGINT) is handler, "Ray Tune's own would ignore the next Ctrl-C"
    records = records_of(folder)
    require_complete(result.report)
    (tuned,) = result.report["finetuned"]
    report = json.loads((folder.finetuned / tuned["run"] / "report" / "report.json").read_text())
    assert tuned["mean_gflops"] == report["headline"]["mean_gflops"]
    assert result.chosen is not None
    assert {path.name for path in folder.report.iterdir()} >= {"report.json", "report.md", "front.png"}
    assert not folder.tune.exists()

    again = search_run(config)
    assert records_of(folder) == records
    assert again.report["compared"] == result.report["compared"]
    assert again.report["finetuned"] == result.report["finetuned"]
    assert register_chosen(again.chosen).alias == "within-100-points"


def test_problems_are_reported_before_the_first_trial(config: Config, ray_cluster: str, tmp_path: Path) -> None:
    search = config.search.model_copy(
        update={"max_concurrent": 5, "backbone": str(tmp_path / "none"), "budget_gflops": 1e-6}
    )
    with pytest.raises(ConfigError) as caught:
        search_run(config.model_copy(update={"search": search, "name": "wrong"}))
    problems = "\n".join(caught.value.problems)
    assert "there is no trained model at" in problems
    assert "budget_gflops is 1e-06, but no candidate costs less than" in problems
    search = config.search.model_copy(update={"max_concurrent": 5, "backbone": str(RunFolder.of(config).path)})
    with pytest.raises(ConfigError, match=r"5 trials at once with 1 CPUs each, but there is room for 4 \(4 CPUs\)"):
        search_run(config.model_copy(update={"search": search, "name": "wrong"}))
    assert not (SearchFolder.of(config).path.parent.parent / "wrong" / "search" / "trials").exists()
