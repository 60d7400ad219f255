// Features: joint principal components of two choices of layers, side by side.

import { get, post, postBinary } from './api.js';
import { HEAT, paintColours } from './colours.js';
import { $, field, make, replace, say } from './dom.js';
import { changed, choiceOf, refresh, store, usable } from './store.js';

let catalogue = null; // what /api/sites says
let active = false;
const sides = [
  { label: 'A', choice: null, drawn: '', name: '', timestep: null },
  { label: 'B', choice: null, drawn: '', name: '', timestep: null },
];

const hint = (text) => { $('hint').textContent = text; };

function split(layer) {
  const [name, at] = layer.split('@');
  return [name, (at ?? '0').split('+').map(Number)];
}

function options() {
  const groups = new Map();
  for (const site of catalogue.sites) {
    const block = site.name.match(/^((?:refiner-)?(?:down|up)-level\d+|mid|vit-block\d+|[a-z]+)/)?.[0] ?? 'other';
    if (!groups.has(block)) groups.set(block, []);
    groups.get(block).push(site);
  }
  const sets = Object.keys(catalogue.sets).filter((name) => catalogue.sets[name].length);
  return [
    make(
      'optgroup', { label: 'Several layers' },
      make('option', { value: 'set:', textContent: 'recommended (as at the start)' }),
      ...sets.map((name) => make('option', {
        value: `set:${name}`, textContent: `${name} (${catalogue.sets[name].length} layers)`,
      })),
    ),
    ...[...groups].map(([block, sites]) => make(
      'optgroup', { label: block },
      ...sites.map((site) => make('option', {
        value: site.name, textContent: `${site.name} · ${site.channels} channels · stride ${site.stride}`,
      })),
    )),
  ];
}

function layersOf(name) {
  if (name === 'set:') return choiceOf(store.default).layers.map((layer) => split(layer)[0]);
  return name.startsWith('set:') ? catalogue.sets[name.slice(4)] : [name];
}

async function choose(side) {
  const select = $(`layer-${side.label}`);
  const timestep = $(`timestep-${side.label}`);
  side.name = select.value;
  side.timestep = Math.min(Math.max(Math.round(Number(timestep.value) || 0), 0), catalogue.timesteps - 1);
  timestep.value = side.timestep;
  try {
    const choice = await post('/api/choices', { layers: layersOf(side.name), timesteps: [side.timestep] });
    side.choice = choice.id;
    side.drawn = '';
    await refresh();
    await update();
  } catch (error) {
    say(error.message);
  }
}

async function fill(side) {
  const choice = choiceOf(side.choice);
  if (!choice) return;
  const errors = Object.values(choice.errors);
  const state = $(`state-${side.label}`);
  const count = usable().length;
  const channels = choice.layers.map((layer) => catalogue.sites.find((s) => s.name === split(layer)[0]));
  const dimensions = choice.layers.reduce((sum, layer, i) => sum + (channels[i]?.channels ?? 0) * split(layer)[1].length, 0);
  const finest = Math.min(...channels.map((site) => site?.stride ?? Infinity));
  const size = `${dimensions} channels, stride ${finest}`;
  state.textContent = errors.length
    ? `${errors.length} failed: ${errors[0]}`
    : choice.done.length < count ? `${size}: extracting, ${choice.done.length} of ${count}` : size;
  const wanted = choice.id + choice.done.join();
  if (!choice.done.length || side.drawn === wanted || side.loading) return;
  if (choice.done.length < count && side.drawn && Date.now() - side.at < 2000) return; // colours change with each picture
  side.loading = true;
  try {
    const { header, bytes } = await postBinary('/api/colours', { choice: choice.id });
    if (!active || side.choice !== choice.id) return;
    let offset = 0;
    for (const { id, grid } of header.colours) {
      const canvas = document.querySelector(`[data-colours="${side.label}-${id}"]`);
      if (canvas) paintColours(canvas, grid, bytes, offset);
      offset += 3 * grid[0] * grid[1];
    }
    side.drawn = wanted;
    side.at = Date.now();
  } catch (error) {
    say(error.message);
  } finally {
    side.loading = false;
  }
}

async function update() {
  if (!active || !catalogue) return;
  for (const side of sides) if (side.choice) await fill(side);
}

function cards() {
  replace(
    $('cards'),
    ...usable().map((picture) => {
      const frames = sides.map((side) => {
        const canvas = make('canvas', {
          class: 'colours', hidden: true, data: { colours: `${side.label}-${picture.id}` },
          role: 'img', 'aria-label': `${picture.name}, principal components of ${side.label}`,
        });
        const frame = make('div', { class: 'frame loading' }, canvas);
        frame.style.setProperty('--ratio', picture.width / picture.height);
        return frame;
      });
      const image = make('img', { loading: 'lazy', alt: picture.name, src: `/api/pictures/${picture.id}/thumbnail` });
      const first = make('div', { class: 'frame' }, image);
      if (Math.max(picture.width, picture.height) <= 128) first.classList.add('small');
      first.style.setProperty('--ratio', picture.width / picture.height);
      return make(
        'figure', { class: 'card' },
        make('div', { class: 'triple' }, first, ...frames),
        make('figcaption', { class: 'name', textContent: picture.name, title: picture.name }),
      );
    }),
  );
  for (const side of sides) side.drawn = '';
}

