import pytest

from pipeline.config import BackboneStage
from pipeline.training.schedule import learning_rate


def test_the_papers_backbone_schedule() -> None:
    stage = BackboneStage(epochs=70, lr=0.1, step_epochs=20, warmup_epochs=3)
    assert learning_rate(stage, 0) == 0
    assert learning_rate(stage, 1.5) == pytest.approx(0.05)
    assert [learning_rate(stage, epoch) for epoch in (3, 19.99, 20, 40, 60, 69.9)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.001, 0.0001, 0.0001]
    )


def test_cosine_falls_from_the_peak_to_zero() -> None:
    stage = BackboneStage(epochs=10, lr=1.0, schedule="cosine", warmup_epochs=2)
    values = [learning_rate(stage, epoch / 10) for epoch in range(20, 101)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(stage, 6) == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
