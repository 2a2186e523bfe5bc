"""Rows of data with images: whole documents, feature index, tiles, collation, blends, packed rows, and damage."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import MegatronTokenizer
from PIL import Image
from torch.utils.data import DataLoader

from megatron_qad.data.checks import check_data
from megatron_qad.data.data_options import DataOptions
from megatron_qad.data.dataset import QADDataset, QADDatasetConfig, SampleError
from megatron_qad.data.epochs import describe_epochs
from megatron_qad.data.images.image_rows import pack_whole_documents
from megatron_qad.data.images.tiles import Tiles
from megatron_qad.data.images.tiling import cut_tiles
from megatron_qad.data.metadata import load_metadata, loss_mask_prefix
from megatron_qad.data.provider import dataset_config, prefixes_of
from megatron_qad.engine.errors import QADError

SEQUENCE = 128
SIZES = ((64, 64), (128, 64), (64, 192), (128, 128))  # 1, 2 + 1, 3 + 1 and 4 + 1 tiles
TILES = (1, 3, 4, 5)


@pytest.fixture(scope="module")
def megatron_tokenizer(vision_dir):
    return MegatronTokenizer.from_pretrained(tokenizer_path=str(vision_dir), metadata_path={"library": "huggingface"})


@pytest.fixture
def build(megatron_tokenizer, image_settings):
    def run(blend, num_samples=40, **changes):
        settings = {
            "random_seed": 7,
            "sequence_length": SEQUENCE,
            "blend": blend,
            "split": "100,0,0",
            "tokenizer": megatron_tokenizer,
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "create_attention_mask": False,
            "images": image_settings,
        }
        config = QADDatasetConfig(**(settings | changes))
        return BlendedMegatronDatasetBuilder(QADDataset, [num_samples, 0, 0], lambda: True, config).build()[0]

    return run


@pytest.fixture
def pictures(tmp_path, write_jsonl, prepared, vision_dir, image_settings):
    """Prefix of 16 chats, of which the last has no image, and every fourth has two."""
    random = np.random.default_rng(3)
    lines = []
    for i in range(16):
        names = [f"{i}-{j}.png" for j in range(0 if i == 15 else 1 + (i % 4 == 0))]
        for j, name in enumerate(names):
            width, height = SIZES[(i + j) % 4]
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
        content = [{"type": "image", "path": name} for name in names] + [
            {"type": "text", "text": f"No. {i}?" * (i % 3)}
        ]
        lines.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": str(i)}]})
    return prepared(write_jsonl(lines, "pictures.jsonl"), vision_dir, name="pictures", images=image_settings)[0]


@pytest.fixture
def texts(write_jsonl, prepared, vision_dir):
    return prepared(write_jsonl([{"text": "plain text here"}] * 30, "texts.jsonl"), vision_dir, name="texts")[0]


def decode(path, settings):
    with Image.open(path) as image:
        return torch.from_numpy(cut_tiles(image.convert("RGB"), settings))


def documents_of(prefix):
    return [ids.tolist() for ids in IndexedDataset(prefix)]


def check_row(sample, documents, settings, folder):
    """Check a row against the documents, found by their text, and the image files. Returns the documents' numbers."""
    tokens, index = sample["tokens"].tolist(), sample["feature_index"].tolist()
    found, position = [], 0
    while position < SEQUENCE:
        match = [i for i, ids in enumerate(documents) if tokens[position : position + len(ids)] == ids]
        if not match:
            break
        found.append(match[0])
        position += len(documents[match[0]])
    assert not any(tokens[position:]) and not sample["loss_mask"][position - 1 :].any(), "the rest is padding"
    files = [path for i in found for path in sorted(folder.glob(f"{i}-*.png"))]
    expected = [decode(path, settings) for path in files]
    pixels = torch.cat(expected) if expected else torch.empty(0, 3, 64, 64, dtype=torch.uint8)
    assert torch.equal(sample["tiles"].pixels, pixels) and sample["tiles"].counts.tolist() == [len(pixels)]
    features = [n for n in index if n >= 0]
    assert features == list(range(4 * len(pixels)))
    assert [i for i, n in enumerate(index) if n >= 0] == [
        i for i, token in enumerate(tokens) if token == settings.image_token_id
    ]
    return found


