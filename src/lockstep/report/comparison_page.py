"""A comparison of runs as one page for any browser: tables to sort, curves to explore. It asks no network for anything.

The page holds all it needs, Bokeh's script too, and its Content-Security-Policy forbids it to load more. Texts are
escaped by Jinja, and by Bokeh within the figures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.report.comparison import Group, RunRecord, names_of
from lockstep.report.figures import GROUP_COLORS, panels_of
from lockstep.report.page import write_page
from lockstep.report.tables import Table
from lockstep.run.history import curve

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure

_MOST_POINTS = 400  # of a line: more make a page larger, not a curve clearer
_DASHES = ("solid", "dashed", "dotted", "dotdash")


def write_comparison_page(groups: Sequence[Group], tables: Sequence[Table], path: Path) -> None:
    """Write the tables, and the curves of every run in its group's colour, as one HTML file of some 1.5 MB."""
    from bokeh.embed import components
    from bokeh.resources import Resources
    from markupsafe import Markup

    plots = [_plot(groups, *panel) for panel in panels_of(groups)]
    script, divisions = components(plots, wrap_script=False)
    write_page(
        "comparison_page.html",
        path,
        number=sum(len(group.runs) for group in groups),
        tables=tables,
        legend=[(group.label, *_look(index)) for index, group in enumerate(groups)],
        # All of it is Bokeh's own, in which it has escaped what is ours.
        bokeh=[Markup(part) for part in Resources(mode="inline", components=["bokeh"]).js_raw],
        plots=[Markup(division) for division in divisions],
        script=Markup(script),
    )


def _look(index: int) -> tuple[str, str]:
    """Colour and dash of a group; as in the figure."""
    dash = _DASHES[index // len(GROUP_COLORS) % len(_DASHES)]
    return GROUP_COLORS[index % len(GROUP_COLORS)], dash


def _plot(groups: Sequence[Group], title: str, split: str, key: str) -> "Figure":
    """A panel with a line per run: what is pointed at names its run, and the page's legend hides lines by group."""
    from bokeh.models import HoverTool, NumeralTickFormatter, PrintfTickFormatter
    from bokeh.plotting import figure

    value = "@value{0.00 %}" if key == "accuracy" else "@value{0.000000}"
    plot = figure(
        title=title,
        x_axis_label="Epoch",
        height=320,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,save,reset",
        active_drag=None,  # a finger on a phone scrolls the page
        output_backend="canvas",
    )
    names = iter(names_of([run for group in groups for run in group.runs]))
    for index, group in enumerate(groups):
        for run in group.runs:
            _draw_run(plot, run, (split, key), index, (next(names), group.label))
    tooltips = [("run", "@run"), ("group", "$name"), ("epoch", "@epoch{0.00}"), ("step", "@step"), (title, value)]
    plot.add_tools(HoverTool(tooltips=tooltips, line_policy="nearest"))
    plot.toolbar.logo = None
    plot.grid.grid_line_color = "#e6e6e6"
    plot.outline_line_color = None
    is_share = key == "accuracy"
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[0] %") if is_share else PrintfTickFormatter(format="%.4g")
    return plot


def _draw_run(plot: "Figure", run: RunRecord, metric: tuple[str, str], index: int, names: tuple[str, str]) -> None:
    """A line; its tag is the number of its group, which the page's legend goes by. `names`: of the run, its group."""
    points = curve(run.history, *metric)
    points = points[:: len(points) // _MOST_POINTS + 1]
    columns: dict[str, list[Any]] = {
        "epoch": [point.epoch for point in points],
        "value": [point.value for point in points],
        "step": [point.step for point in points],
        "run": [names[0]] * len(points),
    }
    color, dash = _look(index)
    look: dict[str, Any] = {
        "line_color": color,
        "line_dash": dash,
        "line_width": 1.8,
        "line_alpha": 0.85,
        "name": names[1],
    }
    line = plot.line("epoch", "value", source=columns, **look)
    line.tags = [index]
    if len(points) == 1:
        plot.scatter("epoch", "value", source=line.data_source, color=color).tags = [index]
