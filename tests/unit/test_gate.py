"""The gate's decision in the cases that a skeptic would ask about."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.evaluation.gate import (
    Answers,
    Bounds,
    compare_answers,
    comparison_table,
    former_objections,
    objections,
    static_objections,
)


def answers(num_images: int, wrong: range, gflops: float = 1.0, digest: str = "d1") -> Answers:
    """Return answers that are correct except for the images of `wrong`."""
    return Answers(digest, np.arange(num_images), ~np.isin(np.arange(num_images), wrong), gflops)


CHAMPION = answers(5000, range(500))


@pytest.mark.parametrize(
    ("challenger", "bounds", "expected"),
    [
        (answers(5000, range(500)), Bounds(), []),
        (answers(5000, range(400)), Bounds(), []),
        # 10 lost, 5 gained: -0.1 points, within chance and certainly no loss of a point.
        (answers(5000, range(5, 510)), Bounds(), []),
        # 60 lost: 1.2 points, proven.
        (answers(5000, range(560)), Bounds(), ["less accurate: -1.20"]),
        # 30 lost: 0.6 points, proven too, though the interval excludes a whole point.
        (answers(5000, range(530)), Bounds(), ["less accurate: -0.60"]),
        # A proven loss within the bound is no objection; one that may exceed the bound is.
        (answers(5000, range(530)), Bounds(max_accuracy_drop=1), []),
        (answers(5000, range(560)), Bounds(max_accuracy_drop=1), ["may lose more than 1 point:"]),
        (answers(5000, range(560)), Bounds(max_accuracy_drop=2), []),
        (answers(5000, range(500)), Bounds(max_accuracy_drop=0), ["may lose more than 0 points:"]),
        # 500 lost and 500 gained: equal, but so different that 5,000 images do not exclude a loss of a point.
        (answers(5000, range(500, 1000)), Bounds(), ["may lose more than 1 point:"]),
        (answers(5000, range(500), gflops=1.02), Bounds(), ["costs 2 % more GFLOPs, and 0 % more is allowed"]),
        (answers(5000, range(500), gflops=1.02), Bounds(max_gflops_increase=2.5), []),
        (answers(5000, range(500), gflops=0.5), Bounds(), []),
        (answers(5000, range(560), gflops=1.02), Bounds(), ["less accurate", "costs 2 % more"]),
    ],
)
def test_decisions(challenger, bounds, expected):
    said = objections(compare_answers(challenger, CHAMPION), bounds)
    assert len(said) == len(expected)
    for objection, part in zip(said, expected, strict=True):
        assert part in objection


def test_ten_images_prove_nothing():
    """McNemar's test alone would accept a loss of 30 points."""
    found = compare_answers(answers(10, range(3)), answers(10, range(0)))
    assert found.mcnemar_p > 0.05
    (objection,) = objections(found, Bounds())
    assert "it may lose more than 1 point: -30.00" in objection
    assert "more validation images" in objection
    assert objections(compare_answers(answers(10, range(0)), answers(10, range(0))), Bounds())


def test_the_champion_itself_is_accepted_with_enough_images():
    assert objections(compare_answers(answers(300, range(9)), answers(300, range(9))), Bounds()) == []


def test_the_difference_is_paired():
    """19 lost and 10 gained."""
    found = compare_answers(answers(5000, range(10, 519)), CHAMPION)
    assert (found.only_challenger, found.only_champion, found.num_images) == (10, 19, 5000)
    assert found.difference.value == pytest.approx(-9 / 5000)
    assert found.difference.low < found.difference.value < found.difference.high
    assert found.mcnemar_p == pytest.approx(0.136, abs=0.001)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(CHAMPION, data_digest="d2"), r"different data \(digests d1 and d2\)"),
        (replace(CHAMPION, indices_N=np.arange(5000) + 1), "different images of the same data"),
        (answers(4999, range(500)), r"5,000 and 4,999"),
    ],
)
def test_other_images_are_not_compared(other, message):
    with pytest.raises(ValueError, match=message):
        compare_answers(CHAMPION, other)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_an_impossible_bound_is_refused(value):
    with pytest.raises(ValueError, match="max_accuracy_drop is"):
        Bounds(max_accuracy_drop=value)
    with pytest.raises(ValueError, match="max_gflops_increase is"):
        Bounds(max_gflops_increase=value)


