"""The style sheet of a report: two themes, one column, type that is easy to read.

The six curve colours keep an OKLab distance of 0.12 or more from each other in either theme, also
as seen with protanopia, deuteranopia and tritanopia (Machado et al. 2009), and a contrast of 3 or
more to the ground.
"""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{color-scheme:light dark;
--ground:#fafaf8;--card:#ffffff;--ink:#1d1d1f;--soft:#63625e;--rule:#e9e7e2;--base:#b3b0a9;
--c1:#4162c7;--c2:#d87b1a;--c3:#2aa391;--c4:#7f037b;--c5:#6f6219;--c6:#313232}
@media (prefers-color-scheme:dark){:root{
--ground:#121316;--card:#191b1f;--ink:#e9e8e5;--soft:#a3a19c;--rule:#2a2d33;--base:#5d6067;
--c1:#668ffc;--c2:#ea9542;--c3:#81f3dd;--c4:#b6699d;--c5:#fed25c;--c6:#acb0b5}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
font:17px/1.6 Inter,ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
"Noto Sans",sans-serif;-webkit-font-smoothing:antialiased}
main{max-width:932px;margin:0 auto;padding:72px 26px 56px}
h1{font-size:clamp(1.85rem,1.2rem + 2.6vw,2.7rem);line-height:1.14;letter-spacing:-.022em;
font-weight:680;margin:0 0 18px;text-wrap:balance;max-width:24em}
h2{font-size:1.32rem;line-height:1.3;letter-spacing:-.012em;font-weight:650;margin:0 0 10px;
text-wrap:balance}
p{margin:0 0 .9em;max-width:66ch;text-wrap:pretty}
.lead{font-size:1.13rem;line-height:1.58;color:var(--soft)}
section{margin-top:58px}
figure{margin:24px 0 0;background:var(--card);border:1px solid var(--rule);border-radius:12px;
padding:22px 24px}
figcaption{font-size:.9rem;line-height:1.45;color:var(--soft);max-width:72ch}
.chart figcaption,.table figcaption{color:var(--ink);font-weight:600;margin-bottom:10px}
.chart p{font-size:.82rem;line-height:1.4;color:var(--soft);margin:0;max-width:none}
.chart .y-label{margin-bottom:calc(10px + 16px*var(--rows))}
.chart .x-label{margin:36px var(--right) 0 var(--left);text-align:right}
.chart .note{margin-top:10px}
.plot{display:block;height:300px;width:calc(100% - var(--left) - var(--right));
margin:0 var(--right) 0 var(--left);overflow:visible}
.plot svg{overflow:visible}
.plot text{font-size:13px;font-variant-numeric:tabular-nums;fill:var(--soft)}
.plot .tick.y{text-anchor:end;dominant-baseline:central}
.plot .tick.x{text-anchor:middle}
.plot .name{fill:var(--c);font-weight:600;dominant-baseline:central}
.plot text.mark{font-size:12px;text-anchor:middle}
.plot text.start{text-anchor:start}.plot text.end{text-anchor:end}
.rule{stroke:var(--rule)}.base{stroke:var(--base)}
line.mark{stroke:var(--base);stroke-dasharray:2 4}
.line{fill:none;stroke:var(--c);stroke-width:2.25;stroke-linejoin:round;stroke-linecap:round;
vector-effect:non-scaling-stroke}
.dashed .line{stroke-dasharray:7 5}
.front{fill:none;stroke:var(--base);stroke-width:7;opacity:.4;vector-effect:non-scaling-stroke;
stroke-linejoin:round}
.bar{stroke:var(--c);stroke-width:2}
.band{fill:var(--c);opacity:.14}
.dot{fill:var(--c);stroke:var(--card);stroke-width:1.5}
.dot:hover{stroke:var(--c);stroke-width:5}
.dashed .dot{fill:var(--card);stroke:var(--c)}
.dot.hidden{opacity:0}.dot.hidden:hover{opacity:1;stroke-width:0}
.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}
.legend{display:none;list-style:none;margin:0 0 12px;padding:0;gap:4px 18px;flex-wrap:wrap;
font-size:.84rem;line-height:1.5}
.legend i{display:inline-block;width:18px;margin-right:7px;vertical-align:middle;
border-top:3px solid var(--c)}
.legend .dashed i{border-top-style:dashed}
.legend .loose i{width:10px;height:10px;border:2px solid var(--c);border-radius:50%;
background:var(--c)}
.legend .dashed.loose i{background:none}
.listed .legend{display:flex}.listed .name{display:none}
.matrix{display:block;width:100%;overflow:visible;font-size:13px}
.scroll{overflow-x:auto;margin:0 -24px}
table{border-collapse:collapse;width:100%;font-size:.9rem;line-height:1.4;
font-variant-numeric:tabular-nums lining-nums}
th,td{padding:9px 0 9px 22px;text-align:left;vertical-align:baseline;
border-bottom:1px solid var(--rule)}
tr>:first-child{padding-left:24px;position:sticky;left:0;background:var(--card)}
tr>:last-child{padding-right:24px}
tbody tr:last-child>*{border-bottom:0;padding-bottom:2px}
thead th{font-size:.8rem;font-weight:500;color:var(--soft);vertical-align:bottom;
border-bottom-color:var(--base)}
tbody th{font-weight:500;min-width:8em}
td.number{white-space:nowrap}
.number{text-align:right}
td strong{font-weight:700;box-shadow:inset 0 -.42em 0 color-mix(in srgb,var(--c1) 24%,transparent)}
.none{color:var(--soft)}
.cells{display:grid;gap:6px;
grid-template-columns:repeat(var(--columns),minmax(0,var(--width)))}
.images,.pairs{width:fit-content;min-width:min(100%,340px);max-width:100%}
.cells+figcaption{margin-top:14px;width:0;min-width:100%}
img{display:block;width:100%;height:auto;image-rendering:pixelated;border-radius:2px}
.pairs .cells{gap:14px 20px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:2px}
.pair span{grid-column:1/3;font-size:.78rem;line-height:1.5;color:var(--soft);
font-variant-numeric:tabular-nums}
footer{margin-top:64px;padding-top:18px;border-top:1px solid var(--rule);font-size:.84rem;
line-height:1.55;color:var(--soft)}
footer p{max-width:none;overflow-wrap:anywhere}
@media (max-width:640px){
body{font-size:16px}
main{padding:40px 16px 40px}
section{margin-top:44px}
figure{padding:16px;border-radius:10px}
.scroll{margin:0 -16px}
tr>:first-child{padding-left:16px}
tr>:last-child{padding-right:16px}
.legend{display:flex}
.plot .name{display:none}
.matrix{font-size:20px}
.plot{height:260px;width:calc(100% - var(--left) - 8px);margin-right:8px}
.chart .x-label{margin-right:8px}
.images,.pairs{width:auto}
.cells{gap:4px}
.pairs .cells{gap:10px 14px;grid-template-columns:repeat(auto-fill,minmax(124px,1fr))}
}
@media print{:root{--ground:#fff}figure{break-inside:avoid}main{padding-top:0}}
"""
