"""The structure of a page, for Jinja."""

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style|safe }}</style>
</head>
<body>
<main>
<h1>{{ title }}
{%- if parts|length == 1 and parts[0].shown.verdict %}: <span class="{{ parts[0].shown.verdict }}">
{{- parts[0].shown.verdict }}</span>
{%- endif %}</h1>
<p>How far each bundle's next-token probabilities are from those of {{ judge }} in float32, position
by position, on {{ page.text.tokens }} tokens of {{ page.text.name }} text in windows of
{{ page.text.window }}.</p>

<h2>Figures</h2>
<div class="wide" tabindex="0" role="region" aria-label="Figures">
<table>
<thead><tr><th scope="col"></th>
{% for part in parts %}<th scope="col">{{ part.name }}</th>
{% endfor %}</tr></thead>
<tbody>
{% macro row(name) %}<tr><th scope="row">{{ name }}</th>
{% for part in parts %}<td>{{ caller(part.shown.figures) }}</td>
{% endfor %}</tr>
{% endmacro %}
{% if parts[0].shown.verdict %}
<tr><th scope="row">verdict</th>
{% for part in parts %}<td class="{{ part.shown.verdict }}">{{ part.shown.verdict }}</td>
{% endfor %}</tr>
{% endif %}
{% call(one) row("scheme") %}{{ one.way }}{% endcall %}
{% call(one) row("bits per weight") %}{{ "%.2f"|format(one.bits_per_weight) }}{% endcall %}
{% call(one) row("size on disk") %}{{ one.bytes|size }}{% endcall %}
{% call(one) row("KL divergence, mean") %}{{ one.kl_mean|figure }} nats{% endcall %}
{% call(one) row("99th percentile") %}{{ one.kl_p99|figure }} nats{% endcall %}
{% call(one) row("largest") %}{{ one.kl_max|figure }} nats{% endcall %}
{% call(one) row("same likeliest token") %}{{ one.top1_agreement|figure(".2%") }}{% endcall %}
{% call(one) row("perplexity") %}{{ one.perplexity|figure(".4f") }}{% endcall %}
{% call(one) row("the original's perplexity") %}
{{- one.perplexity_reference|figure(".4f") }}{% endcall %}
{% call(one) row("ran on") %}{{ one.ran_on }}{% endcall %}
</tbody>
</table>
</div>

<h2>Size against closeness</h2>
{% if sizes %}
<div class="grid">
<figure>{{ sizes.to_svg() }}
<figcaption><span class="key dot"></span>on this page <span class="key ring"></span>recorded in a
folder beside <span class="key frontier"></span>none is smaller and closer. Left and low is better.
</figcaption></figure>
<div class="wide" tabindex="0" role="region" aria-label="Variants">
<table class="names">
<thead><tr><th scope="col">by size</th><th scope="col">MB</th><th scope="col">KL mean</th>
<th scope="col">same top</th><th scope="col">smaller and closer is</th></tr></thead>
<tbody>
{% for one, is_own, better in variants %}
<tr><th scope="row">{% if is_own %}<b>{{ one.folder.name }}</b>{% else %}{{ one.folder.name }}
{%- endif %}</th><td>{{ "%.1f"|format(one.bytes / 1e6) }}</td><td>{{ one.kl_mean|figure }}</td>
<td>{{ one.top1_agreement|figure(".1%") }}</td>
<td>{{ better.folder.name if better else "" }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</div>
{% else %}
<p class="soft">No folder beside this one has figures of the same source on the same text; what
<code>qwen2x validate</code> records there is shown here next time.</p>
{% endif %}

{% for part in parts %}
<h2>{{ part.name }}{% if parts|length > 1 and part.shown.verdict %}:
<span class="{{ part.shown.verdict }}">{{ part.shown.verdict }}</span>{% endif %}</h2>
<div class="grid">
{% if part.along %}
<figure><h3>KL divergence along the text</h3>{{ part.along.to_svg() }}
<figcaption><span class="key dot"></span>one position <span class="key"></span>mean of
{{ part.span }} neighbours <span class="key limit"></span>99th percentile,
{{ part.p99|figure }}</figcaption></figure>
<figure><h3>How often which divergence occurs</h3>{{ part.histogram.to_svg() }}
<figcaption><span class="key"></span>mean, {{ part.shown.figures.kl_mean|figure }}
<span class="key limit"></span>99th percentile</figcaption></figure>
{% endif %}
{% if part.layers %}
<figure><h3>Error of hidden states, layer by layer</h3>{{ part.layers.to_svg() }}
<figcaption><span class="key"></span>mean over the first positions, relative to the length of the
original's <span class="key limit"></span>limit, {{ "%g"|format(part.shown.layer_limit) }}
</figcaption></figure>
{% endif %}
</div>
{% if part.shown.worst %}
<h3>Where it differs most</h3>
<p class="soft">The text before the position, and the likeliest next tokens of both.</p>
<ol class="worst">
{% for place in part.shown.worst[:most_places] %}
<li><p class="before" dir="auto">…{{ place.before|visible }}</p>
<p class="soft">KL {{ place.kl|figure }} nats at position {{ place.position }}
{%- if place.followed is not none %}; the text goes on with
<code>“{{ place.followed|visible }}”</code>{% endif %}</p>
<div class="both">
{% for name, tokens in ((judge, place.reference), (part.name, place.candidate)) %}
<div><h4>{{ name }}</h4>
{% for token, share in tokens %}
<div class="share" style="--part: {{ "%.0f"|format(100 * share if share == share else 0) }}%">
<code dir="auto">“{{ token|visible }}”</code> <span>{{ share|percent }}</span></div>
{% endfor %}
</div>
{% endfor %}
</div></li>
{% endfor %}
</ol>
{% endif %}
{% if part.shown.checks %}
<h3>Checks</h3>
<div class="wide" tabindex="0" role="region" aria-label="Checks">
<table>
<thead><tr><th scope="col">check</th><th scope="col">verdict</th><th scope="col">value</th>
<th scope="col">limit</th></tr></thead>
<tbody>
{% for check in part.shown.checks %}
<tr><th scope="row">{{ check.name }}</th><td class="{{ check.verdict }}">{{ check.verdict }}</td>
<td>{{ check.value|figure(".4g") }}</td>
<td>{{ "at least" if check.is_floor else "at most" }} {{ "%g"|format(check.limit) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% endfor %}
</main>
<footer>KL divergence, in nats, tells how much of the original's expectation of the next token is
lost at a position: 0 is the same model. As a rule 8 bits lie near 0.001, and 4 bits between 0.01
and 0.1. Perplexity alone hides differences that cancel. Written by qwen2x.</footer>
</body>
</html>
"""
