"""Prints the requirements of pyproject.toml that an image with its own torch needs: all but torch, or an extra's."""

import argparse
import tomllib
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("extra", nargs="?", help="an optional dependency group, such as ssm; default: the project's own")
parser.add_argument("--file", default="pyproject.toml")
options = parser.parse_args()
project = tomllib.loads(Path(options.file).read_text())["project"]
wanted = project["optional-dependencies"][options.extra] if options.extra else project["dependencies"]
print("\n".join(line for line in wanted if not line.startswith("torch==")))
