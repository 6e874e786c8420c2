"""Writing an adapter as a directory of PEFT, and reading it back before anybody is told that it is done."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sft_jax
from sft_jax.checkpoint.processes import agree
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.hf.peft.place import readable, with_adapter
from sft_jax.hf.peft.read import read_adapter
from sft_jax.hf.peft.settings import CONFIG, WEIGHTS
from sft_jax.hf.peft.write import check_form, peft_adapter
from sft_jax.hf.source import PROVENANCE, Provenance, find_model, read_source
from sft_jax.hf.verify import ExportMismatch
from sft_jax.hf.writer import TensorSpec, new_directory, partial_path, to_json, write_file, write_text
from sft_jax.model.adapters import adaptable
from sft_jax.model.decoder import Decoder
from sft_jax.model.low_rank import LowRank
from sft_jax.model.sharding import named_leaves

TOLERANCE = 1e-5  # of what an adapter adds to a kernel, and of what PiSSA subtracts


@dataclass(frozen=True)
class AdapterReport:
    """What was written, and how well it agreed with the live model."""

    tensors: int
    nbytes: int
    difference: float  # largest, of what is added to a kernel, relative to the largest number of that

    def __str__(self) -> str:
        """Returns the report as the end of a line that says what was written."""
        return f"{self.tensors} tensors, {self.nbytes / 1e6:,.1f} MB; read back, changes of kernels within {self.difference:.1e}"


def save_adapter(
    model: Decoder, tokenizer: Tokenizer | None, path: str | Path, provenance: Provenance, overwrite: bool = False
) -> AdapterReport:
    """Writes the adapters of `model` as a directory of PEFT at `path`, all or nothing, and compares them with `model`.

    `provenance` names the base, which `peft` loads the adapter on. Of several processes all must call this; the first one
    writes. Raises UserError where `path` is taken or cannot be written, or PEFT has no form for what was trained, and
    ExportMismatch, leaving nothing at `path`, where the directory is not the adapter.
    """
    path = Path(path).expanduser()
    path = path.parent.resolve() / path.name
    check_form(model, "--adapter", agree(lambda: read_source(find_model(provenance.base), provenance.base)))
    arrays, config = peft_adapter(model, provenance.base)
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
    nbytes = sum(spec.nbytes for spec in specs)
    first = jax.process_index() == 0

    def write(folder: Path) -> None:
        write_file(folder / WEIGHTS, specs, arrays.__getitem__)
        write_text(folder / CONFIG, to_json(config))
        write_text(folder / PROVENANCE, to_json(provenance.to_dict()))
        write_text(folder / "README.md", _readme(model, provenance))
        if tokenizer is not None:
            tokenizer.save(folder)

    with contextlib.ExitStack() as stack:
        folder = agree(lambda: stack.enter_context(new_directory(path, nbytes, overwrite)) if first else partial_path(path))
        agree(lambda: write(folder) if first else None)
        difference = _compare(folder, model)
        agree(stack.pop_all().close)  # the directory appears under its name
    return AdapterReport(len(specs), nbytes, difference)


def _compare(folder: Path, model: Decoder) -> float:
    """Returns how far what the adapter in `folder` adds to any kernel is from what that of `model` does, relative to it."""
    base = _without_adapters(model)
    again = with_adapter(base, agree(lambda: read_adapter(folder, base)), folder)
    worst = 0.0
    for (path, ours), (_, theirs) in zip(adaptable(model), adaptable(again), strict=True):
        if ours.adapter is not None or theirs.adapter is not None:
            difference, size = (float(x) for x in _difference(ours.adapter, theirs.adapter))
            worst = max(worst, difference / (size or 1.0))
            if not difference <= TOLERANCE * size:  # also where it is NaN
                raise ExportMismatch(f"{folder}: what is added to {path} differs from the live adapter's by {difference:.3g} of {size:.3g}.")
    live, read = (dict(named_leaves(decoder)) for decoder in (model, again))
    for path in (*model.adapters.trained, *(path for path in live if path.endswith((".rows", ".magnitude")))):
        if path not in read or not np.array_equal(readable(live[path].get_value()), readable(read[path].get_value())):
            raise ExportMismatch(f"{folder}: {path} was written with other numbers than the live model's.")
    return worst


@jax.jit
def _difference(ours: LowRank | None, theirs: LowRank | None) -> tuple[jax.Array, jax.Array]:
    """Returns the largest difference between what two adapters add to their kernels, and the largest number in its terms.

    None adds nothing: a weight that PEFT knows as one has an adapter everywhere or nowhere. What PiSSA adds is the
    difference of two products, which is rounded as they are, however small it is.
    """

    def largest(inputs):
        ours, theirs = (0.0 if adapter is None else adapter.change() for adapter in inputs)
        subtracted = 0.0 if inputs[0] is None else inputs[0].subtracted()
        return jnp.abs(ours - theirs).max(), jnp.abs(ours).max() + jnp.abs(subtracted).max()

    if (theirs if ours is None else ours).a.ndim == 2:
        return largest((ours, theirs))
    difference, size = jax.lax.map(largest, (ours, theirs))  # one layer of a stack after the other
    return difference.max(), size.max()


def _without_adapters(model: Decoder) -> Decoder:
    """Returns the base of a decoder. Parameters that were trained whole are as trained; the file has them all."""
    base = jax.tree.map(lambda leaf: leaf, model)
    for _, node in adaptable(base):
        node.adapter = nnx.data(None)
    base.embed.token_rows = base.head_rows = nnx.data(None)
    base.adapters = None
    return base


def _readme(model: Decoder, provenance: Provenance) -> str:
    base = provenance.base
    is_hub_id = not Path(base).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base)
    rows = [("base model", f"`{base}`"), ("adapter", str(model.adapters))]
    rows += [("optimizer steps", f"{provenance.steps:,}")] if provenance.steps is not None else []
    rows += [("data fingerprint", f"`{provenance.data_fingerprint}`" if provenance.data_fingerprint else "not recorded")]
    front = ["---", "library_name: peft", "tags: [sft_jax, lora]", *([f"base_model: {base}"] if is_hub_id else []), "---"]
    body = ["", f"# Adapter for {Path(base).name}", "", f"Written by sft_jax {sft_jax.__version__}.", "", "| | |", "|---|---|"]
    return "\n".join([*front, *body, *(f"| {name} | {value} |" for name, value in rows), ""])
