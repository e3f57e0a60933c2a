// The page of mlfsic_jax.app. The server holds the state; the page shows it and sends every change at once.
// Names of files and labels become text nodes or properties only, never markup.

const $ = (id) => document.getElementById(id);
const KEYS = "1234567890qwetyiopasdfghjklzxcvbnm"; // of labels; r and u are commands
const COLOURS = 10; // --c0 .. of app.css
const PAGE = 100; // photos a request
const TAGS = 4; // labels on a tile

const view = { order: "suggested", show: "all", label: "", ...JSON.parse(sessionStorage.getItem("view") ?? "{}") };
const photos = new Map(); // id -> as the server described it, with the stamp of then
const tiles = new Map(); // id -> list item
const onScreen = new Set(); // ids
let state = null; // as the server told last
let list = { ids: [], offset: 0, total: 0 }; // the photos of the grid, in this order
let cursor = null; // id of the photo that keys are about
let waiting = 0, edits = 0; // changes on their way, and all so far
let sortWhenFitted = null; // the version of new labels: nobody points at a photo yet
let shownPhoto = null, why = "", reasons = null; // in the photo view; why: the label to explain
let shownLabel = null, dragging = false; // in the label view

// --- elements

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "label") node.style.setProperty("--c", colourOf(value));
    else if (name === "key") node.dataset.key = value;
    else if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const icon = (name) => svg("svg", { "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));
const unseen = (text) => el("span", { className: "unseen" }, text);
const percent = (value) => `${Math.round(100 * value)} %`;
const number = (value) => value.toLocaleString("en");
const many = (count, what) => `${number(count)} ${what}${count === 1 ? "" : "s"}`;
const sum = (values) => values.reduce((a, b) => a + b, 0);
const indexOf = (name) => state.labels.findIndex((label) => label.name === name);
const colourOf = (name) => `var(--c${indexOf(name) % COLOURS})`;
const nameOf = (id) => photos.get(id)?.name ?? `photo ${id + 1}`;

/** Puts new children into a parent; the focus stays at the child of the same data-key. */
function replace(parent, children) {
  const key = parent.contains(document.activeElement) && document.activeElement.dataset.key;
  parent.replaceChildren(...children);
  if (key) [...parent.querySelectorAll("[data-key]")].find((node) => node.dataset.key === key)?.focus();
}

let silence;
function say(text, failed = false) {
  $("status").textContent = text;
  $("status").classList.toggle("failed", failed);
  clearTimeout(silence);
  silence = setTimeout(() => ($("status").textContent = ""), 6000);
}

// --- the server

async function call(path, body) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const reply = await fetch(path, body && options).catch(() => null);
  $("gone").hidden = reply !== null;
  if (reply === null) throw new Error("The server is not running");
  if (reply.ok) return reply;
  throw new Error((await reply.json().catch(() => ({}))).error ?? `The server answered ${reply.status}`);
}

const get = async (path, body) => (await call(path, body)).json();
const getPhotos = (query) => get(`api/photos?${new URLSearchParams(query)}`);
const getThese = (ids) => getPhotos(ids.map((id) => ["ids", id]));
const attempt = (action) => action().catch((error) => say(error.message, true));

let line = Promise.resolve();
/** Sends changes one after the other, so that undo takes them back in their order. */
function change(path, body) {
  document.body.dataset.waiting = ++waiting;
  edits++;
  const done = line.then(() => get(path, body));
  line = done.catch(() => {}).then(() => {
    document.body.dataset.waiting = --waiting;
    poll();
  });
  return done;
}

let timer, polls = 0;
async function poll() {
  const mine = ++polls;
  clearTimeout(timer);
  const found = await get("api/state").catch((error) => $("gone").hidden && say(error.message, true));
  if (mine !== polls) return;
  if (found) take(found);
  const seconds = !found ? 2 : state.fitted < state.version ? 0.2 : state.embedded < state.photos ? 1 : 3;
  timer = setTimeout(poll, 1000 * seconds);
}

/** What the shown of a photo depends on. */
const stamp = () => `${state.version} ${state.fits} ${state.embedded}`;

function take(found) {
  if (state && state.collection !== found.collection) return location.reload(); // photos are numbered anew
  const before = state && { stamp: stamp(), labels: JSON.stringify(state.labels) };
  state = found;
  document.body.dataset.fits = state.fits;
  if (view.label && indexOf(view.label) < 0) view.label = ""; // another page removed it
  showBar();
  if (before?.labels !== JSON.stringify(state.labels)) showChips();
  if (!before) return load();
  if (before.stamp !== stamp()) {
    refresh().then(() => $("photo").open && showPhoto());
    if ($("label").open) showLabel();
  }
  if (sortWhenFitted !== null && state.fitted >= sortWhenFitted) {
    sortWhenFitted = null;
    if (scrollY < 100) return load();
  }
  showAnew();
}

// --- bar and labels

function showBar() {
  const { photos: n, embedded, rate, left_s: left, unreadable } = state;
  document.title = `${state.folder}: label photos`;
  $("folder").textContent = state.folder;
  $("count").textContent = many(n, "photo");
  $("work").hidden = embedded >= n;
  $("progress").value = embedded / n;
  const time = left >= 90 ? `${Math.round(left / 60)} min left` : `${Math.ceil(left)} s left`;
  $("left").textContent = `${number(embedded)} read` + (rate > 0 ? ` · ${rate.toFixed(rate < 10 ? 1 : 0)}/s · ${time}` : "");
  $("undo").disabled = !state.can_undo;
  $("unreadable").hidden = !unreadable.length;
  $("unreadable").textContent = `${unreadable.length}${unreadable.length < 20 ? "" : " or more"} unreadable`;
  $("note").textContent = $("note").title = state.note + (state.names_used ? "" : " (the names mean something else than the photos show, or nothing, and are left out)");
  $("first").hidden = state.labels.length > 0;
}

function showChips() {
  const chips = state.labels.map(({ name, yes, proposed }, i) => {
    const chosen = view.label === name, title = `${many(yes, "photo")} yes, ${number(proposed)} proposed`;
    const main = el("button", { className: "name", key: name, title, "aria-pressed": chosen }, el("i"), el("span", {}, name));
    if (yes) main.append(el("small", {}, number(yes)));
    if (KEYS[i]) main.append(el("kbd", {}, KEYS[i]));
    main.onclick = () => choose(chosen ? "" : name);
    const more = el("button", { className: "more", key: `${name} menu`, "aria-label": `Menu of ${name}` }, icon("down"));
    more.popoverTargetElement = $("chip-menu");
    more.onclick = () => Object.assign($("chip-menu"), { owner: name, opener: more });
    return el("span", { className: chosen ? "chip chosen" : "chip", label: name }, main, more);
  });
  const all = el("button", { className: "name", key: " all", "aria-pressed": !view.label }, "All labels");
  all.onclick = () => choose("");
  if (chips.length) chips.unshift(el("span", { className: view.label ? "chip" : "chip chosen" }, all));
  replace($("chips"), chips);
  for (const id of tiles.keys()) paint(id);
}

function choose(label) {
  view.label = label;
  showChips();
  load();
  if (label) say(`Click photos of ${label}; × or Shift-click where it is not`);
}

/** Adds "cat, dog = dog | puppy", as --labels would. */
async function addLabels(text) {
  for (const part of text.split(",").filter((piece) => piece.trim())) {
    const [name, ...given] = part.split("=");
    const wordings = given.length ? given.join("=").split("|") : []; // none given: it keeps those that it has
    sortWhenFitted = (await change("api/labels", { name: name.trim(), wordings })).version;
    say(`Added ${name.trim()}`);
  }
  $("names").value = "";
}

async function removeLabel(name) {
  const { yes, no } = state.labels[indexOf(name)];
  if (!(await ask(`Remove ${name}?`, [`${many(yes + no, "decision")} about it will go too. This cannot be undone.`], true))) return;
  await change("api/labels/remove", { name });
  say(`Removed ${name}`);
  if (view.label === name) choose("");
}

function ask(title, lines, question = false) {
  $("ask-title").textContent = title;
  $("ask-lines").replaceChildren(...lines.map((text) => el("li", {}, text)));
  $("ask-yes").hidden = !question;
  $("ask-no").textContent = question ? "Keep" : "Close";
  $("ask").returnValue = "";
  $("ask").showModal();
  return new Promise((resolve) => ($("ask").onclose = () => resolve($("ask").returnValue === "yes")));
}

// --- decisions

function put(decisions) {
  for (const { photo, label, value } of decisions) {
    const { decided } = photos.get(photo);
    if (value === null) delete decided[label];
    else decided[label] = value;
    paint(photo);
  }
  if ($("photo").open) showRows();
}

async function decide(decisions, text) {
  const before = decisions.map(({ photo, label }) => ({ photo, label, value: photos.get(photo).decided[label] ?? null }));
  put(decisions);
  say(text);
  sortWhenFitted = null; // somebody does
  await change("api/decide", { collection: state.collection, decisions }).catch((error) => {
    put(before);
    say(`Not saved: ${error.message}`, true);
  });
}

/** Decides, or takes the same decision back. */
function toggle(photo, label, wanted) {
  const value = photos.get(photo).decided[label] === wanted ? null : wanted;
  decide([{ photo, label, value }], `${label}: ${value === null ? "undecided" : value ? "yes" : "no"}, ${nameOf(photo)}`);
}

const isProposed = (photo, { name, threshold }) => !(name in photo.decided) && photo.probabilities?.[name] > threshold;

function accept(id) {
  const photo = photos.get(id), open = state.labels.filter(({ name }) => !(name in photo.decided));
  if (!open.length) return say(`All labels of ${photo.name} are decided`);
  if (!photo.probabilities) return say(`Nothing is known of ${photo.name} yet`, true);
  const decisions = open.map((label) => ({ photo: id, label: label.name, value: Number(isProposed(photo, label)) }));
  const yes = decisions.filter(({ value }) => value).map(({ label }) => label);
  decide(decisions, `Accepted ${photo.name}: ${yes.join(", ") || "no further label"}`);
}

const undo = () => attempt(async () => {
  const { photos: changed } = await change("api/undo", {});
  say(`Undone: ${many(changed.length, "photo")} changed`);
});

// --- grid

function tagsOf(photo) {
  if (photo.error) return [el("span", { className: "tag more" }, "cannot be read")];
  const tags = [];
  for (const label of state.labels) {
    const { name } = label, value = photo.decided[name], p = photo.probabilities?.[name], current = name === view.label;
    const kind = value === 1 ? "yes" : value === 0 ? current && "no" : isProposed(photo, label) ? "proposed" : current && p !== undefined && "low";
    if (kind) tags.push({ name, p, kind, rank: current ? 3 : kind === "yes" ? 2 : p });
  }
  tags.sort((a, b) => b.rank - a.rank);
  const nodes = tags.slice(0, TAGS).map(({ name, p, kind }) => {
    const text = kind === "yes" || kind === "no" ? [unseen(` ${kind}`)] : [unseen(" proposed"), el("small", {}, ` ${percent(p)}`)];
    return el("span", { className: `tag ${kind}`, label: name }, el("b", {}, name), ...text);
  });
  if (tags.length > TAGS) nodes.push(el("span", { className: "tag more" }, `+${tags.length - TAGS}`));
  return nodes;
}

function makeTile(id) {
  const { name, width, height } = photos.get(id);
  const image = el("img", { alt: name, loading: "lazy", decoding: "async", draggable: false, src: `thumb/${id}` });
  const main = el("button", { className: "main", tabIndex: -1 }, image, el("span", { className: "tags" }));
  const no = el("button", { className: "corner no", tabIndex: -1, title: "no" }, icon("close"));
  const open = el("button", { className: "corner open", tabIndex: -1, title: "Open (Space)", "aria-label": `Open ${name}` }, icon("open"));
  const tile = el("li", { className: "tile" }, main, no, open, el("i", { className: "done", title: "all labels decided" }, icon("check")));
  image.onload = () => tile.classList.add("loaded");
  image.onerror = () => tile.classList.add("broken");
  main.dataset.id = id;
  main.onclick = (event) => {
    focusTile(id);
    if (view.label) toggle(id, view.label, event.shiftKey ? 0 : 1);
    else openPhoto(id);
  };
  main.onfocus = () => setCursor(id);
  no.onclick = () => toggle(id, view.label, 0);
  open.onclick = () => openPhoto(id);
  tile.style.setProperty("--ratio", Math.min(2.4, Math.max(0.6, (width || 4) / (height || 3))));
  tiles.set(id, tile);
  paint(id);
  seen.observe(tile);
  return tile;
}

/** Shows what is decided and proposed for a photo on its tile, if it has one. */
function paint(id) {
  const tile = tiles.get(id), photo = photos.get(id);
  if (!tile) return;
  const [main, no] = tile.children, value = photo.decided[view.label];
  tile.dataset.value = value === 1 ? "yes" : value === 0 ? "no" : "";
  tile.style.setProperty("--c", view.label ? colourOf(view.label) : "");
  tile.classList.toggle("finished", state.labels.length > 0 && state.labels.every(({ name }) => name in photo.decided));
  if (view.label) main.setAttribute("aria-pressed", value === 1);
  else main.removeAttribute("aria-pressed");
  no.hidden = !view.label;
  no.setAttribute("aria-pressed", value === 0);
  no.setAttribute("aria-label", `Not ${view.label}: ${photo.name}`);
  main.lastChild.replaceChildren(...tagsOf(photo));
}

/** One tile can be reached by Tab. */
function setCursor(id) {
  for (const button of tiles.get(cursor)?.querySelectorAll("button") ?? []) button.tabIndex = -1;
  for (const button of tiles.get(id)?.querySelectorAll("button") ?? []) button.tabIndex = 0;
  cursor = id;
}

function focusTile(id) {
  tiles.get(id)?.firstChild.focus({ preventScroll: true });
  tiles.get(id)?.scrollIntoView({ block: "nearest" });
}

/** The photo an arrow leads to: the next one, or the nearest of the row above or below. */
function neighbour(id, key) {
  const at = list.ids.indexOf(id), back = key === "ArrowLeft" || key === "ArrowUp";
  if (key === "ArrowLeft" || key === "ArrowRight") return list.ids[at + (back ? -1 : 1)];
  const here = tiles.get(id), others = back ? list.ids.slice(0, at).reverse() : list.ids.slice(at + 1);
  const top = (other) => tiles.get(other).offsetTop;
  const far = (other) => Math.abs(tiles.get(other).offsetLeft - here.offsetLeft + (tiles.get(other).offsetWidth - here.offsetWidth) / 2);
  const first = others.find((other) => top(other) !== here.offsetTop);
  return others.filter((other) => top(other) === top(first)).sort((a, b) => far(a) - far(b))[0];
}

function remember(found, at) {
  for (const photo of found) {
    photos.set(photo.id, Object.assign(photos.get(photo.id) ?? {}, photo, { stamp: at }));
    paint(photo.id);
  }
}

/** Shows the list from its start, in the order of now. */
async function load() {
  const before = list, mine = (list = { ids: [], offset: 0, total: Infinity, fits: state.fits, busy: false });
  sessionStorage.setItem("view", JSON.stringify(view));
  $("order").querySelector(`[value=${view.order}]`).checked = true;
  $("show").value = view.show;
  $("grid").setAttribute("aria-busy", "true");
  await more();
  if (list !== mine) return;
  if (mine.total === Infinity) list = before; // it failed
  $("grid").setAttribute("aria-busy", "false");
  $("empty").hidden = list.total > 0;
  $("total").textContent = view.show === "all" ? "" : many(list.total, "photo");
  setCursor(list.ids[0] ?? null);
  showAnew();
}

/** Appends photos until there are some below the screen. */
async function more() {
  const mine = list, near = () => mine.offset === 0 || $("end").getBoundingClientRect().top < 3 * innerHeight;
  if (mine.busy || !state) return;
  mine.busy = true;
  await attempt(async () => {
    while (mine.offset < mine.total && near()) {
      const before = edits, at = stamp();
      const found = await getPhotos({ ...view, offset: mine.offset, limit: PAGE });
      if (mine !== list) return;
      if (mine.offset === 0) clearGrid();
      remember(found.photos, before === edits && !waiting ? at : "");
      const fresh = found.photos.map(({ id }) => id).filter((id) => !tiles.has(id)); // the order may have changed
      mine.ids.push(...fresh);
      $("grid").append(...fresh.map(makeTile));
      mine.offset += PAGE;
      mine.total = found.total;
    }
  });
  mine.busy = false;
}

function clearGrid() {
  seen.disconnect();
  onScreen.clear();
  tiles.clear();
  $("grid").replaceChildren();
  scrollTo(0, 0);
}

/** Fetches what is known now of the photos on the screen; none moves. */
async function refresh() {
  if (waiting || !state) return; // the next poll comes when the changes are saved
  const at = stamp(), before = edits, shown = $("photo").open ? [...onScreen, shownPhoto] : [...onScreen];
  const ids = shown.filter((id) => photos.get(id)?.stamp !== at).slice(-PAGE);
  const found = ids.length && (await attempt(() => getThese(ids)));
  if (found && edits === before) remember(found.photos, at);
}

let soon;
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) onScreen[isIntersecting ? "add" : "delete"](Number(target.firstChild.dataset.id));
  clearTimeout(soon);
  soon = setTimeout(refresh, 100);
}, { rootMargin: "30% 0px" });

