"""Level 2: model families, and the layers and weights of Megatron's ``HybridModel`` for Hugging Face checkpoints.

``families`` has one file per family and needs neither Megatron nor a GPU. The modules that build models (``specs``,
``local_layers``, ``builder``) import Megatron and must be imported after ``engine.init_runtime()``.
"""
