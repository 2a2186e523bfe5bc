"""Finds the tensors of a Hugging Face model under the other names that its files may have, and reports missing ones.

Other names are those of transformers 5 (``Family.aliases``), and those of a base model without a head, as
``AutoModel.save_pretrained`` writes it: ``layers.0...`` for ``model.layers.0...``. A tied head may be stored a second
time, or instead of the embedding.
"""

from collections.abc import Iterable, Sequence

from megatron_qad.checkpoint.hf_reader import HFReader
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import Family, ParamMapping


def resolve(reader: HFReader, maps: Sequence[ParamMapping]) -> None:
    """Rename the tensors of ``reader`` to the names in ``maps``, and check that no tensor is missing or unexpected.

    Raises:
        QADError: a missing or unexpected tensor, or a tensor that is stored under two names with different values.
    """
    family, expected = family_of(reader.config), {name for m in maps for name in m.hf}
    embedding = next(m for m in maps if m.kind == "embedding").hf[0]
    prefix = embedding.rsplit(".", 2)[0]
    reader.rename(family.aliases | _base_model_names({*expected, *family.aliases}, prefix, family))
    reader.rename(
        _tied_heads(family, reader.config, embedding),
        "tie_word_embeddings is true, and loaders disagree which one is the head. Set it to false, or remove the head",
    )
    unexpected = reader.names - expected - set(passthrough_names(reader))
    unexpected = {name for name in unexpected if not name.endswith("rotary_emb.inv_freq")}  # computed, not learned
    if unexpected:
        first = min(unexpected)
        prefix = next((first.removesuffix(name) for name in sorted(expected) if first.endswith(f".{name}")), None)
        advice = (
            f"Remove the prefix {prefix!r} from the names; torch.compile, DDP and PEFT add such prefixes."
            if prefix
            else "Check the architecture in config.json, or download the model again."
        )
        raise QADError(
            f"{reader.directory}: {len(unexpected)} tensors are not part of the model, first {first!r}. {advice}"
        )
    if missing := expected - reader.names:
        _raise_missing(reader, missing, next((m.hf[0] for m in maps if m.kind == "head"), None))


def passthrough_names(reader: HFReader) -> list[str]:
    """Return the names of the tensors that are passed through from import to export unchanged."""
    prefixes = family_of(reader.config).passthrough_prefixes
    return sorted(name for name in reader.names if name.startswith(prefixes))


def _base_model_names(names: Iterable[str], prefix: str, family: Family) -> dict[str, str]:
    """Return {name in a base model: name}; ``prefix`` is that of the base model, such as "language_model.backbone"."""
    outer = prefix.rpartition(".")[0]
    outer = f"{outer}." if outer else ""
    inner = {name: name.removeprefix(f"{prefix}.") for name in names if name.startswith(f"{prefix}.")}
    # transformers 5 calls every base model "model", also Nemotron-H's, which is "backbone" on the hub.
    return {
        stem + rest: family.aliases.get(name, name)
        for name, rest in inner.items()
        for stem in (outer, f"{outer}model.")
    }


def _tied_heads(family: Family, config: dict, embedding: str) -> dict[str, str]:
    """Return {head: embedding} if the head is tied: some files store it a second time, some instead."""
    return {linear.hf[0]: embedding for linear in family.linears(config) if linear.is_tied}


def _raise_missing(reader: HFReader, missing: set[str], head: str | None) -> None:
    if missing == {head}:
        raise QADError(
            f"{reader.directory}: {head} is missing, and config.json does not tie it to the embedding. A base model "
            "(saved by AutoModel) has no head: give the model that AutoModelForCausalLM saves. If the head is the "
            "embedding, set tie_word_embeddings to true in config.json."
        )
    raise QADError(
        f"{reader.directory}: {len(missing)} tensors are missing, first {sorted(missing)[0]!r}. Download the model "
        "again."
    )
