"""Plans of a tiny model: compiled for TPUs where libtpu is installed, on the CPU's own compiler else; and the command."""

import dataclasses
import json
import math
import os
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
import tiny_run
from slow_values import slow
from tiny_plans import LENGTH, MICRO, MODEL, ROWS, tiny_config, write_model

from sft_jax.config_parsing import parse_config
from sft_jax.data.prepare import prepare
from sft_jax.errors import UserError
from sft_jax.hf.load import spec_of
from sft_jax.model.blocked_attention import BLOCK, BLOCKS, block_size
from sft_jax.model.platform import tracing_for
from sft_jax.model.sharding import make_mesh
from sft_jax.planning import planner, report
from sft_jax.planning.collectives import collectives
from sft_jax.planning.estimate import evaluation_temporaries, temporaries
from sft_jax.planning.flops import count_flops
from sft_jax.planning.hlo import Program
from sft_jax.planning.launcher import tpu_flags
from sft_jax.planning.machines import CHIPS, machine
from sft_jax.planning.memory import held
from sft_jax.planning.program import has_tpu_compiler, make_programs
from sft_jax.planning.remedies import remedies
from sft_jax.planning.search import search
from sft_jax.planning.whole_arrays import Limits, whole_arrays
from sft_jax.planning.work import work_of

