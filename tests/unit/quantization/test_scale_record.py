"""Tests of the scale settings in ``qad.json``: what is written, and what older versions wrote."""

import pytest

from megatron_qad.engine import QADError
from megatron_qad.quantization.scale_record import recorded_scales, scale_record
from megatron_qad.quantization.scale_settings import ScaleSetting

EXPERTS = {f"decoder.layers.1.mlp.experts.experts.{i}.linear_fc1.weight": "nvfp4" for i in range(512)}
FORMATS = {"decoder.layers.0.mixer.in_proj.weight": "fp8", "output_layer.weight": "nvfp4-w4a16"} | EXPERTS


def test_settings_are_read_as_they_were_written():
    scales = dict.fromkeys(EXPERTS, ScaleSetting("four_over_six", "frozen"))
    scales |= {"output_layer.weight": ScaleSetting("mse")}
    record = scale_record(scales, ScaleSetting("mse"))
    # One entry for 512 experts, and none for the linear that has the default of the job.
    name = "decoder.layers.1.mlp.experts.experts.*.linear_fc1.weight"
    assert record == {"scale_rule": "mse", "scales": {name: "four_over_six:frozen"}}
    assert recorded_scales(record | {"formats": FORMATS}, "qad.json") == scales


def test_runs_without_settings_have_the_record_of_older_versions():
    scales = dict.fromkeys([*EXPERTS, "output_layer.weight"], ScaleSetting("mse"))
    assert scale_record(scales, ScaleSetting("mse")) == {"scale_rule": "mse"}
    assert recorded_scales({"scale_rule": "mse", "formats": FORMATS}, "qad.json") == scales
    oldest = recorded_scales({"formats": FORMATS}, "qad.json")
    assert set(oldest.values()) == {ScaleSetting("max", "every_step")} and oldest.keys() == scales.keys()


@pytest.mark.parametrize("text", ["mean", "mse:sometimes", "mse:frozen:frozen", 3, ""])
def test_settings_of_other_versions_are_refused(text):
    job = {"formats": FORMATS, "scales": {"output_layer.weight": text}}
    with pytest.raises(QADError, match=r"runs/qad\.json: found scales .*expected one of max, "):
        recorded_scales(job, "runs/qad.json")
