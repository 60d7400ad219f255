// Predict: masks of a trained model.

import { get, getBinary, Latest, post } from './api.js';
import { paintLabels, toHex } from './colours.js';
import { $, field, make, replace, say } from './dom.js';
import * as gallery from './gallery.js';
import * as stage from './stage.js';
import { refresh, store } from './store.js';

let active = false;
let hidden = new Set(); // classes
let masks = new Map(); // id -> {grid, bytes, shares}
let model = ''; // that the masks are of
let opacity = 0.6;
let failed = new Set();

const hint = (text) => { $('hint').textContent = text; };
const nameOf = (loaded) => (loaded ? `${loaded.config} ${loaded.checkpoint}` : '');

const request = new Latest(async () => {
  for (;;) {
    if (!active || !store.loaded) return;
    const now = model;
    const id = [store.selected, ...gallery.visibleIds()].find((key) => key && !masks.has(key) && !failed.has(key));
    if (!id) return;
    try {
      const { header, bytes } = await getBinary(`/api/predictions/${id}`);
      if (now !== model) continue;
      const counts = new Map();
      for (const label of bytes) counts.set(label, (counts.get(label) ?? 0) + 1);
      masks.set(id, { grid: header.grid, bytes, counts });
      draw(id);
    } catch (error) {
      failed.add(id);
      say(error.message);
      if (!error.status) return;
    }
  }
});

function draw(id) {
  const found = masks.get(id);
  const colours = (store.loaded?.palette ?? []).map((colour, i) => (hidden.has(i) ? null : colour));
  for (const canvas of [gallery.tile(id)?.canvas, id === store.selected ? stage.overlay : null]) {
    if (!canvas) continue;
    if (!found) {
      canvas.hidden = true;
      continue;
    }
    paintLabels(canvas, found.grid, found.bytes, colours);
    canvas.style.opacity = opacity;
    canvas.classList.add('crisp');
  }
  if (id === store.selected) shares();
}

function drawAll() {
  for (const id of new Set([store.selected, ...gallery.visibleIds()])) if (id) draw(id);
}

function shares() {
  const found = masks.get(store.selected);
  for (const element of document.querySelectorAll('[data-share]')) {
    const count = found?.counts.get(Number(element.dataset.share)) ?? 0;
    element.textContent = found ? `${((100 * count) / found.bytes.length).toFixed(1)} %` : '';
  }
}

function toggle(index, on) {
  if (on) hidden.delete(index);
  else hidden.add(index);
  drawAll();
}

function legend() {
  const box = $('predict-legend');
  if (!box) return;
  const { loaded } = store;
  box.hidden = !loaded;
  if (!loaded) return;
  const all = (on) => make('button', {
    type: 'button', textContent: on ? 'All' : 'None',
    onclick() {
      hidden = on ? new Set() : new Set(loaded.classes.keys());
      legend();
      drawAll();
    },
  });
  replace(
    box,
    make('legend', { textContent: 'Classes' }),
    make(
      'ul', { class: 'legend' },
      ...loaded.classes.map((name, i) => make(
        'li', {},
        make(
          'label', { class: 'inline' },
          make('input', { type: 'checkbox', checked: !hidden.has(i), onchange: (event) => toggle(i, event.target.checked) }),
          make('i', { class: 'swatch', style: { background: toHex(loaded.palette[i]) }, 'aria-hidden': 'true' }),
          make('span', { textContent: name }),
        ),
        make('span', { class: 'muted small', data: { share: i } }),
      )),
    ),
    make(
      'div', { class: 'row' }, all(true), all(false),
      field('Opacity', make('input', {
        type: 'range', min: 10, max: 100, value: 100 * opacity,
        oninput(event) {
          opacity = event.target.value / 100;
          drawAll();
        },
      })),
    ),
  );
  shares();
}

function sync() {
  if (nameOf(store.loaded) !== model) {
    model = nameOf(store.loaded);
    masks = new Map();
    failed = new Set();
    hidden = new Set();
    legend();
    drawAll();
  }
  guide();
  request.call();
}

function guide() {
  if (!active) return;
  if (!store.loaded) hint('Choose a config and its checkpoint, for example of an export that you trained with tools/train.py.');
  else hint('Masks of the model; switch classes on and off in the legend.');
}

async function load(event) {
  event.preventDefault();
  const button = $('predict-load');
  button.disabled = true;
  button.textContent = 'Loading …';
  try {
    await post('/api/models', { config: $('predict-config').value, checkpoint: $('predict-checkpoint').value });
    model = '';
    await refresh();
    sync();
  } catch (error) {
    say(error.message);
  } finally {
    button.disabled = false;
    button.textContent = 'Load';
  }
}

async function list() {
  const { configs, checkpoints } = await get('/api/models');
  const fill = (id, values, chosen) => {
    replace($(id), ...values.map((value) => make('option', { value, textContent: value })));
    if (values.includes(chosen)) $(id).value = chosen;
  };
  if (!$('predict-config')) return;
  fill('predict-config', configs, store.loaded?.config);
  fill('predict-checkpoint', checkpoints, store.loaded?.checkpoint);
  const none = !configs.length || !checkpoints.length;
  $('predict-load').disabled = none;
  $('predict-none').hidden = !none;
}

export const view = {
  async enter() {
    active = true;
    stage.listen({});
    replace($('controls'));
    replace(
      $('tools'),
      make(
        'form', { class: 'panel', onsubmit: load },
        field('Config', make('select', { id: 'predict-config' })),
        field('Checkpoint', make('select', { id: 'predict-checkpoint' })),
        make('div', { class: 'row' }, make('button', { id: 'predict-load', class: 'primary', textContent: 'Load', disabled: true })),
        make('p', {
          id: 'predict-none', class: 'muted small', hidden: true,
          textContent: 'There is no config with a checkpoint in the folder. Export labels in Segment, train them with the ' +
            'command shown there, and come back; or start with --config and --checkpoint.',
        }),
      ),
      make('fieldset', { id: 'predict-legend', class: 'panel', hidden: true }),
    );
    gallery.clear();
    for (const { id } of store.pictures) gallery.tile(id)?.button?.classList.remove('waiting');
    legend();
    drawAll();
    guide();
    try {
      await list();
    } catch (error) {
      say(error.message);
    }
    sync();
  },
  leave() {
    active = false;
    stage.overlay.hidden = true;
    gallery.clear();
  },
  selected() {
    drawAll();
    shares();
    request.call();
  },
  progress: sync,
  visible: () => request.call(),
};
