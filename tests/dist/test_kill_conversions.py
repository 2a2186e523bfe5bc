"""Killed imports and exports are continued by the next start and give the same bytes."""

from pathlib import Path

import pytest
import tiny_hybrids
import tiny_job

KILLS = (
    ("import", "part_00001.json"),
    ("import", "part_00003.json"),
    ("export", "model-00001*"),
    ("export", "model-00003*"),
)
"""What is killed, and the record after which: always a later one, because earlier ones are kept."""


def contents(*directories: Path) -> dict[str, bytes]:
    files = [(directory, file) for directory in directories for file in directory.rglob("*") if file.is_file()]
    return {f"{directory.name}/{file.relative_to(directory)}": file.read_bytes() for directory, file in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "model"
    tiny_job.write_hf(directory, tiny_hybrids.CASES["nemotron-h"])
    return directory


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.all)])
def test_killed_conversion_gives_the_same_bytes(num_ranks, source, tmp_path, server):
    job = "conversion_jobs:convert"

    def arguments(name: str) -> dict:
        (tmp_path / name).mkdir(exist_ok=True)
        return {"source": str(source), "target": f"{tmp_path}/{name}/import", "exported": f"{tmp_path}/{name}/export"}

    server.run(job, num_ranks, arguments("through"))
    whole, killed = tmp_path / "through", tmp_path / "killed"
    expected = contents(whole / "import", whole / "export")
    assert len(list((whole / "import").rglob("*.distcp"))) > 5 and len(list(whole.rglob("*.safetensors"))) > 3
    num_hit = 0
    for kind, record in KILLS:
        kill = {"after": 0, "when": f"{killed}/.{kind}.partial/progress/{record}"}
        server.run(job, num_ranks, arguments("killed"), kill=kill, fails=None)
        num_hit += bool(list(killed.glob(f".{kind}.partial/progress/{record}"))) and not (killed / kind).exists()
        visible = contents(*(path for path in (killed / "import", killed / "export") if path.exists()))
        assert visible.items() <= expected.items()  # what is visible is complete
        assert len(visible) in (0, len(contents(whole / "import")), len(expected))
    server.run(job, num_ranks, arguments("killed"))
    assert contents(killed / "import", killed / "export") == expected
    assert num_hit >= 2, "the kills came too late"
