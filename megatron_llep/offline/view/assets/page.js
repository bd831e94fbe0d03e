// What is selected, and drawing all of it anew when that changes.

const find = (id) => document.getElementById(id);

/** The parts that stay the same until the window or the colours change, and what is selected. */
class Page {
  constructor(view) {
    this.view = view;
    this.C = view.columns.first.length;
    this.L = view.layers.length;
    this.state = { cell: 0, method: 0, side: "before", measure: "worst" };
    const { worstBefore } = view.cells;
    this.worst = worstBefore.indexOf(Math.max(...worstBefore));
    this.high = Math.max(...worstBefore, ...(view.cells.worstAfter ?? []), 1.1);
    this.state.cell = this.worst;
    this.fillControls();
    this.listen();
    this.draw();
  }

  get layer() { return Math.floor(this.state.cell / this.C); }
  get column() { return this.state.cell % this.C; }

  fillControls() {
    const { view } = this;
    find("method").replaceChildren(...view.methods.map((method, number) => {
      const option = document.createElement("option");
      option.value = number;
      option.textContent = methodName(view, method);
      return option;
    }));
    find("facts").replaceChildren(...view.facts.flatMap(([name, value]) => {
      const [term, text] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      text.textContent = value;
      return [term, text];
    }));
  }

  listen() {
    for (const name of ["side", "measure", "method"]) {
      find(name).addEventListener("change", (event) => {
        this.state[name] = name === "method" ? Number(event.target.value) : event.target.value;
        // Changing how something is lent is to be seen.
        if (name === "method") this.state.side = find("side").value = "after";
        this.draw();
      });
    }
    find("go-worst").addEventListener("click", () => this.select(this.worst));
    const canvas = find("imbalance");
    const cellAt = (event) => findCell(this.place, event.offsetX, event.offsetY);
    canvas.addEventListener("click", (event) => {
      const cell = cellAt(event);
      if (cell) this.select(cell.row * this.C + cell.column);
    });
    canvas.addEventListener("mousemove", (event) => {
      const cell = cellAt(event);
      this.say(cell ? cell.row * this.C + cell.column : this.state.cell);
    });
    canvas.addEventListener("mouseleave", () => this.say(this.state.cell));
    canvas.addEventListener("keydown", (event) => this.move(event));
    find("drift").addEventListener("click", (event) => {
      const cell = findCell(this.driftPlace, event.offsetX, event.offsetY);
      if (!cell) return;
      const step = this.view.drift.columns.first[cell.column];
      this.select(this.layer * this.C + findColumn(this.view.columns, step));
    });
    let waiting = 0;
    window.addEventListener("resize", () => {
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(() => this.draw());
    });
    darkMode.addEventListener("change", () => this.draw());
  }

