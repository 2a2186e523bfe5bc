"""The vision side of vision-language models: encoder and projector, and the merge of their features into embeddings."""
