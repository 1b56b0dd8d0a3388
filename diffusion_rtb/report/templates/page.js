"use strict";
(() => {
  const $ = (id) => document.getElementById(id);

  // Colours: as the system, light, dark. A file opened from disk may have no storage; then the choice lasts as long as the page.
  const root = document.documentElement, theme = $("theme"), kinds = ["system", "light", "dark"];
  const colours = (kind) => {
    if (kind === "system") root.removeAttribute("data-colours");
    else root.setAttribute("data-colours", kind);
    theme.textContent = kind === "system" ? "Colours: as the system" : `Colours: ${kind}`;
    theme.dataset.kind = kind;
  };
  const stored = (value) => {
    try {
      if (value) localStorage.setItem("colours", value);
      return localStorage.getItem("colours");
    } catch { return null; }
  };
  const before = stored();
  colours(kinds.includes(before) ? before : "system");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = kinds[(kinds.indexOf(theme.dataset.kind) + 1) % kinds.length];
    colours(next);
    stored(next);
  });

  // The numbers as a file.
  const download = $("download");
  download.hidden = false;
  download.addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([$("numbers").textContent], { type: "application/json" }));
    const link = Object.assign(document.createElement("a"), { href: url, download: "numbers.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });

  // Sorting: titles become buttons; numbers by their value, names as people order them, what is missing last.
  const key = (row, column) => row.cells[column].dataset.value;
  const compare = (column, sign) => (a, b) => {
    if (column === 0) return sign * a.cells[0].textContent.localeCompare(b.cells[0].textContent, undefined, { numeric: true });
    const [x, y] = [key(a, column), key(b, column)];
    if (x === undefined || y === undefined) {
      if (x === y) return sign * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
      return x === undefined ? 1 : -1;
    }
    return sign * (Number(x) - Number(y));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const titles = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    titles.forEach((title, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...title.childNodes);
      title.append(button);
      button.addEventListener("click", () => {
        const first = column === 0 ? "ascending" : "descending", second = column === 0 ? "descending" : "ascending";
        const order = title.getAttribute("aria-sort") === first ? second : first;
        titles.forEach((other) => other.removeAttribute("aria-sort"));
        title.setAttribute("aria-sort", order);
        body.append(...[...body.rows].sort(compare(column, order === "ascending" ? 1 : -1)));
      });
    });
  }

  // Zoom: Esc closes and gives the focus back, both by the browser; arrows, buttons and swipes go through all pictures.
  const dialog = $("zoom"), zoomed = $("zoomed"), words = $("zoomed-words");
  const pictures = [...document.querySelectorAll("button.picture")];
  let at = 0;
  const show = (index) => {
    at = (index + pictures.length) % pictures.length;
    const image = pictures[at].querySelector("img");
    zoomed.src = image.src;
    zoomed.className = image.className;
    zoomed.alt = image.alt;
    words.textContent = `${at + 1} of ${pictures.length}: ${image.alt}`;
  };
  pictures.forEach((picture, index) => picture.addEventListener("click", () => { show(index); dialog.showModal(); }));
  $("before").addEventListener("click", () => show(at - 1));
  $("after").addEventListener("click", () => show(at + 1));
  $("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => pictures[at].focus());
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); show(at + step); }
  });
  let from = null;
  dialog.addEventListener("touchstart", (event) => { from = event.touches.length === 1 ? event.touches[0].clientX : null; }, { passive: true });
  dialog.addEventListener("touchend", (event) => {
    if (from === null) return;
    const moved = event.changedTouches[0].clientX - from;
    if (Math.abs(moved) > 40) show(at + (moved < 0 ? 1 : -1));
    from = null;
  });
})();
