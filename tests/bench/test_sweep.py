import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import joblib.parallel
import pytest
from joblib.parallel import ThreadingBackend, register_parallel_backend

import meanfield
from meanfield.bench import provenance, sweep, workers
from meanfield.bench.provenance import Provenance
from meanfield.validation import Misuse

CALLS = []


def squares(cell):
    CALLS.append(cell["n"])
    return [{"n": cell["n"], "square": cell["n"] ** 2, "third": cell["n"] / 3}, {"n": cell["n"], "extra": "a,b"}]


def slow(cell):
    time.sleep(0.05)
    return [{"n": cell["n"], "value": 1 / (cell["n"] + 3)}]


def cells(count):
    return [{"n": n, "widths": [n, 2]} for n in range(count)]


def test_rows_come_in_the_order_of_the_cells_whatever_runs_them():
    expected = [row for cell in cells(7) for row in squares(cell)]
    assert sweep.run(squares, cells(7)) == expected
    assert sweep.run(squares, cells(7), jobs=3, backend="threading") == expected


def test_finished_cells_are_not_measured_again(tmp_path):
    CALLS.clear()
    first = sweep.run(squares, cells(3), tmp_path, backend="sequential")
    heard = []
    second = sweep.run(
        squares, cells(5), tmp_path, backend="sequential", announce=lambda cell, kept: heard.append((cell["n"], kept))
    )
    assert CALLS == [0, 1, 2, 3, 4]
    assert second[: len(first)] == first
    assert sorted(heard) == [(0, True), (1, True), (2, True), (3, False), (4, False)]


def noted(cell, place):
    return [{"n": cell["n"], "there": Path(place).is_dir()}]


def test_places_are_handed_on_and_rows_do_not_depend_on_them(tmp_path):
    options = {"backend": "sequential", "places": {"place": str(tmp_path)}}
    assert sweep.run(noted, cells(2), tmp_path, **options) == [{"n": 0, "there": True}, {"n": 1, "there": True}]
    assert sweep.run(noted, cells(1), tmp_path, backend="sequential", places={"place": "gone"}) == [
        {"n": 0, "there": True}
    ]


