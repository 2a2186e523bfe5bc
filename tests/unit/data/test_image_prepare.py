"""Preparation of records with images: every input format, bad rows by name, placeholders, masks and stored files."""

import base64
import io
import json
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from PIL import Image
from tiny_configs import TINY_OF_FAMILY

from megatron_qad.cli.commands import prepare_command
from megatron_qad.data.images.image_files import StoredImages
from megatron_qad.data.metadata import load_metadata, loss_mask_prefix, output_files
from megatron_qad.data.prepare import PrepareOptions, prepare_data
from megatron_qad.data.tokenizer import load_tokenizer
from megatron_qad.engine.errors import QADError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = {"role": "assistant", "content": "A dog."}


@pytest.fixture
def prepare(prepared, vision_dir, image_settings):
    """``prepare(inputs)``: prepare records for the tiny model and return the prefix."""

    def run(inputs, tokenizer=vision_dir, **options):
        return prepared(inputs, tokenizer, images=image_settings, **options)[0]

    return run


def shown(prefix, directory, document=0):
    """Return the text of a document, with ``<n>`` instead of n placeholders."""
    text = load_tokenizer(directory).hf.decode(documents(prefix)[document])
    text = re.sub("(<image>)+", lambda match: f"<{match.group().count('<image>')}>", text)
    return text.removesuffix("\n<|im_end|>")  # the template's newline and EOD


def documents(prefix):
    return [ids.tolist() for ids in IndexedDataset(prefix)]


def refs(prefix, document=0):
    return StoredImages(prefix, mmap=True).refs(document).tolist()


def data_url(path) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def image_parts(*sources):
    return [{"type": "image_url", "image_url": {"url": str(source)}} for source in sources]


def question(*parts):
    return {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}


EXPECTED = "<|im_start|>user\n<img><4></img>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>"


