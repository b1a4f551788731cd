/* Responses with the colour of a number behind each token, and every number of the token that one points at. */

const IN_WORDS = {
  token_rewards: "total", rewards: "after KL", advantages: "advantage", returns: "return", values: "value", kl: "KL",
  ratio: "ratio", importance: "importance weight", old_logprobs: "log-prob, before the step",
  new_logprobs: "log-prob, last pass", ref_logprobs: "log-prob, reference", rollout_logprobs: "log-prob, writer",
};
const CENTRE = { ratio: 1, importance: 1 }; // where nothing happened

/* The ledger's number: nine digits tell every float32 from its neighbours. */
function exact(x) {
  if (x === null || x === undefined) return "–";
  return typeof x === "string" ? x : String(Number(x.toPrecision(9)));
}
const signed = (x) => (typeof x === "number" && x > 0 ? "+" : "") + exact(typeof x === "number" ? Number(x.toPrecision(3)) : x);

/* Text as it is, with what one could not see made visible: ends of lines, tabs, controls, marks of direction. */
const UNSEEN = /([\n\t]|(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}])/u;
const code = (c) => "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
function fill(element, text) {
  for (const part of text.split(UNSEEN)) {
    if (part === "\n" || part === "\t") {
      const mark = make("span", "mark");
      mark.dataset.mark = part === "\n" ? "↵" : "⇥";
      element.append(mark, part);
    } else if (UNSEEN.test(part)) element.append(make("span", "code", code(part)));
    else if (part) element.append(part);
  }
}
const inWords = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").split(UNSEEN).map((p) => (UNSEEN.test(p) ? code(p) : p)).join("");

function nameOf(sample, i) {
  if (sample.shares[i] !== null && !sample.texts[i]) return `part of “${inWords(sample.shares[i])}”`;
  if (sample.texts[i]) return `“${inWords(sample.texts[i])}”`;
  const last = i === sample.n_tokens - 1 && sample.finish === "stop";
  return last ? "end of the response" : `token ${sample.ids[i]}, without characters`;
}

