// One micro-batch of one layer: ranks before and after, experts, loans.

/** Bars of each rank, before and after, and the mean. */
function drawRanks(svg, detail, names) {
  const [left, right, top, bottom] = [62, 6, 18, 30];
  const height = Math.round(150 * stretch());
  const width = svg.clientWidth;
  svg.style.height = `${height}px`;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const { before, after } = detail;
  const high = Math.max(...before, ...after, 1);
  const y = (pairs) => height - bottom - (pairs / high) * (height - top - bottom);
  for (const tick of makeTicks(0, high)) {
    svg.append(
      makeSvg("line", { class: "rule", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      makeSvg("text", { x: left - 5, y: y(tick) + 4, "text-anchor": "end" }, shorten(tick)),
    );
  }
  const slot = (width - left - right) / before.length;
  const every = Math.ceil(22 / slot);
  before.forEach((pairs, rank) => {
    const at = left + rank * slot;
    const bars = [["before", pairs, 0.12], ["after", after[rank], 0.5]];
    for (const [kind, load, offset] of bars) {
      const bar = makeSvg("rect", {
        class: kind, x: at + offset * slot, y: y(load), width: 0.38 * slot,
        height: height - bottom - y(load), "data-rank": rank, "data-pairs": load,
      });
      bar.append(makeSvg("title", {}, `rank ${rank} ${kind}: ${load.toLocaleString("en")} pairs`));
      svg.append(bar);
    }
    if (rank % every === 0) {
      svg.append(makeSvg("text", {
        x: at + slot / 2, y: height - bottom + 13, "text-anchor": "middle",
      }, rank));
    }
  });
  const mean = before.reduce((sum, pairs) => sum + pairs, 0) / before.length;
  svg.append(
    makeSvg("line", { class: "mean", x1: left, x2: width - right, y1: y(mean), y2: y(mean) }),
    makeSvg("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "rank"),
    makeSvg("text", {
      x: 10, y: height / 2, "text-anchor": "middle", transform: `rotate(-90 10 ${height / 2})`,
    }, "pairs computed"),
  );
  let at = left + 4;
  for (const [kind, text] of [["before", `before: ${names.before}`], ["after", `after: ${names.after}`]]) {
    svg.append(
      makeSvg("rect", { class: kind, x: at, y: 2, width: 10, height: 10 }),
      makeSvg("text", { x: at + 14, y: 11 }, text),
    );
    at += 14 + 6.6 * text.length + 14;
  }
  svg.append(
    makeSvg("line", { class: "mean", x1: at, x2: at + 22, y1: 7, y2: 7 }),
    makeSvg("text", { x: at + 26, y: 11 }, "mean"),
  );
}

/** Fill a table below its caption: the first row is its head. */
function fillTable(table, rows) {
  const caption = table.querySelector("caption");
  table.replaceChildren(caption);
  rows.forEach((row, number) => {
    const line = table.insertRow();
    for (const cell of row) {
      const made = document.createElement(number ? "td" : "th");
      made.textContent = typeof cell === "number" ? cell.toLocaleString("en") : cell;
      line.append(made);
    }
  });
}

/** Both tables, of as many lines as there is room for. */
function showTables(detail) {
  const lines = Math.round(7 * stretch());
  const experts = detail.experts.slice(0, lines).map(({ expert, home, pairs, lent }) => [
    `expert ${expert}`, `rank ${home}`, pairs,
    lent.length ? lent.reduce((sum, loan) => sum + loan.pairs, 0) : "–",
  ]);
  fillTable(document.getElementById("experts"), [["", "home", "pairs", "lent"], ...experts]);
  const loans = [...detail.loans].sort((a, b) => b.pairs - a.pairs);
  const rows = loans.slice(0, lines).map(({ expert, home, borrower, pairs }) => [
    `expert ${expert}`, `${home} → ${borrower}`, pairs,
  ]);
  const more = loans.slice(lines);
  if (more.length) {
    rows.push([`${more.length} more`, "", more.reduce((sum, loan) => sum + loan.pairs, 0)]);
  }
  if (!rows.length) rows.push(["nothing is lent", "", ""]);
  fillTable(document.getElementById("loans"), [["", "ranks", "pairs"], ...rows]);
}
