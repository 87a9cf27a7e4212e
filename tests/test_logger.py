"""Metrics: rows outlive a kill, no step is logged twice, nothing is lost when keys appear."""

import csv
import math
import os
import sys

import pytest
import torch

from ppo_fast.logger import RunLogger, read_metrics


def rows(folder) -> list[list[str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.reader(file))


def log_steps(folder, *steps, resume_step=None) -> None:
    with RunLogger(folder, resume_step, tensorboard=False) as log:
        for step in steps:
            log.log(step, {"a": float(step)})


def test_the_columns_are_step_and_the_keys_in_order(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as log:
        log.log(10, {"z": 1.5, "a": 2})
    assert rows(tmp_path) == [["step", "z", "a"], ["10", "1.5", "2.0"]]


def test_values_are_read_back_exactly(tmp_path):
    values = [0.1, 1e-300, -1 / 3, 123456789.123456789]
    with RunLogger(tmp_path, tensorboard=False) as log:
        for step, value in enumerate(values):
            log.log(step, {"x": value})
    assert read_metrics(tmp_path) == {"step": [0.0, 1.0, 2.0, 3.0], "x": values}


def test_0d_tensors_and_bools_are_numbers(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as log:
        log.log(1, {"a": torch.tensor(2.5), "b": True})
    assert read_metrics(tmp_path) == {"step": [1.0], "a": [2.5], "b": [1.0]}


def test_every_row_is_in_the_file_when_log_returns(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as log:
        for step in range(3):
            log.log(step, {"a": step})
            assert len(rows(tmp_path)) == step + 2


def test_a_new_key_extends_the_header_and_keeps_the_rows(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as log:
        log.log(1, {"a": 1})
        log.log(2, {"b": 2, "c, d": 3})
        log.log(3, {"a": 4})
    assert rows(tmp_path) == [
        ["step", "a", "b", "c, d"],
        ["1", "1.0", "", ""],
        ["2", "", "2.0", "3.0"],
        ["3", "4.0", "", ""],
    ]
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_a_missing_cell_is_read_as_nan(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as log:
        log.log(1, {"a": 1})
        log.log(2, {"b": 2})
    metrics = read_metrics(tmp_path)
    assert metrics["a"][0] == 1.0
    assert math.isnan(metrics["a"][1])
    assert math.isnan(metrics["b"][0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_written_as_nan(tmp_path, value):
    with RunLogger(tmp_path, tensorboard=False) as log:
        log.log(1, {"a": value, "b": 1})
    assert rows(tmp_path)[1] == ["1", "nan", "1.0"]


def test_resuming_drops_the_rows_after_the_step(tmp_path):
    log_steps(tmp_path, 10, 20, 30, 40)
    log_steps(tmp_path, 30, 40, 50, resume_step=20)
    assert read_metrics(tmp_path)["step"] == [10.0, 20.0, 30.0, 40.0, 50.0]


def test_resuming_before_the_first_row_starts_over_and_keeps_the_columns(tmp_path):
    log_steps(tmp_path, 10)
    log_steps(tmp_path, resume_step=0)
    assert rows(tmp_path) == [["step", "a"]]


def test_resuming_without_a_file_starts_one(tmp_path):
    log_steps(tmp_path / "new", 30, resume_step=20)
    assert read_metrics(tmp_path / "new")["step"] == [30.0]


def test_a_row_cut_by_a_kill_is_dropped(tmp_path):
    log_steps(tmp_path, 10, 20)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("30,3")
    assert read_metrics(tmp_path)["step"] == [10.0, 20.0]
    log_steps(tmp_path, 30, resume_step=30)
    assert read_metrics(tmp_path) == {"step": [10.0, 20.0, 30.0], "a": [10.0, 20.0, 30.0]}


def test_a_new_run_never_overwrites_an_old_one(tmp_path):
    log_steps(tmp_path, 10)
    with pytest.raises(FileExistsError, match=r"metrics.csv exists; continue that run with resume"):
        RunLogger(tmp_path)
    assert read_metrics(tmp_path)["step"] == [10.0]


def test_a_step_that_goes_back_is_refused(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as log:
        log.log(20, {"a": 1})
        log.log(20, {"a": 2})
        with pytest.raises(ValueError, match="step 10 comes after step 20"):
            log.log(10, {"a": 1})
    with (
        RunLogger(tmp_path, 20, tensorboard=False) as log,
        pytest.raises(ValueError, match="step 10 comes after step 20"),
    ):
        log.log(10, {"a": 1})


@pytest.mark.parametrize("key", ["step", "", "two\nlines", 3])
def test_a_key_that_cannot_be_a_column_is_refused(tmp_path, key):
    with (
        RunLogger(tmp_path, tensorboard=False) as log,
        pytest.raises(ValueError, match="cannot name a metric"),
    ):
        log.log(1, {key: 1.0})


@pytest.mark.parametrize("value", ["fast", None, [1, 2]])
def test_a_value_that_is_not_a_number_is_refused_by_name(tmp_path, value):
    with (
        RunLogger(tmp_path, tensorboard=False) as log,
        pytest.raises(ValueError, match=r"a/b is .*, expected a number"),
    ):
        log.log(1, {"a/b": value})


def test_closing_twice_is_fine_and_logging_after_it_is_refused(tmp_path):
    log = RunLogger(tmp_path, tensorboard=False)
    log.close()
    log.close()
    with pytest.raises(ValueError, match=r"metrics.csv is closed"):
        log.log(1, {"a": 1})


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics.csv: there is no such file"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "does not start with the column 'step'"),
        ("a,b\n1,2\n", "does not start with the column 'step'"),
        ("step,a\n1,2\n2,fast\n", r"line 3: could not convert string to float: 'fast'"),
        ("step,a\n1,2,3\n", r"line 2: 3 cells; expected 2 numbers"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=message):
        RunLogger(tmp_path, 1, tensorboard=False)
    assert (tmp_path / "metrics.csv").read_text() == content


def test_a_full_disk_names_the_file_and_the_step(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with RunLogger(tmp_path, tensorboard=False) as log:
        log.log(1, {"a": 1})
        log._file.close()
        log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(OSError, match=r"metrics.csv: the row of step 2 was not written"):
            log.log(2, {"a": 1})


# TensorBoard.


def events(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_shows_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    with RunLogger(tmp_path) as log:
        log.log(10, {"rollout/ep_rew_mean": 1.5, "train/approx_kl": math.inf})
        log.log(20, {"rollout/ep_rew_mean": 2.5})
    shown = events(tmp_path)
    assert shown["rollout/ep_rew_mean"] == [(10, 1.5), (20, 2.5)]
    assert math.isnan(shown["train/approx_kl"][0][1])


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    with RunLogger(tmp_path) as log:
        for step in (10, 20, 30):
            log.log(step, {"a": step})
    for file in tmp_path.glob("events*"):
        # Files of one run are read in the order of the second in their name.
        file.rename(file.with_name(file.name.replace(file.name.split(".")[3], "1000000000")))
    with RunLogger(tmp_path, 20) as log:
        log.log(25, {"a": 25.0})
    assert events(tmp_path)["a"] == [(10, 10.0), (20, 20.0), (25, 25.0)]


def test_without_tensorboard_the_error_names_the_extra_and_the_csv_still_works(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"RunLogger\(tensorboard=True\) needs tensorboard; "):
        RunLogger(tmp_path)
    log_steps(tmp_path, 10)
