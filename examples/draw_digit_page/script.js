"use strict";

const byId = (id) => document.getElementById(id);
const paper = byId("paper");
const pen = paper.getContext("2d");
let strokes = []; // lists of points [x, y], from 0 to 1
let drawing = false;
let requests = 0; // the number of requests, so that outdated responses are not shown

// Drawing ------------------------------------------------------------------------------------------------------------

function position(event) {
  const box = paper.getBoundingClientRect();
  const clip = (value) => Math.min(1, Math.max(0, value));
  return [clip((event.clientX - box.left) / box.width), clip((event.clientY - box.top) / box.height)];
}

function redraw() {
  const size = paper.width;
  pen.clearRect(0, 0, size, size);
  pen.strokeStyle = getComputedStyle(document.body).color;
  pen.lineWidth = size * 0.055;
  pen.lineCap = pen.lineJoin = "round";
  for (const points of strokes) {
    pen.beginPath();
    pen.moveTo(points[0][0] * size, points[0][1] * size);
    for (const [x, y] of points) pen.lineTo(x * size, y * size);
    pen.stroke();
  }
}

paper.addEventListener("pointerdown", (event) => {
  drawing = true;
  if (!strokes.length) redraw(); // clears a test image
  paper.setPointerCapture(event.pointerId);
  strokes.push([position(event)]);
  redraw();
});

paper.addEventListener("pointermove", (event) => {
  if (!drawing) return;
  strokes.at(-1).push(...(event.getCoalescedEvents?.() ?? []).map(position), position(event));
  redraw();
  classifySoon();
});

for (const kind of ["pointerup", "pointercancel"]) {
  paper.addEventListener(kind, () => {
    if (drawing) classify();
    drawing = false;
  });
}

/** Draws an image, from 0 for paper to 1 for ink, on the canvas. */
function drawImage(rows) {
  const side = paper.width / rows.length;
  pen.fillStyle = getComputedStyle(document.body).color;
  rows.forEach((row, y) => row.forEach((ink, x) => {
    pen.globalAlpha = ink;
    pen.fillRect(x * side, y * side, side, side);
  }));
  pen.globalAlpha = 1;
}

byId("clear").addEventListener("click", () => { strokes = []; redraw(); classify(); });
byId("undo").addEventListener("click", () => { strokes.pop(); redraw(); classify(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

// Requests -----------------------------------------------------------------------------------------------------------

let timer = null;
function classifySoon() {
  timer ??= setTimeout(classify, 80);
}

async function classify() {
  clearTimeout(timer);
  timer = null;
  if (!strokes.length) return show(++requests, null);
  await request("classify", { method: "POST", body: JSON.stringify({ strokes }) });
}

async function request(path, options) {
  const number = ++requests;
  try {
    const response = await fetch(path, options);
    if (!response.ok) throw new Error(await response.text());
    show(number, await response.json());
  } catch (error) {
    byId("about").textContent = error.message;
  }
}

// Results ------------------------------------------------------------------------------------------------------------

const bars = Array.from({ length: 10 }, (_, digit) => {
  const item = document.createElement("li");
  item.innerHTML = `<span>${digit}</span><span class="bar"><i></i></span><span class="percent"></span>`;
  byId("probabilities").append(item);
  return item;
});

function show(number, result) {
  if (number !== requests) return;
  const probabilities = result?.probabilities ?? Array(10).fill(0);
  const best = probabilities.indexOf(Math.max(...probabilities));
  byId("prediction").textContent = result ? best : "nothing yet";
  byId("prediction").classList.toggle("nothing", !result);
  bars.forEach((item, digit) => {
    item.querySelector("i").style.width = `${100 * probabilities[digit]}%`;
    item.querySelector(".percent").textContent = result ? `${(100 * probabilities[digit]).toFixed(1)} %` : "";
  });
  paint(byId("input"), result?.pixels ?? [[0]]);
  byId("layers").replaceChildren(...(result?.layers ?? []).map(layer));
}

function layer({ name, shape, maps }) {
  const box = document.createElement("div");
  box.className = "layer";
  box.innerHTML = `<h3>${name} ${shape.join(" × ")}</h3><div class="maps"></div>`;
  for (const map of maps.slice(0, 64)) {
    const canvas = paint(document.createElement("canvas"), map);
    canvas.classList.toggle("row", maps.length === 1 && map.length === 1);
    box.lastChild.append(canvas);
  }
  return box;
}

/** Paints numbers from -1 to 1 as pixels: white for 1, black for 0, orange for -1. */
function paint(canvas, rows) {
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  canvas.classList.add("pixels");
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  rows.flat().forEach((value, i) => {
    const color = value >= 0 ? [255, 255, 255] : [213, 94, 0];
    image.data.set([...color.map((c) => c * Math.abs(value)), 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

async function begin() {
  show(requests, null);
  const model = await (await fetch("model")).json();
  byId("about").textContent =
    `with mouse, pen or finger. This network reads ${(100 * model.accuracy).toFixed(2)} % of ${model.data}'s test images.`;
  for (const { index, label, prediction, pixels } of model.mistakes) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(paint(document.createElement("canvas"), pixels), `${label} → ${prediction}`);
    button.setAttribute("aria-label", `a ${label} that was classified as a ${prediction}`);
    button.addEventListener("click", () => {
      strokes = [];
      redraw();
      drawImage(pixels);
      request(`test/${index}`);
      window.scrollTo({ top: 0, behavior: "smooth" });
    });
    byId("mistakes").append(button);
  }
}

begin();