function showAnew() {
  const fixed = view.order === "name" && view.show === "all";
  $("anew").hidden = fixed || !state.labels.length || !list.ids.length || list.fits === state.fits;
}

// --- a photo

function openPhoto(id) {
  shownPhoto = id;
  reasons = null;
  const photo = photos.get(id), { decided, probabilities: p = {} } = photo;
  $("frame").style.setProperty("--ratio", (photo.width || 4) / (photo.height || 3));
  $("frame").style.backgroundImage = `url("thumb/${id}")`;
  $("photo-image").src = $("heat").src = `photo/${id}?side=1600`;
  $("photo-image").alt = $("photo-name").textContent = photo.name;
  const rank = ({ name }) => (decided[name] ?? 0) + (p?.[name] ?? 0);
  why = view.label || state.labels.toSorted((a, b) => rank(b) - rank(a))[0]?.name;
  if (!$("photo").open) {
    $("photo").showModal();
    $("photo-name").focus();
  }
  showPhoto();
}

async function showPhoto() {
  const id = shownPhoto, photo = photos.get(id), at = list.ids.indexOf(id);
  $("photo-error").hidden = !photo.error;
  $("photo-error").textContent = photo.error ?? "";
  $("previous").disabled = at <= 0;
  $("next").disabled = at < 0 || at === list.ids.length - 1;
  showRows();
  showWhy();
  if (at > list.ids.length - 10) more();
  if (!photo.probabilities) return;
  const found = await attempt(() => get(`api/photos/${id}/reasons`));
  if (!found || id !== shownPhoto) return;
  reasons = found;
  showWhy();
}

