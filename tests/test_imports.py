"""No module imports itself by way of others, packages included whose __init__ runs on the way."""

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

grimp = pytest.importorskip("grimp", reason="import-linter is not installed")


def packages_around(module):
    parts = module.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def circles(*packages):
    """Sets of modules that import each other, in functions too, but not what only a type checker imports.

    An import of a.b.c runs a and a.b as well, unless the importer lies in them: then they are running already.
    """
    graph = grimp.build_graph(*packages, exclude_type_checking_imports=True, cache_dir=None)
    modules = sorted(graph.modules)
    number = {module: index for index, module in enumerate(modules)}
    edges = {
        (number[importer], number[target])
        for importer in modules
        for imported in graph.find_modules_directly_imported_by(importer)
        for target in {imported, *packages_around(imported) - packages_around(importer) - {importer}}
    }
    rows, columns = np.array(sorted(edges), dtype=int).reshape(-1, 2).T
    matrix = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(modules), len(modules)))
    _, labels = connected_components(matrix, connection="strong")
    return [
        {modules[index] for index in np.flatnonzero(labels == label)}
        for label, size in enumerate(np.bincount(labels))
        if size > 1
    ]


def test_no_module_imports_itself_by_way_of_others():
    assert circles("meanfield", "theory_checks", "benchmarks") == []


CONTROLS = {
    "plain": ({"a": "from ring import b", "b": "from ring import c", "c": "from ring.a import x"}, {"a", "b", "c"}),
    "in_a_function": ({"a": "from ring import b", "b": "def f():\n    from ring import a"}, {"a", "b"}),
    "own_package": (
        {"part/__init__": "from ring.part import a", "part/a": "from ring.part import x"},
        {"part", "part.a"},
    ),
    "package_on_the_way": (
        {
            "part/__init__": "from ring.part import a",
            "part/a": "import ring.user",
            "part/b": "",
            "user": "import ring.part.b",
        },
        {"part", "part.a", "user"},
    ),
    "none": (
        {"a": "from ring import b\nfrom ring.part import c", "b": "", "part/__init__": "", "part/c": "import ring.b"},
        set(),
    ),
    "siblings": (
        {"part/__init__": "from ring.part import a", "part/a": "from ring.part import b", "part/b": ""},
        set(),
    ),
    "for_the_type_checker": (
        {"a": "from ring import b", "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ring import a"},
        set(),
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_circles_are_found_and_nothing_else(name, tmp_path, monkeypatch):
    files, expected = CONTROLS[name]
    for path, text in {"__init__": "", **files}.items():
        file = tmp_path / "ring" / f"{path}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert circles("ring") == ([{f"ring.{module}" for module in expected}] if expected else [])
