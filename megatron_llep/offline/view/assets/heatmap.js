// A heat map on a canvas: rows x columns of numbers, with axes, and one cell marked.

const MARGIN = { left: 44, right: 6, top: 4, bottom: 34 };

/**
 * Draw one.
 *
 * map: rows and columns (their labels), values (row by row, null for none), low and high (the ends
 * of the colour scale), height, rowTitle, columnTitle, marked ({row, column}, each may be null).
 * Returns where its cells are, for `findCell`.
 */
function drawHeatMap(canvas, map) {
  const width = canvas.clientWidth;
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${map.height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(map.height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const [R, C] = [map.rows.length, map.columns.length];
  const place = {
    left: MARGIN.left, top: MARGIN.top, R, C,
    cellWidth: (width - MARGIN.left - MARGIN.right) / C,
    cellHeight: (map.height - MARGIN.top - MARGIN.bottom) / R,
  };
  const x = (column) => place.left + column * place.cellWidth;
  const y = (row) => place.top + row * place.cellHeight;
  const colours = makeColours();
  for (let row = 0; row < R; row++) {
    for (let column = 0; column < C; column++) {
      const value = map.values[row * C + column];
      if (value === null) continue;
      const part = (value - map.low) / (map.high - map.low || 1);
      pen.fillStyle = colours[Math.round(255 * Math.min(1, Math.max(0, part)))];
      // A little more than the cell, so that no paper shines through between two.
      pen.fillRect(x(column), y(row), place.cellWidth + 0.5, place.cellHeight + 0.5);
    }
  }
  drawAxes(pen, map, place, width);
  drawMark(pen, map, x, y, place);
  return place;
}

function drawAxes(pen, map, place, width) {
  const style = getComputedStyle(document.documentElement);
  pen.fillStyle = style.getPropertyValue("--faint");
  pen.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const everyRow = Math.ceil(13 / place.cellHeight);
  for (let row = 0; row < place.R; row += everyRow) {
    pen.fillText(map.rows[row], place.left - 5, place.top + (row + 0.5) * place.cellHeight);
  }
  pen.textAlign = "center";
  const below = place.top + place.R * place.cellHeight;
  const everyColumn = Math.ceil(56 / place.cellWidth);
  for (let column = 0; column < place.C; column += everyColumn) {
    pen.fillText(map.columns[column], place.left + (column + 0.5) * place.cellWidth, below + 10);
  }
  pen.fillText(map.columnTitle, (place.left + width) / 2, below + 25);
  pen.save();
  pen.translate(8, place.top + (place.R * place.cellHeight) / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText(map.rowTitle, 0, 0);
  pen.restore();
}

/** A frame around the marked cell, or around its whole row or column. */
function drawMark(pen, map, x, y, place) {
  const { row, column } = map.marked;
  if (row === null && column === null) return;
  const style = getComputedStyle(document.documentElement);
  const left = column === null ? x(0) : x(column);
  const top = row === null ? y(0) : y(row);
  const width = (column === null ? place.C : 1) * place.cellWidth;
  const height = (row === null ? place.R : 1) * place.cellHeight;
  for (const [colour, grow] of [["--paper", 2.5], ["--mark", 1]]) {
    pen.strokeStyle = style.getPropertyValue(colour);
    pen.lineWidth = 1.5;
    pen.strokeRect(left - grow, top - grow, width + 2 * grow, height + 2 * grow);
  }
}

/** The cell {row, column} at a place of the canvas, null beside all. */
function findCell(place, x, y) {
  const column = Math.floor((x - place.left) / place.cellWidth);
  const row = Math.floor((y - place.top) / place.cellHeight);
  const inside = row >= 0 && row < place.R && column >= 0 && column < place.C;
  return inside ? { row, column } : null;
}
