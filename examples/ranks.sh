# Sets $ranks, of a job of the examples: two, on two CPU cores or two GPUs; one where there is one GPU. Sourced.
ranks=$(python -c "import torch; print(min(torch.cuda.device_count(), 2) or 2)")
