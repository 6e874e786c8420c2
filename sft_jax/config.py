"""The configuration: one frozen dataclass tree, strict, with every default in one place.

`configs/*.py` build an `ml_collections.ConfigDict` from `default_config()`; `config_parsing.parse_config` turns it back into
these dataclasses. Nothing else in the package reads a ConfigDict.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

FormatName = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "segments", "tokens"]
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


def data_set_key(split: str, index: int, name: str, count: int) -> str:
    """Returns the key of one of the `count` sets of `data.train` or `data.eval`, as the user would look for it.

    A set that has no name of its own is found by its place.
    """
    if name == split and count == 1:
        return f"data.{split}"
    return f"data.{split}[{index}]" if name == f"{split}_{index}" else f"data.{split}.{name}"
