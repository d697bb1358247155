// A conversation in one or two lanes, each with its own mode. The server's output is inserted as text only.

const FLASH_MS = 600;
const THINK_END = "</think>";
// Distance from the end, in pixels, within which a conversation follows its new text.
const FOLLOW_PIXELS = 40;

const byId = (id) => document.getElementById(id);
const element = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });

function headers() {
  const key = byId("key").value;
  return key ? { authorization: `Bearer ${key}` } : {};
}

class Refusal extends Error {}

async function refusal(response) {
  if (response.status === 401) {
    const wrong = byId("key").value !== "";
    byId("key-field").hidden = false;
    byId("key").focus();
    const words = wrong ? "The API key is wrong. Enter another one." : "This server needs an API key. Enter it above.";
    byId("notice").textContent = words;
    return new Refusal(words);
  }
  const body = await response.json().catch(() => null);
  return new Refusal(body?.error?.message ?? `The server answered ${response.status}.`);
}

// The JSON of each server-sent event. Without the last event the answer is incomplete. Comments keep the stream open.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost.");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith(":")) continue;
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

class Lane {
  constructor(name, mode) {
    this.root = byId("lane").content.firstElementChild.cloneNode(true);
    this.root.querySelector("legend").textContent = name;
    this.fields = this.root.querySelector("fieldset").elements;
    this.talk = this.root.querySelector(".talk");
    this.turns = this.talk.firstElementChild;
    this.talk.setAttribute("aria-label", `Conversation, ${name}`);
    this.messages = [];
    const { mode: select, block_length: block, tree_width: tree } = this.fields;
    select.value = mode;
    const fit = () => {
      block.disabled = select.value === "ar";
      tree.disabled = select.value !== "linear_spec";
    };
    select.addEventListener("change", fit);
    fit();
  }

  request() {
    const { mode, temperature, thinking } = this.fields;
    return {
      messages: this.messages,
      mode: mode.value,
      ...Object.fromEntries(this.lengths().map(({ name, value }) => [name, Number(value)])),
      temperature: Number(temperature.value),
      chat_template_kwargs: { enable_thinking: thinking.checked },
      return_token_origins: true,
      stream: true,
    };
  }

  // The fields of lengths that are set and have a meaning in the mode.
  lengths() {
    const { block_length, tree_width } = this.fields;
    return [block_length, tree_width].filter((field) => field.value && !field.disabled);
  }

  label() {
    const words = this.lengths().map(({ dataset, value }) => `${dataset.word} ${value}`);
    return [this.fields.mode.value, ...words].join(", ");
  }

  turn(who, text = "") {
    const turn = element("li", "turn", text);
    turn.dataset.who = who;
    this.turns.append(turn);
    this.scrollToEnd();
    return turn;
  }

  scrollToEnd() {
    this.talk.scrollTop = this.talk.scrollHeight;
  }

  // Whoever reads further up stays there.
  follow(change) {
    const { scrollTop, clientHeight, scrollHeight } = this.talk;
    change();
    if (scrollHeight - scrollTop - clientHeight < FOLLOW_PIXELS) this.scrollToEnd();
  }

  clear() {
    this.messages = [];
    this.turns.replaceChildren();
    this.show({ speed: "–", forward: "–", acceptance: "–" });
  }

  noteMissingHistory() {
    this.turns.append(element("li", "note", "This lane starts without the conversation so far."));
  }

