"use strict";
// Draws the figures of #figures, and heeds the controls above them. A trace's `meta`: its run, and what one of its steps
// is in epochs and in images (null: not known).
const figures = JSON.parse(document.getElementById("figures").textContent);
const steps = new Map(figures.map((figure) => [figure.id, figure.data.map((trace) => trace.x)]));

function along(axis) {
  for (const { id, data } of figures) {
    const x = data.map((trace, place) => {
      const scale = axis === "step" ? 1 : trace.meta[axis];
      return steps.get(id)[place].map((step) => (scale === null ? null : step * scale));
    });
    Plotly.update(id, { x }, { "xaxis.title.text": axis, "xaxis.autorange": true, "yaxis.autorange": true });
  }
}

function show(run, visible) {
  for (const { id, data } of figures) {
    const places = data.flatMap((trace, place) => (trace.meta.run === run ? [place] : []));
    if (places.length) Plotly.restyle(id, { visible }, places);
  }
}

// Plotly would offer to send a plot to its maker's cloud.
const config = {
  responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["lasso2d", "select2d"],
};
for (const { id, data, layout } of figures) Plotly.newPlot(id, data, layout, config);
for (const input of document.querySelectorAll("input[name=axis]")) {
  input.addEventListener("change", () => along(input.value));
}
for (const input of document.querySelectorAll("input[name=run]")) {
  input.addEventListener("change", () => show(Number(input.value), input.checked));
}
