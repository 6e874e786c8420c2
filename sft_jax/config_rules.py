"""What the values of a configuration must be, each alone and beside the others."""

import dataclasses

from sft_jax.config import AdapterConfig, CheckpointConfig, Config, DataConfig, EvalConfig, is_key
from sft_jax.config_checks import (
    check_columns, check_date, check_finite, check_local, check_sampling, check_supervise, check_template_arguments, check_tokens,
)  # fmt: skip
from sft_jax.errors import UserError, did_you_mean


def check_rules(config: Config, needs_data: bool, needs_model: bool) -> None:
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
