"""The dashboards against Grafana's own published types: the Python library alone checks nothing.

Needs npm and the network, so it belongs to the long tests.
"""

import json
import shutil
import subprocess

import pytest

from tests.monitor.test_cluster_monitoring import DASHBOARDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed"),
]
PACKAGES = ("@grafana/schema@13.2.3", "typescript@7.0.2")
# JSON has no enums: a string enum accepts its values. What Grafana fills in by itself may be left out of `options`.
TYPES = """
import type { Dashboard, Panel, RowPanel } from '@grafana/schema/dist/esm/raw/dashboard/x/Dashboard_types.gen';
import type * as timeseries from
  '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';
import type * as heatmap from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
type Json<T> = T extends string ? `${T}` : T extends number | boolean | null | undefined ? T
  : T extends object ? { [K in keyof T]: Json<T[K]> } : T;
type Some<T> = T extends object ? { [K in keyof T]?: Some<T[K]> } : T;
type Config<C> = { defaults: Json<NonNullable<Panel['fieldConfig']>['defaults']> & { custom?: Some<Json<C>> };
  overrides: [] };
interface Query { expr: string; legendFormat: string; range: boolean; instant: boolean; refId: string;
  datasource: { type: 'prometheus'; uid: string } }
type Of<T extends string, O, C> = Omit<Json<Panel>, 'type' | 'options' | 'fieldConfig' | 'targets'>
  & { type: T; options?: Some<Json<O>>; fieldConfig: Config<C>; targets: Query[]; title: string; description: string };
type Known = Of<'timeseries', timeseries.Options, timeseries.FieldConfig>
  | Of<'heatmap', heatmap.Options, heatmap.FieldConfig> | Of<'stat', stat.Options, {}>;
export type Page = Omit<Json<Dashboard>, 'panels'> & { panels: (Known | Json<RowPanel>)[] };
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with Grafana's types and the compiler."""
    path = tmp_path_factory.mktemp("schema")
    (path / "package.json").write_text('{"private": true}')
    command = ["npm", "install", "--no-audit", "--no-fund", "--save-exact", *PACKAGES]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path / "page.ts").write_text(TYPES)
    return path


def compiled(folder, name: str, page: dict) -> str:
    """What the compiler has to say about a dashboard; nothing if it is one."""
    text = f"import type {{ Page }} from './page';\nexport const page: Page = {json.dumps(page)};\n"
    (folder / f"{name}.ts").write_text(text)
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022"]
    command = [folder / "node_modules/.bin/tsc", *options, f"{name}.ts"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300).stdout


def test_every_dashboard_is_one_by_grafanas_types(folder):
    for path in DASHBOARDS:
        assert compiled(folder, path.stem, json.loads(path.read_text())) == ""


@pytest.mark.parametrize(
    ("kind", "break_it"),
    [
        ("timeseries", lambda panel: panel["fieldConfig"]["defaults"].update(unti="s")),
        ("timeseries", lambda panel: panel["fieldConfig"]["defaults"]["custom"].update(showPoints="nevre")),
        ("timeseries", lambda panel: panel["targets"][0].pop("expr")),
        ("heatmap", lambda panel: panel["options"]["color"].update(scheme=7)),
        ("stat", lambda panel: panel["options"].update(colorMod="none")),
        ("stat", lambda panel: panel.update(gridPos="left")),
    ],
)
def test_mistakes_are_found(folder, kind, break_it):
    (depth,) = (path for path in DASHBOARDS if path.stem == ("overview" if kind == "stat" else "depth"))
    page = json.loads(depth.read_text())
    break_it(next(panel for panel in page["panels"] if panel["type"] == kind))
    assert "error TS" in compiled(folder, "broken", page)
