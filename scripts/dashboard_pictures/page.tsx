// One dashboard, drawn as Grafana draws it, from what Prometheus answered (window.DRAWING, written by draw.py).
// Frames, curves, numbers, axes, units and colours are Grafana's components. Its heat-map panel is not published as a
// library; its place takes a drawing of cells on Grafana's plot component, with the options of the dashboard.
import { createRoot } from 'react-dom/client';
import {
  createTheme, dateTime, type DataFrame, type Field, FieldType, getDisplayProcessor, getFieldColorModeForField,
  ThemeContext, type TimeRange,
} from '@grafana/data';
import {
  BigValue, BigValueColorMode, BigValueGraphMode, GlobalStyles, PanelChrome, TimeSeries, UPlotChart, UPlotConfigBuilder,
} from '@grafana/ui';
import { interpolateViridis } from 'd3-scale-chromatic';
import 'uplot/dist/uPlot.min.css';

interface Series { name: string; times: number[]; values: (number | null)[] }
interface Panel {
  type: string; title: string; description: string; gridPos: { x: number; y: number; w: number; h: number };
  options: any; fieldConfig: any; series: Series[];
}
interface Drawing { width: number; from: number; to: number; panels: Panel[] }

const CELL_HEIGHT = 30, GAP = 8; // of Grafana's grid of 24 columns
const theme = createTheme({ colors: { mode: 'dark' } });
const drawing: Drawing = (window as any).DRAWING;
const range: TimeRange = (() => {
  const from = dateTime(drawing.from), to = dateTime(drawing.to);
  return { from, to, raw: { from, to } };
})();

function frameOf(series: Series, panel: Panel, index: number): DataFrame {
  const { custom = {}, ...defaults } = panel.fieldConfig.defaults;
  const config = {
    color: { mode: 'palette-classic' }, ...defaults, displayName: series.name,
    custom: { drawStyle: 'line', lineInterpolation: 'linear', axisPlacement: 'auto', pointSize: 5, ...custom },
  };
  const value: Field = {
    name: series.name, type: FieldType.number, values: series.values, config,
    state: { seriesIndex: index, displayName: series.name },
  };
  value.display = getDisplayProcessor({ field: value, theme, timeZone: 'utc' });
  const time: Field = { name: 'Time', type: FieldType.time, values: series.times, config: {} };
  time.display = getDisplayProcessor({ field: time, theme, timeZone: 'utc' });
  return { fields: [time, value], length: series.times.length, refId: String(index) };
}

function Curves({ panel, width, height }: { panel: Panel; width: number; height: number }) {
  const frames = panel.series.map((series, index) => frameOf(series, panel, index));
  return (
    <TimeSeries frames={frames} timeRange={range} timeZone="utc" width={width} height={height}
      legend={panel.options.legend} options={panel.options} />
  );
}

function Figure({ panel, width, height }: { panel: Panel; width: number; height: number }) {
  const frame = frameOf(panel.series[0], panel, 0), value = frame.fields[1];
  const known = value.values.filter((number: number | null) => number !== null);
  const shown = value.display!(known[known.length - 1]);
  return (
    <BigValue value={{ ...shown, color: getFieldColorModeForField(value).getCalculator(value, theme)(0, 0) }}
      width={width} height={height} theme={theme} colorMode={BigValueColorMode.None}
      graphMode={BigValueGraphMode.Area} sparkline={{ y: value, x: frame.fields[0] }} />
  );
}

