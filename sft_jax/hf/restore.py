"""A decoder from a checkpoint of a run: its best or its newest."""

import dataclasses
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sft_jax.checkpoint.checkpoints import (
    DamagedCheckpoint,
    committed_steps,
    flatten_state,
    restore,
    unflatten_state,
    verify,
)
from sft_jax.checkpoint.manifest import read_manifest
from sft_jax.errors import UserError
from sft_jax.hf.fingerprint import fingerprint
from sft_jax.hf.source import CHECKPOINTS, EXPORT, Source, best_step, find_model, has_export, is_run, place_of, read_source
from sft_jax.model.decoder import Decoder
from sft_jax.model.layers import dtype_of
from sft_jax.model.sharding import named_leaves


def sound_checkpoint(run: Path, step: int | None = None) -> tuple[Path, dict[str, Any]]:
    """Returns a checkpoint of a run whose files are what was written, and its manifest.

    That of `step`; without, the best one where a run that has finished says so, else the newest.
    """
    steps = committed_steps(run / CHECKPOINTS)
    if step is not None:
        if step not in steps:
            raise UserError(f"{run / CHECKPOINTS}: has no checkpoint of step {step}; there are {', '.join(map(str, steps)) or 'none'}.")
        steps = [step]
    elif (best := best_step(run)) in steps:
        steps = [*(other for other in steps if other != best), best]
    for number in reversed(steps):
        folder = run / CHECKPOINTS / str(number)
        try:
            return folder, verify(folder)
        except DamagedCheckpoint as error:
            if step is not None:
                raise UserError(f"{folder}: is damaged ({error}); copy it back, or name another checkpoint.") from error
            print(f"Checkpoint {folder} is damaged, the one before it is taken: {error}.", file=sys.stderr)
    remedy = f", or name {run / EXPORT}" if has_export(run) else ""
    raise UserError(f"{run / CHECKPOINTS}: every checkpoint of this run is damaged; copy one back{remedy}.")


def model_source(path: str | Path) -> Source:
    """Returns the model at `path`. That of a run is as its checkpoints say: it may have more tokens than its own base."""
    place = place_of(path)
    source = read_source(find_model(path), str(path))
    for step in reversed(committed_steps(place / CHECKPOINTS) if is_run(place) else []):
        try:
            return dataclasses.replace(source, config=read_manifest(place / CHECKPOINTS / str(step))["model_config"])
        except DamagedCheckpoint:
            continue  # whoever reads its arrays tells
    return source


def restored(
    decoder: Decoder, checkpoint: Path, manifest: dict[str, Any], param_dtype: str | None, base: Decoder | None
) -> Decoder:
    """Returns the abstract `decoder` with the parameters of a checkpoint, in the shardings that its leaves have.

    Where the run keeps an average of its parameters, that is what they are. `base` has the parameters that the checkpoint
    of a run with adapters leaves out.
    """
    written = manifest["arrays"]
    graphdef, state = nnx.split(decoder)
    abstract = flatten_state({"params": state})
    base_arrays = {} if base is None else flatten_state({"params": nnx.state(base)})
    stored = {name: _stored_name(name, written) for name in abstract}
    kept = {name: base_arrays[name] for name in abstract if stored[name] not in written and name in base_arrays}
    like = {}
    for name in abstract.keys() - kept.keys():
        leaf, dtype = abstract[name], written[stored[name]][1] if stored[name] in written else abstract[name].dtype
        like[stored[name]] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    try:
        arrays = restore(checkpoint, like)
    except DamagedCheckpoint as error:
        raise UserError(f"{error}. Check the memory and the disk of this machine, and try again.") from error
    arrays = {name: kept[name] if name in kept else arrays[stored[name]] for name in abstract}
    if param_dtype is not None:
        wanted = {path: dtype_of(leaf, param_dtype) for path, leaf in named_leaves(decoder)}
        path_of = lambda name: name.partition("/")[2].replace("/", ".")  # noqa: E731
        arrays = {name: array.astype(wanted[path_of(name)]) for name, array in arrays.items()}
    result = nnx.merge(graphdef, unflatten_state({"params": state}, arrays)["params"])
    lines = [(name, *written[stored[name]]) for name in abstract if name not in kept]
    if base is not None:
        lines.append((f"base {base.source.fingerprint}", (), "", 0))
    result.source = dataclasses.replace(decoder.source, fingerprint=fingerprint(lines))
    return result


def check_base(expected: str, base: Source, key: str) -> None:
    """Raises UserError where adapters that were trained on a base of fingerprint `expected` meet another one."""
    if base.fingerprint != expected:
        raise UserError(
            f"{key}: {base.name} is not the model that these adapters were trained on: its tensors are others. Restore the files of "
            "that model, or name the place where they are."
        )


def _stored_name(name: str, written: Container[str]) -> str:
    """Returns under which name a checkpoint has the parameter "params/...": its average, if there is one, or frozen."""
    places = (name.replace("params", place, 1) for place in ("average", "params", "frozen"))
    return next((place for place in places if place in written), name)
