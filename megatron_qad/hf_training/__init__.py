"""Level 5: QAD of transformers' own models with transformers' Trainer, as a subclass of it.

``quantize_model`` replaces linears, ``linear_group`` holds their scales, ``qad_trainer`` trains, ``trainer_files``
writes what ``checkpoint.export_hf`` needs next to transformers' checkpoints. Arithmetic, policies, losses and exporters
are those of Megatron's jobs. Nothing here imports Megatron's training or replaces CUDA on a CPU."""