def test_a_change_anywhere_in_the_library_measures_anew(tmp_path, monkeypatch):
    """With the kernel in finite/kernel.py doubled, kept cells used to come back unchanged."""
    CALLS.clear()
    sweep.run(squares, cells(1), tmp_path, backend="sequential")
    library = tmp_path / "copy" / "meanfield"
    shutil.copytree(Path(meanfield.__file__).parent, library, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(meanfield, "__path__", [str(library)])
    provenance.package.cache_clear()
    sweep.run(squares, cells(1), tmp_path, backend="sequential")
    assert CALLS == [0]  # an equal library elsewhere is the same library
    kernel = library / "finite" / "kernel.py"
    kernel.write_text(kernel.read_text().replace("return ", "return 2 * ", 1))
    provenance.package.cache_clear()
    sweep.run(squares, cells(1), tmp_path, backend="sequential")
    provenance.package.cache_clear()
    assert CALLS == [0, 0]


def test_sources_stand_for_the_package_of_a_measure(tmp_path):
    CALLS.clear()
    source = tmp_path / "source"
    for text in ("a", "a", "b"):
        source.write_text(text)
        sweep.run(squares, cells(1), tmp_path / "cells", backend="sequential", sources=lambda cell: [source])
    assert CALLS == [0, 0]


@pytest.mark.parametrize("measure", [lambda cell: [], partial(squares)])
def test_measures_that_share_a_name_are_refused_where_cells_are_kept(measure, tmp_path):
    """Two lambdas of a module used to be given each other's cells."""
    sweep.run(measure, cells(1))
    with pytest.raises(Misuse, match=r"measure=.*must be a function of a module"):
        sweep.run(measure, cells(1), tmp_path)


def test_rows_are_chosen_and_grouped():
    rows = sweep.product_of({"fixed": 1}, a=[1, 2], b=["x", "y"])
    assert [(row["fixed"], row["a"], row["b"]) for row in rows] == [(1, 1, "x"), (1, 1, "y"), (1, 2, "x"), (1, 2, "y")]
    assert sweep.select(rows, a=2, b="y") == rows[3:]
    assert sweep.groups(rows, "b") == {("x",): rows[::2], ("y",): rows[1::2]}


def test_another_cell_or_measure_is_not_taken_for_it(tmp_path):
    CALLS.clear()
    sweep.run(squares, cells(1), tmp_path, backend="sequential")
    sweep.run(squares, [{"n": 0, "widths": [0, 3]}], tmp_path, backend="sequential")
    assert CALLS == [0, 0]
    assert sweep.run(slow, cells(1), tmp_path, backend="sequential") == [{"n": 0, "value": 1 / 3}]


def forged(record):
    """With a checksum that fits."""
    record.pop("sha256", None)
    return json.dumps({**record, "sha256": sweep._checksum(record)})


DAMAGES = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no text": lambda text: "\0" * 99,
    "deep": lambda text: "[" * 10**6,
    "{}": lambda text: "{}",
    "null": lambda text: "null",
    "a list": lambda text: "[1, 2]",
    "rows without keys": lambda text: json.dumps(json.loads(text) | {"rows": [{}]}),
    "no rows": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "rows"}),
    "another figure": lambda text: text.replace('"square": 1', '"square": 2'),
    "another cell": lambda text: text.replace('"n": 1, "widths"', '"n": 2, "widths"'),
    "another library": lambda text: forged(json.loads(text) | {"made_by": {}}),
    "another cell, forged": lambda text: forged(json.loads(text) | {"cell": {"n": 3}}),
    "more than a cell, forged": lambda text: forged(json.loads(text) | {"more": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_cell_that_is_not_as_it_was_kept_is_named_and_measured_again(tmp_path, damage):
    """Changed figures used to be believed, other damages ended in tracebacks."""
    before = sweep.run(squares, cells(2), tmp_path, backend="sequential")
    path = sweep._Keeper(tmp_path, squares).path(sweep._Keeper(tmp_path, squares).key(cells(2)[1]))
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    CALLS.clear()
    with pytest.warns(UserWarning, match=rf"{path.name}.*; its cell is measured again"):
        assert sweep.run(squares, cells(2), tmp_path, backend="sequential") == before
    assert CALLS == [1]
    assert path.read_text() == whole


def test_exchanged_cells_are_measured_again(tmp_path):
    before = sweep.run(squares, cells(2), tmp_path, backend="sequential")
    one, other = tmp_path.glob("*.json")
    kept = one.read_text()
    one.write_text(other.read_text())
    other.write_text(kept)
    with pytest.warns(UserWarning, match="holds another cell than its name says"):
        assert sweep.run(squares, cells(2), tmp_path, backend="sequential") == before


@pytest.mark.skipif(os.name == "nt", reason="makes a pipe")
def test_a_cell_without_an_end_is_measured_again(tmp_path):
    before = sweep.run(squares, cells(1), tmp_path, backend="sequential")
    (path,) = tmp_path.glob("*.json")
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(UserWarning, match="is not a file"):
        assert sweep.run(squares, cells(1), tmp_path, backend="sequential") == before
    assert path.is_file()


def test_a_table_has_every_column_and_floats_to_the_last_bit():
    assert sweep.table(sweep.run(squares, cells(2))).splitlines() == [
        "n,square,third,extra",
        "0,0,0.0,",
        '0,,,"a,b"',
        f"1,1,{1 / 3!r},",
        '1,,,"a,b"',
    ]


def test_a_table_leaves_out_what_is_no_entry():
    rows = [{"n": 1, "values": [1.0, 2.0]}, {"n": 2, "values": None, "marks": {"a": 1}}]
    assert sweep.table(rows).splitlines() == ["n", "1", "2"]


def test_a_table_says_what_made_it():
    made = Provenance("meanfield widths '--data=a b'", {})
    lines = sweep.table(squares({"n": 1}), made).splitlines()
    assert lines[0] == f"# Made by: {made.command}"
    assert made.library in lines[1]
    assert lines[2] == f"# Threads: torch {made.threads['torch']}, blas {made.threads['blas']}"
    assert lines[3] == "n,square,third,extra"
    broken = sweep.table([{"n": 1}], Provenance("meanfield '--data=a\nb'", {}))
    assert [line[:2] for line in broken.splitlines()] == ["# ", "# ", "# ", "# ", "n", "1"]


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from meanfield.bench import sweep, workers
from meanfield.storage import write_atomically
from test_sweep import slow, cells
rows = sweep.run(slow, cells(30), {directory!r}, jobs=2, backend={backend!r})
write_atomically({table!r}, sweep.table(rows))
"""


@pytest.mark.skipif(os.name == "nt", reason="kills a process group")
def test_killed_again_and_again_and_resumed_the_table_is_the_same(tmp_path):
    whole = sweep.table(sweep.run(slow, cells(30)))
    table, directory = tmp_path / "table.csv", tmp_path / "cells"
    text = SCRIPT.format(
        tests=str(Path(__file__).parent), directory=str(directory), table=str(table), backend="threading"
    )
    chance, done = random.Random(0), []
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", text], start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        _wait_for_more_cells(process, directory, len(done), chance.randint(1, 4))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kept = list(directory.glob("*.json"))
        assert len(kept) >= len(done)
        done = kept
    assert not table.exists()
    subprocess.run([sys.executable, "-c", text], check=True)
    assert table.read_text() == whole
    assert len(list(directory.glob("*.json"))) == 30


def _wait_for_more_cells(process, directory, before, more):
    """Until `more` cells are finished, plus a moment, so that the kill comes at no particular place."""
    while process.poll() is None and len(list(directory.glob("*.json"))) < before + more:
        time.sleep(0.01)
    assert process.poll() is None, "the sweep ended before it was killed"


def test_dask_runs_the_same_sweep(tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        assert sweep.run(slow, cells(3), tmp_path, jobs=1, backend="dask") == sweep.run(slow, cells(3))


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("dask", "dask[distributed]")])
def test_a_backend_without_its_package_is_refused_before_any_work(backend, package, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "find_spec", lambda module: None)
    with pytest.raises(Misuse, match=rf"^backend='{backend}' needs .*: pip install '{re.escape(package)}'$"):
        sweep.run(squares, cells(3), tmp_path / "cells", backend=backend)
    assert not (tmp_path / "cells").exists()


def test_ray_is_told_to_joblib(monkeypatch):
    found = SimpleNamespace(register_ray=lambda: register_parallel_backend("ray", ThreadingBackend))
    monkeypatch.setattr(workers, "find_spec", lambda module: found)
    monkeypatch.setitem(sys.modules, "ray.util.joblib", found)
    monkeypatch.setitem(joblib.parallel.BACKENDS, "ray", None)  # put back afterwards
    assert sweep.run(squares, cells(7), jobs=2, backend="ray") == [row for cell in cells(7) for row in squares(cell)]


def test_rows_that_are_not_lasting_are_measured_again(tmp_path):
    CALLS.clear()
    options = {"backend": "sequential", "lasting": lambda rows: rows[0]["n"] != 1}
    assert sweep.run(squares, cells(3), tmp_path, **options) == sweep.run(squares, cells(3), tmp_path, **options)
    assert CALLS == [0, 1, 2, 1]


def test_a_folder_in_the_place_of_a_cell_is_refused_before_any_is_measured(tmp_path):
    """It was measured, and the write ended in IsADirectoryError."""
    sweep.run(squares, cells(2), tmp_path, backend="sequential")
    (path, *others) = sorted(tmp_path.iterdir())
    path.unlink()
    path.mkdir()
    others[0].unlink()
    with pytest.raises(ValueError, match=rf"{path} is a directory where a cell is kept; remove it"):
        sweep.run(squares, cells(2), tmp_path, backend="sequential")
    assert list(tmp_path.iterdir()) == [path]
