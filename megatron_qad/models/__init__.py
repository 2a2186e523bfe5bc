"""Floor 2: Hugging Face configs and weights as Megatron's ``HybridModel``: families with their name maps, layer specs.

``families`` holds one file a family and needs neither Megatron nor a GPU; the modules that build models
(``specs``, ``local_layers``, ``builder``) import Megatron and come after ``engine.init_runtime()``.
"""
