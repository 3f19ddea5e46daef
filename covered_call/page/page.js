"use strict";
// A click on a column's head sorts by it: up, down, and then as the table came. Keys are made by page.py: numbers come
// before texts, and what is missing last, either way.
const RANK = { number: 0, text: 1, missing: 2 };
const NEXT = { "": "ascending", ascending: "descending", descending: "" };

function keyOf(row, column) {
  const { dataset, textContent } = row.cells[column];
  if (dataset.key === undefined) return { rank: RANK.text, value: textContent };
  if (dataset.key === "") return { rank: RANK.missing, value: 0 };
  return { rank: RANK.number, value: Number(dataset.key) };
}

function sorted(rows, column, sign) {
  const keyed = rows.map((row) => ({ row, key: keyOf(row, column) }));
  const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  keyed.sort((a, b) => a.key.rank - b.key.rank || sign * order(a.key.value, b.key.value));
  return keyed.map(({ row }) => row);
}

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const asItCame = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = NEXT[head.getAttribute("aria-sort") ?? ""];
      for (const other of heads) other.removeAttribute("aria-sort");
      if (way) head.setAttribute("aria-sort", way);
      body.append(...(way ? sorted(asItCame, column, way === "ascending" ? 1 : -1) : asItCame));
    });
  });
}
