"""Reading an adapter of PEFT: every tensor finds its place in a decoder, or the adapter is refused."""

import dataclasses
import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sft_jax.errors import UserError
from sft_jax.hf.files import TensorDirectory, read_header
from sft_jax.hf.peft.carriers import TIED_HEAD, Factors, carriers, carriers_in_files, module_tensors
from sft_jax.hf.peft.settings import WEIGHTS, Settings, read_settings
from sft_jax.hf.source import PARAM_DTYPES
from sft_jax.model.adapters import AdapterPlan, ModulePlan, adaptable, check_plan
from sft_jax.model.decoder import Decoder

PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(.+?)((?:\.base_layer)*)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?")
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_EXPERTS = ("gate_up_proj", "down_proj")

Values = dict[str, list[tuple[tuple[int, ...], np.ndarray]]]  # by path of a parameter: slices of it, with their index


@dataclass(frozen=True)
class Adapter:
    """An adapter as the numbers of a decoder."""

    settings: Settings
    plan: AdapterPlan
    values: Values  # what the parameters of `plan` are
    unchanged: Values  # what the file repeats of the base, which must be equal to it
    digest: str  # of the file of tensors


def read_adapter(folder: Path, decoder: Decoder) -> Adapter:
    """Reads the adapter in `folder` for the base `decoder`, abstract or not.

    Raises UserError naming the file and what is wrong: a setting that is not computed here, a tensor without a place in
    this model or of another shape, a tied head that is changed on one side only.
    """
    settings, tensors = read_settings(folder), _open(folder)
    sorted_ = _Sorted(tensors, settings, decoder)
    parts: dict[str, list[tuple[tuple[int, ...], Factors]]] = {}
    for name in sorted_.low_rank_names():
        carrier, factors = sorted_.carriers[name], sorted_.factors(name)
        for number, path in enumerate(carrier.paths):
            parts.setdefault(path, []).append((carrier.index, carrier.part(factors, number)))
    modules, values = [], {}
    for path in (path for path, _ in adaptable(decoder) if path in parts):
        rank, scale = max(part.rank for _, part in parts[path]), parts[path][0][1].scale
        modules.append(ModulePlan(path, rank, scale, magnitude=settings.dora, start=False))
        for index, part in parts[path]:
            _add(values, f"{path}.adapter", index, part, rank, scale)
    tokens = {True: (), False: ()}  # by whether they are of the embedding
    for module, of_module in sorted_.rows.items():
        of_embedding = sorted_.carriers[module].embedding
        rows = sorted_.read(f"{module}.token_adapter.trainable_tokens_delta", (len(of_module), decoder.spec.hidden_size))
        tokens[of_embedding] = ids = tuple(sorted(of_module))
        place = "embed.token_rows.rows" if of_embedding else "head_rows.rows"
        values[place] = [((ids.index(token),), row) for token, row in zip(of_module, rows, strict=True)]
    whole, unchanged = sorted_.whole()
    plan = AdapterPlan(tuple(modules), settings.dropout, tokens[True], tokens[False], tuple(whole), settings.rslora)
    try:
        check_plan(dataclasses.replace(plan, dropout=0.0), decoder)  # that of the file is for training only
    except UserError as error:
        raise UserError(f"{folder / WEIGHTS}: {error}") from error
    if not (modules or sorted_.rows or whole):
        raise UserError(f"{folder / WEIGHTS}: holds no adapter; it was saved from a model that has none.")
    with open(folder / WEIGHTS, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Adapter(settings, plan, values | whole, unchanged, digest)


def _open(folder: Path) -> TensorDirectory:
    if not (folder / WEIGHTS).is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("adapter_model.*"))) or "nothing like it"
        raise UserError(
            f"{folder}: holds no {WEIGHTS}, but {others}; save the adapter as safetensors, which runs no code when it is read."
        )
    tensors = TensorDirectory(folder, read_header(folder / WEIGHTS))
    for info in tensors.tensors.values():
        if info.dtype.name not in PARAM_DTYPES:
            raise UserError(f"{info.file}: tensor '{info.name}' is {info.dtype.name}; adapters are {', '.join(PARAM_DTYPES)}.")
    return tensors


