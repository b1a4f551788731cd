/* Plots, drawn when they come into sight. Dashes and marks repeat what colours say. */

const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#a8478a", "#8a6d00", "#3b8fc4", "#555555", "#7a5195", "#b0b7c0"]; // after Okabe and Ito
const DARK = ["#56b4e9", "#f0903c", "#35c79a", "#e59bc8", "#f0e442", "#8fb8ff", "#bbbbbb", "#b79ae0", "#6f7a88"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const MARKS = ["circle", "square", "diamond", "cross", "x", "triangle-up"];
const specs = new Map(data.figures.map((f) => [f.id, f]));
const drawn = new Set();

const dark = () => {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function pointsOf(line) {
  const run = data.runs[line.run];
  if (line.of === "responses") return { steps: run.responses.point_steps, x: run.responses[line.against], y: run.responses[line.curve] };
  const source = line.of === "evals" ? run.eval_curves[line.curve] : { steps: run.curves.steps, values: run.curves.values[line.curve] };
  if (!line.against) return { steps: source.steps, x: source.steps, y: source.values, low: run.curves.low[line.curve], high: run.curves.high[line.curve] };
  const other = line.of === "evals" ? run.eval_curves[line.against] : { steps: run.curves.steps, values: run.curves.values[line.against] };
  const at = new Map(other.steps.map((s, i) => [s, other.values[i]]));
  return { steps: source.steps, x: source.steps.map((s) => at.get(s) ?? null), y: source.values };
}

function tracesOf(spec) {
  const colours = dark() ? DARK : LIGHT, several = data.runs.length > 1 && new Set(spec.lines.map((l) => l.run)).size > 1, traces = [];
  spec.lines.forEach((line, i) => {
    const p = pointsOf(line), style = several ? line.run : i, colour = colours[style % colours.length];
    const hover = spec.unit === "share" ? "%{y:.2%}" : "%{y:.4~g}";
    if (spec.kind === "scatter") {
      const bar = { title: { text: "step", side: "right" }, thickness: 8, len: 0.9, outlinewidth: 0 };
      traces.push({
        type: "scatter", mode: line.of === "evals" ? "lines+markers" : "markers", x: p.x, y: p.y, text: p.steps.map((s) => `${s}`), name: line.label,
        line: { color: "rgba(128,128,128,.45)", width: 1 },
        marker: { size: 7, opacity: 0.8, color: p.steps, colorscale: "Cividis", reversescale: !dark(), showscale: true, colorbar: bar },
        hovertemplate: `step %{text}<br>${spec.unit === "share" ? "%{y:.2%}" : "%{y:.4~g}"} at %{x:.4~g}<extra></extra>`,
      });
    } else if (spec.kind === "stack") {
      traces.push({ type: "bar", x: p.x, y: p.y, name: line.label, marker: { color: colour, line: { width: 0 } }, hovertemplate: "%{y:.3~g} s" });
    } else {
      const evals = line.of === "evals", few = p.x.length < 40;
      if (p.low && spec.lines.length < 4 && line.of === "curves") {
        traces.push({ type: "scatter", mode: "lines", x: p.x, y: p.low, line: { width: 0 }, showlegend: false, hoverinfo: "skip" });
        traces.push({ type: "scatter", mode: "lines", x: p.x, y: p.high, line: { width: 0 }, fill: "tonexty", fillcolor: colour + "33", showlegend: false, hoverinfo: "skip" });
      }
      traces.push({
        type: "scatter", mode: few ? "lines+markers" : "lines", x: p.x, y: p.y, name: line.label, hovertemplate: hover, connectgaps: evals,
        line: { color: colour, width: spec.lines.length > 1 && i === 0 && line.label === "total" ? 3 : 2, dash: several && !evals ? "solid" : DASHES[(several ? 1 : i) % DASHES.length] },
        marker: { size: evals ? 8 : 5, symbol: MARKS[(several ? line.run : i) % MARKS.length] },
      });
    }
  });
  return traces;
}

function draw(figure) {
  const spec = specs.get(figure.dataset.figure), place = figure.querySelector(".plot");
  const ink = getComputedStyle(document.body), soft = getComputedStyle(figure.querySelector("figcaption p")).color;
  const grid = dark() ? "#323945" : "#dfe3e8";
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 44, r: 12, t: 8, b: 36 },
    font: { family: ink.fontFamily, size: 12, color: soft }, barmode: "stack", bargap: 0.08,
    xaxis: { ...axis, title: { text: spec.x_title, standoff: 6, font: { size: 12 } } }, yaxis: { ...axis, ...(spec.unit === "share" ? { tickformat: ".0%", rangemode: "tozero" } : {}) },
    showlegend: spec.kind !== "scatter" && spec.lines.length > 1, legend: { traceorder: "normal", orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    hovermode: spec.kind === "scatter" ? "closest" : "x unified", hoverlabel: { bgcolor: dark() ? "#14171c" : "#ffffff", font: { color: ink.color } },
  };
  Plotly.react(place, tracesOf(spec), layout, { displayModeBar: false, responsive: true });
  drawn.add(figure);
}

/* The plots' library stands behind this script in the page, so that words and tokens need not wait for it. */
document.addEventListener("DOMContentLoaded", () => {
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "300px" });
  for (const figure of document.querySelectorAll("[data-figure]")) seen.observe(figure);
  themed.push(() => drawn.forEach(draw));
});
