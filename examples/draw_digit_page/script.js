"use strict";

const byId = (id) => document.getElementById(id);
const paper = byId("paper");
const pen = paper.getContext("2d");
let strokes = []; // lists of points [x, y], from 0 to 1
let stroke = null; // the one that is being drawn
let testImage = null; // the pixels of the test image that is shown instead of a drawing
let generation = 0; // the number of the drawing, so that the response to a cleared one is not shown
let latest = null; // the result that is shown

// Drawing ------------------------------------------------------------------------------------------------------------

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
const clip = (value) => Math.min(1, Math.max(0, Math.round(1e4 * value) / 1e4));

function position(event) {
  const box = paper.getBoundingClientRect();
  return [clip((event.clientX - box.left) / box.width), clip((event.clientY - box.top) / box.height)];
}

function redraw() {
  const size = paper.width;
  pen.clearRect(0, 0, size, size);
  pen.strokeStyle = pen.fillStyle = color(byId("saliency").checked ? "--faint" : "--ink");
  pen.lineWidth = size * 0.055;
  pen.lineCap = pen.lineJoin = "round";
  for (const points of strokes) {
    const [first, ...others] = points.map(([x, y]) => [x * size, y * size]);
    pen.beginPath();
    pen.arc(...first, pen.lineWidth / 2, 0, 2 * Math.PI); // a dot, because a line without a length is not drawn
    pen.fill();
    pen.beginPath();
    pen.moveTo(...first);
    for (const point of others) pen.lineTo(...point);
    pen.stroke();
  }
  if (testImage) fillCells(pen, testImage, [0, 0, size], () => pen.strokeStyle);
  byId("hint").hidden = Boolean(strokes.length || testImage);
}

/** Fills a square [left, top, side] with rows of cells: the larger the absolute value of a cell, the more opaque. */
function fillCells(context, rows, [left, top, side], colorOf) {
  const height = side / rows.length;
  rows.forEach((row, y) => row.forEach((value, x) => {
    context.fillStyle = colorOf(value);
    context.globalAlpha = Math.abs(value);
    context.fillRect(left + (x * side) / row.length, top + y * height, side / row.length, height);
  }));
  context.globalAlpha = 1;
}

/** Shows another drawing, or a test image, from 0 for paper to 1 for ink. */
function replaceDrawing(points, image = null) {
  strokes = points;
  testImage = image;
  generation++;
  lift();
  redraw();
}

function begin(point) {
  if (testImage) replaceDrawing([]);
  stroke = [point];
  strokes.push(stroke);
  redraw();
}

function extend(...points) {
  stroke.push(...points);
  redraw();
  classifySoon();
}

function lift() {
  stroke = null;
  pencil.classList.remove("down");
}

function undo() {
  replaceDrawing(strokes.slice(0, -1));
  classify();
}

function clear() {
  replaceDrawing([]);
  classify();
}

let pointer = null; // the id of the pointer that draws; other fingers are ignored
paper.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button !== 0) return;
  pointer = event.pointerId;
  paper.setPointerCapture(pointer);
  leaveKeyboard();
  begin(position(event));
});

paper.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer || !stroke) return;
  extend(...(event.getCoalescedEvents?.() ?? []).map(position), position(event));
});

for (const kind of ["pointerup", "pointercancel"]) {
  paper.addEventListener(kind, (event) => {
    if (event.pointerId !== pointer) return;
    pointer = null;
    lift();
    classify();
  });
}

byId("undo").addEventListener("click", undo);
byId("clear").addEventListener("click", clear);

// The keyboard -------------------------------------------------------------------------------------------------------

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEP = 0.025;
const pencil = byId("pencil");
const pressed = new Set(); // arrow keys; two of them move the pen diagonally
let place = [0.5, 0.3];

function showPencil() {
  pencil.hidden = false;
  pencil.style.left = `${100 * place[0]}%`;
  pencil.style.top = `${100 * place[1]}%`;
}

