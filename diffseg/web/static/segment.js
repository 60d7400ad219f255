// Segment: name classes, paint strokes, see all pictures segmented.

import { get, getBinary, Latest, post, postBinary, put, remove } from './api.js';
import { paintHeat, paintLabels, parseColour } from './colours.js';
import { $, field, isTyping, make, replace, say } from './dom.js';
import * as gallery from './gallery.js';
import * as stage from './stage.js';
import { byId, isReady, select, selected, step, store } from './store.js';

const BATCH = 8; // masks in a request
const WIDEST = 0.15; // of the longer side: radius of the brush

let active = false;
let classes = [];
let strokes = []; // {id, picture, label, radius, points}
let imported = new Set();
let labels = new Map(); // id -> {grid, bytes}, imported ones
let palette = ['#767f89'];
let revision = -1;
let current = 0; // class
let erasing = false;
let size = 0.02; // radius of the brush as a share of the longer side
let painting = null; // the stroke under the pointer
let undone = []; // strokes to paint again
let show = 'mask';
let opacity = 0.55;
let fitted = { scores: {}, next: null };
let masks = new Map(); // id -> {fit, grid, mask, uncertainty}
let fit = 0;
let saving = Promise.resolve();

const hint = (text) => { $('hint').textContent = text; };
const of = (id) => strokes.filter((stroke) => stroke.picture === id);
const radiusOf = (picture) => Math.max(0.5, size * Math.max(picture.width, picture.height));

// ---- the server

async function load() {
  const content = await get('/api/annotations');
  if (content.revision === revision) return;
  const unsaved = strokes.filter((stroke) => stroke.id === undefined); // they wait for their turn
  ({ classes, palette, revision } = content);
  strokes = [...content.strokes, ...unsaved];
  imported = new Set(content.imported);
  labels = new Map();
  current = Math.min(current, Math.max(classes.length - 1, 0));
  drawClasses();
  await drawStrokes();
  refit.call();
}

const refit = new Latest(async () => {
  await saving;
  try {
    fitted = await post('/api/fit');
    fit += 1;
    if (active) {
      drawScores();
      guide();
      await fetchMasks();
    }
  } catch (error) {
    say(error.message);
  }
});

const fetchMasks = () => masksNow.call();
const masksNow = new Latest(async () => {
  if ((fitted.present ?? []).length < 2) {
    masks.clear();
    drawMasks();
    return;
  }
  for (;;) {
    const wanted = [store.selected, ...gallery.visibleIds()].filter(
      (id, i, all) => id && all.indexOf(id) === i && masks.get(id)?.fit !== fit && isReady(store.default, id),
    );
    if (!active || !wanted.length) return;
    const now = fit;
    const batch = wanted.slice(0, wanted[0] === store.selected ? 1 : BATCH);
    let answer;
    try {
      answer = await postBinary('/api/masks', { pictures: batch });
    } catch (error) {
      say(error.message);
      return;
    }
    const { header, bytes } = answer;
    let offset = 0;
    for (const { id, grid, high } of header.masks) {
      const count = grid[0] * grid[1];
      masks.set(id, {
        fit: now, grid, high,
        mask: bytes.subarray(offset, offset + count),
        uncertainty: bytes.subarray(offset + count, offset + 2 * count),
      });
      offset += 2 * count;
      drawMask(id);
    }
    if (!header.masks.length) return;
  }
});

function reload() {
  saving = saving.then(load).catch((error) => say(error.message));
  return saving;
}

// Changes are saved one after the other, each before the next is sent.
function save(task) {
  saving = saving.then(task).catch((error) => {
    say(`Not saved: ${error.message}`);
    revision = -1;
    strokes = strokes.filter((stroke) => stroke.id !== undefined);
    return load();
  });
  refit.call();
  return saving;
}

function add(stroke) {
  strokes = [...strokes, stroke];
  drawStrokes();
  const { picture, label, radius, points } = stroke;
  return save(async () => {
    const saved = await post('/api/strokes', { picture, label, radius, points });
    stroke.id = saved.id;
    revision = saved.revision;
  });
}

function undo() {
  const last = of(store.selected).at(-1);
  if (!last) return;
  strokes = strokes.filter((stroke) => stroke !== last);
  undone.push(last);
  drawStrokes();
  save(async () => {
    revision = (await remove(`/api/strokes/${last.id}`)).revision;
  });
}

function redo() {
  const at = undone.findLastIndex((stroke) => stroke.picture === store.selected);
  if (at >= 0) add(undone.splice(at, 1)[0]);
}

