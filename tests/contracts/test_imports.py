"""Imports go down only, and the package itself imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import environment, tiny_config, train_command

PACKAGE = Path(__file__).parents[2] / "sft_jax"

# Lower layers first. A module may import its own layer and those before it.
LAYERS = [
    {"errors", "batch", "config", "config_checks", "config_rules", "config_parsing", "printable", "versions"},
    {"data"},
    {"doctor"},
    {"inspection"},
    {"dynamics"},
    {"model"},
    {"checkpoint"},
    {"hf"},
    {"evaluation"},
    {"training"},
    {"influence"},
    {"planning", "checking", "comparison", "diagnosis"},
    {"experiments"},
    {"cli", "decoding_flags", "large_pages"},
    {"commands"},
]
# The packages of data. One may import its own, those before it that are not beside it, and the modules beside the packages
# that import none of them.
DATA_PACKAGES = {"sources": 0, "formats": 1, "tokenizers": 1, "chats": 2, "stores": 3, "packing": 4}
DATA_TOP = {"prepare", "data_report", "report_lines"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def layer_of(module: str) -> int:
    """Returns the layer of a dotted module name inside the package; what is in no list is a command."""
    top = module.split(".")[1] if "." in module else "errors"
    for index, names in enumerate(LAYERS):
        if top in names:
            return index
    return len(LAYERS) - 1


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(path: Path) -> str:
    parts = ("sft_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down_only(path):
    name = dotted(path)
    if name == "sft_jax":
        return
    for imported in imports_of(path):
        if not imported.startswith("sft_jax."):
            continue
        assert layer_of(imported) <= layer_of(name), f"{name} imports {imported}, which is above it"
        assert layer_of(imported) < len(LAYERS) - 1, f"{name} imports the command {imported}"
        tops = {name.split(".")[1], imported.split(".")[1]}
        assert tops != {"data", "model"}, f"{name} imports {imported}: data and model never import each other"


@pytest.mark.parametrize("path", [path for path in MODULES if dotted(path).startswith("sft_jax.data.")], ids=dotted)
def test_packages_of_data_are_built_one_from_the_other(path):
    own = dotted(path).split(".")[2]
    for imported in imports_of(path):
        parts = imported.split(".")
        if parts[:2] != ["sft_jax", "data"] or len(parts) < 3 or parts[2] == own or own in DATA_TOP:
            continue
        assert parts[2] not in DATA_TOP, f"{dotted(path)} imports {imported}"
        rank = DATA_PACKAGES.get(parts[2], -1)
        assert rank < DATA_PACKAGES.get(own, 0), f"{dotted(path)} imports {imported}, which is beside it or above it"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_data_the_doctor_and_inspection_never_import_jax(path):
    if dotted(path).startswith(("sft_jax.data", "sft_jax.doctor", "sft_jax.inspection", "sft_jax.dynamics")):
        heavy = {name for name in imports_of(path) if name.split(".")[0] in ("jax", "flax", "optax", "orbax")}
        assert not heavy


def test_the_package_imports_no_jax():
    """Launch flags must still have an effect after `import sft_jax` and after a configuration is parsed."""
    code = "import sys, sft_jax, sft_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_catch_all_modules():
    assert not {path.stem for path in MODULES} & {"utils", "util", "common", "base", "helpers", "misc"}


def test_a_run_imports_no_package_that_it_does_not_use(tmp_path):
    """Each would be most of a second of every start; pyarrow imports pandas by itself for what it is given in some forms."""
    command = train_command(tiny_config(tmp_path, train__steps=1), tmp_path / "run")
    command.insert(1, "-Ximporttime")
    run = subprocess.run(command, env=environment(1, tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stderr
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert {"jax", "grain", "pyarrow"} <= imported
    assert not imported & {"datasets", "pandas", "tensorboardX", "tensorflow", "wandb"}
