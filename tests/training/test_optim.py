"""Optimizers against independent implementations, groups as data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_models import FAMILY_CONFIGS, abstract

from sft_jax.config import OptimConfig
from sft_jax.errors import UserError
from sft_jax.training.groups import choose_groups
from sft_jax.training.optim import make_optimizer
from sft_jax.training.optimizers import OPTIMIZERS

RNG = np.random.default_rng(0)
PARAMS = {
    "embed": {"embedding": RNG.normal(size=(8, 4)).astype(np.float32)},
    "mlp": {"kernel": RNG.normal(size=(4, 6)).astype(np.float32), "bias": RNG.normal(size=6).astype(np.float32)},
    "norm": {"scale": RNG.normal(size=4).astype(np.float32)},
}
class Adam:
    """Kingma & Ba's algorithm 1."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.m = self.v = 0.0

    def __call__(self, g, step):
        self.m, self.v = self.b1 * self.m + (1 - self.b1) * g, self.b2 * self.v + (1 - self.b2) * g * g
        return self.m / (1 - self.b1**step) / (np.sqrt(self.v / (1 - self.b2**step)) + self.eps)


class Lion:
    """Chen et al.'s algorithm 2."""

    def __init__(self, b1=0.9, b2=0.99):
        self.b1, self.b2, self.m = b1, b2, 0.0

    def __call__(self, g, step):
        direction = np.sign(self.b1 * self.m + (1 - self.b1) * g)
        self.m = self.b2 * self.m + (1 - self.b2) * g
        return direction


class Sgd:
    def __init__(self, momentum=0.9):
        self.momentum, self.v = momentum, 0.0

    def __call__(self, g, step):
        self.v = self.momentum * self.v + g
        return self.v


class Muon:
    """Matrix by matrix: Nesterov momentum without the bias of its start (Dozat 2016), five steps of Jordan's iteration."""

    def __init__(self, momentum=0.95):
        self.beta, self.m = momentum, 0.0

    def __call__(self, g, step):
        self.m = self.beta * self.m + (1 - self.beta) * g
        ahead = self.beta * self.m / (1 - self.beta ** (step + 1)) + (1 - self.beta) * g / (1 - self.beta**step)
        return np.stack([self.orthogonal(x) for x in ahead.reshape(-1, *g.shape[-2:])]).reshape(g.shape)

    @staticmethod
    def orthogonal(x):
        left, values, right = np.linalg.svd(x / np.linalg.norm(x), full_matrices=False)
        for _ in range(5):  # the iteration is a polynomial in the singular values
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        return 0.2 * np.sqrt(max(x.shape)) * (left * values) @ right


def compare_with(config, references, params, steps=7, tolerance=1e-5):
    """Runs `config` on random gradients of `params`, and for each parameter its reference in float64."""
    optimizer = make_optimizer(config, params, steps)
    choices = {choice.path: choice for choice in optimizer.choices}
    leaves, structure = jax.tree.flatten(params)
    assert references.keys() == choices.keys()
    exact = {path: np.asarray(x, np.float64) for path, x in zip(choices, leaves, strict=True)}
    state, update, rng = optimizer.init(params), jax.jit(optimizer.update), np.random.default_rng(1)
    for step in range(steps):
        gradient = [rng.normal(size=x.shape).astype(np.float32) for x in leaves]
        params, state = update(structure.unflatten(gradient), state, params, jnp.int32(step))
        rate = float(optimizer.schedule(step))
        for g, (path, choice) in zip(gradient, choices.items(), strict=True):
            direction = references[path](g.astype(np.float64), step + 1)
            exact[path] -= rate * choice.learning_rate * (direction + choice.weight_decay * exact[path])
    for path, ours in zip(choices, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, exact[path], rtol=tolerance, atol=tolerance / 10, err_msg=path)
    return optimizer


GROUPS = ({"pattern": "bias$", "weight_decay": 0.5}, {"pattern": "^mlp", "learning_rate": 0.25})
REFERENCES = {
    "adamw": (Adam, {"b1": 0.8, "b2": 0.95, "eps": 1e-6}),
    "lion": (Lion, {"b1": 0.8, "b2": 0.95}),
    "sgd": (Sgd, {"momentum": 0.7}),
}


@pytest.mark.parametrize("own", [True, False], ids=["own constants", "given constants"])
@pytest.mark.parametrize("name", REFERENCES)
def test_an_optimizer_is_its_algorithm(name, own):
    """In float64, some parameters with a decay and a rate of their own, after a warm-up and along a cosine."""
    reference, constants = REFERENCES[name]
    constants = {} if own else constants
    config = OptimConfig(name=name, learning_rate=0.01, warmup=2.0, weight_decay=0.1, groups=GROUPS, **constants)
    paths = ("embed.embedding", "mlp.bias", "mlp.kernel", "norm.scale")
    optimizer = compare_with(config, {path: reference(**constants) for path in paths}, PARAMS)
    assert [choice.weight_decay for choice in optimizer.choices] == [0.1, 0.5, 0.1, 0.0]
    assert [choice.learning_rate for choice in optimizer.choices] == [1.0, 1.0, 0.25, 1.0]


