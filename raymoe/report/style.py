"""Style sheet of a report: light and dark mode through CSS variables."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1d2430; --soft: #576071; --grid: #dce0e7;
  --s0: #0072b2; --s1: #d55e00; --s2: #008a64; --s3: #aa4499; --s4: #8a6d00; --s5: #2f8fc4; --s6: #882255; --s7: #6b6b6b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --ink: #e6e9ee; --soft: #a3acba;
  --grid: #3a414d; --s0: #58a9e0; --s1: #f08a3c; --s2: #33c39a; --s3: #dd8fc4; --s4: #d9bd4a; --s5: #9bd3f5;
  --s6: #d97a9f; --s7: #a8a8a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
header p { margin: 1rem 0 0; color: var(--soft); }
h1 { margin: 0 0 1rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.3rem; }
section > p { margin: .5rem 0 .75rem; color: var(--soft); max-width: 60rem; }
h2 + p { margin-top: -.5rem; }
h3 { margin: 0 0 .5rem; font-size: 1rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem 1.25rem; margin: 0;
  padding: 1rem; background: var(--card); border-radius: .6rem; }
.long { grid-column: 1 / -1; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem; background: var(--card); border-radius: .6rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .875rem; }
details { margin-top: 1rem; padding: .75rem 1rem; background: var(--card); border-radius: .6rem; }
summary { cursor: pointer; font-weight: 600; }
table { width: 100%; margin-top: .5rem; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: top; }
th, td:not(:last-child) { font-variant-numeric: tabular-nums; white-space: nowrap; }
td:last-child { width: 100%; }
pre { overflow-x: auto; font-size: .85rem; }
.card { padding: .5rem 1rem; background: var(--card); border-radius: .6rem; }
.wide { margin-bottom: 1rem; overflow-x: auto; }
.wide th { vertical-align: bottom; white-space: normal; overflow-wrap: normal; }
.wide td:last-child { min-width: 12rem; }
"""