def test_rows_have_whole_documents_and_their_tiles(tmp_path, build, pictures, image_settings):
    dataset, documents = build(([pictures], None)), documents_of(pictures)
    assert len(dataset) >= 40
    rows = [check_row(dataset[i], documents, image_settings, tmp_path) for i in range(len(dataset))]
    read = [i for row in rows for i in row]
    assert any(len(row) > 1 for row in rows), "the test needs rows with several documents"
    for epoch in range(len(read) // 16):
        assert sorted(read[16 * epoch : 16 * epoch + 16]) == list(range(16)), "every document once per epoch"
    assert read[:16] != read[16:32] != list(range(16)), "shuffled"
    again = build(([pictures], None))
    assert torch.equal(again[5]["tiles"].pixels, dataset[5]["tiles"].pixels)


def test_loss_is_on_answers_only(build, pictures, image_settings):
    masks, documents = documents_of(loss_mask_prefix(pictures)), documents_of(pictures)
    answers = sorted(ids[i] for ids, mask in zip(documents, masks, strict=True) for i in np.flatnonzero(mask))
    dataset = build(([pictures], None), num_samples=None)
    samples = [dataset[i] for i in range(len(dataset))]
    labels = [label for s in samples for label in s["labels"][s["loss_mask"] == 1].tolist()]
    special = {image_settings.image_token_id, image_settings.start_token_id, image_settings.end_token_id}
    assert sorted(labels) == answers and not special & set(labels)


def test_pixels_are_left_out_where_the_encoder_is_not(build, pictures):
    full, counted = (build(([pictures], None), decodes_images=decodes) for decodes in (True, False))
    for i in range(8):
        assert torch.equal(full[i]["feature_index"], counted[i]["feature_index"])
        assert torch.equal(full[i]["tiles"].counts, counted[i]["tiles"].counts)
        assert counted[i]["tiles"].pixels.shape == (0, 3, 64, 64)
    with full.without_pixels():
        assert len(full[0]["tiles"].pixels) == 0
    assert len(full[0]["tiles"].pixels) == int(full[0]["tiles"].counts)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_default_collation_joins_tiles(build, pictures, workers):
    dataset = build(([pictures], None))
    [first, *_] = DataLoader(dataset, batch_size=3, num_workers=workers)
    samples = [dataset[i] for i in range(3)]
    assert isinstance(first["tiles"], Tiles)
    assert torch.equal(first["tiles"].pixels, torch.cat([s["tiles"].pixels for s in samples]))
    assert first["tiles"].counts.tolist() == [int(s["tiles"].counts) for s in samples]
    assert torch.equal(first["feature_index"], torch.stack([s["feature_index"] for s in samples]))


def test_blends_of_images_and_texts(tmp_path, build, pictures, texts, image_settings):
    dataset, documents = build(([pictures, texts], [0.5, 0.5])), documents_of(pictures)
    kinds = []
    for i in range(40):
        sample = dataset[i]
        kinds.append(int(sample["dataset_id"]))
        if kinds[-1] == 0:
            check_row(sample, documents, image_settings, tmp_path)
        else:
            assert (sample["feature_index"] == -1).all() and sample["tiles"].counts.tolist() == [0]
            assert sample["tiles"].pixels.shape == (0, 3, 64, 64)
    assert set(kinds) == {0, 1}
    [batch, *_] = DataLoader(dataset, batch_size=8)
    assert batch["tiles"].counts.shape == (8,)


def test_jobs_without_images_read_the_same_samples_as_before(build, texts):
    assert set(build(([texts], None), images=None)[0]) == {"tokens", "labels", "loss_mask", "position_ids"}


@pytest.mark.parametrize("multiple", [1, 8])
def test_packed_rows(tmp_path, build, pictures, image_settings, multiple):
    """Documents start at multiples, nothing is dropped, and padding has the feature -1."""
    dataset = build(([pictures], None), None, inter_document_masking=True, pad_documents_to=multiple)
    documents, found, num_tiles = documents_of(pictures), [], 0
    for i in range(len(dataset)):
        sample = dataset[i]
        ends = sorted(set(sample["cu_seqlens"].tolist()))
        features = sample["feature_index"]
        assert features[features >= 0].tolist() == list(range(4 * len(sample["tiles"].pixels)))
        assert ((features >= 0) == (sample["tokens"] == image_settings.image_token_id)).all()
        for begin, end in zip(ends[:-1], ends[1:], strict=True):
            ids = sample["tokens"][begin:end].tolist()
            match = [j for j, known in enumerate(documents) if ids[: len(known)] == known]
            assert begin % multiple == 0 and (match or not any(ids))
            if match:
                found += match
                assert not any(ids[len(documents[match[0]]) :]) and not sample["loss_mask"][end - 1]
        num_tiles += int(sample["tiles"].counts)
    assert sorted(found) == list(range(16)) and num_tiles == load_metadata(pictures).images["tiles"]


def test_a_sample_that_fills_a_batch_has_no_images(build, pictures):
    sample = build(([pictures], None))[None]
    assert (sample["feature_index"] == -1).all() and not sample["tiles"].counts and not sample["loss_mask"].any()


def test_packing_by_hand():
    """Rows of 8 tokens from documents of 3, 4, 5 and 2: three epochs of one of them, and one epoch of all."""
    lengths = np.array([3, 4, 5, 2], dtype=np.int32)
    order, rows, _ = pack_whole_documents(np.array([2]), lengths, 8, 1, 3, 0)
    assert order.tolist() == [2, 2, 2] and rows.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]], "5 + 5 do not fit into 8"
    order, rows, shuffle = pack_whole_documents(np.arange(4), lengths, 8, 4, None, 1)
    sizes = [-(-int(lengths[d]) // 4) * 4 for d in order]
    cut = rows[:, 0].tolist()
    assert cut[0] == 0 and cut[-1] == 4 and shuffle.tolist() == list(range(len(cut) - 1))
    for begin, end in zip(cut[:-1], cut[1:], strict=True):
        assert sum(sizes[begin:end]) <= 8 and (end == 4 or sum(sizes[begin : end + 1]) > 8), "greedy"


def test_epochs_count_padding(build, pictures):
    config = build(([pictures], None)).config
    rows = len(build(([pictures], None), num_samples=None))
    [line, *_] = describe_epochs(config, 10 * rows)
    assert line.startswith(f"{10 * rows * SEQUENCE:,} training tokens are ")
    # Documents are packed in the order of the file there, and shuffled in an epoch: the rows may differ by some.
    assert float(line.split(" are ")[1].split()[0]) == pytest.approx(10, rel=0.3)


def check(args, images):
    options = DataOptions(calibration_samples=8, images=images)
    check_data(args, prefixes_of(dataset_config(args, options)), options)


def test_a_job_must_be_able_to_read_the_rows(args_for, build, pictures, image_settings, vision_dir):
    model = ("--tokenizer-model", str(vision_dir))
    args = args_for("--data-path", pictures, "--seq-length", str(SEQUENCE), *model)
    check(args, image_settings)
    lengths = [len(ids) for ids in documents_of(pictures)]
    longest = int(np.argmax(lengths))
    short = args_for("--data-path", pictures, "--seq-length", str(max(lengths) - 1), *model)
    problem = rf"document {longest} has {max(lengths)} tokens, more than --seq-length {max(lengths) - 1}"
    with pytest.raises(QADError, match=problem):
        check(short, image_settings)
    with pytest.raises(QADError, match=problem):
        build(([pictures], None), sequence_length=max(lengths) - 1)
    with pytest.raises(QADError, match="was prepared with images for Tiny, but the job's model has none"):
        check(args, None)
    with pytest.raises(QADError, match=r"\(tokens_per_tile: 4, 16; the data first\)"):
        check(args, replace(image_settings, tokens_per_tile=16))


@pytest.mark.parametrize("name", ["images.bin", "images.idx", "image_refs.bin", "image_refs.idx"])
def test_damage_of_the_image_files_is_found_at_the_start(args_for, pictures, image_settings, name):
    args, file = args_for("--data-path", pictures, "--seq-length", str(SEQUENCE)), Path(f"{pictures}_{name}")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(QADError, match=name.replace(".", r"\.")):
        check(args, image_settings)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(QADError, match=rf"pictures_{name.split('.')[0]}"):
        check(args, image_settings)
    file.unlink()
    with pytest.raises(QADError, match=rf"pictures_{name.split('.')[0]}.* does not"):
        check(args, image_settings)


def test_image_files_of_other_data_are_found(tmp_path, args_for, pictures, texts, image_settings):
    metadata = Path(f"{pictures}.json")
    before = metadata.read_text()
    metadata.write_text(json.dumps(json.loads(before) | {"images": None}))
    args = args_for("--data-path", pictures, "--seq-length", str(SEQUENCE))
    with pytest.raises(QADError, match="has a SHA-256 of 'images.bin'|records no images"):
        check(args, image_settings)
    metadata.write_text(before)
    for kind in ("images", "image_refs"):
        for suffix in ("bin", "idx"):
            Path(f"{pictures}_{kind}.{suffix}").rename(tmp_path / f"{kind}.{suffix}")
    with pytest.raises(QADError, match=r"records \d+ images, but .*pictures_images.bin and .idx are missing"):
        check(args, image_settings)


def test_a_row_that_does_not_match_its_images_is_not_read(build, pictures, image_settings):
    """The same files, but each image of one tile has three: the tokens no longer match."""
    refs = np.fromfile(f"{pictures}_image_refs.bin", dtype=np.int32).reshape(-1, 3)
    assert set(refs[:, 2]) == set(TILES)
    for column, change, problem in (
        (2, np.where(refs[:, 2] == 1, 3, refs[:, 2]), "where its . images have .* features"),
        (0, refs[:, 0] + 1, "where its . images have .* features"),
        (1, refs[:, 1] + 1000, r"image 1\d\d\d does not exist"),
        (1, np.roll(refs[:, 1], 1), "tiles, but its document has places for"),
    ):
        changed = refs.copy()
        changed[:, column] = change
        changed.tofile(f"{pictures}_image_refs.bin")
        dataset = build(([pictures], None))
        with pytest.raises(SampleError, match=problem):
            for i in range(len(dataset)):
                dataset[i]
    shutil.rmtree(f"{pictures}/cache", ignore_errors=True)
