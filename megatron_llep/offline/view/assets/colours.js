// One colour scale for both heat maps. Its lightness rises or falls all along, so that it reads
// alike for every kind of colour vision; it starts near the colour of the paper.

const SCALES = {
  light: ["#eef0ee", "#f6d48b", "#ea9440", "#c2502a", "#7d2029", "#3a0d1f"],
  dark: ["#222a33", "#553047", "#9c3d45", "#d96c3a", "#f3ad48", "#fdf0b0"],
};
// Okabe and Ito's colours, which are told apart by every kind of colour vision, and dashes.
const LINES = {
  plain: ["#d55e00", ""],
  recorded: ["#b08400", "1 3"],
  tolerant: ["#0072b2", ""],
  exact: ["#56b4e9", "7 3"],
  lla: ["#009e73", "2 2"],
  auto: ["#cc79a7", "9 3 2 3"],
};

const darkMode = window.matchMedia("(prefers-color-scheme: dark)");

function scaleStops() {
  return SCALES[darkMode.matches ? "dark" : "light"];
}

/** The scale in 256 steps, of which the first stands for 0 and the last for 1. */
function makeColours() {
  const stops = scaleStops().map((stop) => [1, 3, 5].map((i) => parseInt(stop.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, step) => {
    const at = (step / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const mixed = stops[low].map((part, i) => part + (stops[low + 1][i] - part) * (at - low));
    return `rgb(${mixed.map(Math.round)})`;
  });
}

/** A legend: the scale with what its ends mean. */
function showScale(element, low, high, what) {
  const ramp = document.createElement("span");
  ramp.className = "ramp";
  ramp.style.background = `linear-gradient(to right, ${scaleStops()})`;
  element.replaceChildren(low, ramp, `${high} ${what}`);
}