function setClasses(next) {
  return save(async () => {
    const body = next.map(({ name, colour, former }) => ({ name, colour, former: former ?? null }));
    await put('/api/classes', { classes: body });
    revision = -1;
    await load();
  });
}

// ---- drawing

const rgb = () => classes.map((entry) => parseColour(entry.colour));

async function drawStrokes() {
  const picture = selected();
  if (!active || !picture) return;
  const canvas = stage.strokes;
  const scale = Math.min(1600 / Math.max(picture.width, picture.height), Math.max(1, 640 / Math.max(picture.width, picture.height)));
  canvas.width = Math.round(picture.width * scale);
  canvas.height = Math.round(picture.height * scale);
  canvas.hidden = false;
  const context = canvas.getContext('2d');
  context.setTransform(scale, 0, 0, scale, 0.5 * scale, 0.5 * scale);
  if (imported.has(picture.id)) await drawImported(picture, context);
  Object.assign(context, { lineCap: 'round', lineJoin: 'round' });
  const all = painting ? [...of(picture.id), painting] : of(picture.id);
  for (const { label, radius, points } of all) {
    context.globalCompositeOperation = label === null ? 'destination-out' : 'source-over';
    context.strokeStyle = context.fillStyle = classes[label]?.colour ?? '#000000';
    context.lineWidth = 2 * radius;
    context.beginPath();
    points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
    if (points.length > 1) context.stroke();
    else {
      context.arc(...points[0], radius, 0, 2 * Math.PI);
      context.fill();
    }
  }
  drawButtons();
}

async function drawImported(picture, context) {
  if (!labels.has(picture.id)) {
    const { header, bytes } = await getBinary(`/api/labels/${picture.id}`);
    labels.set(picture.id, { grid: header.grid, bytes });
  }
  const { grid, bytes } = labels.get(picture.id);
  const canvas = make('canvas');
  paintLabels(canvas, grid, bytes, rgb());
  context.drawImage(canvas, -0.5, -0.5);
}

function drawMask(id) {
  const found = masks.get(id);
  const targets = [gallery.tile(id)?.canvas, id === store.selected ? stage.overlay : null];
  for (const canvas of targets) {
    if (!canvas) continue;
    if (!found || show === 'none') {
      canvas.hidden = true;
      continue;
    }
    if (show === 'mask') paintLabels(canvas, found.grid, found.mask, rgb());
    else {
      const highest = Math.max(...[...masks.values()].map((other) => other.high), 1e-9);
      paintHeat(canvas, found.grid, found.uncertainty, 0, (v) => (v * found.high) / highest);
    }
    canvas.style.opacity = show === 'mask' ? opacity : Math.max(opacity, 0.6);
    canvas.classList.toggle('crisp', show === 'mask');
  }
}

function drawMasks() {
  const ids = new Set([...gallery.visibleIds(), store.selected]);
  for (const id of ids) if (id) drawMask(id);
}

function drawScores() {
  for (const { id } of store.pictures) {
    const tile = gallery.tile(id);
    if (!tile?.button) continue;
    const score = fitted.scores[id];
    const painted = of(id).some((stroke) => stroke.label !== null) || imported.has(id);
    const suggested = id === fitted.next && !painted;
    tile.score.textContent = `${painted ? '✎ ' : ''}${score === undefined ? '' : `±${score.toFixed(3)}`}`;
    tile.score.title = painted ? 'painted; uncertainty' : 'uncertainty';
    tile.button.classList.toggle('suggested', suggested);
    const about = [painted ? 'painted' : 'not painted', score === undefined ? '' : `uncertainty ${score.toFixed(3)}`,
      suggested ? 'paint this one next' : ''];
    tile.button.setAttribute('aria-label', `${byId(id).name}: ${about.filter(Boolean).join(', ')}`);
  }
  const next = $('segment-next');
  if (!next) return;
  next.disabled = !fitted.next || fitted.next === store.selected;
  next.title = fitted.next ? byId(fitted.next)?.name ?? '' : '';
  const seconds = fitted.seconds;
  $('segment-fit').textContent =
    (fitted.present ?? []).length > 1
      ? `Fitted to ${strokes.length} ${strokes.length === 1 ? 'stroke' : 'strokes'} in ${Math.round(1000 * seconds)} ms.`
      : '';
}

