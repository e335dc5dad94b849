"use strict";
/* Draws what the data say. A figure is {traces, layout}, or {by: {name: figure}} to follow the menu "cell"; a trace with
   "group" is shown while the chip of that group is pressed. Colours of text and lines come from the style sheet. */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const off = new Set();
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const cell = () => document.getElementById("cell")?.value;
  const axis = () => document.getElementById("axis")?.value;
  const narrow = () => window.innerWidth < 640;

  const picked = (figure) => {
    if (!figure) return null;
    if (figure.by) return picked(figure.by[cell()]);
    if (figure.axes) return picked(figure.axes[axis()]);
    return figure;
  };

  const themed = (layout) => {
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: {color: css("--ink"), size: narrow() ? 10 : 12, family: "system-ui, sans-serif"},
      margin: {l: narrow() ? 48 : 60, r: 12, t: 16, b: narrow() ? 48 : 50}, showlegend: false,
      hoverlabel: {align: "left", bgcolor: css("--card"), bordercolor: css("--line"), font: {color: css("--ink")}},
    };
    const found = {...base, ...structuredClone(layout)};
    for (const key of Object.keys(found)) {
      if (/^[xy]axis/.test(key)) {
        found[key] = {automargin: true, gridcolor: css("--line"), zerolinecolor: css("--line"), ...found[key]};
      }
    }
    return found;
  };

  const draw = (id) => {
    const box = document.getElementById(id), figure = picked(data.figures[id]);
    box.hidden = !figure;
    if (!figure) return;
    const traces = structuredClone(figure.traces).filter((t) => !off.has(t.group));
    for (const t of traces) {
      if (t.mode && t.mode.includes("text")) t.textfont = {color: css("--ink"), size: narrow() ? 9 : 11};
      if (narrow() && t.mode === "markers+text") t.mode = "markers";
    }
    Plotly.react(box, traces, themed(figure.layout), {displayModeBar: false, responsive: true});
  };

  const element = (kind, text, name) => {
    const e = document.createElement(kind);
    e.textContent = text;
    if (name) e.className = name;
    return e;
  };

  const tokens = () => {
    const box = document.getElementById("tokens");
    if (!box) return;
    box.replaceChildren(...(data.tokens[cell()] || []).map((t) => {
      const e = element("div", "… " + t.before, "token");
      e.append(element("mark", t.token), t.after + " …",
        element("small", `KL ${t.kl.toFixed(3)} nats; probability of this token ${t.p.toPrecision(2)} → ${t.q.toPrecision(2)}`));
      return e;
    }));
  };

  const recipe = () => {
    const box = document.getElementById("recipe");
    if (box) box.textContent = data.recipes[cell()] || "";
  };

  const all = () => { for (const id of Object.keys(data.figures)) draw(id); tokens(); recipe(); };

  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const group = chip.dataset.group, shown = chip.getAttribute("aria-pressed") === "false";
      chip.setAttribute("aria-pressed", String(shown));
      if (shown) off.delete(group); else off.add(group);
      for (const row of document.querySelectorAll("tr[data-group]")) row.hidden = off.has(row.dataset.group);
      all();
    });
  }
  for (const id of ["cell", "axis"]) document.getElementById(id)?.addEventListener("change", all);
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    all();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  let was = narrow();
  window.addEventListener("resize", () => { if (narrow() !== was) { was = narrow(); all(); } });
  all();
  document.documentElement.dataset.drawn = "yes";
})();