  // Resolves to whether the server refused the prompt.
  async ask(prompt, signal) {
    this.turn("you", prompt);
    this.messages.push({ role: "user", content: prompt });
    const answer = new Answer(this, this.turn(this.label()), this.fields.thinking.checked);
    this.talk.setAttribute("aria-busy", "true");
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST",
        headers: { "content-type": "application/json", ...headers() },
        body: JSON.stringify(this.request()),
        signal,
      });
      if (!response.ok) throw await refusal(response);
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        for (const choice of event.choices) answer.add(choice);
      }
      this.messages.push({ role: "assistant", content: answer.content });
      this.turns.append(element("li", "hidden", answer.origins()));
      return false;
    } catch (error) {
      this.messages.pop();
      const words = error.name === "AbortError" ? "[stopped]" : error.message;
      const space = answer.turn.childNodes.length ? " " : "";
      this.follow(() => answer.turn.append(element("span", "error", space + words)));
      return error instanceof Refusal;
    } finally {
      this.talk.setAttribute("aria-busy", "false");
    }
  }

  show(figures) {
    for (const [name, text] of Object.entries(figures)) {
      this.root.querySelector(`[data-figure="${name}"]`).textContent = text;
    }
  }
}

const counted = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

// How a cycle drafted, in words.
function drafting({ drafting: source, drafted, verified }) {
  switch (source) {
    case "none": return "no drafts";
    case "draft": return `draft pass, block ${drafted}`;
    case "tree": return `draft pass, block ${drafted}, tree of ${verified}`;
    case "copy": return `${counted(verified - 1, "copied token")}`;
    default: return `${counted(verified - 1, `${source} token`)}`;
  }
}

// The verified tokens of a cycle: a column for each position, and a row for each branch. The last row has what the
// cycle generated after the accepted path.
function drawDrafts({ pieces, parents, path, generated }) {
  const grid = element("div", "drafts");
  grid.tabIndex = 0;
  const accepted = new Set(path);
  const depths = [];
  let row = 1;
  const place = (piece, kind, column) => {
    const token = element("span", `token ${kind}`, piece.replaceAll("\n", "\u23ce"));
    token.style.gridArea = `${row} / ${column + 1}`;
    grid.append(token);
  };
  pieces.forEach((piece, node) => {
    const parent = parents ? parents[node] : node - 1;
    if (parent !== node - 1) row += 1;
    depths.push(node ? depths[parent] + 1 : 0);
    place(piece, node === 0 ? "prefill" : accepted.has(node) ? "accepted" : "rejected", depths[node]);
  });
  row += 1;
  const beyond = depths[path.at(-1)] + 1;
  generated.slice(path.length - 1).forEach(({ piece, origin }, index) => place(piece, origin, beyond + index));
  return grid;
}

// The cycles of an answer, in a list that is drawn while it is open.
class Cycles {
  constructor(turn) {
    this.cycles = [];
    this.drawn = 0;
    this.details = element("details", "");
    this.summary = element("summary", "");
    this.list = element("ol", "");
    this.details.append(this.summary, this.list);
    this.details.addEventListener("toggle", () => this.draw());
    const item = element("li", "cycles");
    item.append(this.details);
    turn.after(item);
  }

  add(cycle) {
    this.cycles.push(cycle);
    this.summary.textContent = counted(this.cycles.length, "cycle");
  }

  draw() {
    if (!this.details.open) return;
    for (; this.drawn < this.cycles.length; this.drawn += 1) {
      const cycle = this.cycles[this.drawn];
      const item = element("li", "");
      const words = `${drafting(cycle)}: ${counted(cycle.emitted, "token")}, ${cycle.expected.toFixed(1)} expected`;
      item.append(element("div", "", words), element("div", "reason", cycle.reason), drawDrafts(cycle));
      this.list.append(item);
    }
  }
}

class Answer {
  constructor(lane, turn, thinking) {
    this.lane = lane;
    this.turn = turn;
    this.thinking = thinking;
    this.cycles = null;
    this.content = "";
    this.tokens = 0;
    this.counts = {};
    this.first = null;
  }

  add(choice) {
    this.content += choice.delta.content ?? "";
    const found = choice.trimode;
    if (!found) return;
    this.first ??= performance.now();
    this.lane.follow(() => {
      const tokens = found.pieces.map((piece, index) => ({ piece, origin: found.origins[index] }));
      let at = 0;
      const addUntil = (end, title) => {
        for (; at < end; at += 1) this.addToken(tokens[at].piece, tokens[at].origin, title);
      };
      addUntil(tokens.length - found.cycles.reduce((sum, { emitted }) => sum + emitted, 0), "");
      for (const cycle of found.cycles) {
        this.cycles ??= new Cycles(this.turn);
        this.cycles.add({ ...cycle, generated: tokens.slice(at, at + cycle.emitted) });
        addUntil(at + cycle.emitted, `\ncycle ${this.cycles.cycles.length}: ${drafting(cycle)}\n${cycle.reason}`);
      }
      this.cycles?.draw();
      this.flash(found.rejected);
    });
    this.lane.show(this.figures(found.passes));
  }

