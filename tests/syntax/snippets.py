"""Every construct of the language at least once, by its place in a file."""

from __future__ import annotations

POSITIONS = """
last token
first token
bos token
cls token
sep token
token 5
token -2
token *
token 2..6
token -5..-1
token 0, 3, 7
token 0, 3..5, -1
token 0, last token
tokens *
tokens 2..6
tokens 0, 3
token c
token * align left
token * align right
token * and answer
token * and answer align right
tokens * and answer
answer tokens
each token of answer
{subject tokens, tokens * and answer}
tokens * align left
subject token
subject tokens
each token of subject
each token of subject of prompt
first token of subject
last token of subject
subject token + 1
subject token - 1
last-item token
first-item token
last-item tokens
item 3 token
item 2..4 token
item * tokens
each item token
each item tokens
each item 2..3 token
sep of fruits token
each sep of fruits token
"Answer" token
"Answer" tokens
last-item of part1 token
item 2 of part1 token
last-item of part1 token + 1
first-item of part1 token, last-item of part2 token, last token
top 25% of caap tokens
top 10 of caap tokens
top k of caap token
best of select token
tokens except top 25% of caap tokens
tokens between subject token + 1 and last token
tokens between first token and subject token - 1
each token between subject token and last token
tokens except subject tokens
each token except subject tokens
tokens except tokens between first token and last token
tokens except {subject token, last token}
each token of subject, subject token + 1, last token
{subject token, last token}
{token 0, 3, 7}
{word 2 token, word 14 token}, last token
{subject tokens} + 1
image row 3 col 4 token
image row 1..3 col * tokens
image row r..r + 1 col c - 1..3 tokens
photo tile 2 tokens
photo tile i row 1..2 col * token
each token of photo thumbnail
image tokens
each token of image
object_a tokens
slot token
""".strip().splitlines()

SITES = """
embed
resid_pre layer 0
resid_mid layer *
resid_post layer 10..20
resid_post layers 10..20
resid_post layer 0, 3, 7
resid_post layer 0, 3..5, 9
resid_post layer 50%..80%
resid_post layer 50%
resid_post layer -1
resid_post layer -3..-1
resid_post layer l
resid_post layer l + 1
resid_post layer l - 1..l + 1
resid_post layer * window 9
resid_post layer * window w
attn_out layer 3
mlp_out layer *
attn_norm layer 2
mlp_norm layer 2
q layer 3 head 2
k layer 3 head *
v layer 3 heads *
q_rot layer 3 head 0
k_rot layer 3 head 0
pattern layer 2 head 1
scores layer 2 head 1
z layer 2 head 1
head_out layer 2 heads 0, 3
mlp_hidden layer 3 neuron 512
mlp_hidden layer 3 neurons 0..99
router layer 1
expert_out layer 1 expert 3
expert_out layer 1 experts *
final_norm
logits
layer 10..20 head *
layers 10..20 heads 0, 3
layer 3 neuron 512
layer 3 expert *
resid_post vision layer 3
vision layer 3 head 2
encoder layer 3 head *
L9H9
L9H9.q
L3.mlp
L3.attn
L3.resid
L3N512
feature 12 of res8
feature 12, 55 of res8
features 0..9 of res8
feature * of res8
resid_post layer 5 in basis b
L3.resid in basis b
name_movers
top 10 of cie
best of select
top 25% of caap
""".strip().splitlines()