function panel(side) {
  const select = make('select', { id: `layer-${side.label}`, onchange: () => choose(side) }, ...options());
  select.value = side.name;
  const timestep = make('input', {
    id: `timestep-${side.label}`, type: 'number', min: 0, max: catalogue.timesteps - 1, step: 1, value: side.timestep,
    onchange: () => choose(side),
  });
  return make(
    'fieldset', { class: 'panel' },
    make('legend', { textContent: `Choice ${side.label}` }),
    make('div', { class: 'row' }, field('Layer', select), field('Timestep', timestep)),
    make(
      'div', { class: 'row between' },
      make('span', { id: `state-${side.label}`, class: 'muted small' }),
      make('button', {
        type: 'button', textContent: `Match with ${side.label}`,
        onclick() {
          store.matching = side.choice;
          changed('matching');
        },
      }),
    ),
  );
}

// The search's scores: rows are layers in order of execution, columns are timesteps.
function ranking() {
  const found = catalogue.ranking;
  if (!found) return null;
  const scores = new Map(found.rows.map(([layer, timestep, score]) => [`${layer}@${timestep}`, score]));
  const timesteps = [...new Set(found.rows.map((row) => row[1]))].sort((a, b) => a - b);
  const layers = catalogue.sites.map((s) => s.name).filter((name) => found.rows.some((row) => row[0] === name));
  const values = [...scores.values()];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const canvas = make('canvas', { class: 'ranking', width: timesteps.length, height: layers.length, 'aria-hidden': 'true' });
  const context = canvas.getContext('2d');
  layers.forEach((layer, row) => timesteps.forEach((t, column) => {
    const score = scores.get(`${layer}@${t}`);
    if (score === undefined) return;
    context.fillStyle = `rgb(${HEAT[Math.round((255 * (score - low)) / Math.max(high - low, 1e-9))].join()})`;
    context.fillRect(column, row, 1, 1);
  }));
  const label = make('p', { class: 'muted small', textContent: 'Point at a cell to read it, click to take it as A.' });
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.min(Math.floor(((event.clientY - box.top) / box.height) * layers.length), layers.length - 1);
    const column = Math.min(Math.floor(((event.clientX - box.left) / box.width) * timesteps.length), timesteps.length - 1);
    return [layers[row], timesteps[column]];
  };
  canvas.addEventListener('pointermove', (event) => {
    const [layer, t] = at(event);
    label.textContent = `${layer}, t = ${t}: ${scores.get(`${layer}@${t}`)?.toFixed(2) ?? 'no score'}`;
  });
  canvas.addEventListener('click', (event) => take(sides[0], ...at(event)));
  const best = found.rows.filter((row) => layers.includes(row[0])).slice(0, 8);
  return make(
    'details', { class: 'panel', open: true },
    make('summary', { textContent: `Search: ${found.score} of every layer (rows) at every timestep (columns)` }),
    make(
      'div', { class: 'search' },
      make('div', {}, canvas, label),
      make(
        'ol', {},
        ...best.map(([layer, t, score]) => make(
          'li', {}, make('code', { textContent: `${layer} @ ${t}` }), ` ${Number(score).toFixed(2)} `,
          ...sides.map((side) => make('button', {
            type: 'button', class: 'small', textContent: side.label, 'aria-label': `Take ${layer} at ${t} as ${side.label}`,
            onclick: () => take(side, layer, t),
          })),
        )),
      ),
    ),
  );
}

function take(side, layer, timestep) {
  $(`layer-${side.label}`).value = layer;
  $(`timestep-${side.label}`).value = timestep;
  choose(side);
}

export const view = {
  wide: true,
  async enter() {
    active = true;
    hint('Colours are the first three principal components over all pictures: alike features have alike colours.');
    replace($('tools'));
    replace($('controls'), make('p', { class: 'muted', textContent: 'Reading the list of layers …' }));
    try {
      catalogue ??= await get('/api/sites');
    } catch (error) {
      say(error.message);
      return;
    }
    if (!active) return;
    const layers = choiceOf(store.default)?.layers ?? [];
    if (!sides[0].name && layers.length) {
      const [first, timesteps] = split(layers[0]);
      Object.assign(sides[0], { name: 'set:', timestep: timesteps[0] });
      Object.assign(sides[1], { name: first, timestep: timesteps[0] });
    }
    replace(
      $('controls'),
      make('div', { class: 'panels' }, ...sides.map(panel)),
      ranking(),
      make(
        'div', { class: 'triple heads', 'aria-hidden': 'true' },
        make('span', { textContent: 'picture' }), make('span', { textContent: 'A' }), make('span', { textContent: 'B' }),
      ),
      make('div', { id: 'cards', class: 'cards' }),
    );
    cards();
    for (const side of sides) {
      if (side.choice && choiceOf(side.choice)) await update();
      else await choose(side);
    }
  },
  leave() {
    active = false;
  },
  selected() {},
  progress: update,
  pictures() {
    if (active && $('cards')) cards();
    update();
  },
  visible() {},
};
