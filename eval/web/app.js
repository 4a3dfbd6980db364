// Conversation with several checkpoints side by side, and a look inside each token. No library, no build.

const WORDS = {
  en: {
    new: "New chat", settings: "Settings", system: "System prompt", temperature: "Temperature", penalty: "Repetition penalty",
    longest: "Longest reply (tokens)", seed: "Seed", any: "any", key: "API key", inspect: "Record the inside of each token",
    ask: "Ask something. Enter sends, Shift+Enter is a new line.", send: "Send", stop: "Stop", edit: "Edit", retry: "Retry",
    save: "Send again", cancel: "Cancel", look: "Look inside", close: "Close", thoughts: "Thoughts", calls: "Calls", lost: "The server does not answer",
    hello: "Choose one or several checkpoints above and ask them the same question: pretraining, fine-tuning, DPO and GRPO answer side by side. “Look inside” shows what happened at each token.",
    tokens: (count, rate) => `${count} tokens, ${rate} tok/s`, cut: "ended at the length limit", stopped: "stopped",
    inside: (model) => `Inside ${model}`, alternatives: "Alternatives and their probabilities", experts: (layer) => `Layer ${layer}: router scores s, chosen experts coloured`,
    weights: "weights", drafts: (yes, all) => `MTP drafted ${all} tokens, ${yes} accepted: they were what the model chose.`,
    draft: "MTP's draft for this place", accepted: "accepted", rejected: "rejected", none: "none for the first token",
    cache: "Cache so far (bf16)", held: "this model's attention", heads: "multi-head attention", no_mtp: "This checkpoint has no MTP layer, so nothing is drafted.",
    legend: "Under each token one row a MoE layer: the colours are its experts, the same throughout. ✓ and ✗: MTP's draft.",
    use: "Experts used in this reply", pick: "Choose a token; ← and → move.",
  },
  zh: {
    new: "新对话", settings: "设置", system: "系统提示", temperature: "温度", penalty: "重复惩罚", longest: "回复上限（token）", seed: "随机种子",
    any: "任意", key: "API 密钥", inspect: "记录每个 token 的内部状态", ask: "输入问题。回车发送，Shift+回车换行。", send: "发送", stop: "停止",
    edit: "编辑", retry: "重试", save: "重新发送", cancel: "取消", look: "看内部", close: "关闭", thoughts: "思考过程", calls: "工具调用", lost: "服务器没有响应",
    hello: "在上方选择一个或几个检查点，问它们同一个问题：预训练、微调、DPO、GRPO 的回答并排显示。“看内部”显示每个 token 产生时模型里发生了什么。",
    tokens: (count, rate) => `${count} 个 token，每秒 ${rate} 个`, cut: "达到长度上限", stopped: "已停止",
    inside: (model) => `${model} 的内部`, alternatives: "候选 token 及其概率", experts: (layer) => `第 ${layer} 层：路由得分 s，选中的专家有颜色`,
    weights: "权重", drafts: (yes, all) => `MTP 起草了 ${all} 个 token，其中 ${yes} 个与模型的选择一致。`,
    draft: "MTP 在此处的草稿", accepted: "被接受", rejected: "未被接受", none: "无：第一个 token 没有草稿",
    cache: "目前的缓存（bf16）", held: "这个模型的注意力", heads: "多头注意力", no_mtp: "这个检查点没有 MTP 层，所以没有草稿。",
    legend: "每个 token 下面，一行对应一个 MoE 层，颜色表示专家，全文一致。✓ 和 ✗ 表示 MTP 的草稿是否被接受。",
    use: "这条回复用到的专家", pick: "选择一个 token；用 ← 和 → 移动。",
  },
};

const $ = (id) => document.getElementById(id);
const state = { language: navigator.language.startsWith("zh") ? "zh" : "en", models: [], turns: [], running: new Set(), shown: null };
const word = (name, ...values) => {
  const found = WORDS[state.language][name];
  return typeof found === "function" ? found(...values) : found;
};

/** An element; text is always text, so nothing that a model writes becomes markup. */
function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Experts keep their colour in every token and layer. */
const colour = (expert, experts) => `hsl(${Math.round((360 * expert) / experts)} 65% ${expert % 2 ? 42 : 58}%)`;

function speak() {
  document.documentElement.lang = state.language;
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = word(node.dataset.text);
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = word(node.dataset.hint);
  $("language").textContent = state.language === "zh" ? "English" : "中文";
  draw();
}

