"""A saved view of a W&B project: the charts of docs/metrics.md in its order, where `tokenppo[workspaces]` is installed.

W&B itself sorts what a run logs by the alphabet, a chart for each name. The package that saves views is a preview of
W&B's: without it there is no view, and nothing else changes.
"""

import importlib.util
from typing import Any

from core.metrics import HISTOGRAMS, charts
from core.schema import Config

NAME = "tokenppo"
PACKAGE = "wandb_workspaces"


def ensure(entity: str, project: str, cfg: Config) -> str | None:
    """Save the view in this project unless it has one of this name. Its address if it is new, else None.

    Raises whatever the client raises; waits for the service, so not in the loop's thread.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    import wandb
    from wandb_workspaces import workspaces

    api = wandb.Api()
    if NAME in views_of(api, entity, project):
        return None
    view = workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections(cfg),
        settings=workspaces.WorkspaceSettings(x_axis="step"),
    )
    view.save()
    return view.url


def views_of(api: Any, entity: str, project: str) -> set[str]:
    """Names of the saved views of a project, as people see them. `api`: wandb.Api()."""
    from wandb_workspaces._graphql import execute_graphql

    query = """
        query Views($entity: String!, $project: String!) {
            project(name: $project, entityName: $entity) {
                allViews(viewType: "project-view") { edges { node { displayName } } }
            }
        }
    """
    answer = execute_graphql(api, query, {"entity": entity, "project": project})
    edges = ((answer.get("project") or {}).get("allViews") or {}).get("edges") or []
    return {edge["node"]["displayName"] for edge in edges}


def sections(cfg: Config) -> list[Any]:
    """Sections of charts for a run with these components, then the responses and histograms."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2

    def section(name: str, panels: list[Any]) -> Any:
        layout = workspaces.SectionLayoutSettings(columns=3, rows=3)
        return workspaces.Section(name=name, panels=panels, is_open=True, layout_settings=layout)

    parts = [
        section(title, [v2.LinePlot(title=chart, x="step", y=names) for chart, names in of_title.items()])
        for title, of_title in charts(cfg.rewards).items()
    ]
    return [*parts, section("Look at it", [v2.MediaBrowser(media_keys=["samples", *HISTOGRAMS])])]
