# Shared by all examples; to be sourced. Sets $ranks, the ranks of each job: two (on CPU cores or GPUs), or one if there is one GPU.
ranks=$(python -c "import torch; print(min(torch.cuda.device_count(), 2) or 2)")

# Waits for the background steps; a failed one ends the example.
wait_all() {
  local job
  for job in $(jobs -p); do wait "$job"; done
}
