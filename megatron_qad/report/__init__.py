"""Floor 5: what runs left behind, as a Markdown report with a picture and machine-readable results.

``scalars`` reads TensorBoard, ``weight_errors`` checkpoints; ``report.write_report`` writes. Import that one after
``engine.init_runtime()``: reading checkpoints needs Megatron.
"""
