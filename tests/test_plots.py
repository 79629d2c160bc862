from __future__ import annotations

import importlib.util
import struct
from dataclasses import replace

import pytest
import torch

from act_peft import ActError, ActValueError, ChannelMask, ChannelScores, plots
from act_peft.channels.selection import Normalization, Scope
from act_peft.plots import check_matplotlib, group_scores, plot_accuracies, plot_demo, plot_scores, plot_sweep
from act_peft.sweeps.heldout import SampleSums, SkillResult
from act_peft.sweeps.methods import Method
from act_peft.sweeps.result import SweepResult
from act_peft.sweeps.rows import Measurement, SweepRow

ACCURACIES = {
    "base": {"Spanish": 0.0, "German": 0.9},
    "donor": {"Spanish": 1.0, "German": 0.1},
    "control: none": {"Spanish": 0.5, "German": 0.5},
}


def make_scores(layers=2, channels=50):
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.{kind}" for i in range(layers) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    sums = {name: torch.rand(channels, generator=generator).exp() for name in [*names, "lm_head"]}
    return ChannelScores(sums, 10)


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def drawn_scores(scores, **changes):
    settings = {"density": 0.1, "scope": Scope.GLOBAL, "group_by": "kind"}
    axes = plots._figure(7, 5).subplots()
    plots._draw_scores(axes, scores, **(settings | changes))
    return axes


class TestGroups:
    def test_by_kind(self):
        scores = make_scores()
        groups = group_scores(scores)
        assert list(groups) == ["q_proj", "up_proj", "lm_head"]
        assert torch.equal(groups["up_proj"], torch.cat([scores[f"model.layers.{i}.mlp.up_proj"] for i in range(2)]))

    def test_by_layer(self):
        assert {name: len(values) for name, values in group_scores(make_scores(), "layer").items()} == {
            "layer 0": 100,
            "layer 1": 100,
            "lm_head": 50,
        }

    def test_unknown(self):
        with pytest.raises(ActValueError, match="group_by: got 'colour', expected one of 'kind', 'layer'"):
            group_scores(make_scores(), "colour")


class TestCurve:
    def test_is_the_complementary_distribution(self):
        values = torch.tensor([3.0, 1.0, 0.0, 2.0], dtype=torch.float64)
        assert plots._curve(values) == ([1.0, 2.0, 3.0], [0.75, 0.5, 0.25])

    def test_of_many_channels_keeps_both_ends_and_lies_on_the_distribution(self):
        values = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
        x, share = plots._curve(values)
        assert len(x) <= plots.POINTS
        assert (x[0], x[-1]) == (values.min(), values.max())
        assert share == [pytest.approx(float((values >= score).double().mean())) for score in x]

    def test_of_zeros_is_empty(self):
        assert plots._curve(torch.zeros(3, dtype=torch.float64)) == ([], [])

    @pytest.mark.parametrize(("density", "lowest"), [(0.5, 3.0), (1, 1.0), (0.001, 4.0)])
    def test_cut_is_the_lowest_selected_score(self, density, lowest):
        assert plots._cut(torch.tensor([4.0, 1.0, 3.0, 2.0]), density) == lowest