function leaveKeyboard() {
  pencil.hidden = true;
  pressed.clear();
  lift();
}

function say(text) {
  byId("pen-state").textContent = text;
}

paper.addEventListener("focus", () => { if (paper.matches(":focus-visible")) showPencil(); });
paper.addEventListener("blur", leaveKeyboard);
paper.addEventListener("keyup", (event) => pressed.delete(event.key));
paper.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || pointer !== null) return;
  if (event.key in ARROWS) {
    pressed.add(event.key);
    for (const key of pressed) place = place.map((value, i) => clip(value + STEP * ARROWS[key][i]));
    if (stroke) extend(place);
  } else if (event.key === " " || event.key === "Enter") {
    if (event.repeat) return event.preventDefault();
    if (stroke) {
      lift();
      say("pen up");
    } else {
      begin(place);
      pencil.classList.add("down");
      say("pen down");
    }
    classify();
  } else if (event.key === "Backspace" || event.key === "Delete") {
    undo();
    say("last line removed");
  } else {
    return;
  }
  event.preventDefault();
  showPencil();
});

// Requests -----------------------------------------------------------------------------------------------------------

let timer = null;
let waiting = null; // the next request: one runs at a time, and of those that wait only the last is sent
let running = false;

function classifySoon() {
  timer ??= setTimeout(classify, 80);
}

function classify() {
  clearTimeout(timer);
  timer = null;
  if (testImage) return;
  if (strokes.length) return request("classify", { method: "POST", body: JSON.stringify({ strokes }) });
  waiting = null;
  show(null);
}

async function request(path, options) {
  waiting = [generation, path + (byId("saliency").checked ? "?saliency" : ""), options];
  if (running) return;
  running = true;
  while (waiting) {
    const [number, url, how] = waiting;
    waiting = null;
    const result = await answer(url, how);
    if (result && number === generation) show(result);
  }
  running = false;
}

/** What the server answers, or null after showing what went wrong. */
async function answer(url, how) {
  let problem = "The program does not answer. Start draw_digit.py again, then open its new address.";
  try {
    const response = await fetch(url, how);
    problem = "The program has sent no valid answer. Look for errors where draw_digit.py runs.";
    if (response.status < 500 && !response.ok) problem = await response.text();
    const result = response.ok ? await response.json() : null;
    if (result) problem = "";
    return result;
  } catch {
    return null;
  } finally {
    if (byId("error").textContent !== problem) byId("error").textContent = problem;
    byId("error").hidden = !problem;
  }
}

// Results ------------------------------------------------------------------------------------------------------------

const bars = Array.from({ length: 10 }, (_, digit) => {
  const item = document.createElement("li");
  item.innerHTML = `<span>${digit}</span><span class="bar"><i></i></span><span class="percent"></span>`;
  byId("probabilities").append(item);
  return item;
});
const noLayers = byId("layers").firstChild;

function show(result) {
  latest = result;
  const probabilities = result?.probabilities ?? Array(10).fill(0);
  const best = probabilities.indexOf(Math.max(...probabilities));
  byId("prediction").textContent = result ? best : "nothing yet";
  byId("prediction").classList.toggle("nothing", !result);
  bars.forEach((item, digit) => {
    item.classList.toggle("best", Boolean(result) && digit === best);
    item.querySelector("i").style.width = `${100 * probabilities[digit]}%`;
    item.querySelector(".percent").textContent = result ? `${(100 * probabilities[digit]).toFixed(1)}\u00a0%` : "";
  });
  paint(byId("input"), result?.pixels ?? [[0]]);
  if (result) byId("input-size").textContent = `${result.pixels[0].length} × ${result.pixels.length}`;
  byId("layers").replaceChildren(...(result?.layers.map(layer) ?? [noLayers]));
  showSaliency();
}

