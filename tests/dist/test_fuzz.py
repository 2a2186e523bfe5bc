"""Every twentieth damage of ``make test-fuzz`` (docs/fuzz_test.md): an error or the right result, nothing else."""

import pytest
from fuzz_harness import Fuzz


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory, server):
    return Fuzz(tmp_path_factory.mktemp("fuzz"), server)


def test_grid_covers_every_input(fuzz):
    assert len(fuzz.damages) >= 150 and len(set(fuzz.damages)) == len(fuzz.damages)
    assert {damage.input for damage in fuzz.damages} == {"model", "config", "chats", "data", "cache"}
    assert {damage.file for damage in fuzz.damages if damage.input == "data"} == set(fuzz.data_files)


def test_damage_is_an_error_or_has_no_effect(fuzz):
    outcomes = fuzz.run(list(range(0, len(fuzz.damages), 20)))
    bad = [f"{outcome.outcome} {outcome.damage}: {outcome.message}" for outcome in outcomes]
    assert not [line for line in bad if line.startswith(("silent", "traceback"))], "\n".join(bad)
    assert {outcome.outcome for outcome in outcomes} == {"error", "same"}
