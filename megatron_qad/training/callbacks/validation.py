"""What an evaluation reports: KL to the teacher, cross entropies, top-1 agreement, each weighted by tokens.

Every evaluation reads the same tokens (``data.validation_set``) and says how many of them count. The log line,
TensorBoard and wandb are written here: Megatron would print the exponential of each number as a perplexity.
"""

from megatron.training import get_tensorboard_writer, get_wandb_writer, is_last_rank, print_rank_last

from megatron_qad.engine.events import Callback


class Validation(Callback):
    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        said = [f"{name}: {value if isinstance(value, int) else format(value, '.6g')}" for name, value in means.items()]
        if not means["num_tokens"]:
            said.insert(0, "no token counted")
        print_rank_last(f" megatron_qad validation at iteration {iteration} | " + " | ".join(said))
        if not is_last_rank():
            return
        if writer := get_tensorboard_writer():
            for name, value in means.items():
                writer.add_scalar(f"validation/{name}", value, iteration)
            writer.flush()
        if wandb := get_wandb_writer():
            wandb.log({f"validation/{name}": value for name, value in means.items()}, iteration)