class TestScoreFigure:
    @pytest.mark.parametrize("scope", ["global", "module"])
    @pytest.mark.parametrize("group_by", ["kind", "layer"])
    def test_writes_a_png(self, tmp_path, scope, group_by):
        plot_scores(make_scores(), tmp_path / "scores.png", density=0.1, scope=scope, group_by=group_by)
        width, height = png_size(tmp_path / "scores.png")
        assert width > height > 300
        assert [p.name for p in tmp_path.iterdir()] == ["scores.png"]

    def test_without_a_cut(self, tmp_path):
        plot_scores(make_scores(), tmp_path / "scores.png")
        png_size(tmp_path / "scores.png")

    def test_equal_models_and_many_layers(self, tmp_path):
        plot_scores(ChannelScores({"a": torch.zeros(4)}, 1), tmp_path / "zero.png", density=0.5)
        plot_scores(make_scores(layers=40), tmp_path / "many.png", group_by="layer")
        png_size(tmp_path / "zero.png")
        png_size(tmp_path / "many.png")

    def test_global_cut_is_one_score_where_the_mask_ends(self):
        scores = make_scores()
        mask = scores.top(0.1)
        lowest = min(float(scores[name][index].min()) for name, index in mask.items() if len(index))
        axes = drawn_scores(scores)
        assert [line.get_xdata() for line in axes.lines if list(line.get_ydata()) == [0, 1]] == [[lowest, lowest]]
        assert [text.get_text() for text in axes.texts] == ["selected: top 10%"]

    def test_module_cut_is_one_share(self):
        axes = drawn_scores(make_scores(), scope=Scope.MODULE)
        assert [line.get_ydata() for line in axes.lines if list(line.get_xdata()) == [0, 1]] == [[0.1, 0.1]]
        assert [text.get_text() for text in axes.texts] == ["selected: top 10% of every module"]

    def test_legend_names_every_group(self):
        labels = [text.get_text() for text in drawn_scores(make_scores()).get_legend().get_texts()]
        assert labels == ["q_proj (100)", "up_proj (100)", "lm_head (50)", "all modules (250)"]

    @pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan")])
    def test_impossible_density(self, tmp_path, density):
        with pytest.raises(ActValueError, match=r"density: got .*, expected a number above 0 and at most 1"):
            plot_scores(make_scores(), tmp_path / "scores.png", density=density)
        assert list(tmp_path.iterdir()) == []

    def test_unknown_scope(self, tmp_path):
        with pytest.raises(ActValueError, match="scope: got 'all', expected one of 'global', 'module'"):
            plot_scores(make_scores(), tmp_path / "scores.png", scope="all")


class TestAccuracyFigure:
    def test_writes_a_png(self, tmp_path):
        plot_accuracies(ACCURACIES, tmp_path / "accuracies.png")
        png_size(tmp_path / "accuracies.png")

    def test_bars_are_the_numbers(self):
        axes = plots._figure(7, 5).subplots()
        plots._draw_accuracies(axes, ACCURACIES)
        heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
        assert heights == [list(row.values()) for row in ACCURACIES.values()]
        assert [text.get_text() for text in axes.texts] == ["0", "90", "100", "10", "50", "50"]

    @pytest.mark.parametrize(
        ("accuracies", "message"),
        [
            ({}, r"accuracies: got \[\], expected the same skills"),
            (
                {"base": {"a": 1.0}, "donor": {"b": 1.0}},
                r"donor: got \['b'\], expected the same skills for every model",
            ),
        ],
    )
    def test_different_skills(self, tmp_path, accuracies, message):
        with pytest.raises(ActValueError, match=message):
            plot_accuracies(accuracies, tmp_path / "accuracies.png")

    def test_missing_folder(self, tmp_path):
        with pytest.raises(ActValueError, match="does not exist, expected an existing one"):
            plot_accuracies(ACCURACIES, tmp_path / "no" / "accuracies.png")

    def test_interrupted_writing_leaves_the_old_file(self, tmp_path, monkeypatch):
        from matplotlib.figure import Figure

        def broken(self, file, **options):
            file.write(b"half")
            raise OSError("disk full")

        (tmp_path / "accuracies.png").write_bytes(b"old")
        monkeypatch.setattr(Figure, "savefig", broken)
        with pytest.raises(OSError, match="disk full"):
            plot_accuracies(ACCURACIES, tmp_path / "accuracies.png")
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("accuracies.png", b"old")]


def make_sweep(skills=("German",), *, gain=0.2, donor=True):
    def results(ability, keep):
        return SkillResult(1.0, ability), {name: SkillResult(1.0, keep) for name in skills}

    rows = [
        SweepRow(*results(0.5 + gain * density + 0.1 * scale, 0.95 - 0.1 * scale), density, scale, 10)
        for density in (0.1, 0.2)
        for scale in (0.3, 0.6, 1.0)
    ]
    masks = {density: ChannelMask({"m": [0]}, {"m": 10}) for density in (0.1, 0.2)}
    base = SweepRow(*results(0.5, 0.95), 0.0, 0.0, 0)
    own = Measurement(*results(1.0, 0.4)) if donor else None
    return SweepResult(tuple(rows), base, own, 0.07, Scope.GLOBAL, Normalization.NONE, masks)


