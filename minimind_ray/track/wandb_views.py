"""Save a view of a sweep's runs at W&B: a page of the project with charts of the runs of one group.

W&B's own package wandb-workspaces makes the view, if it is installed (the extra wandb-views). A view shows runs that
are added later, too. So it is made once; a resumed sweep keeps it, with the user's changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unicodedata import category

from minimind_ray.track.tracker import SweepView
from minimind_ray.track.values import best_name

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws


REFUSED = ("So", "Sk", "Sm", "Sc", "Cs")
"""The package refuses emojis in titles, by these Unicode categories. Signs such as = and + are among them."""


def save_view(view: SweepView, entity: str, project: str) -> str:
    """Save a new view in W&B's project. Returns its URL. Raises W&B's exceptions if W&B refuses or does not answer."""
    workspace = workspace_of(view, entity, project)
    workspace.save()
    return str(workspace.url)


def workspace_of(view: SweepView, entity: str, project: str) -> ws.Workspace:
    """Return the view in the package's form. Its names are those of the runs: optim_lr, and best/loss for val/loss."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    metric = best_name(view.metric)
    value, axes = wr.SummaryMetric(metric), {key.replace(".", "_"): log for key, log in view.axes.items()}
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key), log=log) for key, log in axes.items()]
    columns.append(wr.ParallelCoordinatesPlotColumn(metric=value))
    overview = [
        wr.ParallelCoordinatesPlot(columns=columns, layout=wr.Layout(w=24, h=10)),
        wr.ParameterImportancePlot(with_respect_to=metric),
    ]
    scatters = [
        wr.ScatterPlot(title=f"{view.metric} against {key}", x=wr.Config(key), y=value, log_x=log)
        for key, log in axes.items()
    ]
    curves = [wr.LinePlot(title=f"{name} over tokens", x="tokens", y=[name]) for name in view.curves]
    comparison = [wr.WeavePanelSummaryTable(table_name=name) for name in view.tables]
    # The package rewrites signs such as = inside texts, too: escape all characters.
    group = "".join(f"\\U{ord(char):08x}" for char in view.group)
    sections: dict[str, list[Any]] = {
        "Axes and metric": overview,
        "Metric against each axis": scatters,
        "Learning curves": curves,
        "Comparison": [*comparison, *(wr.MediaBrowser(media_keys=[name]) for name in view.pages)],
        "Settings and results of the runs": [wr.RunComparer(diff_only=True)],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name="".join("-" if category(char) in REFUSED else char for char in view.title),
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items() if panels],
        settings=ws.WorkspaceSettings(x_axis="tokens"),
        runset_settings=ws.RunsetSettings(
            filters=f"Metric('Group') = '{group}'",
            order=[expr.Ordering(expr.Summary(metric), ascending=view.mode == "min")],
        ),
    )
