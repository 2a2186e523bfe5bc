"""Packages of the wheel; everything else is in pyproject.toml.

``launch/`` becomes part of the package, so that ``megatron-qad`` finds torchrun.sh without a checkout.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron_qad*"]), "megatron_qad.launch"],
    package_dir={"megatron_qad.launch": "launch"},
)
