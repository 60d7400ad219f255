// The selected picture, large: pointer and keys give positions in its pixels.

import { $, make, replace } from './dom.js';
import { choiceOf, matchingChoice, selected } from './store.js';

const stage = $('stage');
const image = $('stage-image');
export const overlay = $('stage-overlay');
export const strokes = $('stage-strokes');
const marks = $('stage-marks');

let handlers = {};
let cursor = null; // (x, y) in pixels, moved by keys
let shown = null;

export const cursorPoint = () => cursor;

export function listen(next) {
  handlers = next;
}

export function show() {
  const picture = selected();
  $('left').classList.toggle('none', picture === null);
  if (!picture) return;
  if (shown !== picture.id) {
    shown = picture.id;
    cursor = null;
    image.src = `/api/pictures/${picture.id}/image`;
    image.alt = picture.name;
    stage.style.setProperty('--ratio', picture.width / picture.height);
    stage.classList.toggle('small', Math.max(picture.width, picture.height) <= 128);
    stage.setAttribute('aria-label', `${picture.name}, ${picture.width} by ${picture.height} pixels`);
    $('stage-name').textContent = picture.name;
    overlay.hidden = true;
    strokes.hidden = true;
    replace(marks);
  }
}

// Pixel centres are whole numbers, as everywhere in diffseg.
function toPixels(event) {
  const picture = selected();
  const box = image.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * picture.width - 0.5;
  const y = ((event.clientY - box.top) / box.height) * picture.height - 0.5;
  return [clamp(x, picture.width), clamp(y, picture.height)];
}

const clamp = (value, side) => Math.min(Math.max(value, -0.5), side - 0.5);

export const scaleOf = () => image.getBoundingClientRect().width / (selected()?.width ?? 1);

export function place(element, [x, y], picture = selected()) {
  element.style.left = `${((x + 0.5) / picture.width) * 100}%`;
  element.style.top = `${((y + 0.5) / picture.height) * 100}%`;
  return element;
}

export function mark(points, kind) {
  for (const old of marks.querySelectorAll(`.${kind}`)) old.remove();
  for (const point of points) marks.append(place(make('i', { class: kind }), point));
}

export function markBrush(point, radius) {
  const picture = selected();
  mark(point ? [point] : [], 'brush');
  const brush = marks.querySelector('.brush');
  if (!brush) return;
  brush.style.width = `${((2 * radius) / picture.width) * 100}%`;
  brush.style.height = `${((2 * radius) / picture.height) * 100}%`;
}

// Cells of the map that matches are read from, for steps of the arrow keys.
export function cellSize() {
  const picture = selected();
  const grid = handlers.grid?.();
  if (grid) return [picture.width / grid[1], picture.height / grid[0]];
  const side = Math.max(picture.width, picture.height) / 32;
  return [side, side];
}

function moveCursor(dx, dy) {
  const picture = selected();
  const [w, h] = cellSize();
  if (!cursor) cursor = [picture.width / 2 - 0.5, picture.height / 2 - 0.5];
  else {
    const column = Math.floor((cursor[0] + 0.5) / w + 1e-6) + dx;
    const row = Math.floor((cursor[1] + 0.5) / h + 1e-6) + dy;
    const last = [Math.round(picture.width / w) - 1, Math.round(picture.height / h) - 1];
    cursor = [
      (Math.min(Math.max(column, 0), last[0]) + 0.5) * w - 0.5,
      (Math.min(Math.max(row, 0), last[1]) + 0.5) * h - 0.5,
    ];
  }
  mark([cursor], 'cursor');
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

stage.addEventListener('keydown', (event) => {
  if (!selected()) return;
  const arrow = ARROWS[event.key];
  if (arrow && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    const from = cursor;
    moveCursor(...arrow);
    handlers.moved?.(cursor, from, event);
  } else if (handlers.key?.(event, cursor)) {
    event.preventDefault();
  }
});

let down = false;

stage.addEventListener('pointerdown', (event) => {
  if (event.button !== 0 || !selected()) return;
  event.preventDefault();
  stage.focus({ preventScroll: true });
  stage.setPointerCapture(event.pointerId);
  down = true;
  cursor = toPixels(event);
  mark([], 'cursor');
  handlers.down?.(cursor, event);
});

stage.addEventListener('pointermove', (event) => {
  if (!selected()) return;
  const events = down && event.getCoalescedEvents ? event.getCoalescedEvents() : [event];
  for (const part of events.length ? events : [event]) {
    if (down) handlers.drag?.(toPixels(part), part);
  }
  if (!down) handlers.hover?.(toPixels(event), event);
  handlers.pointer?.(toPixels(event));
});

function up(event) {
  if (!down) return;
  down = false;
  handlers.up?.(toPixels(event), event);
}

stage.addEventListener('pointerup', up);
stage.addEventListener('pointercancel', (event) => {
  down = false;
  handlers.cancel?.(event);
});
stage.addEventListener('pointerleave', () => {
  if (!down) {
    handlers.pointer?.(null);
    handlers.left?.();
  }
});

export function describeChoice(id = matchingChoice()) {
  const choice = choiceOf(id);
  if (!choice) return '';
  const [first, ...rest] = choice.layers;
  return rest.length ? `${first} and ${rest.length} more` : first;
}