def test_sgd_is_that_of_torch():
    torch = pytest.importorskip("torch")
    for momentum in (0.0, 0.9):
        config = OptimConfig(name="sgd", momentum=momentum, learning_rate=0.1, schedule="constant", warmup=0.0)
        optimizer = make_optimizer(config, PARAMS, 5)
        params, state = PARAMS, optimizer.init(PARAMS)
        assert len(jax.tree.leaves(state)) == (len(jax.tree.leaves(PARAMS)) if momentum else 0)
        theirs = [torch.tensor(x, requires_grad=True) for x in jax.tree.leaves(PARAMS)]
        reference = torch.optim.SGD(theirs, lr=0.1, momentum=momentum)
        for step in range(5):
            gradient = jax.tree.map(lambda p: RNG.normal(size=p.shape).astype(np.float32), PARAMS)
            params, state = optimizer.update(gradient, state, params, jnp.int32(step))
            for tensor, g in zip(theirs, jax.tree.leaves(gradient), strict=True):
                tensor.grad = torch.tensor(g)
            reference.step()
        for ours, tensor in zip(jax.tree.leaves(params), theirs, strict=True):
            np.testing.assert_allclose(ours, tensor.detach().numpy(), rtol=1e-6, atol=1e-6)


def block_params():
    """What a decoder has, with axes: matrices in stacks of layers and experts, and much that is none."""
    shapes = {
        "embed.embedding": ((9, 6), ("vocab", "embed")),
        "lm_head.kernel": ((6, 9), ("embed", "vocab")),
        "runs.0.0.attention.query.kernel": ((3, 6, 8), ("layers", "embed", "heads")),
        "runs.0.0.attention.query.bias": ((3, 8), ("layers", "norm")),
        "runs.0.0.attention.sinks": ((3, 4), ("layers", "heads")),
        "runs.0.0.attention_norm.scale": ((3, 6), ("layers", "norm")),
        "runs.0.0.mlp.up.bias": ((3, 2, 5), ("layers", "expert", "norm")),
        "runs.0.0.mlp.up.kernel": ((3, 2, 6, 5), ("layers", "expert", "embed", "mlp")),
    }
    rng = np.random.default_rng(2)
    params = {path: nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32), axes=axes) for path, (shape, axes) in shapes.items()}
    return params, ("runs.0.0.attention.query.kernel", "runs.0.0.mlp.up.kernel")


def test_muon_orthogonalises_every_matrix_of_the_blocks_and_leaves_the_rest_to_adam():
    params, matrices = block_params()
    config = OptimConfig(name="muon", learning_rate=0.02, weight_decay=0.1, momentum=0.9, b2=0.95)
    references = {path: Muon(0.9) if path in matrices else Adam(b2=0.95) for path in params}
    optimizer = compare_with(config, references, params, tolerance=1e-4)
    for choice, line in zip(optimizer.choices, optimizer.log(), strict=True):
        assert choice.optimizer == ("muon" if choice.path in matrices else "adamw")
        assert line.startswith(choice.path) and f"  {choice.optimizer}  " in line
        assert choice.weight_decay == (0.1 if choice.path in (*matrices, "embed.embedding", "lm_head.kernel") else 0.0)


def test_what_is_frozen_has_no_state_in_any_part_of_muon():
    params, matrices = block_params()
    groups = ({"pattern": "bias|scale|sinks|^embed|^lm_head", "freeze": True},)
    optimizer = make_optimizer(OptimConfig(name="muon", learning_rate=0.1, warmup=0.0, groups=groups), params, 5)
    trained = {path: params[path] for path in matrices}
    state = optimizer.init(trained)
    assert [x.shape for x in jax.tree.leaves(state["adamw"])] == [()]  # a count
    assert {path for path in matrices} == state["muon"][0].mu.keys()
    moved, _ = optimizer.update(trained, state, trained, jnp.int32(0))
    assert all((moved[path][...] != params[path][...]).all() for path in matrices)


