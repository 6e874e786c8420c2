"""Where a model comes from: finding its directory, and what of it is carried along to an export."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_jax.checkpoint.checkpoints import committed_steps
from sft_jax.errors import UserError
from sft_jax.hf.files import CONFIG, has_weights, parse_json, read_bytes, read_json
from sft_jax.hf.hub import download
from sft_jax.hf.peft.settings import CONFIG as ADAPTER_CONFIG
from sft_jax.hf.peft.settings import is_adapter_directory, read_settings
from sft_jax.hf.names import name_table
from sft_jax.hf.quantised import open_model, plain_config

GENERATION_CONFIG = "generation_config.json"
PROVENANCE = "sft_jax.json"  # in an export: where the model came from
EXPORT = "export"  # in the workdir of a run: its exported model
ADAPTER = "adapter"  # in the workdir of a run: its adapter, as a directory of PEFT
CHECKPOINTS = "checkpoints"  # in the workdir of a run
SUMMARY = "summary.json"  # in the workdir of a run, once it has finished
PARAM_DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Provenance:
    """How a model came to be, as its export says in README.md and in sft_jax.json."""

    base: str  # the model that training began from: a directory, a run or a hub id
    data_fingerprint: str | None = None  # None: not known, such as of a model that was never trained here
    steps: int | None = None
    base_fingerprint: str | None = None  # of an adapter: by which its base is known again
    base_dtype: str = ""  # of an adapter: what its base was quantised to, a key of KERNEL_FORMATS

    def to_dict(self) -> dict[str, Any]:
        """Returns what sft_jax.json says."""
        values = dict(base_model=self.base, data_fingerprint=self.data_fingerprint, steps=self.steps)
        of_adapter = {"base_fingerprint": self.base_fingerprint, "base_dtype": self.base_dtype}
        return values | {name: value for name, value in of_adapter.items() if value}


@dataclass(frozen=True)
class Source:
    """The model that a decoder was read from. Texts, so that it is hashable and can be static in a module."""

    name: str  # as the user named it: a directory or a hub id
    config: str  # the text of config.json, without `quantization_config`
    generation_config: str | None  # the text of generation_config.json, where there is one
    root: str | None = None  # what its files write before the names of the body's tensors; None = there are no weights
    ignored: tuple[str, ...] = ()  # tensors of the checkpoint that hold no parameter and were not read
    # Of the tensors that were read, see sft_jax.hf.fingerprint; not compared, so that equal models share compiled code.
    fingerprint: str | None = dataclasses.field(default=None, compare=False)
    provenance: Provenance | None = None  # of a checkpoint or an export; None for a model from elsewhere

    def config_dict(self) -> dict[str, Any]:
        return json.loads(self.config)

    @property
    def dtype(self) -> str | None:
        """The dtype of the parameters that config.json names, or None where it names none that is known here."""
        config = self.config_dict()
        dtype = config.get("dtype", config.get("torch_dtype"))
        return dtype if dtype in PARAM_DTYPES else None

    @property
    def vocab_size(self) -> int | None:
        """The number of tokens that config.json names, of models that are not supported too; None where it names none."""
        config = self.config_dict()
        sizes = [section.get("vocab_size") for section in (config.get("text_config"), config) if isinstance(section, dict)]
        return next((size for size in sizes if type(size) is int and size > 0), None)

    def with_vocab_size(self, size: int) -> "Source":
        """Returns the model with another number of tokens."""
        config = self.config_dict()
        text = config.get("text_config")  # of a model that is more than its language model
        if isinstance(text, dict):
            config["text_config"] = text | {"vocab_size": size}
        if not isinstance(text, dict) or "vocab_size" in config:
            config["vocab_size"] = size
        return self if config == self.config_dict() else dataclasses.replace(self, config=json.dumps(config, indent=2))

    def generation_dict(self) -> dict[str, Any]:
        """Returns generation_config.json, or what config.json says about special tokens where there is none."""
        if self.generation_config is not None:
            return json.loads(self.generation_config)
        config = self.config_dict()
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {name: config[name] for name in names if config.get(name) is not None}

    def stop_ids(self) -> tuple[int, ...]:
        """Returns the ids at which a server ends an answer: those of generation_config.json, or else config.json."""
        stops = self.generation_dict().get("eos_token_id")
        stops = self.config_dict().get("eos_token_id") if stops is None else stops
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if not all(type(token) is int and token >= 0 for token in stops):
            raise UserError(
                f"{self.name}: eos_token_id of {GENERATION_CONFIG} or {CONFIG} is {stops!r:.200}; it must be a token id, "
                "a list of them, or null."
            )
        return tuple(stops)


def find_model(path: str | Path, base: str | Path | None = None) -> Path:
    """Returns the Hugging Face directory of `path`: a directory, a hub id, a run's workdir, or an adapter.

    Of a run this is where configuration and tokenizer lie, which all its checkpoints share: its export, which also has
    the run's chat template, or else its base model. Its weights are those of `checkpoint_of`. Of a directory of PEFT it
    is that of its base. `base` names the base of an adapter, or of a run that trains one, where it has moved. Raises
    UserError naming `path` and the remedy.
    """
    folder = place_of(path)
    if base is not None and not has_adapter(folder):
        raise UserError(f"{path}: is no adapter but a model, so there is no base to name; leave out --base ({base}).")
    if is_run(folder):
        checkpoint_of(folder)  # raises where there are no weights
        if base is not None:
            return find_model(base)
        return folder / EXPORT if has_export(folder) else _base_of(folder)
    if is_adapter(folder):
        return find_model(base_of_adapter(folder, base))
    if is_adapter_directory(folder):
        raise UserError(
            f"{path}: holds a model and an adapter ({ADAPTER_CONFIG}), of which it is not said whether it is in the model already; "
            "put the adapter into a directory of its own and name one of the two."
        )
    if not (folder / CONFIG).is_file():
        raise UserError(f"{path}: holds no {CONFIG}; name a Hugging Face directory, a hub id or a run's workdir.")
    return folder


def place_of(path: str | Path) -> Path:
    """Returns the directory that `path` names; a hub id is downloaded unless it is in the cache.

    Raises UserError naming `path` where it is neither.
    """
    folder = as_folder(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path}: is a file; name the directory that holds {CONFIG} and the weights.")
    if not is_hub_id(path):
        raise UserError(f"{path}: there is no such directory; name a Hugging Face directory, a hub id or a run's workdir.")
    return download(str(path))


def run_and_step(path: str | Path) -> tuple[str, int | None]:
    """Returns (RUN, STEP) for RUN/checkpoints/STEP, and (path, None) for whatever else names a model."""
    place = Path(path).expanduser()
    if place.name.isdecimal() and place.parent.name == CHECKPOINTS and place.parent.is_dir() and is_run(place.parent.parent):
        return str(place.parent.parent), int(place.name)
    return str(path), None


def is_hub_id(path: str | Path) -> bool:
    """Returns whether `path` can be the id of a model on the Hugging Face hub."""
    return bool(_HUB_ID.fullmatch(str(path)))


def tokenizer_folder(path: str | Path, base: str | Path | None = None) -> Path:
    """Returns where the tokenizer of a model lies: beside its adapter, where there is one, or as `find_model` says.

    Beside an adapter it has the template that the adapter has learned, also in the runs that go on with it.
    """
    place, beside = place_of(path), []
    if is_run(place):
        origin = run_config(place).get("adapter", {}).get("path", "")
        beside = [place / ADAPTER, *([Path(origin), Path(origin) / ADAPTER] if origin else [])]
    elif is_adapter(place):
        beside = [place]
    for folder in beside:
        if is_adapter_directory(folder) and has_tokenizer(folder):
            return folder
    return tokenizer_folder(base_of_adapter(place, base)) if is_adapter(place) else find_model(path, base)


def as_folder(path: str | Path) -> Path:
    """Returns `path` with ~ replaced; raises UserError for what cannot be the name of a directory or a hub id."""
    try:
        folder = Path(path).expanduser()
        folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, no text, or of no known user
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(path):.200}: cannot be a directory ({reason}); name a Hugging Face directory.") from error
    return folder


def lasting_path(path: str) -> str:
    """Returns the path of a model as a run records it: absolute where it is a directory, so that the run can be used
    from anywhere; a hub id stays one.
    """
    folder = as_folder(path)
    return str(folder.absolute()) if folder.is_dir() else path


def chat_template_of(path: str | Path) -> str:
    """Returns the `data.chat_template` that a run was trained with; "auto" for what is no run, and where the base's own was.

    A run that goes on from another asks and answers in the form that the other one has learned.
    """
    folder = as_folder(path)
    if not folder.is_dir() or not is_run(folder):
        return "auto"
    config = run_config(folder)
    setting = config["data"].get("chat_template", "auto")
    return chat_template_of(config["model"]["path"]) if setting == "auto" else "auto" if setting == "none" else setting


def added_tokens_of(path: str | Path) -> tuple[str, ...]:
    """Returns the tokens that a run added to those of the model that it began with; none for what is no run.

    Its `data.add_tokens` has those of the runs before it as well.
    """
    folder = as_folder(path)
    return tuple(run_config(folder)["data"].get("add_tokens", ())) if folder.is_dir() and is_run(folder) else ()


def is_run(folder: Path) -> bool:
    """Returns whether a directory is the workdir of a run; its config.json is the run's, not a model's."""
    if not (folder / CHECKPOINTS).is_dir() and not has_export(folder):
        return False
    path = folder / CONFIG
    return not path.is_file() or not read_json(path).keys() & {"architectures", "model_type"}


def has_export(folder: Path) -> bool:
    """Returns whether a run has been exported into its workdir."""
    return (folder / EXPORT / CONFIG).is_file()


def is_adapter(folder: Path) -> bool:
    """Returns whether a directory holds an adapter of PEFT, and not the weights of a model as well."""
    return is_adapter_directory(folder) and not has_weights(folder)


def has_adapter(folder: Path) -> bool:
    """Returns whether a model is one with an adapter: a directory of PEFT, or a run that trains one."""
    if is_adapter(folder):
        return True
    return folder.is_dir() and is_run(folder) and run_config(folder).get("adapter", {}).get("name", "none") != "none"


def base_of_adapter(folder: Path, base: str | Path | None = None) -> str:
    """Returns the model that the adapter in `folder` belongs to: `base`, or what the adapter names."""
    named = read_settings(folder).base if base is None else str(base)
    remedy = "name the place where it is with --base (in Python: base=), or write it there"
    if named is None:
        raise UserError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path names no model; {remedy}.")
    try:
        find_model(named)
    except UserError as error:
        if base is not None:
            raise
        message = f"base_model_name_or_path, the model that this adapter belongs to: {error}"
        raise UserError(f"{folder / ADAPTER_CONFIG}: {message} If it is elsewhere, {remedy}.") from error
    return named


def checkpoint_of(folder: str | Path) -> Path | None:
    """Returns the newest committed checkpoint of a run, or None where it has none and its export or adapter stands for it.

    The checkpoint goes first even where the export is of the same step: an export is rounded to the dtype of the base
    model. Raises UserError where the run has neither.
    """
    folder = Path(folder).expanduser()
    steps = committed_steps(folder / CHECKPOINTS)
    if not steps and not has_export(folder) and not is_adapter(folder / ADAPTER):
        raise UserError(f"{folder}: is a run that has saved nothing yet; let it save, or name the model it began from.")
    return folder / CHECKPOINTS / str(steps[-1]) if steps else None


def _base_of(folder: Path) -> Path:
    """Returns the directory of the model that a run began from."""
    base = str(run_config(folder)["model"].get("path"))
    if Path(base).expanduser().resolve() == folder.resolve():
        raise UserError(f"{folder / CONFIG}: model.path names the run itself; name the model that it began from.")
    try:
        return find_model(base)
    except UserError as error:
        raise UserError(
            f"{folder / CONFIG}: model.path, the model that this run began from and whose tokenizer it uses: {error} "
            "If it has moved, write its new place into model.path there."
        ) from error


def best_step(folder: Path) -> int | None:
    """Returns the step whose state a run that has finished takes for its result, where it keeps the best (`checkpoint.best`)."""
    path = folder / SUMMARY
    return best_step_of(read_json(path) if path.is_file() else {})


def best_step_of(summary: dict[str, Any]) -> int | None:
    """Returns the step of `best_step` by what summary.json says; None where it does not say one."""
    best = summary.get("best") if summary.get("finished") else None
    values = best.get("values") if isinstance(best, dict) else None
    step = next(iter(values), None) if isinstance(values, dict) else None
    return int(step) if step is not None and step.isdecimal() else None


def run_config(folder: Path) -> dict[str, Any]:
    """Returns the configuration of a run, as its config.json holds it."""
    path = folder / CONFIG
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config.get("model"), dict) or not isinstance(config.get("data"), dict):
        raise UserError(f"{path}: is not the configuration of a run; the run's folder is damaged, copy it again.")
    return config


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_source(folder: Path, name: str) -> Source:
    """Reads config.json, generation_config.json and sft_jax.json of a directory, and the headers of its weights.

    A model whose files are quantised is presented as the plain one that it stands for. Raises UserError where one is no
    JSON object or names stop ids that are none, weights are damaged, or quantised by a method that is not read.
    """
    texts = []
    for file in (CONFIG, GENERATION_CONFIG):
        path = folder / file
        if not path.is_file():
            if file == CONFIG:
                raise UserError(f"{folder}: holds no {CONFIG}; name a Hugging Face directory.")
            texts.append(None)
            continue
        data = read_bytes(path)
        parse_json(data, f"{path}:")
        texts.append(data.decode("utf-8"))
    config = json.loads(texts[0])
    plain = plain_config(config, f"{folder / CONFIG}")
    if plain is not config:  # the text as it is, otherwise
        texts[0] = json.dumps(plain, indent=2, ensure_ascii=False)
    source = Source(name, *texts, provenance=read_provenance(folder))
    source.stop_ids()  # raises where they are not ids
    table = name_table(plain)
    root = table.find_root(open_model(folder).tensors) if table is not None and has_weights(folder) else None
    return source if root is None else dataclasses.replace(source, root=root.body)


def read_provenance(folder: Path) -> Provenance | None:
    """Returns what sft_jax.json in an export or adapter says; None where there is none."""
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    values = read_json(path)
    base, data, steps, of_base, base_dtype = (
        values.get(name) for name in ("base_model", "data_fingerprint", "steps", "base_fingerprint", "base_dtype")
    )
    texts = (data, of_base, base_dtype)
    known = isinstance(base, str) and isinstance(steps, int | None) and all(isinstance(x, str | None) for x in texts)
    if not known or isinstance(steps, bool):
        raise UserError(f"{path}: does not name base_model, data_fingerprint and steps; restore it, or remove it.")
    return Provenance(base, data, steps, of_base, base_dtype or "")
