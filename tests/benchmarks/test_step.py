"""The benchmark of the whole step at its smallest size."""

import json

import pytest
import torch

from benchmarks import frame, step


def test_times_of_both_forms_and_memory_of_each_batch(monkeypatch, capsys, tmp_path, small_runs):
    monkeypatch.setattr(frame, "in_fresh_process", lambda module, argv: step.main(argv))
    result = step.main(["--quick", "--threads", "1", "--json", str(tmp_path / "step.json")])
    assert [(m["batch"], m["chunk_size"]) for m in result["large_batches"]] == [(2, None), (2, 2), (4, None), (4, 2)]
    assert all(m["seconds"] > 0 and m["peak_mb"] >= m["before_mb"] for m in result["large_batches"])
    for name in ("ours", "textbook"):
        assert result[name]["shapes_per_s"] == pytest.approx(2 / result[name]["seconds_median"])
    assert json.loads((tmp_path / "step.json").read_text()) == result
    shown = capsys.readouterr().out
    assert "textbook / ours" in shown and "by the step, MB" in shown


@pytest.mark.parametrize(("device", "calls"), [("cpu", ["memory", "step"]), ("cuda", ["step", "memory", "step"])])
def test_on_a_gpu_the_first_step_which_compiles_is_not_measured(monkeypatch, device, calls):
    seen = []
    monkeypatch.setattr(step, "resolve_device", lambda name: torch.device(device))
    monkeypatch.setattr(step, "training_step", lambda *_, **__: lambda: seen.append("step"))
    monkeypatch.setattr(step, "memory_of", lambda action, device: seen.append("memory") or action() or {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    step.memory_of_step(step.BENCHMARK.parse_args(["--quick"]), ["2", "0"])
    assert seen == calls