def _add(values: Values, path: str, index: tuple[int, ...], part: Factors, rank: int, scale: float) -> None:
    """Adds the matrices of one slice of a stack, of which all have the same rank and scale.

    Where the file has them differ, zeros fill up the rank, which stay zero in training, and b takes the difference in scale.
    """
    missing = [(0, 0)] * (part.a.ndim - 2) + [(0, rank - part.rank), (0, 0)]
    a, b = np.pad(part.a, missing), np.pad(part.b.swapaxes(-1, -2), missing)
    values.setdefault(f"{path}.a", []).append((index, a.swapaxes(-1, -2)))
    values.setdefault(f"{path}.b", []).append((index, b * np.float32(part.scale / scale)))
    if part.magnitude is not None:
        values.setdefault(f"{path}.magnitude", []).append((index, part.magnitude))


class _Sorted:
    """The tensors of an adapter by what they are."""

    def __init__(self, tensors: TensorDirectory, settings: Settings, decoder: Decoder):
        self._tensors, self._settings = tensors, settings
        self._names = {name.removeprefix(PREFIX): name for name in tensors.tensors}
        self.carriers = {carrier.name: carrier for carrier in (*carriers_in_files(decoder), *carriers(decoder))}
        self._base = {tensor.name: tensor for tensor in module_tensors(decoder)}
        self._tied, self._vocab_size = decoder.spec.tied_head, decoder.spec.vocab_size
        self.low_rank: dict[str, dict[str, str]] = {}  # name of a carrier -> part -> tensor
        self.rows: dict[str, list[int]] = {}  # name of an embedding or head -> ids of its rows
        self._whole: dict[str, str] = {}  # tensor of the base -> tensor
        for name in self._names:
            self._sort(name)

    def _sort(self, name: str) -> None:
        if found := _LOW_RANK.fullmatch(name):
            self.low_rank.setdefault(self._carrier_of(name, found[1], found[2]), {})[found[3]] = name
        elif found := _ROWS.fullmatch(name):
            self.rows[found[1]] = self._ids_of(name, found[1])
        else:
            bare = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if bare not in self._base and not (self._tied and bare == f"{TIED_HEAD}.weight"):
                raise self._misplaced(name)
            self._whole[bare] = name

    def _carrier_of(self, name: str, module: str, inner: str) -> str:
        """Returns the name of what carries an adapter. That of the two parameters of experts one wraps the other."""
        if module in self.carriers and not inner:
            return module
        outer, inside = (f"{module}.{parameter}" for parameter in reversed(_EXPERTS))
        if outer not in self.carriers or inner not in ("", ".base_layer"):
            raise self._misplaced(name)
        if inner or not any(parameter.endswith(_EXPERTS[1]) for parameter in self._settings.parameters):
            return inside
        return outer

    def _ids_of(self, name: str, module: str) -> list[int]:
        """Returns the ids of the rows of an embedding or head; the key of a list by module is the end of its name."""
        tokens = self._settings.tokens
        if module not in self.carriers or (self._tied and module == TIED_HEAD):
            raise self._misplaced(name)
        if isinstance(tokens, Mapping):
            tokens = next((ids for key, ids in tokens.items() if module.endswith(key)), None)
        if tokens is None:
            raise UserError(
                f"{self._settings.where}: trainable_token_indices names no tokens for '{module}', which the file has; config and "
                "tensors must be of the same adapter."
            )
        wrong = [token for token in tokens if not 0 <= token < self._vocab_size or tokens.count(token) > 1]
        if wrong:
            raise UserError(
                f"{self._settings.where}: trainable_token_indices holds {wrong[0]} twice, or it is no token of this model, which "
                f"has {self._vocab_size}; the adapter belongs to another base than this ({self._settings.base or 'it names none'})."
            )
        return tokens

    def _misplaced(self, name: str) -> UserError:
        return UserError(
            f"{self._tensors.folder / WEIGHTS}: tensor '{PREFIX}{name}' has no place in this model; the adapter belongs to "
            f"another base than this ({self._settings.base or 'it names none'})."
        )

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a tensor in float32. Raises UserError where it has another shape, in which -1 is any size."""
        info = self._tensors.tensors[self._names[name]]
        fits = len(info.shape) == len(shape) and all(x in (-1, y) for x, y in zip(shape, info.shape, strict=True))
        if not fits:
            expected = str(list(shape)).replace("-1", "r")
            raise UserError(
                f"{info.file}: tensor '{info.name}' has the shape {list(info.shape)}, but this model asks for {expected}; the "
                f"adapter belongs to another base than this ({self._settings.base or 'it names none'})."
            )
        return self._tensors.read(info.name).astype(np.float32)

    def low_rank_names(self) -> list[str]:
        """Returns the carriers of the adapter. Of a tied head and its embedding, which must agree, only the embedding."""
        if not self._tied:
            return list(self.low_rank)
        embedding = next(name for name, carrier in self.carriers.items() if carrier.embedding)
        self._check_sides({TIED_HEAD, embedding} & self.low_rank.keys(), embedding)
        if TIED_HEAD in self.low_rank:
            head, table = self.factors(TIED_HEAD), self.factors(embedding)
            same = head.scale == table.scale and np.array_equal(head.a, table.b.T) and np.array_equal(head.b, table.a.T)
            self._check_sides(() if same else {TIED_HEAD}, embedding)
        return [name for name in self.low_rank if name != TIED_HEAD]

    def _check_sides(self, changed: Collection[str], embedding: str) -> None:
        """Raises UserError where only one of a tied head and its embedding is changed, or each in its own way."""
        if len(changed) == 1:
            raise UserError(
                f"{self._tensors.folder / WEIGHTS}: changes '{TIED_HEAD}' and '{embedding}' differently, or one of them alone, "
                "but this model ties them (tie_word_embeddings): they are one matrix, and merging would change both. Train it "
                "with an adapter on neither, or untie the head of the base first."
            )

    def factors(self, name: str) -> Factors:
        """Returns the adapter of a carrier."""
        carrier, parts = self.carriers[name], self.low_rank[name]
        ends = ("embedding_A", "embedding_B") if carrier.embedding else ("A", "B")
        wanted = {*ends, *(["magnitude_vector"] if self._settings.dora else [])}
        if parts.keys() != wanted:
            raise UserError(
                f"{self._tensors.folder / WEIGHTS}: '{name}' has lora_{', lora_'.join(sorted(parts))}, but its adapter is made of "
                f"lora_{', lora_'.join(sorted(wanted))}; the file is not whole, or adapter_config.json is of another adapter."
            )
        inputs, outputs = carrier.size
        count = carrier.packing.shapes[0][0] if carrier.experts else 1
        a, b = self.read(parts[ends[0]], (-1, inputs)), self.read(parts[ends[1]], (outputs, -1))
        if len(a) != b.shape[1] or len(a) % count:
            raise UserError(
                f"{self._tensors.folder / WEIGHTS}: the matrices of '{name}' have ranks {len(a)} and {b.shape[1]}, which do not fit "
                "together; save the adapter again."
            )
        if carrier.experts:
            a = a.reshape(count, -1, inputs)
            b = b.reshape(outputs, -1, count).transpose(2, 0, 1)
        magnitude = self.read(parts["magnitude_vector"], (outputs,)) if self._settings.dora else None
        as_parameter = any(f".{name}.weight".endswith(f".{parameter}") for parameter in self._settings.parameters)
        return Factors(a, b, self._settings.scale(f"{name}.weight" if as_parameter else name, a.shape[-2]), magnitude)

    def whole(self) -> tuple[Values, Values]:
        """Returns the parameters of the base that the adapter replaces, and those that it merely repeats."""
        replaced, repeated = {}, {}
        embedding = next(tensor for tensor in self._base.values() if tensor.paths == ("embed.embedding",))
        for bare, name in self._whole.items():
            tensor = embedding if self._tied and bare == f"{TIED_HEAD}.weight" else self._base[bare]
            array = self.read(name, tensor.packing.shape)
            values = repeated if bare.removesuffix(".weight") in self.low_rank else replaced
            for number, path in enumerate(tensor.paths):
                values.setdefault(path, []).append((tensor.index, tensor.packing.cut(array, number)))
        if self._tied and not self._settings.tied and "embed.embedding" in replaced:
            slices = replaced["embed.embedding"]
            same = len(slices) == 2 and np.array_equal(slices[0][1], slices[1][1])
            self._check_sides(() if same else {TIED_HEAD}, embedding.name.removesuffix(".weight"))
        return replaced, repeated
