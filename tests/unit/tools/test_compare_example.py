"""examples/smollm2_135m/compare.py on more ranks than it supports."""


def test_compare_refuses_several_ranks(server):
    """With tensor parallelism each rank has a part of the logits, and amaxes are those of whole weights."""
    arguments = {"path": "examples/smollm2_135m/compare.py", "argv": ["--hf-model", "x", "--text", "y"], "ranks": 2}
    output = server.run("script_jobs:script", 1, arguments, fails=True)
    assert "error: compare.py runs on one rank" in output and "Traceback" not in output