function showRows() {
  const photo = photos.get(shownPhoto);
  $("accept").hidden = !state.labels.length;
  replace($("rows"), state.labels.map((label, i) => {
    const { name, threshold } = label, p = photo.probabilities?.[name], value = photo.decided[name];
    const choice = el("button", { className: "name", key: name, "aria-pressed": why === name, title: "Why?" }, el("i"), el("span", {}, name));
    if (KEYS[i]) choice.append(el("kbd", {}, KEYS[i]));
    choice.onclick = () => {
      why = why === name ? "" : name;
      showRows();
      showWhy();
    };
    const bar = el("span", { className: "meter", "aria-hidden": "true" }, el("i"), el("b"));
    bar.firstChild.style.width = `${100 * (p ?? 0)}%`;
    bar.lastChild.style.left = `${100 * threshold}%`;
    const answers = [[1, "yes", "check"], [0, "no", "close"]].map(([wanted, word, symbol]) => {
      const names = { key: `${name} ${word}`, "aria-label": `${name}: ${word}`, "aria-pressed": value === wanted };
      return el("button", { className: `answer ${word}`, ...names, onclick: () => toggle(shownPhoto, name, wanted) }, icon(symbol));
    });
    const row = el("li", { className: "row", label: name }, choice, bar, el("span", { className: "p" }, p === undefined ? "–" : percent(p)), ...answers);
    row.classList.toggle("on", value === 1 || isProposed(photo, label));
    return row;
  }));
}

