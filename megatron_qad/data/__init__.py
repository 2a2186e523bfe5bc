"""Floor 2: text and chat become Megatron's .bin/.idx with loss masks, and samples for the training loop.

``prepare`` reads ``sources`` and drives the ``writer``, ``metadata`` says what was written, ``tokenizer`` and ``chat``
turn text into ids and masks,
``dataset`` and ``provider`` feed Megatron's ``pretrain`` with data of the run's own tokenizer (``run_tokenizer``),
``generate`` lets a teacher write its own training text.
"""
