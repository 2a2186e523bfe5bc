"""Files that others wrote: each damaged or hostile one is one error that names the file and what is wrong with it."""

import json

import pytest

from megatron_qad.engine import QADError
from megatron_qad.engine.text_files import read_json, read_text, read_yaml

ALIASES = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{\x00}\x00", "not UTF-8: byte 0xff at position 0"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested too deeply"),
        (b'{"a": [' + b"[" * 150 + b"]" * 150 + b"]}", "nested too deeply"),
        (b"[1]", "expected a JSON object, found a list"),
        (b'{"a": ', "not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_json_is_refused_by_name(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(QADError, match=message) as raised:
        read_json(file)
    assert str(raised.value).startswith(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 5000, "nested too deeply"),
        (ALIASES, "aliases expand to more than 100,000 values"),
        ("a: &a [*a]", "an alias contains itself"),
        ("day: 2026-13-45", "not valid YAML"),
        ("lr: 1\nseed: 2\nlr: 3", "the key 'lr' is there twice .line 3."),
        ("- a: [{b: 1, b: 1}]", "the key 'b' is there twice .line 1."),
        ("? [a]\n: 1", "not valid YAML"),
        ("a: \x01", "not valid YAML"),
        ("!!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_yaml_is_refused_by_name(content, message, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(QADError, match=message) as raised:
        read_yaml(file, "--config job.yaml")
    assert str(raised.value).startswith("--config job.yaml")


def test_text_without_its_byte_order_mark(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_text(tmp_path / "a") == "a: 1"
    assert read_yaml(tmp_path / "a", "a") == {"a": 1}
    with pytest.raises(QADError, match="cannot be read"):
        read_text(tmp_path)


def test_values_that_are_not_too_deep_or_repeated(tmp_path):
    deep = b'{"a":' * 100 + b"1" + b"}" * 100
    (tmp_path / "a.json").write_bytes(deep)
    assert read_json(tmp_path / "a.json") == json.loads(deep)
    (tmp_path / "a.yaml").write_text(
        "base: &base {a: 1}\nother: {<<: *base, b: 1}\nlist: [{a: 1}, {a: 1}]\n1: x\n'1': y"
    )
    assert read_yaml(tmp_path / "a.yaml", "a")["other"] == {"a": 1, "b": 1}
