"""The scale settings of a run's weights in its description, ``qad.json``.

"scale_rule" is the job's default setting. "scales" has the settings that differ from it, as strings such as
"four_over_six:frozen"; all experts of a layer share one entry, with "*" as their index. Runs without such settings, and
those of versions that had none, have no "scales".
"""

from collections.abc import Mapping

from megatron_qad.quantization.names import of_all_experts
from megatron_qad.quantization.scale_settings import ScaleSetting, has_block_scale_rules


def scale_record(scales: Mapping[str, ScaleSetting], default: ScaleSetting) -> dict[str, str | dict[str, str]]:
    """Return the entries of ``qad.json`` for settings by Megatron weight name (``policy.resolve_scales``).

    Example:
        >>> scale_record({"output_layer.weight": ScaleSetting("mse", "frozen")}, ScaleSetting("max"))
        {'scale_rule': 'max', 'scales': {'output_layer.weight': 'mse:frozen'}}
    """
    different = {of_all_experts(name): str(setting) for name, setting in scales.items() if setting != default}
    return {"scale_rule": str(default)} | ({"scales": different} if different else {})


def recorded_scales(job: Mapping, where: str) -> dict[str, ScaleSetting]:
    """Return the setting of every weight with block scales, by Megatron weight name.

    Args:
        job: contents of ``qad.json``, from ``checkpoint_config.read_job``.
        where: the file, for errors.

    Raises:
        QADError: a setting that this version does not know.
    """
    default = ScaleSetting.parse(job.get("scale_rule", "max"), where)
    settings = {name: ScaleSetting.parse(text, where) for name, text in job.get("scales", {}).items()}
    return {
        name: settings.get(of_all_experts(name), default)
        for name, fmt in job["formats"].items()
        if has_block_scale_rules(fmt)
    }
