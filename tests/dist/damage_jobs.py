"""What test_damage reads damaged directories with, in one process."""

import shutil
import sys
from pathlib import Path


def read_all(directory: str, cases: list[list[str]]) -> None:
    """Damage ``directory``/run in each way, read it in three, and print what was neither refused nor right."""
    import test_damage

    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    shop = test_damage.Shop(Path(directory), None)
    shutil.copytree(shop.pristine, shop.run)
    expected = {name: reader(shop) for name, reader in READERS.items()}
    assert all(kind == "result" for kind, _ in expected.values()), expected
    readings = refused = 0
    for file, kind in cases:
        shop.damaged(file, kind)
        for name, reader in READERS.items():
            found = reader(shop)
            readings, refused = readings + 1, refused + (found[0] == "error")
            if found != expected[name] and found[0] != "error":
                print(
                    f"WRONG {name} after {kind!r} of {file}: {found[1] if found[0] != 'result' else 'another result'}"
                )
    print(f"{readings} readings, {refused} refused")
    sys.stdout.flush()


def _reader(read):
    def result(shop) -> tuple[str, object]:
        from megatron_qad.engine import QADError
        from megatron_qad.engine.run_directory import manifest

        manifest._verified.clear()  # the directory has changed under this process
        output = shop.directory / "output"
        shutil.rmtree(output, ignore_errors=True)
        try:
            read(shop, output)
        except QADError as error:
            return "error", str(error)
        except Exception as error:  # what a user would see as a traceback
            return "traceback", repr(error)
        return "result", {str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("*"))}

    return result


def _export(iteration):
    def read(shop, output):
        from megatron_qad.checkpoint.export_hf import export_hf

        export_hf(shop.run, output, "modelopt", iteration=iteration)

    return read


def _report(shop, output):
    from megatron_qad.report.report import write_report

    write_report({"QAD": shop.run}, shop.directory / "teacher", output)


READERS = {"export": _reader(_export(None)), "best": _reader(_export("best")), "report": _reader(_report)}