def test_llava(write_image, write_jsonl, prepare, vision_dir):
    write_image("dog.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    prefix = prepare(write_jsonl([{"image": image, "conversations": turns} for image in ("dog.png", ["dog.png"])]))
    assert shown(prefix, vision_dir) == shown(prefix, vision_dir, 1) == EXPECTED
    assert refs(prefix) == refs(prefix, 1) == [[shown_offset(prefix, vision_dir), 0, 1]]


def shown_offset(prefix, directory):
    return documents(prefix)[0].index(load_tokenizer(directory).vocab["<image>"])


def test_content_lists(write_image, write_jsonl, prepare, vision_dir):
    """OpenAI's and Hugging Face's forms; vLLM puts images before the text for templates that take strings."""
    path = write_image("dog.png")
    sources = [
        image_parts(data_url(path))[0],
        image_parts("dog.png")[0],
        image_parts(f"file://{path}")[0],
        {"type": "image_url", "image_url": "dog.png"},
        {"type": "input_image", "image_url": str(path)},
        *({"type": "image", key: "dog.png"} for key in ("image", "path", "url")),
        {"type": "image", "image": {"path": None, "bytes": base64.b64encode(path.read_bytes()).decode()}},
    ]
    lines = [{"messages": [question(part), ANSWER]} for part in sources]
    lines += [{"messages": [question({"type": "image"}), ANSWER], key: v} for key, v in COLUMNS]
    after = {"role": "user", "content": [*question()["content"], sources[0]]}
    prefix = prepare(write_jsonl([*lines, {"messages": [after, ANSWER]}]))
    assert {shown(prefix, vision_dir, i) for i in range(len(lines) + 1)} == {EXPECTED}
    assert load_metadata(prefix).images["images"] == 1, "equal files are stored once"
    assert StoredImages(prefix, mmap=True).data(0) == path.read_bytes(), "as it was given"


COLUMNS = (("images", ["dog.png"]), ("image", "dog.png"), ("images", [{"path": "dog.png"}]))


def test_templates_that_render_parts_get_them(write_image, write_jsonl, prepare, vision_parts_dir):
    write_image("dog.png")
    write_image("cat.png", 128, 64)  # two tiles and the thumbnail
    text = [{"type": "text", "text": word} for word in ("First ", ", then ", ".")]
    images = image_parts("dog.png", "cat.png")
    content = [text[0], images[0], text[1], images[1], text[2]]
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    lines = [{"messages": [{"role": "user", "content": content}, ANSWER]}, {"image": "dog.png", "conversations": turns}]
    prefix = prepare(write_jsonl(lines), tokenizer=vision_parts_dir)
    first, second = (shown(prefix, vision_parts_dir, i).split("<|im_end|>")[0] for i in range(2))
    assert first == "<|im_start|>user\nFirst <img><4></img>, then <img><12></img>."
    assert second == "<|im_start|>user\n<img><4></img>What is it?", "LLaVA's newline is the template's business"
    assert [tiles for *_, tiles in refs(prefix)] == [1, 3]


def test_parquet_and_saved_datasets(tmp_path, write_image, prepare, vision_dir):
    path = write_image("dog.png")
    answer = ANSWER | {"content": [{"type": "text", "text": ANSWER["content"]}]}  # a column has one type
    rows = {
        "messages": [[question({"type": "image"}), answer]] * 2,
        "images": [[{"bytes": path.read_bytes(), "path": None}]] * 2,
    }
    plain = datasets.Dataset.from_dict(rows)
    decoded = plain.cast_column("images", datasets.List(datasets.Image()))
    decoded.to_parquet(str(tmp_path / "images.parquet"))
    plain.to_parquet(str(tmp_path / "structs.parquet"))
    decoded.save_to_disk(str(tmp_path / "saved"))
    for i, name in enumerate(("images.parquet", "structs.parquet", "saved")):
        prefix = prepare(str(tmp_path / name), name=f"out{i}")
        assert shown(prefix, vision_dir) == shown(prefix, vision_dir, 1) == EXPECTED
        assert StoredImages(prefix, mmap=True).data(0) == path.read_bytes()


def write_tar(path, members):
    with tarfile.open(path, "w:gz" if str(path).endswith("gz") else "w") as shard:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_shards(tmp_path, write_image, prepare, vision_dir, suffix):
    dog, cat = write_image("dog.png").read_bytes(), write_image("cat.png", 128, 64).read_bytes()
    asked = {"messages": [question({"type": "image"}), ANSWER]}
    named = {"messages": [question(*image_parts("right.png")), ANSWER]}
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    members = [
        ("a/1.json", json.dumps(asked).encode()),
        ("a/1.png", dog),
        ("a/2.left.png", cat),
        ("a/2.right.png", dog),
        ("a/2.json", json.dumps(named).encode()),
        ("a/2.txt", b"a caption"),
        ("a/3.json", json.dumps({"conversations": turns}).encode()),
        ("a/3.jpg", dog),
        ("b/3.png", dog),
    ]
    prefix = prepare(write_tar(tmp_path / f"shard{suffix}", members), max_bad_fraction=0.5)
    assert [shown(prefix, vision_dir, i) for i in range(3)] == [EXPECTED] * 3
    bad = Path(f"{prefix}.bad.txt").read_text()
    assert bad == f"{tmp_path}/shard{suffix}:4: the sample 'b/3' has 0 .json files, expected one\n"
    Path(tmp_path / "cut.tar").write_bytes(Path(write_tar(tmp_path / "x.tar", members)).read_bytes()[:2000])
    with pytest.raises(QADError, match="cut.tar: the tar shard is damaged"):
        prepare(str(tmp_path / "cut.tar"), name="cut")
    with pytest.raises(QADError, match="x.tar: is a tar shard. Give --images-for"):
        prepare_data(PrepareOptions([str(tmp_path / "x.tar")], str(vision_dir), str(tmp_path / "y")))


BAD = [
    (question(*image_parts("missing.png")), {}, "messages[0]: content[0]: the file 'missing.png' does not exist in"),
    (question(*image_parts("text.png")), {}, "the file 'text.png' is 5 bytes without an image of the formats"),
    (question(*image_parts("../up.png")), {}, "the file '../up.png' is outside of"),
    (question(*image_parts("/etc/hostname")), {}, "outside of"),
    (question(*image_parts("https://example.org/dog.png")), {}, "is not a local file. Images are not downloaded"),
    (question(*image_parts("data:image/png;base64,!!!")), {}, "the base64 text of the image is damaged"),
    (question(*image_parts("data:image/png,abc")), {}, "is not 'data:image/...;base64,...'"),
    (question({"type": "image"}), {}, "names no image, and 'images' has no further one"),
    (question({"type": "image", "image": 3}), {}, "expected a path, a data URL or bytes of an image, found 3"),
    (question({"type": "audio"}), {}, "has the type 'audio'"),
    (question({"type": "image"}), {"images": ["dog.png"] * 2}, "'images' has 2 images, but the messages have 1 image"),
    (question({"type": "image"}), {"images": ["dog.png"], "image": "dog.png"}, "has both 'image' and 'images'"),
    ({"role": "user", "content": "What?"}, {"image": "dog.png"}, "has 0 places for images (<image> in user messages)"),
    ({"role": "user", "content": "<image> <image>"}, {"image": "dog.png"}, "has 2 places for images"),
    ({"role": "assistant", "content": image_parts("dog.png")}, {}, "is an image in a message of the assistant"),
]


def test_bad_records_are_named(tmp_path, write_image, write_jsonl, prepare):
    write_image("dog.png")
    (tmp_path / "text.png").write_text("hello")
    lines = [{"messages": [message, ANSWER], **columns} for message, columns, _ in BAD]
    prefix = prepare(write_jsonl([*lines, {"messages": [question(), ANSWER]}]), max_bad_fraction=1)
    bad = Path(f"{prefix}.bad.txt").read_text().splitlines()
    assert len(bad) == len(BAD)
    for i, (line, (*_, reason)) in enumerate(zip(bad, BAD, strict=True), start=1):
        assert line.startswith(f"{tmp_path}/input.jsonl:{i}: ") and reason in line, line
    metadata = load_metadata(prefix)
    assert metadata.images is None and not [f for f in output_files(prefix) if "image" in f.name and f.exists()]


def test_without_the_flag_images_are_bad_lines(write_image, write_jsonl, prepared, vision_dir):
    write_image("dog.png")
    lines = [{"messages": [question(*image_parts("dog.png")), ANSWER]}, {"text": "a <image>"}]
    prefix, _ = prepared(write_jsonl(lines), vision_dir, max_bad_fraction=0.5)
    assert "only text can be used, not images" in Path(f"{prefix}.bad.txt").read_text()
    with pytest.raises(QADError, match="--image-root without --images-for"):
        prepared(write_jsonl(lines), vision_dir, name="other", image_root="/")


def test_image_root(tmp_path, write_image, write_jsonl, prepare, vision_dir):
    write_image("pictures/dog.png")
    line = {"messages": [question(*image_parts("dog.png")), ANSWER]}
    assert shown(prepare(write_jsonl([line]), image_root=str(tmp_path / "pictures")), vision_dir) == EXPECTED
    with pytest.raises(QADError, match="nowhere: is not a directory"):
        prepare(write_jsonl([line]), image_root="nowhere", force=True)


@pytest.mark.parametrize("parts", [False, True])
def test_a_literal_image_token_is_text(
    parts, write_image, write_jsonl, prepare, vision_dir, vision_parts_dir, image_settings
):
    """In texts next to images, in answers, in tools' results and in plain text it becomes ordinary tokens."""
    write_image("dog.png")
    directory = vision_parts_dir if parts else vision_dir
    content = [{"type": "text", "text": "Is <image> a token?"}, *image_parts("dog.png")]
    answer = {"role": "assistant", "content": "Yes, <image>."}
    turns = [{"from": "human", "value": "Say <image>"}, {"from": "gpt", "value": "<image>"}]
    lines = [{"messages": [{"role": "user", "content": content}, answer]}, {"conversations": turns}]
    lines += [{"text": "<image> and <image>"}, {"input_ids": [10, image_settings.image_token_id]}]
    prefix = prepare(write_jsonl(lines), tokenizer=directory, max_bad_fraction=0.25)
    assert [ids.count(image_settings.image_token_id) for ids in documents(prefix)] == [4, 0, 0]
    texts = [shown(prefix, directory, i) for i in range(3)]
    # The decoder shows ordinary tokens as the same characters, here <1> for each literal.
    image = "<img><4></img>"
    expected = f"Is <1> a token?{image}" if parts else f"{image}\nIs <1> a token?"
    assert texts[0].startswith(f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\nYes, <1>.<|im_end|>")
    assert texts[1].startswith("<|im_start|>user\nSay <1><|im_end|>\n<|im_start|>assistant\n<1><|im_end|>")
    assert texts[2] == "<1> and <1><|im_end|>"
    assert "has 1 tokens <image> (id 3), but its 0 images have 0 features" in Path(f"{prefix}.bad.txt").read_text()


def test_images_never_count_in_the_loss(write_image, write_jsonl, prepare, vision_dir, image_settings):
    """Only the answers count, in every turn."""
    write_image("dog.png")
    write_image("cat.png", 128, 64)
    turn = [question(*image_parts("dog.png", "cat.png")), ANSWER]
    prefix = prepare(write_jsonl([{"messages": turn * 2}]))
    [ids], [mask] = (np.array(documents(name)) for name in (prefix, loss_mask_prefix(prefix)))
    assert load_tokenizer(vision_dir).hf.decode(ids[mask == 1]) == "A dog.<|im_end|>" * 2
    assert [tiles for *_, tiles in refs(prefix)] == [1, 3] * 2
    for offset, _, tiles in refs(prefix):
        end = offset + 4 * tiles
        assert (ids[offset:end] == image_settings.image_token_id).all()
        assert (ids[offset - 1], ids[end]) == (image_settings.start_token_id, image_settings.end_token_id)


def test_chats_of_several_documents_have_the_images_so_far(write_image, write_jsonl, prepare, make_hf_dir):
    """The template rewrites earlier answers, so that each turn is a document."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else '...' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    directory = make_hf_dir(template, specials=["<image>", "<img>", "</img>"])
    write_image("dog.png")
    write_image("cat.png", 128, 64)
    first, second = question(*image_parts("dog.png")), question(*image_parts("cat.png"))
    prefix = prepare(write_jsonl([{"messages": [first, ANSWER, second, ANSWER]}]), tokenizer=directory)
    assert [[ref[1:] for ref in refs(prefix, i)] for i in range(2)] == [[[0, 1]], [[0, 1], [1, 3]]]


def test_workers_and_held_out_records(tmp_path, write_image, write_jsonl, prepare):
    """Two workers write the same files as one; questions about one image are on the same side."""
    for i in range(8):
        write_image(f"{i}.png", color=(i, 0, 0))
    lines = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": f"No. {j}"}, *parts]}, ANSWER]}
        for i in range(8)
        for j in range(3)
        for parts in [image_parts(f"{i}.png")]
    ]
    path = write_jsonl(lines)
    one = prepare(path, name="one", validation_fraction=0.5)
    two = prepare(path, name="two", validation_fraction=0.5, workers=2)
    for side in ("", "_valid"):
        for a, b in zip(output_files(one + side), output_files(two + side), strict=True):
            assert a.read_bytes() == b.read_bytes(), a
    counts = [load_metadata(one + side).images for side in ("", "_valid")]
    assert sum(c["images"] for c in counts) == 8 and sum(c["uses"] for c in counts) == 24
    assert all(c["uses"] == 3 * c["images"] > 0 for c in counts)


def test_replacing_an_output_removes_its_images(write_image, write_jsonl, prepare, prepared, vision_dir):
    write_image("dog.png")
    prefix = prepare(write_jsonl([{"messages": [question(*image_parts("dog.png")), ANSWER]}]))
    assert all(file.exists() for file in output_files(prefix))
    prepared(write_jsonl([{"text": "plain"}]), vision_dir, force=True)
    assert [f.name for f in output_files(prefix) if f.exists()] == ["out.bin", "out.idx", "out.json"]


def test_a_tokenizer_without_the_tokens_is_named(write_image, write_jsonl, prepare, hf_dir):
    write_image("dog.png")
    with pytest.raises(QADError, match="the id of <image> is None, expected 3, with which Tiny marks images"):
        prepare(write_jsonl([{"messages": [question(*image_parts("dog.png")), ANSWER]}]), tokenizer=hf_dir)


def test_large_images_are_not_large_chats(tmp_path, write_jsonl, prepare):
    """A chat may have 8 MiB of text; base64 text of images does not count."""
    noise = np.random.default_rng(0).integers(0, 256, (1800, 1800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    line = {"messages": [question(*image_parts(data_url(tmp_path / "noise.png"))), ANSWER]}
    assert len(json.dumps(line)) > 1 << 23
    assert load_metadata(prepare(write_jsonl([line]))).documents == 1


def test_a_tokenizer_that_splits_the_image_token_is_named(write_image, write_jsonl, prepare, make_hf_dir):
    """The vocabulary has the token, but text never becomes it."""
    directory = make_hf_dir(CHATML, specials=["<image>", "<img>", "</img>"])
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    file.write_text(json.dumps(content))
    write_image("dog.png")
    with pytest.raises(QADError, match="image 0 has no tokens <image>"):
        prepare(write_jsonl([{"messages": [question(*image_parts("dog.png")), ANSWER]}]), tokenizer=directory)


def test_the_command_line(tmp_path, write_image, write_jsonl, vision_dir, image_settings, capsys):
    """The model's config gives the tiles, its preprocessor their number, and the tokenizer the ids."""
    config = TINY_OF_FAMILY["nemotron_vl"] | {"force_image_size": 64, "img_context_token_id": 3}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (model / "preprocessor_config.json").write_text(json.dumps({"max_num_tiles": 2}))
    write_image("pictures/dog.png", 640, 64)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    inputs = ["--input", write_jsonl([{"image": "dog.png", "conversations": turns}])]
    flags = ["--images-for", str(model), "--image-root", str(tmp_path / "pictures"), "--output", str(tmp_path / "out")]
    prepare_command.main([*inputs, "--tokenizer", str(vision_dir), *flags])
    assert "out: 1 different image in 1 place of 1 document, 3 tiles" in capsys.readouterr().out
    settings = load_metadata(str(tmp_path / "out")).image_settings()
    assert (settings.tile_size, settings.max_tiles, settings.image_token_id) == (64, 2, 3)
    assert refs(str(tmp_path / "out"))[0][2] == 3
    with pytest.raises(QADError, match="nowhere"):
        prepare_command.main(
            [*inputs, "--tokenizer", str(vision_dir), *flags[2:], "--images-for", "nowhere", "--force"]
        )
