"""Level 7: run reports (HTML, Markdown, figures and JSON) and policy reports.

``scalars`` reads TensorBoard files, ``weight_errors`` reads checkpoints, ``report.write_report`` writes the report.
Import ``report`` after ``engine.init_runtime()``: reading checkpoints needs Megatron.
"""
