"""Jobs for test_kill_conversions.py: an import and an export in small parts, by two worker processes."""

import os


def convert(source: str, target: str, exported: str) -> None:
    """Import ``source`` and export it in BF16, unless an earlier process has done so."""
    from megatron_qad.checkpoint.export_hf import export_hf
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    if not os.path.exists(target):
        import_hf(source, target, num_workers=2, part_bytes=50_000)
    print("imported")
    if not os.path.exists(exported):
        export_hf(target, exported, "bf16", max_shard_bytes=60_000, num_workers=2)
    print("exported")