function guide() {
  const picture = selected();
  if (!active) return;
  if (!picture) {
    hint('Drop pictures onto the page to begin.');
    return;
  }
  const used = new Set(strokes.map((stroke) => stroke.label).filter((label) => label !== null));
  if (!classes.length) hint('Name the classes that you want to tell apart, for example background and leaf.');
  else if (classes.length < 2) hint('Add a second class: there must be something to tell it from.');
  else if (!isReady(store.default, picture.id)) hint('Features of this picture are being extracted; strokes are kept meanwhile.');
  else if (used.size < 2 && !imported.size) hint(`Choose a class and paint a stroke over it. Painted so far: ${used.size} of at least 2 classes.`);
  else if (fitted.next && fitted.next !== store.selected && byId(fitted.next)) {
    hint(`Correct what is wrong with further strokes, or go to the most uncertain picture, ${byId(fitted.next).name} (N).`);
  } else hint('Correct what is wrong with further strokes.');
}

// ---- painting

function label() {
  return erasing ? null : current;
}

function begin(point) {
  if (!classes.length) {
    say('Add a class first.', 'note');
    return;
  }
  painting = { picture: store.selected, label: label(), radius: radiusOf(selected()), points: [point] };
  undone = undone.filter((stroke) => stroke.picture !== store.selected);
  drawStrokes();
}

function extend(point) {
  if (!painting) return;
  const [x, y] = painting.points.at(-1);
  if (Math.hypot(point[0] - x, point[1] - y) * stage.scaleOf() < 1.5 || painting.points.length >= 4000) return;
  painting.points.push(point);
  drawStrokes();
}

function end() {
  if (!painting) return;
  const stroke = painting;
  painting = null;
  add({ ...stroke, points: stroke.points.map(([x, y]) => [round(x), round(y)]) });
}

const round = (value) => Math.round(value * 100) / 100;

const handlers = {
  grid: () => {
    const picture = selected();
    const side = Math.max(picture.width, picture.height) / 32;
    return [Math.round(picture.height / side), Math.round(picture.width / side)];
  },
  down: begin,
  drag: extend,
  up: end,
  cancel() {
    painting = null;
    drawStrokes();
  },
  pointer(point) {
    stage.markBrush(point, radiusOf(selected()));
  },
  moved(cursor, from, event) {
    stage.markBrush(cursor, radiusOf(selected()));
    if (event.shiftKey && from) {
      if (!painting) begin(from);
      painting?.points.push(cursor);
      drawStrokes();
    }
  },
  key(event, cursor) {
    if (event.key === ' ' && cursor && !event.repeat) {
      begin(cursor);
      end();
      return true;
    }
    return keys(event);
  },
};

function keys(event) {
  const command = event.ctrlKey || event.metaKey;
  if (command && event.key.toLowerCase() === 'z') (event.shiftKey ? redo : undo)();
  else if (command && event.key.toLowerCase() === 'y') redo();
  else if (command || event.altKey) return false;
  else if (/^[1-9]$/.test(event.key) && Number(event.key) <= classes.length) choose(Number(event.key) - 1);
  else if (event.key === 'e') erase(!erasing);
  else if (event.key === 'u') undo();
  else if (event.key === 'r') redo();
  else if (event.key === 'n' && fitted.next) select(fitted.next);
  else if (event.key === '[' || event.key === ']') resize(size * (event.key === ']' ? 1.3 : 1 / 1.3));
  else if (event.key === 'm') display({ mask: 'uncertainty', uncertainty: 'none', none: 'mask' }[show]);
  else return false;
  return true;
}

document.addEventListener('keydown', (event) => {
  if (!active || event.target.closest('#stage') || isTyping(event.target)) return;
  if (keys(event)) event.preventDefault();
});

document.addEventListener('keyup', (event) => {
  if (active && event.key === 'Shift' && painting) end();
});

function choose(index) {
  current = index;
  erase(false);
  drawClasses();
}

function erase(on) {
  erasing = on;
  $('segment-erase').setAttribute('aria-pressed', String(erasing));
  for (const row of document.querySelectorAll('.class')) row.classList.toggle('chosen', !erasing && Number(row.dataset.index) === current);
}

function resize(value) {
  size = Math.min(Math.max(value, 0.004), WIDEST);
  const slider = $('segment-size');
  if (slider) slider.value = Math.round(1000 * size);
}

function display(what) {
  show = what;
  const control = document.querySelector(`input[name=show][value=${what}]`);
  if (control) control.checked = true;
  drawMasks();
}

// ---- panels

const listed = () => classes.map((entry, former) => ({ ...entry, former }));

function newName() {
  const names = new Set(classes.map((entry) => entry.name));
  for (let i = classes.length + 1; ; i += 1) if (!names.has(`class ${i}`)) return `class ${i}`;
}

