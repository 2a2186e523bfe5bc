"""launch/pipeline.sbatch converts a Hugging Face model to a validated NVFP4 model in a chain of dependent jobs."""

import pytest
from place import ROOT
from safetensors import safe_open

STAGES = ("import", "smooth", "ptq", "qad", "export", "validate")


def pipeline(place, *flags: str, **environment: str) -> dict[str, str]:
    """Submit the pipeline and return the job ID of each stage."""
    config = ["--config", f"{place.directory}/train.yaml", "--tensor-model-parallel-size", "1"]
    data = ["--data-path", f"{place.directory}/data", "--data-cache-path", f"{place.directory}/cache"]
    output = place.cluster.slurm(
        *("bash", "launch/pipeline.sbatch", *config, *data, *flags),
        cwd=ROOT,
        environment=place.environment(
            **{"QAD_MODEL": f"{place.directory}/hf_teacher", "QAD_WORK": f"{place.directory}/work"}
            | {"NPROC_PER_NODE": "1"}
            | environment
        ),
    )
    lines = [line.split(": job ") for line in output.splitlines()]
    return {stage: description.split(",")[0] for stage, description in lines}


def test_pipeline_produces_validated_model(place):
    work = place.directory / "work"
    jobs = pipeline(place, "--train-iters", "4", QAD_STAGES=" ".join(STAGES))
    assert tuple(jobs) == STAGES
    for earlier, later in zip(STAGES, STAGES[1:], strict=False):
        dependency = place.cluster.state(jobs[later])["Dependency"]
        assert dependency.startswith(f"afterok:{jobs[earlier]}"), dependency
    for stage in STAGES:
        place.cluster.wait(
            jobs[stage], lambda state: state["JobState"] == "COMPLETED", 300, work / "log" / f"{stage}.log"
        )
    assert "unchanged, bit for bit" in (work / "log" / "smooth.log").read_text()
    assert f"teacher from {work}/smoothed, frozen" in (work / "log" / "qad.log").read_text()
    assert ": valid" in (work / "log" / "validate.log").read_text()
    with safe_open(work / "hf-modelopt" / "model.safetensors", framework="pt") as file:
        assert sum(name.endswith("weight_scale_2") for name in file.keys()) == 2 * 7  # noqa: SIM118 (no mapping)

    # Running stages again keeps complete outputs.
    written = {
        file: file.stat().st_mtime_ns
        for part in ("teacher", "smoothed", "hf-modelopt")
        for file in work.glob(f"{part}/**/*")
    }
    jobs = pipeline(place, QAD_STAGES="import smooth export")
    assert tuple(jobs) == ("import", "smooth", "export")
    place.cluster.wait(jobs["export"], lambda state: state["JobState"] == "COMPLETED", 300)
    assert {file: file.stat().st_mtime_ns for file in written} == written


@pytest.mark.parametrize("image", [{}, {"QAD_HOME": "/opt/megatron_qad", "QAD_IMAGE": "absent"}], ids=["", "image"])
def test_failed_stage_cancels_later_stages(place, image):
    """Also in a container, where the project's directory does not exist on the machine that submits the job."""
    jobs = pipeline(place, QAD_STAGES="export validate", QAD_WORK=str(place.directory / "empty"), **image)
    place.cluster.wait(jobs["export"], lambda state: state["JobState"] == "FAILED", 300)
    place.cluster.wait(jobs["validate"], lambda state: state["JobState"] == "CANCELLED", 30)
    if image:  # srun does not know the option, because pyxis is not installed here
        assert "--container-image" in (place.directory / "empty" / "log" / "export.log").read_text()
