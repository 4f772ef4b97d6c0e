"""Lines of progress where there is no terminal."""

from meanfield.studies.solve import progress


def test_a_proof_is_told_of_at_once_and_then_now_and_then(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    told = progress.Progress(1, 1, None, live=False, lines=True)
    for seconds in range(0, 65):
        clock[0] = float(seconds)
        told({"phase": "proof", "seconds": clock[0], "bound": 0.5 + seconds / 1000, "share": 0.9})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[-1] for line in lines] == ["0 s", "31 s", "62 s"]
    assert lines[0] == "proof: J >= 0.5, 90.00% of J, 0 s"
