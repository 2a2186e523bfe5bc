# What all examples share. Sets $ranks, of a job of theirs: two, on two CPU cores or two GPUs; one where there is one GPU. Sourced.
ranks=$(python -c "import torch; print(min(torch.cuda.device_count(), 2) or 2)")

# Waits for the steps in the background; one that failed ends the example.
wait_all() {
  local job
  for job in $(jobs -p); do wait "$job"; done
}
