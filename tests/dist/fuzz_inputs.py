"""The grid of damages of the fuzz test: a fixed list of (input, file, kind of damage), and how each damage is made.

Only damage that a reader can recognize is in the grid. A flipped bit in the weights of a Hugging Face model is not,
because such a model has no checksums; a flipped bit in prepared data is, because its metadata has them.
"""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHATS = "chats.jsonl"
WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MODEL_FILES = ("config.json", "model.safetensors.index.json", *WEIGHTS, "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Damage:
    """One cell of the grid."""

    input: str
    """What is damaged: "model", "config", "chats", "data" or "cache"."""
    file: str
    """File within the input, or key of config.json."""
    kind: str

    def __str__(self) -> str:
        return f"{self.input}: {self.file}: {self.kind}"

    def apply(self, directory: Path) -> None:
        """Damage the input in ``directory``, a copy of the pristine one."""
        if self.input == "config":
            _edit_config(directory / "config.json", self.file, VALUES[self.kind])
        elif self.input == "chats":
            CHAT_DAMAGES[self.kind](directory / CHATS)
        else:
            FILE_DAMAGES[self.kind](directory / self.file, random.Random(str(self)))


def _write(change: Callable[[bytes, random.Random], bytes]):
    return lambda file, choose: file.write_bytes(change(file.read_bytes(), choose))


def _flip(content: bytes, choose: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
    return bytes(damaged)


def _swap(file: Path, choose: random.Random) -> None:
    other = choose.choice(sorted(f for f in file.parent.iterdir() if f != file and f.is_file()))
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _link_out(file: Path, choose: random.Random) -> None:
    outside = file.parent.parent / f"outside-{file.name}"
    file.replace(outside)
    file.symlink_to(outside)


FILE_DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "one bit": _write(_flip),
    "truncated": _write(lambda content, choose: content[: choose.randrange(1, len(content))]),
    "empty": _write(lambda content, choose: b""),
    "zeros": _write(lambda content, choose: bytes(len(content))),
    "bytes appended": _write(lambda content, choose: content + b"\0" * 64),
    "UTF-16": _write(lambda content, choose: content.decode("latin-1").encode("utf-16")),
    "deep JSON": _write(lambda content, choose: b'{"a": ' * 100_000),
    "a list": _write(lambda content, choose: b"[]"),
    "deleted": lambda file, choose: file.unlink(),
    "a directory": lambda file, choose: (file.unlink(), file.mkdir()),
    "link out of the directory": _link_out,
    "swapped with another file": _swap,
}

VALUES = {
    "text": "12",
    "null": None,
    "true": True,
    "a list": [1],
    "an object": {"a": 1},
    "negative": -4,
    "zero": 0,
    "a fraction": 2.5,
    "NaN": float("nan"),
    "10^9": 10**9,
}
"""Value that replaces one of config.json; it must be refused, or mean the same as the original."""

INTEGERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
INTEGERS += ("intermediate_size", "vocab_size")
OTHERS = {"rms_norm_eps": ("text", "a list", "negative", "NaN"), "rope_theta": ("text", "an object", "negative", "NaN")}
OTHERS |= {"tie_word_embeddings": ("text", "a list"), "model_type": ("text", "a list", "zero")}
OTHERS |= {"architectures": ("text", "null", "a list", "an object"), "rope_scaling": ("a list", "an object", "text")}
OTHERS |= {"max_position_embeddings": ("text", "negative", "a fraction"), "hidden_act": ("text", "a list")}


def _edit_config(file: Path, key: str, value) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {key: value}))


def _edit_line(change: Callable[[dict], dict | None], number: int = 2) -> Callable[[Path], None]:
    """Change one line of the chats; ``change`` edits the object in place or returns another."""

    def edit(file: Path) -> None:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[number] = change(lines[number]) or lines[number]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


def _in_message(**values) -> Callable[[Path], None]:
    """Set keys of the assistant's last message."""
    return _edit_line(lambda line: line["messages"][-1].update(values))


def _as_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(change(file.read_bytes()))


def _in_user_message(**values) -> Callable[[Path], None]:
    return _edit_line(lambda line: line["messages"][0].update(values))


