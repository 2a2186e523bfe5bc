"""The files next to the weights: a damaged one is refused at import, not by the server that reads it much later."""

import json

import pytest

from megatron_qad.checkpoint.model_directory import find_files
from megatron_qad.engine import QADError

TOKENIZER = json.dumps({"model": {"type": "BPE"}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "no object 'model'"),
        ("tokenizer.json", "[]", "expected a JSON object, found a list"),
        ("tokenizer.json", TOKENIZER[:-1], "not valid JSON"),
        ("tokenizer_config.json", "", "not valid JSON"),
        ("tokenizer_config.json", "\ufeff{}", "begins with a byte order mark, which transformers does not read"),
        ("tokenizer_config.json", '{"a": ' * 100_000, "nested too deeply"),
        ("chat_template.jinja", b"\xff\xfe{", "not UTF-8"),
        ("tokenizer.json", None, "is a directory, expected a file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    file = tmp_path / name
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(QADError, match=message) as raised:
        find_files(tmp_path, ["tokenizer*", "*.jinja"])
    assert str(raised.value).startswith(str(file))


def test_files_and_directories_of_a_model_are_found(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    found = find_files(tmp_path, ["tokenizer*", "additional_chat_templates"])
    assert [file.name for file in found] == ["tools.jinja", "tokenizer.json"]