class TestSweepFigure:
    def drawn(self, result):
        axes = plots._figure(7, 5).subplots()
        plots._draw_sweep(axes, result)
        return axes, {line.get_label(): line for line in axes.lines}

    def test_writes_a_png(self, tmp_path):
        plot_sweep(make_sweep(), tmp_path / "sweep.png")
        width, height = png_size(tmp_path / "sweep.png")
        assert width > height > 300
        assert [p.name for p in tmp_path.iterdir()] == ["sweep.png"]

    def test_lines_are_the_numbers(self):
        result = make_sweep()
        axes, lines = self.drawn(result)
        points = [(row.keep_accuracy, row.ability.accuracy) for row in (result.base, *result.rows)]
        assert list(zip(*lines["density 0.2"].get_data(), strict=True)) == [points[0], *points[4:]]
        assert list(zip(*lines["base"].get_data(), strict=True)) == points[:1]
        assert list(zip(*lines["donor"].get_data(), strict=True)) == [(0.4, 1.0)]
        front = [(row.keep_accuracy, row.ability.accuracy) for row in result.front]
        assert list(zip(*lines["Pareto front"].get_data(), strict=True)) == front
        assert list(zip(*lines["recommended: density 0.2, scale 0.6"].get_data(), strict=True)) == [points[5]]
        assert [line.get_xdata() for line in axes.lines if list(line.get_ydata()) == [0, 1]] == [
            [pytest.approx(0.88), pytest.approx(0.88)]
        ]
        assert axes.get_xlabel() == "token accuracy on what is kept: German"

    def test_several_skills_no_donor_and_no_recommendation(self):
        axes, lines = self.drawn(make_sweep(("German", "English"), gain=-10, donor=False))
        assert {"base", "Pareto front", "density 0.1", "density 0.2"} == {n for n in lines if not n.startswith("_")}
        assert [line for line in axes.lines if list(line.get_ydata()) == [0, 1]] == []
        assert axes.get_xlabel() == "mean token accuracy on what is kept: German, English"

    def test_losses_and_other_methods(self, tmp_path):
        samples = SampleSums(*(torch.tensor([1.0, 1.0], dtype=torch.float64) for _ in range(3)))

        def row(method, ability, rise, scale):
            loss = torch.tensor([ability, ability + 0.01], dtype=torch.float64)
            result = SkillResult(float(loss.mean()), 0.5, replace(samples, losses=loss))
            return SweepRow(result, {"German": SkillResult(1.0 + rise, 0.9)}, 1.0, scale, 10, method, {"scale": scale})

        rows = (
            row(Method.INTERPOLATION, 0.8, 0.01, 0.2),
            row(Method.INTERPOLATION, 0.3, 0.9, 0.6),
            row(Method.FITTED, 0.5, 0.02, 1.0),
        )
        base = row(Method.BASE, 1.0, 0.0, 0.0)
        result = SweepResult(rows, base, None, None, Scope.GLOBAL, Normalization.NONE, {}, max_keep_loss=0.03)
        axes, lines = self.drawn(result)
        assert list(lines["interpolation"].get_xdata()) == pytest.approx([0.01, 0.9])
        assert list(lines["interpolation"].get_ydata()) == pytest.approx([0.805, 0.305])
        assert list(lines["recommended: fitted\nscale 1"].get_ydata()) == pytest.approx([0.505])
        assert axes.get_xlim()[0] > axes.get_xlim()[1]  # better is to the right, and up
        assert axes.get_ylim()[0] > axes.get_ylim()[1]
        assert axes.get_xlim()[0] < 0.2  # what is far beyond the limit is left out
        assert axes.get_xlabel() == "rise of the loss per token: German"
        assert axes.get_ylabel() == "loss on the ability"
        plot_sweep(result, tmp_path / "sweep.png")
        assert png_size(tmp_path / "sweep.png")[0] > 300


def test_demo_figure(tmp_path):
    plot_demo(make_scores(), ACCURACIES, tmp_path / "demo.png", density=0.2, scope="module")
    width, height = png_size(tmp_path / "demo.png")
    assert width > 2 * height


@pytest.mark.parametrize(
    "call",
    [
        check_matplotlib,
        lambda: plot_scores(make_scores(), "unused.png"),
        lambda: plot_accuracies(ACCURACIES, "unused.png"),
        lambda: plot_demo(make_scores(), ACCURACIES, "unused.png", density=0.1),
        lambda: plot_sweep(make_sweep(), "unused.png"),
    ],
)
def test_without_matplotlib(monkeypatch, call):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ActError, match=r'matplotlib is not installed, expected it \(pip install "act-peft\[demo\]"\)'):
        call()