/** Paints the saliency, from -1 to 1, over the part of the drawing that the network gets. */
function showSaliency() {
  const overlay = byId("overlay");
  const context = overlay.getContext("2d");
  context.clearRect(0, 0, overlay.width, overlay.height);
  if (!latest?.saliency || !byId("saliency").checked) return;
  const square = latest.frame.map((value) => value * overlay.width);
  fillCells(context, latest.saliency, square, (value) => color(value > 0 ? "--accent" : "--minus"));
}

byId("saliency").addEventListener("change", (event) => {
  byId("saliency-legend").hidden = !event.target.checked;
  redraw();
  showSaliency();
  if (testImage) request(`test/${testImage.index}`);
  else classify();
});

const NOTES = {
  Conv2D: "Looks for small patterns, such as lines and corners, everywhere in the image. Each square shows where one " +
    "pattern was found.",
  MaxPool2D: "Keeps only the largest number of each small block: the image gets smaller, and what was found stays.",
  AvgPool2D: "Replaces each small block by its average: the image gets smaller.",
  GlobalAveragePool2D: "Replaces each square by the average of its numbers.",
  BatchNorm: "Brings the numbers of all squares to a similar size, which makes learning easier.",
  ReLU: "Keeps the numbers above zero and replaces those below zero by zero.",
  Residual: "Adds what its inner layers compute to what it was given.",
  Dense: "Weighs all numbers of the layer before it and adds them up, once for each neuron.",
};
const SCORES = "The last layer gives the scores of the digits 0 to 9. The largest wins; all ten become the probabilities.";

/** A layer. The first one of each kind is explained. */
function layer({ name, shape, maps }, index, all) {
  const isLast = index === all.length - 1 && maps[0].length === 1 && maps[0][0].length === 10;
  const isFirst = all.findIndex((other) => other.name === name) === index;
  const note = [isFirst && NOTES[name], isLast && SCORES].filter(Boolean).join(" ");
  const box = document.createElement("div");
  box.className = "layer";
  box.innerHTML = `<h3>${name} <span>${shape.join(" × ")}</span></h3><p class="note"></p><div class="maps"></div>`;
  box.children[1].textContent = note;
  box.lastChild.setAttribute("role", "img");
  box.lastChild.setAttribute("aria-label", `the outputs of ${name} as colors`);
  for (const map of maps) {
    const canvas = paint(document.createElement("canvas"), map);
    canvas.classList.toggle("row", maps.length === 1 && map.length === 1);
    box.lastChild.append(canvas);
  }
  if (isLast) {
    const digits = document.createElement("div");
    digits.className = "digits";
    digits.innerHTML = maps[0][0].map((_, digit) => `<span>${digit}</span>`).join("");
    box.append(digits);
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
    const rgb = value >= 0 ? [255, 255, 255] : [213, 94, 0];
    image.data.set([...rgb.map((c) => c * Math.abs(value)), 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

async function showModel() {
  if (location.search) history.replaceState(null, "", location.pathname); // the token no longer works
  show(null);
  const model = await answer("model");
  if (!model) return;
  const accuracy = `${(100 * model.accuracy).toFixed(2)}\u00a0%`;
  byId("about").textContent =
    `This network was trained on images of ${model.data}. It reads ${accuracy} of the test images right.`;
  for (const { index, label, prediction, pixels } of model.mistakes) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(paint(document.createElement("canvas"), pixels), `${label} → ${prediction}`);
    button.setAttribute("aria-label", `${label} → ${prediction}: a ${label} that was read as a ${prediction}`);
    button.addEventListener("click", () => {
      replaceDrawing([], Object.assign(pixels, { index }));
      request(`test/${index}`);
      window.scrollTo({ top: 0 });
    });
    byId("mistakes").append(button);
  }
  byId("mistakes").parentElement.hidden = !model.mistakes.length;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { redraw(); showSaliency(); });
redraw();
showModel();