  move(event) {
    const { C, L, layer, column } = this;
    const far = Math.max(1, Math.round(C / 10));
    const to = {
      ArrowLeft: [layer, column - 1], ArrowRight: [layer, column + 1],
      ArrowUp: [layer - 1, column], ArrowDown: [layer + 1, column],
      PageUp: [layer, column - far], PageDown: [layer, column + far],
      Home: [layer, 0], End: [layer, C - 1],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const clamp = (value, most) => Math.min(Math.max(value, 0), most);
    this.select(clamp(to[0], L - 1) * C + clamp(to[1], C - 1));
  }

  select(cell) {
    this.state.cell = cell;
    this.draw();
  }

  draw() {
    this.drawImbalance();
    this.drawDetail();
    this.drawTimes();
    this.drawDrift();
    this.say(this.state.cell);
  }

  drawImbalance() {
    const { view, state } = this;
    const ran = view.methods[state.method] === "recorded";
    find("measure").querySelector("[value=mean]").disabled = state.side === "after" && !ran;
    if (state.side === "after" && !ran) state.measure = find("measure").value = "worst";
    const key = [state.side, state.measure, state.method].join();
    if (this.shown !== key) {
      this.values = cellValues(view, state.side, state.measure, state.method);
      this.shown = key;
    }
    this.place = drawHeatMap(find("imbalance"), {
      rows: view.layers, columns: view.columns.first, values: this.values, low: 1, high: this.high,
      height: Math.round(262 * stretch()), rowTitle: "layer", columnTitle: "step",
      marked: { row: this.layer, column: this.column },
    });
    showScale(find("imbalance-legend"), "1 (balanced)", this.high.toFixed(2),
      "largest load of a rank / mean load");
  }

  /** A cell in words. */
  say(cell) {
    const { view } = this;
    const where = `Layer ${view.layers[Math.floor(cell / this.C)]}, ` +
      `${nameSteps(view.columns, cell % this.C)}: `;
    const numbers = (name) => `mean ${view.cells[`mean${name}`][cell].toFixed(2)}, ` +
      `worst ${view.cells[`worst${name}`][cell].toFixed(2)}`;
    let text = "nothing was recorded";
    if (view.cells.rows[cell]) {
      text = `plain EP ${numbers("Before")}`;
      if (view.recorded) text += `; as it ran ${numbers("After")}`;
    }
    find("readout").textContent = where + text;
  }

  drawDetail() {
    const { view, state } = this;
    const detail = readDetail(view, state.cell, state.method);
    const layer = view.layers[this.layer];
    find("cell-title").textContent = `Layer ${layer}, ${nameSteps(view.columns, this.column)}`;
    if (!detail) {
      find("cell-note").textContent = "Nothing was recorded here.";
      find("ranks").replaceChildren();
      showTables({ experts: [], loans: [] });
      return;
    }
    const [before, after] = [imbalanceOf(detail.before), imbalanceOf(detail.after)];
    const rows = view.cells.rows[state.cell];
    find("cell-note").textContent =
      `Step ${detail.step}, micro-batch ${detail.microBatch}` +
      (detail.group ? `, group ${detail.group}` : "") +
      (rows > 1 ? ` (worst of ${rows.toLocaleString("en")})` : "") +
      `: imbalance ${before.toFixed(2)}, after ${detail.loans.length} ` +
      `${detail.loans.length === 1 ? "loan" : "loans"} ${after.toFixed(2)}.`;
    const method = view.methods[state.method];
    drawRanks(find("ranks"), detail, {
      before: "plain EP", after: method ? methodName(view, method) : "plain EP",
    });
    showTables(detail);
  }

  drawTimes() {
    const { view } = this;
    if (!view.times) {
      find("times-note").textContent = "Not predicted: the last lines of this page say why.";
      return;
    }
    const { steps, lines, whole } = view.times;
    const most = Math.max(...Object.values(lines).flat());
    const [unit, scale] = most >= 2e6 ? ["s", 1e6] : most >= 2e3 ? ["ms", 1e3] : ["µs", 1];
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    const entries = Object.entries(lines).map(([name, values]) => ({
      name, colour: LINES[name][0], dash: LINES[name][1],
      label: `${methodName(view, name)} ${shorten(mean(values) / scale)} ${unit}`,
      values: values.map((value) => value / scale),
    }));
    find("times-note").textContent =
      `Of a step, ${whole ? "the whole model" : "MoE layers only"}; the legend has the means.`;
    const { first, last } = view.columns;
    drawLines(find("times"), {
      steps, lines: entries, height: Math.round(150 * stretch()), title: unit, low: 0, high: most / scale,
      range: [first[0], last[last.length - 1]], marked: first[this.column],
    });
    showLines(find("times-legend"), entries);
  }

  drawDrift() {
    const { view, layer } = this;
    const { columns, experts, load, change } = view.drift;
    const D = columns.first.length;
    const at = findColumn(columns, view.columns.first[this.column]);
    const values = load[layer].map((hundredths) => hundredths / 100);
    const high = Math.max(...values, 1);
    this.driftPlace = drawHeatMap(find("drift"), {
      rows: experts[layer], columns: columns.first, values, low: 0, high,
      height: Math.round(140 * stretch()),
      rowTitle: "expert", columnTitle: "step", marked: { row: null, column: at },
    });
    showScale(find("drift-legend"), "0", high.toFixed(1), "x an average expert's load");
    find("drift-note").textContent =
      `Layer ${view.layers[layer]}: ${this.nameHottest(values, experts[layer], columns, at)}`;
    const moved = change[layer].map((thousandths) => thousandths / 10);
    find("change").replaceChildren();
    find("change").style.height = "0";
    if (D < 2) return;
    drawLines(find("change"), {
      steps: moved.map((_, index) => index + 1), height: 46, title: "%", axis: false,
      lines: [{ values: moved, colour: LINES.tolerant[0], dash: "", name: "change" }],
      range: [0, D - 1], marked: at, low: 0, high: Math.max(...moved, 1),
    });
  }

  /** Which expert is the hottest in column `at`, and which one was for longest. */
  nameHottest(values, experts, columns, at) {
    const D = columns.first.length;
    const spells = []; // [{expert, from, to, columns}], one after another
    for (let column = 0; column < D; column++) {
      let hottest = 0;
      for (let row = 1; row < experts.length; row++) {
        if (values[row * D + column] > values[hottest * D + column]) hottest = row;
      }
      const last = spells[spells.length - 1];
      if (last && last.expert === experts[hottest]) {
        last.to = columns.last[column];
        last.columns++;
        continue;
      }
      const [from, to] = [columns.first[column], columns.last[column]];
      spells.push({ expert: experts[hottest], from, to, columns: 1 });
    }
    const here = spells.find(({ to }) => to >= columns.last[at]);
    const longest = spells.reduce((a, b) => (b.columns > a.columns ? b : a));
    const name = ({ from, to }) => (from === to ? `step ${from}` : `steps ${from}–${to}`);
    if (spells.length === 1) return `expert ${here.expert} is the hottest throughout.`;
    const other = longest === here
      ? `, the longest of ${spells.length} spells`
      : `; for longest it is ${longest.expert} (${name(longest)})`;
    return `expert ${here.expert} is the hottest here (${name(here)})${other}.`;
  }
}

unpack(find("data").textContent).then((view) => {
  window.llepPage = new Page(view);
  document.body.dataset.ready = "yes";
});