RULES = """
patch layer 10..20 head * at last-item token
patch resid_post layer * at last token with shorter
patch resid_post layer * at last token with fruit.train
patch resid_post layer * at each item token onto slot token
patch resid_post layer 3 at item 2 token onto last token into layer 5
patch resid_post layer l at last token into layer l + 1
patch resid_post layer l at last token into layer *
patch resid_post layer 1 at last token onto slot token into layer 2 with other
ablate layer * head * at tokens * with zero
ablate layer * head * at tokens * with mean
ablate layer * head * at tokens * with resample
ablate name_movers at last token with mean of abc
ablate name_movers at last token with mean of abc.test
ablate name_movers at last token with mean of clean by template
ablate embed at top 25% of caap tokens with zero
replace each token of image with gray
replace image row 3..5 col 2..4 tokens with blur(4)
replace subject tokens with blur
replace each token of image with gray
replace item 2 token with "thing"
block attention layer * window 9 from last token to subject tokens
block attention layers * from last token to each sep of fruits token
block attention layer 3 head 2 from last token to first token
block attention from last token to first token
block attention vision layer 3 from tokens * to token 0
reweight attention layer * head * from last token to subject token by 1.5
set attention layer 3 head 2 from last token to tokens * to uniform
set attention layer 3 head 2 from last token to token 0 to 0.2
path L9H9 -> L10H7.q at last token
path layer 0 head * -> k layer 1 head * at tokens *
path layer * head * -> logits at last token
path name_movers -> logits at last token through mlps
path L9H9 -> name_movers at last token through mlps, attn
add 4.0 * refusal to resid_post layer 14 at tokens *
add refusal to resid_post layer 14 at last token
add -2 * unit(refusal) to resid_post layer 14 at last token
add c * refusal[best of select] to resid_post layer l at last token
set resid_post layer 3 at last token to refusal
scale resid_post layer 3 at last token by 0.5
project out refusal from resid_post layer * at last token
project out refusal[best of select] from resid_post layer * at tokens *
project resid_post layer * at last token onto refusal
clamp feature 12 of res8 at last token to 5 without error
clamp feature 12 of res8 at last token to 5 without error during prefill
ablate layers * heads * except movers, top 20 of cie, L9H9 at tokens * with mean
patch resid_post layer * except 3, 5..6 at last token
ablate feature * of res8 except 3, 7 at tokens * with zero
patch resid_post layer 3 dims 0..7, 12 at last token
ablate z layer 1 head * dim * at tokens * with zero
patch feature 12 of small at last token with feature 3 of big
patch features 1, 5..7 of small at tokens * with features 2, 3 of big without error
clamp resid_post layer 3 in basis res8 dim 4 at last token to 5
project attn_out layers 2..4 at tokens * onto refusal[layer own]
add 2 * refusal[layer own] to resid_post layers * at tokens *
clamp feature 12 of res8 at last token to 5
clamp features 12, 55 of res8 at tokens * to 0
swap resid_post layer * at object_a tokens with object_b tokens
freeze mlp_out layers * at last token
freeze attn_out layer 3..5 at tokens *
patch layer 3 head 2 at last token during prefill
patch layer 3 head 2 at last token during each step
patch layer 3 head 2 at last token during step 2..5
patch layer 3 head 2 at last token during step 3
patch layer 3 head 2 at last token during step n
patch layer 3 head 2 at last token during step n + 1
patch layer 3 head 2 at last token during step n - 1..n + 2
patch layer 3 head 2 at last token during step *
patch k layer 3 head 2 at subject token with clean after prefill
project out refusal from weights during prefill
ablate z layer 3 at last token with zero, mean by template during each step
block attention layer 3 from last token to subject tokens after prefill
add after to resid_post layer 3 at last token
patch z layer 3 at after token with after
patch z layer 3 at prefill token onto after token with prefill after prefill
patch z layer 3 at each step token
patch z layer 3 at each step token, each step 2 token
patch z layer 3 at each step tokens during each step
patch z layer 3 at each step of part1 token
patch z layer 3 at each step row 1 col 2 token
add refusal to resid_post layer 3 at last token during each step
""".strip().splitlines()

METRICS = """
logit(answer)
logit(answer) - logit(wrong)
logit(answer) - logit(answer of fewer)
logit(answer of fruit.test)
logprob(answer)
prob(answer)
prob(" {item.index}")
prob(3..9)
prob(first token of answer)
prob(last token of answer)
logit(class answer)
logit(class answer of fewer) - prob(class "two words")
logit(class 5)
rank(answer)
correct
correct(wrong)
expected(1..9)
argmax(1..9)
kl(clean)
js(clean)
entropy
loss
cosine(resid_post layer 3, clean)
cosine(L3.resid, clean)
cosine(layer 3 head 2, clean)
cosine(top 10 of cie, clean)
exact_match
exact_match(answer, wrong)
exact_match(answer of fewer) - exact_match
matches("[0-9]{2,}")
matches("\\d+ (yes|no)")
number(last)
number(first)
length
python("judge.py:refused", reply)
contains("I cannot", "I'm sorry")
number
ld
2 * ld + 1
-ld / 3
(logit(answer) - logit(wrong)) / 2
-(ld - 1)
""".strip().splitlines()

