"""The style sheet of a report: light and dark, wide and narrow."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fcfcfa; --card: #ffffff; --ink: #1d1d1b; --muted: #6d6d67;
  --rule: #e3e2dc; --warn: #a3431f; --warn-page: #fbf0ea;
  --s0: #3566a8; --s1: #c2572f; --s2: #2f8264;
  --s3: #8055a5; --s4: #9a7a1e; --s5: #5b6b78;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #161615; --card: #1f1f1d; --ink: #ecebe6; --muted: #a09f98;
    --rule: #34342f; --warn: #f0a583; --warn-page: #33221a;
    --s0: #7fabe3; --s1: #ec8f68; --s2: #6cc3a1;
    --s3: #bd99de; --s4: #d6b75c; --s5: #a9b7c2;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
    Arial, sans-serif;
}
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; }
h2 { margin: 3rem 0 0.75rem; font-size: 1.25rem; line-height: 1.3; }
h3 { margin: 1.75rem 0 0.5rem; font-size: 0.95rem; font-weight: 600; }
p { margin: 0.5rem 0; max-width: 42rem; }
.kicker, .note { color: var(--muted); font-size: 0.85rem; }
.kicker { margin: 0 0 0.25rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; font-size: 0.8rem; }
.facts { display: grid; grid-template-columns: max-content 1fr;
  gap: 0.2rem 1.25rem; margin: 1.5rem 0 0; font-size: 0.9rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 1.25rem 2.75rem;
  margin: 1.75rem 0 0; }
.tile b { display: block; font-size: 1.75rem; font-weight: 600;
  line-height: 1.15; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.tile span, .tile small { display: block; color: var(--muted);
  font-size: 0.85rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem;
  margin: 2rem 0 0; padding: 0.6rem 0; font-size: 0.9rem;
  border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); }
a { color: var(--s0); text-decoration: none; }
a:hover { text-decoration: underline; }
.warning { margin: 1.5rem 0 0; padding: 0.6rem 0.9rem; border-radius: 6px;
  max-width: none; background: var(--warn-page); color: var(--warn);
  font-size: 0.9rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; font-size: 0.92rem; }
th, td { padding: 0.5rem 0 0.5rem 1.5rem; text-align: right;
  vertical-align: baseline; border-bottom: 1px solid var(--rule); }
th:first-child { padding-left: 0; text-align: left; font-weight: 400; }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
th { white-space: nowrap; }
thead th { font-weight: 600; vertical-align: bottom; }
thead th, tbody td b { font-weight: 600; }
th small { display: block; max-width: 24rem; color: var(--muted);
  font-size: 0.8rem; font-weight: 400; line-height: 1.35;
  white-space: normal; }
td.wrap { min-width: 9rem; white-space: normal; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0;
  font-size: 0.85rem; }
.swatch { display: inline-block; width: 0.7em; height: 0.7em;
  margin-right: 0.4em; border-radius: 2px; }
.panels { display: grid; gap: 1.5rem 1.75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.panels.four { grid-template-columns:
  repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); }
.panel { margin: 0; min-width: 0; }
.panel figcaption { display: flex; justify-content: space-between; gap: 1rem;
  font-size: 0.85rem; }
.panel figcaption b { font-weight: 600; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.panel figcaption span { overflow-wrap: anywhere; }
.panel svg { display: block; width: 100%; height: auto; }
.cards { display: grid; gap: 1.75rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.cards.wide { grid-template-columns:
  repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.card { margin: 0; min-width: 0; }
.card figcaption { margin-bottom: 0.35rem; font-size: 0.85rem; }
.strip { display: grid; grid-auto-flow: column; gap: 0.4rem; overflow-x: auto;
  grid-auto-columns: minmax(1.9rem, 1fr); }
.strip > div { min-width: 0; font-size: 0.75rem; line-height: 1.35; }
.strip img { display: block; width: 100%; height: auto; border-radius: 3px;
  margin-bottom: 0.3rem; background: var(--rule); }
.strip p { margin: 0.1rem 0 0.3rem; color: var(--muted); font-size: inherit;
  line-height: 1.35; overflow-wrap: break-word; }
.strip small { display: block; color: var(--muted); font-size: inherit; }
.gallery { display: grid; gap: 1.1rem 0.8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(30%, 7.25rem), 1fr)); }
.shot { margin: 0; min-width: 0; font-size: 0.75rem; line-height: 1.35; }
.shot img { display: block; width: 100%; height: auto; border-radius: 3px;
  margin-bottom: 0.3rem; background: var(--rule); }
.shot figcaption { color: var(--muted); overflow-wrap: break-word; }
.shot b { font-weight: 600; }
img.bad { outline: 2px dashed var(--warn); outline-offset: 1px; }
.strip img.bad { outline-offset: -2px; }
b.bad, .strip small.bad, .grid small.bad { color: var(--warn); }
table.grid { min-width: 0; width: 100%; table-layout: fixed;
  font-size: 0.75rem; }
.grid th, .grid td { padding: 0.15rem; border: 0; text-align: center;
  color: var(--muted); white-space: normal; line-height: 1.2;
  vertical-align: middle; }
.grid tbody th, .grid thead td:first-child { width: 3.6rem; padding-left: 0;
  text-align: left; font-variant-numeric: tabular-nums; }
.grid thead th { font-weight: 400; }
.grid img { display: block; width: 100%; height: auto; border-radius: 3px;
  background: var(--rule); }
.grid img.bad { outline-offset: -2px; }
.grid small { display: block; margin: 0.2rem 0 0.1rem; font-size: inherit; }
.pixelated { image-rendering: pixelated; }
details { margin: 1.25rem 0; }
details > .cards { margin-top: 0.75rem; }
summary { margin-bottom: 0.5rem; cursor: pointer; font-size: 0.95rem; }
pre { overflow-x: auto; margin: 0.75rem 0; padding: 0.9rem 1rem;
  line-height: 1.45; background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; }
@media (max-width: 32rem) {
  body { padding-top: 1.5rem; }
  h1 { font-size: 1.6rem; }
  th, td { padding-left: 0.7rem; }
  th { white-space: normal; }
  td.wrap { min-width: 6rem; }
  .stack, .stack thead, .stack tbody { display: block; }
  .stack tr { display: grid; padding: 0.4rem 0;
    grid-template-columns: repeat(var(--columns), minmax(3.6rem, 1fr));
    border-bottom: 1px solid var(--rule); }
  .stack th, .stack td { padding: 0.1rem 0 0.1rem 0.4rem; border: 0; }
  .stack th:first-child { grid-column: 1 / -1; padding-left: 0; }
  .stack thead th:first-child { display: none; }
  .stack thead th { align-self: end; font-size: 0.85rem; }
  .tiles { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
  .tile b { font-size: 1.45rem; }
  .strip { gap: 0.25rem; }
  .panels { gap: 1.25rem; }
  .panels.four { grid-template-columns: 1fr 1fr; }
}
"""