def _truncated_gzip(file: Path) -> None:
    compressed = gzip.compress(file.read_bytes())
    file.write_bytes(compressed[: len(compressed) // 2])


def _tool_calls(calls) -> Callable[[Path], None]:
    return _in_message(tool_calls=calls)


CHAT_DAMAGES: dict[str, Callable[[Path], None]] = {
    "content is null": _in_message(content=None),
    "content is a number": _in_message(content=3),
    "content is an object": _in_message(content={"text": "hello"}),
    "content is a list of text": _edit_line(
        lambda line: line["messages"][-1].update(content=[{"type": "text", "text": line["messages"][-1]["content"]}])
    ),
    "content has an image": _in_message(content=[{"type": "image_url", "image_url": {"url": "a.png"}}]),
    "content is a list of numbers": _in_user_message(content=[1, 2]),
    "a user's content is a number": _in_user_message(content=3),
    "a user's content is an object": _in_user_message(content={"a": 1}),
    "content is missing": _edit_line(lambda line: line["messages"][-1].pop("content") and None),
    "role is null": _in_message(role=None),
    "role is a number": _in_user_message(role=7),
    "role is a list": _in_user_message(role=["user"]),
    "role is missing": _edit_line(lambda line: line["messages"][0].pop("role") and None),
    "messages is null": _edit_line(lambda line: line.update(messages=None)),
    "messages is an object": _edit_line(lambda line: line.update(messages={"role": "user"})),
    "messages is a text": _edit_line(lambda line: line.update(messages="user: hello")),
    "messages is empty": _edit_line(lambda line: line.update(messages=[])),
    "a message is null": _edit_line(lambda line: line["messages"].insert(0, None)),
    "a message is a list": _edit_line(lambda line: line["messages"].insert(0, ["user", "hello"])),
    "tools is null": _edit_line(lambda line: line.update(tools=None)),
    "tools is empty": _edit_line(lambda line: line.update(tools=[])),
    "tools is a text": _edit_line(lambda line: line.update(tools="search")),
    "tool_calls is null": _tool_calls(None),
    "tool_calls is empty": _tool_calls([]),
    "tool_calls is a text": _tool_calls("search()"),
    "tool_calls has null": _tool_calls([None]),
    "the line is a list": _edit_line(lambda line: [line]),
    "the line is a number": lambda file: file.write_text(file.read_text() + "3\n"),
    "the line is truncated": lambda file: file.write_text(file.read_text()[:-20]),
    "the line is nested deeply": lambda file: file.write_text(file.read_text() + "[" * 100_000 + "\n"),
    "a lone surrogate": lambda file: file.write_text(file.read_text().replace("hello", "\\ud800", 1)),
    "UTF-16": _as_bytes(lambda content: content.decode().encode("utf-16")),
    "latin-1": _as_bytes(lambda content: content.replace(b"hello", "h\xe9llo".encode("latin-1"), 1)),
    "byte order mark": _as_bytes(lambda content: b"\xef\xbb\xbf" + content),
    "Windows line ends": _as_bytes(lambda content: content.replace(b"\n", b"\r\n")),
    "no last line end": _as_bytes(lambda content: content.rstrip(b"\n")),
    "gzip under this name": lambda file: file.write_bytes(gzip.compress(file.read_bytes())),
    "truncated gzip": _truncated_gzip,
    "zeros": _as_bytes(lambda content: bytes(len(content))),
    "empty": _as_bytes(lambda content: b""),
    "deleted": lambda file: file.unlink(),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
}


def grid(data_files: list[str], cache_files: list[str]) -> list[Damage]:
    """Return all damages, in a fixed order.

    Args:
        data_files: names of the prepared data's files.
        cache_files: names of the files in Megatron's index cache.
    """
    always = ("truncated", "empty", "zeros", "deleted", "a directory", "swapped with another file")
    json_kinds = ("UTF-16", "deep JSON", "a list")
    damages = []
    for file in MODEL_FILES:
        kinds = [*always, "link out of the directory", *(json_kinds if file.endswith(".json") else ("bytes appended",))]
        if file.startswith("tokenizer"):
            kinds.remove("deleted")  # a model may come without a tokenizer
        damages += [Damage("model", file, kind) for kind in kinds]
    damages += [Damage("config", key, kind) for key in INTEGERS for kind in VALUES if kind != "NaN"]
    damages += [Damage("config", key, kind) for key, kinds in OTHERS.items() for kind in kinds]
    damages += [Damage("chats", CHATS, kind) for kind in CHAT_DAMAGES]
    for name, files in (("data", data_files), ("cache", cache_files)):
        damages += [Damage(name, file, kind) for file in files for kind in ("one bit", *always)]
    return damages
