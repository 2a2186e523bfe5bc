"""Peak rates of GPUs, by which model FLOPs become a utilization (MFU)."""

_TERA = 1e12
BF16_PEAKS = {
    # More specific names first. Dense BF16 with FP32 accumulation, from NVIDIA's data sheets; where they give the rate
    # with sparsity only, half of it.
    "GB300": 2500 * _TERA,
    "GB200": 2500 * _TERA,
    "B300": 2250 * _TERA,
    "B200": 2250 * _TERA,
    "GH200": 989.5 * _TERA,
    "H200 NVL": 835.5 * _TERA,
    "H200": 989.5 * _TERA,
    "H100 PCIe": 756 * _TERA,
    "H100 NVL": 835.5 * _TERA,
    "H100": 989.5 * _TERA,
    "H800 PCIe": 756 * _TERA,
    "H800": 989.5 * _TERA,
    "H20": 148 * _TERA,
    "A100": 312 * _TERA,
    "A800": 312 * _TERA,
    "L40S": 362 * _TERA,
    "L40": 181 * _TERA,
    "L4": 121 * _TERA,
    "A40": 149.7 * _TERA,
    "A30": 165 * _TERA,
    "A10": 125 * _TERA,
}
"""Part of the name that CUDA reports -> FLOP/s of dense BF16 matrix products."""


def bf16_peak(device_name: str) -> float | None:
    """Return the dense BF16 peak of a GPU in FLOP/s; None if the chip is not in the table.

    Args:
        device_name: as reported by ``torch.cuda.get_device_name``, such as "NVIDIA H100 80GB HBM3".
    """
    parts = device_name.replace("-", " ").split()
    for name, peak in BF16_PEAKS.items():
        if all(part in parts for part in name.split()):
            return peak
    return None
