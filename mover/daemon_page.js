// Keeps the page up to date: bars move with the event stream, everything else is fetched as the server renders it.
"use strict";
(() => {
  const QUICK_MS = 1000, SLOW_MS = 5000, PATIENCE_MS = 10000, LONG_MS = 60000;
  let timer = 0, due = Infinity, busy = false, lost = null;

  const later = (ms) => {
    const at = Date.now() + ms;
    if (busy || at >= due) return;
    clearTimeout(timer);
    due = at;
    timer = setTimeout(refresh, ms);
  };

  const selected = (element) => {
    const selection = document.getSelection();
    return selection && !selection.isCollapsed && element.contains(selection.anchorNode);
  };

  // Only what changed is replaced, so that focus, scroll positions and what is being read aloud stay.
  const replace = (before, after) => {
    if (before.outerHTML === after.outerHTML || selected(before)) return;
    const active = document.activeElement;
    const focused = before.contains(active);
    const scroll = before.querySelector(".scroll");
    const left = scroll ? scroll.scrollLeft : 0;
    before.replaceWith(after);
    if (focused) {  // what is gone leaves the focus near where it was
      const next = document.getElementById(active.id) ?? after.querySelector("[tabindex], a") ?? document.getElementById("main");
      next.focus({ preventScroll: true });
    }
    const moved = after.querySelector(".scroll");
    if (moved) moved.scrollLeft = left;
  };

  const show = (text) => {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    document.title = fresh.title;
    for (const id of ["head", "main"]) {
      const here = document.getElementById(id), there = fresh.getElementById(id);
      if (!here || !there) return location.reload();
      for (const part of [...here.children]) if (!part.id || !fresh.getElementById(part.id)) part.remove();
      let previous = null;
      for (const part of [...there.children]) {
        const known = document.getElementById(part.id);
        if (known) replace(known, document.importNode(part, true));
        else if (previous) previous.after(document.importNode(part, true));
        else here.prepend(document.importNode(part, true));
        previous = document.getElementById(part.id);
      }
    }
    replace(document.getElementById("uptime"), document.importNode(fresh.getElementById("uptime"), true));
  };

  const connected = (yes) => {
    if (yes) lost = null;
    else lost ??= new Date();
    const offline = document.getElementById("offline");
    offline.hidden = yes;
    document.body.classList.toggle("lost", !yes);
    if (!yes) offline.textContent = `No answer from the daemon since ${lost.toLocaleTimeString()}: what is below is how it was then.`;
  };

  async function refresh() {
    busy = true;
    due = Infinity;
    try {
      const answer = await fetch("/", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
      if (answer.status === 401) return location.reload();
      if (!answer.ok) throw new Error(String(answer.status));
      show(await answer.text());
      connected(true);
    } catch {
      connected(false);
    }
    busy = false;
    later(SLOW_MS);
  }

  const bytes = (size) => {
    let unit = 0;
    for (; size >= 1024 && unit < 5; unit++) size /= 1024;
    return `${size.toFixed(unit ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit]}`;
  };

  const move = (event) => {
    const { job_id: job, dataset } = JSON.parse(event.data);
    if (!dataset) return;
    for (const bar of document.querySelectorAll("progress[data-job]")) {
      if (bar.dataset.job !== job || bar.dataset.dataset !== dataset.dataset_id) continue;
      if (bar.dataset.stage !== dataset.stage) later(QUICK_MS);
      else if (dataset.total_bytes) {
        bar.value = dataset.done_bytes / dataset.total_bytes;
        const whole = dataset.work_total_bytes;
        const share = whole ? `, ${Math.floor((100 * dataset.work_done_bytes) / whole)}% of the dataset` : "";
        bar.nextElementSibling.textContent = `${bytes(dataset.done_bytes)} of ${bytes(dataset.total_bytes)}${share}`;
      }
    }
  };

  let pause = SLOW_MS;
  const listen = () => {
    const source = new EventSource("/v1/events");
    source.addEventListener("open", () => {
      pause = SLOW_MS;
      later(QUICK_MS);  // the stream begins with now: what changed before it is on the page
    });
    source.addEventListener("progress", move);
    source.addEventListener("state", () => later(QUICK_MS));
    source.addEventListener("end", () => later(QUICK_MS));
    source.addEventListener("error", () => {  // refused, not broken off: the browser does not come back by itself
      if (source.readyState === EventSource.CLOSED) {
        setTimeout(listen, pause);
        pause = Math.min(pause * 2, LONG_MS);
      }
    });
    addEventListener("pagehide", () => source.close());
  };

  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) later(0); });
  listen();
  later(SLOW_MS);
})();
