"use strict";
(() => {
  const root = document.documentElement, main = document.querySelector("main");
  const pairs = [...document.querySelectorAll(".pair")];
  const keys = [...document.querySelectorAll("#key tbody tr")];
  const store = "fewstep-ab-" + main.dataset.page;
  const find = id => document.getElementById(id);
  let votes = pairs.map(() => null), at = 0;
  try {
    const kept = JSON.parse(localStorage.getItem(store));
    if (Array.isArray(kept) && kept.length === pairs.length && kept.every(v => ["left", "right", "tie", null].includes(v))) votes = kept;
  } catch (_) { /* a browser may keep nothing for a file */ }
  at = votes.indexOf(null);
  if (at < 0) at = pairs.length;
  root.classList.add("live");
  const result = () => JSON.stringify({ schema: main.dataset.schema, page: main.dataset.page, votes: votes });
  const show = () => {
    const done = at >= pairs.length, given = votes.filter(v => v !== null).length;
    root.classList.toggle("done", done);
    pairs.forEach((pair, i) => pair.classList.toggle("now", i === at));
    find("count").textContent = done ? "Done: " + given + " of " + pairs.length + " voted" : "Pair " + (at + 1) + " of " + pairs.length;
    find("bar").style.width = 100 * given / pairs.length + "%";
    find("undo").disabled = at === 0;
    if (!done) { window.scrollTo(0, 0); return; }
    find("json").value = result();
    const said = { left: "left", right: "right", tie: "no difference" };
    keys.forEach((row, i) => { row.lastElementChild.textContent = said[votes[i]] || "–"; });
    const lines = {};
    keys.forEach((row, i) => {
      if (votes[i] === null) return;
      const line = lines[row.dataset.against] = lines[row.dataset.against] || { win: 0, loss: 0, tie: 0, title: row.dataset.title };
      line[votes[i] === "tie" ? "tie" : votes[i] === row.dataset.student ? "win" : "loss"] += 1;
    });
    find("sum").replaceChildren(...Object.values(lines).map(line => {
      const item = document.createElement("li");
      item.textContent = "Against “" + line.title + "”: student preferred " + line.win + " times, not preferred " + line.loss + ", no difference " + line.tie + ".";
      return item;
    }));
  };
  const vote = choice => {
    if (at >= pairs.length) return;
    votes[at] = choice;
    at += 1;
    try { localStorage.setItem(store, JSON.stringify(votes)); } catch (_) { /* as above */ }
    show();
  };
  const undo = () => { if (at > 0) { at -= 1; votes[at] = null; show(); } };
  pairs.forEach(pair => pair.querySelectorAll("figure").forEach(figure => figure.addEventListener("click", () => vote(figure.dataset.side))));
  document.querySelectorAll("[data-vote]").forEach(button => button.addEventListener("click", () => vote(button.dataset.vote)));
  find("undo").addEventListener("click", undo);
  find("skip").addEventListener("click", () => vote(null));
  find("again").addEventListener("click", () => { votes = pairs.map(() => null); at = 0; try { localStorage.removeItem(store); } catch (_) { /* as above */ } show(); });
  find("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([result() + "\n"], { type: "application/json" }));
    link.download = "votes.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "TEXTAREA") return;
    const choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", a: "left", b: "right", t: "tie" }[event.key];
    if (choice && at < pairs.length) { event.preventDefault(); vote(choice); }
    if (event.key === "Backspace" || event.key === "u") { event.preventDefault(); undo(); }
  });
  show();
})();
