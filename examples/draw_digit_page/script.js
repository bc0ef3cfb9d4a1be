"use strict";

const byId = (id) => document.getElementById(id);
const paper = byId("paper");
const pen = paper.getContext("2d");
let strokes = []; // of points [x, y] between 0 and 1
let drawing = false;
let asked = 0; // numbers the questions, so that an answer that comes late is not shown

// Drawing ------------------------------------------------------------------------------------------------------------

function place(event) {
  const box = paper.getBoundingClientRect();
  const within = (value) => Math.min(1, Math.max(0, value));
  return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
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
  if (!strokes.length) redraw(); // a test image may lie there
  paper.setPointerCapture(event.pointerId);
  strokes.push([place(event)]);
  redraw();
});

paper.addEventListener("pointermove", (event) => {
  if (!drawing) return;
  strokes.at(-1).push(...(event.getCoalescedEvents?.() ?? []).map(place), place(event));
  redraw();
  readSoon();
});

for (const kind of ["pointerup", "pointercancel"]) {
  paper.addEventListener(kind, () => {
    if (drawing) read();
    drawing = false;
  });
}

/** An image, from 0 for paper to 1 for ink, on the paper. */
function stamp(rows) {
  const side = paper.width / rows.length;
  pen.fillStyle = getComputedStyle(document.body).color;
  rows.forEach((row, y) => row.forEach((ink, x) => {
    pen.globalAlpha = ink;
    pen.fillRect(x * side, y * side, side, side);
  }));
  pen.globalAlpha = 1;
}

byId("clear").addEventListener("click", () => { strokes = []; redraw(); read(); });
byId("undo").addEventListener("click", () => { strokes.pop(); redraw(); read(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

// Asking -------------------------------------------------------------------------------------------------------------

let waiting = null;
function readSoon() {
  waiting ??= setTimeout(read, 80);
}

async function read() {
  clearTimeout(waiting);
  waiting = null;
  if (!strokes.length) return show(++asked, null);
  await ask("read", { method: "POST", body: JSON.stringify({ strokes }) });
}

async function ask(path, options) {
  const number = ++asked;
  try {
    const response = await fetch(path, options);
    if (!response.ok) throw new Error(await response.text());
    show(number, await response.json());
  } catch (error) {
    byId("about").textContent = error.message;
  }
}

// Showing ------------------------------------------------------------------------------------------------------------

const bars = Array.from({ length: 10 }, (_, digit) => {
  const item = document.createElement("li");
  item.innerHTML = `<span>${digit}</span><span class="bar"><i></i></span><span class="share"></span>`;
  byId("probabilities").append(item);
  return item;
});

function show(number, answer) {
  if (number !== asked) return;
  const shares = answer?.probabilities ?? Array(10).fill(0);
  const best = shares.indexOf(Math.max(...shares));
  byId("guess").textContent = answer ? best : "nothing yet";
  byId("guess").classList.toggle("nothing", !answer);
  bars.forEach((item, digit) => {
    item.querySelector("i").style.width = `${100 * shares[digit]}%`;
    item.querySelector(".share").textContent = answer ? `${(100 * shares[digit]).toFixed(1)} %` : "";
  });
  paint(byId("seen"), answer?.pixels ?? [[0]]);
  byId("layers").replaceChildren(...(answer?.layers ?? []).map(layer));
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

/** Numbers from -1 to 1 as pixels: white for 1, orange for -1, black for 0. */
function paint(canvas, rows) {
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  canvas.classList.add("pixels");
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  rows.flat().forEach((value, i) => {
    const colour = value >= 0 ? [255, 255, 255] : [213, 94, 0];
    image.data.set([...colour.map((c) => c * Math.abs(value)), 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

async function begin() {
  show(asked, null);
  const model = await (await fetch("model")).json();
  byId("about").textContent =
    `with mouse, pen or finger. This network reads ${(100 * model.accuracy).toFixed(2)} % of ${model.data}'s test images.`;
  for (const { index, truth, guess, pixels } of model.mistakes) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(paint(document.createElement("canvas"), pixels), `${truth} → ${guess}`);
    button.setAttribute("aria-label", `a ${truth} that was taken for a ${guess}`);
    button.addEventListener("click", () => {
      strokes = [];
      redraw();
      stamp(pixels);
      ask(`test/${index}`);
      window.scrollTo({ top: 0, behavior: "smooth" });
    });
    byId("mistakes").append(button);
  }
}

begin();