/** The regions that decided on the chosen label, and in words what else did. */
function showWhy() {
  const found = reasons?.labels.find(({ label }) => label === why);
  $("heat").hidden = !found;
  $("cell").hidden = true;
  if (!found) return $("why").replaceChildren();
  drawHeat(found.heat);
  const [words, examples] = [found.words, found.photos].map(Math.abs), share = words / (words + examples || 1);
  const bar = el("div", { className: "shares", "aria-hidden": "true" }, el("i"), el("b"));
  bar.firstChild.style.width = `${100 * share}%`;
  const shares = [["words", share], ["photos", 1 - share]].map(([name, value]) => el("span", { className: `key ${name}` }, `${name} ${percent(value)}`));
  const nodes = [el("h3", {}, "Why ", el("span", { label: why }, why)), bar, el("p", { className: "legend" }, ...shares)];
  if (found.matches.length) {
    nodes.push(el("h4", {}, "Regions of your examples that it met"), el("ul", { className: "matches" }, ...found.matches.map(matchOf)));
  }
  if (found.classes.length) {
    const classes = found.classes.map(([name, weight]) => el("li", {}, name, el("small", {}, ` ${weight.toFixed(2)}`)));
    nodes.push(el("h4", {}, "ImageNet classes the name was reached through"), el("ul", { className: "classes" }, ...classes));
  }
  replace($("why"), nodes);
}

