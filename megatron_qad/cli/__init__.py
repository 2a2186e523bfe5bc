"""Level 8: the command ``megatron-qad``.

``main`` finds the command in ``command_table``, checks what can be checked without torch (``early_checks``), and runs
it in this process or on every GPU (``launcher``). Each command is a file in ``commands``; ``stages`` puts them together
for ``megatron-qad run``. Importing these files does not import torch.
"""
