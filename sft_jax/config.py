"""The configuration: one frozen dataclass tree, strict, with every default in one place.

`configs/*.py` build an `ml_collections.ConfigDict` from `default_config()`; `parse_config` turns it back into
dataclasses and checks it. Nothing else in the package reads a ConfigDict. An unknown key, a wrong type or two keys
that contradict each other raise `UserError` before anything is loaded.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from sft_jax.config_checks import (
    check_columns, check_date, check_finite, check_local, check_sampling, check_supervise, check_template_arguments, check_tokens,
)  # fmt: skip
from sft_jax.errors import UserError, did_you_mean

FormatName = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "segments", "tokens"]
_WHOLE_TEXTS = ("eval.stop",)  # keys of lists whose single text may hold commas and white space
OverlengthPolicy = Literal["error", "drop", "truncate_left", "truncate_right", "keep_last_turns", "split"]


@dataclass(frozen=True)
class ModelConfig:
    """Where the model comes from and how its arithmetic is done."""

    path: str = ""  # Hugging Face directory or hub id, the workdir of an earlier run, or an adapter of PEFT (merged)
    init: Literal["checkpoint", "random"] = "checkpoint"  # "random": config.json only, weights drawn from `seed`
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the parameters and the optimizer state
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of matmul operands; norms, softmax, loss are fp32
    matmul_precision: Literal["default", "high", "highest"] = "highest"  # fp32 operands: "highest" is true fp32
    remat: str = "full"  # "none", "dots", "full", "offload" (to the host's memory): sft_jax.model.decoder.REMAT_POLICIES
    attention: str = "auto"  # see sft_jax.model.attention.KERNELS


@dataclass(frozen=True)
class ColumnsConfig:
    """Field names of the rows; empty = the standard name of the format.

    Those of texts may be expressions over the fields of a row, such as "{{ context }}\\n\\n{{ question }}".
    """

    messages: str = ""
    role: str = ""  # of a message, in the format "messages"
    content: str = ""
    roles: dict[str, str] = field(default_factory=dict)  # the data's name of a role -> system, user, assistant or tool
    prompt: str = ""
    completion: str = ""
    instruction: str = ""
    input: str = ""
    output: str = ""
    text: str = ""
    system: str = ""
    segments: str = ""
    ids: str = ""
    weights: str = ""
    tools: str = ""
    chat_template_kwargs: str = ""


@dataclass(frozen=True)
class DataSetConfig:
    """One data set of `data.train` or `data.eval`. What it leaves out it takes from the `data` section."""

    path: tuple[str, ...]  # files, globs, URLs, folders of save_to_disk, tfds:name/config:split, hf:owner/name/config:split
    name: str = ""
    weight: float | None = None  # share, see data.weight_by; None = every document once an epoch; not of an eval set
    epochs: float | None = None  # times that every document comes up in an epoch of the run, such as 2 or 0.5; None = 1
    cap: int | None = None  # rows that are used at most, a random sample that is the same in every epoch; None = all
    format: FormatName = "auto"
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    supervise: str = "assistant"
    overlength: OverlengthPolicy = "error"


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and evaluated on."""

    # a path (see DataSetConfig and sft_jax.data.sources.registry.READERS), a list of them, or data sets by name
    train: tuple[DataSetConfig, ...] = ()
    eval: tuple[DataSetConfig, ...] = ()
    weight_by: Literal["documents", "supervised_tokens"] = "documents"  # what the weights of data sets are shares of
    format: FormatName = "auto"  # see sft_jax.data.formats.registry.FORMATS
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    max_length: int = 2048  # tokens in a row
    max_segments: int = 64  # documents in a row, at most
    packing: bool = True
    # "assistant", "last" (last assistant turn), "all", or roles: "assistant,tool"; a message's own weight or train wins
    supervise: str = "assistant"
    overlength: OverlengthPolicy = "error"
    chat_template: str = "auto"  # "auto" (the model's own), "none", a built-in name such as "chatml", or a file
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # such as {"enable_thinking": False}
    date: str = ""  # that templates take for today, such as "2026-01-31"; empty = the day on which the run begins
    add_tokens: tuple[str, ...] = ()  # special tokens that the model is given if it has them not, such as those that a
    #                                   template writes: "<|im_start|>,<|im_end|>"
    allow_special_tokens_in_content: bool = False
    bad_rows: Literal["error", "skip"] = "error"  # a row that cannot be used stops the run, or is counted and left out
    cache_dir: str = ""  # of prepared data and of copies of remote files; empty = the user's cache folder
    workers: int = 0  # processes that prepare data; 0 = one a core
    row_timeout: float = 20.0  # seconds that rendering one row may take
    row_memory_mb: int = 2048  # memory that rendering may take in a worker, beyond what it starts with


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: str = "adamw"  # see sft_jax.training.optimizers.OPTIMIZERS
    learning_rate: float = 1e-5
    schedule: str = "cosine"  # see sft_jax.training.schedules.SCHEDULES
    warmup: float = 0.03  # below 1: a fraction of all steps; else steps
    decay: float = 0.1  # of "wsd": how long the learning rate falls at the end; as warmup
    power: float = 2.0  # of "polynomial"
    final_fraction: float = 0.0  # learning rate at the last step, as a fraction of the peak; of "inverse_sqrt" its lowest
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # 0 = no clipping
    b1: float | None = None  # constants of the optimizer; None = its own, see OPTIMIZERS
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    state_dtype: Literal["", "bfloat16", "float32"] = ""  # of first moments; "" = as the parameters. Second moments are float32
    ema: float = 0.0  # decay of an average of the parameters over the updates, such as 0.999; where there is one, it is
    #                   what is evaluated, exported and loaded from the workdir; 0 = none
    groups: tuple[dict[str, Any], ...] = ()  # ordered {"pattern": regex, "learning_rate": factor, "weight_decay": x,
    #                                          "freeze": bool}; the first match wins


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained beside a base that stays as it is; without an adapter the model itself is trained."""

    name: Literal["none", "lora", "dora"] = "none"
    base_dtype: Literal["", "nf4", "int8", "fp8"] = ""  # what the kernels of the base's blocks are stored in; "" = model.dtype
    path: str = ""  # an adapter to go on with: a directory of PEFT, or a run that has written one; decides what follows to init
    rank: int = 16
    alpha: float = 32.0  # the adapter counts alpha / rank times
    targets: tuple[str, ...] = ()  # patterns of projections, "embed" and "lm_head"; empty = all projections of the blocks
    train: tuple[str, ...] = ()  # patterns of parameters of the base that are trained whole, such as "norm"
    tokens: tuple[int | str, ...] = ()  # ids or texts of tokens whose rows of embedding and head are trained
    rslora: bool = False  # alpha / sqrt(rank) instead of alpha / rank
    init: Literal["default", "pissa"] = "default"  # "pissa": begin with the principal part of each kernel
    dropout: float = 0.0  # of what adapters read
    lora_plus: float = 1.0  # factor on the learning rate of the matrices that begin with zero, such as 16


@dataclass(frozen=True)
class LossConfig:
    """What training minimises beside the negative log-likelihood, which is the loss that is reported and evaluated."""

    z_loss: float = 0.0  # adds this times (log Z)^2 of every supervised token, such as 1e-4
    label_smoothing: float = 0.0  # share of a target's probability that is spread over the whole vocabulary
    router_balance: float = 0.0  # of a model of experts: adds this times the balance loss, such as 1e-3, per document
    router_z: float = 0.0  # adds this times the squared log of the sum of exponentials of router logits, such as 1e-3


@dataclass(frozen=True)
class TrainConfig:
    """How long, in which batches, and what happens when a step goes wrong."""

    steps: int = 0  # optimizer steps; wins over epochs when set, and the run says so
    epochs: float = 1.0
    batch_size: int = 8  # rows of max_length per optimizer step, over all devices
    micro_batch_size: int = 0  # rows at a time, over all devices; divides batch_size; 0 = batch_size
    normalize: Literal["tokens", "examples"] = "tokens"  # every supervised token, or every example, counts the same
    neftune: float = 0.0  # strength of the noise on embeddings while training, such as 5; 0 = none
    qat: Literal["", "int8", "int4"] = ""  # round kernels of the blocks in training and evaluation as a server will; the export
    #                                        is the plain model, for which see sft_jax.model.qat
    patience: int = 0  # end after so many evaluations in a row that are no better than the best by checkpoint.best; 0 = never
    nonfinite: Literal["abort", "skip"] = "abort"  # a loss or gradient that is not finite never updates the state
    stop_after_steps: int = 0  # end this process after so many steps, schedule unchanged; 0 = never
    profile: int = 0  # steps to trace into WORKDIR/profile, after the first two or from the start of a shorter run
    deterministic: bool = False  # deterministic kernels on GPU, at a cost in speed
    heartbeat_seconds: float = 100.0  # of several processes: one that gives no sign of life for so long is dead, and the others end
    hang_seconds: float | None = None  # a step that takes longer has the stacks of all threads written; None = ten times the
    #                                    median step, at least 120; 0 = never
    export: bool = True  # write WORKDIR/export, a Hugging Face directory, at the end
    max_replicated: float = 0.1  # share of what a device holds that may be copies along other mesh axes than data


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 = what is left."""

    data: int = 1  # rows; parameters are copied
    fsdp: int = -1  # rows, and parameters are cut
    tensor: int = 1  # heads, and the inner size of MLPs
    context: int = 1  # stretches of every row
    expert: int = 1  # experts, and rows


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn; the names are those of the flags of `evaluate`, see sft_jax.evaluation.sampling."""

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = all tokens
    top_p: float = 1.0  # 1 = all
    min_p: float = 0.0  # 0 = all
    repetition_penalty: float = 1.0  # 1 = none
    seed: int = 0  # of the draws; the prompts follow the seed of the run


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation inside the run: at step 0, every n steps, at chosen ones and at the end."""

    every: int = 0  # steps; 0 = none of these
    at: tuple[int, ...] = ()  # further steps, such as 10,50,200
    batch_size: int = 0  # rows; 0 = train.micro_batch_size
    generate: int = 0  # prompts of each eval set that are answered greedily and scored; -1 = all
    max_new_tokens: int = 128
    scorers: tuple[str, ...] = ("exact_match",)  # see sft_jax.evaluation.scorers.SCORERS; or path/to/file.py:function
    slices: tuple[str, ...] = ()  # columns of the rows by whose values results are told apart as well
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()  # texts that end an answer; of a flag that is no list, one text as it stands

    def due(self, step: int) -> bool:
        """Returns whether a run evaluates after this step, its start and its end apart."""
        return step in self.at or bool(self.every) and step % self.every == 0


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved, and what may change when a run is resumed."""

    every: int = 500  # steps; 0 = only at the end and on a signal
    keep: int = 2  # newest checkpoints that stay
    best: str = ""  # metric of an evaluation, such as loss, or SET/loss where there are several sets: the best state by it is
    #                 saved, stays beside the newest ones, and is what is exported at the end; "" = the last state is
    best_mode: Literal["auto", "min", "max"] = "auto"  # which is better; auto: lower of loss, perplexity, bits_per_byte, higher of others
    keep_best: int = 1  # best checkpoints that stay
    save_last: bool = True  # also at the last step, so that the run can be extended
    allow_changes: tuple[str, ...] = ()  # keys that this start may change although the run began with other values


@dataclass(frozen=True)
class LogConfig:
    """Metrics and progress."""

    every: int = 10  # steps
    tensorboard: bool = True
    wandb: str = ""  # project on Weights & Biases; empty = none
    ledger: bool = True  # the loss of every example whenever it comes up, in WORKDIR/ledger


@dataclass(frozen=True)
class Config:
    """The whole run."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def default_config() -> ml_collections.ConfigDict:
    """Returns the defaults as a ConfigDict for `configs/*.py`, every field present so that flags can override it.

    Fields that take more than one type (paths, lists, dicts) are placeholders that a flag can set to any literal.
    """
    return _to_config_dict(Config())