  // title: of the token, after its origin.
  addToken(piece, origin, title) {
    this.tokens += 1;
    this.counts[origin] = (this.counts[origin] ?? 0) + 1;
    if (this.thinking && piece === THINK_END) {
      this.thinking = false;
      this.turn.append("\n");
    } else if (piece) {
      const token = element("span", `token ${origin}${this.thinking ? " thought" : ""}`, piece);
      token.title = origin + title;
      this.turn.append(token);
    }
  }

  // The meaning of the colours, for screen readers.
  origins() {
    return `Tokens: ${Object.entries(this.counts).map(([origin, count]) => `${count} ${origin}`).join(", ")}`;
  }

  flash(rejected) {
    for (const piece of rejected) {
      const token = element("span", "token rejected", piece);
      token.ariaHidden = "true";
      this.turn.append(token);
      setTimeout(() => token.remove(), FLASH_MS);
    }
  }

  // The first token comes from the prefill and starts the clock.
  figures({ draft, denoise, commit, cycles, drafted, accepted, trees, lookups }) {
    const seconds = (performance.now() - this.first) / 1000;
    const passes = draft + denoise + commit;
    const after = this.tokens - 1;
    return {
      speed: seconds > 0 && after > 0 ? (after / seconds).toFixed(0) : "–",
      forward: passes > 0 ? (after / passes).toFixed(2) : "–",
      cycles: `${cycles}: ${trees}, ${lookups}`,
      acceptance: drafted > 0 ? `${((100 * accepted) / drafted).toFixed(0)} %` : "–",
    };
  }
}

const lanes = [new Lane("A", "linear_spec"), new Lane("B", "ar")];
let stopper = null;

function shownLanes() {
  return byId("compare").checked ? lanes : lanes.slice(0, 1);
}

// A lane that is shown already keeps its place, and its scroll position with it.
function showLanes() {
  const shown = shownLanes();
  for (const lane of lanes) {
    if (!shown.includes(lane)) lane.root.remove();
    else if (!lane.root.isConnected) byId("lanes").append(lane.root);
  }
}

function compare() {
  const [first, second] = lanes;
  if (byId("compare").checked && first.messages.length && !second.turns.children.length) second.noteMissingHistory();
  showLanes();
}

function newChat() {
  stopper?.abort();
  for (const lane of lanes) lane.clear();
  byId("prompt").focus();
}

async function send() {
  const field = byId("prompt");
  const prompt = field.value.trim();
  if (!prompt || stopper) return;
  field.value = "";
  stopper = new AbortController();
  exchange(byId("send"), byId("stop"));
  const refused = await Promise.all(shownLanes().map((lane) => lane.ask(prompt, stopper.signal)));
  stopper = null;
  if (refused.every(Boolean) && !field.value) field.value = prompt;
  exchange(byId("stop"), byId("send"), field);
}

// Enable one button instead of another, and keep the keyboard's focus.
function exchange(old, button, next = button) {
  button.disabled = false;
  if (document.activeElement === old) next.focus();
  old.disabled = true;
}

async function showModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.ok) {
    byId("model").textContent = (await response.json()).data[0].id;
    byId("notice").textContent = "";
  } else {
    await refusal(response);
  }
}

byId("compare").addEventListener("change", compare);
byId("new-chat").addEventListener("click", newChat);
byId("key").addEventListener("change", showModel);
byId("stop").addEventListener("click", () => stopper?.abort());
byId("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stopper?.abort(); });

showLanes();
showModel();