function settings() {
  const given = Object.fromEntries(new FormData($("settings")));
  const body = { temperature: 0.7, top_p: 0.9, top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: 256, seed: null };
  for (const name of Object.keys(body)) if (given[name] !== "") body[name] = Number(given[name]);
  return { body: { ...body, inspect: "inspect" in given }, system: given.system.trim(), key: given.key };
}

function headers() {
  const key = settings().key;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

const picked = () => [...document.querySelectorAll("#models input:checked")].map((box) => box.value);

async function loadModels() {
  try {
    const answer = await fetch("v1/models", { headers: headers() });
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error.message);
    state.models = content.data.map((model) => model.id);
  } catch (error) {
    $("models").replaceChildren(make("span", { className: "error", textContent: error.message || word("lost") }));
    $("settings").hidden = false;
    return;
  }
  const all = state.models.length <= 4; // side by side as far as they fit, else the last
  $("models").replaceChildren(
    ...state.models.map((id) => make("label", {}, make("input", { type: "checkbox", value: id, checked: all || id === state.models.at(-1) }), id)),
  );
}

/** The messages that a model is asked with: its own replies, or where it was not asked, another's. */
function messages(model, index) {
  const system = settings().system;
  const list = system ? [{ role: "system", content: system }] : [];
  state.turns.slice(0, index + 1).forEach((turn, place) => {
    list.push({ role: "user", content: turn.question });
    if (place < index) {
      const reply = turn.replies.get(model) ?? [...turn.replies.values()][0];
      list.push({ role: "assistant", content: reply.content, ...(reply.thoughts ? { reasoning_content: reply.thoughts } : {}) });
    }
  });
  return list;
}

/** Ask one model for its reply to a turn, and draw it as it comes. */
async function answer(turn, model) {
  const reply = { model, content: "", thoughts: "", calls: [], tokens: [], count: 0, error: "", finish: "", busy: true, begun: performance.now() };
  const abort = new AbortController();
  reply.abort = abort;
  turn.replies.set(model, reply);
  state.running.add(reply);
  draw();
  try {
    const { body } = settings();
    const request = { ...body, model, messages: messages(model, state.turns.indexOf(turn)), stream: true, stream_options: { include_usage: true } };
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(request), signal: abort.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) reply.count = chunk.usage.completion_tokens;
      for (const choice of chunk.choices) take(reply, choice);
      drawReply(turn, reply);
    }
  } catch (error) {
    if (error.name === "AbortError") reply.finish = "stopped";
    else reply.error = error instanceof TypeError ? word("lost") : error.message;
  }
  reply.busy = false;
  reply.seconds = (performance.now() - reply.begun) / 1000;
  state.running.delete(reply);
  draw();
}

function take(reply, choice) {
  const delta = choice.delta;
  reply.content += delta.content ?? "";
  reply.thoughts += delta.reasoning_content ?? "";
  reply.calls.push(...(delta.tool_calls ?? []));
  reply.tokens.push(...(choice.inspect ?? []));
  reply.count += 1;
  if (choice.finish_reason) reply.finish = choice.finish_reason;
}

