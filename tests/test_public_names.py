"""What users import, name by name: removing one, or hiding a function behind its module, is noticed here."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGES = {
    "meanfield": (
        "Activation Architecture Audit Conv ConvexProgram ParticleNetwork Penalty Problem ProgramPoint Solution "
        "activations audit certificates data finite forgetting fusion grafting landscape limits load_network losses "
        "measures save_network solve solvers starts studies transfer"
    ),
    "meanfield.certificates": (
        "Certificate Multipliers ProvenBound UnseenFeatures certify dual_value no_method prove search_features "
        "stationary_multipliers"
    ),
    "meanfield.finite": (
        "AUTHORS_DROPOUT FiniteCNN Fitted L12_STRENGTHS L2_STRENGTHS Recipe Replayed Scaling Score Step Training cnn "
        "evaluate fed_back feedback_aligned fit kernel l12 log_spaced_times mlp regulariser replay residual sample "
        "sequential train vgg"
    ),
    "meanfield.losses": (
        "HingeLoss HuberLoss LOSSES LabelLoss LogisticLoss Loss LossCheck ScalarLoss SoftmaxLoss SquaredLoss accuracy "
        "check make"
    ),
    "meanfield.landscape": (
        "Joined Plane Sharpness Surface Trajectory balanced eigenplane join line plane principal sharpness surface "
        "trajectory triangle"
    ),
    "meanfield.fusion": "Channels Ensemble METHODS fuse matched reduce",
    "meanfield.forgetting": (
        "Anchor Choice Distillation EWC FineTuning FrozenTrunk Joint L2SP Learnt LwF Replay Scores Task choose divided "
        "fisher held_apart learn narrowed score widened"
    ),
    "meanfield.grafting": "Graft Grafted Junction METHODS graft layer_errors",
    "meanfield.transfer": "Displacement Moments Norm StartLaw moments predict",
    "meanfield.solvers": "alternating arrangements flow reference splitting",
}
MODULES = {
    "meanfield.activations": "ACTIVATIONS Activation",
    "meanfield.certificates.duality": "Certificate Multipliers certify dual_value stationary_multipliers",
    "meanfield.certificates.proving": "ProvenBound no_method prove",
    "meanfield.certificates.search": "UnseenFeatures search_features",
    "meanfield.certificates.sphere": "Search SphereMaximum maximise",
    "meanfield.data": "Dataset load",
    "meanfield.landscape.curvature": "Eigenpair Estimate Extremes Operator extremes trace",
    "meanfield.limits": "memory within",
    "meanfield.measures": (
        "adjoin balance drop_massless extend interpolate merge mixture permute select split with_tensors"
    ),
    "meanfield.solvers.alternating": "solve",
    "meanfield.solvers.arrangements": "solve",
    "meanfield.solvers.flow": "solve",
    "meanfield.solvers.reference": "solve",
    "meanfield.solvers.splitting": "solve",
    "meanfield.solvers.velocities": "advance metric_speed squared_distance velocity",
    "meanfield.starts": "STARTS draw start",
    "meanfield.storage": "load_network load_tensors save_network save_tensors write_atomically",
    "meanfield.studies.widths.parameterisation": "Measured measure_scaling",
    "meanfield.studies.convexity": (
        "Curvature Falsification ProgramVariables Segments Witness curvature falsify segments"
    ),
}
SUBMODULES = {
    "meanfield": (
        "activations certificates data finite forgetting fusion grafting landscape limits losses measures solvers "
        "starts studies transfer"
    ),
    "meanfield.finite": "kernel",
    "meanfield.solvers": PACKAGES["meanfield.solvers"],
}
NAMES = [(module, name) for module, names in (PACKAGES | MODULES).items() for name in names.split()]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_is_there_and_no_module_hides_it(module, name):
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, ModuleType) == (name in SUBMODULES.get(module, "").split())


@pytest.mark.parametrize("package", PACKAGES)
def test_the_list_is_that_of_the_package(package):
    assert sorted(importlib.import_module(package).__all__) == sorted(PACKAGES[package].split())


ALONE = """
import importlib, sys
for module, names in {names!r}.items():
    for name in names.split() if module == "meanfield" else [names]:
        for loaded in [each for each in sys.modules if each.split(".")[0] == "meanfield"]:
            del sys.modules[loaded]
        exec(f"from {{module}} import {{', '.join(name.split())}}")
import meanfield
assert meanfield.solvers.reference.solve and meanfield.data.load and meanfield.studies.convexity
"""


def test_names_do_not_depend_on_what_was_imported_before():
    """Each name of the package, and the names of each module, in an interpreter without any module of the library."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(names=PACKAGES | MODULES)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def documented(text):
    """(module, names behind it) of every name of the library in the python blocks: mf.data.load is (meanfield, [data,
    load]).
    """
    found = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        tree, homes = ast.parse(block), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                homes |= {each.asname or each.name: (each.name, []) for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                homes |= {each.asname or each.name: (node.module, [each.name]) for each in node.names}
        homes = {name: home for name, home in homes.items() if home[0].split(".")[0] == "meanfield"}
        found += homes.values()
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            names, whole = [], id(node) not in inner
            while isinstance(node, ast.Attribute):
                names, node = [node.attr, *names], node.value
            if whole and names and isinstance(node, ast.Name) and node.id in homes:
                found.append((homes[node.id][0], homes[node.id][1] + names))
    return found


DOCUMENTED = documented((Path(__file__).parent.parent / "README.md").read_text())


def resolve(module, names):
    found = importlib.import_module(module)
    for name in names:
        if not hasattr(found, name) and isinstance(found, ModuleType):
            importlib.import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(
    ("module", "names"), DOCUMENTED, ids=lambda each: each if isinstance(each, str) else ".".join(each)
)
def test_a_name_of_the_readme_is_there(module, names):
    assert resolve(module, names) is not None


def test_the_readme_is_read():
    assert ("meanfield", ["solvers", "reference", "solve"]) in DOCUMENTED
    assert ("meanfield.studies", ["convexity", "falsify"]) in DOCUMENTED
    assert ("meanfield.grafting", ["layer_errors"]) in DOCUMENTED
    text = "```python\nimport meanfield as mf\nfrom os import path\nmf.solve.nothing(path.join())\n```"
    assert documented(text) == [("meanfield", []), ("meanfield", ["solve", "nothing"])]
    with pytest.raises(AttributeError, match="nothing"):
        resolve("meanfield", ["solve", "nothing"])
    with pytest.raises(ModuleNotFoundError):
        resolve("meanfield", ["nothing"])