// Layers from below to above by their names, as text; colour between the least and the largest value by the exponent of
// the panel, values below `filterValues.le` left out.
function HeatMap({ panel, width, height }: { panel: Panel; width: number; height: number }) {
  const rows = [...panel.series].sort((a, b) => (a.name < b.name ? -1 : 1));
  const { color, filterValues, cellValues, yAxis } = panel.options;
  const shown = (value: number | null) => value !== null && !(value <= (filterValues?.le ?? -Infinity));
  const all = rows.flatMap((row) => row.values.filter(shown)) as number[];
  const least = Math.min(...all), most = Math.max(...all);
  const shade = (value: number) => {
    const share = most > least ? ((value - least) / (most - least)) ** color.exponent : 0;
    return interpolateViridis(Math.floor(share * (color.steps - 1)) / (color.steps - 1));
  };
  const builder = new UPlotConfigBuilder('utc');
  builder.addScale({ scaleKey: 'x', isTime: true, orientation: 0, direction: 1, range: () => [drawing.from, drawing.to] });
  builder.addScale({ scaleKey: 'y', orientation: 1, direction: 1, range: () => [0, rows.length] });
  builder.addAxis({ scaleKey: 'x', isTime: true, placement: 'bottom' as any, theme, timeZone: 'utc', grid: { show: false } });
  const every = Math.ceil(rows.length / 8);
  builder.addAxis({
    scaleKey: 'y', placement: 'left' as any, theme, label: yAxis?.axisLabel, grid: { show: false }, ticks: { show: false },
    splits: () => rows.map((_, i) => i + 0.5).filter((_, i) => i % every === 0),
    values: (_: any, splits: number[]) => splits.map((at) => rows[Math.floor(at)].name),
  } as any);
  builder.addSeries({ scaleKey: 'y', pathBuilder: () => null, pointsBuilder: () => false, theme } as any);
  builder.addHook('draw', (plot) => {
    const cell = plot.valToPos(0, 'y', true) - plot.valToPos(1, 'y', true);
    rows.forEach((row, y) => row.times.forEach((time, i) => {
      if (!shown(row.values[i])) return;
      const step = i + 1 < row.times.length ? row.times[i + 1] - time : time - (row.times[i - 1] ?? time);
      const left = Math.max(plot.valToPos(time, 'x', true), plot.bbox.left);
      const right = Math.min(plot.valToPos(time + step, 'x', true), plot.bbox.left + plot.bbox.width);
      plot.ctx.fillStyle = shade(row.values[i] as number);
      plot.ctx.fillRect(left, plot.valToPos(y + 1, 'y', true), Math.ceil(right - left), Math.ceil(cell));
    }));
  });
  const times = rows[0].times;
  const field: Field = { name: '', type: FieldType.number, values: [], config: { unit: cellValues.unit, decimals: cellValues.decimals } };
  const text = getDisplayProcessor({ field, theme });
  const words = (value: number) => { const { text: number, suffix = '' } = text(value); return number + suffix; };
  const colours = [0, 0.25, 0.5, 0.75, 1].map((share) => interpolateViridis(share)).join(', ');
  return (
    <>
      <UPlotChart config={builder} data={[times, times.map(() => null)] as any} width={width} height={height - 26} />
      <div style={{ display: 'flex', gap: 6, fontSize: 11, marginLeft: 45, color: theme.colors.text.secondary }}>
        {words(least)}
        <div style={{ width: 220, height: 8, marginTop: 4, background: `linear-gradient(to right, ${colours})` }} />
        {words(most)}
      </div>
    </>
  );
}

function Content({ panel, width, height }: { panel: Panel; width: number; height: number }) {
  if (!panel.series.some((series) => series.values.some((value) => value !== null))) {
    return <div style={{ textAlign: 'center', paddingTop: height / 3 }}>No data</div>;
  }
  const Kind = { timeseries: Curves, stat: Figure, heatmap: HeatMap }[panel.type]!;
  return <Kind panel={panel} width={width} height={height} />;
}

function Board() {
  const column = (drawing.width - GAP) / 24;
  const bottom = Math.max(...drawing.panels.map(({ gridPos: { y, h } }) => y + h));
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div style={{ position: 'relative', height: bottom * (CELL_HEIGHT + GAP) + GAP, background: theme.colors.background.canvas }}>
        {drawing.panels.map((panel, index) => {
          const { x, y, w, h } = panel.gridPos;
          const width = w * column - GAP, height = h * (CELL_HEIGHT + GAP) - GAP;
          const place = { position: 'absolute', left: GAP + x * column, top: GAP + y * (CELL_HEIGHT + GAP), width, height } as const;
          return panel.type === 'row'
            ? <h4 key={index} style={{ ...place, paddingTop: 6 }}>{panel.title}</h4>
            : <div key={index} style={place}>
                <PanelChrome title={panel.title} width={width} height={height}>
                  {(inner, tall) => <Content panel={panel} width={inner} height={tall} />}
                </PanelChrome>
              </div>;
        })}
      </div>
    </ThemeContext.Provider>
  );
}

createRoot(document.getElementById('page')!).render(<Board />);
