from __future__ import annotations

from pathlib import Path

from benchmarks.search import at_once, live, on_table
from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings

MODEL = {
    "backbone": "small_resnet",
    "backbone_width": 0.5,
    "resolutions": [48, 32],
    "predictor": {"architecture": 3, "input_size": 16, "width": 0.125},
}


def test_both_sides_train_and_measure_their_speed(tmp_path: Path) -> None:
    glyphs = GlyphSettings(num_train=20, num_validation=10, image_size=48)
    prepare("glyphs", tmp_path / "data", glyphs=glyphs, num_processes=1, show_progress=False)
    given = {"model": MODEL, "batch_size": 10, "data": str(tmp_path / "data"), "threads": 1, "epochs": 2}
    for side in (on_table, live):
        values = side(scratch=str(tmp_path / "scratch"), **given)
        assert [next(values) > 0 for _ in range(2)] == [True, True]
    assert list((tmp_path / "scratch").rglob("*.npy")), "the table and the decoded inputs of one side"


def test_simultaneous_measurements_are_added_up() -> None:
    assert at_once([lambda: 2.0, lambda: 3.0]) == 5.0
