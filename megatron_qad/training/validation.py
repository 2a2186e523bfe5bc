"""What an evaluation reports: KL to the teacher, cross entropies, top-1 agreement, each weighted by tokens.

Every evaluation reads the same tokens (``data.validation_set``) and says how many of them count. Called by Megatron at
the end of every evaluation (``non_loss_data_func``). It writes the log line, TensorBoard and wandb itself: Megatron
would print the exponential of each number as a perplexity.
"""

from megatron.core import mpu
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, is_last_rank, print_rank_last

from megatron_qad.models.weights import BEST_KEY
from megatron_qad.training.best import best_checkpoints
from megatron_qad.training.expert_load import expert_load
from megatron_qad.training.loss import validation_metrics


def report_validation(model) -> dict[str, float]:
    """Reduce the metrics of the evaluation that just ran over the data-parallel group, and report their means."""
    args = get_args()
    total = validation_metrics.take().all_reduce(mpu.get_data_parallel_group(with_context_parallel=True))
    means = total.means(has_teacher=args.teacher_hf_config is not None)
    # Megatron counts an iteration after its evaluation. Where nothing is trained curr_iteration stays 0, and under
    # --skip-train it is not there.
    iteration = max(args.iteration, getattr(args, "curr_iteration", -1) + 1 if args.consumed_train_samples else 0)
    best_checkpoints.add(iteration, means.get(BEST_KEY) if is_last_rank() else None, means["num_tokens"])
    said = [f"{name}: {value if isinstance(value, int) else format(value, '.6g')}" for name, value in means.items()]
    if not means["num_tokens"]:
        said.insert(0, "no token counted")
    print_rank_last(f" megatron_qad validation at iteration {iteration} | " + " | ".join(said))
    if is_last_rank():
        if writer := get_tensorboard_writer():
            for name, value in means.items():
                writer.add_scalar(f"validation/{name}", value, iteration)
            writer.flush()
        if wandb := get_wandb_writer():
            wandb.log({f"validation/{name}": value for name, value in means.items()}, iteration)
    expert_load.report(iteration)
    return means