needs_libtpu = pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed (pip install 'sft_jax[tpu]')")
ROOT = Path(__file__).parents[2]
LAYOUTS = {  # those of a machine of four devices
    "fsdp": {}, "fsdp_tensor": {"mesh__tensor": 2}, "data_fsdp": {"mesh__data": 2}, "data_tensor": {"mesh__data": 2, "mesh__tensor": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A directory that holds config.json and nothing else."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Compilations are kept between tests of this session, and not from before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "plans"))


def plan(model, name="v5e-4", estimated=False, **settings):
    config = tiny_config(model, **settings)
    return planner.make_plan(config, machine(name), planner.base_of(config), estimated=estimated, log=lambda text: None)


def parameters() -> int:
    hidden, inner = MODEL["hidden_size"], MODEL["intermediate_size"]
    heads, keys = (MODEL[name] * MODEL["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    layer = hidden * (2 * heads + 2 * keys + 3 * inner) + 2 * hidden
    return MODEL["num_hidden_layers"] * layer + 2 * MODEL["vocab_size"] * hidden + hidden


def check_plan(found) -> None:
    """What must hold of every plan of full fine-tuning on four devices with fsdp alone."""
    assert found.held.trained == pytest.approx(4 * parameters() / 4, rel=0.01)  # norms are replicated
    assert found.held.optimizer == pytest.approx(2 * found.held.trained, rel=0.01)
    assert found.held.gradients == found.held.trained
    assert sum(report.memory_rows(found).values()) == found.train.needed
    # 6 FLOPs a parameter and token, and attention over half of each row (PaLM, appendix B).
    kernels = parameters() - MODEL["vocab_size"] * MODEL["hidden_size"] - (2 * MODEL["num_hidden_layers"] + 1) * MODEL["hidden_size"]
    width = MODEL["num_attention_heads"] * MODEL["head_dim"]
    pairs = ROWS * LENGTH * (LENGTH + 1) / 2 * MODEL["num_hidden_layers"]
    assert found.model_flops == 6 * kernels * ROWS * LENGTH + 12 * width * pairs


@needs_libtpu
def test_a_tpu_plan(model):
    found = plan(model)
    assert found.fits and not found.estimated and not found.train.whole
    assert found.room == int(CHIPS["v5e"].memory) - found.needed
    check_plan(found)
    assert found.train.arguments == pytest.approx(found.held.state + found.held.batch, rel=0.05)
    kinds = report.by_kind(found)
    # Every kernel is gathered in the forward pass, and again in the backward pass, of both micro-batches.
    kernels = 2 * 2 * parameters() * 3 / 4
    assert 1.5 * kernels < kinds["all-gather"]["bytes"] < 3.5 * kernels
    assert 0 < kinds["all-gather"]["exposed"] < kinds["all-gather"]["bytes"]
    # Gradients are summed over devices in float32, by both micro-batches, that of the table where it lies.
    table = MODEL["vocab_size"] * MODEL["hidden_size"]
    assert kinds["reduce-scatter"]["bytes"] + kinds["all-reduce"]["bytes"] / 2 > 0.9 * 2 * 4 * (parameters() - table) * 3 / 4
    assert {one.dtype for one in found.train.collectives if one.kind in ("reduce-scatter", "all-reduce")} <= {"f32", "s32"}
    states = 2 * MICRO * LENGTH // 4 * MODEL["hidden_size"] * 2 * 3 / 4  # of a device's tokens, of both micro-batches
    assert kinds["all-to-all"]["bytes"] == pytest.approx(2 * states)  # there, and their gradients back
    again = plan(model)  # from what was kept
    assert again.train == found.train


@needs_libtpu
def test_a_plan_that_does_not_fit(model, tmp_path):
    wide = write_model(tmp_path / "wide", hidden_size=4096, intermediate_size=32768, num_hidden_layers=8)
    found = plan(wide, name="v5e-1", train__batch_size=64, train__micro_batch_size=1)
    assert not found.fits and found.room < 0 and found.needed > found.train.limit > 15e9
    told = "\n".join(report.lines(found, 0.5, None, remedies(found, planner.base_of(found.config))))
    assert "DOES NOT FIT" in told and "--topology v5e-" in told


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_no_layout_holds_on_tpus_what_none_should(model, layout, kind):
    adapter = {"adapter__name": "lora", "model__dtype": "bfloat16"} if kind == "lora" else {}
    found = plan(model, **LAYOUTS[layout], **adapter)
    assert found.fits and not found.train.whole


def compiled_here(config, devices=4):
    """The train step on the CPU's own devices: its programs, and the compiled one."""
    mesh = make_mesh(**vars(config.mesh), devices=jax.devices()[:devices])
    programs = make_programs(config, planner.base_of(config), mesh, lambda text: None)
    return programs, programs.train_step.lower(programs.state, programs.batch).compile()


def estimate_over_compiled(programs, compiled) -> float:
    """Bytes of a device by estimate, as a share of those that the compiler plans with."""
    size, stats = held(programs), compiled.memory_analysis()
    return (size.state + size.batch + temporaries(programs, size, "cpu")) / (stats.argument_size_in_bytes + stats.temp_size_in_bytes)


@pytest.mark.parametrize("layout", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[1:])])
def test_no_layout_holds_what_none_should(model, layout):
    """The same on the CPU's compiler, where libtpu is not needed; and memory is about what is estimated."""
    programs, compiled = compiled_here(tiny_config(model, model__compute_dtype="float32", **LAYOUTS[layout]))
    text = compiled.as_text()
    found = collectives(Program(text), 4, lambda loop: 1)
    assert any(one.kind == "all-gather" for one in found) or layout == "data_tensor"
    assert not whole_arrays(text, found, planner.limits_of(programs, programs.batch))
    # Unlike that for TPUs this compiler does not keep the gradient of the head through the backward pass.
    assert 0.75 < estimate_over_compiled(programs, compiled) < 1.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"model__remat": "none"}, {"model__remat": "dots"}, {"train__micro_batch_size": 4}, {"mesh__tensor": 2},
        {"adapter__name": "lora"}, {"mesh__fsdp": 1},
    ],
    ids=lambda settings: "-".join(settings) or "fsdp",
)  # fmt: skip
def test_estimates_are_what_the_compiler_plans_with(tmp_path, settings):
    wide = write_model(
        tmp_path / "wide", hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=4096, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    usual = {"data__max_length": 512, "train__micro_batch_size": 8, "model__compute_dtype": "float32"}
    programs, compiled = compiled_here(tiny_config(wide, **{**usual, **settings}), devices=1 if "mesh__fsdp" in settings else 4)
    assert 0.8 < estimate_over_compiled(programs, compiled) < 1.2


@pytest.mark.parametrize("settings", [{}, *slow({"train__micro_batch_size": 4}, {"mesh__tensor": 2}, {"data__max_length": 2048})], ids=str)
def test_evaluations_are_estimated_as_the_compiler_plans_them(tmp_path, settings):
    """They keep nothing for a backward pass; on the CPU's own compiler."""
    wide = write_model(tmp_path / "wide", hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=4096)
    usual = {"data__max_length": 512, "train__micro_batch_size": 8, "model__compute_dtype": "float32"}
    config = tiny_config(wide, **{**usual, **settings})
    programs = make_programs(config, planner.base_of(config), make_mesh(**vars(config.mesh), devices=jax.devices()[:4]), lambda text: None)
    stats = programs.eval_step.lower(programs.state, programs.eval_batch).compile().memory_analysis()
    assert 0.8 < evaluation_temporaries(programs) / stats.temp_size_in_bytes < 1.4


def test_an_estimate_counts_an_evaluation(model, tmp_path, monkeypatch):
    """It decides where its rows are many; the optimizer's state lies beside it, and fewer rows are the remedy."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    without, few, many = (
        plan(model, name="h100x4", **settings) for settings in ({}, {"data__eval": str(rows)}, {"data__eval": str(rows), "eval__batch_size": 4096})
    )
    assert without.evaluation is None and without.needed == few.needed == few.train.needed > few.evaluation_needed > few.held.state
    assert many.needed == many.evaluation_needed == many.evaluation.needed + many.held.optimizer > many.train.needed
    monkeypatch.setitem(CHIPS, "h100", dataclasses.replace(CHIPS["h100"], memory=many.needed - 1))
    short = plan(model, name="h100x4", data__eval=str(rows), eval__batch_size=4096)
    assert short.train.fits and not short.fits
    [remedy] = remedies(short, planner.base_of(short.config))
    assert remedy.settings.keys() == {"eval.batch_size"} and "an evaluation needs" in "\n".join(report.lines(short, 0.5, None, [remedy]))


@pytest.mark.slow
@needs_libtpu
def test_what_was_compiled_is_told(model, tmp_path, monkeypatch):
    """The flags of the launchers, arrays of the eval step as well, and which operations wait for devices."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    found = plan(model, data__eval=str(rows))
    assert found.flags == tpu_flags()
    wrong = dataclasses.replace(found, evaluation=dataclasses.replace(found.evaluation, whole=("logits of all positions are formed: x",)))
    told = report.to_dict(wrong, 0.5, None)
    assert told["whole_arrays"] == ["in an evaluation logits of all positions are formed: x"]
    assert told["whole_arrays"][0] in "\n".join(report.lines(wrong, 0.5, None))
    assert told["compiler_flags"] == [f"{name}={value}" for name, value in tpu_flags().items()]
    exposed = sum(sizes["exposed"] for sizes in told["collectives"].values())
    assert told["most_exposed"] and 0 < sum(one["bytes"] for one in told["most_exposed"]) <= exposed
    assert f"in {told['most_exposed'][0]['operation']}" in "\n".join(report.lines(found, 0.5, None))
    assert not planner.make_plan(found.config, found.machine, planner.base_of(found.config), plain=True, log=lambda text: None).flags


def test_what_none_should_hold_is_seen():
    limits = Limits(
        positions=256, vocab=1000, hidden=64, kernel=64 * 128, head=64 * 1000, table=(1000, 64), states=256 * 64, share=64 * 125,
        documents=3 * 16, stacks=frozenset({(2, 64, 64)}),
    )  # fmt: skip
    program = "%a = bf16[2,128,1000]{2,1,0} add(%b, %c)\n%d = f32[64,1000]{1,0} copy(%e)\n%f = f32[128,1000] copy(%g)"
    assert whole_arrays(program, [], limits) == ["logits of all positions are formed: bf16[2,128,1000]"]
    scattered = "%a = f32[1000,64]{1,0} scatter(%b, %c)\n%d = f32[1000,8]{1,0} scatter(%e, %f)"
    assert whole_arrays(scattered, [], limits) == ["the table of embeddings or its gradient is formed whole: f32[1000,64]"]

    def gathered(shape: str, operation: str = "jit(train_step)/shard_map/all_gather", kind: str = "all-gather") -> list[str]:
        rest = f'channel_id=1, replica_groups={{{{0,1}}}}, dimensions={{1}}, metadata={{op_name="{operation}"}}'
        line = f"%one.1 = f32[{shape}] {kind}(%a), {rest}"
        text = f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  {line}\n}}\n"
        return whole_arrays("", collectives(Program(text), 2, lambda loop: 1), limits)

    assert not gathered("64,128") and not gathered("64,1000")  # a kernel, the head
    assert len(gathered("2,64,128")) == 1
    assert len(gathered("8,64,125")) == 1  # as many numbers as the head has, but layers
    assert gathered("2,64,1,64")[0].startswith("more than one layer is gathered at once: 8,192 numbers (f32[2,64,1,64])")
    # Of activations and of sums of documents what one layer and one batch have.
    assert not gathered("256,64", "jit(train_step)/shard_map/tokens_of_others/all_gather")
    assert len(gathered("512,64", "jit(train_step)/shard_map/tokens_of_others/all_gather")) == 1
    assert not gathered("3,16", "jit(train_step)/sums_of_documents/stack")
    assert len(gathered("2,64,128", "jit(train_step)/sums_of_documents/stack")) == 1
    # What is added up is gradients of one layer or of what a device stores, and states; not layers that were zeros elsewhere.
    assert not gathered("64,128", kind="all-reduce") and not gathered("256,64", kind="all-reduce")
    assert len(gathered("4,64,128", kind="all-reduce")) == 1
    assert gathered("2,64,64", kind="all-reduce")[0].startswith("more than one layer is added up at once")