def test_adafactor_is_optax_adafactor_matrix_by_matrix():
    """A stack of two layers of two experts moves as four matrices do; large enough that second moments are factored."""
    sizes = np.array([1.0, 0.1, 10.0, 1.0], np.float32)[:, None, None]
    matrices = RNG.normal(size=(4, 130, 140)).astype(np.float32) * sizes
    stack = lambda x: nnx.Param(jnp.asarray(x).reshape(2, 2, 130, 140), axes=("layers", "expert", "embed", "mlp"))  # noqa: E731
    config = OptimConfig(name="adafactor", learning_rate=0.02, schedule="constant", warmup=0.0, weight_decay=0.3)
    params = nnx.State({"kernel": stack(matrices)})
    optimizer = make_optimizer(config, params, total_steps=4)
    reference = optax.adafactor(0.02, weight_decay_rate=0.02 * 0.3)
    single = [jnp.asarray(matrix) for matrix in matrices]
    state, states = jax.jit(optimizer.init)(params), [reference.init(matrix) for matrix in single]
    update, reference_update = jax.jit(optimizer.update), jax.jit(reference.update)
    for step in range(4):
        gradient = RNG.normal(size=matrices.shape).astype(np.float32)
        params, state = update(nnx.State({"kernel": stack(gradient)}), state, params, jnp.int32(step))
        for index, g in enumerate(gradient):
            updates, states[index] = reference_update(jnp.asarray(g), states[index], single[index])
            single[index] = optax.apply_updates(single[index], updates)
    np.testing.assert_allclose(params["kernel"][...].reshape(4, 130, 140), np.stack(single), rtol=1e-5, atol=1e-6)
    assert max(x.size for x in jax.tree.leaves(state)) < matrices.size / 10  # factored


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic(name):
    config = OptimConfig(name=name, learning_rate=0.05, schedule="constant", warmup=0.0)
    params = {"runs": {"kernel": jnp.ones((4, 4))}, "bias": jnp.ones(4)}
    optimizer = make_optimizer(config, params, total_steps=20)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(20):
        params, state = update(params, state, params, jnp.int32(step))  # gradient of |p|^2 / 2
    assert all(float(jnp.abs(x).max()) < 0.95 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_bfloat16_parameters(name):
    """The update is made in float32 from the rounded parameters, and rounded once."""
    exact = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16).astype(jnp.float32), block_params()[0])
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), exact)
    gradient = jax.tree.map(jnp.cos, exact)
    config = OptimConfig(name=name, learning_rate=0.1, schedule="constant", warmup=0.0, weight_decay=0.1)
    moved = []
    for params in (exact, low):
        optimizer = make_optimizer(config, params, 5)
        moved.append(optimizer.update(gradient, optimizer.init(params), params, jnp.int32(0))[0])
    for one, other in zip(*map(jax.tree.leaves, moved), strict=True):
        assert other.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(other, np.float32), one, rtol=2**-7)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_weight_decay_is_for_kernels_and_embeddings(name):
    choices = choose_groups(OptimConfig(weight_decay=0.1), nnx.state(abstract(name)))
    for choice in choices:
        matrix = choice.path.endswith((".kernel", ".embedding"))
        assert choice.weight_decay == (0.1 if matrix else 0.0), choice
        assert matrix or choice.path.endswith((".scale", ".bias"))
    assert {choice.weight_decay for choice in choices} == {0.0, 0.1}


def test_biases_are_not_decayed():
    choices = choose_groups(OptimConfig(weight_decay=0.1), nnx.state(abstract("llama_tied_biases")))
    biases = [choice for choice in choices if choice.path.endswith(".bias")]
    assert biases and all(choice.weight_decay == 0.0 for choice in biases)


def test_the_first_group_that_matches_wins_and_is_logged():
    groups = (
        {"pattern": r"attention\.value"},  # shielded from what follows
        {"pattern": r"attention\.", "freeze": True},
        {"pattern": "kernel", "learning_rate": 0.1, "weight_decay": 0.0},
    )
    optimizer = make_optimizer(OptimConfig(weight_decay=0.01, groups=groups), nnx.state(abstract("llama")), 10)
    by_path = {choice.path: choice for choice in optimizer.choices}
    value, query, up = (by_path[f"runs.0.0.{part}.kernel"] for part in ("attention.value", "attention.query", "mlp.up"))
    assert (value.frozen, value.learning_rate, value.weight_decay) == (False, 1.0, 0.01)
    assert value.pattern == r"attention\.value"
    assert query.frozen and query.pattern == r"attention\."
    assert (up.frozen, up.learning_rate, up.weight_decay) == (False, 0.1, 0.0)
    assert by_path["embed.embedding"].pattern == ""
    lines = optimizer.log()
    assert len(lines) == len(by_path) == len(jax.tree.leaves(nnx.state(abstract("llama"))))
    (line,) = [line for line in lines if line.startswith("runs.0.0.mlp.up.kernel")]
    assert "3x32x56" in line and "x0.1" in line and "(kernel)" in line
    assert "frozen" in next(line for line in lines if line.startswith("runs.0.0.attention.query.kernel"))


