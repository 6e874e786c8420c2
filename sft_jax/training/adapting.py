"""The adapters of a run: what its configuration asks for, and how they come onto the base."""

import dataclasses
from pathlib import Path

import jax

from sft_jax.checkpoint.manifest import committed_steps
from sft_jax.checkpoint.processes import agree
from sft_jax.config import Config
from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.errors import UserError
from sft_jax.hf.load import spec_of
from sft_jax.hf.peft.place import with_adapter
from sft_jax.hf.peft.read import read_adapter
from sft_jax.hf.peft.settings import CONFIG, is_adapter_directory
from sft_jax.hf.peft.write import check_form
from sft_jax.hf.restore import check_base
from sft_jax.hf.source import (
    ADAPTER,
    CHECKPOINTS,
    PROVENANCE,
    Provenance,
    Source,
    has_tokenizer,
    place_of,
    read_provenance,
    tokenizer_folder,
)
from sft_jax.model.adapters import AdapterPlan, check_plan, plan_adapters
from sft_jax.model.attach import attach
from sft_jax.model.decoder import Decoder

_SALT = 2**31 - 1  # of the random numbers of new adapters, apart from those of a model that is drawn from the same seed


def adapters_of(config: Config, abstract: Decoder, base: Source) -> AdapterPlan | None:
    """Returns what is trained beside the base, or None where the model itself is.

    `abstract` has rows for `data.add_tokens`; `base` is the model as it lies in its directory. Raises UserError as
    `plan_adapters`, and where rows that the base does not have would never be trained.
    """
    plan = _planned(config, abstract)
    tokens = config.data.add_tokens if plan else ()
    ids = load_tokenizer(tokenizer_place(config), tokens).added_tokens if tokens else {}
    new = {token: ids[token] for token in tokens}
    trained = {"embed", "embed.embedding"} & {*plan.trained, *(module.path for module in plan.modules)} if plan else set()
    lost = [token for token, number in new.items() if number >= spec_of(base).vocab_size and number not in plan.tokens]
    if lost and not trained:
        raise UserError(
            f"data.add_tokens: the base has no row for {', '.join(lost)}, and with adapters that of a new token stays as it "
            "begins, the mean of all others; name the tokens in adapter.tokens too, or train 'embed' by adapter.train."
        )
    return plan


def _planned(config: Config, abstract: Decoder) -> AdapterPlan | None:
    wanted = config.adapter
    if wanted.name == "none":
        return None
    if wanted.path:
        plan = read_adapter(_folder(wanted.path), abstract).plan
        has = "dora" if any(module.magnitude for module in plan.modules) else "lora"
        if plan.modules and has != wanted.name:
            raise UserError(f"adapter.name: is {wanted.name}, but the adapter in {wanted.path} is {has}; set it to {has}.")
        plan = dataclasses.replace(plan, dropout=wanted.dropout)
        check_plan(plan, abstract)
        return plan
    return plan_adapters(
        abstract, name=wanted.name, rank=wanted.rank, alpha=wanted.alpha, dropout=wanted.dropout, targets=wanted.targets,
        rslora=wanted.rslora, init=wanted.init, train=wanted.train, tokens=_token_ids(config),
    )  # fmt: skip


def with_new_adapters(base: Decoder, config: Config, adapters: AdapterPlan | None) -> Decoder:
    """Returns `base`, abstract or not, with adapters as a run begins with them; `base` itself without adapters."""
    if adapters is None:
        return base
    if config.adapter.path and not isinstance(jax.tree.leaves(base)[0], jax.ShapeDtypeStruct):
        folder = _folder(config.adapter.path)
        provenance = agree(lambda: read_provenance(folder))
        if provenance is not None:
            _check_provenance(provenance, base, config, folder)
        return with_adapter(base, agree(lambda: read_adapter(folder, base)), folder, adapters)
    return attach(base, adapters, jax.random.fold_in(jax.random.key(config.seed), _SALT))


def check_export(config: Config, abstract: Decoder, base: Source) -> None:
    """Raises UserError where the run could not end with a directory of PEFT that others can use."""
    if config.model.init == "random":
        raise UserError(
            "train.export: with model.init=random the base lies nowhere, so its adapter is of no use elsewhere; set "
            "train.export=False, and write the merged model (python -m sft_jax.export --merge)."
        )
    check_form(abstract, "train.export", base)


def has_own_tokenizer(adapter: str) -> bool:
    """Returns whether `adapter.path` names an adapter that lies beside a tokenizer, and so beside the template that it knows."""
    return bool(adapter) and has_tokenizer(_folder(adapter))


def tokenizer_place(config: Config) -> Path:
    """Returns where the tokenizer of a run lies: beside the adapter that it goes on with, or with the model."""
    adapter = config.adapter.path
    return _folder(adapter) if has_own_tokenizer(adapter) else tokenizer_folder(config.model.path)


def _check_provenance(provenance: Provenance, base: Decoder, config: Config, folder: Path) -> None:
    """Raises UserError where an adapter was trained on another base, or on this one in other numbers."""
    if provenance.base_fingerprint is not None:
        check_base(provenance.base_fingerprint, base.source, f"adapter.path: {folder}")
    if provenance.base_dtype != config.adapter.base_dtype:
        raise UserError(
            f"adapter.base_dtype: is '{config.adapter.base_dtype}', but the adapter in {folder} was trained on a base stored as "
            f"'{provenance.base_dtype}' ('' = as it is), whose rounding it has learned; set it to that. To train on other "
            f"numbers all the same, change base_dtype in {folder / PROVENANCE}."
        )


def _folder(path: str) -> Path:
    """Returns the directory of PEFT that `adapter.path` names: itself, a hub id, or what a run has written."""
    try:
        folder = place_of(path)
    except UserError as error:
        raise UserError(f"adapter.path: {error}") from error
    for place in (folder, folder / ADAPTER):
        if is_adapter_directory(place):
            _check_newest(folder, place)
            return place
    raise UserError(
        f"adapter.path: {path} holds no {CONFIG}; name a directory of PEFT, or a run that has written one (python -m "
        "sft_jax.export --model RUN --adapter)."
    )


def _check_newest(run: Path, adapter: Path) -> None:
    """Raises UserError where a run has gone on since it wrote its adapter."""
    written = read_provenance(adapter) if run != adapter else None
    newest = max(committed_steps(run / CHECKPOINTS), default=-1)
    if written is not None and written.steps is not None and written.steps < newest:
        raise UserError(
            f"adapter.path: {adapter} is of step {written.steps}, but {run} has a checkpoint of step {newest}; write its adapter "
            f"again (python -m sft_jax.export --model {run} --adapter)."
        )


def _token_ids(config: Config) -> list[int]:
    """Returns the ids of `adapter.tokens`, which names them by id or by text."""
    tokens, model = config.adapter.tokens, config.model.path
    if not any(isinstance(token, str) for token in tokens):
        return list(tokens)
    folder = tokenizer_place(config)
    tokenizer = load_tokenizer(folder, config.data.add_tokens) if has_tokenizer(folder) else None
    ids = []
    for token in tokens:
        found = [token] if isinstance(token, int) else tokenizer.encode(token) if tokenizer is not None else []
        if len(found) != 1:
            many = f"is {len(found)} tokens of" if found else "needs"
            raise UserError(f"adapter.tokens: '{token}' {many} the tokenizer of {model}; name single tokens, or their ids.")
        ids += found
    return ids
