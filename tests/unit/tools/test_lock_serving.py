"""The serving environment's lock agrees with what it is made from."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools"))

from lock_serving import HEADER, lock_text, normalized, parse  # noqa: E402

SERVE = ROOT / "tests" / "serve"
PIN = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def pins() -> dict[str, str]:
    text = (SERVE / "serving.lock").read_text()
    assert text.startswith(HEADER)
    matches = [PIN.fullmatch(line) for line in text.removeprefix(HEADER).splitlines()]
    assert matches and all(matches), "each line is a version and one hash"
    return {match[1]: match[2] for match in matches}


def test_lock_has_the_chosen_packages():
    choice, locked = parse((SERVE / "serving.in").read_text()), pins()
    for requirement in choice.resolved + choice.no_deps:
        name, _, version = requirement.partition("==")
        name = normalized(re.match(r"[\w.-]+", name)[0])
        assert name in locked, f"serving.in has {name}: run tools/lock_serving.py"
        assert not version or locked[name] == version
    assert not choice.never & locked.keys()


def test_parse_and_lock_text():
    choice = parse("# title\n\na_B==1  # why\nc[x]>=2\nd==3  # no-deps: why\nE.f  # never: why\n")
    assert choice.resolved == ("a_B==1", "c[x]>=2")
    assert choice.no_deps == ("d==3",)
    assert choice.never == {"e-f"}
    packages = {"e-f": ("1", "00"), "d": ("3", "11"), "a-b": ("1", "22")}
    assert lock_text(packages, choice.never) == HEADER + "a-b==1 --hash=sha256:22\nd==3 --hash=sha256:11\n"