@pytest.mark.parametrize(
    "groups, words",
    [
        (({"pattern": "lm_haed"},), ("groups[0].pattern", "'lm_haed'", "matches no parameter", "embed.embedding")),
        (({"pattern": "mlp"}, {"pattern": "mlp.kernel"}), ("groups[1].pattern", "'mlp.kernel'", "earlier group")),
        (({"pattern": "("},), ("groups[0].pattern", "regular expression")),
        (({"pattern": ".", "freeze": True},), ("every parameter",)),
        (({"pattern": "mlp", "freeze": 1},), ("groups[0].freeze",)),
        (({"pattern": "mlp", "learning_rate": -1.0},), ("groups[0].learning_rate", "-1.0")),
        (({"pattern": "mlp", "weight_decay": "0.1"},), ("groups[0].weight_decay", "'0.1'")),
        (({"pattern": "mlp", "freeze": True, "weight_decay": 0.1},), ("groups[0].weight_decay", "freeze")),
    ],
)
def test_a_wrong_group_names_itself(groups, words):
    with pytest.raises(UserError) as error:
        choose_groups(OptimConfig(groups=groups), PARAMS)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "adamv"}, ("optim.name", "adamw")),
        ({"name": "adafactor", "b2": 0.999}, ("optim.b2", "adafactor")),
        ({"name": "lion", "eps": 1e-6}, ("optim.eps", "lion")),
        ({"momentum": 0.9}, ("optim.momentum", "adamw")),
        ({"name": "sgd", "b1": 0.9}, ("optim.b1", "sgd")),
    ],
)
def test_a_wrong_optimizer_names_its_key(changes, words):
    with pytest.raises(UserError) as error:
        make_optimizer(_with(OptimConfig(), **changes), PARAMS, 5)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_first_moments_have_the_dtype_that_is_asked_for(name):
    """Half of a float32 model's first moments, or all of a bfloat16 model's; second moments are float32 in any case."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), block_params()[0])
    sizes = {}
    for dtype in ("", "bfloat16", "float32"):
        optimizer = make_optimizer(OptimConfig(name=name, state_dtype=dtype), params, 5)
        state = jax.eval_shape(optimizer.init, params)
        sizes[dtype] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim > 1)
        found = {str(x.dtype) for x in jax.tree.leaves(state) if x.ndim > 1}
        assert ("bfloat16" in found) == (dtype == "bfloat16")
        assert ("float32" in found) == (dtype != "bfloat16" or name in ("adamw", "muon"))
    first = sum(p.size for p in jax.tree.leaves(params) if p.ndim > 1)
    assert sizes[""] == sizes["float32"] == sizes["bfloat16"] + 2 * first
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    exact = jax.eval_shape(make_optimizer(OptimConfig(name=name, state_dtype="float32"), low, 5).init, low)
    assert {str(x.dtype) for x in jax.tree.leaves(exact) if x.ndim > 1} == {"float32"}


@pytest.mark.parametrize("settings", [{"name": "adafactor"}, {"name": "sgd", "momentum": 0.0}], ids=str)
def test_a_dtype_of_moments_that_are_not_kept_is_refused(settings):
    with pytest.raises(UserError, match=f"optim.state_dtype: is that of first moments, and optim.name={settings['name']} keeps none"):
        make_optimizer(OptimConfig(**settings, state_dtype="bfloat16"), {"kernel": jnp.ones((4, 4))}, 5)


def test_bfloat16_parameters_learn_from_updates_below_their_resolution():
    """200 updates of 1e-5 to weights of 0.02, whose neighbours in bfloat16 are 1.2e-4 away."""
    params = {"kernel": jnp.full((64, 64), 0.02, jnp.bfloat16)}
    start = float(params["kernel"][0, 0])
    config = OptimConfig(learning_rate=1e-5, schedule="constant", warmup=0.0)
    optimizer = make_optimizer(config, params, total_steps=200)
    state = optimizer.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype("float32")}
    update = jax.jit(optimizer.update)
    for step in range(200):
        params, state = update({"kernel": jnp.ones((64, 64))}, state, params, jnp.int32(step))
    assert params["kernel"].dtype == jnp.bfloat16
    moved = np.asarray(params["kernel"], np.float64) - start
    assert abs(moved.mean() / -200e-5 - 1) < 0.04  # the first moment, in bfloat16, comes within 0.02 of its limit of 1
    one, again, other = (
        update({"kernel": jnp.ones((64, 64))}, state, params, jnp.int32(step))[0]["kernel"] for step in (199, 199, 200)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()  # the bits depend on the step


def _with(config: OptimConfig, **changes) -> OptimConfig:
    return OptimConfig(**{**config.__dict__, **changes})
