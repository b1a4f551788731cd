"""The saved view, built by W&B's own package and sent by its own client, to a stand-in for the service."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.config import load
from core.metrics import HISTOGRAMS, charts
from launch import wandb_view

pytest.importorskip(wandb_view.PACKAGE, reason="wants the extra workspaces")


class Service(BaseHTTPRequestHandler):
    """Answers the few questions that the client asks; keeps the views that it is given."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        views = self.server.views
        if "upsertView" in asked["query"]:
            views.append(asked["variables"])
            answer = {"upsertView": {"view": {"id": "v1", "name": asked["variables"]["name"]}, "inserted": True}}
        elif "allViews" in asked["query"]:
            edges = [{"node": {"displayName": view["displayName"]}} for view in views]
            answer = {"project": {"allViews": {"edges": edges}}}
        else:
            self.server.others.append(asked["query"])
            answer = {"viewer": {"id": "u", "username": "me", "entity": "us", "flags": "{}", "teams": {"edges": []}}}
        body = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def service(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.views, server.others = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield server
    server.shutdown()
    server.server_close()


def load_cards():
    return load(Path(__file__).parents[1] / "configs" / "cards.yaml")


def test_the_view_is_saved_once_and_has_the_charts_in_order(service):
    cfg = load_cards()
    assert wandb_view.ensure("us", "project", cfg) is not None
    assert wandb_view.ensure("us", "project", cfg) is None
    (view,) = service.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("us", "project", wandb_view.NAME)
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    named = [s for s in sections if s["panels"] and s["name"] != "Hidden Panels"]
    wanted = charts(cfg.rewards)
    assert [s["name"] for s in named] == [*wanted, "Look at it"]
    for section, of_title in zip(named, wanted.values(), strict=False):
        drawn = [panel["config"]["metrics"] for panel in section["panels"]]
        assert drawn == list(of_title.values())
        assert {panel["config"]["xAxis"] for panel in section["panels"]} == {"step"}
    (media,) = named[-1]["panels"]
    assert media["config"]["mediaKeys"] == ["samples", *HISTOGRAMS]


def test_each_component_has_a_line():
    names = charts(load_cards().rewards)["Is it learning?"]["reward/<component>/raw"]
    assert names == [f"reward/{name}/raw" for name in load_cards().rewards]