/** The objects of server-sent events in a stream of bytes. */
async function* events(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function ask(question, index = state.turns.length) {
  halt();
  state.turns.length = index;
  const turn = { question, replies: new Map(), node: null };
  state.turns.push(turn);
  for (const model of picked()) answer(turn, model);
  draw();
  $("talk").scrollTop = $("talk").scrollHeight;
}

function halt() {
  for (const reply of state.running) reply.abort.abort();
}

// Drawing

function draw() {
  const bottom = atBottom();
  $("talk").replaceChildren(...(state.turns.length ? state.turns.map(drawTurn) : [make("p", { className: "hello", textContent: word("hello") })]));
  if (bottom) $("talk").scrollTop = $("talk").scrollHeight;
  $("stop").hidden = state.running.size === 0;
  drawInside();
}

const atBottom = () => $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 60;

function drawTurn(turn, index) {
  const replies = make("div", { className: "replies" });
  const node = make("article", { className: "turn" }, turn.editing ? editor(turn, index) : asked(turn), replies);
  turn.node = replies;
  for (const reply of turn.replies.values()) {
    reply.node = null;
    drawReply(turn, reply);
  }
  return node;
}

function asked(turn) {
  const edit = make("button", { className: "small", textContent: word("edit"), onclick: () => { turn.editing = true; draw(); } });
  return make("div", { className: "question" }, edit, make("p", { textContent: turn.question }));
}

function editor(turn, index) {
  const area = make("textarea", { value: turn.question, rows: 2 });
  const cancel = make("button", { type: "button", textContent: word("cancel"), onclick: () => { turn.editing = false; draw(); } });
  const form = make("form", {}, area, make("button", { textContent: word("save") }), cancel);
  form.onsubmit = (event) => { event.preventDefault(); if (area.value.trim()) ask(area.value.trim(), index); };
  return make("div", { className: "question" }, form);
}

function drawReply(turn, reply) {
  const bottom = atBottom();
  const open = reply.node?.querySelector("details")?.open ?? false;
  const said = [];
  if (reply.thoughts) {
    said.push(make("details", { open }, make("summary", { textContent: word("thoughts") }), reply.thoughts));
  }
  said.push(make("div", { className: "said", textContent: reply.content }));
  for (const call of reply.calls) {
    said.push(make("pre", { textContent: `${word("calls")}: ${call.function.name}(${call.function.arguments})` }));
  }
  if (reply.error) said.push(make("p", { className: "error", textContent: reply.error }));
  const name = `reply${reply.busy ? " busy" : ""}${state.shown?.reply === reply ? " shown" : ""}`;
  const node = make("section", { className: name }, make("h2", { textContent: reply.model }), ...said, footer(turn, reply));
  if (reply.node) reply.node.replaceWith(node);
  else turn.node.append(node);
  reply.node = node;
  if (bottom) $("talk").scrollTop = $("talk").scrollHeight;
  if (state.shown?.reply === reply) drawInside();
}

function footer(turn, reply) {
  const index = state.turns.indexOf(turn);
  const retry = () => { state.turns.length = index + 1; if (state.shown?.reply === reply) state.shown = null; answer(turn, reply.model); };
  const parts = [];
  if (!reply.busy) {
    if (reply.count && reply.seconds) parts.push(make("span", { textContent: word("tokens", reply.count, Math.round(reply.count / reply.seconds)) }));
    if (reply.finish === "length") parts.push(make("span", { textContent: `· ${word("cut")}` }));
    if (reply.finish === "stopped") parts.push(make("span", { textContent: `· ${word("stopped")}` }));
    parts.push(make("button", { className: "small", textContent: word("retry"), onclick: retry }));
  }
  if (reply.tokens.length) {
    const look = () => { state.shown = { reply, token: 0 }; draw(); };
    parts.push(make("button", { className: "small look", textContent: word("look"), onclick: look }));
  }
  return make("footer", {}, ...parts);
}

// The inside

function drawInside() {
  const panel = $("inside");
  panel.hidden = !state.shown;
  if (!state.shown) return;
  const { reply } = state.shown;
  const tokens = reply.tokens;
  state.shown.token = Math.min(state.shown.token, tokens.length - 1);
  const chosen = tokens[state.shown.token];
  const close = make("button", { className: "small", textContent: word("close"), onclick: () => { state.shown = null; draw(); } });
  const drafts = tokens.filter((token) => token.draft);
  const count = drafts.filter((token) => token.draft.accepted).length;
  const held = panel.scrollTop;
  panel.replaceChildren(
    make("h2", {}, word("inside", reply.model), close),
    make("p", { className: "caption", textContent: word("legend") }),
    make("div", { className: "tokens" }, ...tokens.map((token, place) => tokenNode(token, place))),
    make("p", { className: "caption", textContent: drafts.length || tokens.length < 2 ? word("drafts", count, drafts.length) : word("no_mtp") }),
    ...details(chosen),
    make("h3", { textContent: word("use") }),
    ...use(tokens),
  );
  panel.scrollTop = held;
}

const shownText = (text) => (text.trim() ? text : text.replaceAll(" ", "␣").replaceAll("\n", "↵"));

function tokenNode(token, place) {
  const mark = token.draft ? make("span", { className: `mark ${token.draft.accepted ? "yes" : "no"}`, textContent: token.draft.accepted ? "✓" : "✗" }) : null;
  const layers = token.experts.map((layer) =>
    make("span", { className: "layer" }, ...layer.chosen.map((expert) => {
      const cell = make("i");
      cell.style.background = colour(expert, layer.scores.length);
      return cell;
    })));
  const name = `token${place === state.shown.token ? " chosen" : ""}`;
  const node = make("button", { className: name, title: `${(100 * token.prob).toFixed(1)} %` }, make("span", { className: "word" }, shownText(token.token), mark), ...layers);
  node.onclick = () => { state.shown.token = place; drawInside(); };
  return node;
}

function bars(rows) {
  const most = Math.max(...rows.map((row) => row.size));
  return make("div", { className: "bars" }, ...rows.flatMap((row) => {
    const bar = make("div", { className: "bar" });
    bar.style.width = `${(100 * row.size) / most}%`;
    if (row.colour) bar.style.background = row.colour;
    return [make("code", { textContent: row.name }), bar, make("span", { className: "value", textContent: row.value })];
  }));
}

const percent = (part) => `${(100 * part).toFixed(part < 0.01 ? 2 : 1)} %`;
const bytes = (count) => (count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(2)} MB`);

function details(token) {
  const parts = [make("h3", { textContent: word("alternatives") })];
  parts.push(bars(token.alternatives.map((one) => ({
    name: shownText(one.token), size: one.prob, value: percent(one.prob), colour: one.id === token.id ? "var(--good)" : "var(--quiet)",
  }))));
  for (const layer of token.experts) {
    const scores = make("div", { className: "scores" }, ...layer.scores.map((score, expert) => {
      const bar = make("i", { title: `${expert}: ${score}` });
      bar.style.height = `${100 * score}%`;
      if (layer.chosen.includes(expert)) bar.style.background = colour(expert, layer.scores.length);
      return bar;
    }));
    const weights = layer.chosen.map((expert, place) => `${expert}: ${layer.weights[place].toFixed(2)}`).join(", ");
    parts.push(make("h3", { textContent: word("experts", layer.layer) }), scores, make("p", { className: "caption", textContent: `${word("weights")} ${weights}` }));
  }
  parts.push(make("h3", { textContent: word("draft") }));
  if (token.draft) {
    const yes = token.draft.accepted;
    parts.push(make("p", {}, make("code", { textContent: shownText(token.draft.token) }), " ", make("span", { className: yes ? "yes" : "no", textContent: word(yes ? "accepted" : "rejected") })));
  } else {
    parts.push(make("p", { className: "caption", textContent: word("none") }));
  }
  parts.push(make("h3", { textContent: word("cache") }), bars([
    { name: word("held"), size: token.cache.mla_bytes, value: bytes(token.cache.mla_bytes), colour: "var(--good)" },
    { name: word("heads"), size: token.cache.mha_bytes, value: bytes(token.cache.mha_bytes), colour: "var(--quiet)" },
  ]));
  return parts;
}

/** Of each layer, how often each expert was chosen in the whole reply. */
function use(tokens) {
  return tokens[0].experts.flatMap((layer, place) => {
    const counts = layer.scores.map((_, expert) => tokens.filter((token) => token.experts[place].chosen.includes(expert)).length);
    const most = Math.max(...counts, 1);
    const node = make("div", { className: "scores" }, ...counts.map((count, expert) => {
      const bar = make("i", { title: `${expert}: ${count}` });
      bar.style.height = `${(100 * count) / most}%`;
      bar.style.background = colour(expert, counts.length);
      return bar;
    }));
    return [node, make("p", { className: "caption", textContent: `${layer.layer}` })];
  });
}

// What a person does

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || !picked().length) return;
  $("question").value = "";
  grow();
  ask(question);
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
const grow = () => { $("question").style.height = "auto"; $("question").style.height = `${$("question").scrollHeight + 2}px`; };
$("question").oninput = grow;
$("stop").onclick = halt;
$("new").onclick = () => { halt(); state.turns = []; state.shown = null; draw(); $("question").focus(); };
$("options").onclick = () => { $("settings").hidden = !$("settings").hidden; $("options").setAttribute("aria-expanded", String(!$("settings").hidden)); };
$("language").onclick = () => { state.language = state.language === "zh" ? "en" : "zh"; speak(); };
$("settings").onsubmit = (event) => event.preventDefault();
$("settings").elements.key.onchange = loadModels;
document.addEventListener("keydown", (event) => {
  if (!state.shown || /^(TEXTAREA|INPUT)$/.test(document.activeElement.tagName)) return;
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") { state.shown = null; draw(); }
  if (move) { state.shown.token = Math.max(0, state.shown.token + move); drawInside(); }
});

speak();
loadModels();
