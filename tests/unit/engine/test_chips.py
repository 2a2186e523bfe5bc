"""The peak of a GPU follows from the name that CUDA reports."""

import pytest

from megatron_qad.engine.chips import BF16_PEAKS, bf16_peak


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
    ],
)
def test_known_chips(name, tera):
    assert bf16_peak(name) == tera * 1e12


@pytest.mark.parametrize("name", ["cpu", "", "NVIDIA RTX A1000", "NVIDIA A100X", "Tesla V100-SXM2-32GB"])
def test_unknown_chips_have_no_peak(name):
    assert bf16_peak(name) is None


def test_specific_names_come_first():
    names = list(BF16_PEAKS)
    for i, name in enumerate(names):
        hidden_by = [earlier for earlier in names[:i] if set(earlier.split()) <= set(name.split())]
        assert not hidden_by, f"{name} is never found: {hidden_by}"
