"use strict";
// The page's parts: data, what is shown (`view`), geometry, the stage, the list and the figures, input, start.
(() => {
  const $ = (id) => document.getElementById(id);
  const page = JSON.parse($("page").textContent);
  const { methods, metrics, pictures } = page;
  const LARGEST_PIXEL = 16;  // one pixel of the picture, at the largest zoom, in pixels of the page
  const THEMES = ["", "light", "dark"];
  const read = new Map();  // the pictures of a few places in the list

  const view = {
    picture: 0, left: page.left, right: page.right, tiles: false, smooth: false, mean: false,
    divider: 0.5, zoom: 1, x: 0.5, y: 0.5,  // zoom 1 is the whole picture; x, y is the place in the middle, from 0 to 1
    sort: -1, of: page.right, down: false,  // sort -1 is by name
  };
  let order = pictures.map((_, index) => index);
  let panes = [];

  // ---- data

  function sources(index) {
    if (!read.has(index)) {
      if (read.size > 2) read.delete(read.keys().next().value);
      read.set(index, JSON.parse($(`p${index}`).textContent));
    }
    return read.get(index);
  }

  // Numbers that JSON lacks come as text; null is no figure.
  const figure = (picture, method, metric) => {
    const value = picture.figures[method]?.[metric];
    return value === null || value === undefined ? NaN : Number(value);
  };

  function mean(method, metric) {
    const values = pictures.map((picture) => figure(picture, method, metric)).filter((value) => !Number.isNaN(value));
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : NaN;
  }

  function written(value, metric) {
    if (Number.isNaN(value)) return "–";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    return value.toFixed(metrics[metric].digits).replace("-", "−");
  }

  // How good a figure is: larger is better.
  function merit(value, metric) {
    const better = metrics[metric].better;
    return better === "higher" ? value : better === "lower" ? -value : -Math.abs(value - 1);
  }

  const arrow = { higher: " ↑", lower: " ↓", one: " →1" };

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  // ---- geometry: all in pixels of the page, within a pane

  function scaleOf(pane) {
    const { width, height } = pictures[view.picture];
    const fit = Math.min(pane.clientWidth / width, pane.clientHeight / height) || 1;
    return { width, height, fit, scale: fit * view.zoom };
  }

  function rectangle(pane) {
    const { width, height, scale } = scaleOf(pane);
    return {
      left: pane.clientWidth / 2 - view.x * width * scale, top: pane.clientHeight / 2 - view.y * height * scale,
      width: width * scale, height: height * scale,
    };
  }

  // The part of the pane that the picture covers: the slider keeps within it.
  function covered(pane) {
    const { left, width } = rectangle(pane);
    return { from: Math.max(0, left), to: Math.min(pane.clientWidth, left + width) };
  }

  function keepInside() {
    const pane = panes[0].pane;
    const { width, height, fit, scale } = scaleOf(pane);
    view.zoom = Math.min(Math.max(view.zoom, 1), Math.max(1, LARGEST_PIXEL / fit));
    const clamp = (place, size, room) => {
      const half = room / (2 * size);
      return half >= 0.5 ? 0.5 : Math.min(Math.max(place, half), 1 - half);
    };
    view.x = clamp(view.x, width * scale, pane.clientWidth);
    view.y = clamp(view.y, height * scale, pane.clientHeight);
  }

  // Zoom so that what is at (x, y) of the pane stays there.
  function zoomBy(factor, pane = panes[0].pane, x = pane.clientWidth / 2, y = pane.clientHeight / 2) {
    const before = rectangle(pane);
    const place = { x: (x - before.left) / before.width, y: (y - before.top) / before.height };
    const largest = Math.max(1, LARGEST_PIXEL / scaleOf(pane).fit);
    view.zoom = Math.min(Math.max(view.zoom * factor, 1), largest);
    const after = rectangle(pane);
    view.x = place.x - (x - pane.clientWidth / 2) / after.width;
    view.y = place.y - (y - pane.clientHeight / 2) / after.height;
    arrange();
  }

  function moveBy(dx, dy, pane = panes[0].pane) {
    const { width, height } = rectangle(pane);
    view.x -= dx / width;
    view.y -= dy / height;
    arrange();
  }

  function actualSize() {
    zoomBy(1 / ((window.devicePixelRatio || 1) * scaleOf(panes[0].pane).scale));
  }

  // ---- the stage

  // Figures of one method, for captions.
  function spans(method) {
    return metrics
      .map((metric, index) => [metric, figure(pictures[view.picture], method, index), index])
      .filter(([, value]) => !Number.isNaN(value))
      .map(([metric, value, index]) => element("span", { textContent: `${metric.title} ${written(value, index)}` }));
  }

  function paneOf(method) {
    const pane = element("div", { className: "pane" });
    const shown = sources(view.picture)[method];
    if (!shown) {
      pane.append(element("div", { className: "none", textContent: `No picture of ${methods[method]}` }));
      return { pane, image: null };
    }
    // Made once, so that exchanging two methods shows no blank in between.
    shown.image ??= element("img", { alt: `${pictures[view.picture].name}, ${methods[method]}`, draggable: false, src: shown.src });
    pane.append(shown.image);
    return { pane, image: shown.image, width: shown.width };
  }

  function label(method, tag, className) {
    const name = element("b", { dir: "auto", textContent: methods[method] });
    return element(tag, { className }, name, ...spans(method));
  }

  function drawStage() {
    const stage = $("stage");
    stage.replaceChildren();
    stage.classList.toggle("tiles", view.tiles);
    stage.style.gridTemplateColumns = stage.style.gridTemplateRows = "";
    stage.style.setProperty("--ratio", pictures[view.picture].height / pictures[view.picture].width);
    if (view.tiles) {
      panes = methods.map((_, method) => paneOf(method));
      panes.forEach((made, method) => {
        stage.append(element("div", { className: "tile" }, made.pane, label(method, "div", "caption")));
      });
      const count = columns();
      stage.style.gridTemplateColumns = `repeat(${count}, minmax(0, 1fr))`;
      stage.style.gridTemplateRows = `repeat(${Math.ceil(methods.length / count)}, minmax(0, 1fr) auto)`;
    } else {
      panes = [paneOf(view.left), paneOf(view.right)];
      const handle = element("div", { id: "handle", tabIndex: 0, role: "slider" });
      handle.setAttribute("aria-label", "Boundary between left and right, in per cent");
      handle.setAttribute("aria-valuemin", "0");
      handle.setAttribute("aria-valuemax", "100");
      stage.append(panes[0].pane, panes[1].pane, handle);
      stage.append(label(view.left, "div", "chip left"), label(view.right, "div", "chip right"));
    }
    arrange();
  }

  // As many columns as make the pictures largest.
  function columns() {
    if (matchMedia("(max-width: 820px)").matches) return 1;
    const { width, height } = pictures[view.picture];
    const stage = $("stage");
    let best = 1, largest = 0;
    for (let count = 1; count <= methods.length; count += 1) {
      const rows = Math.ceil(methods.length / count);
      const scale = Math.min(stage.clientWidth / count / width, (stage.clientHeight / rows - 28) / height);
      if (scale > largest) [best, largest] = [count, scale];
    }
    return best;
  }

  function arrange() {
    keepInside();
    const ratio = window.devicePixelRatio || 1;
    for (const { pane, image, width } of panes) {
      if (!image) continue;
      const at = rectangle(pane);
      for (const side of ["left", "top", "width", "height"]) image.style[side] = `${at[side]}px`;
      image.classList.toggle("pixels", !view.smooth && (at.width * ratio) / width >= 1.5);
    }
    if (!view.tiles) {
      const { from, to } = covered(panes[0].pane);
      const at = from + view.divider * (to - from);
      panes[0].pane.style.clipPath = `inset(0 ${panes[0].pane.clientWidth - at}px 0 0)`;
      panes[1].pane.style.clipPath = `inset(0 0 0 ${at}px)`;
      $("handle").style.left = `${at}px`;
      $("handle").setAttribute("aria-valuenow", String(Math.round(view.divider * 100)));
    }
    const { scale } = scaleOf(panes[0].pane);
    $("zoom").textContent = `${Math.round(scale * ratio * 100)} %`;
    $("zoom-out").disabled = $("fit").disabled = view.zoom <= 1;
  }

  function setDivider(x) {
    const { from, to } = covered(panes[0].pane);
    view.divider = Math.min(Math.max((x - from) / (to - from || 1), 0), 1);
    arrange();
  }

  // ---- the list and the figures

  function sort() {
    const key = (index) => merit(figure(pictures[index], view.of, view.sort), view.sort);
    order = pictures.map((_, index) => index);
    if (view.sort >= 0) {
      // Up: the smallest figure first. Pictures without the figure come last either way.
      const value = (index) => figure(pictures[index], view.of, view.sort);
      const last = order.filter((index) => Number.isNaN(value(index)));
      const known = order.filter((index) => !Number.isNaN(key(index)));
      known.sort((one, other) => (value(one) === value(other) ? one - other : value(one) < value(other) ? -1 : 1));
      order = [...(view.down ? known.reverse() : known), ...last];
    } else if (view.down) {
      order.reverse();
    }
  }

  function drawList() {
    sort();
    $("direction").textContent = view.down ? "↓" : "↑";
    $("direction").title = view.down ? "Descending: press for ascending (r)" : "Ascending: press for descending (r)";
    $("direction").setAttribute("aria-label", view.down ? "Descending" : "Ascending");
    const items = order.map((index) => {
      const picture = pictures[index];
      const shown = view.sort >= 0 ? [view.sort] : metrics.map((_, metric) => metric).slice(0, 2);
      const text = shown
        .map((metric) => `${metrics[metric].title} ${written(figure(picture, view.of, metric), metric)}`)
        .join(" · ");
      const thumb = element("img", { alt: "", loading: "lazy", src: picture.thumb });
      const name = element("bdi", { textContent: picture.name, title: picture.name });
      const button = element("button", { type: "button" }, thumb, name, element("small", { textContent: text }));
      button.addEventListener("click", () => show(index));
      button.dataset.picture = index;
      return element("li", {}, button);
    });
    $("list").replaceChildren(...items);
    mark();
  }

  function mark() {
    for (const button of $("list").querySelectorAll("button")) {
      const current = Number(button.dataset.picture) === view.picture;
      button.setAttribute("aria-current", String(current));
      // Within the list only: the page itself stays where it is.
      const list = $("list");
      if (current && list.scrollHeight > list.clientHeight) {
        const above = button.offsetTop - list.offsetTop;
        if (above < list.scrollTop) list.scrollTop = above;
        const below = above + button.offsetHeight - list.clientHeight;
        if (below > list.scrollTop) list.scrollTop = below;
      }
    }
  }

  function drawFigures() {
    const picture = pictures[view.picture];
    $("name").textContent = picture.name;
    $("size").textContent = picture.size;
    if (!metrics.length) return;
    const value = (method, metric) => (view.mean ? mean(method, metric) : figure(picture, method, metric));
    const best = metrics.map((_, metric) => {
      const merits = methods.map((_, method) => merit(value(method, metric), metric)).filter((x) => !Number.isNaN(x));
      return Math.max(...merits);
    });
    const head = metrics.map((metric) =>
      element("th", { scope: "col", title: metric.note, textContent: metric.title + arrow[metric.better] }));
    const rows = methods.map((name, method) => {
      const cells = metrics.map((_, metric) => {
        const cell = element("td", { textContent: written(value(method, metric), metric) });
        cell.classList.toggle("best", merit(value(method, metric), metric) === best[metric]);
        return cell;
      });
      if (methods.every((_, other) => metrics.every((_, metric) => other !== method || Number.isNaN(value(other, metric))))) return null;
      const row = element("tr", {}, element("th", { scope: "row", dir: "auto", textContent: name, title: name }), ...cells);
      row.classList.toggle("chosen", !view.tiles && (method === view.left || method === view.right));
      return row;
    });
    const title = element("th", { scope: "col", textContent: view.mean ? `Mean of ${pictures.length}` : "" });
    $("figures").replaceChildren(element("table", {},
      element("thead", {}, element("tr", {}, title, ...head)), element("tbody", {}, ...rows.filter(Boolean))));
  }

  function draw() {
    $("left").value = view.left;
    $("right").value = view.right;
    for (const id of ["left", "right", "swap"]) $(id).disabled = view.tiles;
    for (const [id, on] of [["mode-slider", !view.tiles], ["mode-tiles", view.tiles], ["of-picture", !view.mean],
      ["of-all", view.mean]]) $(id).setAttribute("aria-pressed", String(on));
    const place = order.indexOf(view.picture);
    $("previous").disabled = place <= 0;
    $("next").disabled = place >= order.length - 1;
    drawFigures();
    drawStage();
  }

  function show(index) {
    view.picture = index;
    draw();
    mark();
  }

  function step(by) {
    const place = order.indexOf(view.picture) + by;
    if (place >= 0 && place < order.length) show(order[place]);
  }

  function swap() {
    [view.left, view.right] = [view.right, view.left];
    draw();
  }

  function turn(side, by) {
    view[side] = (view[side] + by + methods.length) % methods.length;
    draw();
  }

  function reverse() {
    view.down = !view.down;
    drawList();
    draw();
  }

  // ---- input

  const pointers = new Map();
  let sliding = false;

  function paneAt(event) {
    return view.tiles ? event.target.closest(".pane") : panes[0].pane;
  }

  function within(event, pane) {
    const box = pane.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  function pointerDown(event) {
    if (event.button !== 0) return;
    const stage = $("stage");
    const pane = paneAt(event);
    if (!pane) return;
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY, pane });
    stage.setPointerCapture(event.pointerId);
    if (pointers.size === 1) {
      // The whole picture cannot be moved: there, dragging anywhere moves the slider.
      sliding = !view.tiles && (event.target.id === "handle" || view.zoom <= 1);
      if (sliding) setDivider(within(event, pane).x);
      else stage.classList.add("dragging");
    } else {
      sliding = false;
    }
  }

  function pointerMove(event) {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const now = { x: event.clientX, y: event.clientY, pane: before.pane };
    if (pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      const distance = (point) => Math.hypot(point.x - other.x, point.y - other.y);
      const middle = within({ clientX: (now.x + other.x) / 2, clientY: (now.y + other.y) / 2 }, before.pane);
      moveBy((now.x - before.x) / 2, (now.y - before.y) / 2, before.pane);
      if (distance(before) > 0) zoomBy(distance(now) / distance(before), before.pane, middle.x, middle.y);
    } else if (sliding) {
      setDivider(within(event, before.pane).x);
    } else {
      moveBy(now.x - before.x, now.y - before.y, before.pane);
    }
    pointers.set(event.pointerId, now);
  }

  function pointerUp(event) {
    pointers.delete(event.pointerId);
    if (!pointers.size) sliding = false;
    $("stage").classList.remove("dragging");
  }

  function doubleClick(event) {
    const pane = paneAt(event);
    if (!pane || event.target.id === "handle") return;
    const { x, y } = within(event, pane);
    if (view.zoom > 1) fit();
    else zoomBy(Math.max(2, 1 / ((window.devicePixelRatio || 1) * scaleOf(pane).scale)), pane, x, y);
  }

  function fit() {
    [view.zoom, view.x, view.y] = [1, 0.5, 0.5];
    arrange();
  }

  function wheel(event) {
    const pane = paneAt(event);
    if (!pane) return;
    event.preventDefault();
    const { x, y } = within(event, pane);
    zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), pane, x, y);
  }

  const KEYS = {
    ArrowUp: () => step(-1), k: () => step(-1), ArrowDown: () => step(1), j: () => step(1),
    "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: fit, 1: actualSize,
    s: swap, a: () => setTiles(!view.tiles), r: reverse,
    "[": () => turn("right", -1), "]": () => turn("right", 1), "{": () => turn("left", -1), "}": () => turn("left", 1),
    "?": () => $("help").showModal(),
  };

  function keyDown(event) {
    const typing = event.target.closest("select, dialog");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const across = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.shiftKey && event.key.startsWith("Arrow")) {
      const down = { ArrowUp: 1, ArrowDown: -1 }[event.key] || 0;
      moveBy(-60 * (across || 0), 60 * down);
    } else if (across) {
      if (view.tiles) return;
      view.divider = Math.min(Math.max(view.divider + across * 0.02, 0), 1);
      arrange();
    } else if (event.key === " ") {
      if (event.target.closest("button, input, summary")) return;  // there it means a click
      if (!event.repeat && !view.tiles) swap();
    } else if (Object.hasOwn(KEYS, event.key)) {
      KEYS[event.key]();
    } else {
      return;
    }
    event.preventDefault();
  }

  function keyUp(event) {
    if (event.key === " " && !view.tiles && !event.target.closest("button, input, summary, select, dialog")) swap();
  }

  function setTiles(on) {
    view.tiles = on;
    draw();
  }

  function setTheme() {
    const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme || "") + 1) % THEMES.length];
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    $("theme").textContent = `Theme: ${theme || "auto"}`;
  }

  // ---- start

  function fill(select, names, first) {
    select.replaceChildren(...names.map((name, index) => element("option", { value: index + first, textContent: name })));
  }

  function start() {
    for (const id of ["left", "right", "sort-of"]) fill($(id), methods, 0);
    fill($("sort"), ["name", ...metrics.map((metric) => metric.title)], -1);
    $("sort-of").value = view.of;
    $("count").textContent = `${pictures.length} picture${pictures.length === 1 ? "" : "s"}`;
    $("notes").hidden = !page.notes.length;
    $("notes").querySelector("summary").textContent = `Notes (${page.notes.length})`;
    $("notes").querySelector("ul").append(...page.notes.map((note) => element("li", { dir: "auto", textContent: note })));
    for (const id of ["of-picture", "of-all"]) $(id).hidden = !metrics.length;
    for (const id of ["sort", "sort-of"]) $(id).hidden = document.querySelector(`[for=${id}]`).hidden = !metrics.length;

    const stage = $("stage");
    stage.addEventListener("pointerdown", pointerDown);
    stage.addEventListener("pointermove", pointerMove);
    stage.addEventListener("pointerup", pointerUp);
    stage.addEventListener("pointercancel", pointerUp);
    stage.addEventListener("dblclick", doubleClick);
    stage.addEventListener("wheel", wheel, { passive: false });
    document.addEventListener("keydown", keyDown);
    document.addEventListener("keyup", keyUp);
    new ResizeObserver(() => (view.tiles ? drawStage() : arrange())).observe(stage);

    const clicks = {
      swap, fit, actual: actualSize, theme: setTheme, direction: reverse,
      "zoom-in": () => zoomBy(1.5), "zoom-out": () => zoomBy(1 / 1.5), previous: () => step(-1), next: () => step(1),
      "mode-slider": () => setTiles(false), "mode-tiles": () => setTiles(true), "help-open": () => $("help").showModal(),
      "of-picture": () => { view.mean = false; draw(); }, "of-all": () => { view.mean = true; draw(); },
    };
    for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", action);
    const choices = { left: "left", right: "right", sort: "sort", "sort-of": "of" };
    for (const [id, field] of Object.entries(choices)) {
      $(id).addEventListener("change", (event) => {
        view[field] = Number(event.target.value);
        if (field === "sort" && view.sort >= 0) view.down = metrics[view.sort].better === "lower";
        drawList();
        draw();
      });
    }
    $("smooth").addEventListener("change", (event) => { view.smooth = event.target.checked; arrange(); });
    drawList();
    view.picture = order[0];
    draw();
    mark();
  }

  start();
})();
