// Light or dark, as the person chose last; and boxes for regions, which write into a text field.
(() => {
  const scheme = localStorage.getItem("sbora-scheme");
  const apply = (dark) => document.body.classList.toggle("dark", dark);
  addEventListener("DOMContentLoaded", () => {
    if (scheme) setTimeout(() => apply(scheme === "dark"), 0);
  });
  document.addEventListener("click", (event) => {
    if (!event.target.closest?.("#scheme")) return;
    const dark = !document.body.classList.contains("dark");
    apply(dark);
    localStorage.setItem("sbora-scheme", dark ? "dark" : "light");
  });

  const TINTS = ["#0d9488", "#d97706", "#7c3aed", "#db2777", "#2563eb", "#65a30d"];
  const LINE = /^\s*([\w-]+)\s*=\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*$/;
  const field = () => document.querySelector("#regions textarea");
  const canvas = () => document.querySelector("#region-canvas");
  let shown = null;

  const read = (text) => text.split("\n").map((line) => LINE.exec(line)).filter(Boolean)
    .map(([, name, ...box]) => ({name, box: box.map(Number)}));
  const rounded = (value) => Math.round(value * 100) / 100;

  function write(regions) {
    const text = regions.map(({name, box}) => `${name}=${box.map(rounded).join(",")}`).join("\n");
    field().value = text;
    field().dispatchEvent(new Event("input", {bubbles: true}));
    draw(text);
  }

  function draw(text) {
    const place = canvas();
    if (!place) return;
    shown = text;
    const regions = read(text);
    const focused = document.activeElement?.dataset?.region;
    place.replaceChildren(...regions.map((region, k) => box(region, k, regions)));
    if (!regions.length) {
      const note = text.trim() === "auto"
        ? "Each concept goes where the base would put it."
        : "No regions: every concept acts on the whole picture.";
      place.innerHTML = `<div class="none">${note}</div>`;
    }
    if (focused !== undefined) place.children[focused]?.focus();
  }

  function box({name, box: [x0, y0, x1, y1]}, k, regions) {
    const element = document.createElement("div");
    element.className = "region";
    element.tabIndex = 0;
    element.dataset.region = k;
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", `region of ${name}: arrows move it, with Shift resize it`);
    const percent = (value) => `${100 * value}%`;
    Object.assign(element.style, {
      left: percent(x0), top: percent(y0), width: percent(x1 - x0), height: percent(y1 - y0),
    });
    element.style.setProperty("--tint", TINTS[k % TINTS.length]);
    const label = document.createElement("b");
    label.textContent = name;
    element.append(label, document.createElement("i"));
    const change = (dx, dy, resize) => {
      regions[k].box = resize ? resized([x0, y0, x1, y1], dx, dy) : moved([x0, y0, x1, y1], dx, dy);
      return regions;
    };
    element.addEventListener("pointerdown", (event) => drag(event, element, change));
    element.addEventListener("keydown", (event) => {
      const step = {ArrowLeft: [-.05, 0], ArrowRight: [.05, 0], ArrowUp: [0, -.05],
        ArrowDown: [0, .05]}[event.key];
      if (!step) return;
      event.preventDefault();
      write(change(...step, event.shiftKey));
    });
    return element;
  }

  function drag(event, element, change) {
    event.preventDefault();
    element.focus();
    const {width, height} = canvas().getBoundingClientRect();
    const resize = event.target.tagName === "I";
    const at = (now) => [(now.clientX - event.clientX) / width, (now.clientY - event.clientY) / height];
    const follow = (now) => {
      const [x0, y0, x1, y1] = change(...at(now), resize)[element.dataset.region].box;
      Object.assign(element.style, {left: `${100 * x0}%`, top: `${100 * y0}%`,
        width: `${100 * (x1 - x0)}%`, height: `${100 * (y1 - y0)}%`});
    };
    const end = (now) => {
      removeEventListener("pointermove", follow);
      removeEventListener("pointerup", end);
      write(change(...at(now), resize));
    };
    addEventListener("pointermove", follow);
    addEventListener("pointerup", end);
  }

  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  function moved([x0, y0, x1, y1], dx, dy) {
    const x = clamp(x0 + dx, 0, 1 - (x1 - x0)), y = clamp(y0 + dy, 0, 1 - (y1 - y0));
    return [x, y, x + x1 - x0, y + y1 - y0];
  }
  function resized([x0, y0, x1, y1], dx, dy) {
    return [x0, y0, clamp(x1 + dx, x0 + .1, 1), clamp(y1 + dy, y0 + .1, 1)];
  }

  // The server writes into the field too, and no event says so.
  setInterval(() => {
    const text = field()?.value;
    const sides = /(\d+)\s*[x×*]\s*(\d+)/.exec(document.querySelector("#size input")?.value ?? "");
    if (canvas() && sides) canvas().style.aspectRatio = `${sides[1]} / ${sides[2]}`;
    if (text !== undefined && (text !== shown || !canvas()?.children.length)) draw(text);
  }, 300);
})();