def test_flops_are_those_of_the_layers(model):
    """Counted from the jaxpr, remat included, against the products of a decoder written out."""
    config = tiny_config(model, model__attention="reference")
    counted = {}
    for remat in ("none", "full"):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        programs = make_programs(config, planner.base_of(config), make_mesh(1, 1, 1, jax.devices()[:1]), lambda text: None)
        counted[remat] = count_flops(programs.train_step.trace(programs.state, programs.batch).jaxpr, planner.loops_of(programs, None))
    tokens, layers, hidden = ROWS * LENGTH, MODEL["num_hidden_layers"], MODEL["hidden_size"]
    heads, keys = (MODEL[name] * MODEL["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    products = tokens * layers * (2 * hidden * (2 * heads + 2 * keys + 3 * MODEL["intermediate_size"]) + 4 * heads * LENGTH)
    head = tokens * 2 * hidden * MODEL["vocab_size"]
    assert counted["none"] == pytest.approx(3 * products + 3 * head, rel=0.001)
    assert counted["full"] == pytest.approx(4 * products + 3 * head, rel=0.03)  # the last product of a layer need not be repeated


def test_estimates_of_gpus(model):
    found = plan(model, name="h100x4")
    assert found.estimated and found.fits
    check_plan(found)
    assert {one.kind for one in found.train.collectives} == {"all-gather", "reduce-scatter", "all-to-all"}
    assert found.roofline.seconds >= found.flops / 4 / CHIPS["h100"].flops
    costs = report.cost(found, efficiency=0.5, price=2.0)
    assert costs["device_hours"] == pytest.approx(100 * 2 * found.roofline.seconds * 4 / 3600)
    assert costs["price"] == 2 * costs["device_hours"]


def test_the_search_takes_the_fastest_that_fits(model, monkeypatch):
    config = tiny_config(model, train__batch_size=16)
    base = planner.base_of(config)
    plans = search(config, machine("h100x4"), base, tokens=1e6, estimated=True, log=lambda text: None)
    seconds = [one.roofline.seconds for one in plans]
    assert seconds == sorted(seconds) and all(one.fits for one in plans)
    assert {one.config.model.remat for one in plans} == {"none", "dots", "full", "offload"}
    assert {one.mesh["tensor"] for one in plans} == {1, 2}  # two kv heads
    roomy = max(plans, key=lambda one: one.needed)
    small = dataclasses.replace(CHIPS["h100"], memory=roomy.needed - 1)
    monkeypatch.setitem(CHIPS, "h100", small)
    fewer = search(config, machine("h100x4"), base, tokens=1e6, estimated=True, log=lambda text: None)
    assert fewer and all(one.needed < roomy.needed for one in fewer)


def layers_of(config) -> tuple:
    return spec_of(planner.base_of(config)).layers


def test_work_without_data(model):
    """Rows are taken to be full."""
    config = tiny_config(model)
    full = work_of(config, layers_of(config), MODEL["vocab_size"], 3e5, print)
    assert (full.tokens, full.supervised, full.steps) == (LENGTH, LENGTH, 100)  # train.steps wins
    assert full.pairs == LENGTH * (LENGTH + 1) / 2
    longer = tiny_config(model, train__steps=0)
    assert work_of(longer, layers_of(config), MODEL["vocab_size"], 3e5, print).steps == math.ceil(math.ceil(3e5 / LENGTH) / ROWS)
    assert work_of(longer, layers_of(config), MODEL["vocab_size"], None, print).steps is None
    with pytest.raises(UserError, match="--tokens: must be above 0"):
        work_of(config, layers_of(config), MODEL["vocab_size"], 0.0, print)


def test_the_work_is_that_of_the_data(tmp_path):
    """Tokens, supervision and attention are those of the packed rows, counted one by one."""
    config = parse_config(tiny_run.tiny_config(tmp_path))
    spec = spec_of(planner.base_of(config))
    found = work_of(config, spec.layers, spec.vocab_size, None, lambda text: None)
    stream = prepare(
        config.data, model_path=config.model.path, vocab_size=spec.vocab_size, epochs=config.train.epochs, log=lambda text: None
    ).train
    rows = stream.read(0, stream.total_rows)
    assert found.steps == math.ceil(stream.total_rows / config.train.batch_size)
    assert found.tokens == (rows.segments > 0).sum() / stream.total_rows
    assert found.supervised == (rows.weights > 0).sum() / stream.total_rows
    same = (rows.segments[:, :, None] == rows.segments[:, None]) & (rows.segments[:, :, None] > 0)
    causal = np.tril(np.ones((config.data.max_length,) * 2, bool))
    assert found.pairs == (same & causal).sum() / stream.total_rows


def test_a_platform_that_is_not_here_is_traced_for():
    assert block_size() == BLOCKS["cpu"]
    with tracing_for("tpu"):
        assert block_size() == BLOCK
    assert block_size() == BLOCKS["cpu"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((), 2, "--topology: is missing"),
        *slow(
            (("--topology", "v5q-8"), 2, "unknown chip 'v5q'"),
            (("--topology", "h100x8", "--efficiency", "2"), 2, "--efficiency"),
            (("--topology", "h100x4", "--config.mesh.tensor=3"), 2, "does not fit the 4 devices of h100x4"),
        ),
        (("--topology", "h100x4", "--tokens", "1e6", "--json"), 0, None),
    ],
)
def test_the_command(model, flags, code, message):
    done = commands.run("plan", "--config", "configs/sft.py", f"--config.model.path={model}", *flags, env=os.environ, cwd=ROOT)
    assert done.returncode == code, done.stderr
    if message is None:
        values = json.loads(done.stdout)
        assert values["fits"] and values["machine"] == "h100x4" and values["work"]["steps"] == np.ceil(np.ceil(1e6 / 2048) / 8)
    else:
        assert message in done.stderr and "Traceback" not in done.stderr