STATEMENTS = """
model toy
model a, b
prompts fruit
prompts fruit limit 64
prompts fruit.train limit n
images scenes
images scenes limit 32
from clean into fewer
from clean, other into fewer
from clean into fewer, blank
from fruit.train into blank
from fruit shuffled into blank
from tuned into base
keep correct
keep prob(answer) > 0.1
keep correct and not (prob(wrong) > 0.5 or entropy < 1)
for l in 0..11 { patch resid_post layer l at last token }
for c in [0, 1, 2, 4] { add c * more to resid_post layer 2 at last token }
for c in [attn_out, mlp_out, resid_post] { patch c layer * at last token }
for k in 0%..100% step 5% { ablate layer k head * at last token with zero }
for l in 0..3 { for m in 0..3 { patch layer l, m head 0 at last token } }
for l in 0..3 { }
against random(20)
against random(39, features, frequency: seen)
against random(20) except top 5 of cie
against random(20, layers) except movers, L9H9, layer 3 head 1, best of cie
against random
generate 40
generate n
generate 40 with temperature 0.7
generate 40 with temperature t, top_k 50, top_p 0.9, samples n
generate 40 until "\\n"
generate n with samples 3 until "Q:", "\\n\\n", "say \\"no\\""
measure entropy at each step as raw
measure entropy at reply token 3 as raw
measure loss at last token of reply as raw
measure entropy at "Answer:" of reply token as raw
measure kl(clean) at each reply token as raw
observe norm resid_post layer * at each step as lengths
observe norm resid_post layer * at reply tokens 2..4 top 3
save resid_post layer 3 of clean at each step to "a.safetensors" as float16
save mean of resid_post layer * at last token, cue token to "a.safetensors"
save mean layer 3 at last token to "a.safetensors"
save direction d to "d.gguf"
save direction d[layer 3, token -1] to "d.safetensors" as float16
save direction d[best of e] to "d.safetensors"
using atp
using relp verify top 20
using eap_ig(steps: 5) verify top 20, random 20
using eap verify random n
using atp verify until top 20 95%
using relp verify until stable
discover circuit over heads, mlps using eap_ig(steps: 5) until faithfulness > 0.9
discover circuit over heads using acdc(threshold: 0.02)
discover circuit over heads, mlps, features of f, features of t using acdc(threshold: 0.02)
discover circuit over features of features, heads, few using eap top 10 edges
discover circuit over heads, mlps using acdc(threshold: 0.02) top 100 edges
discover circuit over heads using eap top 10 nodes
discover circuit over heads using eap top n heads
search greedy heads up to 10
search greedy heads up to n
report lines step
report bars window by row
observe logit_lens resid_post layer * at last token top 5
observe attention layer * head * from last token to each item token
observe attention layer * head * from last token to {word 2 token, word 14 token}
observe direct_logit layer * head * toward answer - wrong
observe direct_logit layer * head * toward answer - wrong at last token
observe direct_logit layer * head * toward logit(answer)
observe probe(count) at resid_post layer * at last-item token
observe routed_probe(count, folds: 3) at resid_post layer * at item tokens as told
observe routing(count, penalty: 2) at resid_post layer 2 at each item token as looked
observe clusters(4, train: fruit.train) resid_post layer 2 at each item token as concept
observe clusters(4) resid_post layer 2 with fewer at first-item token as kept
observe similarity resid_post layer * at object_a token with object_b token
observe norm resid_post layer *
observe norm embed in basis b
observe norm at resid_post layer * at tokens *
observe rollout from cls token to each token of image as roll
observe attention layers 1, 2 heads * of fewer from last token to each item token by value_norm
observe attention L1H2 from cls token to each token of image by value_norm as moved
observe rollout of fewer from {word 2 token, last token} to token *
observe pointing of caap in object
observe iou of caap, ig, rollout in object top 25% as overlap
observe sum of caap at each token of image
observe sum of caap, 0.5 * ig, -2 * rollout at each token of image as all
observe sum of share * caap(l: 1), (1 - share) * ig, 1 / 2 * c * rollout at each token of image
ablate features top k of seen, best of swept(item: 2), 3..5 of res8 at last token with zero
ablate feature top 25% of seen of res8 at last token with zero
patch feature 3 of small at last token with features top 2 of seen of big
observe features of res8 at last token top 10
observe features of res8 of fewer at last token top k by mean as seen
observe features of res8 at {item tokens, last token} top 10 by difference(fewer)
observe features of res8 at each item token by correlation(2 * count + 1) as counts
observe features of res8 at tokens *
observe logit_lens L3.resid at last token
measure ld as raw
measure ld as total
measure ld as relative per prompt
measure prob(answer) as raw auc over k
measure auc as raw mean over auc
measure logit(answer) at step1 token - 1 as recovery
measure logit(answer) at token * align left as delta
stats bootstrap(10000) confidence 95% correct holm
stats bootstrap(10000) by template
stats confidence 99%
stats correct bh
stats correct max
stats correct none
stats test bootstrap
stats bootstrap(10000) test flips confidence 95% correct holm verdicts holm by test
stats by template
report table
report table top 10
report table by a
report table by a top 3
report heatmap layer by head
report heatmap layer by position
report heatmap ROWS by COLUMNS
report heatmap layer by item top 5 to "heat.html"
report lines model by layer
report heatmap model by layer
report bars model top 3
report lines layer
report lines layer by c
report lines x by series to "x.svg"
report bars position
report bars token
report confusion item by argmax
report overlay
report overlay to "caap.html"
report graph
report graph to "circuit.svg"
report html
report csv to "a.csv"
report parquet
report json
expect max(recovery) > 0.3
expect recovery(L9H9) > 0.2
expect recovery(resid_post layer 3) >= 0.2
expect argmax(recovery) = L9H9
expect argmax(recovery) != L9H9.q
expect top 3 contains L9H9, L9H6
expect top n contains layer 3 head 2, L9H6, name_movers
expect mean(delta, layer 0..3) < 0.05
expect accuracy(clean) > 0.9
expect spearman(recovery, other_experiment) > 0.9
expect auc(prob, k) < 0.4
expect relative near -0.67 within 0.05 citing "Wang 2022"
expect max(recovery of ld) > 0.3
expect mean(ld) > 3.0 on mean
expect max(recovery) > 0.3 on mean citing "a paper"
expect max(recovery) in 0.1..0.5
expect not correct or max(recovery) > 1
expect top 3 contains L9H9 on mean
""".strip().splitlines()

