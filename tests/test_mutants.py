"""The mutation tester: its operators, and that its lists name existing functions, tests and mutants."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from mutant_report import Outcome, Records, report  # noqa: E402
from mutant_targets import EQUIVALENT, TARGETS, Job, Target  # noqa: E402
from mutation_operators import OPERATORS, Mutant, mutants_of, sample  # noqa: E402


def edits(body: str, operator: str) -> list[str]:
    """Returns the lines that an operator changes in a function's body."""
    mutants = mutants_of(f"def f(x, chosen, rejected):\n    {body}\n", "f")
    return [mutant.after for mutant in mutants if mutant.operator == operator]


@pytest.mark.parametrize(
    ("operator", "body", "expected"),
    [
        ("arithmetic", "return x + 1", ["return x - 1"]),
        ("comparison", "return 1 < x <= 2", ["return 1 <= x <= 2", "return 1 < x < 2"]),
        ("boolean", "return x and 1", ["return x or 1"]),
        ("condition", "return 1 if x > 0 else 2", ["return 1 if not x > 0 else 2"]),
        ("condition", "return 1 if x is None else 2", []),  # of a comparison
        ("condition", "return [y for y in x if y]", ["return [y for y in x if not y]"]),
        ("constant", "return 1", ["return 2", "return 0"]),
        ("constant", "return True", ["return False"]),
        ("constant", "return 0.5", ["return 1.5"]),
        ("negation", "return -x", ["return x"]),
        ("term", "return x - 1", ["return x"]),
        ("term", "return x * 2", ["return x", "return 2"]),
        ("stop_gradient", "return jax.lax.stop_gradient(x)", ["return x"]),
        ("extremes", "return jnp.maximum(x, 1)", ["return jnp.minimum(x, 1)"]),
        ("sides", "return chosen - rejected", ["return rejected - rejected", "return chosen - chosen"]),
        ("sides", "return x.chosen_nll", []),  # the name rejected_nll does not exist
        ("branches", "return np.where(x, 1, 2)", ["return np.where(x, 2, 1)"]),
        ("bound", "return x[chosen:]", ["return x[chosen + 1:]"]),
        ("bound", "return x[:2]", ["return x[1:2]"]),
    ],
)
def test_edits_of_each_operator(operator: str, body: str, expected: list[str]) -> None:
    assert edits(body, operator) == expected


def test_messages_docstrings_and_annotations_stay() -> None:
    lines = [
        'def f(x: "1 + 1") -> "2":',
        '"""3 + 3"""',
        "assert x > 4, 5",
        "log.info(6)",
        'raise ValueError(f"{x + 7}")',
    ]
    assert mutants_of("\n    ".join(lines), "f") == []


def test_a_mutant_is_the_module_with_one_edit() -> None:
    source = "A = 1\n\nclass C:\n\n    def f(self):\n        return 2\n"
    found = mutants_of(source, "C.f")
    assert [mutant.source for mutant in found] == [source.replace("2", "3"), source.replace("2", "1")]
    assert {(mutant.before, mutant.after) for mutant in found} == {("return 2", "return 3"), ("return 2", "return 1")}
    with pytest.raises(ValueError, match="no function"):
        mutants_of(source, "f")


def test_a_sample_has_many_operators_and_smaller_ones_are_its_beginning() -> None:
    found = mutants_of("def f(x):\n    return -x[:2] + max(3, x) if x < 4 else 5 * x\n", "f")
    drawn = sample(found, 5, seed=0)
    assert len({mutant.operator for mutant in drawn}) == 5
    assert sample(found, 2, seed=0) == drawn[:2]
    assert sample(found, 5, seed=1) != drawn
    assert len(sample(found, 1000, seed=0)) == len(found)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.module)
def test_every_listed_function_exists_and_has_mutants_and_tests(target: Target) -> None:
    source = (ROOT / target.module).read_text(encoding="utf-8")
    for function in target.functions:
        assert mutants_of(source, function)
    assert target.tests
    assert all((ROOT / tests).is_file() for tests in target.tests)


def test_every_equivalent_mutant_is_a_mutant() -> None:
    possible = {
        (mutant.function, mutant.after)
        for target in TARGETS
        for function in target.functions
        if function in {name for name, _ in EQUIVALENT}
        for mutant in mutants_of((ROOT / target.module).read_text(encoding="utf-8"), function)
    }
    assert EQUIVALENT.keys() <= possible


def test_outcomes_are_kept_from_run_to_run_and_reported(tmp_path: Path) -> None:
    target = Target("masks", "jdpo/some.py", ("f",), ("tests/some.py",))
    jobs = [Job(target, Mutant("f", "constant", "", "return 1", f"return {value}")) for value in range(4)]
    path = tmp_path / "mutants.json"
    Records(path).keep(Outcome(jobs[0], "survived", 2.0))
    records = Records(path)
    records.keep(Outcome(jobs[0], "killed", 2.0))
    records.keep(Outcome(jobs[1], "survived", 4.0))
    records.keep(Outcome(jobs[2], "timed out", 6.0))
    text = report(Records(path).outcomes(jobs), seed=3, per_function=4, cpu_seconds=5)
    assert "| masks | 1 | 4 | 1 | 1 | 1 | 0 | 1 |" in text
    assert "# jdpo/some.py: f (constant)\n- return 1\n+ return 1\n" in text
    assert "Seed 3, at most 4 per function; 4 s per mutant" in text
    records.drop_all_but(jobs[:1])
    assert [outcome.verdict for outcome in Records(path).outcomes(jobs)] == ["killed", *["not run"] * 3]


def test_operators_are_all_described() -> None:
    described = ast.get_docstring(
        ast.parse((ROOT / "benchmarks" / "mutation_operators.py").read_text(encoding="utf-8"))
    )
    assert described is not None
    assert [line.split()[0] for line in described.splitlines() if line.startswith("    ")] == [*OPERATORS]