function outline(node, [row, column], [rows, columns]) {
  const place = { top: row / rows, left: column / columns, height: 1 / rows, width: 1 / columns };
  for (const [side, value] of Object.entries(place)) node.style[side] = `${100 * value}%`;
  return node;
}

function matchOf({ photo, cell, there, there_grid: grid }) {
  const names = { key: `match ${photo}`, title: nameOf(photo), "aria-label": `Open ${nameOf(photo)}` };
  const button = el("button", names, el("img", { src: `thumb/${photo}`, alt: "" }), outline(el("i", { className: "cell" }), there, grid));
  button.onpointerenter = button.onfocus = () => (outline($("cell"), cell, reasons.grid).hidden = false);
  button.onpointerleave = button.onblur = () => ($("cell").hidden = true);
  button.onclick = () => visit(photo);
  return el("li", {}, button);
}

/** Leaves the photo its colours only where the regions spoke for the label. */
function drawHeat(heat) {
  const values = heat.flat(), least = Math.max(0, Math.min(...values)), most = Math.max(...values);
  const canvas = el("canvas", { width: heat[0].length, height: heat.length });
  const context = canvas.getContext("2d"), pixels = context.createImageData(canvas.width, canvas.height);
  values.forEach((value, i) => (pixels.data[4 * i + 3] = most > least ? (255 * (value - least)) / (most - least) : 0));
  context.putImageData(pixels, 0, 0);
  $("heat").style.maskImage = `url(${canvas.toDataURL()})`;
}

