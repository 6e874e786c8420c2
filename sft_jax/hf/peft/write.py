"""The adapter of a decoder as PEFT holds it: its tensors, and the adapter_config.json that they are read with."""

import collections
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from sft_jax.errors import UserError
from sft_jax.hf.names import name_table
from sft_jax.hf.peft.carriers import TIED_HEAD, Carrier, Factors, carriers, module_tensors
from sft_jax.hf.peft.place import Host, host_values
from sft_jax.hf.peft.read import PREFIX
from sft_jax.hf.source import Source, as_folder, is_adapter, is_run
from sft_jax.model.adapters import module_at
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config


def check_form(decoder: Decoder, key: str, base: Source) -> None:
    """Raises UserError, which begins with `key`, where PEFT has no form for what `decoder`, abstract or not, trains.

    `base` is the model that PEFT is to load.
    """
    place = as_folder(base.name)
    if place.is_dir() and (is_run(place) or is_adapter(place)):
        raise UserError(
            f"{key}: the base {base.name} is {'a run' if is_run(place) else 'an adapter'} itself, which peft cannot load as one; "
            "begin from its export (python -m sft_jax.export), or set train.export=False and write the merged model (--merge)."
        )
    new_tokens = decoder.spec.vocab_size - spec_from_config(base.config_dict()).vocab_size
    if new_tokens:
        raise UserError(
            f"{key}: the model was given {new_tokens} tokens that its base {base.name} has no "
            "rows for, and an adapter of PEFT cannot bring them; set train.export=False, and write the merged model (python -m "
            "sft_jax.export --merge)."
        )
    remedy = "write the merged model instead (python -m sft_jax.export --merge), or leave it out"
    places = {carrier.name: carrier for carrier in carriers(decoder)}
    plans = {module.path: module for module in decoder.adapters.modules}
    adapted = {name: [plans[path] for path in place.paths if path in plans] for name, place in places.items()}
    adapted = {name: of_parts for name, of_parts in adapted.items() if of_parts}
    for name, of_parts in adapted.items():
        if any(plan.magnitude for plan in of_parts) and _parameter_name(places[name], places):
            raise UserError(
                f"{key}: DoRA on '{name}' has no form that PEFT applies in a model with experts; {remedy} of adapter.targets."
            )
    stored = module_tensors(decoder)
    for tensor in stored:
        module, _, last = tensor.name.rpartition(".")
        trained = [path for path in tensor.paths if path in decoder.adapters.trained]
        if not trained or (module in adapted and last == "bias"):
            continue
        within = [other.name for other in stored if other.name.startswith(f"{module}.")]
        if any(name.rpartition(".")[0] != module for name in within) or any(f"{name}.".startswith(f"{module}.") for name in adapted):
            raise UserError(
                f"{key}: {', '.join(trained)} is trained beside other parts of '{module}', for which PEFT has no form; {remedy} "
                "of adapter.train."
            )