DATA = r"""
template "Part 1: {fruits} Count 1:"
template "When {io} and {s1 = s}, {s2 = s} gave"
template "a \"quoted\" {x}\n\t{{braces}} \\"
template in ["a {x}", "b {x}"]
template in ["a {x}", "b {x}",]
chat { system "Be brief." user "How many {x}?" assistant "There are" }
chat { user "{x}" }
x in ["a", "b"]
x in 3..9
x in [1..3, 7]
x in words(toy)
x in low..high
x in [1, 2, 3] step 2
x in 0..10 step 2
x = other(x)
x = other(x, y)
a, b, c = others(x, y)
x = choice(words, weights)
x = shuffle(column)
x = a + b * 2 - c / 3
x = (a + b) * 2
x = -a
x = if a > 3 then "big" else "small"
x = if a > 3 and b = 2 then "big" else if a != 2 then "mid" else "small"
x = if not (a in 3..9) or a in words then 1 else 2
x = if a near 3 within 0.5 then 1 else 2
x = "text with {placeholder}"
x = xs[2]
x = xs[n - 1]
x = record.field
x = 1e6
x = 0.5e-3
x = [1, 2, [3, 4]]
xs = list(item, count, sep: ", ", last: " and ")
xs = list(item, count, sep: ", ", last: " and ",)
xs = list(item, 12, distinct: true)
xs = list(item, from: words, sep: ", ")
xs = list("Q: {input} A: {output}", 10, from: pairs)
path2 = list(item, count)
rows "data/known_facts.json"
rows hf_dataset("org/name", split: "train")
rename { subj = subject }
rename { subj = subject, rel = relation }
rename { subj = subject rel = relation }
rename { hd = head, }
where count >= 3
where subject != "x" and (n < 3 or n > 7)
where not flagged
split 50%
split 12.5%
answer " {count}"
answer token_id(column)
answer label
answer if a > 3 then " yes" else " no"
wrong " {count - 1}"
text rival = " {other(subject)}"
text = 3
text in ["a", "b"]
image = "x"
span subject in prompt
span slot = "thing"
image "{file}"
image gray
image shapes(n: count, kind: "circle", size: 32)
image from scenes
image from scenes.train
tiles 2 by 3
tiles n by 3 and whole
tiles = 3
region object = box
corrupt none { }
corrupt fewer { count = count - 1 }
corrupt fewer { count = count - 1 item = other(item) }
""".strip().splitlines()

