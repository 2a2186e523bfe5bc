"""Logs the results of an evaluation: KL to the teacher, cross entropies and top-1 agreement, as means over tokens.

Every evaluation reads the same tokens (``data.validation_set``); the number of counted tokens is logged, too. This
callback writes to the log and the metrics itself, because Megatron would print exponentials as perplexities.
"""

from megatron.training import get_tensorboard_writer, is_last_rank, print_rank_last

from megatron_qad.engine.events import Callback


class Validation(Callback):
    """Writes the means of each evaluation to the log, TensorBoard, wandb and metrics.jsonl."""

    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        text = [f"{name}: {value if isinstance(value, int) else format(value, '.6g')}" for name, value in means.items()]
        if not means["num_tokens"]:
            text.insert(0, "no token counted")
        print_rank_last(f" megatron_qad validation at iteration {iteration} | " + " | ".join(text))
        if not is_last_rank():
            return
        if writer := get_tensorboard_writer():
            for name, value in means.items():
                writer.add_scalar(f"validation/{name}", value, iteration)
            writer.flush()
