"""Prints requirements from pyproject.toml without torch, for images that have their own torch."""

import argparse
import tomllib
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("extra", nargs="?", help="optional dependency group, such as ssm; default: required dependencies")
parser.add_argument("--file", default="pyproject.toml")
options = parser.parse_args()
project = tomllib.loads(Path(options.file).read_text())["project"]
requirements = project["optional-dependencies"][options.extra] if options.extra else project["dependencies"]
print("\n".join(line for line in requirements if not line.startswith("torch==")))