function newColour() {
  const used = new Set(classes.map((entry) => entry.colour));
  return palette.find((colour) => !used.has(colour)) ?? palette[classes.length % palette.length];
}

async function addClass(name = newName()) {
  const clean = name.trim();
  if (!clean) return;
  if (classes.some((entry) => entry.name === clean)) {
    say(`There is a class ${clean} already.`, 'note');
    return;
  }
  await setClasses([...listed(), { name: clean, colour: newColour() }]);
  choose(classes.length - 1);
  guide();
}

function drawClasses() {
  const list = $('segment-classes');
  if (!list || !active) return;
  replace(
    list,
    ...classes.map((entry, index) => {
      const radio = make('input', {
        type: 'radio', name: 'class', checked: index === current, 'aria-label': `Paint ${entry.name}`,
        onchange: () => choose(index),
      });
      const colour = make('input', {
        type: 'color', value: entry.colour, 'aria-label': `Colour of ${entry.name}`,
        onchange: (event) => setClasses(listed().map((c, i) => (i === index ? { ...c, colour: event.target.value } : c))),
      });
      const name = make('input', {
        type: 'text', value: entry.name, maxLength: 80, 'aria-label': `Name of class ${index + 1}`,
        onchange(event) {
          const text = event.target.value.trim();
          if (!text || classes.some((c, i) => i !== index && c.name === text)) {
            say('Every class needs a name of its own.', 'note');
            event.target.value = entry.name;
          } else setClasses(listed().map((c, i) => (i === index ? { ...c, name: text } : c)));
        },
      });
      const used = strokes.filter((stroke) => stroke.label === index).length;
      const away = make('button', {
        type: 'button', class: 'icon', textContent: '×', 'aria-label': `Remove ${entry.name}`,
        onclick() {
          if (used && !window.confirm(`Remove ${entry.name} and its ${used} strokes?`)) return;
          setClasses(listed().filter((_, i) => i !== index));
        },
      });
      const number = make('kbd', { textContent: index < 9 ? String(index + 1) : '', 'aria-hidden': 'true' });
      return make('li', { class: 'class', data: { index } }, radio, number, colour, name, away);
    }),
  );
  $('segment-start').hidden = classes.length > 0;
  erase(erasing);
  drawScores();
}

function drawButtons() {
  const own = of(store.selected).length;
  if (!$('segment-undo')) return;
  $('segment-undo').disabled = !own;
  $('segment-redo').disabled = !undone.some((stroke) => stroke.picture === store.selected);
}

async function exportAll() {
  const button = $('segment-export');
  button.disabled = true;
  try {
    await saving;
    const { folder, command } = await post('/api/export', { name: $('segment-name').value.trim() });
    replace(
      $('segment-exported'),
      make('p', {}, 'Written to ', make('code', { textContent: folder }), '. Train a head on exactly these labels with'),
      make('pre', { tabIndex: 0, textContent: command }),
    );
    await listExports();
  } catch (error) {
    say(error.message);
  } finally {
    button.disabled = false;
  }
}

async function listExports() {
  const { exports } = await get('/api/exports');
  const control = $('segment-import');
  if (!control) return;
  replace(control, ...exports.map((name) => make('option', { value: name, textContent: name })));
  $('segment-import-row').hidden = !exports.length;
}

async function importAll() {
  const name = $('segment-import').value;
  const source = $('segment-source').value;
  if (strokes.length && !window.confirm(`Replace all classes and ${strokes.length} strokes by those of ${name}?`)) return;
  try {
    await saving;
    await post('/api/import', { name, source });
    revision = -1;
    undone = [];
    await reload();
    say(`Imported ${source} of ${name}.`, 'note');
  } catch (error) {
    say(error.message);
  }
}