function heatMap(place) {
  const run = data.runs[Number(place.dataset.heat)], samples = run.responses.samples;
  const components = Object.keys(samples[0]?.weighted ?? {});
  const paid = components.filter((c) => samples.some((s) => s.weighted[c].some((x) => x)) || run.curves.values[`reward/${c}/weighted`]?.some((x) => x));
  const label = (key) => { const [kind, name] = split(key); return kind === "numbers" ? IN_WORDS[name] : kind === "weighted" ? name : `${name}, ${kind}`; };
  const split = (key) => [key.slice(0, key.indexOf(":")), key.slice(key.indexOf(":") + 1)];
  const numbers = (sample, key) => { const [kind, name] = split(key); return sample[kind][name]; };
  const centre = (key) => CENTRE[split(key)[1]] ?? 0;
  let shown = "numbers:token_rewards", view, pinned = null, numbered = false;

  const first = [shown, ...components.map((c) => (paid.includes(c) ? `weighted:${c}` : `raw:${c}`))];
  const second = ["advantages", "values", "kl", "ratio"].map((n) => `numbers:${n}`);
  const kinds = ["raw", "normalized", "weighted"].flatMap((kind) => components.map((c) => `${kind}:${c}`));
  const others = [...Object.keys(IN_WORDS).map((n) => `numbers:${n}`), ...kinds].filter((k) => !first.includes(k) && !second.includes(k));

  const key = (k) => [k, label(k)];
  const both = chips("colour by", [...first, ...second].map(key), shown, (value) => { more.value = ""; recolour(value); });
  const more = make("select");
  more.setAttribute("aria-label", "Colour by another number");
  more.append(new Option("another number…", ""), ...others.map((k) => new Option(label(k), k)));
  more.addEventListener("change", () => {
    for (const input of both.querySelectorAll("input")) input.checked = !more.value && input.value === first[0];
    recolour(more.value || first[0]);
  });
  both.append(more);

  const views = [];
  const has = (why) => samples.filter((s) => s.why.includes(why));
  if (has("same prompt").length) views.push(["same prompt", "the same prompt over training"]);
  for (const why of ["worst", "best", "typical"]) if (has(why).length) views.push([why, `${why} of each step`]);
  for (const step of [...new Set(samples.map((s) => s.step))]) views.push([`step ${step}`, `step ${step}`]);
  view = views.length ? views[0][0] : "";
  const which = chips("show", views, view, (value) => { view = value; list(); });

  const legend = make("div", "legend"), body = make("div", "heat-body"), left = make("div"), inspector = make("aside", "inspector");
  Object.assign(inspector, { tabIndex: 0 });
  inspector.setAttribute("role", "region");
  inspector.setAttribute("aria-label", "Every number of a token");
  body.append(left, inspector);
  place.append(both, which, legend, body);

  const extents = new Map();
  function extent(k) {
    if (!extents.has(k)) {
      let most = 0;
      for (const s of samples) for (const x of numbers(s, k)) if (typeof x === "number") most = Math.max(most, Math.abs(x - centre(k)));
      extents.set(k, most);
    }
    return extents.get(k);
  }

  function paint(token, x, k) {
    const off = typeof x === "number" ? x - centre(k) : 0, most = extent(k);
    token.classList.toggle("plus", off > 0);
    token.classList.toggle("minus", off < 0);
    token.style.setProperty("--x", off && most ? 22 + 78 * Math.abs(off) / most : 0);
  }

  function recolour(k) {
    shown = k;
    drawLegend();
    for (const token of left.querySelectorAll(".t")) dress(token);
    if (pinned) inspect(pinned);
  }

  function dress(token) {
    const { sample, i } = token.of, x = numbers(sample, shown)[i];
    paint(token, x, shown);
    const said = sample.ours[i] ? `${label(shown)} ${x === null ? "does not apply" : exact(x)}` : "written by the environment";
    token.setAttribute("aria-label", `${nameOf(sample, i)}, ${said}`);
    if (sample.ours[i] && x !== null && x !== centre(shown)) token.dataset.number = signed(x);
    else delete token.dataset.number;
  }

  function drawLegend() {
    const most = extent(shown), mid = centre(shown), scale = make("span", "scale");
    for (let n = -8; n <= 8; n++) {
      const piece = make("i", `t ${n > 0 ? "plus" : n < 0 ? "minus" : ""}`);
      piece.style.setProperty("--x", n ? 22 + 78 * Math.abs(n) / 8 : 0);
      scale.append(piece);
    }
    scale.setAttribute("role", "img");
    scale.setAttribute("aria-label", `Scale from ${exact(mid - most)} over ${mid} to ${exact(mid + most)}`);
    const box = make("label"), tick = make("input");
    Object.assign(tick, { type: "checkbox", checked: numbered });
    tick.addEventListener("change", () => { numbered = tick.checked; for (const t of left.querySelectorAll(".tokens")) t.classList.toggle("numbered", numbered); });
    box.append(tick, " numbers under the tokens");
    const ends = [mid - most, mid + most].map((x) => signed(x));
    legend.replaceChildren(make("b", "", label(shown)), make("span", "", ends[0]), scale, make("span", "", ends[1]), make("span", "", `no colour: ${mid}`), box);
  }

  function list() {
    const mine = samples.filter((s) => (view.startsWith("step ") ? s.step === Number(view.slice(5)) : s.why.includes(view)));
    if (view === "same prompt") mine.sort((a, b) => (a.prompt === b.prompt ? a.step - b.step : a.prompt < b.prompt ? -1 : 1));
    if (view.startsWith("step ")) mine.sort((a, b) => b.total - a.total);
    left.replaceChildren(...mine.map((s, n) => draw(s, view === "same prompt" && n > 0 && mine[n - 1].prompt === s.prompt)));
    pinned = null;
    const token = left.querySelector(".t");
    if (token) inspect(token);
  }

  function draw(sample, samePrompt) {
    const box = make("article", "sample"), head = make("header");
    const parts = paid.map((c) => `${c} ${signed(sample.parts[c])}`).join(", ");
    const end = { stop: "ended by itself", length: "cut" }[sample.finish] ?? sample.finish;
    const why = sample.why.filter((w) => w !== view).join(", ");
    head.append(make("b", "", `step ${sample.step}`), make("b", "", `reward ${signed(sample.total)}`));
    if (why) head.append(make("span", "", why));
    if (paid.length > 1) head.append(make("span", "", parts));
    head.append(make("span", "", `${sample.n_tokens} tokens, ${end}`), make("span", "", `prompt ${sample.ordinal}${sample.k ? `, sample ${sample.k}` : ""}`));
    box.append(head);
    if (!samePrompt) {
      const prompt = make("div", "prompt");
      prompt.dir = "auto";
      fill(prompt, sample.prompt);
      box.append(prompt);
    }
    const line = make("div", "tokens" + (numbered ? " numbered" : ""));
    line.dir = "auto";
    line.setAttribute("role", "listbox");
    line.setAttribute("aria-orientation", "horizontal");
    line.setAttribute("aria-label", `Response of step ${sample.step} to prompt ${sample.ordinal}, reward ${signed(sample.total)}`);
    sample.texts.forEach((text, i) => {
      const token = make("span", "t" + (sample.ours[i] ? "" : " theirs") + (text.includes("\n") ? " broken" : ""));
      token.of = { sample, i };
      token.tabIndex = i ? -1 : 0;
      token.setAttribute("role", "option");
      token.setAttribute("aria-selected", "false");
      if (text) fill(token, text);
      else token.dataset.mark = sample.shares[i] !== null ? "part" : i === sample.n_tokens - 1 && sample.finish === "stop" ? "end" : `id ${sample.ids[i]}`;
      dress(token);
      line.append(token);
    });
    box.append(line);
    if (sample.texts.length < sample.n_tokens) box.append(make("p", "muted", `The first ${sample.texts.length} of ${sample.n_tokens} tokens; the ledger has them all.`));
    return box;
  }

  function inspect(token) {
    for (const other of left.querySelectorAll(".t.on")) other.classList.remove("on");
    token.classList.add("on");
    const { sample, i } = token.of, rows = [];
    const title = make("h3", "", nameOf(sample, i));
    title.dir = "auto";
    const more = sample.texts[i] && sample.shares[i] !== null ? ` It has a part of “${inWords(sample.shares[i])}” too.` : "";
    rows.push(title, make("div", "muted", `token ${i + 1} of ${sample.n_tokens}, id ${sample.ids[i]}, weights of version ${sample.versions[i]}, step ${sample.step}.${more}`));
    if (!sample.ours[i]) rows.push(make("p", "", "An environment wrote this token: it is none of the policy's, and has no numbers."));
    else rows.push(partsTable(sample, i), numbersTable(sample, i), creditTable(sample, i));
    inspector.replaceChildren(...rows);
  }

  function cell(row, x, k) {
    const td = make("td", "", exact(x));
    if (typeof x === "number") td.title = String(x);
    td.dataset.key = k;
    row.append(td);
  }

  function tableOf(caption, heads) {
    const table = make("table"), row = make("tr");
    table.append(make("caption", "hidden", caption));
    for (const text of heads) { const th = make("th", "", text); th.scope = "col"; row.append(th); }
    if (heads.length) table.createTHead().append(row);
    table.createTBody();
    return table;
  }

  function rowOf(table, name, now) {
    const row = make("tr", now ? "now" : ""), th = make("th", "", name);
    th.scope = "row";
    row.append(th);
    table.tBodies[0].append(row);
    return row;
  }

  function partsTable(sample, i) {
    const table = tableOf("Components", ["component", "raw", "normalised", "weighted"]);
    for (const c of components) {
      const row = rowOf(table, c, split(shown)[1] === c);
      for (const kind of ["raw", "normalized", "weighted"]) cell(row, sample[kind][c]?.[i], `${kind}:${c}`);
      if (sample.raw[c]?.[i] === null) row.cells[1].textContent = "not applied";
    }
    const row = rowOf(table, "total", shown === first[0]);
    row.append(make("td"), make("td"));
    cell(row, sample.numbers.token_rewards[i], first[0]);
    return table;
  }

  /* Where the advantage comes from: its parts add up to it. */
  function creditTable(sample, i) {
    const names = Object.keys(sample.credit);
    if (!names.length) return "";
    const table = tableOf("the advantage, by where it comes from", []);
    table.caption.className = "";
    const words = { kl: "KL penalty", critic: "critic: as expected", others: "other samples of the prompt", mean: "mean of all, taken off" };
    for (const name of names) cell(rowOf(table, words[name] ?? name, false), sample.credit[name][i], `credit:${name}`);
    return table;
  }

  function numbersTable(sample, i) {
    const table = tableOf("Numbers", []);
    for (const name of Object.keys(IN_WORDS)) {
      if (name === "token_rewards") continue;
      const k = `numbers:${name}`, row = rowOf(table, IN_WORDS[name], shown === k);
      cell(row, sample.numbers[name][i], k);
      if (name === "ratio") rowOf(table, "clipped", false).append(make("td", "", sample.clipped[i] ? "yes" : "no"));
    }
    return table;
  }

  function move(token, event) {
    const all = [...token.parentElement.querySelectorAll(".t")], at = all.indexOf(token);
    const lines = [...left.querySelectorAll(".tokens")], line = lines.indexOf(token.parentElement);
    const to = {
      ArrowRight: () => all[at + 1], ArrowLeft: () => all[at - 1], Home: () => all[0], End: () => all[all.length - 1],
      ArrowDown: () => lines[line + 1]?.querySelector(".t"), ArrowUp: () => lines[line - 1]?.querySelector(".t"),
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const next = to();
    if (!next) return;
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  function pin(token) {
    const same = pinned === token;
    pinned?.setAttribute("aria-selected", "false");
    pinned = same ? null : token;
    token.setAttribute("aria-selected", String(!same));
    inspect(token);
  }

  const tokenOf = (event) => event.target.closest?.(".tokens .t");
  left.addEventListener("mouseover", (event) => { const t = tokenOf(event); if (t && !pinned) inspect(t); });
  left.addEventListener("focusin", (event) => { const t = tokenOf(event); if (t && !pinned) inspect(t); });
  left.addEventListener("click", (event) => { const t = tokenOf(event); if (t) pin(t); });
  left.addEventListener("keydown", (event) => {
    const t = tokenOf(event);
    if (!t) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(t); } else move(t, event);
  });
  drawLegend();
  list();
}

for (const place of document.querySelectorAll("[data-heat]")) heatMap(place);
