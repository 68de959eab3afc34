"""The look of a page: light and dark, from a phone's width on; nothing is loaded."""

STYLE = """\
:root { --ink: #1b1f24; --paper: #fff; --soft: #57606a; --rule: #d8dee4; --tint: #ddeafb;
  --first: #0550ae; --second: #b35900; --good: #0a6b2d; --bad: #b3001b; --cloud: .3 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9aa4af; --rule: #30363d; --tint: #17345c;
    --first: #6cb2ff; --second: #f0a04b; --good: #4fca6b; --bad: #ff8b84; --cloud: .38 } }
:root { color-scheme: light dark }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1040px; margin: 0 auto; padding: 1em }
h1 { font-size: 1.6em; line-height: 1.25; overflow-wrap: anywhere }
h2 { font-size: 1.25em; margin: 2em 0 .4em; border-top: 1px solid var(--rule); padding-top: 1em;
  overflow-wrap: anywhere }
h3 { font-size: 1em; margin: 1.6em 0 .3em }
p { margin: .4em 0 }
.soft, figcaption, footer { color: var(--soft); font-size: .9em }
.pass { color: var(--good) } .fail { color: var(--bad); font-weight: 700 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); font-size: .9em; padding-bottom: .3em }
th, td { text-align: left; padding: .3em 1.2em .3em 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap }
tbody th { font-weight: 400; color: var(--soft); position: sticky; left: 0;
  background: var(--paper) }
.names { font-size: .92em } .names th, .names td { padding-right: .9em }
.names tbody th, .names td:last-child { white-space: normal; overflow-wrap: anywhere;
  min-width: 7em }
.names thead th { white-space: normal; vertical-align: bottom }
.names b { color: var(--ink) }
.grid { display: grid; gap: 1em 2em;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
figure { margin: 0; max-width: 560px }
svg { display: block; width: 100%; height: auto; font-size: 13.5px; fill: var(--ink) }
svg text { fill: var(--soft) } svg .name { fill: var(--ink) }
svg .grid { stroke: var(--rule) } svg .tick { stroke: var(--soft) }
svg .bar { fill: var(--first); opacity: .55 }
svg .cloud { stroke: var(--first); stroke-opacity: var(--cloud); stroke-width: 4;
  stroke-linecap: round; fill: none }
svg polyline { fill: none; stroke-width: 2.5; stroke-linejoin: round }
svg .mean { stroke: var(--ink) } svg .limit { stroke: var(--second); stroke-dasharray: 7 5 }
svg .frontier { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 2 4 }
svg polyline.leader { stroke: var(--soft); stroke-width: 1 }
svg circle.own { fill: var(--first) }
svg circle.beside { fill: var(--paper); stroke: var(--soft); stroke-width: 2 }
svg .label { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round }
svg .label.own { fill: var(--first); font-weight: 600 }
.key { display: inline-block; width: 1.6em; height: 0; margin: 0 .35em 0 .1em;
  vertical-align: middle; border-top: 3px solid var(--ink) }
.key.limit { border-top: 3px dashed var(--second) }
.key.frontier { border-top: 2px dotted var(--soft) }
.key.dot { width: .7em; height: .7em; border: 0; border-radius: 50%; background: var(--first) }
.key.ring { width: .7em; height: .7em; border: 2px solid var(--soft); border-radius: 50% }
ol.worst { list-style: none; padding: 0; display: grid; gap: 1.2em 2em;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
ol.worst li { border: 1px solid var(--rule); border-radius: 8px; padding: .7em .9em; min-width: 0 }
.before { overflow-wrap: anywhere; font-family: ui-serif, Georgia, serif }
.before::after { content: " ▁"; color: var(--second); font-weight: 700 }
.both { display: grid; grid-template-columns: 1fr 1fr; gap: .3em 1.2em; margin-top: .5em }
.both h4 { margin: 0; font-size: .85em; font-weight: 600; overflow-wrap: anywhere }
.share { display: flex; justify-content: space-between; gap: .5em; padding: 0 .3em; margin: 2px 0;
  background: linear-gradient(to right, var(--tint) var(--part), transparent 0) }
.share code { font: .9em/1.6 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; min-width: 0 }
footer { margin-top: 3em; border-top: 1px solid var(--rule); padding-top: .8em }
"""
