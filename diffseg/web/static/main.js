// Tabs, progress, added pictures, and what all views share.

import { upload } from './api.js';
import { $, say } from './dom.js';
import { view as features } from './features.js';
import * as gallery from './gallery.js';
import { view as match } from './match.js';
import { view as predict } from './predict.js';
import { view as segment } from './segment.js';
import * as stage from './stage.js';
import { isBusy, onChange, poll, refresh, select, step, store, usable } from './store.js';

const views = { match, features, segment, predict };
const tabs = [...document.querySelectorAll('[role=tab]')];
let current = null;

function open(name, focus = false) {
  if (current === name) return;
  if (current) views[current].leave();
  current = name;
  for (const tab of tabs) {
    const chosen = tab.dataset.view === name;
    tab.setAttribute('aria-selected', String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen && focus) tab.focus();
  }
  const workspace = $('workspace');
  workspace.setAttribute('aria-labelledby', `tab-${name}`);
  workspace.dataset.view = name;
  workspace.classList.toggle('wide', views[name].wide === true);
  history.replaceState(null, '', `#${name}`);
  views[name].enter();
}

for (const tab of tabs) {
  tab.addEventListener('click', () => open(tab.dataset.view));
  tab.addEventListener('keydown', (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    open(tabs[(tabs.indexOf(tab) + by + tabs.length) % tabs.length].dataset.view, true);
  });
}

function showProgress() {
  const busy = isBusy();
  $('progress').hidden = !busy && store.reachable;
  $('progress').classList.toggle('lost', !store.reachable);
  if (!store.reachable) {
    $('progress-text').textContent = 'The explorer does not answer; start it again in its terminal.';
    return;
  }
  const count = usable().length;
  const waiting = store.choices.filter((c) => c.done.length + Object.keys(c.errors).length < count);
  const done = waiting.reduce((sum, c) => sum + c.done.length + Object.keys(c.errors).length, 0);
  $('progress-bar').value = waiting.length ? done / (count * waiting.length) : 1;
  const shown = waiting.at(-1);
  if (shown) {
    $('progress-text').textContent =
      `Extracting features: ${shown.done.length + Object.keys(shown.errors).length} of ${count} pictures` +
      (waiting.length > 1 ? `, and ${waiting.length - 1} more choices of layers` : '');
  }
}

onChange((what) => {
  showProgress();
  if (what === 'reachable') return;
  $('source').textContent = `${store.folder} · ${store.model}`;
  if (what === 'pictures') gallery.show();
  stage.show();
  gallery.mark();
  if (!current) return;
  if (what === 'matching') open('match', true);
  else if (what === 'selected') views[current].selected();
  else if (what === 'pictures') (views[current].pictures ?? views[current].progress)();
  else views[current].progress();
});

gallery.watchVisible(() => current && views[current].visible());

$('previous').addEventListener('click', () => step(-1));
$('next').addEventListener('click', () => step(1));

// ---- pictures that are added

async function add(files) {
  const rest = [...files];
  for (const [i, file] of rest.entries()) {
    if (file.size > store.limits.bytes) {
      say(`${file.name} has ${(file.size / 1e6).toFixed(0)} MB; at most ${(store.limits.bytes / 1e6).toFixed(0)} MB are taken.`);
      continue;
    }
    $('hint').textContent = `Adding ${file.name}, ${i + 1} of ${rest.length} …`;
    try {
      const added = await upload(file.name, file);
      await refresh();
      if (rest.length === 1) select(added.id);
    } catch (error) {
      say(error.message);
    }
  }
  if (current) views[current].progress();
}

for (const id of ['add', 'add-first']) $(id).addEventListener('click', () => $('files').click());
$('files').addEventListener('change', (event) => {
  add(event.target.files);
  event.target.value = '';
});

let depth = 0;
const carriesFiles = (event) => event.dataTransfer?.types.includes('Files');
addEventListener('dragenter', (event) => {
  if (!carriesFiles(event)) return;
  depth += 1;
  $('drop').hidden = false;
});
addEventListener('dragleave', () => {
  depth = Math.max(0, depth - 1);
  $('drop').hidden = depth === 0;
});
addEventListener('dragover', (event) => event.preventDefault());
addEventListener('drop', (event) => {
  event.preventDefault();
  depth = 0;
  $('drop').hidden = true;
  if (carriesFiles(event)) add(event.dataTransfer.files);
});

// ---- looks

function remembered(key, fallback) {
  try {
    return localStorage.getItem(key) ?? fallback;
  } catch {
    return fallback; // storage is switched off
  }
}

function remember(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // as above
  }
}

const dark = matchMedia('(prefers-color-scheme: dark)');
document.documentElement.dataset.theme = remembered('theme', dark.matches ? 'dark' : 'light');
$('theme').addEventListener('click', () => {
  const next = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark';
  document.documentElement.dataset.theme = next;
  remember('theme', next);
});

function tileSize(value) {
  $('tile-size').value = value;
  $('gallery').style.setProperty('--tile', `${value}px`);
}

tileSize(remembered('tile-size', innerWidth < 600 ? 110 : 150));
$('tile-size').addEventListener('input', (event) => {
  tileSize(event.target.value);
  remember('tile-size', event.target.value);
});

const wanted = location.hash.slice(1);
await refresh();
gallery.show();
stage.show();
open(wanted in views ? wanted : 'match');
addEventListener('hashchange', () => location.hash.slice(1) in views && open(location.hash.slice(1)));
setTimeout(poll, 500);
