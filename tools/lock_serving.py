"""Regenerates tests/serve/serving.lock, the exact packages of the serving environment, from tests/serve/serving.in.

    python tools/lock_serving.py      (Python 3.12 on Linux and x86-64; takes minutes and needs the network)

The lock holds one version and the SHA-256 of one wheel for each package, so pip installs the same files everywhere.
Lines of serving.in are pip's requirements, with two additions in the comment:

    name==1.0  # no-deps: reason    its dependencies are not resolved
    name       # never: reason      left out of the lock, even where another package requires it
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "serve"
HEADER = """# Made by tools/lock_serving.py from serving.in: do not edit. Wheels for Python 3.12 on Linux and x86-64.
# Install with: pip install --no-deps --require-hashes -r serving.lock
"""


@dataclass(frozen=True)
class Choice:
    """The lines of serving.in by kind."""

    resolved: tuple[str, ...]
    no_deps: tuple[str, ...]
    never: frozenset[str]


def parse(text: str) -> Choice:
    """Return the requirements of ``serving.in``; see the module's docstring for the format."""
    kinds: dict[str, list[str]] = {"": [], "no-deps": [], "never": []}
    for line in text.splitlines():
        requirement, _, comment = (part.strip() for part in line.partition("#"))
        if requirement:
            kind = comment.partition(":")[0]
            kinds[kind if kind in kinds else ""].append(requirement)
    never = frozenset(map(normalized, kinds["never"]))
    return Choice(tuple(kinds[""]), tuple(kinds["no-deps"]), never)


def normalized(name: str) -> str:
    """Return a package's name as registries compare it: lower case, with single hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(requirements: Sequence[str], *flags: str) -> dict[str, tuple[str, str]]:
    """Return name -> (version, SHA-256 of the wheel) as pip would install them into an empty environment."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", *flags]
        command += ["--disable-pip-version-check", "--only-binary", ":all:", "--report", str(report), *requirements]
        if subprocess.run(command).returncode:
            sys.exit("error: pip could not resolve tests/serve/serving.in (its message is above).")
        installs = json.loads(report.read_text())["install"]
    return {
        normalized(package["metadata"]["name"]): (
            package["metadata"]["version"],
            package["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for package in installs
    }


def lock_text(packages: dict[str, tuple[str, str]], never: Iterable[str]) -> str:
    """Return the lock file of ``packages`` without those in ``never``."""
    kept = sorted(packages.keys() - set(never))
    pins = (f"{name}=={packages[name][0]} --hash=sha256:{packages[name][1]}\n" for name in kept)
    return HEADER + "".join(pins)


def main() -> None:
    choice = parse((FOLDER / "serving.in").read_text())
    packages = resolve(choice.resolved) | resolve(choice.no_deps, "--no-deps")
    if unknown := choice.never - packages.keys():
        sys.exit(f"error: serving.in says never for {', '.join(sorted(unknown))}, which nothing requires. Remove it.")
    (FOLDER / "serving.lock").write_text(lock_text(packages, choice.never))
    print(f"{FOLDER / 'serving.lock'}: {len(packages.keys() - choice.never)} packages")


if __name__ == "__main__":
    main()
