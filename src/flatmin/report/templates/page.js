"use strict";
// Tables sort on a click on a header. Cells sort by their data-sort attribute, or by their text without one.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const key = (row) => {
        const cell = row.cells[column];
        return "sort" in cell.dataset ? (cell.dataset.sort === "" ? NaN : Number(cell.dataset.sort)) : cell.textContent.trim();
      };
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      const before = header.getAttribute("aria-sort");
      const up = before ? before === "descending" : rows.some(([k]) => typeof k === "string"); // numbers: best first
      const sign = up ? 1 : -1;
      headers.forEach((h) => h.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const missing = (v) => typeof v === "number" && Number.isNaN(v);
      rows.sort(([a], [b]) => {
        if (missing(a) || missing(b)) return missing(a) - missing(b); // unknown values stay last
        return sign * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
      });
      for (const [, row] of rows) table.tBodies[0].append(row);
    });
  });
}

// A shadow at the edge and a line below show that a table is wider than the page.
for (const box of document.querySelectorAll(".table")) {
  const scroll = box.querySelector(".scroll");
  const look = () => {
    const left = scroll.scrollWidth - scroll.clientWidth - scroll.scrollLeft;
    box.style.setProperty("--height", `${scroll.clientHeight}px`);
    box.classList.toggle("more", left > 1);
    box.classList.toggle("moved", scroll.scrollLeft > 1);
    box.querySelector(".hint").hidden = scroll.scrollWidth <= scroll.clientWidth + 1;
  };
  scroll.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(scroll);
  new ResizeObserver(look).observe(scroll.firstElementChild);
}

// Folded parts are opened for printing.
const opened = [];
window.addEventListener("beforeprint", () => {
  for (const box of document.querySelectorAll("details:not([open])")) {
    box.open = true;
    opened.push(box);
  }
});
window.addEventListener("afterprint", () => {
  for (const box of opened.splice(0)) box.open = false;
});

// Figures name colours as "var:ink"; the names are looked up in the style sheet, so that plots follow the page's theme.
const figures = [...document.querySelectorAll(".plot")].map((node) => ({
  node,
  spec: JSON.parse(node.parentElement.querySelector("script").textContent),
}));
const hidden = new Set();
let point = ""; // the chosen entry of the list of points; "" shows all
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

function themed(value, key, style) {
  if (Array.isArray(value)) return value.map((v) => themed(v, key, style));
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, k, style)]));
  if (typeof value === "string" && key.toLowerCase().endsWith("color") && value.startsWith("var:"))
    return style.getPropertyValue("--" + value.slice(4)).trim();
  return value;
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  const narrow = window.innerWidth < 640;
  const tools = window.matchMedia("(hover: hover)").matches ? "hover" : false;
  for (const { node, spec } of figures) {
    const data = themed(spec.data, "", style).map(({ points, ...trace }) => ({
      ...trace,
      visible: !hidden.has(trace.legendgroup) && (!point || !points || points.includes(point)),
    }));
    node.parentElement.classList.toggle("empty", !data.some((trace) => trace.visible));
    const layout = themed(spec.layout, "", style);
    if (narrow) {
      layout.margin = { ...layout.margin, ...spec.narrow.margin };
      layout.font = { ...layout.font, size: 11 };
    }
    Plotly.react(node, data, layout, { ...config, displayModeBar: narrow ? false : tools });
  }
}

for (const box of document.querySelectorAll(".legend input")) {
  box.checked = true; // browsers restore boxes after a reload, but plots show all traces
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(box.value);
    else hidden.add(box.value);
    draw();
  });
}

for (const list of document.querySelectorAll(".legend select")) {
  const first = list.querySelector("option[selected]") || list.options[0];
  list.value = point = first.value;
  list.addEventListener("change", () => {
    point = list.value;
    draw();
  });
}

if (figures.length) {
  draw();
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", draw);
  const small = window.matchMedia("(max-width: 639px)");
  small.addEventListener("change", draw);
  window.matchMedia("print").addEventListener("change", draw); // print in the light theme
}
