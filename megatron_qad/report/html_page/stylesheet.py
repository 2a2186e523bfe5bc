"""The stylesheet of report.html: light and dark, and for paper."""

STYLE = """
:root {
  --page: #ffffff; --card: #f6f7f9; --text: #1c2430; --muted: #5b6675; --line: #d9dee5; --grid: #e3e7ec;
  --accent: #2f6f1f;
  --heat: 196 60 12; --heat-text: #ffffff;
  --color-0: #c3c9d2; --color-1: #4f9d2f; --color-2: #8cc66b; --color-3: #3b82c4; --color-4: #a05fc0; --other: #d08a2e;
  --format-text: #10161d;
  --run-0: #0072b2; --run-1: #d55e00; --run-2: #00855f; --run-3: #b3589a; --run-4: #a07a00; --run-5: #3f9bd6;
  --run-6: #7a5af8; --run-7: #6b7280;
  color-scheme: light;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --card: #1c2229; --text: #e5e9ee; --muted: #9aa5b1; --line: #343c46; --grid: #2a313a;
    --accent: #8fd36f;
    --heat: 240 110 50; --heat-text: #14181d;
    --color-0: #59626e; --color-1: #5fae3f; --color-2: #3f7030; --color-3: #4f9be0; --color-4: #b47ad2;
    --other: #d99a45;
    --format-text: #0d1116;
    --run-0: #4aa8e0; --run-1: #f0803c; --run-2: #35c79a; --run-3: #db8cc5; --run-4: #d3ac3c; --run-5: #8cc9f0;
    --run-6: #a793ff; --run-7: #a3abb8;
    color-scheme: dark;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 28px 24px 60px; max-width: 1160px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0 0 4px; font-size: 27px; line-height: 1.2; }
h2 { margin: 44px 0 10px; padding-bottom: 5px; border-bottom: 1px solid var(--line); font-size: 20px; }
h3 { margin: 24px 0 6px; font-size: 15.5px; }
p { margin: 8px 0; max-width: 88ch; }
.muted, .note, figcaption { color: var(--muted); }
.note { font-size: 13.5px; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 13px; }
code { overflow-wrap: anywhere; }
pre { margin: 8px 0; padding: 10px 14px; border-radius: 6px; background: var(--card); white-space: pre-wrap;
  overflow-wrap: anywhere; }
nav { margin: 14px 0 0; font-size: 13.5px; }
nav a { margin-right: 16px; color: var(--muted); }
a { color: inherit; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 14px 0; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.card { flex: 1 1 180px; padding: 11px 15px; border-radius: 8px; border-top: 4px solid var(--line);
  background: var(--card); }
.card .name { font-weight: 600; }
.card .value { font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card .detail { color: var(--muted); font-size: 13px; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 600; font-size: 13px; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 2px; }
.number { text-align: right; white-space: nowrap; }
th.number { white-space: normal; }
.interval { display: block; color: var(--muted); font-size: 12px; }
.best { font-weight: 700; }
.tokens td { white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens td.number, .tokens td:first-child { white-space: nowrap; }
.tokens td:nth-child(2) { min-width: 300px; }
mark { padding: 0 2px; border-radius: 3px; background: rgb(var(--heat) / 0.28); color: inherit; }
.bar { display: inline-block; height: 9px; min-width: 1px; border-radius: 2px; }
.sizes .bar { height: 15px; vertical-align: middle; }
.legend { display: flex; flex-wrap: wrap; gap: 3px 18px; margin: 6px 0; font-size: 13.5px; }
.swatch { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 3px;
  vertical-align: -1px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 14px 20px;
  align-items: start; }
figure { margin: 0; min-width: 0; }
.panels figure { max-width: 540px; }
svg { display: block; width: 100%; height: auto; }
.grid { width: 100%; table-layout: fixed; border-collapse: separate; border-spacing: 1px; font-size: 11.5px; }
.grid th, .grid td { padding: 0; border: 0; overflow: hidden; }
.grid .group { width: 108px; } .grid .label { width: 190px; }
.grid tbody th { padding: 0 8px 0 2px; font-size: 12px; font-weight: 400; line-height: 21px; white-space: nowrap;
  text-overflow: ellipsis; }
.grid tbody th.kind { font-weight: 600; color: var(--text); vertical-align: top; }
.grid thead th { overflow: visible; font-size: 11px; font-weight: 400; line-height: 16px; text-align: center;
  white-space: nowrap; }
.grid td { height: 21px; line-height: 21px; border-radius: 2px; background: var(--card); text-align: center;
  white-space: nowrap; }
.grid td.heat { background: rgb(var(--heat) / var(--a)); }
.grid td.hot { color: var(--heat-text); }
.grid td.format { color: var(--format-text); }
.scale { display: inline-block; width: 130px; height: 11px; margin: 0 8px; border-radius: 2px; vertical-align: -1px;
  background: linear-gradient(to right, rgb(var(--heat) / 0.06), rgb(var(--heat) / 1)); }
@media print {
  @page { size: A4; margin: 13mm 12mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  nav { display: none; }
  h2 { margin-top: 22px; }
  h2, h3 { break-after: avoid; }
  tr, figure, .card, .keep, pre { break-inside: avoid; }
  thead { display: table-header-group; }
  table { font-size: 8.8pt; }
  th, td { padding: 3px 7px; }
  .interval, th { font-size: 7.8pt; }
  .scroll { overflow: visible; }
  .panels { grid-template-columns: 1fr 1fr; gap: 8px 12px; }
  .grid .group { width: 84px; } .grid .label { width: 140px; }
}
"""