def _to_config_dict(node) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    for key in dataclasses.fields(node):
        value = getattr(node, key.name)
        if dataclasses.is_dataclass(value):
            result[key.name] = _to_config_dict(value)
        elif isinstance(value, (tuple, dict)):
            result[key.name] = config_dict.placeholder(object)
        elif value is None:
            result[key.name] = config_dict.placeholder(typing.get_args(key.type)[0])
        else:
            result[key.name] = value
    return result


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the resolved configuration as plain JSON types; `parse_config` of it gives the same configuration."""

    def plain(node):
        if dataclasses.is_dataclass(node):
            return {f.name: plain(getattr(node, f.name)) for f in dataclasses.fields(node)}
        if isinstance(node, dict):
            return {key: plain(value) for key, value in node.items()}
        if isinstance(node, (tuple, list)):
            return [plain(value) for value in node]
        return node

    return plain(config)


def parse_config(raw: ml_collections.ConfigDict | dict[str, Any], needs_data: bool = True, needs_model: bool = True) -> Config:
    """Returns the checked configuration. Raises UserError naming the key that is unknown, mistyped or contradictory.

    Without `needs_data` there may be no training data, for what does not read them; without `needs_model` no model.path.
    """
    if isinstance(raw, ml_collections.ConfigDict):
        raw = raw.to_dict()
    raw = dict(raw)
    data = raw.get("data") or {}
    if not isinstance(data, dict):
        raise UserError(f"data: must be a section of keys, not {_show(data)}.")
    data = dict(data)
    sets = {split: data.pop(split, None) for split in ("train", "eval")}
    config = _build(Config, {**raw, "data": data}, "")
    sets = {split: _data_sets(value, split, config.data) for split, value in sets.items()}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **sets))
    _check(config, needs_data, needs_model)
    return config


def _build(cls, raw: dict[str, Any], prefix: str):
    if not isinstance(raw, dict):
        raise UserError(f"{prefix.rstrip('.')}: must be a section of keys, not {_show(raw)}.")
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in hints:
            raise UserError(f"Unknown key '{prefix}{key}'; {did_you_mean(str(key), hints)}.")
    values = {}
    for key, value in raw.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = _build(kind, value if value is not None else {}, f"{prefix}{key}.")
        elif value is not None:
            values[key] = _convert(kind, value, f"{prefix}{key}")
    return cls(**values)


def _convert(kind, value, key: str):
    """Returns `value` as the declared type, or raises UserError naming the key."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        if value not in typing.get_args(kind):
            known = [choice or "''" for choice in typing.get_args(kind)]
            raise UserError(f"{key}: '{value}' is not a choice; {did_you_mean(str(value), known)}.")
        return value
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        fitting = [option for option in options if isinstance(option, type) and isinstance(value, option)]
        return _convert((fitting or options)[0], value, key)
    if origin is tuple:
        item_kind = typing.get_args(kind)[0]
        if isinstance(value, str) and key in _WHOLE_TEXTS:
            value = [value]
        elif isinstance(value, str) and item_kind in (str, int, int | str):
            value = [part.strip() for part in value.split(",") if part.strip()]
            if item_kind != str:  # of a flag, which has no other way to tell a number
                value = [int(part) if part.isdecimal() else part for part in value]
        if item_kind in (int, int | str) and isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{key}: must be a list, not {_show(value)}.")
        return tuple(_convert(item_kind, item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key}: must be a dict, not {_show(value)}.")
        return dict(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return check_finite(key, value)
    if kind is int and isinstance(value, bool) or not isinstance(value, kind):
        raise UserError(f"{key}: must be {kind.__name__}, not {_show(value)}.")
    return value


def _show(value) -> str:
    return f"{value!r} ({type(value).__name__})"


def _data_sets(value, split: str, data: DataConfig) -> tuple[DataSetConfig, ...]:
    """Reads `data.train` or `data.eval`: a path or glob, a list of them, a list of sets, or a dict name -> set."""
    key = f"data.{split}"
    if value is None or value == "" or value == [] or value == ():
        return ()
    if isinstance(value, str):
        value = [{"path": value}]
    elif isinstance(value, dict) and "path" in value:
        value = [value]
    elif isinstance(value, dict):
        value = [{"name": str(name), **(item if isinstance(item, dict) else {"path": item})} for name, item in value.items()]
    elif isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = [{"path": list(value)}]
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{key}: must be a path, a list of paths, a list of data sets or a dict name -> data set, not {_show(value)}.")
    inherited = {"format": data.format, "columns": dataclasses.asdict(data.columns), "supervise": data.supervise, "overlength": data.overlength}
    sets = []
    for index, item in enumerate(value):
        item = {name: part for name, part in item.items() if part is not None}
        name = str(item.get("name") or (split if len(value) == 1 else f"{split}_{index}"))
        label = data_set_key(split, index, name, len(value))
        where = f"{label}."
        if not item.get("path"):
            raise UserError(f"{where}path: is missing; name a file or glob.")
        if isinstance(item["path"], str):
            item["path"] = [item["path"]]
        check_columns(f"{where}columns", item.get("columns") or {})
        if isinstance(item.get("columns"), dict):
            item["columns"] = {**inherited["columns"], **item["columns"]}
        if isinstance(item.get("supervise"), str):
            check_supervise(f"{where}supervise", item["supervise"])
        for only_trained in ("weight", "epochs"):
            if split == "eval" and only_trained in item:
                raise UserError(f"{where}{only_trained}: a held-out set has none, since its loss is over each of its rows once; leave it out.")
        merged = {**inherited, **item, "name": item.get("name") or name}
        sets.append(_build(DataSetConfig, merged, where))
    names = [item.name for item in sets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{key}: two data sets are named '{name}'; names must differ.")
    weighted = [item for item in sets if item.weight is not None]
    for index, item in enumerate(sets):
        label = data_set_key(split, index, item.name, len(sets))
        if weighted and item.epochs is not None:
            raise UserError(
                f"{label}.epochs: cannot stand beside a weight, which is a share of the whole; give every set a weight, or none and "
                "those that come up more or less often than once epochs."
            )
        if item.epochs is not None and not item.epochs > 0:
            raise UserError(f"{label}.epochs: must be above 0, not {item.epochs}; leave the set out to use nothing of it.")
        if item.cap is not None and item.cap < 1:
            raise UserError(f"{label}.cap: must be at least 1, not {item.cap}; leave it out to use every row.")
        if weighted and item.weight is None:
            raise UserError(f"{label}.weight: is missing although other sets have one; give all a weight, or none.")
        if weighted and not item.weight > 0:
            raise UserError(f"{label}.weight: must be above 0, not {item.weight}.")
    return tuple(sets)


def data_set_key(split: str, index: int, name: str, count: int) -> str:
    """Returns the key of one of the `count` sets of `data.train` or `data.eval`, as the user would look for it.

    A set that has no name of its own is found by its place.
    """
    if name == split and count == 1:
        return f"data.{split}"
    return f"data.{split}[{index}]" if name == f"{split}_{index}" else f"data.{split}.{name}"


def _check(config: Config, needs_data: bool, needs_model: bool) -> None:
    """Raises UserError for values out of range and for keys that contradict each other."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    model, data, optim, train, mesh = config.model, config.data, config.optim, config.train, config.mesh
    require(bool(model.path) or not needs_model, "model.path: is missing; name a Hugging Face directory, a hub id or a run's workdir.")
    require(bool(data.train) or not needs_data, "data.train: is missing; name a file or glob of training rows.")
    if data.cache_dir:
        check_local("data.cache_dir", data.cache_dir)
    check_supervise("data.supervise", data.supervise)
    check_columns("data.columns", dataclasses.asdict(data.columns))
    check_template_arguments("data.chat_template_kwargs", data.chat_template_kwargs)
    check_date("data.date", data.date)
    check_tokens("data.add_tokens", data.add_tokens)
    require(
        data.weight_by == "documents" or any(item.weight is not None for item in data.train),
        f"data.weight_by: is '{data.weight_by}' but no set has a weight; give every set of data.train one.",
    )
    require(data.max_length >= 2, f"data.max_length: must be at least 2, not {data.max_length}.")
    require(data.max_segments >= 1, f"data.max_segments: must be at least 1, not {data.max_segments}.")
    require(data.workers >= 0, f"data.workers: must be 0 (one a core) or more, not {data.workers}.")
    require(data.row_timeout > 0, f"data.row_timeout: must be above 0, not {data.row_timeout}.")
    require(data.row_memory_mb > 0, f"data.row_memory_mb: must be above 0, not {data.row_memory_mb}.")
    require(optim.learning_rate > 0, f"optim.learning_rate: must be above 0, not {optim.learning_rate}.")
    require(optim.warmup >= 0, f"optim.warmup: must be 0 or more, not {optim.warmup}.")
    require(0 <= optim.final_fraction <= 1, f"optim.final_fraction: must be within 0 and 1, not {optim.final_fraction}.")
    require(optim.weight_decay >= 0, f"optim.weight_decay: must be 0 or more, not {optim.weight_decay}.")
    require(optim.clip_norm >= 0, f"optim.clip_norm: must be 0 (off) or more, not {optim.clip_norm}.")
    require(0 <= optim.ema < 1, f"optim.ema: must be at least 0 (off) and below 1, not {optim.ema}.")
    require(optim.decay > 0, f"optim.decay: must be above 0, not {optim.decay}.")
    require(optim.power > 0, f"optim.power: must be above 0, not {optim.power}.")
    for name in ("b1", "b2", "momentum"):
        value = getattr(optim, name)
        require(value is None or 0 <= value < 1, f"optim.{name}: must be at least 0 and below 1, not {value}.")
    require(optim.eps is None or optim.eps > 0, f"optim.eps: must be above 0, not {optim.eps}.")
    _check_adapter(config.adapter, require)
    require(
        not train.qat or config.adapter.name == "none",
        f"train.qat: rounds the kernels that are trained, and with adapter.name={config.adapter.name} none is: what an adapter "
        "adds would be rounded with them only after training. Leave one of the two out; adapter.base_dtype stores the base in few bits.",
    )
    require(config.loss.z_loss >= 0, f"loss.z_loss: must be 0 (off) or more, not {config.loss.z_loss}.")
    for name in ("router_balance", "router_z"):
        value = getattr(config.loss, name)
        require(value >= 0, f"loss.{name}: must be 0 (off) or more, not {value}.")
    smoothing = config.loss.label_smoothing
    require(0 <= smoothing < 1, f"loss.label_smoothing: must be at least 0 (off) and below 1, not {smoothing}.")
    require(0 <= train.max_replicated <= 1, f"train.max_replicated: must be within 0 and 1, not {train.max_replicated}.")
    require(train.neftune >= 0, f"train.neftune: must be 0 (off) or more, not {train.neftune}.")
    require(train.steps >= 0, f"train.steps: must be 0 (use epochs) or more, not {train.steps}.")
    require(train.steps > 0 or train.epochs > 0, f"train.epochs: must be above 0, not {train.epochs}.")
    require(train.heartbeat_seconds >= 1, f"train.heartbeat_seconds: must be at least 1, not {train.heartbeat_seconds}.")
    require(train.hang_seconds is None or train.hang_seconds >= 0, f"train.hang_seconds: must be 0 (off) or more, not {train.hang_seconds}.")
    require(train.batch_size >= 1, f"train.batch_size: must be at least 1, not {train.batch_size}.")
    require(train.micro_batch_size >= 0, f"train.micro_batch_size: must be 0 or more, not {train.micro_batch_size}.")
    micro = train.micro_batch_size or train.batch_size
    require(
        train.batch_size % micro == 0,
        f"train.micro_batch_size: {micro} does not divide train.batch_size {train.batch_size}; "
        f"try {max(d for d in range(1, micro + 1) if train.batch_size % d == 0)}.",
    )
    for key, value in (
        ("train.stop_after_steps", train.stop_after_steps), ("train.profile", train.profile),
        ("eval.every", config.eval.every), ("eval.batch_size", config.eval.batch_size),
        ("checkpoint.every", config.checkpoint.every), ("train.patience", train.patience),
    ):  # fmt: skip
        require(value >= 0, f"{key}: must be 0 or more, not {value}.")
    for key, value in (
        ("eval.max_new_tokens", config.eval.max_new_tokens), ("checkpoint.keep", config.checkpoint.keep),
        ("log.every", config.log.every), ("checkpoint.keep_best", config.checkpoint.keep_best),
    ):  # fmt: skip
        require(value >= 1, f"{key}: must be at least 1, not {value}.")
    _check_evaluation(config, require)
    require(
        data.packing or data.max_segments == DataConfig.max_segments,
        f"data.max_segments: {data.max_segments} changes nothing with data.packing=False, where a row holds one document; "
        f"leave it at {DataConfig.max_segments}.",
    )
    axes = {f.name: getattr(mesh, f.name) for f in dataclasses.fields(mesh)}
    for name, size in axes.items():
        require(size >= 1 or size == -1, f"mesh.{name}: must be at least 1, or -1 for what is left, not {size}.")
    free = [name for name, size in axes.items() if size == -1]
    require(len(free) <= 1, f"mesh.{', mesh.'.join(free)}: only one axis can be -1.")
    for index, group in enumerate(optim.groups):
        known = ("pattern", "learning_rate", "weight_decay", "freeze")
        for key in group:
            require(key in known, f"optim.groups[{index}]: unknown key '{key}'; {did_you_mean(str(key), known)}.")
            if isinstance(group[key], float):
                check_finite(f"optim.groups[{index}].{key}", group[key])
        require(isinstance(group.get("pattern"), str), f"optim.groups[{index}].pattern: is missing; give a regular expression.")
    for name in config.checkpoint.allow_changes:
        require(is_key(name), f"checkpoint.allow_changes: '{name}' is not a key of the configuration.")


def _check_evaluation(config: Config, require) -> None:
    """Raises UserError for values of evaluation, and of what depends on it, that are out of range or change nothing."""
    evaluation, checkpoint, held_out = config.eval, config.checkpoint, bool(config.data.eval)
    for step in evaluation.at:
        require(step >= 1, f"eval.at: must be steps from 1 on, not {step}; the start is evaluated anyway.")
    drawn = dataclasses.asdict(evaluation.sampling)
    check_sampling("eval.sampling.", **{name: value for name, value in drawn.items() if name != "seed"})
    for name in ("slices", "stop"):
        require(all(getattr(evaluation, name)), f"eval.{name}: must be a list of texts that are not empty, not {list(getattr(evaluation, name))!r}.")
    require(evaluation.generate >= -1, f"eval.generate: must be 0 (none), a number of prompts or -1 (all), not {evaluation.generate}.")
    require(
        held_out or not (evaluation.every or evaluation.at or evaluation.generate or evaluation.slices),
        "eval.every, eval.at, eval.generate, eval.slices: are set but data.eval is empty; name a file of held-out rows in data.eval.",
    )
    require(
        held_out or (evaluation.batch_size, evaluation.max_new_tokens) == (EvalConfig.batch_size, EvalConfig.max_new_tokens),
        "eval.batch_size, eval.max_new_tokens: change nothing since data.eval is empty; leave them out, or name a file of "
        "held-out rows in data.eval.",
    )
    require(
        evaluation.generate != 0 or evaluation.scorers == EvalConfig.scorers,
        "eval.scorers: change nothing since eval.generate=0; set it to the number of prompts to answer, -1 for all, or leave them out.",
    )
    for name in ("sampling", "stop"):
        require(
            evaluation.generate != 0 or getattr(evaluation, name) == getattr(EvalConfig(), name),
            f"eval.{name}: changes nothing since eval.generate=0; set it to the number of prompts to answer, -1 for all, or leave it out.",
        )
    require(
        held_out or not checkpoint.best,
        "checkpoint.best: is a metric of held-out data and data.eval is empty; name a file of held-out rows in data.eval.",
    )
    changed = [name for name in ("best_mode", "keep_best") if getattr(checkpoint, name) != getattr(CheckpointConfig, name)]
    require(
        bool(checkpoint.best) or not (changed or config.train.patience),
        f"{f'checkpoint.{changed[0]}' if changed else 'train.patience'}: changes nothing without checkpoint.best; name the metric, such as loss.",
    )
    require(
        not config.train.patience or bool(evaluation.every or evaluation.at),
        "train.patience: counts evaluations, and eval.every=0 makes none between the first and the last step; set eval.every or eval.at.",
    )


def _check_adapter(adapter: AdapterConfig, require) -> None:
    """Raises UserError for values of the `adapter` section that are out of range or change nothing."""
    changed = [f.name for f in dataclasses.fields(adapter) if getattr(adapter, f.name) != f.default]
    require(
        adapter.name != "none" or not adapter.base_dtype,
        "adapter.base_dtype: what is quantised cannot be trained, so it takes an adapter; set adapter.name to lora or dora, or leave it out.",
    )
    if adapter.name == "none":
        require(not changed, f"adapter.{(changed or [''])[0]}: changes nothing with adapter.name=none; name lora or dora, or leave it out.")
    decided = [name for name in changed if name not in ("name", "base_dtype", "path", "dropout", "lora_plus")]
    require(
        not (adapter.path and decided),
        f"adapter.{(decided or [''])[0]}: changes nothing, since the adapter in adapter.path decides it; leave one of the two out.",
    )
    require(adapter.rank >= 1, f"adapter.rank: must be at least 1, not {adapter.rank}.")
    require(adapter.alpha > 0, f"adapter.alpha: must be above 0, not {adapter.alpha}.")
    require(0 <= adapter.dropout < 1, f"adapter.dropout: must be at least 0 (off) and below 1, not {adapter.dropout}.")
    require(adapter.lora_plus > 0, f"adapter.lora_plus: must be above 0, not {adapter.lora_plus}.")


def is_key(dotted: str) -> bool:
    """Returns whether `dotted`, such as "optim.learning_rate", names a field of the configuration."""
    node = Config
    for part in dotted.split("."):
        hints = typing.get_type_hints(node) if dataclasses.is_dataclass(node) else {}
        if part not in hints:
            return False
        node = hints[part]
    return True


def leaf_keys(cls=Config, prefix: str = "") -> list[str]:
    """Returns every key of the configuration that holds a value, such as "optim.learning_rate"."""
    keys = []
    for name, kind in typing.get_type_hints(cls).items():
        keys += leaf_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [f"{prefix}{name}"]
    return keys
