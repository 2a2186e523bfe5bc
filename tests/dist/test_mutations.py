"""Changes to exports that servers do not notice: the sums find all, --against all but scales of inputs and single bits.

``make test-mutations`` records all of them (docs/mutation_test.md). Here the first export has them all, and the others
have every fifth.
"""

import pytest
from mutation_harness import CONFIGS, LAYOUTS, Mutations, cases
from mutations import MUTATIONS

CASES = cases()
FAST = [case for i, case in enumerate(CASES) if case[:2] == CASES[0][:2] or i % 5 == 0]


@pytest.fixture(scope="module")
def mutations(tmp_path_factory, server):
    return Mutations(tmp_path_factory.mktemp("mutations"), server)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", CONFIGS)
def test_good_exports_have_no_issue(mutations, model, layout):
    issues = mutations.validate(mutations.directory / model / layout, model)
    assert not any(issues.values()), issues


def test_mutations_have_unique_names():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("case", FAST, ids=lambda case: f"{case[0]}, {case[1]}: {case[2].name}")
def test_mutation_is_found(mutations, case):
    outcome = mutations.run(*case)
    assert outcome.is_expected, outcome.issues


@pytest.mark.all
@pytest.mark.parametrize(
    "case", [c for c in CASES if c not in FAST], ids=lambda case: f"{case[0]}, {case[1]}: {case[2].name}"
)
def test_other_mutation_is_found(mutations, case):
    outcome = mutations.run(*case)
    assert outcome.is_expected, outcome.issues
