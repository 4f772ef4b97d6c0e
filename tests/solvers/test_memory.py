"""What a run needs, said before it starts: against measured peaks, and what is refused."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import pytest
import torch
from command_line import run
from strategies import seeded

import meanfield as mf
from benchmarks.machine import fresh_peak, peak_bytes
from meanfield import cli, limits
from meanfield.solvers import memory
from meanfield.solvers.memory import OVERHEAD

GIB = 2**30
CHILD = """
import json, sys, warnings
import torch
import meanfield as mf
from benchmarks.machine import fresh_peak, peak_bytes
from meanfield.solvers import alternating, memory

warnings.simplefilter("ignore")
torch.set_num_threads(1)
case = json.loads(sys.argv[1])


def begun(count, widths):
    layer = mf.Conv(3, padding=1, activation="tanh", bias=True, pooling=case["pooling"])
    side = case["side"]
    arch = mf.Architecture((1, side, side), (layer,) * len(widths), case["readout"], 10)
    inputs = torch.rand(count, 1, side, side, dtype=getattr(torch, case["dtype"]))
    penalty = mf.Penalty(source=1e-4, readout=1e-4, input=1e-4, amplitude_bound=case["bound"])
    problem = mf.Problem(arch, inputs, torch.arange(count) % 10, "softmax", penalty)
    return problem, widths


def work(problem, widths):
    start = mf.starts.draw(problem, widths, torch.Generator().manual_seed(0), "anchored")
    alternating.solve(problem, start, rounds=1, flow_steps=2, program_iterations=45)


