"""Learning curves: the right lines from the right runs, and clear refusals."""

import json
import sys

import numpy as np
import pytest

from ppo_fast import plots
from ppo_fast.logger import RunLogger
from ppo_fast.plots import plot_learning_curves

pytest.importorskip("matplotlib")
RETURN = "rollout/ep_rew_mean"


def write_run(folder, returns, *, step=100, config=None, **columns):
    with RunLogger(folder, tensorboard=False) as log:
        for index, value in enumerate(returns):
            row = {key.replace("__", "/"): column[index] for key, column in columns.items()}
            log.log((index + 1) * step, {RETURN: value, **row})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn during the test."""
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def curves(ax) -> list[list[float]]:
    return [line.get_ydata().tolist() for line in ax.lines if len(line.get_xdata()) > 2]


def texts(ax) -> list[str]:
    titles = [ax.get_title(loc=side) for side in ("left", "center", "right")]
    return [text for text in (*titles, *(t.get_text() for t in ax.texts)) if text]


def test_a_single_run_shows_return_goal_and_diagnostics(tmp_path, figures):
    run = write_run(
        tmp_path / "run",
        [20, 200, 480],
        config={"env_id": "CartPole-v1", "stop_return": 475},
        train__approx_kl=[0.1, 0.2, 0.3],
        train__clip_fraction=[0.1, 0.1, 0.1],
        train__explained_variance=[0, 0.5, 1],
    )
    out = plot_learning_curves([run], tmp_path / "new" / "curve.png")
    assert out.read_bytes().startswith(b"\x89PNG")
    main, *rest = figures[0].axes
    assert curves(main) == [[20.0, 200.0, 480.0]]
    assert main.lines[0].get_xdata().tolist() == [100, 200, 300]
    assert {"CartPole-v1", "goal 475", "480"} <= set(texts(main))
    assert [ax.get_title() or ax.get_title(loc="left") for ax in rest] == [
        "approx_kl",
        "clip_fraction",
        "explained_variance",
    ]
    assert curves(rest[0]) == [[0.1, 0.2, 0.3]]
    assert rest[-1].get_xlabel() == "environment steps"


def test_seeds_of_one_environment_become_a_median_in_a_band(tmp_path, figures):
    runs = [
        write_run(tmp_path / str(seed), values, config={"env_id": "Pendulum-v1"})
        for seed, values in enumerate([[-9, -6, -3], [-8, -2, -1], [-7, -4, -2]])
    ]
    plot_learning_curves(runs, tmp_path / "curve.png")
    (ax,) = figures[0].axes
    assert curves(ax)[-1] == [-8.0, -4.0, -2.0]
    band = ax.collections[0].get_paths()[0].vertices
    assert {(200.0, -6.0), (200.0, -2.0)} <= {tuple(point) for point in band}
    assert "median and range of 3 seeds" in texts(ax)
    assert "\N{MINUS SIGN}2" in texts(ax)


def test_the_band_covers_only_the_steps_all_seeds_have(tmp_path, figures):
    runs = [
        write_run(tmp_path / "long", [1, 2, 3, 4], config={"env_id": "X"}),
        write_run(tmp_path / "short", [1, 2, 3], config={"env_id": "X"}),
    ]
    plot_learning_curves(runs, tmp_path / "curve.png")
    (ax,) = figures[0].axes
    assert curves(ax) == [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]


def test_seeds_with_other_steps_are_interpolated():
    steps, values = plots._band(
        [
            (np.array([0.0, 10.0, 20.0]), np.array([0.0, 1.0, 2.0])),
            (np.array([5.0, 25.0]), np.array([0.0, 4.0])),
        ]
    )
    assert steps.tolist() == [5.0, 10.0, 20.0]
    assert values.tolist() == [[0.5, 1.0, 2.0], [0.0, 1.0, 3.0]]


def test_seeds_without_a_step_in_common_are_drawn_without_a_band(tmp_path, figures):
    runs = [
        write_run(tmp_path / "early", [1, 2, 3], step=10, config={"env_id": "X"}),
        write_run(tmp_path / "late", [1, 2, 3], step=1000, config={"env_id": "X"}),
    ]
    plot_learning_curves(runs, tmp_path / "curve.png")
    (ax,) = figures[0].axes
    assert len(curves(ax)) == 2


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_every_environment_gets_a_panel(tmp_path, figures, number):
    runs = [
        write_run(tmp_path / f"{i}", [i, 2, 3], config={"env_id": f"Env-v{i}"})
        for i in range(number)
    ]
    plot_learning_curves(runs, tmp_path / "curve.png")
    assert [texts(ax)[0] for ax in figures[0].axes] == [f"Env-v{i}" for i in range(number)]
    assert all(ax.get_xlabel() == "environment steps" for ax in figures[0].axes)


def test_seeds_that_disagree_on_the_goal_show_none(tmp_path, figures):
    runs = [
        write_run(tmp_path / str(goal), [1, 2, 3], config={"env_id": "X", "stop_return": goal})
        for goal in (100, 200)
    ]
    plot_learning_curves(runs, tmp_path / "curve.png")
    assert not any("goal" in text for text in texts(figures[0].axes[0]))


def test_a_run_without_config_is_titled_by_its_folder(tmp_path, figures):
    plot_learning_curves([write_run(tmp_path / "mine", [1, 2, 3])], tmp_path / "curve.svg")
    assert texts(figures[0].axes[0])[0] == "mine"


def test_rows_before_the_first_finished_episode_are_left_out(tmp_path, figures):
    run = write_run(tmp_path / "run", [float("nan"), 1, float("nan"), 2, 3])
    plot_learning_curves([run], tmp_path / "curve.png")
    assert curves(figures[0].axes[0]) == [[1.0, 2.0, 3.0]]


def test_a_run_of_one_row_is_drawn(tmp_path):
    assert plot_learning_curves([write_run(tmp_path / "r", [1])], tmp_path / "c.png").exists()


def test_plotting_changes_no_global_setting(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_learning_curves([write_run(tmp_path / "r", [1, 2, 3])], tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == before


def test_no_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="folders is empty"):
        plot_learning_curves([], tmp_path / "c.png")


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics.csv: there is no such file"):
        plot_learning_curves([tmp_path], tmp_path / "c.png")


def test_an_unknown_metric_is_answered_with_the_known_ones(tmp_path):
    run = write_run(tmp_path / "r", [1, 2])
    with pytest.raises(ValueError, match=r"no metric 'loss'; it has step, rollout/ep_rew_mean"):
        plot_learning_curves([run], tmp_path / "c.png", metric="loss")


def test_a_run_without_a_finished_episode_is_named(tmp_path):
    run = write_run(tmp_path / "r", [float("nan")])
    with pytest.raises(ValueError, match="no finite value of 'rollout/ep_rew_mean' yet"):
        plot_learning_curves([run], tmp_path / "c.png")


def test_a_broken_config_is_named(tmp_path):
    run = write_run(tmp_path / "r", [1, 2])
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        plot_learning_curves([run], tmp_path / "c.png")


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plotting needs matplotlib; .*'ppo-fast\[train\]'"):
        plot_learning_curves([tmp_path], tmp_path / "c.png")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (500, "500"), (20_000, "20k"), (1.5e6, "1.5M"), (-2000, "-2k")]
)
def test_steps_are_written_short(value, text):
    assert plots._short(value) == text
