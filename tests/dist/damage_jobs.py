"""Reads damaged run directories for test_damage, all in one process."""

import shutil
import sys
from pathlib import Path


def read_all(directory: str, cases: list[list[str]]) -> None:
    """Damage ``directory``/run in each way, read it with three readers, and print wrong results that no error stops."""
    import test_damage

    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    workspace = test_damage.Workspace(Path(directory), None)
    shutil.copytree(workspace.pristine, workspace.run)
    expected = {name: reader(workspace) for name, reader in READERS.items()}
    assert all(kind == "result" for kind, _ in expected.values()), expected
    num_readings = num_refused = 0
    for file, kind in cases:
        workspace.make_damaged_run(file, kind)
        for name, reader in READERS.items():
            outcome = reader(workspace)
            num_readings, num_refused = num_readings + 1, num_refused + (outcome[0] == "error")
            if outcome != expected[name] and outcome[0] != "error":
                problem = outcome[1] if outcome[0] != "result" else "another result"
                print(f"WRONG {name} after {kind!r} of {file}: {problem}")
    print(f"{num_readings} readings, {num_refused} refused")
    sys.stdout.flush()


def _reader(read):
    def result(workspace) -> tuple[str, object]:
        from megatron_qad.engine import QADError
        from megatron_qad.engine.run_directory import manifest

        manifest._verified.clear()  # this process has changed the directory
        output = workspace.directory / "output"
        shutil.rmtree(output, ignore_errors=True)
        try:
            read(workspace, output)
        except QADError as error:
            return "error", str(error)
        except Exception as error:  # a user would see a traceback
            return "traceback", repr(error)
        return "result", {str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("*"))}

    return result


def _export(iteration):
    def read(workspace, output):
        from megatron_qad.checkpoint.export_hf import export_hf

        export_hf(workspace.run, output, "modelopt", iteration=iteration)

    return read


def _report(workspace, output):
    from megatron_qad.report.report import write_report

    write_report({"QAD": workspace.run}, workspace.directory / "teacher", output)


READERS = {"export": _reader(_export(None)), "best": _reader(_export("best")), "report": _reader(_report)}