CHANGES = """
count = count - 1
item = other(item)
io, s1, s2 = others(io, s)
half = list(word, 12, sep: " ", distinct: true)
swap a, b
template "another {x}"
add gaussian(std: 3 sd) to embed at subject tokens
add gaussian(std: 3 sd of subject) to embed at subject tokens
add gaussian(std: 0.5, samples: 10) to resid_post layer 3 at tokens *
add uniform(width: 2.5 sd, samples: 10) to embed at last token
replace item tokens with "thing"
replace item 2 token, last token with other(item)
blur image radius 8
blur image radius 2.5
blur image radius r
blur image row 1..2 col * tokens radius 3
""".strip().splitlines()

TOP = """
use "common/fruit.mech"
param depth = 12
param strength = 4.0
param doses = [0, 0.5, 1]
param name = "text"
param share = 50%
param d = -3
model gpt2 = hf("openai-community/gpt2", revision: "607a30d", dtype: float32, bos: true)
model toy = zoo("counting")
model mine = local("runs/my_model")
model mine = handed_over
prompts fruit { }
images shapes { image gray }
images shapes { rows "x.jsonl" image "{file}" region object = box }
metric ld = logit(answer) - logit(wrong)
metric refused = python("metrics.py:refused")
direction refusal = mean_difference(harmful, harmless) at resid_post layer 14 at last token
direction refusal = mean_difference(harmful, harmless) at resid_pre layer * at token -5..-1
direction u = unit(refusal)
direction u = 2 * refusal - other
basis res8 = sae("path/to/sae") at resid_post layer 8
basis t = transcoder("path") at mlp_out layer 8
basis j = jacobian(fruit, resid_post layer 0 -> resid_post layer 2, dims: 8) at resid_post layer 0
basis j = jacobian(fruit, embed -> L2.resid) at embed
basis p = pca(k: 10) at resid_post layer 8 at last token
basis d = das(k: 1) at resid_post layer 8
basis f = fit(sae(features: 512), prompts: fruit) at resid_post layer 8
basis g = identity at resid_post layer 8
group name_movers = L9H9, L9H6, L10H0
group mixed = L9H9.q, layer 3 head 2, mlp_out layer 5, resid_post vision layer 2, others
group fv_heads = top 10 of cie
group one = best of select
group feats = feature 12 of res8, feature 13 of res8
group feats = features 12, 13..15 of res8, layer 2 features top 3 of seen of t, L0H1
group capital = saved("graph.json", "capital", t0, t1)
seed 0
experiment empty { }
""".strip().splitlines()


def experiment_snippets() -> list[str]:
    """Return statements of an experiment that contain each position, site and metric."""
    return [
        *RULES,
        *STATEMENTS,
        *(f"patch resid_post layer 3 at {position}" for position in POSITIONS),
        *(f"patch {site} at last token" for site in SITES),
        *(f"observe norm {site}" for site in SITES),
        *(f"measure {metric} as delta" for metric in METRICS),
    ]


def wrapped(kind: str, text: str) -> str:
    """Wrap a snippet in a file that allows it."""
    if kind == "top":
        return f"mech 1\n{text}\n"
    if kind == "data":
        return f"mech 1\nprompts p {{\n{text}\n}}\n"
    if kind == "change":
        return f"mech 1\nprompts p {{\ncorrupt c {{\n{text}\n}}\n}}\n"
    return f"mech 1\nexperiment e {{\n{text}\n}}\n"


def all_snippets() -> list[tuple[str, str]]:
    """(kind, text) of every snippet."""
    return [
        *(("top", text) for text in TOP),
        *(("data", text) for text in DATA),
        *(("change", text) for text in CHANGES),
        *(("experiment", text) for text in experiment_snippets()),
    ]
