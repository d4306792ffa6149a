from __future__ import annotations

from benchmarks.decoding_fuzz import fuzz, mutants


def test_mutated_files_are_decoded_or_refused():
    found = fuzz(3000)
    assert found.decoded + found.refused == 3000
    assert min(found.decoded, found.refused) > 300, "both must happen, or this test shows nothing"
    assert found.grown_mb < 50


def test_mutants_are_always_the_same():
    assert list(mutants(20, seed=1)) == list(mutants(20, seed=1)) != list(mutants(20, seed=2))
