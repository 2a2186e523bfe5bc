"""launch/pipeline.sbatch: a Hugging Face model becomes a validated NVFP4 one through jobs that wait for each other."""

import pytest
from place import ROOT
from safetensors import safe_open

STAGES = ("import", "smooth", "calibrate", "qad", "export", "validate")


def pipeline(place, *flags: str, **environment: str) -> dict[str, str]:
    """Submit; job number by stage."""
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
    return {stage: rest.split(",")[0] for stage, rest in lines}


def test_the_pipeline_ends_in_a_validated_model(place):
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

    # Each stage alone, again: what is complete is left as it is.
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
def test_a_stage_that_fails_stops_the_ones_after_it(place, image):
    """Also that of a container, whose directory of the project is not on the machine that submits it."""
    jobs = pipeline(place, QAD_STAGES="export validate", QAD_WORK=str(place.directory / "empty"), **image)
    place.cluster.wait(jobs["export"], lambda state: state["JobState"] == "FAILED", 300)
    place.cluster.wait(jobs["validate"], lambda state: state["JobState"] == "CANCELLED", 30)
    if image:  # (pyxis, which would know that option of srun's, is not here)
        assert "--container-image" in (place.directory / "empty" / "log" / "export.log").read_text()