work(*begun(3, [3] * len(case["widths"])))
problem, widths = begun(case["images"], case["widths"])
before = fresh_peak()
work(problem, widths)
needs = memory.Job(
    problem.architecture, len(problem.inputs), tuple(widths), (0,) * len(widths), problem.inputs.dtype,
    case["bound"] is not None,
)
print(json.dumps([peak_bytes() - before, needs.peak.size]))
"""
CASES = {
    "images": {"images": 800, "side": 20, "widths": [96, 32], "pooling": "average"},
    "columns, with a bound": {"images": 40, "side": 7, "widths": [200, 16], "bound": 5.0},
    "flattened readout": {"images": 1600, "side": 12, "widths": [24, 16], "readout": "flatten"},
    "three layers, float32": {"images": 60, "side": 8, "widths": [48, 192, 32], "dtype": "float32"},
}
USUAL = {"pooling": "none", "readout": "average", "dtype": "float64", "bound": None}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_never_below_the_measured_peak_nor_above_twice_of_it(case):
    command = [sys.executable, "-c", CHILD, json.dumps(USUAL | CASES[case])]
    # what is freed goes back at once: else the peak is that of the allocator, which moves by half from run to run
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True, env=given)
    measured, estimated = json.loads(done.stdout)
    assert measured > OVERHEAD  # of a size that says something
    assert measured <= estimated <= 2 * measured + OVERHEAD


def large_problem(readout="flatten", images=200):
    layer = mf.Conv(3, padding=1, activation="tanh")
    arch = mf.Architecture((1, 16, 16), (layer, layer), readout, 10)
    return mf.Problem(arch, torch.rand(images, 1, 16, 16), torch.arange(images) % 10, "softmax")


def offered(text):
    images, widths = re.search(r"(\d+) images or", text), re.search(r"widths (\d+),(\d+)", text)
    return int(images[1]) if images else None, tuple(map(int, widths.groups())) if widths else None


def test_what_is_refused_names_what_would_fit(monkeypatch):
    """Each of the offers fits, and a tenth more does not."""
    monkeypatch.setattr(limits, "free_memory", lambda _: GIB)
    problem = large_problem(images=6000)
    with pytest.raises(ValueError, match=r"^widths=\(64, 64\) with 6000 images of 1 x 16 x 16 needs about") as caught:
        memory.require(problem, (64, 64))
    text = str(caught.value)
    assert "and 0.8 GiB may be taken; what fits: " in text
    assert text.endswith(" or the average readout")
    images, widths = offered(text)
    assert images is not None
    assert widths is not None
    memory.require(large_problem(images=images), (64, 64))
    memory.require(problem, widths)
    memory.require(large_problem("average", images=6000), (64, 64))
    for wrong in ((large_problem(images=images * 11 // 10), (64, 64)), (problem, [w * 11 // 10 + 1 for w in widths])):
        with pytest.raises(ValueError, match="what fits"):
            memory.require(*wrong)


def test_where_nothing_fits_it_says_so(monkeypatch):
    monkeypatch.setattr(limits, "free_memory", lambda _: 2**20)
    with pytest.raises(ValueError, match=r"take smaller images or kernels, and fewer images and particles$"):
        memory.require(large_problem(), (64, 64))


def test_more_of_anything_needs_more():
    job = memory.Job(large_problem().architecture, 500, (256, 64), (0, 0), starts=256)
    plain = {need.when: need.size for need in job.phases()}
    larger = {"images": 50_000, "widths": (1024, 256), "candidates": (512, 8), "bounded": True, "batch": 500}
    for name, value in {**larger, "starts": 10**5}.items():
        found = {need.when: need.size for need in memory.replace(job, **{name: value}).phases()}
        assert all(found[when] >= plain[when] for when in plain), name
        assert any(found[when] > plain[when] for when in plain), name


@pytest.mark.parametrize("entry", ["main job", "alternating"])
def test_a_solve_is_refused_before_anything_is_made(entry, monkeypatch):
    """60,000 features of layer 2 on as many of layer 1."""
    problem = large_problem()
    network = mf.starts.draw(problem, (3, 3), seeded(0))
    monkeypatch.setattr(type(network), "widths", property(lambda _: (60_000, 60_000)))
    calls = {
        "main job": lambda: mf.solve(problem, (60_000, 60_000)),
        "alternating": lambda: mf.solvers.alternating.solve(problem, network),
    }
    before = fresh_peak()
    refused = pytest.raises(ValueError, match=r"widths=\(60000, 60000\) with 200 images .* what fits: widths")
    with refused:
        calls[entry]()
    assert peak_bytes() - before < 2**24


def test_a_given_memory_is_kept_to():
    problem = large_problem()
    room = (limits.held_memory() + 2**28) / GIB
    with pytest.raises(ValueError, match=r"needs about .* what fits: \w+"):
        mf.solve(problem, (256, 64), max_memory=room)
    with limits.memory(room), pytest.raises(ValueError, match="what fits"):
        mf.solve(problem, (256, 64))
    with pytest.raises(ValueError, match=r"max_memory=0.0009\d+ is less than the \d+ MiB that this process holds"):
        mf.solve(problem, (3, 3), max_memory="1MiB")


def sparse_archive(path, shape):
    """An .npz of zero bytes of that shape that takes no room on disk, and labels."""
    with ZipFile(path, "w", ZIP_STORED) as archive:
        with archive.open("y.npy", "w") as stream:
            np.lib.format.write_array(stream, np.arange(shape[0]) % 2)
        member, file = ZipInfo("x.npy"), archive.fp
        member.CRC = member.file_size = member.compress_size = 0
        member.header_offset = file.tell()
        file.write(member.FileHeader(zip64=True))
        began = file.tell()
        described = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, described)
        file.seek(math.prod(shape), 1)
        member.file_size = member.compress_size = file.tell() - began
        archive.filelist.append(member)
        archive.NameToInfo["x.npy"] = member
        archive.start_dir, archive._didModify = file.tell(), True


def test_60000_images_of_224_pixels_are_refused_in_one_line_before_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / "photographs.npz"
    sparse_archive(path, (60_000, 224, 224, 3))
    monkeypatch.setattr(limits, "free_memory", lambda _: 64 * GIB)
    words = ("solve", "--data", path, "--classes", "all")
    run(*words, main=cli.main)  # imports what it needs
    before = fresh_peak()
    ended = run(*words, main=cli.main)
    path.unlink()  # 9 GB to whoever reads what tests leave behind
    assert peak_bytes() - before < 2**25
    assert ended.exit_code == 2
    assert re.fullmatch(
        r"error: .*photographs.npz: 'x' of shape \(60000, 224, 224, 3\) would take 81.3 GB of memory, and "
        r"55.0 GB may be taken; give fewer or smaller images, 68% of them would fit\n",
        ended.stderr,
    )


def test_the_command_refuses_before_it_works(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "free_memory", lambda _: GIB)
    ended = run("solve", "--widths", "4000,4000", "--out", tmp_path / "out", main=cli.main)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: --widths=4000,4000 with 1000 images of 1 x 8 x 8 needs about ")
    assert ended.stderr.count("\n") == 1
    ended = run("solve", "--max-memory", "10MiB", main=cli.main)
    assert ended.exit_code == 2
    assert re.fullmatch(r"error: --max-memory=\S+ is less than the \d+ MiB that .*; give more\n", ended.stderr)
