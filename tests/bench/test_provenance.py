import importlib
import json
from dataclasses import asdict

import torch
from threadpoolctl import threadpool_limits

from meanfield.bench import provenance


def test_a_digest_follows_contents_and_where_one_file_ends(tmp_path):
    for name, text in (("a", "xy"), ("b", "z"), ("c", "x"), ("d", "yz")):
        (tmp_path / name).write_text(text)
    of = lambda *names: provenance.digest(tmp_path / name for name in names)  # noqa: E731
    assert of("a", "b") == of("a", "b")
    assert len({of("a", "b"), of("b", "a"), of("c", "d"), of("a")}) == 4


def test_the_library_is_every_source_and_template_of_it():
    named = {path.name for path in provenance.sources(provenance.Path(provenance.meanfield.__file__).parent)}
    assert {"kernel.py", "page.html", "__init__.py"} <= named
    assert not any(name.endswith(".pyc") for name in named)


def test_a_package_counts_as_a_whole_and_a_script_as_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "parcel").mkdir()
    for name in ("__init__", "one", "two"):
        (tmp_path / "parcel" / f"{name}.py").write_text(f"# {name}\n")
    (tmp_path / "script.py").write_text("# alone\n")
    for name in ("parcel.one", "script"):
        importlib.import_module(name)

    first = provenance.package("parcel.one")
    provenance.package.cache_clear()
    (tmp_path / "parcel" / "two.py").write_text("# changed\n")
    assert provenance.package("parcel.one") != first
    assert provenance.package("script") == provenance.digest([tmp_path / "script.py"])


def test_a_folder_added_to_the_path_of_a_package_counts_as_well(tmp_path, monkeypatch):
    """Cells of a study added so used to stay whatever became of its measure."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for folder in ("crate", "added"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    measure = tmp_path / "added" / "measured.py"
    measure.write_text("# one\n")
    crate = importlib.import_module("crate")
    crate.__path__.append(str(tmp_path / "added"))
    importlib.import_module("crate.measured")
    crate.__path__.remove(str(tmp_path / "added"))  # of a folder below, the package itself does not know
    first = provenance.package("crate.measured")
    provenance.package.cache_clear()
    measure.write_text("# two\n")
    assert provenance.package("crate.measured") != first


def test_it_says_what_made_a_result():
    made = provenance.Provenance("meanfield widths --seed=3", {"seed": 3})
    assert json.loads(json.dumps(asdict(made)))["settings"] == {"seed": 3}
    assert made.lines()[0] == "Made by: meanfield widths --seed=3"
    assert made.library in made.lines()[1]
    assert f"torch {made.versions['torch']}" in made.lines()[1]


def test_it_says_on_how_many_threads(monkeypatch):
    """One and two differ by 0.6% in J on the default problem."""
    before = torch.get_num_threads()
    for count in (3, 1):
        torch.set_num_threads(count)
        with threadpool_limits(count):
            made = provenance.Provenance("meanfield solve", {})
        assert made.threads["torch"] == count
        assert made.threads["blas"] <= count
        assert made.lines()[2].startswith(f"Threads: torch {count}, blas ")
    torch.set_num_threads(before)