/** Opens a photo that the grid may not have loaded. */
async function visit(id) {
  if (!photos.has(id)) await attempt(async () => remember((await getThese([id])).photos, ""));
  if (photos.has(id)) openPhoto(id);
}

function step(by) {
  const at = list.ids.indexOf(shownPhoto);
  if (at >= 0 && at + by in list.ids) openPhoto(list.ids[at + by]);
}

// --- a label

async function showLabel() {
  const name = shownLabel, label = state.labels[indexOf(name)], { open } = $("label");
  if (!label) return $("label").close();
  const best = { label: name, order: "certain", show: "proposed", limit: PAGE };
  const found = await attempt(() => Promise.all([get(`api/labels/${encodeURIComponent(name)}`), getPhotos(best)]));
  if (!found || name !== shownLabel || dragging || open !== $("label").open) return;
  const [{ threshold, examples, judged, precision, recall, ...counts }, proposals] = found;
  for (const photo of proposals.photos) if (!photos.has(photo.id)) photos.set(photo.id, photo);
  $("label").style.setProperty("--c", colourOf(name));
  $("label-name").textContent = name;
  $("label-words").textContent = `Read as ${label.wordings.join(", ")}`;
  $("histogram").replaceChildren(histogramOf(counts));
  setThreshold(threshold);
  const figures = [["Precision", precision, "of those above the threshold are right"], ["Recall", recall, "of the right ones are above it"]];
  $("quality").replaceChildren(...figures.map(([title, value, text]) => {
    const words = el("span", {}, title, el("small", {}, value === null ? "judge a few photos first" : text));
    return el("p", { className: "figure" }, el("b", {}, value === null ? "–" : percent(value)), words);
  }), el("p", { className: "muted" }, `from ${many(judged, "photo")} you judged`));
  $("examples-title").textContent = many(examples.length, "example");
  $("proposals-title").textContent = `${many(proposals.total, "proposal")} above the threshold`;
  replace($("examples"), examples.slice(0, PAGE).map((id) => thumbOf(id)));
  replace($("proposed"), proposals.photos.map(({ id, probabilities }) => thumbOf(id, probabilities[name])));
  if (open) return;
  $("label").showModal();
  $("label-name").focus();
}

function thumbOf(id, p) {
  const image = el("img", { src: `thumb/${id}`, alt: nameOf(id), loading: "lazy" });
  const button = el("button", { key: String(id), title: nameOf(id), onclick: () => visit(id) }, image);
  if (p !== undefined) button.append(el("small", {}, percent(p)));
  return el("li", {}, button);
}

