"""QADTrainer: transformers' Trainer with a frozen teacher and a student in NVFP4."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from megatron_qad.distillation import LogitLoss, VocabShard, logit_losses, parse_loss
from megatron_qad.engine.errors import QADError
from megatron_qad.hf_training.evaluation_sums import EvaluationSums
from megatron_qad.hf_training.input_calibration import calibrating
from megatron_qad.hf_training.quantize_model import quantization_of
from megatron_qad.hf_training.trainer_checks import check_arguments, check_settings, check_trainer, max_lr_of
from megatron_qad.hf_training.trainer_files import check_same_job, write_files
from megatron_qad.hf_training.training_rows import NO_LOSS, pad_rows

_LABELS = ("labels", "shift_labels")


class QADTrainer(Trainer):
    """Trains a quantized model to match its teacher; everything else is transformers' ``Trainer``.

    Rows of the datasets have ``input_ids``, ``labels`` (-100: no loss) and optionally ``attention_mask``, as for causal
    language models: position i is compared where label i + 1 counts. ``shift_labels`` instead of ``labels`` belong to
    their own position. The loss of a step is divided once, by the number of tokens that count in all its microbatches
    on all processes.

    An evaluation reports ``eval_kl_to_teacher`` (also as ``eval_loss``), ``eval_cross_entropy``,
    ``eval_teacher_cross_entropy``, ``eval_top1_agreement`` and ``eval_num_tokens``: means over all counted tokens.

    Before the first step the first rows of the training data calibrate the inputs, as in Megatron's jobs. Checkpoints
    are those of ``Trainer``, with scales and amaxes; ``export_hf`` reads them, and
    ``train(resume_from_checkpoint=True)`` continues exactly.

    Args:
        model: the student, from ``quantize_model``. Its float32 parameters are the masters.
        teacher: a causal language model with the same vocabulary. It is frozen and runs in its own dtype; with
            ``TrainingArguments(bf16=True)`` load it in BF16.
        args: one process, or several under torchrun or accelerate (DDP).
        loss: loss of the logits, as ``--qad-loss``: "kl", "reverse_kl", "kl + 0.5*ce", ...
        temperature: default temperature of the losses.
        calibration_samples: number of rows that calibrate the inputs, rounded up to whole batches.
        calibration_percentile, calibration_headroom: as ``--qad-calibration-percentile`` and ``-headroom``.
        kwargs: other arguments of ``Trainer``. ``data_collator`` defaults to ``pad_rows``.

    Raises:
        QADError: a model that is not quantized, another vocabulary of the teacher, or an argument that this class does
            not support (FSDP, DeepSpeed, DataParallel, FP16, ...).

    Example::

        trainer = QADTrainer(model=student, teacher=teacher, args=args, train_dataset=rows)
        trainer.train()
        trainer.save_model("run")
        export_hf("run", "exports/nvfp4", "modelopt")  # megatron_qad.api
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        args: TrainingArguments,
        *,
        loss: str = "kl",
        temperature: float = 1.0,
        calibration_samples: int = 64,
        calibration_percentile: float | None = None,
        calibration_headroom: float | None = None,
        **kwargs: Any,
    ):
        self.quantization = quantization_of(model)
        check_arguments(args, kwargs, model, teacher)
        check_settings(
            temperature=temperature,
            calibration_samples=calibration_samples,
            calibration_percentile=calibration_percentile,
            calibration_headroom=calibration_headroom,
        )
        self._loss_text, losses = loss, parse_loss(loss, temperature=temperature, name="loss")
        self._terms = losses.terms_of_type(LogitLoss)
        if len(self._terms) != len(losses.terms):
            raise QADError(
                f"loss {loss!r}: QADTrainer has losses of the logits only. Use megatron-qad train for the others."
            )
        self._num_samples = calibration_samples
        self._calibration = {"percentile": calibration_percentile, "headroom": calibration_headroom}
        self._evaluation: EvaluationSums | None = None
        kwargs["data_collator"] = kwargs.get("data_collator") or pad_rows
        kwargs["callbacks"] = [_Announcements(self), *(kwargs.get("callbacks") or ())]
        super().__init__(model=model, args=args, **kwargs)
        check_trainer(self)
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)
        """The frozen teacher. It is part of no optimizer, DDP wrapper or checkpoint."""
        for group in self.quantization.groups:
            group.updates_are_announced = True

    # The parts of a step ------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return this microbatch's share of the step's loss: the sum over its tokens, divided by the global count."""
        model_inputs, labels = _split(inputs)
        outputs = model(**model_inputs, use_cache=False)
        losses = [term.loss for term in self._terms]
        values = logit_losses(
            losses,
            outputs.logits,
            self._teacher_logits(model_inputs),
            labels,
            VocabShard(0, outputs.logits.shape[-1]),
            in_place=not return_outputs,
        )
        step = self.state.global_step + 1
        total = sum(term.weight.at_step(step) * value.sum() for term, value in zip(self._terms, values, strict=True))
        if num_items_in_batch is None:  # outside of training
            loss = total / labels.ne(NO_LOSS).sum().clamp(min=1)
        else:
            loss = total / num_items_in_batch * self.accelerator.num_processes  # DDP takes the mean over processes
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_logits(self, model_inputs: dict[str, Tensor]) -> Tensor:
        return self.teacher(**model_inputs, use_cache=False).logits

    def _get_num_items_in_batch(self, batch_samples, device):
        """Return the number of tokens that count in all microbatches of a step on all processes, int64 []."""
        if not batch_samples:
            return None
        labels = [_split(batch)[1] for batch in batch_samples]
        if labels[0] is None:
            raise QADError(f"the training data has no {' or '.join(_LABELS)}; found {', '.join(batch_samples[0])}.")
        total = torch.stack([row.ne(NO_LOSS).sum() for row in labels]).sum().to(device)
        total = self.accelerator.gather(total).sum()
        if not total:
            raise QADError(
                f"step {self.state.global_step + 1}: no token of its batches counts in the loss. Remove rows "
                "whose labels are all -100."
            )
        return total

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, *_LABELS})

    # Calibration --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self) -> None:
        """Set the amaxes of all inputs from the first rows of the training data. Collective.

        ``train()`` and ``evaluate()`` call it if no amax is known. Training sees the same rows again.

        Raises:
            QADError: there is no training data, or the input of a linear was always zero or not finite.
        """
        if self.train_dataset is None:
            raise QADError("calibration: no train_dataset. Pass one, or load a calibrated checkpoint.")
        num_processes = self.accelerator.num_processes
        num_batches = -(-self._num_samples // (self.args.per_device_train_batch_size * num_processes))
        groups = [torch.distributed.group.WORLD] if num_processes > 1 else []
        was_training = self.model.training
        with torch.random.fork_rng(devices=[]), calibrating(self.quantization, groups, **self._calibration):
            self.model.eval()
            loader = self.get_train_dataloader()
            for batch in itertools.islice(loader, num_batches):
                with self.accelerator.autocast():
                    self.model(**_split(self._prepare_inputs(batch))[0], use_cache=False)
            loader.end()  # as after its last batch: accelerate tracks the loader that is being read
        self.model.train(was_training)

    def calibrate_if_needed(self) -> None:
        """Calibrate if the amax of an input is unknown; the same on all processes."""
        if not self.quantization.is_calibrated:
            self.calibrate()

    # Evaluations --------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self.calibrate_if_needed()
        self._evaluation = EvaluationSums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means, self._evaluation = self._evaluation.means(), None
        output.metrics[f"{metric_key_prefix}_loss"] = means["kl_to_teacher"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss of a batch, and its logits and labels unless ``prediction_loss_only``."""
        inputs = self._prepare_inputs(inputs)
        model_inputs, labels = _split(inputs)
        if labels is None:
            raise QADError(f"the evaluation data has no {' or '.join(_LABELS)}; found {', '.join(inputs)}.")
        with self.compute_loss_context_manager():
            logits = model(**model_inputs, use_cache=False).logits
        rows = self._evaluation.of_rows(logits, self._teacher_logits(model_inputs), labels)
        # Drops the rows that fill the last batch of an evaluation with several processes.
        self._evaluation.add(self.accelerator.gather_for_metrics(rows))
        loss = (rows[:, 0].sum() / rows[:, -1].sum().clamp(min=1)).float()
        return (loss, None, None) if prediction_loss_only else (loss, logits, inputs.get("labels", labels))

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        write_files(
            Path(output_dir if output_dir is not None else self.args.output_dir),
            self.model,
            loss=self._loss_text,
            max_lr=max_lr_of(self),
            num_steps=self.state.global_step,
            tokenizer=self.processing_class,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_same_job(Path(resume_from_checkpoint), self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


class _Announcements(TrainerCallback):
    """Calibrates before the first step, and announces updates of the weights."""

    def __init__(self, trainer: QADTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.calibrate_if_needed()

    def on_optimizer_step(self, args, state, control, **kwargs):
        for group in self._trainer.quantization.groups:
            group.weights_changed()


def _split(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Return the inputs of a model, and the label of each position, int64 [rows, length]; None without labels."""
    model_inputs = {name: value for name, value in inputs.items() if name not in _LABELS}
    if (labels := inputs.get("shift_labels")) is None and (tokens := inputs.get("labels")) is not None:
        labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=NO_LOSS)
    return model_inputs, labels