def test_answers_can_be_saved(tmp_path):
    right_N = np.arange(200) % 3 > 0
    Answers("digest", np.arange(200), right_N, 0.25).save(tmp_path / "answers.npz")
    read = Answers.load(tmp_path / "answers.npz")
    assert read.static_right_NR is None
    assert (read.data_digest, read.mean_gflops) == ("digest", 0.25)
    assert np.array_equal(read.right_N, right_N)
    assert np.array_equal(read.indices_N, np.arange(200))
    assert read.right_N.dtype == bool


def test_a_damaged_file_is_named(tmp_path):
    CHAMPION.save(tmp_path / "answers.npz")
    content = (tmp_path / "answers.npz").read_bytes()
    (tmp_path / "answers.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"answers\.npz is not a file of model answers"):
        Answers.load(tmp_path / "answers.npz")


def test_the_table_shows_both():
    lines = comparison_table(compare_answers(answers(5000, range(530), 0.9), CHAMPION), "new", "old").splitlines()
    assert lines[0].split() == ["old", "new", "difference"]
    assert lines[1].split()[1:6] == ["90.00", "%", "89.40", "%", "-0.60"]
    assert lines[2].split() == ["only", "this", "one", "correct", "30", "0", "McNemar", "p", "<", "0.001"]
    assert lines[3].split() == ["GFLOPs", "1.00", "0.900", "-10.0", "%"]


def test_many_small_losses_do_not_add_up():
    """Twenty challengers, one after another, are each 0.3 points worse than the champion of their time.

    Against that champion alone all pass, because each loss is too small to see. With the best former champion they
    stop within the margin of a point.
    """

    def lost(with_formers: bool, seed: int) -> float:
        generator = np.random.default_rng(seed)
        champion, formers = answers(5000, range(200)), []
        for _ in range(20):
            right_N = champion.right_N.copy()
            right_N[generator.choice(np.flatnonzero(right_N), 20, replace=False)] = False
            right_N[generator.choice(np.flatnonzero(~right_N), 5, replace=False)] = True
            challenger = replace(champion, right_N=right_N)
            said = objections(compare_answers(challenger, champion), Bounds(max_accuracy_drop=1.0))
            if with_formers and formers:
                best = max(formers, key=lambda former: former.top1)
                said += former_objections(compare_answers(challenger, best), Bounds(max_accuracy_drop=1.0), "1")
            if not said:
                formers.append(champion)
                champion = challenger
        return 100 * (0.96 - champion.top1)

    assert lost(False, 0) > 4
    for seed in range(5):
        assert 0 < lost(True, seed) <= 1


def test_a_model_that_its_own_static_resolution_beats_is_refused():
    static_NR = np.column_stack([np.arange(5000) >= 490, np.arange(5000) >= 500, np.arange(5000) >= 1500])
    routed = replace(CHAMPION, static_right_NR=static_NR, static_gflops_R=np.array([1.5, 0.8, 0.2]))
    (objection,) = static_objections(routed, Bounds())
    assert "its own static resolution of 0.800 GFLOPs is at least as accurate (90.00 % against 90.00 %)" in objection
    assert static_objections(replace(routed, mean_gflops=0.8), Bounds()) == [], "the policy is that resolution"
    assert static_objections(replace(routed, right_N=static_NR[:, 0]), Bounds()) == [], "the routed model is better"
    assert static_objections(CHAMPION, Bounds()) == [], "files of earlier versions say nothing of it"
    # Ten images do not prove that a static network is as good.
    few = answers(10, range(1))
    few = replace(few, static_right_NR=few.right_N[::-1, None], static_gflops_R=np.array([0.5]))
    assert static_objections(few, Bounds()) == []