/** All photos upwards, decided ones downwards, each with heights as the root of the counts. */
function histogramOf({ histogram, decided_histogram: { yes, no } }) {
  const both = yes.map((count, i) => count + no[i]), step = 200 / histogram.length;
  const height = (count, counts, room) => room * Math.sqrt(count / Math.max(...counts, 1));
  const bars = histogram.flatMap((count, i) => {
    const up = height(count, histogram, 56), down = height(both[i], both, 22), part = both[i] && (down * yes[i]) / both[i];
    return [["all", 58 - up, up], ["yes", 61, part], ["no", 61 + part, down - part]].map(([kind, y, size]) =>
      svg("rect", { class: kind, x: i * step + 0.75, width: step - 1.5, y, height: size }));
  });
  const text = `${many(sum(histogram), "photo")} by probability; ${sum(yes)} decided yes, ${sum(no)} no`;
  const mark = svg("line", { class: "mark", y1: 0, y2: 84 });
  return svg("svg", { viewBox: "0 0 200 84", preserveAspectRatio: "none", role: "img", "aria-label": text }, ...bars, mark);
}

function setThreshold(value) {
  $("threshold").value = value;
  $("threshold-value").textContent = percent(value);
  const mark = $("histogram").querySelector(".mark"), bars = [...$("histogram").querySelectorAll(".all")];
  for (const end of ["x1", "x2"]) mark.setAttribute(end, 200 * value);
  bars.forEach((bar, i) => bar.classList.toggle("above", i + 0.5 > value * bars.length));
}

// --- files

const exportFile = (format) => attempt(async () => {
  const reply = await call(`api/export?format=${format}&proposals=${Number($("proposals").checked)}`);
  const download = /filename="([^"]+)"/.exec(reply.headers.get("Content-Disposition"))[1];
  const link = el("a", { download, href: URL.createObjectURL(await reply.blob()) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  $("files").hidePopover();
  tell(`Exported ${download}`, JSON.parse(reply.headers.get("X-Left-Out")));
});

async function importFile(file) {
  took(await change("api/import", { name: file.name, content: await file.text() }), file.name);
}

async function importKeywords() {
  took(await change("api/import/keywords", {}), "keywords");
}

function took({ photos: n, labels, changed, skipped, version }, source) {
  $("files").hidePopover();
  const other = changed ? `; ${many(changed, "decision")} changed` : "";
  tell(`Read ${many(n, "photo")} and ${many(labels.length, "label")} from ${source}${other}`, skipped);
  sortWhenFitted = version;
}

async function writeKeywords() {
  const { written, out, skipped } = await change("api/keywords", { out: $("copies").value, proposals: $("proposals").checked });
  $("files").hidePopover();
  tell(`Wrote keywords into copies of ${many(written, "photo")} in ${out}`, skipped);
}

/** Says what was done, and a line for everything that was left out. */
function tell(text, skipped) {
  if (skipped.length) ask(`${text}; left out:`, skipped);
  else say(text);
}

// --- what people do

/** The label whose key was pressed, if any; digits by their place, so that Shift can mean no. */
function labelOf(event) {
  const key = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1] ?? event.key.toLowerCase();
  return key.length === 1 && KEYS.includes(key) ? state.labels[KEYS.indexOf(key)]?.name : undefined;
}

function acceptAndMove(id) {
  accept(id);
  if ($("photo").open) step(1);
  else focusTile(list.ids[list.ids.indexOf(id) + 1]);
}

/** What a key does: a function, or nothing. */
function actionOf(event) {
  const { key, target } = event, viewing = $("photo").open, onTile = !viewing && target.matches(".main");
  if (event.ctrlKey || event.metaKey) return key.toLowerCase() === "z" && !event.shiftKey && undo;
  if (event.altKey) return;
  const id = viewing ? shownPhoto : onTile ? cursor : null, label = labelOf(event);
  const onButton = !onTile && target.closest("button, label"); // which has keys of its own
  if (label !== undefined) return () => (id === null ? choose(label) : toggle(id, label, event.shiftKey ? 0 : 1));
  if (key === "u") return undo;
  if (key === "?") return () => $("keys").showModal();
  if (key === "Enter" && id !== null && !onButton) return () => acceptAndMove(id);
  if (viewing && key === "ArrowLeft") return () => step(-1);
  if (viewing && key === "ArrowRight") return () => step(1);
  if (viewing) return key === " " && !onButton && (() => $("photo").close());
  if (key === "r") return load;
  if (key === "/") return () => $("names").focus();
  if (key === " " && onTile) return () => openPhoto(id);
  if (key.startsWith("Arrow") && onTile) return () => focusTile(neighbour(id, key));
  if (key.startsWith("Arrow") && target === document.body) return () => focusTile(cursor);
}

