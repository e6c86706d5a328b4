"use strict";
// Galleries: choose, order, show more. Without this script the first cards stand there as they are.
for (const box of document.querySelectorAll("[data-gallery]")) {
  const [form, list, told, more] = ["form", "ol", "output", ".more"].map((s) => box.querySelector(s));
  const cards = [...list.children], step = Number(list.dataset.step);
  let shown = step;
  const draw = () => {
    const { order, ...wanted } = Object.fromEntries(new FormData(form));
    const [key, sign] = order.split(" ");
    const fits = (card) => Object.entries(wanted).every(([k, v]) => !v || card.dataset[k] === v);
    const kept = cards.filter(fits);
    kept.sort((a, b) => sign * (a.dataset[key] - b.dataset[key]) || a.dataset.index - b.dataset.index);
    for (const card of cards) card.hidden = true;
    for (const card of kept.slice(0, shown)) card.hidden = false;
    list.prepend(...kept);
    told.textContent = `${Math.min(shown, kept.length)} of ${kept.length} shown`;
    more.hidden = shown >= kept.length;
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { shown = step; draw(); });
  more.addEventListener("click", () => {
    const first = shown;
    shown += step;
    draw();
    list.children[first].focus();
  });
  form.hidden = false;
  draw();
}

// Tables: a heading orders the rows by its column, numbers from the largest, missing ones last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if ("unordered" in head.dataset) return;
    const button = document.createElement("button");
    button.type = "button";
    const arrow = document.createElement("span"), [name, ...rest] = head.childNodes;
    arrow.className = "arrow";
    button.append(name, arrow, ...rest);
    head.append(button);
    const value = (row) => row.cells[column].textContent.trim();
    button.addEventListener("click", () => {
      const rows = [...body.rows], numbers = rows[0].cells[column].tagName === "TD";
      const way = { ascending: "descending", descending: "ascending" }[head.ariaSort] ?? (numbers ? "descending" : "ascending");
      const sign = way === "ascending" ? 1 : -1, last = sign * Infinity;
      const number = (row) => { const x = parseFloat(value(row).replaceAll(",", "")); return Number.isNaN(x) ? last : x; };
      rows.sort((a, b) => (numbers ? number(a) - number(b) || 0 : value(a).localeCompare(value(b), undefined, { numeric: true })) * sign);
      for (const other of heads) other.removeAttribute("aria-sort");
      head.ariaSort = way;
      body.append(...rows);
    });
  });
}