def peft_adapter(decoder: Decoder, base: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors by name and adapter_config.json of the adapter on `decoder`, for a base that lies at `base`.

    Of several processes all must call this. The adapter must have passed `check_form`.
    """
    host = host_values(decoder)
    places = {carrier.name: carrier for carrier in carriers(decoder)}
    low_rank = {name: factors for name, carrier in places.items() if (factors := _joined(decoder, carrier, host))}
    tensors: dict[str, np.ndarray] = {}
    for name, factors in low_rank.items():
        wrapped = name.endswith("gate_up_proj") and f"{name.removesuffix('gate_up_proj')}down_proj" in low_rank
        tensors |= _tensors_of(places[name], factors, wrapped)
    biases, whole = _whole_modules(decoder, host, low_rank)
    if decoder.spec.tied_head and "embed.embedding" in decoder.adapters.trained:
        whole[TIED_HEAD] = {f"{TIED_HEAD}.weight": host("embed.embedding")}
    tensors |= biases | {name: array for arrays in whole.values() for name, array in arrays.items()}
    rows = _token_rows(decoder, host, places)
    tensors |= {f"{name}.token_adapter.trainable_tokens_delta": array for name, (_, array) in rows.items()}
    parameters = {name: full for name in low_rank if (full := _parameter_name(places[name], places))}
    tied = decoder.spec.tied_head and (TIED_HEAD in low_rank or TIED_HEAD in whole)
    # What PEFT ties to an embedding it finds by the name that all but GPT-2 give the embedding; otherwise it is to be told.
    implied = {TIED_HEAD} if tied and any(name.endswith(".embed_tokens") for name in places) else set()
    modules = [name for name in low_rank if name not in parameters and name not in implied]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "lora_dropout": 0.0 if parameters else decoder.adapters.dropout,  # PEFT has none for parameters
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": any(not (places[name].packing.transpose or places[name].embedding) for name in modules),
        "init_lora_weights": True,
        "use_dora": any(factors.magnitude is not None for factors in low_rank.values()),
        "use_rslora": decoder.adapters.rslora,
        "target_modules": _shortened(decoder, modules, places),
        "target_parameters": list(parameters.values()) or None,
        "modules_to_save": [name for name in whole if name not in implied] or None,
        "trainable_token_indices": {name: list(ids) for name, (ids, _) in rows.items()} or None,
        "ensure_weight_tying": tied,
        **_ranks({parameters.get(name, name): factors for name, factors in low_rank.items()}, decoder.adapters.rslora),
    }
    return {f"{PREFIX}{name}": np.ascontiguousarray(array) for name, array in tensors.items()}, config


def _joined(decoder: Decoder, carrier: Carrier, host: Host) -> Factors | None:
    """Returns the adapter of one module of transformers, None where none of its parts has one."""
    parts = [_factors(decoder, path, carrier.index, host) for path in carrier.paths]
    if not any(parts):
        return None
    if carrier.name == TIED_HEAD and decoder.spec.tied_head:  # the same matrix from the other side
        return Factors(parts[0].b.T, parts[0].a.T, parts[0].scale)
    if all(part is None or part.magnitude is None for part in parts):
        return carrier.join(parts)
    kernel = lambda path: np.asarray(host(f"{path}.kernel")[carrier.index], np.float32)  # noqa: E731
    lengths = [
        np.linalg.norm(kernel(path), axis=-2) if part is None else part.magnitude
        for path, part in zip(carrier.paths, parts, strict=True)
    ]
    return carrier.join(parts, lengths)


def _factors(decoder: Decoder, path: str, index: tuple[int, ...], host: Host) -> Factors | None:
    """Returns the adapter of one slice of a stack, without the columns of zeros that fill up its rank.

    None where there is none, or where a slice without magnitude is all zeros: it had none where it came from. What PiSSA
    subtracts is added with the opposite sign, at twice the rank.
    """
    adapter = module_at(decoder, path).adapter
    if adapter is None:
        return None
    read = lambda name: host(f"{path}.adapter.{name}")[index]  # noqa: E731
    a, b = read("a").swapaxes(-1, -2), read("b").swapaxes(-1, -2)
    if adapter.start_a is not None:
        a = np.concatenate([a, read("start_a").swapaxes(-1, -2)], axis=-2)
        b = np.concatenate([b, -read("start_b").swapaxes(-1, -2)], axis=-1)
    used = np.any(a != 0, axis=(*range(a.ndim - 2), -1)) | np.any(b != 0, axis=(*range(b.ndim - 2), -2))
    magnitude = None if adapter.magnitude is None else read("magnitude")
    if not used.any():
        if magnitude is None:
            return None
        used[0] = True
    return Factors(a[..., used, :], b[..., used], adapter.scale, magnitude)


def _tensors_of(carrier: Carrier, factors: Factors, wrapped: bool) -> dict[str, np.ndarray]:
    """Returns the tensors of one adapter; `wrapped`: PEFT has put a second one around that of these experts."""
    name = carrier.name
    if carrier.experts:
        module = name.rpartition(".")[0] + (".base_layer" if wrapped else "")
        count, rank, inputs = factors.a.shape
        return {
            f"{module}.lora_A.weight": factors.a.reshape(count * rank, inputs),
            f"{module}.lora_B.weight": factors.b.transpose(1, 2, 0).reshape(-1, rank * count),
        }
    if carrier.embedding:
        return {f"{name}.lora_embedding_A": factors.a, f"{name}.lora_embedding_B": factors.b}
    tensors = {f"{name}.lora_A.weight": factors.a, f"{name}.lora_B.weight": factors.b}
    return tensors if factors.magnitude is None else tensors | {f"{name}.lora_magnitude_vector": factors.magnitude}


def _whole_modules(decoder: Decoder, host: Host, low_rank: Collection[str]):
    """Returns what is trained whole: biases of modules with adapters, and by module all tensors of the others."""
    stored = {tensor.name: tensor for tensor in module_tensors(decoder)}
    read = lambda name: stored[name].packing.join([host(path)[stored[name].index] for path in stored[name].paths])  # noqa: E731
    biases, modules = {}, {}
    for name, tensor in stored.items():
        if not any(path in decoder.adapters.trained for path in tensor.paths):
            continue
        module, _, last = name.rpartition(".")
        within = [other for other in stored if other.startswith(f"{module}.")]
        if module in low_rank and last == "bias":
            biases[f"{module}.base_layer.bias"] = read(name)
        else:
            modules[module] = {other: read(other) for other in within}
    return biases, modules


def _parameter_name(carrier: Carrier, places: Mapping[str, Carrier]) -> str | None:
    """Returns the parameter as which PEFT is to find a carrier, None for those that it finds as modules.

    In a model with experts PEFT takes modules named like those that the experts once had, of dense layers and shared MLPs,
    for the experts (as of 0.21, while it translates adapters of older versions), so they are named as parameters too.
    """
    if carrier.experts:
        return carrier.name
    in_mlp = any(".mlp." in path for path in carrier.paths)
    return f"{carrier.name}.weight" if in_mlp and any(other.experts for other in places.values()) else None


def _token_rows(
    decoder: Decoder, host: Host, places: Mapping[str, Carrier]
) -> dict[str, tuple[Sequence[int], np.ndarray]]:
    """Returns ids and rows of trained tokens, by the name of the embedding and of a head of its own."""
    plan, found = decoder.adapters, {}
    if plan.tokens:
        embedding = next(name for name, carrier in places.items() if carrier.embedding)
        found[embedding] = plan.tokens, host("embed.token_rows.rows")
    if plan.head_tokens:
        head = next(name for name, carrier in places.items() if carrier.paths == ("lm_head",))
        found[head] = plan.head_tokens, host("head_rows.rows")
    return found


def _shortened(decoder: Decoder, names: Sequence[str], places: Mapping[str, Carrier]) -> list[str]:
    """Returns what PEFT finds exactly these modules by: the ends of their names, or all of each name.

    An end stands for every module that has it, so all of them must have an adapter, and there may be none that the decoder
    does not know of, such as those of a vision tower, or that PEFT translates itself, as it does for experts.
    """
    ends = {name.rpartition(".")[2] for name in names}
    others = {name.rpartition(".")[2] for name in places.keys() - set(names)}
    has_experts = any(carrier.experts for carrier in places.values())
    if ends & others or has_experts or name_table(decoder.source.config_dict()).carried:
        return sorted(names)
    return sorted(ends)


def _ranks(low_rank: Mapping[str, Factors], rslora: bool) -> dict[str, Any]:
    """Returns rank and alpha, those that most adapters have, and the patterns of the others."""
    ranks = {name: factors.rank for name, factors in low_rank.items()}
    alphas = {
        name: round(factors.scale * (math.sqrt(factors.rank) if rslora else factors.rank), 9)
        for name, factors in low_rank.items()
    }
    most = lambda values, otherwise: collections.Counter(values).most_common(1)[0][0] if values else otherwise  # noqa: E731
    rank, alpha = most(list(ranks.values()), 1), most(list(alphas.values()), 1.0)
    plain = lambda value: int(value) if value == int(value) else value  # noqa: E731
    return {
        "r": rank,
        "lora_alpha": plain(alpha),
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): plain(value) for name, value in alphas.items() if value != alpha},
    }
