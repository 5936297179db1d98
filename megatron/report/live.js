// Follows a run: takes the new page's tables and figures over, and leaves zoom, open parts and scroll as they are.
"use strict";

async function refresh() {
  const answer = await fetch("figures.json", {cache: "no-store"});
  const {version, figures} = await answer.json();
  if (version === document.body.dataset.version) return;
  const page = new DOMParser().parseFromString(await (await fetch("./", {cache: "no-store"})).text(), "text/html");
  if (page.querySelectorAll("section, .plotly-graph-div").length !==
      document.querySelectorAll("section, .plotly-graph-div").length) {
    location.reload();  // A part is new, such as the first scores.
    return;
  }
  for (const part of document.querySelectorAll("[data-part]")) {
    const found = page.querySelector(`[data-part="${part.dataset.part}"]`);
    if (!found || found.innerHTML === part.innerHTML) continue;
    const open = [...part.querySelectorAll("details")].map((each) => each.open);
    part.innerHTML = found.innerHTML;
    part.querySelectorAll("details").forEach((each, index) => { each.open = open[index] ?? each.open; });
  }
  for (const [name, {data, layout}] of Object.entries(figures)) {
    const plot = document.getElementById(name);
    const chosen = (plot.layout.updatemenus ?? []).map((menu) => menu.active);
    await Plotly.react(plot, data, layout);
    for (const [index, menu] of (layout.updatemenus ?? []).entries()) {
      const {method, args} = menu.buttons[chosen[index]] ?? menu.buttons[0];
      await Plotly[method](plot, ...args);
      await Plotly.relayout(plot, {[`updatemenus[${index}].active`]: chosen[index]});
    }
  }
  document.body.dataset.version = version;
}

async function follow() {
  try {
    await refresh();
    document.body.classList.remove("lost");
  } catch {
    document.body.classList.add("lost");
  }
  setTimeout(follow, Number(document.body.dataset.seconds) * 1000);
}

follow();
