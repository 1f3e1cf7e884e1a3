from __future__ import annotations

import pytest

from benchmarks.__main__ import NAMES, ON_CPU, ON_GPU, plan, run
from benchmarks.report import RESULTS


def test_without_names_a_machine_runs_what_it_can():
    assert plan([], has_gpu=False) == [(name,) for name in ON_CPU]
    assert {name for name, *_ in plan([], has_gpu=True)} == set(ON_GPU)


def test_every_model_has_a_process_of_its_own():
    assert plan(["decode_step", "mixed_workload"], has_gpu=True) == [
        ("decode_step", "0.6B"),
        ("decode_step", "8B"),
        ("mixed_workload",),
    ]


def test_models_among_the_arguments_choose():
    assert plan(["attention", "8B", "decoding"], has_gpu=True) == [("attention", "8B", "decoding")]


def test_the_pipeline_has_a_model_more_than_the_others():
    assert [model for _, model in plan(["decode_pipeline"], has_gpu=True)] == ["0.6B", "8B", "32B"]
    with pytest.raises(SystemExit, match="decode_step does not measure 32B"):
        plan(["decode_step", "32B"], has_gpu=True)


def test_what_follows_an_option_is_its_value():
    arguments = ["pipeline_trace", "--model", "8B", "--layers", "6"]
    assert plan(arguments, has_gpu=True) == [tuple(arguments)]


def test_other_arguments_reach_every_benchmark_named():
    arguments = ["kv_transport", "kv_transport_gpu", "--rounds", "3"]
    assert plan(arguments, has_gpu=True) == [
        ("kv_transport", "--rounds", "3"),
        ("kv_transport_gpu", "--rounds", "3"),
    ]


@pytest.mark.parametrize("arguments", [["decod_step"], ["8B"], ["mixed_workload", "8B"]])
def test_what_cannot_be_meant_is_refused(arguments):
    with pytest.raises(SystemExit, match=r"no benchmark|not told a model"):
        plan(arguments, has_gpu=True)


def test_a_benchmark_that_fails_does_not_keep_the_others_from_running(capfd):
    assert run([("no_such_one",), ("shapes",)]) == ["no_such_one"]
    assert "== shapes: done" in capfd.readouterr().out


def test_every_name_is_a_module_that_runs_on_its_own():
    for name in NAMES:
        text = (RESULTS.parent / f"{name}.py").read_text()
        assert 'if __name__ == "__main__":' in text, name
