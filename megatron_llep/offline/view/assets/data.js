// What the data of the page mean: unpacking, and what follows from the loans.
// Cells are numbered layer by layer: cell = layer * columns + column.

/** The object that was packed: base64 of deflated JSON. */
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

/** What is kept of a cell, with names; null where nothing was recorded. */
function readDetail(view, cell, method) {
  const kept = view.details[cell];
  if (!kept) return null;
  const [step, microBatch, group, before, top, uses, lists] = kept;
  const flat = method < uses.length ? lists[uses[method]] : [];
  const perRank = view.experts / view.ranks;
  const loans = [];
  for (let i = 0; i < flat.length; i += 3) {
    const home = Math.floor(flat[i] / perRank);
    loans.push({ expert: flat[i], home, borrower: flat[i + 1], pairs: flat[i + 2] });
  }
  const after = before.slice();
  for (const { home, borrower, pairs } of loans) {
    after[home] -= pairs;
    after[borrower] += pairs;
  }
  const experts = [];
  for (let i = 0; i < top.length; i += 2) {
    const lent = loans.filter((loan) => loan.expert === top[i]);
    experts.push({ expert: top[i], home: Math.floor(top[i] / perRank), pairs: top[i + 1], lent });
  }
  return { step, microBatch, group, before, after, experts, loans };
}

/** Largest / mean load of ranks; 1 without tokens. */
function imbalanceOf(loads) {
  const total = loads.reduce((sum, load) => sum + load, 0);
  return total ? (Math.max(...loads) * loads.length) / total : 1;
}

/** The numbers of the heat map, one for each cell, null where nothing was recorded. */
function cellValues(view, side, measure, method) {
  const { rows } = view.cells;
  const name = measure + (side === "before" ? "Before" : "After");
  if (side === "before" || view.methods[method] === "recorded") {
    return rows.map((count, cell) => (count ? view.cells[name][cell] : null));
  }
  // Of a planner that did not run only the worst micro-batch was planned.
  return rows.map((_, cell) => {
    const detail = readDetail(view, cell, method);
    return detail && imbalanceOf(detail.after);
  });
}

/** What a method is called. */
function methodName(view, method) {
  if (method === "recorded") return `what ran (${view.recorded})`;
  return method === "plain" ? "plain EP" : method;
}

/** "step 7", or "steps 7–9". */
function nameSteps(columns, index) {
  const [first, last] = [columns.first[index], columns.last[index]];
  return first === last ? `step ${first}` : `steps ${first}–${last}`;
}

/** The column that a step is in. */
function findColumn(columns, step) {
  let index = 0;
  while (index + 1 < columns.first.length && columns.first[index + 1] <= step) index++;
  return index;
}