function onKey(event) {
  const typing = event.target.closest("input:not([type=radio], [type=checkbox]), select");
  if (!state || event.isComposing || typing || document.querySelector("dialog[open]:not(#photo)")) return;
  const action = actionOf(event);
  if (!action) return;
  event.preventDefault();
  action();
}

/** Menus open below their buttons, within the window. */
function place(menu) {
  const { left, bottom } = (menu.opener ?? $("save")).getBoundingClientRect();
  menu.style.top = `${bottom + 6}px`;
  menu.style.left = `${Math.max(8, Math.min(left - 20, innerWidth - menu.offsetWidth - 8))}px`;
}

const menu = {
  view: (name) => ((shownLabel = name), showLabel()),
  change: (name) => (($("names").value = `${name} = ${state.labels[indexOf(name)].wordings.join(" | ")}`), $("names").focus()),
  remove: (name) => attempt(() => removeLabel(name)),
};
const submit = (form, action) => (form.onsubmit = (event) => (event.preventDefault(), attempt(action)));

function listen() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("keyup", (event) => event.key === " " && event.target.matches(".main") && event.preventDefault()); // else it clicks
  submit($("add"), () => addLabels($("names").value));
  submit($("keywords"), writeKeywords);
  $("order").onchange = ({ target }) => ((view.order = target.value), load());
  $("show").onchange = ({ target }) => ((view.show = target.value), load());
  $("undo").onclick = undo;
  $("help").onclick = () => $("keys").showModal();
  $("anew").onclick = load;
  $("unreadable").onclick = () => ask("Photos that cannot be read", state.unreadable.map(({ name, why: text }) => `${name}: ${text}`));
  $("accept").onclick = () => acceptAndMove(shownPhoto);
  $("previous").onclick = () => step(-1);
  $("next").onclick = () => step(1);
  $("ask-yes").onclick = () => $("ask").close("yes");
  $("threshold").oninput = ({ target }) => ((dragging = true), setThreshold(Number(target.value)));
  $("threshold").onchange = ({ target }) => {
    dragging = false;
    attempt(() => change("api/threshold", { label: shownLabel, value: Number(target.value) }));
  };
  for (const button of document.querySelectorAll("[data-format]")) button.onclick = () => exportFile(button.dataset.format);
  $("readkeywords").onclick = () => attempt(importKeywords);
  $("choose").onclick = () => $("import").click();
  $("import").onchange = ({ target }) => attempt(() => importFile(target.files[0])).then(() => (target.value = ""));
  for (const button of $("chip-menu").children) {
    button.onclick = () => ($("chip-menu").hidePopover(), menu[button.dataset.do]($("chip-menu").owner));
  }
  for (const popover of document.querySelectorAll("[popover]")) popover.ontoggle = ({ newState }) => newState === "open" && place(popover);
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", ({ target }) => (target === dialog || target.closest("[data-close]")) && dialog.close());
  }
  $("photo").addEventListener("close", () => !$("label").open && focusTile(shownPhoto));
  let touch;
  $("stage").ontouchstart = ({ touches }) => (touch = touches.length === 1 ? touches[0] : null);
  $("stage").ontouchend = ({ changedTouches: [{ clientX, clientY }] }) => {
    const x = clientX - touch?.clientX, y = clientY - touch?.clientY;
    if (Math.abs(x) > 50 && Math.abs(x) > 2 * Math.abs(y)) step(x > 0 ? -1 : 1);
  };
  let lowest = 0; // since the top
  addEventListener("scroll", () => {
    if (scrollY < 4 && lowest > 200 && !$("anew").hidden) load();
    lowest = scrollY < 4 ? 0 : Math.max(lowest, scrollY);
  }, { passive: true });
  new IntersectionObserver(more, { rootMargin: "200% 0px" }).observe($("end"));
}

document.body.dataset.waiting = 0; // changes that are not saved yet
listen();
poll();