function panels() {
  const newClass = make('input', {
    id: 'segment-new', type: 'text', maxLength: 80, placeholder: 'new class', 'aria-label': 'Name of a new class',
    onkeydown(event) {
      if (event.key !== 'Enter') return;
      addClass(event.target.value);
      event.target.value = '';
    },
  });
  const radio = (value, text) => make(
    'label', { class: 'inline' },
    make('input', { type: 'radio', name: 'show', value, checked: show === value, onchange: () => display(value) }), text,
  );
  return [
    make(
      'fieldset', { class: 'panel' },
      make('legend', { textContent: 'Classes' }),
      make('ul', { id: 'segment-classes', class: 'classes' }),
      make(
        'div', { class: 'row' },
        newClass,
        make('button', {
          type: 'button', textContent: 'Add class',
          onclick() {
            addClass(newClass.value || newName());
            newClass.value = '';
          },
        }),
        make('button', {
          id: 'segment-start', type: 'button', class: 'primary', hidden: true, textContent: 'Start with background and object',
          async onclick() {
            await addClass('background');
            await addClass('object');
          },
        }),
      ),
    ),
    make(
      'fieldset', { class: 'panel' },
      make('legend', { textContent: 'Paint' }),
      make(
        'div', { class: 'row' },
        field('Brush', make('input', {
          id: 'segment-size', type: 'range', min: 4, max: 1000 * WIDEST, value: 1000 * size,
          oninput: (event) => resize(event.target.value / 1000),
        })),
        make('button', {
          id: 'segment-erase', type: 'button', textContent: 'Eraser', 'aria-pressed': 'false', onclick: () => erase(!erasing),
        }),
        make('button', { id: 'segment-undo', type: 'button', textContent: 'Undo', onclick: undo }),
        make('button', { id: 'segment-redo', type: 'button', textContent: 'Redo', onclick: redo }),
        make('button', {
          id: 'segment-next', type: 'button', class: 'primary', textContent: 'Most uncertain', disabled: true,
          onclick: () => select(fitted.next),
        }),
      ),
      make(
        'div', { class: 'row', role: 'radiogroup', 'aria-label': 'Shown over pictures' },
        radio('mask', 'Masks'), radio('uncertainty', 'Uncertainty'), radio('none', 'Pictures'),
        field('Opacity', make('input', {
          type: 'range', min: 10, max: 100, value: 100 * opacity,
          oninput(event) {
            opacity = event.target.value / 100;
            drawMasks();
          },
        })),
      ),
      make('p', { id: 'segment-fit', class: 'muted small', role: 'status' }),
      make(
        'p', { class: 'muted small keys' },
        'Keys: arrows move, Space dabs, Shift+arrows paint, 1–9 choose a class, E erases, U and R undo and redo, ' +
          '[ ] change the brush, M what is shown, N the most uncertain picture, PageUp and PageDown the next.',
      ),
    ),
    make(
      'fieldset', { class: 'panel' },
      make('legend', { textContent: 'Export and import' }),
      make(
        'div', { class: 'row' },
        field('Name', make('input', { id: 'segment-name', type: 'text', value: 'labels', maxLength: 64, pattern: '[A-Za-z0-9_\\-]+' })),
        make('button', { id: 'segment-export', type: 'button', textContent: 'Export', onclick: exportAll }),
      ),
      make('div', { id: 'segment-exported', class: 'small', role: 'status' }),
      make(
        'div', { id: 'segment-import-row', class: 'row', hidden: true },
        field('Import', make('select', { id: 'segment-import' })),
        field('What', make(
          'select', { id: 'segment-source' },
          make('option', { value: 'strokes', textContent: 'strokes' }),
          make('option', { value: 'labels', textContent: 'painted labels' }),
          make('option', { value: 'masks', textContent: 'masks' }),
        )),
        make('button', { type: 'button', textContent: 'Import', onclick: importAll }),
      ),
    ),
  ];
}

export const view = {
  async enter() {
    active = true;
    stage.listen(handlers);
    replace($('controls'));
    replace($('tools'), ...panels());
    gallery.markReady(store.default);
    drawClasses();
    drawStrokes();
    drawMasks();
    guide();
    try {
      await reload();
      await listExports();
    } catch (error) {
      say(error.message);
    }
    guide();
  },
  leave() {
    if (painting) end();
    active = false;
    stage.markBrush(null);
    stage.strokes.hidden = true;
    stage.overlay.hidden = true;
    gallery.clear();
  },
  selected() {
    if (painting) end();
    drawStrokes();
    drawMasks();
    fetchMasks();
    drawScores();
    guide();
  },
  progress() {
    gallery.markReady(store.default);
    if (store.annotations !== revision && !painting) reload();
    const ready = store.choices.find((c) => c.id === store.default)?.done.length ?? 0;
    if (ready !== view.ready) {
      view.ready = ready;
      if (strokes.length || imported.size) refit.call();
    }
    guide();
  },
  visible: fetchMasks,
};

export const stepKeys = { PageUp: -1, PageDown: 1 };
document.addEventListener('keydown', (event) => {
  if (event.key in stepKeys && !isTyping(event.target) && !event.target.closest('.gallery')) {
    event.preventDefault();
    step(stepKeys[event.key]);
  }
});
