"""Level 2: data preparation (text and chats to Megatron's .bin/.idx with loss masks) and datasets for training.

``prepare`` reads the records of ``sources`` and passes them to the ``writer``; ``metadata`` describes the output.
``tokenizer`` and ``chat`` turn text into token ids and loss masks. ``dataset`` and ``provider`` feed Megatron's
``pretrain``; ``run_tokenizer`` checks that the data was made with the run's tokenizer. ``generate`` samples training
text from the teacher.
"""
