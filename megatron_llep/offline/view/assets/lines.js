// Lines over steps, as SVG.

function makeSvg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Round numbers from `low` to `high`, about so many. */
function makeTicks(low, high, about = 4) {
  const rough = (high - low) / about || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high * 1.0001; n++) ticks.push(n * step);
  return ticks;
}

/** How much higher pictures are than in a low window. */
function stretch() {
  return Math.min(1.5, Math.max(1, window.innerHeight / 800));
}

/** A number with as many digits as help. */
function shorten(value) {
  return value >= 100 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
}

/**
 * Draw them.
 *
 * chart: steps (numbers), lines ([{values, colour, dash}]), height, title (of the y axis), range
 * ([first, last] step), marked (a step or null), low and high (of the y axis).
 */
function drawLines(svg, chart) {
  const [left, right, top, bottom] = [44, 6, 6, chart.axis === false ? 6 : 32];
  const width = svg.clientWidth;
  svg.style.height = `${chart.height}px`;
  svg.setAttribute("viewBox", `0 0 ${width} ${chart.height}`);
  svg.replaceChildren();
  const [first, last] = chart.range;
  const x = (step) => left + ((step - first + 0.5) / (last - first + 1)) * (width - left - right);
  const span = chart.high - chart.low || 1;
  const y = (v) => chart.height - bottom - ((v - chart.low) / span) * (chart.height - top - bottom);
  for (const tick of makeTicks(chart.low, chart.high, Math.max(2, chart.height / 40))) {
    svg.append(
      makeSvg("line", { class: "rule", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      makeSvg("text", { x: left - 5, y: y(tick) + 4, "text-anchor": "end" }, shorten(tick)),
    );
  }
  const middle = (chart.height - bottom + top) / 2;
  svg.append(makeSvg("text", {
    x: 10, y: middle, "text-anchor": "middle", transform: `rotate(-90 10 ${middle})`,
  }, chart.title));
  if (chart.axis !== false) {
    for (const tick of makeTicks(first, last, width / 90).filter(Number.isInteger)) {
      svg.append(makeSvg("text", {
        x: x(tick), y: chart.height - bottom + 14, "text-anchor": "middle",
      }, tick));
    }
    svg.append(makeSvg("text", {
      x: (left + width) / 2, y: chart.height - 4, "text-anchor": "middle",
    }, "step"));
  }
  if (chart.marked !== null) {
    const at = x(chart.marked);
    svg.append(makeSvg("line", {
      class: "mark", x1: at, x2: at, y1: top, y2: chart.height - bottom,
    }));
  }
  for (const { values, colour, dash, name } of chart.lines) {
    const points = values.map((v, i) => `${x(chart.steps[i]).toFixed(1)},${y(v).toFixed(1)}`);
    if (points.length === 1) points.push(`${width - right},${points[0].split(",")[1]}`);
    svg.append(makeSvg("polyline", {
      points: points.join(" "), fill: "none", stroke: colour, "stroke-width": 1.6,
      "stroke-dasharray": dash, "data-line": name,
    }));
  }
}

/** A legend of lines: [{label, colour, dash}]. */
function showLines(element, lines) {
  element.replaceChildren(...lines.map(({ label, colour, dash }) => {
    const item = document.createElement("span");
    const sample = makeSvg("svg", { viewBox: "0 0 28 10", "aria-hidden": "true" });
    sample.append(makeSvg("line", {
      x1: 0, x2: 28, y1: 5, y2: 5, stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dash,
    }));
    item.append(sample, label);
    return item;
  }));
}
