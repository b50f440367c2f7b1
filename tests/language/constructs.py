"""Constructs of the grammar: statements, lines of prompts, positions, rules, expectations.

Each supported construct has one entry; `docs/language.md` is generated from the entries and from
the registries in `mechdsl/vocab/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mechdsl.base.records import Registry
from mechdsl.program.estimators import ESTIMATORS, GradientEstimator

Group = Literal[
    "file", "prompts", "image", "image in prompts", "image position", "image line", "position",
    "site", "rule",
    "onward", "experiment", "class", "expectation",
]  # fmt: skip

OWN = "this page"
"""The source of a definition that isn't from a paper."""
TRACING = "Meng et al. 2022, arXiv 2202.05262"
PATCHING = "Zhang & Nanda 2023, arXiv 2309.16042"
MEDIATION = "Vig et al. 2020, arXiv 2004.12265"
CIRCUIT = "Wang et al. 2022, arXiv 2211.00593"
PATHS = "Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969"
KNOCKOUT = "Geva et al. 2023, arXiv 2304.14767"
SCOPES = "Ghandeharioun et al. 2024, arXiv 2401.06102"
ACROSS = "Prakash et al. 2024, arXiv 2402.14811"
VECTORS = "Todd et al. 2023, arXiv 2310.15213"
DELETION = "Petsiuk et al. 2018, arXiv 1806.07421"
STEERING = "Turner et al. 2023, arXiv 2308.10248"
REFUSAL = "Arditi et al. 2024, arXiv 2406.11717"
MEAN_DIFFERENCE = "Marks & Tegmark 2023, arXiv 2310.06824"
_REPLIES = "tests/rules/test_generation.py"
ATTENTION = "Vaswani et al. 2017, arXiv 1706.03762"


@dataclass(frozen=True)
class Construct:
    """One construct of the language."""

    name: str
    group: Group
    example: str
    """Its syntax: a line, a position or a site."""
    meaning: str
    source: str
    """A paper with its number, or `this page`."""
    test: str
    """The file that implements it."""
    context: str = ""
    """Lines of the same block that the example needs."""


CONSTRUCTS: Registry[Construct] = Registry("construct")


def _construct(entry: Construct) -> None:
    CONSTRUCTS.add(entry.name, entry)


def _class(name: str, example: str, meaning: str) -> None:
    test = "tests/execute/test_classifiers.py"
    _construct(Construct(name, "class", example, meaning, OWN, test))


_ON_IMAGES = "tests/images/test_blocks.py"


def _image(
    name: str, example: str, meaning: str, test: str = _ON_IMAGES, source: str = OWN
) -> None:
    _construct(Construct(name, "image", example, meaning, source, test))


def _in_prompt(
    name: str, example: str, meaning: str, context: str = "", test: str = "test_blocks.py"
) -> None:
    """A line of a block of prompts that contain images."""
    test = f"tests/image_prompts/{test}"
    _construct(Construct(name, "image in prompts", example, meaning, OWN, test, context))


def _in_image(name: str, example: str, meaning: str) -> None:
    _construct(Construct(name, "image position", example, meaning, OWN, _ON_IMAGES))


def _on_image(name: str, example: str, meaning: str, source: str, test: str) -> None:
    """A line of an experiment on images."""
    _construct(Construct(name, "image line", example, meaning, source, test))


def _file(name: str, example: str, meaning: str, test: str, source: str = OWN) -> None:
    _construct(Construct(name, "file", example, meaning, source, test))


def _prompts(
    name: str, example: str, meaning: str, test: str, source: str = OWN, context: str = ""
) -> None:
    _construct(Construct(name, "prompts", example, meaning, source, test, context))


def _position(name: str, example: str, meaning: str, context: str = "") -> None:
    test = "tests/execute/test_positions.py"
    _construct(Construct(name, "position", example, meaning, OWN, test, context))


def _answer_position(name: str, example: str, meaning: str) -> None:
    test = "tests/execute/test_answer_tokens.py"
    _construct(Construct(name, "position", example, meaning, OWN, test))


def _site(name: str, example: str, meaning: str, test: str, source: str = OWN) -> None:
    _construct(Construct(name, "site", example, meaning, source, test))


def _rule(name: str, example: str, meaning: str, source: str, test: str, context: str = "") -> None:
    _construct(Construct(name, "rule", example, meaning, source, test, context))


def _onward(name: str, example: str, meaning: str, source: str, test: str) -> None:
    _construct(Construct(name, "onward", example, meaning, source, test))


def _experiment(
    name: str, example: str, meaning: str, test: str, source: str = OWN, context: str = ""
) -> None:
    _construct(Construct(name, "experiment", example, meaning, source, test, context))


def _expectation(
    name: str, example: str, meaning: str, test: str = "", source: str = OWN, context: str = ""
) -> None:
    test = test or "tests/results/test_expectations.py"
    _construct(Construct(name, "expectation", example, meaning, source, test, context))


# --- the file -------------------------------------------------------------------------------------

_LOWER = "tests/compiler/test_lower.py"
_ROWS = "tests/data/test_rows.py"

_file("version", "mech 1", "The first line of a file: the version of the language.", _LOWER)
_file(
    "use",
    'use "common/fruit.mech"',
    "Imports all definitions of another file. Its experiments don't run. The path is relative "
    "to the file that contains the line.",
    _LOWER,
)
_file(
    "param",
    "param depth = 2",
    "A named value. `--set depth=3` overrides it; no other value can be set from outside.",
    "tests/execute/test_effects.py",
)
_file(
    "model",
    'model toy = zoo("counting")',
    'A model from the package (`zoo`), the Hugging Face cache (`hf("org/name", revision: "…", '
    'dtype: float32, bos: true)`) or a folder (`local("…")`).',
    "tests/models/test_load.py",
)
_file(
    "adapter",
    'model base = zoo("counting") model tuned = local("adapter", base: base)',
    "A LoRA adapter in the format of peft, from a folder or from the cache (`hf`). mechdsl merges "
    "it into a copy of another model of the file (the base model), which may itself be an "
    "adapter. Running it needs `mechdsl[adapters]`. Its shape and precision are those of the base "
    "model, and so is its tokenizer unless the folder contains one.",
    "tests/models/test_adapters.py",
)
_EDITED = "tests/rules/test_weights.py"
_file(
    "edited model",
    'model toy = zoo("counting") model cured = toy with { project out more from weights }',
    "A copy of another model of the file, with changed weights. The lines are `scale weights of "
    "…`, `set weights of …`, `add … to weights of …` and `project out … from weights`. They change "
    "the weights in order, each on the result of the preceding ones. Directions are computed on "
    "the model before `with`. `mechdsl export FILE --weights FOLDER` saves the model as a "
    "transformers folder.",
    _EDITED,
    REFUSAL,
)
_file(
    "sum of models",
    'model a = zoo("counting") model b = zoo("counting") model c = a + 0.5 * (b - a)',
    "A model whose weights are weighted sums of the weights of other models (task arithmetic). "
    "The factors add up to 1. The models have the same architecture, size and tokenizer.",
    _EDITED,
    "Ilharco et al. 2022, arXiv 2212.04089",
)
_file(
    "rounded model",
    'model toy = zoo("counting") model q = rounded(toy, bits: 4)',
    "A copy of another model of the file with rounded weights. Each weight of a linear map in a "
    "block is rounded to the nearest of 2^bits − 1 equally spaced values around 0, with one scale "
    "for each output. `bits` is 2 to 16. Embeddings, norms, biases, the unembedding and "
    "activations aren't rounded. Experts that aren't linear maps are E0344.",
    _EDITED,
    "Dettmers et al. 2022, arXiv 2208.07339",
)
_file(
    "model of Python",
    'model toy = python("functions.py:build")',
    "The model and tokenizer returned by a function without arguments. mechdsl calls the "
    "function once per run, and only with `--allow-python`. `validate` never calls it.",
    "tests/python_files/test_models.py",
)
_file(
    "checkpoints",
    'model runs = local("runs/step-*")',
    "One model per folder that matches `*`, in natural order. An experiment on it runs on each "
    "model, along an axis `model` whose values are the text that `*` matches. With `base:`, "
    'the folders are adapters. `zoo("induction/step-*")` are training checkpoints from the '
    "package.",
    "tests/elsewhere/test_models.py",
)
_file(
    "prompts block",
    'prompts colours { x in ["red", "blue"] template "Part 1: {x} Count 1:" }',
    "A set of text rows with named spans and values. Its lines are listed below.",
    _ROWS,
)
_file(
    "metric",
    "metric ld = logit(answer) - logit(wrong)",
    "A named expression for use in measures.",
    "tests/execute/test_metrics.py",
)
_file(
    "metric in Python",
    'metric margin = python("functions.py:margin")',
    "A function from a Python file, called as `margin(logits, rows)`. `logits` has shape [row, "
    "vocab], at the position of the measure, and `rows` holds the values of each row. It "
    "returns one number per row. A third parameter, or one named `tokenizer`, receives the "
    'model\'s `tokenizers.Tokenizer`: `tokenizer.encode(" yes", '
    "add_special_tokens=False).ids`. It runs only with `--allow-python`, and the results store "
    "the file's hash.",
    "tests/python_files/test_python_files.py",
)
_file(
    "group",
    "group counters = L0H1, L1H2",
    "A set of sites that a rule intervenes on jointly. A group in the list of another is E0207.",
    "tests/execute/test_coordinates.py",
)
_file(
    "group of features",
    'basis t = sae("tc") at mlp_out layer 1 group g = saved("graph.json", t)',
    "The features of an attribution graph in a JSON file of circuit-tracer or Neuronpedia; "
    '`saved("graph.json", "capital", t)` has only the features of one supernode. `group g = '
    "features 3, 8 of t, features top 20 of seen of t0` lists features, and takes the "
    "highest-ranked features of another experiment. Rules change the features of a group "
    "together, with one rule for each basis, at the tokens that the rule names. For a file, each "
    "layer needs one of the bases, at `mlp_out`; mechdsl can't check that the graph was computed "
    "with these transcoders. Graphs in `.pt` files are pickles, E0342. "
    '`saved("out/g/mask.json")` has the sites or dimensions that a training chose, and `top n of '
    "g` selects its best sites (`tests/rules/test_saved_groups.py`). "
    '`saved("out/g/mask.json", f)` has the chosen features of a dictionary, which may have another '
    "name here; a dictionary with another SHA-256 is E0342 "
    "(`tests/pipeline/test_saved_feature_groups.py`). A file with features of other bases or with "
    "sites that the model doesn't have is E0342. The results store the file's SHA-256. The file "
    "has digests of the prompts that chose the group; measuring them is W0738 "
    "(`tests/pipeline/test_rows_of_saved_choices.py`).",
    "tests/rules/test_feature_groups.py",
    "Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html",
)
_file(
    "group of receivers",
    "group ends = L2H1.q, L2H3.q, logits",
    "`path SENDER -> ends at POSITIONS` patches the edges to all of these receivers at once. If "
    "the group contains both the end of the model (`logits` or `final_norm`) and other receivers, "
    "mechdsl computes those receivers with all other components held, and then recomputes the "
    "components after them. At the end, it adds the sender's own change of the final residual "
    "stream. The other receivers must be in the attention of one layer or in one MLP, and all "
    "senders must precede them. `through mlps` and `with frozen norms` aren't allowed (E0334). "
    "Models with norms after the sums, such as BERT, aren't supported (E0108). Each row is a full "
    "forward pass.",
    "tests/rules/test_paths_to_end.py",
    "Conmy et al. 2023, arXiv 2304.14997; Goldowsky-Dill et al. 2023, arXiv 2304.05969",
)
_file(
    "circuit",
    "circuit c = embed -> L0H1.q experiment e { prompts fruit "
    "ablate all but c at tokens * with zero measure loss as raw }",
    "Edges of a model. A sender is `embed` (the stream that enters block 0, with positions), a "
    "head or an MLP (`L0.mlp`). A receiver is the `q`, `k` or `v` of a head, an MLP or `logits`; "
    "`k` and `v` count key-value heads. Sites of several heads or layers name all pairs with a "
    "path. A sender that isn't before the receiver is E0335. Only `ablate` takes a circuit. "
    "`ablate c`: the edges of the circuit carry the fill of their sender, at these tokens. Each "
    "receiver reads the stream of this pass plus, for the sender of each ablated edge, its fill "
    "minus its value. mechdsl recomputes the norm before the receiver, and a norm over the queries "
    "or keys of all heads (OLMo 2), so that an edge into one head's query changes those of its "
    "neighbours, too. All other edges carry the "
    "values of this pass. `ablate all but c` ablates all edges outside the circuit. The fill is "
    "`zero`, `mean`, `resample` or a run, such as `fewer`. `against random(39)` draws circuits "
    "with the same number of edges; if each edge is on a path of the circuit from `embed` to "
    "`logits`, this holds for the random circuits, too. At tokens where no measure reads logits, "
    "such a path leads through keys or values that later tokens read. Biases that are added after "
    "heads belong to no sender, except in layers with features of attention. "
    "Each row is a full forward pass. Not in a `run`, with `generate` "
    "or together with a second circuit (E0108). If norms follow attention, as in Gemma 2, or the "
    "sums of the stream, as in BERT, a receiver reads the stream that is recomputed from the "
    "outputs of components through these norms. In classifiers and vision transformers, `logits` "
    "reads the end of the stream, of all tokens, through the head of the model. A "
    "circuit in the vision encoder of prompts contains no edges of the language model: `embed "
    "vision -> q vision layer 0 head 1, mlp_out vision layer 1 -> embed`. Here `embed` is the "
    "projector, which reads the end of the encoder's stream, and in ViP-LLaVA and Qwen3-VL also "
    "the stream after earlier blocks. The rule names tokens of images or videos and ablates edges "
    "at their patches (`tests/image_prompts/test_vision_circuits.py`). Edges of the encoder at "
    "positions, and neurons and features as its nodes, are E0108.",
    "tests/rules/test_ablated_circuits.py",
    "Conmy et al. 2023, arXiv 2304.14997",
)
_file(
    "circuit: edges at positions",
    "circuit c = embed -> L0H1.q at last token",
    "`at` names tokens of the receiver at which the edge is in the circuit; without `at`, it is "
    "in the circuit at all tokens. The token of `k` and `v` is that of the key or value. The "
    "position is resolved in the base run of each row. It is one position, such as `{token 1, "
    "last token}`, that every row has; sweeps are E0304, and `and answer` and tokens that another "
    "experiment ranks are E0108. A position at the end of a list of edges applies only to the "
    "last edge. `ablate c` ablates edges at their positions, `ablate all but c` all edges "
    "elsewhere, both only at the tokens of the rule. A rule without any edge at its tokens is "
    "E0207. `without each edge` removes an edge at all of its positions. `against random(39)` "
    "draws circuits with the same number of edges at each position, and at all tokens. If each "
    "edge of `c` is on a path from `embed` to a token that a measure reads, so is each random "
    "edge: attention moves from earlier to later tokens, and nothing else moves between tokens. "
    "`observe edge_auroc` doesn't take edges with positions (E0108). "
    '`report graph to "circuit.json"` writes the positions, except those that depend on a '
    "parameter or a group (E0108).",
    "tests/rules/test_placed_circuits.py",
    "Conmy et al. 2023, arXiv 2304.14997; Haklay et al. 2025, arXiv 2502.04577",
)
_file(
    "circuit: neurons",
    "circuit c = embed -> L0N3, L0N3 -> logits",
    "Neurons as senders and receivers: `L0N3`, `mlp_hidden layer 0 neurons 3..5`, or a group. A "
    "neuron sends its activation times its output weights. It reads the stream separately, "
    "through the norm before the MLP. In a layer with named neurons, all other neurons are one "
    "node, and the circuit can't also name the MLP (E0334). The bias of such an MLP belongs to no "
    "node. Neurons of one layer with the same ablated incoming edges share one input; each "
    "further input needs another pass through the first maps of the MLP. `against random(39)` "
    "draws edges between the same nodes. Neither a `path` nor a rule on the MLP of such a "
    "layer can be in one experiment with them. If a norm follows the MLP, as in Gemma 2, a "
    "receiver reads the norm of the sum of the neurons, each with its activation or its fill. The "
    "MLP is one module, or two linear maps with a function of their module between them, as in "
    "BART and BERT (others are E0108). Layers of experts have no neurons (E0413). In a file for "
    "`saved(…)`, the MLP of such a layer is the node of its other neurons. `report graph to "
    '"circuit.json"` writes such a file, with the names of this language.',
    "tests/rules/test_neuron_circuits.py",
    "Conmy et al. 2023, arXiv 2304.14997; Marks et al. 2024, arXiv 2403.19647",
)
_file(
    "circuit: features",
    'basis b = sae("sae") at mlp_out layer 1\n'
    "circuit c = embed -> feature 3 of b, feature 3 of b -> logits",
    "Features of a dictionary at `mlp_out` as senders and receivers: `feature 3 of b`, a group of "
    "features, or `mlp_out layer 1 feature 3 of b` if the basis has several layers. A feature "
    "sends its activation times its decoder row. It reads the stream separately, through the norm "
    "before the MLP, the MLP and the encoder; a feature of a transcoder through the norm and the "
    "encoder. In a layer with named features, `L1.mlp` is the rest of the output of the MLP: the "
    "other features, the error and biases. Two dictionaries of one layer, dictionaries at other "
    "sites and other bases are E0342, features and neurons of one layer E0334. For features at "
    "`attn_out`, see the next row. "
    "`against random(39)` draws from the edges between these nodes, heads and MLPs. Neither a "
    "`path` nor a rule inside such an MLP can be in one experiment with them, and the MLP is "
    "one module that reads the stream alone (all E0108). "
    '`report graph to "circuit.json"` writes them with the SHA-256 of the dictionary.',
    "tests/rules/test_feature_circuits.py",
    "Marks et al. 2024, arXiv 2403.19647",
)
_file(
    "circuit: features of attention",
    'basis b = sae("sae") at attn_out layer 0\n'
    "circuit c = L0H1 -> feature 3 of b, feature 3 of b -> logits, L0H1 -> L0.attn",
    "Features of a dictionary at `attn_out` as senders and receivers. A feature reads the sum of "
    "the heads of its layer, each with its output or the fill of an ablated edge, through the norm "
    "after attention if there is one, and the encoder. It sends its activation times its decoder "
    "row. `L0.attn` is the rest of the output of attention: the other features, the error and "
    "biases. The heads of this layer send only to these nodes; an edge from them to another "
    "receiver, and `L0.attn` in a layer without such features, are E0334. Edges into features from "
    "other nodes are E0335. A rule on `attn_out` or `head_out` of this layer can't be in one "
    "experiment with the circuit (E0108). Trainings, random circuits, files and pictures work "
    "as for features at `mlp_out`.",
    "tests/rules/test_attention_feature_circuits.py",
    "Marks et al. 2024, arXiv 2403.19647",
)
_file(
    "circuit: of neurons and features that a training scores",
    'basis b = sae("sae") at mlp_out layer 1\ngroup g = L0N3, features 3, 5 of b\n'
    "circuit c = fit(eap(size: 2), nodes: g, prompts: fruit, with: zero, minimise: loss)",
    "A group of neurons and features: each of them is a node, as in the rows on either. A listed "
    "edge names the group, too (`circuit c = g -> logits`). Neurons and features of one MLP are "
    "E0207, and so is a group in another one.",
    "tests/pipeline/test_neuron_and_feature_scores.py",
    "Marks et al. 2024, arXiv 2403.19647; Syed et al. 2023, arXiv 2310.10348",
)
_file(
    "circuit: discovered",
    "experiment e { prompts fruit from clean into other discover c over heads, mlps using "
    "eap_ig(steps: 5) top 20 edges measure logit(answer) as recovery }",
    "Chooses a circuit and tests it. It stands for `circuit c = fit(eap_ig(steps: 5, size: 20), "
    "prompts: fruit, from: other, maximise: METRIC)`, with the metric of the first measure "
    "(`minimise` for `kl`, `js`, `loss` and `rank`), and "
    "for `ablate all but c at tokens * with other`. With `from clean into other`, the circuit "
    "carries the values of `clean`, and all other edges those of `other`. Its `recovery` is its "
    "`faithfulness`, which is the name in tables. `until faithfulness > 0.9` chooses the size; "
    "`acdc` and `coarse_to_fine` choose it themselves. Halves of the rows, or the parts of "
    "`split`, choose and test. `mechdsl run` trains the circuit first. The experiment has one "
    "block, no other rule and no `for`, and its effects are `recovery`, `faithfulness` or `raw` "
    "(E0207). Other experiments may use the circuit. `over heads, mlps, features of f` also makes "
    "every feature of a dictionary at `mlp_out` or `attn_out` a node, as `nodes: c_nodes` with "
    "`group c_nodes = features * of f` does; several dictionaries are possible. "
    "`over heads, mlps, g` names a group of features, neurons or both. Several groups and "
    "dictionaries are joined; a group that a training chooses or that is read from a file is "
    "named alone (E0207). `over heads, mlps at P using …` adds `at P` to the definition and to the "
    "rule. With several positions, `over heads, mlps at P, Q using …` chooses from each edge at "
    "each position, and the rule is `ablate all but c at {P, Q} with other`: all other edges at "
    "these tokens carry the values of `other`, and the edges at all other tokens aren't ablated. "
    "`over vision at photo tokens` chooses from the edges of the vision encoder of prompts.",
    "tests/pipeline/test_discovered_circuits.py",
    "Conmy et al. 2023, arXiv 2304.14997; Hanna et al. 2024, arXiv 2403.17806",
)
_file(
    "group: searched for",
    "experiment e { prompts fruit search greedy heads up to 3 ablate layer * head * at last token "
    "with zero measure loss as delta }",
    "Finds and tests a group. It stands for `group e_heads = fit(forward_selection(size: 3), "
    "prompts: fruit, with: zero, maximise: METRIC) at layers * heads * at last token`, with the "
    "metric of the first measure, and for `ablate e_heads at last token with zero`. The group is "
    "named after the experiment and the candidates: `heads`, `mlps`, `neurons`, `features`, `dims` "
    "or `layers`. Halves of the rows, or the parts of `split`, choose and test. `mechdsl run` runs "
    "the search first. The experiment has one block, one rule `ablate … with zero`, `with mean` or "
    "`patch` with an axis over the candidates, and no `for`, `generate` or `using`; its first "
    "effect is `delta` or `raw` (E0207). Other experiments may use the group.",
    "tests/pipeline/test_searched_groups.py",
    "Zhou et al. 2024, arXiv 2410.13708",
)
_file(
    "circuit: from a file",
    'circuit c = saved("circuit.json")',
    "The edges that a JSON file of EAP-IG or MIB marks with `in_graph: true`, the edges of a "
    'trained mask (`saved("trained/c/mask.json")`), or a list of edges: `{"edges": ["embed '
    '-> L0H1.q", "L0H1 -> logits at last token"]}`. Edges of a mask or a list may have '
    'positions. `saved("circuit.json", size: 100)` chooses the 100 edges with the largest '
    "absolute scores instead; for equal scores, the edge with the earlier sender. Names are "
    "`input->a0.h1<q>`, `a0.h1->m2` and `m2->logits`, or those of this language. In EAP-IG, query "
    "heads that share a key or a value have one edge each; here, these are one edge, whose score "
    "is the sum. A circuit with only some of them is E0342. So are sizes that don't match the "
    "model, unknown components and pickles (`.pt`). Edges aren't pruned. The results store the "
    "file's SHA-256. If the file has digests of the prompts that chose the edges, as those that "
    "mechdsl writes, measuring them is W0738.",
    "tests/rules/test_circuit_files.py",
    "Hanna et al. 2024, arXiv 2403.17806; Mueller et al. 2025, arXiv 2504.13151",
)
_file(
    "circuit: of features from a file",
    'basis b = sae("sae") at mlp_out layer 1\ngroup g = features 3, 5 of b\n'
    'circuit c = saved("feature-circuit.json", nodes: g)',
    "The edges of a mask or a list may have features, named as in `circuit`, if `nodes` names a "
    "group with these features. All features of the group are nodes. Features that aren't in it, "
    "and a mask that was trained with another dictionary of this name, are E0342.",
    "tests/rules/test_feature_circuits.py",
    "Marks et al. 2024, arXiv 2403.19647",
)
_file(
    "circuit without each edge",
    'circuit c = saved("circuit.json") experiment e { prompts fruit '
    "ablate all but c without each edge at tokens * with zero measure loss as minimality }",
    "One cell for each edge of the circuit, on the axis `edge`: the rule acts on the circuit "
    "without this edge. `as minimality` is the faithfulness that the circuit loses, (m(c) − m(c "
    "without the edge)) / (m(base) − m(∅)): Wang et al.'s minimality with K = ∅. An edge with a "
    "minimality of 0 isn't needed while all others are present. Random controls aren't available "
    "(E0630). A circuit of one edge is an error with `ablate c without each edge` (E0207). `using "
    "eap`, `relp` and `gim` estimate each cell without running it: the value of the run of the "
    "whole circuit, plus the change of what the edge carries times the gradient by what its "
    "receiver reads in that run. One forward pass, and one backward pass per measure, serve all "
    "edges.",
    "tests/rules/test_ablated_circuits.py",
    "Wang et al. 2022, arXiv 2211.00593; Syed et al. 2023, arXiv 2310.10348",
)
_COMPARED = "tests/rules/test_compared_circuits.py"
_file(
    "circuit top",
    'circuit c = saved("circuit.json") '
    "experiment e { prompts fruit for n in [1, 2] { ablate all but top n of c at tokens * "
    "with zero } measure loss as faithfulness expect cmd(faithfulness, n) < 0.4 }",
    "`top n of c` is the n edges of a trained circuit with the largest absolute scores; n is a "
    "count, a share of its edges (`top 25% of c`), a `param` or a `for` variable. More edges than "
    "c has are E0620, and a circuit without scores is E0207. `against random(39)` draws circuits "
    "of each size. `cmd(faithfulness, n)` is MIB's circuit–model distance: the area between the "
    "curve and 1, Σ w |1 − f| by the trapezoidal rule, divided by the range of n. Its integrated "
    "circuit performance ratio (CPR) is `expect auc(faithfulness, n)`, or `measure … as "
    "faithfulness auc over n`. MIB's range is from no edge to every edge of the model.",
    _COMPARED,
    "Mueller et al. 2025, arXiv 2504.13151",
)
_file(
    "observe overlap",
    "circuit c = embed -> L0H1.q circuit d = embed -> L1H1.q "
    "experiment e { observe overlap c with d }",
    "The number of edges that two circuits of a model share, without prompts. `same jaccard` is "
    "|c ∩ d| / |c ∪ d|, `same precision` |c ∩ d| / |c|, `same recall` |c ∩ d| / |d|, and "
    "`same expected` |c| |d| / N for the N edges of the model. `same p` is the probability of as "
    "many shared edges or more if as many edges as in c are drawn uniformly: the upper tail of the "
    "hypergeometric distribution. Such draws need not be on paths, and circuits whose edges are "
    "on paths overlap more often: a small `p` isn't evidence against that. For a comparison with "
    "known edges, name them second. Edges with positions need a `prompts` line: each edge counts "
    "once for each group of tokens that are at the same positions, and an edge without a position "
    "is at all of them. If one circuit has neurons or features of an MLP and the other one "
    "doesn't, an edge of this MLP counts once for each of these nodes and the rest. Features of "
    "two dictionaries in one layer, neurons and features of one layer, and different features of "
    "the output of attention are E0108.",
    _COMPARED,
    "Merullo et al. 2024, arXiv 2310.08744",
)
_file(
    "observe edge_auroc",
    "circuit c = fit(mask(size: 2), prompts: fruit, with: zero, minimise: loss) "
    "circuit d = embed -> L0H1.q experiment e { observe edge_auroc c with d }",
    "The AUROC of the absolute scores of all edges of the model, as the training of c or its file "
    "gives them, for the edges of d. Ties count half. E0207 for a circuit c without a score for "
    "every edge. Edges with positions, and a circuit d with more neurons or features as nodes than "
    "c, are E0108.",
    _COMPARED,
    "Hanley and McNeil 1982",
)
_STEERING = "tests/rules/test_steering.py"
_FITTED = "tests/rules/test_direction_fits.py"

_file(
    "direction: difference of means",
    "direction d = mean_difference(fruit.train, fewer of fruit.train) at resid_post layer 2",
    "The mean over the rows of one run minus the mean over those of another. A run is a block, "
    "a part (`fruit.train`) or a corruption (`fruit.fewer`, `fewer of fruit.train`). Each row "
    "that has the position contributes one vector, averaged over its tokens. The default "
    "position is the last token. All rows of the block are used, whatever the experiment's "
    "`limit`. The conventions report the rows and the norm.",
    _STEERING,
    MEAN_DIFFERENCE,
)
_file(
    "direction: how many rows",
    "direction d = mean_difference(fruit, fruit.fewer, limit: 64) at resid_post layer 2",
    "Uses the first 64 rows of each block, the same rows as `prompts fruit limit 64`. A block "
    "with lists can have more rows than combinations of its values, with different list draws. "
    "Every direction that reads rows accepts `limit:`.",
    _FITTED,
    OWN,
)
_file(
    "direction: two models",
    "direction d = mean_difference(toy, twin, prompts: fruit) at resid_post layer 2",
    "The difference of the same rows in two models of equal shape. Without `prompts:`, the rows of "
    "the experiment that uses the direction.",
    _STEERING,
    OWN,
)
_file(
    "direction: mean",
    "direction d = mean(fruit) at head_out layer 1 heads 0..2",
    "The mean over rows. The outputs of joined heads, or of a group of heads, pass through the "
    "heads' slices of the output projection and are summed. The result is a function vector.",
    _STEERING,
    VECTORS,
)
_file(
    "direction: component",
    "direction d = pca(fruit, component: 2) at resid_post layer 2",
    "A principal component, with length 1. Its coordinate of largest magnitude is positive.",
    _STEERING,
    "Zou et al. 2023, arXiv 2310.01405",
)
_file(
    "direction: probe",
    "direction d = probe(count, fruit) at resid_post layer 2",
    "The weights of a ridge regression on a numeric value, or of a logistic regression on a "
    "value with two words; `kind:` overrides this. `penalty:` is 1 by default. The direction "
    "points toward larger numbers, or from the first word in alphabetical order to the second.",
    _FITTED,
    OWN,
)
_file(
    "direction: trained probe",
    "direction d = probe(decoder)",
    "The weights of a `probe` of the file, one direction for each of its layers and heads. Of a "
    "number, it points toward larger numbers; of a class, it is the weights of the class minus the "
    "mean of those of the other classes, and without `class`, the second of two classes. Its "
    "experiments have the control of trained directions, and can't measure rows of its training.",
    "tests/pipeline/test_trained_probes.py",
    "Marks and Tegmark 2023, arXiv 2310.06824",
)
_file(
    "direction: unembedding",
    'direction d = unembedding(" 3", " 2")',
    "The unembedding row of a token minus that of another token, without the final norm.",
    _STEERING,
    OWN,
)
_file(
    "direction: a trained vector",
    "direction d = fit(vector(length: 8), prompts: fruit.train, maximise: logit(answer)) at "
    "resid_post layer 2",
    "A vector that `mechdsl fit FILE` or `mechdsl run --fit FILE` trains. The training adds it at "
    "all named tokens of the clean run and maximises the mean of the metric (with `minimise`, "
    "minimises it). The metric needs a gradient. Without `length`, the length is learned, and "
    "`penalty: 0.1` adds 0.1 times the squared length to the loss, in units of the mean length of "
    "the activations. `from: fewer` compares it with a mean difference. The options are those of "
    "a trained dictionary; defaults are `steps` (500), `batch` (32 rows), `rate` (0.01) and "
    "`validation` (20%). Rules use it like other directions; edits of a model can't.",
    "tests/pipeline/test_trained_vectors.py",
    OWN,
)
_file(
    "direction: a trained soft prompt",
    "direction d = fit(soft_prompt(tokens: 1), prompts: fewer of fruit.train, maximise: "
    "logit(answer)) at embed",
    "A trained vector for each token of a position in a run, which replaces the token's own "
    "vector. The vectors are trained together, like a trained vector, and start from the means of "
    "the replaced vectors. Often, a corruption inserts the tokens: `at embed at inserted tokens`. "
    "`set embed at inserted tokens to d` writes one vector at each token; `d[token 2]` is a "
    "single vector.",
    "tests/pipeline/test_soft_prompts.py",
    "Lester et al. 2021, arXiv 2104.08691",
)
_file(
    "direction: a trained edit",
    "direction r = fit(reft(rank: 4), prompts: fruit.train, maximise: logit(answer)) at resid_post "
    "layer 2",
    "An edit of low rank that `mechdsl fit FILE` or `mechdsl run --fit FILE` trains. The training "
    "adds Aᵀ B x + c to each activation x at all named tokens of the clean run and maximises the "
    "mean of the metric (with `minimise`, minimises it). A and B have `rank` rows; the rows of A "
    'are orthonormal (LoReFT), except with `kind: "direft"`. The training starts from an edit '
    "that adds 0. The options are those of a trained vector, without `from`. Only `add 2 * r to "
    "SITE` can use edits; other rules, sums and bases can't. The control `against random` adds "
    "vectors of the same lengths in a random subspace.",
    "tests/pipeline/test_trained_edits.py",
    "Wu et al. 2024, arXiv 2404.03592",
)
_file(
    "direction: trained scales",
    "direction s = fit(scales, prompts: fruit.train, maximise: logit(answer)) at z layer 2 head 1",
    "Scales of channels that `mechdsl fit FILE` or `mechdsl run --fit FILE` trains. The training "
    "multiplies the vectors at all named tokens of the clean run by the scales and maximises the "
    "mean of the metric (with `minimise`, minimises it). The training starts from 1, and "
    "`penalty` (0) is the weight of the mean of (s − 1)² in the loss. The options are those of a "
    "trained vector, without `from`. Only `scale … by s` can use scales; other rules, sums and "
    "bases can't.",
    "tests/pipeline/test_trained_scales.py",
    "Park et al. 2025, arXiv 2509.25843",
)
_file(
    "direction: saved",
    'direction d = saved("directions.safetensors", "d")',
    "A vector from a safetensors file. With `at resid_post layer *`, one vector for each layer, "
    "with the names that `save direction` writes (`d.layer3`). The results store the file's hash.",
    _STEERING,
    OWN,
)
_file(
    "direction: arithmetic",
    "direction d = unit(more) - 0.5 * by_layer[layer 1, token -1]",
    "A weighted sum of directions. `unit(…)` has length 1.",
    _STEERING,
    OWN,
)
_BASES = "tests/rules/test_bases.py"
_file(
    "basis: principal components",
    "basis b = pca(fruit, dims: 4) at resid_post layer 2 at last token",
    "The first principal components of the rows, which are averaged over the tokens of the "
    "position; with `each_token: true`, of the vectors of all its tokens. Coordinates are those "
    "of x minus the mean of the rows, so 0 is the mean. The site may be any site of vectors, one "
    "head's `z`, or all heads or neurons as one vector (`z layer 2`, `mlp_hidden layer 2`). The "
    "conventions report how each basis was computed. The largest coordinate of each component is "
    "positive.",
    _BASES,
    OWN,
)
_file(
    "basis: class means",
    "basis b = class_means(count, fruit) at resid_post layer 2 at last token",
    "The subspace spanned by the class means, centred at their mean; a class is the rows with one "
    "value. It has one coordinate fewer than there are values; `dims: 2` keeps the first two. "
    "Each class counts once, whatever its number of rows. The directions are principal components "
    "of the means.",
    _BASES,
    "between-class scatter: Fisher 1936, doi 10.1111/j.1469-1809.1936.tb02137.x",
)
_file(
    "basis: random",
    "basis b = random(dims: 8) at resid_post layer 2",
    "Random orthonormal directions. The subspace depends on the seed and the site, not on the name "
    "of the basis.",
    _BASES,
    "Mezzadri 2007, arXiv math-ph/0609050",
)
_file(
    "basis: directions",
    "basis b = directions(more) at resid_post layer 2",
    "Directions of the file. From a family, a basis uses the direction for its own layer and head.",
    _BASES,
    OWN,
)
_file(
    "basis: unembedding rows",
    'basis b = rows(unembed, " 3", " 2") at resid_post layer 3',
    "The rows of the unembedding for these tokens, without the final norm. If the directions "
    "aren't orthogonal, mechdsl computes coordinates with the pseudo-inverse.",
    _BASES,
    OWN,
)
_file(
    "basis: singular vectors",
    "basis b = svd(weights: mlp_out, dims: 8) at mlp_out layer 2",
    "The left singular vectors of the weights that write to the site, with the gain of a norm "
    "between them and the residual stream: `mlp_out` or `attn_out`.",
    _BASES,
    OWN,
)
_file(
    "basis: Jacobian",
    "basis b = jacobian(fruit, resid_post layer 0 -> resid_post layer 2, dims: 8) "
    "at resid_post layer 0",
    "The first right singular vectors of the Jacobians J of the later site with respect to the "
    "earlier site: eigenvectors of the mean of JᵀJ over all rows. `at` the later site gives the "
    "left singular vectors. `at last token` is the default position; each token has a separate "
    "Jacobian.",
    "tests/rules/test_jacobian_bases.py",
    OWN,
)
_file(
    "basis: saved",
    'basis b = saved("rotation.safetensors", "rotation") at resid_post layer 2',
    "The rows of a matrix in a safetensors file, such as a learned rotation. The results store the "
    "file's hash.",
    _BASES,
    "Geiger et al. 2024, arXiv 2303.02536",
)
_file(
    "basis: your own encoder",
    'basis b = python("functions.py:Wavelets", features: 12) at resid_post layer 1',
    "The features of an object that a class or function of a Python file creates. `encode` maps "
    "vectors [K, width] to features, [K, 12], and `decode` maps these to vectors. The code runs "
    "only with `--allow-python`, and both shapes are checked first. The results store the file's "
    "hash.",
    "tests/rules/test_python_bases.py",
)
_file(
    "basis: sparse autoencoder",
    'basis b = sae("sae") at resid_post layer 1',
    "The features of a dictionary: a folder of SAELens (standard, top-k, batch top-k, top-k by "
    "size, JumpReLU, gated, matching pursuit and temporal) or of sparsify (top-k), or a "
    "safetensors file with `W_enc`, `b_enc`, `W_dec`, `b_dec` and, for JumpReLU, `threshold`. "
    "Rules change features of the current vector and keep its reconstruction error: x becomes x + "
    "(f′ − f) W_dec, in units of x if the dictionary normalises its input. Features of temporal "
    "SAEs depend on preceding tokens and can only be observed. The size of the error is printed. "
    "mechdsl warns if the configuration records the hook point of a different site. The results "
    'store the hash of the files. `sae("sae", labels: "labels.jsonl")` reads descriptions of '
    'features from JSON lines, such as an export of Neuronpedia: `{"index": 0, "description": '
    '"counts"}`. Tables and JSON have them next to the numbers.',
    "tests/dictionaries/test_features.py",
    "Bricken et al. 2023; Gao et al. 2024, arXiv 2406.04093",
)
_file(
    "basis: trained dictionary",
    "basis b = fit(sae(features: 64, k: 4), prompts: fruit.train) at resid_post layer 1",
    "The features of a sparse autoencoder, or with `transcoder(…)` of a transcoder, that "
    "`mechdsl fit FILE` or `mechdsl run --fit FILE` trains on the vectors of the named tokens. "
    '`kind` is "topk" (default), "batch_topk", "matryoshka", "relu", "jump_relu" or "gated" (only '
    "`sae`); the first three take `k: 4`, the others `penalty: 0.1`. `skip: true` gives a "
    "transcoder a linear map of the MLP's input, too. The options of `fit` are `prompts`, "
    "`limit`, `steps` (4000), `batch` (512 vectors), `accumulate` (1 batch per step), `precision` "
    '("fp32", or "bf16" for products of matrices), `rate` (0.001), `seed` (that of the file), '
    "`validation` (10% of the rows, which the training doesn't use), `patience` (none), "
    "`measure_on_training_rows` (false) and `seeds` (none). `seeds: 3` trains one for each of 3 "
    "successive seeds; experiments sweep them along the axis `seed`. Tables end with their mean, "
    "with an interval over prompts and, from five seeds on, one over seeds. "
    'Rules use the basis like `sae("FOLDER")`. A basis that '
    "isn't trained is E0642, an experiment on training rows E0345.",
    "tests/pipeline/test_trained_dictionaries.py",
    "Gao et al. 2024, arXiv 2406.04093; Bussmann et al. 2024, arXiv 2412.06410; Bussmann et al. "
    "2025, arXiv 2503.17547; Rajamanoharan et al. 2024, arXiv 2407.14435",
)
_file(
    "basis: trained cross-layer transcoder",
    "basis b = fit(cross_layer_transcoder(features: 64, k: 4), prompts: fruit.train) at mlp_out "
    "layer *",
    "Features of every layer, each of which reads `mlp_norm` of its layer and writes to `mlp_out` "
    "of this and all later layers; trained together on the vectors of all layers. `kind` is "
    '"batch_topk" (default), "relu" or "jump_relu". `k` is the number of active features per token '
    "and layer on average. The loss is the squared error of all outputs, each in units of its "
    "variance. `attribution_graph(b)`, `graph_ablation(b)`, `graph_weight(b)` and `graph_probe(b)` "
    "use it, and `observe value mlp_out layer * feature * of b at last token` reads its features. "
    "Rules such as `clamp mlp_out layer 1 feature 3 of b at last token to 2` change the outputs of "
    "the MLPs of layer 1 and of all later layers.",
    "tests/pipeline/test_cross_layer_transcoders.py",
    "Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html",
)
_file(
    "basis: a dictionary of another one's decoder",
    "basis big = fit(sae(features: 64, k: 4), prompts: fruit.train) at resid_post layer 1\n"
    "basis b = fit(sae(features: 16, k: 2), prompts: decoder of big) at resid_post layer 1",
    "A sparse autoencoder that is trained on the decoder rows of a dictionary, each scaled to "
    "length 1, at the same site. The dictionary comes from a folder, or `mechdsl fit` trains it "
    "first. The options are those of a trained dictionary without `limit` and "
    "`measure_on_training_rows`; `validation` holds out decoder rows. As a control, the table has "
    "a dictionary of normally distributed vectors with the same mean and covariance, also on "
    "held-out vectors.",
    "tests/pipeline/test_trained_decoders.py",
    "Leask et al. 2025, arXiv 2502.04878",
)
_file(
    "basis: trainer of a Python file",
    'basis b = fit(python("functions.py:Tied", features: 16), prompts: fruit.train) at '
    "resid_post layer 1",
    "The result of training with a custom trainer, a subclass of `torch.nn.Module` in a Python "
    "file. Its methods determine the type of the result: a dictionary (`loss` and `weights`), a "
    "rotation (`directions`), a steering vector (`vector`, in `direction v = fit(…)`) or a mask "
    "(`probabilities` and `sample`, in `group g = fit(…)`). The named arguments are passed to "
    "`__init__`; a dictionary needs `features`, a rotation `dims`, a mask `size`. The code runs "
    "only with `--allow-python`. The options of `fit` are those of other trainers. The key of the "
    "training contains the hashes of the file and of its imports.",
    "tests/pipeline/test_own_trainers.py",
)
_file(
    "basis: a trained rotation",
    "basis b = fit(das(dims: 2), prompts: fruit.train, from: fewer, "
    "maximise: logit(answer of fewer)) at resid_post layer 1",
    "The directions of a subspace that `mechdsl fit FILE` or `mechdsl run --fit FILE` trains. In "
    "the training, the clean run takes its coordinates in the subspace from the run `from`, at "
    "the named tokens; the training maximises the mean of the metric (with `minimise`, minimises "
    "it). The metric needs a gradient, and both runs must have the same number of tokens there. "
    "The options are those of a trained dictionary; defaults are `steps` (500), `batch` (32 "
    'rows), `rate` (0.01) and `validation` (20%). Rules use the basis like `saved("FILE", '
    '"rotation")`.',
    "tests/pipeline/test_trained_rotations.py",
    "Geiger et al. 2023, arXiv 2303.02536",
)
_file(
    "basis: a trained factorization",
    "basis b = fit(semi_nmf(factors: 16), prompts: fruit.train) at mlp_hidden layer 1",
    "Factors of the vectors of the named tokens, with nonnegative activations, which `mechdsl "
    "fit FILE` or `mechdsl run --fit FILE` computes. `semi_nmf` has factors of both signs, and "
    "`penalty` (0.02) makes activations sparse; `nmf` has nonnegative factors, and needs "
    "`mlp_hidden` of a model with ReLU. Rules use the basis like a dictionary; activations of a "
    "vector are nonnegative least squares with that penalty. The options of `fit` are those of a "
    "trained dictionary without `batch`, `accumulate`, `precision`, `rate` and `patience`; "
    "`steps` is 1000 at most.",
    "tests/pipeline/test_trained_factors.py",
    "Ding, Li and Jordan 2010, doi 10.1109/TPAMI.2008.277",
)
_file(
    "basis: trained independent components",
    "basis b = fit(ica(components: 16), prompts: fruit.train) at resid_post layer 1",
    "Directions whose coordinates are as independent as possible (FastICA with the contrast log "
    "cosh), from the vectors of the named tokens; needs scikit-learn. Coordinates have both signs; "
    "over the training vectors, each has mean 0 and variance 1, and its longer tail is positive. "
    "Components that explain more of the variance come first. Rules use the basis like a "
    "dictionary. The options of `fit` are those of a factorization. The table compares the excess "
    "kurtosis of coordinates with that of a random rotation and of principal components.",
    "tests/pipeline/test_trained_components.py",
    "Hyvärinen 1999, doi 10.1109/72.761722",
)
_file(
    "basis: trained canonical correlations",
    "basis b = fit(cca(components: 8), prompts: fruit.train, with: resid_post layer 2) "
    "at resid_post layer 1",
    "Directions whose coordinates correlate most with coordinates of the same tokens at another "
    "site, or with values of the rows (`with: [count, item]`; each word becomes a coordinate of 0 "
    "or 1). `with: resid_post layer 2 of fewer at item tokens` names another run and other "
    "tokens, the same number in each row. The run is a corruption, a model, or a block whose rows "
    "are paired by number, such as the captions of images for the text tower. `ridge` (0.1) times "
    "the mean variance is added to both covariance matrices. `sparse_cca(components: 8, penalty: "
    "0.5)` finds directions with few weights that aren't 0 (Witten et al. 2009). To get the other "
    "coordinate of each pair, declare a second basis with the sites exchanged. Over the training "
    "vectors, coordinates have mean 0 and variance 1; rules use the basis like a dictionary. The "
    "options of `fit` are those of a factorization. The table has held-out correlations, and "
    "those of shuffled pairs, random directions and principal components.",
    "tests/pipeline/test_trained_correlations.py",
    "Hotelling 1936, doi 10.1093/biomet/28.3-4.321",
)
_file(
    "basis: a trained mixture of Gaussians",
    "basis b = fit(mixture(components: 8), prompts: fruit.train) at resid_post layer 1",
    "The probabilities that a vector belongs to each component of a mixture of Gaussians, the "
    'largest component first; needs scikit-learn. `covariance` is "diag" (default), "spherical" or '
    '"full". The direction of a feature is the mean of its component minus the mean of all '
    "training vectors. Rules use the basis like a dictionary. The options of `fit` are those of a "
    "factorization. The table compares the log likelihood of held-out vectors with that of random "
    "means, of one Gaussian, and of a mixture of shuffled vectors.",
    "tests/pipeline/test_trained_mixtures.py",
    "Dempster, Laird and Rubin 1977, doi 10.1111/j.2517-6161.1977.tb01600.x",
)
_file(
    "basis: a trained rotation of a learned size",
    "basis b = fit(boundless_das(penalty: 1), prompts: fruit.train, from: fewer, "
    "minimise: loss) at resid_post layer 1",
    "Like `das`, but the training also chooses the number of directions: it adds `penalty` (1) "
    "times the number of directions, divided by the width, to the loss. `dims` limits the number.",
    "tests/pipeline/test_boundless_rotations.py",
    "Wu et al. 2023, arXiv 2305.08809",
)
_file(
    "lens: a trained tuned lens",
    "lens l = fit(tuned_lens, prompts: fruit.train) at resid_post layer * at tokens *",
    "An affine map h + A h + b of each layer but the last, which `mechdsl fit FILE` or `mechdsl "
    "run --fit FILE` trains on the vectors of the named tokens. The map starts as the logit lens; "
    "the training minimises KL(p ‖ q), where p is the model's next-token distribution and q the "
    "lens's distribution. `observe tuned_lens(l)` reads it. The options of `fit` are those of a "
    "trained dictionary; defaults are `steps` (1000), `batch` (128 vectors) and `rate` (0.001). "
    "The table has the mean KL of each layer on held-out vectors, next to that of the logit lens "
    "and of the average prediction on training vectors.",
    "tests/pipeline/test_trained_lenses.py",
    "Belrose et al. 2023, arXiv 2303.08112",
)
_file(
    "probe: a trained probe",
    "probe t = fit(ridge, prompts: fruit.train, target: count) at resid_post layer 2",
    "A linear map of the vectors of rows, one for each layer and head, that predicts `target`, a "
    "value of the rows: `ridge` a number, `logistic` a class. `mechdsl fit FILE` or `mechdsl run "
    "--fit FILE` trains it with the computation of `observe probe` and the same `penalty`. Other "
    "arguments of `fit` are `limit`, `seed`, `validation` (20% of the distinct rows, of each "
    "class) and `model`: another model of equal shape that runs the rows. If the position has "
    "several tokens, a row's vector is their mean. The table has the accuracy or R² of each map "
    "on held-out rows, next to three controls: a map for shuffled values, maps of 8 random "
    "directions, and the most common class or the mean. `observe probe(t)` and `observe "
    "prediction(t)` read it.",
    "tests/pipeline/test_trained_probes.py",
    "Alain and Bengio 2016, arXiv 1610.01644; Hewitt and Liang 2019, arXiv 1909.03368",
)
_file(
    "group: a trained mask",
    "group g = fit(mask(size: 2), prompts: fruit.train, from: fewer, "
    "minimise: loss) at layers * heads * at last token",
    "The `size` heads with the largest joint effect, as chosen by `mechdsl fit FILE` or `mechdsl "
    "run --fit FILE`. The training patches heads together from the run `from` and maximises the "
    "mean of the metric (with `minimise`, minimises it). `with: zero` or `with: mean` (over the "
    "training rows) instead of `from` ablates them. `at` names the sites to choose from, by "
    "plural axes: layers, heads or neurons. `keep: true` writes all sites but the chosen ones. "
    '`kind` is "hard_concrete" (default) or "straight_through". The options are those of a '
    "trained dictionary; defaults are `steps` (300), `batch` (32 rows), `rate` (0.1) and "
    "`validation` (20%). The group can be used like a list of sites. `at features * of f` chooses "
    "features of a basis, and `at SITE dims *` dimensions of a site. Chosen sites with a "
    "probability below 0.9, and other sites with a probability above 0.1, are W0736.",
    "tests/pipeline/test_trained_masks.py",
    "Louizos et al. 2018, arXiv 1712.01312; Bengio et al. 2013, arXiv 1308.3432; Cao et al. 2021, "
    "arXiv 2104.03514",
)
_file(
    "group: by scores of sites",
    "group g = fit(atp(size: 2), prompts: fruit, with: zero, minimise: loss) at layers * heads *",
    "The sites, positions, features or dimensions with the largest absolute scores. A score is "
    "the difference between the other value (of the run `from`, 0 or the mean) and the clean "
    "value, times the gradient of the metric, summed over tokens and averaged over training rows. "
    "`atp` takes the gradient in the clean run, like `using atp`. `integrated_gradients(size: 2, "
    "steps: 16)` takes the mean gradient at the midpoints of `steps` steps from the clean to the "
    "other value; all candidates of a site and layer move together. Instead of `size`, "
    "`faithfulness: 0.9` selects the smallest group in this order whose faithfulness on the "
    "training rows exceeds 0.9. `batch` (32) and `validation` (20%) are the options of `fit`; "
    "other values are as for a trained mask. The table has the mean of the metric over held-out "
    "rows while all other candidates are written (`kept`), and while only the group is written "
    "(`written`).",
    "tests/pipeline/test_node_scores.py",
    "Nanda 2023, Attribution patching; Shrikumar et al. 2016, arXiv 1605.01713; Sundararajan et "
    "al. 2017, arXiv 1703.01365",
)
_file(
    "group: by forward selection",
    "group g = fit(forward_selection(size: 2), prompts: fruit, with: zero, minimise: loss) "
    "at layers * heads *",
    "Sites, positions, features or dimensions that are added one after another. Each step runs the "
    "training rows with the group and each other candidate written together, and adds the "
    "candidate whose mean of the metric is largest (`maximise`) or smallest (`minimise`). The "
    "search ends at `size` candidates, or before if none moves the mean in this direction. `top n "
    "of g` is the first n candidates. `size: 25%` is a share of all candidates, also for other "
    "groups and circuits from `fit`. The metric needs no gradient. `batch` (64) and `validation` "
    "(20%) are the options of `fit`; other values are as for a trained mask.",
    "tests/pipeline/test_node_searches.py",
    "Zhou et al. 2024, arXiv 2410.13708",
)
_file(
    "circuit: trained",
    "circuit c = fit(mask(size: 2), prompts: fruit, with: zero, minimise: loss)",
    "The edges that a mask chooses from all edges of the model, as for the sites of a group. In "
    "training, the chosen edges carry other values at the tokens after `at` (all by default): the "
    "outputs of their senders in the run `from`, 0 (`with: zero`) or the mean over training rows "
    "(`with: mean`). With `keep: true`, all edges except the chosen ones carry these values. An "
    "edge often matters only together with the rest of its path. Therefore, the expected number "
    "of open gates starts at 90 % of the edges, and falls exponentially to `size` over the first "
    "70 % of the steps. `patience` is E0342. For the table and for experiments without `against`, "
    "mechdsl draws random circuits as for `against random`. If a circuit is trained and tested on "
    "the same block without a `split`, mechdsl splits the block: it trains the circuit on 80 % of "
    "the rows, and measures experiments that use it on the others.",
    "tests/pipeline/test_trained_circuits.py",
    "Bhaskar et al. 2024, arXiv 2406.16778; Conmy et al. 2023, arXiv 2304.14997",
)
_file(
    "circuit: by scores of edges",
    "circuit c = fit(eap_ig(size: 2, steps: 3), prompts: fruit, from: fewer, minimise: loss)",
    "The edges of the model with the largest absolute scores. A score is the difference between "
    "the sender's other value (in the run `from`, 0 or the mean) and its clean output, times the "
    "gradient of the metric with respect to the receiver's input (separate for q, k and v, and "
    "through the norm). It is summed over tokens and averaged over training rows. `eap` takes the "
    "gradient in the clean run. `eap_ig` takes the mean gradient at the fractions k/`steps` (k = "
    "1 to `steps`) between the other embedding and the clean embedding; `eap_ig_activations` "
    "interpolates the output of the sender's own module instead. These move at all tokens, or at "
    "those of `at` if others have no other value. `relp` and `gim` are `eap` with the gradients "
    "of `using relp` and `using gim`. `atp_qk` is `eap`, but into queries and keys, the score is "
    "the exact change of the attention weights times the gradient by them; `atp_star` is the mean "
    "of the absolute scores of a row, each with the gradient of one layer left out. `cdt` scores "
    "by the rules of `using cdt`. Instead of `size`, `faithfulness: 0.9` selects the smallest "
    "circuit in this order whose faithfulness on the training rows exceeds 0.9; sizes are tried "
    'one after another. `select` is "greedy" (default), from `logits` backwards, or "top". '
    "`batch` (8) and `validation` (20%) "
    "are the options of `fit`; other values are as for a trained circuit. `stack: vision` chooses "
    "from the edges of the vision encoder of prompts instead, at the patches of the tokens of `at` "
    "(`photo tokens`). It is an argument of searches and of `mask`, too. Values move along a path "
    "at these patches only. `relp`, `gim`, `atp_qk`, `atp_star` and `cdt` (E0608), `nodes` and "
    "several positions (E0108) aren't available there "
    "(`tests/image_prompts/test_vision_edge_scores.py`).",
    "tests/pipeline/test_edge_scores.py",
    "Syed et al. 2023, arXiv 2310.10348; Hanna et al. 2024, arXiv 2403.17806; Mueller et al. 2025, "
    "arXiv 2504.13151; Jafari et al. 2025, arXiv 2508.21258; Edin et al. 2025, arXiv 2505.17630; "
    "Kramár et al. 2024, arXiv 2403.00745; Hsu et al. 2024, arXiv 2407.00886",
)
_file(
    "circuit: by scores of edges at positions",
    "circuit c = fit(eap(size: 2), prompts: fruit, with: zero, minimise: loss) "
    "at item 1 token, last token",
    "With several positions after `at`, trainers such as `eap`, `eap_ig` and `atp_qk` "
    "score each edge at each position: the sum of its products over the tokens of the position. "
    "The circuit has edges at positions; `size` and `top n of c` count each edge at each of its "
    "positions. Edges at tokens outside all positions keep their values in training and can't be "
    "chosen. Each selected edge leads to `logits` from its tokens; keys and values also act at "
    "later tokens. A position that some row lacks is E0310, positions with a common token are "
    "E0342, sweeps are E0304. Encoder-decoders take one position, such as `tokens *` (E0108). "
    "`acdc`, `greedy`, `coarse_to_fine` and `mask` choose from each edge at each position, too. A "
    "search tries the edges or groups of one receiver or module at the last position of the list "
    "first, then at the position before it. Heads or inputs that `coarse_to_fine` ablates together "
    "are at one position (`tests/pipeline/test_placed_edge_searches.py`).",
    "tests/pipeline/test_placed_edge_scores.py",
    "Haklay et al. 2025, arXiv 2502.04577",
)
_file(
    "circuit: of neurons that a training scores",
    "group g = L0N3, L0N5\ncircuit c = fit(eap(size: 2), nodes: g, prompts: fruit, with: zero, "
    "minimise: loss)",
    "Each neuron of the group is a node, and the other neurons of its layer are one node, which is "
    "printed as `L0.mlp`. All edges between these nodes, heads and other MLPs are scored as "
    "without `nodes`: the scores of all neurons of a layer add up to that of its MLP, unless a "
    "norm follows the MLP, as in Gemma 2. Searches and masks take `nodes`, too. Sites that aren't "
    "neurons, more than 500 neurons, and a group that "
    "depends on another experiment are E0207.",
    "tests/pipeline/test_neuron_edge_scores.py",
    "Syed et al. 2023, arXiv 2310.10348; Marks et al. 2024, arXiv 2403.19647",
)
_file(
    "circuit: of nodes that a training chooses",
    "group g = fit(atp(size: 2), prompts: fruit, with: zero, minimise: loss) at mlp_hidden layer 0 "
    "neurons * at tokens *\ncircuit c = fit(eap(size: 2), nodes: g, prompts: fruit, with: zero, "
    "minimise: loss)",
    "The neurons or features of a trained group are nodes of a circuit, which is trained after the "
    "group, or whose edges the file lists (`circuit c = g -> logits`). The key of the circuit's "
    "training contains the chosen nodes. A block without `split` is split for both trainings. Rows "
    "that the circuit holds out and that the group is trained on are E0345. Several `seeds` of the "
    "group are E0207.",
    "tests/pipeline/test_trained_nodes.py",
    "Syed et al. 2023, arXiv 2310.10348; Marks et al. 2024, arXiv 2403.19647",
)
_file(
    "circuit: of features that a training scores",
    'basis b = sae("sae") at mlp_out layer 1\ngroup g = features 3, 5 of b\n'
    "circuit c = fit(eap(size: 2), nodes: g, prompts: fruit, with: zero, minimise: loss)",
    "Each feature of the group is a node; the other features of its layer and the error of the "
    "dictionary are one node, which is printed as `L1.mlp`. All edges between these nodes, heads "
    "and other MLPs are scored: the scores of edges from a layer's nodes to a receiver add up to "
    "that of its MLP, as do those into them. Searches and masks take `nodes`, too. A basis that "
    "isn't a dictionary at `mlp_out` is E0342. "
    "`relp` and `gim` of a dictionary that normalises vectors is E0608.",
    "tests/pipeline/test_feature_edge_scores.py",
    "Marks et al. 2024, arXiv 2403.19647; Syed et al. 2023, arXiv 2310.10348",
)
_file(
    "circuit: by a search",
    "circuit c = fit(acdc(threshold: 1), prompts: fruit, with: zero, minimise: loss)",
    "The edges that are left after a search that ablates edges one after another. `acdc` tries "
    "each edge, from `logits` backwards: it ablates the edge, and restores it if the mean of the "
    "metric over training rows becomes worse by `threshold` or more. `coarse_to_fine(threshold: "
    "1)` first tries all heads or the MLP of a layer together, then single heads, then single "
    "inputs of queries, keys and values, then single edges. `greedy(size: n)` ablates, in each "
    "step, the edge whose ablation worsens the mean least, until n edges are left. All searches "
    "ablate edges that lead only to ablated edges, without a run. `batch` (64) and `validation` "
    "(20%) are the options of `fit`; other values are as for a trained circuit.",
    "tests/pipeline/test_edge_searches.py",
    "Conmy et al. 2023, arXiv 2304.14997, algorithm 1",
)
_file(
    "group: a trained mask of positions",
    "group g = fit(mask(size: 1), prompts: fruit.train, with: mean, minimise: loss) "
    "at embed at each item token",
    "With one site and several positions, a mask chooses positions, the same for all rows. Rules "
    "use them at any site: `at g tokens` are the tokens of all chosen positions together, "
    "`at each g token` are one run for each. Each position has one gate. Positions that share a "
    "token are E0342, and a group of positions that is used as a site is E0207. "
    '`group g = saved("out/g/mask.json")` reads the chosen positions from a file; prompts without '
    "the spans of these positions are E0308, and rows without a chosen position E0310 "
    "(`tests/pipeline/test_saved_positions.py`).",
    "tests/pipeline/test_trained_position_masks.py",
    "Louizos et al. 2018, arXiv 1712.01312",
)
_file(
    "basis: transcoder",
    'basis t = transcoder("tc") at mlp_out layer 1',
    "The features of a transcoder, in the layouts of `sae`, or in a `layer_1.safetensors` of "
    "circuit-tracer. They are computed from the current `mlp_norm` of the block, or from "
    "`resid_mid` if the configuration records it, and rules change `mlp_out` by (f′ − f) W_dec. "
    "Rules on the same features act one after the other, each on the features that earlier ones "
    "left. "
    "`set mlp_out layer 1 at tokens * to reconstruction of t` replaces the MLP. The features of a "
    "cross-layer transcoder in circuit-tracer's layout change the `mlp_out` of their layer and of "
    "all later layers, each by (f′ − f) times the decoder for it (Ameisen et al. 2025, Circuit "
    "Tracing). E0342 for `reconstruction of`, `without error`, `project out` and exchanged "
    "features, which need a transcoder of one layer; E0108 with a circuit or `replace block`. "
    "Groups may have features of several layers, and `using integrated_gradients` moves the "
    "outputs of all layers that they write to together. They aren't nodes of circuits (E0342).",
    "tests/rules/test_transcoders.py",
    "Dunefsky et al. 2024, arXiv 2406.11944",
)
_file(
    "basis: parts of directions",
    "basis b = row_space(of_head) at z layer 2 head 1",
    "The parts of directions that the weights after the site read: projections onto the row space "
    "of these weights. `null_space(of_head)` has the remaining parts, which change nothing "
    "directly. The site is `mlp_hidden`, or `z` with all heads or one. A direction without such a "
    "part is an error.",
    "tests/rules/test_row_space.py",
    "Makelov et al. 2023, arXiv 2311.17030",
)
_file(
    "basis: neurons",
    "basis b = neurons at mlp_hidden layer 2",
    "The components of the vector itself: coordinate 5 is neuron 5.",
    _BASES,
    OWN,
)
_file(
    "basis: a family",
    "basis b = pca(fruit, dims: 2) at resid_post layer *",
    "One basis for each layer or head in the sweep. A rule uses the basis of the layer and head "
    "that it writes.",
    _BASES,
    OWN,
)
_file(
    "direction: a family",
    "direction d = mean_difference(fruit, fruit.fewer) at resid_pre layer * at token -2..-1",
    "One direction for each layer, head and position in the sweep.",
    _STEERING,
    REFUSAL,
)
_file(
    "group of what was found",
    "group fv_heads = top 3 of cie",
    "The sites that another experiment ranks highest, joined.",
    "tests/onward/test_sites.py",
    VECTORS,
)
_file(
    "seed",
    "seed 7",
    "The seed of all random numbers: rows, noise, resampling and random targets. The default "
    "is 0. Random draws depend on a row's content, not on its order in the file, so sorting a "
    "data file doesn't change the table.",
    "tests/data/test_sampling.py",
)
_file(
    "experiment",
    "experiment e { model toy prompts fruit limit 16 "
    "ablate L0H1 at last token with zero measure loss as delta }",
    "Rules, measures and reports. All rules act in one run. Their sweeps are the axes of the "
    "table, with one run per combination.",
    "tests/execute/test_coordinates.py",
)

# --- prompts --------------------------------------------------------------------------------------

_prompts(
    "template",
    'template "Part 1: {fruits} Count 1:"',
    "The text. Each placeholder is a span with that name; `{s2 = s}` is a second, separate span.",
    _ROWS,
)
_prompts(
    "several templates",
    'template in ["{fruits} Count 1:", "{fruits} Count 2:"]',
    "Combines each template with all values. `template` is a value like any other.",
    _ROWS,
)
_prompts(
    "chat",
    'chat { enable_thinking: false user "Count: {fruits}" assistant "So" }',
    "Chat turns (`system`, `user`, `assistant`, `tool`), formatted with the chat template of the "
    "model's tokenizer, and constants for variables of the template; one that it doesn't read is "
    "E0207. Each turn is a "
    "span named after its role (`last-user token`, `user 2 tokens`). A final assistant turn is "
    "the beginning of the reply; otherwise the template opens a reply. The template adds the "
    "special tokens, and a row whose text contains one is rejected. For templates that print "
    "the date, it is 26 July 2024.",
    "tests/data/test_chats.py",
    "transformers, `apply_chat_template`",
)
_prompts(
    "values", "count in 3..9", "The values of a name. Each combination of values is a row.", _ROWS
)
_prompts(
    "derived value",
    "half = count / 2",
    "A value computed from other values. Expressions are arithmetic, `other(x)` (another value "
    "of the same domain), `choice(…)`, `shuffle(column)`, `if … then … else …` and "
    "`number(column)` (the number that a text spells). `a, b = others(x)` gives several different "
    "values.",
    _ROWS,
)
_prompts(
    "list",
    'fruits = list(item, count, sep: " ")',
    "`count` draws of `item`, joined by `sep`. Each draw is a span `item`, and each separator "
    "is a span `sep of fruits`.",
    _ROWS,
)
_prompts(
    "list of records",
    'shots = list("{prompt} {n}", 1, from: example)',
    "A list whose items are texts about records of a block with `rows`, this one or another: "
    "the examples of a few-shot prompt. The row's own record is never an example, and with "
    "`distinct: true` no record appears twice. Their placeholders are spans: `each n of shots "
    "token`.",
    "tests/data/test_shots.py",
    VECTORS,
    context='rows "facts.jsonl"',
)
_prompts(
    "shuffled shots",
    "corrupt mixed { shots = shuffle(shots, colour) }",
    "The same examples with one of their values shuffled among them, so that it no longer "
    "matches. The rest of the prompt doesn't change. If any two values differ, at least one "
    "text changes.",
    "tests/data/test_shots.py",
    VECTORS,
    context='template "{shots} Count 1:" colour in ["red", "green"] '
    'shots = list("{item} {colour}", 4, sep: " ")',
)
_prompts(
    "value in Python",
    'size = python("functions.py:total")',
    "A function from a Python file, called as `total(row)` with a `dict` of the row's values. "
    "In a corruption, it computes the new value. It runs only with `--allow-python`.",
    "tests/python_files/test_python_files.py",
)
_prompts(
    "rows",
    'rows "facts.jsonl"',
    "One row per record of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file. The columns "
    "are values. If the first line of a table has no comma, it may be separated by `;`, tabs or "
    "`|`. Text is UTF-8, or UTF-16 with a byte order mark. White space around the names of CSV "
    "columns is ignored.",
    "tests/data/test_files.py",
)
_prompts(
    "rows of a data set of the hub",
    'rows hf_dataset("facts", split: "train")',
    "One split of a dataset on the local disk. The dataset is a folder of files, a folder "
    "written by `save_to_disk` (`datasets` package), or the name of a snapshot in the Hugging "
    "Face cache. `config:` and `revision:` select a version. mechdsl downloads nothing. Arrow "
    "and Parquet need `pip install 'mechdsl[frames]'`.",
    "tests/data/test_hub_datasets.py",
)
_prompts(
    "rows of several files",
    'rows "fact*.jsonl"',
    "The rows of all files that match, in the natural order of their names. `*` is a part of one "
    "name, also of a folder. The files end in `.jsonl`, `.json` or `.parquet`. A new, changed or "
    "removed file changes the results' key.",
    "tests/data/test_patterns.py",
)
_prompts(
    "distinct rows",
    'rows "facts.jsonl" distinct',
    "Removes duplicate records. Without it, each duplicate counts, and W0781 reports their "
    "number. Generated rows are always deduplicated. `split` assigns equal records to the same "
    "part.",
    "tests/data/test_rows.py",
)
_prompts(
    "streamed rows",
    'rows "facts.jsonl" streamed',
    "The rows of JSON lines or Parquet files, or of a data set on the disk, that may be larger "
    "than memory. They are read in parts, and only by `save top … rows of …` and by the training "
    "of a dictionary or a lens. The block has "
    "a template, `where` and values computed from columns, but no `in`, drawn values, answers, "
    "corruptions or `split`. Every line is checked before the run. Rows that are longer than the "
    "model's context are left out, and their number is printed. `--limit 1000` reads the first "
    "1,000 rows.",
    "tests/rules/test_saved_rows.py",
)
_prompts(
    "rename",
    "rename { thing = object }",
    "Renames columns: new name = column.",
    "tests/data/test_files.py",
    context='rows "facts.jsonl"',
)
_prompts(
    "rename a quoted column",
    'rename { thing = "object" }',
    "A column in quotes may have spaces, signs or any other characters in its name.",
    "tests/data/test_odd_tables.py",
    context='rows "facts.jsonl"',
)
_prompts("where", "where count > 3", "Keeps only rows that satisfy the condition.", _ROWS)
_prompts(
    "where tokens",
    "where tokens(answer) = 1",
    "The number of tokens of a text that follows the prompt, or of a span in the prompt "
    "(`tokens(subject)`). It uses the tokenizer of the experiment's model. A separate space "
    "token before a text isn't counted.",
    "tests/data/test_token_counts.py",
)
_prompts(
    "split",
    "split 50%",
    "Divides the rows into `NAME.train`, which receives this share, and `NAME.test`. A row "
    "belongs to the same part in every experiment.",
    "tests/execute/test_effects.py",
)
_prompts(
    "answer",
    'answer " {count}"',
    "The expected continuation of the prompt. It is tokenized as a continuation of the prompt. "
    "If all answers share a leading token, that token becomes part of the prompt.",
    "tests/data/test_answers.py",
)
_prompts(
    "wrong",
    'wrong " {count - 1}"',
    "A text to compare with the answer.",
    "tests/data/test_answers.py",
)
_prompts(
    "text",
    'text rival = " {count + 1}"',
    "A further text for measures.",
    "tests/data/test_answers.py",
)
_prompts(
    "span in a column",
    "span object in prompt",
    "The position of the text of one column within that of another. A column with a list marks "
    "each of its texts, which are then occurrences of the span: `used tokens`.",
    "tests/data/test_positions.py",
    context='rows "facts.jsonl"',
)
_prompts(
    "named span",
    'span slot = "Count"',
    "Names the last occurrence of a text.",
    "tests/data/test_positions.py",
)
_prompts(
    "corrupt",
    "corrupt fewer { count = count - 1 }",
    "A changed run of each row. Values derived from the changed value change with "
    "it, and a list keeps its draws and is truncated or extended at its end. Experiments and "
    "fits that use the corruption exclude rows that it doesn't change; others keep them. A "
    "note after the table reports their number.",
    _ROWS,
)

# --- positions ------------------------------------------------------------------------------------

_position("last token", "last token", "The last token of the prompt text.")
_position("first token", "first token", "The first token of the prompt text.")
_position("special token", "bos token", "A special token: `bos`, `cls` or `sep`.")
_position(
    "token 5",
    "token 5",
    "The token with this index in the model's input, including special tokens. Negative "
    "indices count from the end.",
)
_position(
    "range of tokens", "token 2..6", "A sweep with one run per token. Both ends are included."
)
_position("tokens 2..6", "tokens 2..6", "All of these tokens in one run.")
_position(
    "token *",
    "token * align left",
    "A sweep over every token. Prompts of different lengths are aligned on the `left` or the "
    "`right`.",
)
_position("tokens *", "tokens *", "All tokens in one run.")
_position("NAME token", "fruits token", "The last token of a span that occurs once.")
_position("NAME tokens", "fruits tokens", "All tokens of all occurrences of a span, joined.")
_position(
    "each token of",
    "each token of fruits",
    "One run per token of the span. If the span's length varies, the tokens are labelled "
    "first, middle and last.",
)
_position("first token of", "first token of fruits", "The first token of a span.")
_position(
    "offset", "last-item token + 1", "A position this number of tokens later, or earlier with `-`."
)
_position("last-NAME", "last-item token", "The last occurrence of a repeated span.")
_position("NAME number", "item 3 token", "The third occurrence, counted from 1.")
_position(
    "each NAME",
    "each item token",
    "One run per occurrence, at its last token. A cell excludes prompts with fewer "
    "occurrences, and n counts the others. The axis has the names `position` and `item`, and "
    "the JSON coordinates have both, with `item` as a number (`expect prob(item: 3) > 0.5`). "
    'In the text of a metric, `{item.index}` is the number of the occurrence, as in `prob(" '
    '{item.index}")`.',
)
_position(
    "separators",
    "each sep of fruits token",
    "The separators of a list, with one run each.",
    context="prompts commas limit 4",
)
_position("literal", '"Count" token', "The last occurrence of a literal text.")
_position("inside another", "last-item of fruits token", "An occurrence within another span.")
_position("A, B", "last-item token, last token", "A sweep over positions.")
_position("{A, B}", "{last-item token, last token}", "Both positions in one run.")
_position(
    "tokens between",
    "tokens between first-item token and last token",
    "All tokens between two positions, both included, in one run; `each token between …` "
    "sweeps over them.",
)
_position(
    "tokens except",
    "tokens except fruits tokens",
    "All other tokens of the prompt text in one run; `each token except …` sweeps over them.",
)
_answer_position(
    "answer tokens",
    "answer tokens",
    "The tokens, after the prompt, of the text that a measure reads; also `answer token`, "
    "`first token of answer + 1` and `each token of answer`. A measure with several texts runs "
    "a separate forward pass for each text. There, `answer` refers to the tokens of that text. "
    "All runs have the same text after the prompt, so a patch copies each of its tokens to the "
    "same token. Means and resampling use rows with their own texts. If a prompt has a span "
    "named `answer`, the span takes precedence.",
)
_answer_position(
    "and answer",
    "tokens * and answer",
    "The prompt and the answer that follows it; `tokens *` is the prompt alone. `token * and "
    "answer` sweeps over both.",
)

# --- syntax of sites; the components are in `sites.py` --------------------------------------------

_COORDINATES = "tests/execute/test_coordinates.py"

_site(
    "layer 0..2",
    "resid_post layer 0..2",
    "A sweep with one run per layer. Both ends are included; `0..30 step 2` names every second "
    "layer.",
    _COORDINATES,
)
_site("layers 0..2", "resid_post layers 0..2", "All of these layers in one run.", _COORDINATES)
_site(
    "layer *",
    "layer * head *",
    "Every value. `layer *` selects the layers that have the site; the conventions list them if "
    "other layers lack it. `head` without a component refers to `z`, and `neuron` to `mlp_hidden`.",
    _COORDINATES,
)
_site(
    "relative depth",
    "resid_post layer 25%..75%",
    "Relative depth: 0% is the first layer and 100% the last, rounded half up. The table shows "
    "percentages.",
    "tests/elsewhere/test_models.py",
)
_site(
    "window",
    "resid_post layer * window 3",
    "One run per centre l, which joins the layers l − ⌊w/2⌋ to l + ⌈w/2⌉ − 1. Windows are "
    "truncated at the first and last layer. Where some blocks lack the site, only the layers "
    "that have it are counted: with attention in layers 1, 3 and 5, window 3 around 3 joins these.",
    _COORDINATES,
    TRACING,
)
_site(
    "short name",
    "L1H2",
    "Layer 1, head 2: its `z`. Also `L1H2.q`, `L3.mlp`, `L3.resid` and `L3N5`.",
    _COORDINATES,
)

_site(
    "stack",
    "z cross layer 1 head *",
    "A stack of an encoder-decoder: `encoder`, such as `resid_post encoder layer 2` and "
    "`embed encoder`, or `cross`, "
    "the decoder's attention to the encoder. Without one, the site is the decoder's. The encoder "
    "reads the prompt, and the decoder writes the answer after its first tokens, which its config "
    "names. At sites of `encoder`, and at `k cross` and `v cross`, positions are tokens of the "
    "prompt. At other sites they are tokens of the decoder, and a measure reads its last one. "
    "`attention cross …` and `attention encoder …` are edges of these stacks. `pattern cross …` is "
    "at tokens of the decoder and has a weight for each token of the prompt. `fit` trains at sites "
    "of all stacks. Constructs that "
    "[load-models.md](load-models.md#experiment-on-an-encoder-decoder) lists are E0108 or E0342.",
    "tests/execute/test_encoder_decoders.py",
    ATTENTION,
)
_site(
    "path in a stack",
    "q cross layer 2 head 1",
    "An end of a `path` in an encoder-decoder, such as `path z cross layer * head * -> q cross "
    "layer 2 head 1 at last token`. The heads of the encoder, of the decoder and of its attention "
    "to the encoder (`z cross`) are held, and so are the MLPs of both. Receivers in that "
    "attention that read the decoder are `attn_norm cross` and `q cross`. Paths from the encoder "
    "end at its heads and MLPs, at its output (`final_norm encoder`), or at the keys and values "
    "that the decoder reads: `path z encoder layer 0 head * -> v cross layers * heads * at "
    "capital tokens`. They don't go on to `logits`, because the decoder's heads are held (E0335). "
    "`using eap`, `eap_ig`, `eap_ig_activations`, `atp_qk`, `atp_star`, `relp`, `gim` and `cdt` "
    "estimate such paths. It is also "
    "an end of an edge of a `circuit`. In the decoder, heads that attend to the encoder (`z cross "
    "layer 0 head 1`) are "
    "senders, and their queries receivers. In the encoder, senders are `embed encoder` (the "
    "stream that enters block 0), `z encoder layer 0 head 1` and `mlp_out encoder layer 0`; "
    "receivers are `q encoder layer 1 head 0`, `k encoder …`, `v encoder …`, `mlp_norm encoder "
    "layer 1`, and for the encoder's output, through its final norm, `k cross layer 2 head 0` and "
    "`v cross layer 2 head 0`. No other edge leads from the encoder to the decoder (E0335). Edges "
    "of the encoder are ablated at tokens that it reads, edges of the decoder at its own. If a "
    "rule ablates edges of only one stack, its positions refer to the text of that stack. If it "
    "ablates edges of both, `tokens *` is the tokens of both, a part of the prompt such as "
    "`subject tokens` names tokens of the encoder, and `last token` is the decoder's last token; "
    "the last two can't be combined (E0108). `against random(39)` draws edges of both stacks and "
    "rejects edges with positions (E0630). If each edge of the circuit is on a path from `embed` "
    "or `embed encoder`, so is each random edge. `fit(…)` finds circuits, except at "
    "several positions or only at tokens of the encoder (E0108). A neuron of the encoder is "
    "`mlp_hidden encoder layer 0 neuron 3`.",
    "tests/execute/test_encoder_decoder_paths.py",
    PATHS,
)

# --- rules ----------------------------------------------------------------------------------------

_TRANSPLANTS = "tests/rules/test_transplants.py"
_OBSERVED = "tests/rules/test_observations.py"
_TOGETHER = "tests/rules/test_over_rows.py"
_TOKENS = "tests/rules/test_over_tokens.py"
_WEIGHTS = "tests/execute/test_observed_weights.py"
_WEIGHTS_IN_FILES = "tests/rules/test_weight_observations.py"
_EDGES = "tests/rules/test_attention.py"
_PATHS = "tests/rules/test_paths.py"

_rule(
    "patch",
    "patch layer * head * at last-item token",
    "Copies the vector of the source run into the base run. The position is located separately "
    "in each run.",
    f"{TRACING}; {PATCHING}",
    "tests/execute/test_sites.py",
)
_rule(
    "patch … onto",
    "patch resid_post layer * at last-item token onto last token",
    "Reads at the first position in the source run and writes at the second position in the "
    "base run. If both sides sweep, they advance together.",
    SCOPES,
    _TRANSPLANTS,
)
_rule(
    "patch … into layer",
    "patch resid_post layer 1 at last token into layer *",
    "Reads at the layers of the site and writes at these layers. Several target layers form an "
    "axis `to_layer`.",
    SCOPES,
    _TRANSPLANTS,
)
_rule(
    "patch … with RUN",
    "patch resid_post layer * at last token with other",
    "Uses another source run for this rule only.",
    PATCHING,
    _TRANSPLANTS,
)
_rule(
    "ablate with zero",
    "ablate layer * head * at last token with zero",
    "Sets the vector to zero.",
    CIRCUIT,
    "tests/execute/test_sites.py",
)
_rule(
    "ablate with mean",
    "ablate layer * head * at last token with mean",
    "Sets the vector to the mean at that position over the clean rows that remain after "
    "`limit` and `keep`. `mean of fewer` uses another run, `mean of listed` another prompt "
    "set, and `mean of fruit.train` a part of a split. `mean by count` uses the rows with the "
    "same value of `count`.",
    CIRCUIT,
    "tests/execute/test_effects.py",
)
_rule(
    "ablate with resample",
    "ablate layer * head * at last token with resample",
    "Sets the vector to that of another clean row, chosen once with the seed among the rows "
    "that remain after `limit` and `keep`. With `resample of listed`, it uses a row of another "
    "prompt set, sampled with replacement for each row from the row's content.",
    CIRCUIT,
    "tests/execute/test_sites.py",
)
_rule(
    "replace",
    'replace last-item token with "plum"',
    "Replaces the text of these tokens before the model runs. `fruits tokens` replaces the "
    "whole span once, `item tokens` replaces every item, and `each item tokens` replaces one "
    "item per run. With other rules or positions in the experiment, the new text must have the "
    "same number of tokens.",
    OWN,
    "tests/execute/test_effects.py",
)
_rule(
    "swap",
    "swap resid_post layer * at first-item token with last-item token",
    "Exchanges the base run's vectors at the two positions.",
    OWN,
    _TRANSPLANTS,
)
_rule(
    "freeze",
    "freeze mlp_out layers * at tokens *",
    "Holds the value of the base run while other rules change preceding components.",
    MEDIATION,
    _TRANSPLANTS,
    context="patch layer 0 head 1 at last-item token",
)
_rule(
    "set to a number",
    "set resid_post layer * at last token to 0.5",
    "Sets every component of the vector to this number, which may be a `param` or a `for` "
    "variable.",
    OWN,
    _TRANSPLANTS,
)
_rule(
    "set to a direction",
    "set resid_post layer 2 at last token to 2 * more",
    "Sets the vector to the direction times the number.",
    OWN,
    _STEERING,
)
_rule(
    "set to one direction per token",
    "set resid_post layer 2 at tokens -2..-1 to [more, 2 * more]",
    "Sets the vectors at the tokens of a position to one direction each, in the order of the "
    "prompt. `add` takes such lists too. Every row needs this number of tokens.",
    OWN,
    "tests/rules/test_inserted_tokens.py",
)
_rule(
    "add",
    "add 4.0 * more to resid_post layer 2 at tokens *",
    "Adds the direction times the number, which may be a `param` or a `for` variable. The "
    "direction isn't normalised: the conventions report its norm, and `unit(more)` has length "
    "1. Like a hook, `add`, `scale`, `project out` and `clamp` act on the value in the current "
    "forward pass. This value includes the changes of rules at earlier sites and, at the same "
    "site, of preceding rules in the file.",
    STEERING,
    _STEERING,
)
_rule(
    "scale",
    "scale attn_out layers * at last token by 0.5",
    "Multiplies the vector by a number.",
    OWN,
    _STEERING,
)
_rule(
    "scale by a direction",
    "scale mlp_out layer 1 at tokens * by more",
    "Multiplies the vector elementwise by the direction. The direction has the width of the site; "
    "all heads that the rule names are multiplied by the same values. The control `against "
    "random` uses the same values in a random order.",
    OWN,
    _STEERING,
)
_rule(
    "project out",
    "project out more from resid_post layer * at tokens *",
    "Removes the component along the direction: x − (x · u) u, with u of length 1.",
    REFUSAL,
    _STEERING,
)
_rule(
    "project onto",
    "project resid_post layer * at last token onto more",
    "Keeps only the component along the direction: (x · u) u, with u of length 1. For several "
    "directions, write `set … to reconstruction of` a basis of them.",
    OWN,
    _STEERING,
)
_rule(
    "project out of weights",
    "project out more from weights",
    "Removes the direction from the embeddings, including position embeddings, and from the "
    "output of every attention and MLP, at all tokens. This has the same effect as removing it "
    "from all weights that write to the residual stream, those of experts included. Whether it "
    "has is measured when the model is loaded, so not by `validate`: a norm between these weights "
    "and the stream, or a first block that reads anything but a sum of embeddings, is E0344.",
    REFUSAL,
    _STEERING,
)
_rule(
    "scale weights",
    "scale weights of mlp_out layer 2 neuron * by 0",
    "Multiplies the weights from heads or neurons to the output of their sublayer, at all tokens, "
    "including answers and completions. Biases don't change. `mlp_out layer 2 neuron 5`, `L2N5`, "
    "`attn_out layer 1 head 2`, `L1H2`, and all heads or neurons of `mlp_out layer 2`. The result "
    "is that of a model with these weights: activations of the heads and neurons themselves don't "
    "change, and patched activations pass through the new weights. Models with norms between "
    "these weights and the stream are rejected; an edited model (`model … with`) has no such "
    "limit.",
    OWN,
    _EDITED,
)
_rule(
    "set weights",
    "set weights of mlp_out layer 2 neurons 3, 5 to 2 * more",
    "Replaces output weights of neurons by a direction.",
    OWN,
    _EDITED,
)
_rule(
    "add to weights",
    "add 0.5 * more to weights of mlp_out layer 2 neuron 5",
    "Adds a direction to output weights of a neuron.",
    OWN,
    _EDITED,
)
_rule(
    "clamp a neuron",
    "clamp mlp_hidden layer 2 neuron 5 at last token to 5",
    "Sets the neuron to this value.",
    OWN,
    _STEERING,
)
_rule(
    "clamp along a direction",
    "clamp more of resid_post layer 2 at last token to 5",
    "Sets the component along the direction, x · u with u of length 1, to the number. The rest "
    "of the vector doesn't change.",
    OWN,
    _STEERING,
)
_rule(
    "a subspace",
    "patch resid_post layer 2 in basis axes at last token",
    "Patches all coordinates of a basis: x becomes x + decode(f(source)) − decode(f(x)). The part "
    "of x outside the subspace doesn't change. `ablate`, `set`, `add` (a number), `scale` and "
    "`clamp` act on coordinates in the same way. Means are means of coordinates.",
    "Geiger et al. 2024, arXiv 2303.02536",
    _BASES,
)
_rule(
    "a coordinate",
    "patch feature * of axes at last token",
    "Patches one coordinate per run, at the site of the basis. `features 0..3 of axes` patches "
    "four in one run.",
    "Geiger et al. 2024, arXiv 2303.02536",
    _BASES,
)
_rule(
    "several bases",
    "for b in [axes, chance] { patch resid_post layer 2 in basis b at last token }",
    "One cell for each basis; `feature 0 of b` needs bases with the same number of coordinates.",
    OWN,
    "tests/rules/test_loops_over_bases.py",
)
_rule(
    "several groups",
    "for g in [early, deep] { ablate g at last token with zero }",
    "One cell for each group of sites, which may be trained groups, too. `except g` leaves out "
    "the sites of the cell's group. Groups of features, dimensions or positions can't be looped "
    "over.",
    OWN,
    "tests/rules/test_loops_over_bases.py",
)
_rule(
    "clamp a coordinate",
    "clamp feature 0 of axes at last token to 5",
    "Sets the coordinate to the number, in units of the basis's direction.",
    OWN,
    _BASES,
)
_rule(
    "add to a coordinate",
    "add 2 to features 0..1 of axes at last token",
    "Adds the number to each coordinate: x + 2 d₀ + 2 d₁.",
    OWN,
    _BASES,
)
_rule(
    "project out a coordinate",
    "project out feature 0 of axes at last token",
    "Removes the direction of a coordinate, whatever its value: x becomes x − (x · u) u, with u "
    "of length 1. For a dictionary, u is the feature's decoder row; `features 0, 2 of axes` "
    "removes the span of both directions. `ablate … with zero` sets the coordinate to 0 instead.",
    REFUSAL,
    "tests/rules/test_projected_features.py",
)
_rule(
    "without the reconstruction error",
    "clamp feature 0 of axes at last token to 5 without error",
    "Replaces the vector by the reconstruction from the changed coordinates: decode(f′). Without "
    "`without error`, the reconstruction error of the vector is kept.",
    OWN,
    "tests/rules/test_dictionaries.py",
)
_rule(
    "exchange features",
    "patch features 0, 2 of axes at last token with feature 1 of chance",
    "Replaces the contributions of the named features to the current vector by the contributions "
    "of the other basis's features to the same vector. No other run is read. Several features "
    "after `with` are inserted together; a `for` variable may be a feature's number. Transcoders "
    "encode the input of the MLP, and their features change its output. With `without error`, the "
    "rest of the vector is the first basis's reconstruction.",
    "Leask et al. 2025, arXiv 2502.04878",
    "tests/rules/test_exchanged_features.py",
)
_rule(
    "numbers of a vector",
    "scale resid_post layer 2 dims 0..7 at last token by 0",
    "Changes single components of the vector, with `dims` together and with `dim` one per run, "
    "along the axis `dim`. After `in basis b`, they are coordinates of the basis.",
    OWN,
    _BASES,
)
_rule(
    "all sites except some",
    "ablate layers * heads * except L2H0, top 3 of cie at tokens * with zero",
    "Leaves out sites: heads, groups, the sites that another experiment ranks highest, whole "
    "layers (`layer 3`), or values of the last axis (`layer * except 3`, `features * of b except "
    "12`, or a group of features of this basis). A head is left out at any site of heads, and at "
    "`k` and `v` the key-value head that it reads. Numbers, layers and picks may use "
    "`for` variables: `except top k of cie`, `layer * except l`. In a sweep, cells without any "
    "site are omitted; without a sweep, a cell for which `except` leaves no site equals the base "
    "run. An exception that leaves out nothing is an error, unless another experiment selects its "
    "sites.",
    OWN,
    "tests/rules/test_except.py",
)
_rule(
    "circuit of nodes",
    "ablate mlp_out layers * except 1 at tokens * with zero",
    "With `measure … as faithfulness`, the group after `except` is a circuit of nodes: sites, "
    "features, dimensions or positions. In ∅, the fully ablated run, the same rules ablate the "
    "group, too; `tokens except P` are then all tokens of the prompt, without special tokens. All "
    "rules must be ablations, or patches without `onto`: `patch SITES except g … with RUN`. "
    "`ablate g … as completeness` needs a trained group: ∅ ablates all "
    "candidates of its training. `except top n of g` keeps the n members of a trained group with "
    "the largest probabilities. Other rules, a sweep over the left-out sites, `generate` and "
    "`using` are E0612. `against random(39)` and the control of trained groups draw groups of "
    "equal size from the nodes that ∅ ablates.",
    "Wang et al. 2022, arXiv 2211.00593; Marks et al. 2024, arXiv 2403.19647",
    "tests/rules/test_node_circuits.py",
)
_rule(
    "a member of a family",
    "add by_layer[layer 1, token -1] to resid_post layer * at last token",
    "Selects directions of a family. Coordinates are numbers or `for` variables "
    "(`by_layer[layer l]`), and unnamed axes remain. Without brackets, the rule and the family "
    "share axes of the same name: each layer uses the direction of that layer. Other axes "
    "become axes of the experiment.",
    OWN,
    _STEERING,
)
_rule(
    "each layer its own direction",
    "add 2 * by_layer[layer own, token -1] to resid_post layers * at tokens *",
    "Adds to each layer the direction of that layer, to all layers in one run. For a sweep over "
    "layers (`layer *`), `by_layer` alone does this.",
    OWN,
    _STEERING,
)
_rule(
    "several directions",
    "for d in [more, less] { add 2 * d to resid_post layer 2 at last token }",
    "One cell for each direction or for each of several families with the same axes; trained "
    "directions are allowed, too. Rules in the `for` use `d` like a direction: `add c * d`, "
    "`d[layer 1]`, `project out d`. A list that mixes directions, edits and scales is E0341, and "
    "so is a soft prompt.",
    OWN,
    _STEERING,
)
_rule(
    "the best member",
    "project out by_layer[best of select] from resid_post layer * at tokens *",
    "Selects the direction whose cell has the largest signed mean of the first measure. The "
    "experiment in brackets must sweep the family.",
    REFUSAL,
    _STEERING,
)
_rule(
    "set in Python",
    'set resid_post layer * at last token to python("functions.py:halved")',
    "Sets the vectors to the return value of a Python function, which receives the base run's "
    "vectors of one cell as [rows, positions, width]. It must return the same shape. The rows "
    "are those of the experiment that have the position, after `limit` and `keep`, in data "
    "order. Joined positions are in the second dimension, padded with NaN. Joined heads or "
    "neurons are concatenated, and each of several layers is a separate call. The values don't "
    "depend on other cells or on batches. It runs only with `--allow-python`.",
    OWN,
    "tests/rules/test_python_rules.py",
)
_rule(
    "set to what is elsewhere",
    "set resid_post layer 2 at last token "
    "to 0.5 * value(mlp_out layer 1 at last-item token) of fewer",
    "Sets the vector to that of another site, times an optional number. The value comes from "
    "a run without the experiment's rules, by default the base run, and by default from the "
    "position that is written. Both sites must have the same width. The sites may be in "
    "different stacks. In an encoder-decoder, such a rule names the position to read (E0317). "
    "Values cross the border of a vision encoder only if it has one vector for each token of "
    "an image; otherwise they are E0108.",
    OWN,
    "tests/rules/test_readings.py",
)
_rule(
    "add what is elsewhere",
    "add 0.3 * value(attn_out layer 1) of clean to resid_post layer 2 at last token",
    "Adds the row's own vector from a run without the experiment's rules, by default the base "
    "run, times the number. It is added to the value in the current forward pass. Both sites "
    "must have the same width. The control `against random(39, directions)` adds, in each draw, "
    "one random direction to all rows, with the norm of the row's own vector.",
    OWN,
    "tests/rules/test_readings.py",
)
_rule(
    "add steps",
    "add 2 * step(q) to q layer 1 head * at tokens *",
    "Adds the number times the difference between the vector and that of the preceding "
    "position. Both are values of the current forward pass, before this rule. The first "
    "position doesn't change. The argument is the component that is written, without its "
    "stack: `q`, `k`, `v`, `z`, the residual stream, or an output added to it. Rotary "
    "embeddings are applied after `q` and `k`. Vision encoders have no steps (E0341).",
    OWN,
    "tests/rules/test_steps.py",
)
_rule(
    "several fills",
    "ablate layer * head * at last token with zero, mean, mean of fewer by count, resample",
    "A list of replacement values is an axis, `fill`, labelled as in the file. Each cell "
    "equals the rule with that value alone.",
    OWN,
    "tests/rules/test_fills.py",
)
_rule(
    "block attention",
    "block attention layer * window 3 from last token to fruits tokens",
    "Prevents the queries from attending to these keys: their scores become −∞ before the "
    "softmax. The other weights, including sinks, are renormalised. Without a head axis, it "
    "applies to all heads.",
    KNOCKOUT,
    _EDGES,
)
_rule(
    "reweight attention",
    "reweight attention layer * head * from last token to first-item token by 1.5",
    "Multiplies the weight of the edge, then renormalises the row to sum to 1. `by 0` is the "
    "same as `block`.",
    OWN,
    _EDGES,
)
_rule(
    "set attention to a weight",
    "set attention layer * head * from last token to first-item token to 0.2",
    "Sets every visible edge to this weight and rescales the rest of the row, so that it sums "
    "to 1. If a query sees no other key, its weight is divided evenly among these keys.",
    OWN,
    _EDGES,
)
_rule(
    "set attention to uniform",
    "set attention layer * head * from last token to fruits tokens to uniform",
    "Distributes the total weight of the visible keys evenly over them.",
    OWN,
    _EDGES,
)
_rule(
    "allow attention",
    "allow attention layers * from first-item token to last-item token",
    "Lets the queries attend to these keys too, including later keys and keys outside a "
    "window, with the model's scores. The softmax then covers all visible keys, and other "
    "attention rules act on this larger set. Each row is a full forward pass. Models that add "
    "positions to scores (ALiBi) aren't supported, except T5 and other encoder-decoders. T5's "
    "decoder gives a later key the bias of distance 0. `allow attention vision` adds patches of "
    "other tiles, windows or frames of the same image.",
    "Wang et al. 2024, arXiv 2407.01100",
    "tests/rules/test_allow_attention.py",
)
_rule(
    "replace block",
    "replace block layer * with block layer 1",
    "Runs another block, with its own weights, in place of this one. `layers 2..3` replaces "
    "several blocks together; a `for` loop can use `layer l with block layer l + 1`. Sites of "
    "the layer refer to the replacement. Both blocks must be of the same type. Each row is a "
    "full forward pass. `replace block encoder layer 2 with block encoder layer 1` replaces blocks "
    "of an encoder-decoder's encoder, for all tokens of the prompt; a replaced block of the "
    "decoder computes its own keys and values of the encoder's output. In T5, block 0 computes "
    "the position biases of its stack even if it is replaced "
    "(`tests/execute/test_encoder_decoder_blocks.py`).",
    OWN,
    "tests/rules/test_blocks.py",
)
_rule(
    "replace block with identity",
    "replace block layers 1..2 with identity",
    "Skips the blocks: their output is their input. `replace block vision layer 4 with identity` "
    "or `with block vision layer 3` replaces blocks of the vision encoder, for all images of a "
    "row. In Qwen2.5-VL, both blocks must attend to whole images, or both within windows; in "
    "Llama 3.2 Vision, both must attend to the image, or both to the text. With `during prefill`, "
    "measures can read tokens of the reply (`tests/image_prompts/test_encoder_blocks.py`).",
    OWN,
    "tests/rules/test_blocks.py",
)
_rule(
    "renumber",
    "renumber last-item token from 5",
    "Gives these tokens the position ids 5, 6, … in text order; the first token of a prompt "
    "has id 0. Other tokens keep their ids, and the attention mask doesn't change. Each row is "
    "a full forward pass. In models that number image tokens by frame, row and column, a "
    "renumbered token gets its id for all three (`tests/image_prompts/test_renumbered_tokens.py`). "
    "In T5Gemma, the tokens of each stack count from the number; in Whisper, those of the decoder "
    "do (`tests/execute/test_encoder_decoder_positions.py`). Models that "
    "compute position ids themselves, or add positions to scores, aren't supported.",
    "Wang et al. 2024, arXiv 2407.01100",
    "tests/rules/test_allow_attention.py",
)
_rule(
    "path",
    "path layer 0..1 head * -> q layer 2 head * at last token",
    "Gives the sender its source value while every other head and MLP is held at its base "
    "value. The resulting input of the receiver is then written into the base run. Receivers "
    "are `resid_pre`, `attn_norm`, `q`, `k`, `v`, `mlp_norm`, `mlp_hidden`, `final_norm` and "
    "`logits`, with the axes `to_layer`, `to_head` and `to_neuron`. Pairs in which the sender "
    "doesn't precede the receiver are omitted. Receivers in a group are patched at once. For a "
    "neuron, the resulting activation is written. A sender can be a feature of a dictionary at "
    "`mlp_out` or `attn_out`, such as `path feature * of b -> q layer 2 head * at last token` "
    "(Marks et al. 2024, arXiv 2403.19647): the output of the MLP or of attention is that of the "
    "base run plus the change of the feature's activation times its decoder row; other features "
    "and the reconstruction error are held. The activations are those of the source run and of the"
    " base run; a transcoder encodes the MLP's input in both. A feature of a cross-layer "
    "transcoder sends with its decoder row of each layer, in the outputs of all MLPs that it adds "
    "to (Ameisen et al. 2025). `features 3, 12 of b` send together, `feature * of b` sweeps. The "
    "features of a rule are of one layer. Dictionaries at other sites and other bases are E0342. A"
    " receiver can be a feature, such as `path layer 0 head * -> feature * of b`, of a dictionary "
    "at `mlp_out`, `attn_out`, `mlp_norm`, `attn_norm` or in the residual stream, with the axis "
    "`to_feature`. The dictionary encodes what the receiver reads in the pass with the changed "
    "sender: for an SAE at `mlp_out` or `attn_out` the output that the MLP or attention computes "
    "from its changed input, for a transcoder the input of the MLP. Heads and neurons of the layer"
    " can't be senders of the same path to features of their output (E0334). In the base run, its "
    "site changes by the change of the "
    "activation times the decoder row; a feature of a cross-layer transcoder changes the outputs "
    "of all MLPs that it adds to. Either end can be a group of features of one "
    "basis. Estimators of paths take features at both ends "
    "(`tests/rules/test_feature_paths.py`, `tests/rules/test_receiving_features.py`, "
    "`tests/rules/test_feature_path_estimates.py`).",
    PATHS,
    _PATHS,
)
_rule(
    "path context rules",
    "ablate L1H2 at last token with zero  path layer 0 head * -> q layer 2 head * at last token",
    "The other rules define the model in which the path is patched. They act in the pass that "
    "provides the held values, in the pass with the patched senders, and in the final pass. "
    "They don't act in the source run, which provides the senders' values. A run with rules as "
    "the base (`from clean into ablated`) gives the same values, with effects relative to that "
    "run. An experiment can have one path. Next to an ablated circuit, `with frozen norms` and the "
    "receiver `attn_norm` are E0108.",
    PATHS,
    "tests/rules/test_joint_paths.py",
)
_rule(
    "path … with frozen norms",
    "path layer * head * -> logits at last token with frozen norms",
    "In the pass with patched senders, every norm divides by its value in the base run. Direct "
    "effects are then linear: the effects of senders add up if the senders add up to the "
    "stream (before a cap on logits). If `through mlps` is present, this clause follows it.",
    "Elhage et al. 2021 (transformer-circuits.pub/2021/framework)",
    "tests/rules/test_joint_paths.py",
)
_rule(
    "path to neurons",
    "path layer 0 head * -> mlp_hidden layer 2 neurons 3, 7 at last token",
    "Patches only the contribution of the senders to the input of these neurons. The neurons' "
    "activations, with all else held, are written into the base run. Neurons can also be senders: "
    "`path L0N3 -> L2N7`.",
    PATHS,
    "tests/rules/test_joint_paths.py",
)
_rule(
    "path … through mlps",
    "path layer * head * -> logits at last token through mlps",
    "Recomputes MLPs instead of holding them. For the receivers `logits` and `final_norm`, the "
    "metric reads this pass directly.",
    PATHS,
    _PATHS,
)
_rule(
    "observe attention",
    "observe attention layer * head * from last token to first-item token",
    "The total weight on the keys, averaged over the queries and, without a head axis, over "
    "all heads. It is a measure `attention` with the effect `raw`. With rules in the "
    "experiment, it reads the patched run.",
    ATTENTION,
    _EDGES,
)
_rule(
    "observe attention by",
    "observe attention L1H2 from last token to token 1 by value_norm",
    "The norm of the vector that attention moves from the keys to the query: ‖Σ weight × value × "
    "output projection‖, where the sum is over the heads that are joined, all heads without a "
    "head axis. Values include their bias, and the bias of the output projection is left out. "
    "Norms are summed over several keys, and averaged over several queries and layers. The "
    "experiment can't have rules; observe a run with rules instead (`of healed`). It requires "
    "that values and outputs are linear maps, without a norm after the output projection (E0108).",
    "Kobayashi et al. 2020, arXiv 2004.10102",
    "tests/rules/test_value_norm.py",
    "measure logit(answer) as raw",
)
_rule(
    "observe",
    "observe norm resid_post layer * at last token as lengths",
    "Reads a run without changing it. The value is a measure with the effect `raw`; with rules "
    "in the experiment, it reads the patched run. A named line has a separate result with its "
    "own axes. Use the name in `top 3 of lengths`, `expect max(lengths) > mean(attn)` and "
    "`report lines layer of lengths`. Names of observations must be unique in the file. `norm` "
    "is the L2 norm of the vector.",
    OWN,
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "measure OBSERVATION as delta",
    "patch L1H2 at last token "
    "observe entropy pattern layer 2 head * at last token as spread measure spread as delta",
    "The change of the observation caused by the rules. The base run is observed at the same "
    "positions without rules. Observations support only the effects `raw` and `delta`.",
    OWN,
    _OBSERVED,
)
_rule(
    "observe … of RUN",
    "observe norm resid_post layer * of fewer at last token as lengths",
    "Of a named run. Positions are located in that run's text.",
    OWN,
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe value",
    "observe value mlp_hidden layer 1 neuron 0..3 at last token",
    "The activation of one neuron, or the mean activation of joined neurons.",
    OWN,
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe value of coordinates",
    "observe value feature 0 of axes at last token",
    "A coordinate of the current vector in a basis, or the mean of joined coordinates (`features "
    "0, 2 of axes`). `resid_post layer 2 dim 5` is a number of the vector. It also reads runs in "
    "which rules act: with `for i in 0..2 { add 1 to feature i of axes at last token }` and "
    "`observe value feature * of later at last token as next`, `measure next as delta` is the "
    "interaction of coordinates of two layers. For a transcoder, features are those of the MLP's "
    "input.",
    "Bushnaq et al. 2024, arXiv 2405.10928",
    "tests/rules/test_observed_coordinates.py",
    "measure logit(answer) as raw",
)
_rule(
    "observe entropy",
    "observe entropy pattern layer * head * at last token",
    "The entropy of the query's attention, in nats.",
    OWN,
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe distance",
    "observe distance pattern layer * head * at last token",
    "The mean distance, in tokens, to the keys that the query attends to. `distance(8)` counts "
    "keys further back as 8 tokens. Bidirectional models use the absolute distance, and images "
    "use the distance between the centres of patches.",
    OWN,
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe received",
    "observe received pattern layer * head * at each item token as paid",
    "The mean attention that later tokens pay to this token. `received(4..20)` uses the tokens "
    "4 to 20 positions later (future attention influence). A cell excludes rows without such "
    "tokens. Bidirectional models use all other tokens.",
    "Li et al. 2025, arXiv 2510.13554",
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe logit_lens",
    "observe logit_lens resid_post layer * at last token",
    "The vector after the model's final norm and unembedding, as if its layer were the last. "
    "Metrics of the experiment read these logits. Without a measure, the value is the "
    "probability of the most likely token. For `attn_out`, `mlp_out` and `head_out`, the norm "
    "uses the scale of that vector alone. In prompts with images, it reads tokens of images too. "
    "In an encoder-decoder, it reads the decoder.",
    'nostalgebraist 2020, "interpreting GPT: the logit lens"',
    _OBSERVED,
    "measure prob(answer) as raw",
)
_rule(
    "observe logit_lens … top",
    "observe logit_lens resid_post layer * at last token top 5",
    "Lists the five tokens with the largest mean probability over the rows of a cell. Each has "
    "its mean and the share of rows in which it is the most likely token, in the table and in "
    "the JSON (`listed`, `listed_mean`, `listed_first`). `tuned_lens` supports this too.",
    OWN,
    _OBSERVED,
    "measure prob(answer) as raw",
)
_rule(
    "observe tuned_lens",
    'observe tuned_lens("lens.safetensors") resid_post layer * at last token',
    "The logit lens of h + A h + b. For `resid_post layer N`, the file provides A as "
    "`layer.N.weight` [d_model, d_model] and b as `layer.N.bias` [d_model]. The last layer "
    "needs no entry; without one it is used unchanged. The results store the file's hash. "
    "`tuned_lens(l)` reads a `lens` of the file.",
    "Belrose et al. 2023, arXiv 2303.08112",
    _OBSERVED,
    "measure prob(answer) as raw",
)
_rule(
    "observe direct_logit",
    "observe direct_logit layer * head * toward answer - wrong at last token",
    "The direct contribution of a component to the logits after `toward`: through the final "
    "norm, with its scale fixed at that of the stream, and the unembedding. Components are "
    "heads, `attn_out`, `mlp_out`, neurons, and `resid_pre layer 0` for the embeddings. "
    "Together with the biases of norm and unembedding, which belong to no component, they sum "
    "to the logit (before a cap on logits). Joined sites are summed.",
    "Elhage et al. 2021, transformer-circuits.pub/2021/framework; Wang et al. 2022, "
    "arXiv 2211.00593",
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe attribution_graph",
    "observe attribution_graph(tc) logits toward answer",
    "How well features of transcoders explain a measure of the next token's logits, or, without "
    "`toward`, the most probable next tokens. The value is the replacement score of each row's "
    "attribution graph: the influence of tokens, along all paths, divided by the influence of "
    "tokens and errors. `attribution_graph completeness` is the share of each node's input that "
    "doesn't come from errors, averaged with the influence of the nodes as weights. Attention "
    "patterns and norm divisors are constants. In a layer without a transcoder, the whole output "
    "of the MLP is an error. `toward` takes texts, a metric of the file or an expression such as "
    "`logprob(answer)`. The target is the sum of logits times the measure's gradient: a measure "
    "that isn't linear in logits is linearised.",
    "Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html",
    "tests/rules/test_attribution_graphs.py",
)
_rule(
    "observe graph_ablation",
    "observe graph_ablation(tc) logits toward answer top 5",
    "How a measure changes when the features with the most influence on it in the row's "
    "attribution graph are ablated: in the model, their current activations are set to 0 at their "
    "tokens. `graph_ablation predicted` is the change along the paths of the graph, in which "
    "attention patterns and norm divisors are constants, and activations are linear functions of "
    "their inputs. `graph_ablation random` is the change when the same number of other active "
    "features of the row are set to 0; the draw depends on the seed and the content of the row. "
    "`graph_ablation(tc, features: few)` without `top` ablates the active features of a group.",
    "Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html",
    "tests/rules/test_attribution_graphs.py",
)
_rule(
    "observe graph_weight",
    "observe graph_weight(tc, from: few) logits",
    "In each row's attribution graph, the sum of the edges from the active features of one group "
    "to the active features of the group after `to`, at all tokens. Without `to`, the edges end "
    "at the target of the graph. `graph_weight random` is the same sum for random other active "
    "features of the same layers, in equal number; if a layer has fewer, for all of them. The "
    "draw depends on the seed and the content of the row.",
    "Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html",
    "tests/rules/test_attribution_graphs.py",
)
_rule(
    "observe graph_probe",
    "observe graph_probe(tc, target: count) logits",
    "How well a linear map of each row's attribution graph predicts a value of the row, or a "
    "measure of its next token that is 0 or 1, such as `correct(answer)`, on held-out rows. The "
    "columns are, for each feature, the sum over tokens of its edges to the target of the graph: "
    "activation times weight. `features: few` uses only the features of a group; otherwise, each "
    "feature that is active in some row has a column. `folds`, `kind` and `penalty` are as for "
    "`probe`. `graph_probe baseline` is a probe with a single column, the entropy of the next "
    "token, and the default penalty. `graph_probe shuffled` is a probe for shuffled values.",
    "Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html; arXiv "
    "2602.07080",
    "tests/rules/test_graph_probes.py",
)
_rule(
    "observe rollout",
    "observe rollout from last token to each item token",
    "How much of one token attention mixes into another, through all layers (attention rollout). "
    "It is the product over layers of (mean pattern over heads + identity) / 2, with each query's "
    "weights summing to 1. Several key tokens are summed, several query tokens averaged. For "
    "images, start from `cls token`, or from `image tokens` if the model pools its patches and "
    "has no class token.",
    "Abnar and Zuidema 2020, arXiv 2005.00928",
    "tests/rules/test_rollout.py",
    "measure logit(answer) as raw",
)
_rule(
    "observe probe",
    "observe probe(count, folds: 5) at resid_post layer * at last-item token as told",
    "How well a linear map of the vectors predicts a value on held-out rows. Numbers and lists "
    "of numbers use ridge regression (R²). Texts, booleans and two-valued values use logistic "
    "regression (accuracy). `kind: logistic` or `kind: ridge` overrides this. Rows with the "
    "same content at the position are in the same fold. The control `told shuffled` uses "
    "shuffled values. `penalty` weights Σ weights² on standardised vectors. By default, ridge "
    "selects the best of 0.01 to 10,000 on inner folds of the training rows, and logistic uses "
    "1. `train: fruit.train`, in place of `folds`, fits the probe once at the same position on "
    "another block, a part of a split, or a run. Those rows must not include rows of the "
    "experiment. `probe(t)` reads a `probe` of the file instead of fitting one, also in other "
    "runs, models, layers and positions than it was trained on.",
    "Alain and Bengio 2016, arXiv 1610.01644; Hewitt and Liang 2019, arXiv 1909.03368",
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe prediction",
    "observe prediction(decoder) at resid_post layer 2 at last token",
    "The number that a `probe` of the file predicts from a vector, or the log odds of a class; "
    '`prediction(decoder, class: "plum")` names the class, and the default for two classes is '
    "the second. The value is averaged over joined tokens. It can be read at tokens of the "
    "completion and in patched runs.",
    OWN,
    "tests/pipeline/test_trained_probes.py",
    "measure logit(answer) as raw",
)
_rule(
    "observe routed_probe",
    "observe routed_probe(count, folds: 5) at resid_post layer * at item tokens as told",
    "A probe of numbers, or lists of numbers, that weights the tokens of a position. It is a "
    "ridge regression on Σ softmax(x · query) x over the tokens of each row. One query is "
    "fitted for all rows together with the weights, starting from equal token weights. The "
    "weights depend on the content of the tokens, so relevant tokens may be at different "
    "positions in each row. The value is R² on held-out rows. `folds`, `train` and the control "
    "are those of `probe`. `penalty` weights Σ weights² + Σ query² on standardised vectors and "
    "numbers, and is 1 by default.",
    "Adeli, Sun and Kriegeskorte 2025, arXiv 2505.17329",
    _TOKENS,
    "measure logit(answer) as raw",
)
_rule(
    "observe routing",
    "observe routing(count, folds: 5) at resid_post layer 2 at each item token as looked",
    "The weight that `routed_probe` gives to each token, from the fit that excludes the row. "
    "It is a map whose values sum to 1 over the tokens of the line.",
    "Adeli, Sun and Kriegeskorte 2025, arXiv 2505.17329",
    _TOKENS,
    "measure logit(answer) as raw",
)
_rule(
    "observe clusters",
    "observe clusters(4) resid_post layer 2 at each item token as concept",
    "The probability that a token's vector belongs to each of four clusters, along an axis "
    "`cluster`; cluster 1 is the largest. The clusters come from k-means (the best of 50 seeded "
    "starts) on the standardised vectors of all tokens of the line. The convention `k-means` has "
    "the number of starts that reach this fit ([Observations](observations.md#find-clusters)). "
    "The probabilities treat them as Gaussians of equal variance. Joined tokens have their mean: "
    "the share of an image that belongs to a cluster. `clusters(4, train: fruit.train)` fits on "
    "other rows, as for `probe`.",
    "Lloyd 1982, “Least squares quantization in PCM”; starts: Arthur and Vassilvitskii 2007, "
    "“k-means++: The advantages of careful seeding”; of patches: Wang, Tan and Wang 2024, "
    "arXiv 2406.12649",
    _TOKENS,
    "measure logit(answer) as raw",
)
_rule(
    "observe clusters … with RUN",
    "observe clusters(4) resid_post layer 2 with fewer at first-item token as kept",
    "Whether the most likely cluster of a token is the same at that position of another run.",
    OWN,
    _TOKENS,
    "measure logit(answer) as raw",
)
_FEATURES = "tests/rules/test_observed_features.py"
_rule(
    "observe features",
    "observe features of axes at last token",
    "The coordinates of a basis. They are at the site of the basis, along an axis `feature`; a "
    "row's number is the mean over its tokens. The measure `features density` is the share of "
    "tokens at which a coordinate isn't 0. The table is followed by the prompts in which each "
    "feature is most active. In the residual stream, it lists the five tokens whose logits the "
    "feature's direction raises most. The convention `features of axes` has the number of active "
    "features and the explained variance.",
    "Bricken et al. 2023 (Towards Monosemanticity)",
    _FEATURES,
)
_rule(
    "observe features … top … by",
    "observe features of axes at last token top 2 by correlation(count)",
    "The two with the largest absolute value over all positions. `by mean`, the default, ranks "
    "coordinates by their mean. `by correlation(count)` gives Pearson's correlation with a value "
    "of the rows; its interval is that of the mean of the rows' influence values, r + xy − r(x² + "
    "y²)/2 for standardised x and y. `by difference(fewer)` gives the coordinate minus that of "
    "the same row in another run. Coordinates are selected and reported on the same rows; the "
    "conventions print a note.",
    "Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans, chapter 6",
    _FEATURES,
)
_rule(
    "observe similarity",
    "observe similarity resid_post layer * at first-item token with last-item token as alike",
    "The mean cosine similarity over pairs of different tokens of a row, one from each "
    "position. Without `with`, pairs are formed within one position.",
    OWN,
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe rank_correlation",
    "observe rank_correlation(10) logits at first token with last token",
    "Spearman's correlation of the predictions at two tokens of a row, over the tokens that are "
    "among the 10 most likely next tokens at one position or the other. It weights context tokens "
    "by the similarity of their predictions to the current one (activation ranking correlation; "
    "the paper's formula wasn't available).",
    "Spearman 1904; after Liang et al. 2025, arXiv 2509.22415",
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe similarity … with SITE",
    "observe similarity resid_pre layer * with resid_post layer * at last token",
    "The cosine similarity of a row's vectors at two sites, one token at a time. The axes of "
    "the second site are `to_layer` and `to_head`.",
    OWN,
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe similarity … with RUN",
    "observe similarity resid_post layer * of clean with fewer at last token as alike",
    "The cosine similarity with the vector at the same position of another run, one token at a "
    "time. The run may have rules (`run healed { … }`) or belong to another block.",
    OWN,
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe cka",
    "observe cka resid_post layer * with attn_out layer * at last token",
    "Linear CKA of two sites over all distinct rows, with the unbiased estimator for few rows. "
    "The axes of the second site are `to_layer` and `to_head`. `with fewer` compares the same "
    "site in two runs. The interval comes from the jackknife.",
    "Kornblith et al. 2019, arXiv 1905.00414; Song et al. 2012",
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe rank, effective_rank",
    "observe effective_rank resid_post layer * at last token",
    "The dimension of the rows' vectors around their mean. `rank` counts the singular values "
    "above rounding, and `effective_rank` is the exponential of their entropy. Each is one "
    "number for all rows, without an interval.",
    "Roy and Vetterli 2007",
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe copying, matching",
    "observe copying layer * head *",
    "A property of a head's weights alone: Σ λ / Σ |λ| over the eigenvalues of embedding → OV "
    "→ unembedding. `matching` uses embedding → QK ← embedding. Values range from −1 to 1. "
    "Gains of norms are folded in; norm scales, biases and rotary embeddings aren't. An "
    "experiment on weights alone needs no `prompts` line.",
    "Elhage et al. 2021, transformer-circuits.pub/2021/framework",
    _WEIGHTS,
    "measure logit(answer) as raw",
)
_rule(
    "observe composition",
    "observe composition(q) at layer 0 head * with layer 1 head *",
    "The degree to which a later head reads the output of a head through its queries (`q`), "
    "keys (`k`) or values (`v`). It is ‖AB‖ / (‖A‖ ‖B‖) in Frobenius norms, for the first "
    "head's OV and the second head's QK or OV.",
    "Elhage et al. 2021, transformer-circuits.pub/2021/framework",
    _WEIGHTS,
    "measure logit(answer) as raw",
)
_rule(
    "observe singular_values",
    "observe singular_values(ov) at layer 0 head * top 5",
    "The largest singular values of a head's W_V W_O, or of its W_Q W_Kᵀ (`qk`). The axis "
    "`value` starts at 1. Gains of norms are folded in.",
    "Millidge and Black 2022, “The singular value decompositions of transformer weight matrices "
    "are highly interpretable”",
    _WEIGHTS_IN_FILES,
    "measure logit(answer) as raw",
)
_rule(
    "observe ov",
    "observe ov(axes) layer 1 head * as moved",
    "The change of a coordinate of a head's output per unit of a coordinate that it reads: the "
    "direction of coordinate `from_feature`, through the gain of the norm and W_V W_O, read as "
    "coordinate `to_feature`. `ov(b, c)` reads in another basis. Features of a dictionary are "
    "read before bias and activation function.",
    "Elhage et al. 2021, transformer-circuits.pub/2021/framework; Dunefsky et al. 2024, "
    "arXiv 2406.11944",
    "tests/execute/test_circuits.py",
    "measure logit(answer) as raw",
)
_rule(
    "observe qk",
    "observe qk(axes) layer 1 head 0",
    "The contribution of a coordinate at the query and one at the key to a head's score, per unit "
    "of both. `qk(b, c)` has coordinates of b at the query, and of c at the key. Not divided by "
    "the root of the width.",
    "Elhage et al. 2021, transformer-circuits.pub/2021/framework; Dunefsky et al. 2024, "
    "arXiv 2406.11944",
    "tests/execute/test_circuits.py",
    "measure logit(answer) as raw",
)
_rule(
    "observe matched_cosine",
    "observe matched_cosine(axes, axes) resid_post layer 1",
    "The largest cosine of each direction of the first basis with a direction of the second. "
    "`match partner` is the coordinate of the second, from 0.",
    "Leask et al. 2025, arXiv 2502.04878",
    "tests/execute/test_circuits.py",
    "measure logit(answer) as raw",
)
_rule(
    "observe value_vectors … top",
    "observe value_vectors layer 1 neuron 0..3 top 10",
    "A neuron's output weights after the final norm's gain and the unembedding. The value is "
    "the contribution to the logit of the token that it raises most, per unit of activation. "
    "`top 10` lists the first ten tokens in the table and the JSON (`listed`).",
    "Geva et al. 2022, arXiv 2203.14680",
    _WEIGHTS_IN_FILES,
    "measure logit(answer) as raw",
)
_rule(
    "observe value_vectors … toward",
    "observe value_vectors layer 1 neuron * toward answer - wrong",
    "The contribution of a neuron to the logits of each row's own tokens, per unit of "
    "activation, averaged over rows.",
    "Geva et al. 2022, arXiv 2203.14680",
    _WEIGHTS_IN_FILES,
    "measure logit(answer) as raw",
)
_rule(
    "observe successor",
    'observe successor(" 1", " 2", " 3") at layer 1 head * as counts',
    "The share of the listed texts for which the head raises the following text most. `counts "
    "rank` is the mean rank of the following text. The path is token embedding → norm and MLP "
    "of the first block → OV → final norm's gain → unembedding. To close the cycle, repeat the "
    "first text at the end.",
    "Gould et al. 2023, arXiv 2312.09230",
    _WEIGHTS_IN_FILES,
    "measure logit(answer) as raw",
)
_rule(
    "for",
    "for l in 0..2 { patch attn_out layer l at last token patch mlp_out layer l at last token }",
    "An axis that several rules share. It can also range over numbers (`[0, 1, 4]`, `0%..100% "
    "step 5%`) and components (`[attn_out, mlp_out]`). The variable can't have the name of a "
    "direction of the file or, in a loop over words, of a group or circuit (E0202). It hides a "
    "`param` or a basis of its name. In a loop over components or groups, it can't have the name "
    "of a component (E0322). A loop can't go over circuits (E0207). Rules outside of the block "
    "can't use it (E0322); measures and `save` lines can. Definitions don't see it, and in "
    "`for k in 0..2 { patch k layer 1 head k … }`, the first `k` is the component.",
    OWN,
    "tests/rules/test_loop_names.py",
)
_rule(
    "both ends",
    "for a in 0..2 { for b in a..2 { patch mlp_out layers a..b at last token } }",
    "Variables can be the ends of a joined range: `layers a..b`, `heads 0..a + 1`. The values "
    "of an inner loop can depend on outer loops (`a + 1..5`, `[a, 5]`, `a..1 step 0.1`). The "
    "experiment has only the valid combinations, here six, and `heatmap a by b` is a triangle. "
    "An empty range is an error.",
    OWN,
    "tests/rules/test_nested_loops.py",
)
_rule(
    "window w",
    "for w in [1, 3] { patch mlp_out layer * window w at last token }",
    "The window width as an axis. Windows are truncated at the first and last layer.",
    OWN,
    "tests/rules/test_nested_loops.py",
)
_rule(
    "for i",
    "for i in 2..3 { block attention layers * from item i token to item i - 1 token }",
    "Uses the variable in positions of rules, queries, keys and measures: `item i token`, "
    "`item i + 1 token`, `token i`, `token -i`, `last token - i`. `from token i to token i - "
    "11` selects a diagonal, with one cell per query. A cell excludes rows without the "
    "position, and n counts the others. If no row has the position, it is an error.",
    OWN,
    "tests/rules/test_loop_positions.py",
)

# --- derived experiments --------------------------------------------------------------------------

_onward(
    "top n of",
    "patch top 3 of cie at last token",
    "The three cells of `cie` with the largest signed mean effect of its first measure, "
    "joined; `top 25% of cie` selects a share. If decreases matter, as under an ablation, "
    "measure the negative in `cie`: `measure -logprob(answer) as delta`.",
    VECTORS,
    "tests/onward/test_sites.py",
)
_onward(
    "against random except",
    "patch L0H0 at last token against random(2) except L0H1, top 3 of cie",
    "Excludes sites, groups, and the sites that another experiment ranks highest from the "
    "random controls.",
    OWN,
    "tests/controls/test_exceptions.py",
)
_onward(
    "against none",
    "observe prediction(decoder) at resid_post layer 2 at last token against none",
    "Omits the control of an experiment that uses a trained object and has no other `against` "
    "line. By default, this control has at most 8 random draws of equal size: directions of the "
    "same norm, scales in a random order, subspaces with the same number of dimensions, the same "
    "number of heads or neurons in each layer, or the same number of layers, tokens, features or "
    "dimensions. For a tuned lens, the control is the logit lens. For rules that change all "
    "features of a trained dictionary, it is the dictionary before the training. The control is "
    "in the column `random` or `untrained`; p and its correction don't depend on it.",
    OWN,
    "tests/pipeline/test_training_controls.py",
)
_onward(
    "best of",
    "patch best of cie at last token",
    "The cell of `cie` with the largest signed mean effect.",
    OWN,
    "tests/onward/test_sites.py",
)
_onward(
    "cells of",
    "patch top 3 of cie(layer: 1) at last token",
    "Selects only cells of `cie` with these values along its axes: numbers, quoted texts "
    '(`base: "fewer"`), a `param` or a `for` variable. In a loop, each cell can thus use the '
    "token order of its map: `for a in 0..3 { for b in a..3 { for k in 0%..100% step 10% { "
    "patch embed at top k of ranges(a: a, b: b) tokens } } }`. Observations of maps use the "
    "same syntax: `observe pointing of ranges(a: 1, b: 3), deleted in object`.",
    OWN,
    "tests/onward/test_cell_selection.py",
)
_onward(
    "features of experiments",
    "ablate features top 2 of swept of axes at last token with zero",
    "The features that an observation or a sweep ranks highest, of the same basis. The plural "
    "joins them, and the singular is an axis in their order. A `for` may give the number, and "
    "numbers may follow: `features top k of swept, 3 of axes`.",
    OWN,
    "tests/rules/test_ranked_features.py",
)
_onward(
    "heads of edges",
    "reweight attention top 3 of cie from last token to first-item token by 1.5",
    "The heads that `cie` ranks highest, joined, in place of layers and heads; a `group` works "
    "too. A head site stands for its head: `L1H0` (its `z`) and `L1H0.q` are the same head. "
    "`k` and `v` stand for all heads that read them.",
    OWN,
    "tests/onward/test_heads.py",
)
_onward(
    "receivers of heads",
    "path layer 0 head * -> q of top 2 of cie at last token",
    "Paths end at the queries of these heads, joined; with `k` or `v`, at the keys or values "
    "that they read. For a group: `-> q counters`.",
    PATHS,
    "tests/onward/test_heads.py",
)
_onward(
    "top n% of … tokens",
    "ablate embed at top 25% of places tokens with zero",
    "In each row, the tokens with the highest signed effect in this row, according to "
    "`places`, an experiment that sweeps tokens. Ties select the earlier token.",
    DELETION,
    "tests/onward/test_tokens.py",
)
_onward(
    "tokens of an observation",
    "ablate embed at top 2 of look tokens with zero",
    "In each row, the keys that the observation `look` ranks highest in this row: the keys of "
    "`observe attention … to each …`, or the positions that another observation sweeps. If an "
    "experiment has several observations, name them: `as attn`, then `top 2 of attn tokens`.",
    OWN,
    "tests/onward/test_observed_tokens.py",
)
_onward(
    "maps of texts",
    "observe f1 of look, places in item tokens",
    "Compares maps of texts with tokens: `f1`, `iou`, `pointing`, `mass` and `auroc`, as [on "
    "images](#experiments-on-images), where a token is a patch and a position is the region. A "
    "map is an experiment that sweeps single tokens (`token *`, `each name token`), on the same "
    "prompts and run. `f1` and `iou` select the same number of tokens as the position has, so "
    "precision, recall and F1 are equal; `top 25%` selects a share of the tokens with a value. "
    "`observe sum of look, 0.5 * places at token *` adds maps. If a column lists the relevant "
    "texts of each row, `span used in prompt` marks them as the position `used tokens`.",
    OWN,
    "tests/onward/test_text_maps.py",
)
_onward(
    "curve",
    "for k in 0%..100% step 25% { ablate embed at top k of places tokens with zero }",
    "A growing share of the tokens, along an axis of percentages.",
    DELETION,
    "tests/onward/test_curves.py",
)
_onward(
    "for over experiments",
    "for m in [places, look] { ablate embed at top 2 of m tokens with zero }",
    "Loops over experiments and observations of the file that rank tokens or sites. The axis "
    "compares them on the same rows. If an experiment has several maps, each can be a value: "
    "`for m in [ranges(a: 1, b: 3), places]`.",
    OWN,
    "tests/images/test_maps.py",
)

# --- experiments ----------------------------------------------------------------------------------

_experiment(
    "model line",
    "model toy",
    "The model of the experiment. It is optional if the file has one model.",
    _LOWER,
)
_experiment(
    "several models",
    "model toy, twin",
    "Runs the experiment on each model, along an axis `model`.",
    "tests/elsewhere/test_models.py",
)
_experiment(
    "prompts line",
    "prompts fruit limit 16",
    "The block whose rows are sampled and whose texts the measures read. `limit` takes the "
    "first 16 rows of a seeded permutation. `fruit.train` and `fruit.test` are the parts of a "
    "`split`.",
    "tests/execute/test_effects.py",
)
_experiment(
    "several blocks",
    "prompts fruit, listed limit 16",
    "Runs the experiment on each block, or part of one (`fruit.train, fruit.test`), with "
    "`limit` rows each, along an axis `prompts`. Each block uses its own texts, runs and "
    "positions. Cells of two blocks share no rows, so for a difference each block is resampled "
    "separately.",
    "tests/elsewhere/test_several_blocks.py",
)
_experiment(
    "a run with rules",
    "run healed { from fewer into clean  patch resid_post layer 1 at last token }",
    "Defines a run with rules, within the experiment. Use its name wherever a run is named: "
    "`from healed into clean`, `from clean into healed`, `patch … with healed`, `kl(healed)`, "
    "`accuracy(healed)`, `mean of healed`, `observe … of healed`, `save … of healed`. Its "
    "rules form one cell and act in one forward pass; without `from`, they act on the clean "
    "run. If other rules act on this run, its own rules act first and their changes remain. A "
    "run can use preceding runs. Rows that start from it are full forward passes. It can "
    "contain all rules except `path` and `replace POSITIONS with TEXT`. A Python function "
    "receives all rows that remain after `keep`. Fits such as `mean_difference` can't read it.",
    "tests/rules/test_derived_runs.py",
    "McGrath et al. 2023 (arXiv 2307.15771)",
    context="expect accuracy(healed) > 0",
)
_experiment(
    "save",
    'save resid_post layer * of clean at last token to "acts.safetensors" as float16',
    "Writes activations to a safetensors file batch by batch, so the file can be larger than "
    "memory. `of RUN` after the site selects another run than the base run, also one with "
    "rules. Each site has a tensor such as `resid_post.layer3` with shape [vectors, width], "
    "with all heads or neurons concatenated unless one is named. The tensors `row`, `token` "
    "and `position` (an index into `positions` in the metadata) identify the vectors. "
    "`acts.jsonl`, in the same folder, has the numbers, texts, tokens and values of the rows. "
    "Read the file with `safetensors.torch.load_file`. Without `as`, numbers have the computed "
    "precision. An experiment can consist of `save` lines alone. In an experiment with rules, "
    "name the run; `keep` isn't allowed. Each run overwrites the file.",
    "tests/execute/test_save.py",
)
_experiment(
    "save mean of",
    'save mean of mlp_out layer 2 of clean at last token to "m.safetensors"',
    "Writes the mean over rows, as float32 unless `as` says otherwise. Each row counts once: its "
    "vector is the mean over the position's tokens, and over the row's noise samples and "
    "completions. For several positions, tensors are named `resid_post.layer3.position0`. "
    '`direction m = saved("m.safetensors", "mlp_out.layer2")` reads it.',
    "tests/execute/test_save_means.py",
)
_experiment(
    "save gradient of",
    'save gradient of logit(answer) by resid_post layer * of clean at tokens * to "g.safetensors"',
    "Writes the derivative of a metric with respect to every vector of a site, in a run without "
    "rules; files are like those of `save SITE`. `gradient of logit(answer) at last-item token by "
    "…` reads the metric at another position, `save mean of gradient of …` writes the mean over "
    "rows. One backward pass serves all sites. A metric without a gradient is E0608.",
    "tests/rules/test_saved_gradients.py",
    "Simonyan et al. 2014, arXiv 1312.6034",
)
_experiment(
    "save top rows",
    'save top 20 rows of features * of axes of clean at tokens * to "rows.jsonl"',
    "Writes, for each feature, the rows with the highest activations at one of the tokens. Each "
    "line of the file is a feature: `index`, `description` (if the basis has labels), `density` "
    "(share of tokens at which it isn't 0), `mean` over all tokens, and `rows`. A row has its "
    "number, text, tokens and values, the highest `activation`, and the activations that aren't 0 "
    "with their tokens (`at`). `features 0, 2 of axes`, `features top 10 of seen of axes` and "
    "`mlp_hidden layer 2 dims *` select features or neurons. With streamed rows, an interrupted "
    "run continues where it was last saved.",
    "tests/rules/test_saved_rows.py",
    "Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features",
)
_experiment(
    "save direction",
    'save direction more to "d.safetensors"',
    "Writes a direction, or each member of a family that sweeps layers (`more.layer3`), to a file. "
    "`more[layer 3]` and `more[best of sweep]` select one. A name that ends in `.gguf` writes a "
    "control vector of llama.cpp, which adds `direction.3` to `resid_post layer 3` at every token "
    "and nothing at layer 0. Without other lines, the experiment needs no prompts.",
    "tests/rules/test_saved_directions.py",
    "llama.cpp; repeng (Vogel 2024)",
)
_experiment(
    "from … into",
    "from clean into fewer",
    "Source run and base run. Rules act on the base run, and `patch` reads the source run. "
    "`recovery` is 0 at the base run and 1 at the source run.",
    "tests/execute/test_effects.py",
    PATCHING,
)
_experiment(
    "several sources or bases",
    "from clean, other into fewer",
    "Runs every combination, along the axes `source` and `base`. Effects are relative to the "
    "runs of the same combination.",
    "tests/elsewhere/test_variants.py",
)
_experiment(
    "from block into block",
    "from fruit into blank",
    "Runs of two blocks. Rows are paired by number. If a block has one row, it is paired with "
    "every row of the other.",
    "tests/elsewhere/test_blocks.py",
    SCOPES,
    context="patch resid_post layer * at last-item token onto last token",
)
_experiment(
    "from block shuffled into block",
    "from fruit shuffled into listed",
    "Pairs the rows of two blocks by a seeded shuffle without repetition. If both blocks use "
    "the same values, rows paired by number have equal values, and the result can't show which "
    "run determines the output (W0704).",
    "tests/elsewhere/test_shuffled_blocks.py",
    context="patch resid_post layer * at last-item token",
)
_experiment(
    "from model into model",
    "from twin into toy",
    "Writes activations of one model into another model of the same shape.",
    "tests/elsewhere/test_models.py",
    ACROSS,
)
_experiment(
    "keep",
    "keep correct",
    "Keeps only rows that satisfy the condition in the clean run. The numbers of kept and "
    "dropped rows are printed.",
    "tests/execute/test_effects.py",
)
_experiment(
    "against random",
    "against random(3)",
    "Repeats the rules with distinct random targets that match the original, drawn with the "
    "seed. The table adds the range of their effects, the probability that another draw falls "
    "in it, and the rank of the effect. `random(20, positions)` selects the type of target. Rules "
    "along directions are compared with random directions of the same norm, rules in bases with "
    "random subspaces of as many dimensions, and features or dimensions that a trained mask chose "
    "with others that it could choose. `random(39, features, frequency: seen)` replaces "
    "features of a dictionary by others that are active in half to twice as many rows of `seen`, "
    "an `observe features` of all features.",
    "tests/controls/test_controls.py",
)


def _estimator_test(kind: GradientEstimator) -> str:
    if kind.adds_noise:
        return "tests/rules/test_smoothgrad.py"
    if kind.backward is not None and kind.backward.decomposed:
        return "tests/rules/test_decomposed_estimates.py"
    if kind.fixes_attention:
        return "tests/rules/test_atp_star.py"
    if kind.backward is not None:
        return "tests/rules/test_ruled_estimates.py"
    if kind.moves == "inputs":
        return "tests/rules/test_estimates_between_runs.py"
    files = {"attention": "test_gradient_attention", "paths": "test_path_estimates"}
    return f"tests/rules/{files.get(kind.place, 'test_estimates')}.py"


for _estimator in dict(ESTIMATORS.items()).values():
    _experiment(
        f"using {_estimator.name}",
        _estimator.example,
        _estimator.documentation,
        _estimator_test(_estimator),
        _estimator.source,
        context="" if _estimator.is_effect else "measure logit(answer) as raw",
    )
_experiment(
    "using atp",
    "using atp",
    "Attribution patching, another word for `gradient_input`. Results name `gradient_input`.",
    "tests/rules/test_estimated_sites.py",
    "Nanda 2023, Attribution patching; Syed et al. 2023, arXiv 2310.10348",
)
_experiment(
    "verify",
    "using atp verify top 2, random 3",
    "Also runs the 2 cells with the largest absolute estimates, and 3 drawn from the others with "
    "the seed, on the same rows. A table below the estimates has their exact effects with "
    "intervals. Below it are Pearson's and Spearman's correlation of estimates and exact effects, "
    "over the random cells with an interval and over all verified cells without one, and how many "
    "random cells exceed the top. Each measure has its own cells. Cells that can't have an effect "
    "are never chosen. `top` or `random` may be omitted. The estimator must estimate effects, and "
    "the experiment must have one model, one block and one pair of runs (E0608).",
    "tests/rules/test_verification.py",
)
_experiment(
    "verify until",
    "using atp verify until top 2 95%",
    "Also runs cells until the 2 largest exact effects are known with this confidence: 60 drawn "
    "at random, then those with the largest absolute estimates in batches. After each batch, a "
    "regression of the exact effects on the estimates gives the probability that another cell is "
    "among the largest. The regression assumes that the residuals of the remaining cells are "
    "distributed like the observed residuals: Student's t with a scale that grows with the "
    "estimate. The output states this assumption. Results are proved only if every cell that can "
    "have an effect was run. `mechdsl plan` counts all cells, the maximum. "
    "[Statistics](statistics.md#search-for-the-largest-effects) has the share of correct results "
    "in simulations.",
    "tests/results/test_top_search.py",
)
_experiment(
    "verify until stable",
    "using atp verify until stable",
    "Also runs cells in the order of their absolute estimates, in batches of 20, until a batch "
    "doesn't change the 20 largest exact effects. This is a heuristic: it bounds no error "
    "probability.",
    "tests/rules/test_verification.py",
)
_experiment(
    "generate",
    'generate 8 until "Part", "Total"',
    "Lets the model continue each prompt by up to 8 tokens in every cell and in the base and "
    "source runs. It selects the most likely token each time. A completion ends before a text "
    "after `until` and before the end-of-text token; it includes neither. `generate N until … "
    "with …` accepts `until` and `with` in either order. Step 0, the prefill, is the pass over "
    "the prompt and predicts the first token. Step s processes token s of the reply. Rules act at "
    "every step by default, in the prefill at their positions. `last token` and `tokens *` then "
    "apply to the newest token, which receives the value written at the last prompt token. "
    "`scale`, `project out`, `clamp` and `add` act on the current value. Metrics of logits still "
    "read the last prompt token. `path`, and base or source runs with rules, aren't allowed.",
    _REPLIES,
)
_experiment(
    "python of reply",
    'measure python("functions.py:words", reply) as raw',
    "A function from a Python file, called as `words(replies, rows)` with the generated texts, "
    "without stop texts, in place of logits. A third parameter, or one named `tokenizer`, "
    "receives the model's tokenizer.",
    "tests/python_files/test_replies.py",
    OWN,
    "generate 8",
)
_experiment(
    "generate with",
    "generate 8 with temperature 0.7, top_k 50, top_p 0.9, samples 3",
    "Samples tokens at a temperature (1 by default) from the 50 most likely tokens and from "
    "the smallest set with probability 0.9. The measure of a row is the mean over its samples. "
    "The file needs a `seed` line. A sample depends on the seed, the row's content, the cell, "
    "the sample number and the step, and not on the batch.",
    "tests/execute/test_kept_replies.py",
)
_rule(
    "during",
    "patch resid_post layer 1 at last token during step 2..5",
    "Limits the rule to these steps of a reply, both ends included. `during prefill` is step 0 "
    "alone, and `during each step` is the default. Steps after the prefill process only the "
    "newest token. Positions other than `last token` and `tokens *` therefore need `during "
    "prefill` or no clause. `for s in 0..7 { … during step s }`, or `during step s..s + 2`, "
    "makes the step an axis. `pattern`, `scores`, `allow` and `renumber` apply only to the "
    "prefill.",
    OWN,
    _REPLIES,
    "generate 8",
)
_rule(
    "after prefill",
    "patch k layers * at last-item token with clean after prefill",
    "Edits cached keys or values of the prompt between the prefill and the first step. The "
    "first token of the reply is predicted without the edit, and later tokens attend to the "
    "edited values.",
    OWN,
    _REPLIES,
    "generate 8",
)
_experiment(
    "positions in a reply",
    "measure entropy at each step as raw",
    "Reads tokens of the reply in measures and observations. `each step` is the position that "
    "predicts token s + 1, along the axis `step`; step 0 is the last prompt token. Also `each "
    'reply token`, `reply token 3`, `first token of reply`, `last token of reply`, `"Answer:" '
    "of reply token` (the last token of its last occurrence), `answer of reply token` (of each "
    "row's own answer, or of another text or value of the row, without white space around it) "
    "and `observe attention … from "
    "each reply token to subject tokens`. mechdsl reads them in full forward passes over "
    "prompt and reply, with the rules active in the same steps. A cell excludes rows whose "
    "reply has no such token. `delta` and `kl(RUN)` compare with the base run, or the named "
    "run, on the same reply without rules. Other effects, texts of several tokens and "
    "statistics over all rows aren't available. `save` writes the vectors of a run without "
    "rules, for each sample.",
    "tests/rules/test_in_replies.py",
    context="generate 8",
)
_experiment(
    "replies behind prompts",
    "prompts fruit limit 4 with replies of writer",
    "Appends to each prompt the reply of `writer`, another experiment with `generate`. All "
    "runs have the same tokens, without tokenizing the text again. If `writer` has several "
    "cells, name one: `replies of writer(c: 1)`. `last token` is the last token of the reply, "
    "and answers are read after it. Rules, measures, observations and `save` can use positions "
    "in the reply: `patch resid_post layer * at each reply token`. Rows without a reply are "
    "excluded and reported. `writer` runs first; it needs the same block and a model with the "
    "same tokenizer.",
    "tests/rules/test_prompts_with_replies.py",
)
_experiment(
    "measure",
    "measure prob(answer) at last-item token as delta",
    "A metric, its position (the last token by default) and the effect. Metrics are "
    "expressions of those [below](#metrics). Two metrics that differ only in position have it "
    "in their names: `prob(answer) at item 1 token`.",
    "tests/execute/test_metrics.py",
)
_experiment(
    "answers that differ by row",
    "measure prob(count + 1..12) as raw",
    "Evaluates the bounds of numerals in each row (greater-than: `prob(label + 1..99, digits: "
    "2)`). Lists work too: `prob([count, count + 2])`, or `expected(around)` for a value "
    "`around` that is a list. Numerals are formatted as in `answer`, with the requested number "
    "of `digits`. A row without numerals is an error. A `for` variable can appear in them "
    '(`prob(label + i..99)`) and in texts (`logit(" {i}")`). A row value of the same name '
    "takes precedence. `absolute_error(1..9, count)` is the distance of the most likely numeral "
    "from a whole number of the row: a value, also one of another run (`count of fewer`), an "
    "expression, `item.index` or a `for` variable; without it, from the answer. The mean is the "
    "mean absolute error. In tables of `argmax`, `distance to answer` is the mean absolute "
    "difference from the answer.",
    "tests/execute/test_metrics.py",
    "Hanna et al. 2023, arXiv 2305.00586",
)
_experiment(
    "any of several answers",
    "measure correct(answer, answer of fewer) as raw",
    "`correct`, `prob`, `logprob` and `rank` accept several texts. They return whether the most "
    "likely token is one of them, the sum of their probabilities, its logarithm, and the best "
    'rank. A list value expands to its entries: `accepted = list(" {alias}", from: aliases)`, '
    "then `correct(accepted)`. Equal tokens count once. All but `rank` also accept texts of "
    "several tokens: `correct` returns whether greedy decoding generates one of them, and `prob` "
    "the probability that the continuation begins with one. If one text begins with another, the "
    "longer text adds nothing. Each text of several tokens needs separate forward passes; to read "
    "only first tokens, write `prob(first token of accepted)`.",
    "tests/execute/test_metrics.py",
)
_experiment(
    "measure at each",
    "measure entropy at each item token as raw",
    "Reads the metric at each of several positions, along an axis `measured` (`item` for "
    "occurrences). All measures of an experiment use the same positions. A cell excludes rows "
    "without the position. In a text, `{item.index}` is the number of the measured occurrence.",
    "tests/execute/test_measured_positions.py",
)
_experiment(
    "loss at each",
    "measure loss at token * align right as raw",
    "The loss of the token at each position, in each run's own text, read where it is "
    "predicted. The first token of an input has no loss.",
    "tests/execute/test_measured_positions.py",
)
_experiment(
    "mean over",
    "measure entropy at each item token as raw mean over item",
    "Averages over an axis, within each row over its cells, before the statistics. Intervals "
    "and p refer to these means. All measures of an experiment use the same average.",
    "tests/execute/test_averaged.py",
)
_experiment(
    "auc over",
    "measure prob(answer) as raw auc over k",
    "Replaces the mean by the area under each row's curve over a numeric axis (trapezoidal "
    "rule), divided by the range. Each row has one number, so intervals are over rows, and "
    'comparisons of areas are paired (`expect raw(m: "caap") - raw(m: "chance") > 0`). For '
    "insertion and deletion of patches, use `patch embed at top k of caap tokens` in a `for k` "
    "loop, with `from scenes into neutral` and `from neutral into scenes`. `report lines k` "
    "plots the curve of a measure without `auc`.",
    "tests/images/test_maps.py",
    DELETION,
    context="for k in 0%..100% step 25% { ablate embed at top k of places tokens with zero }",
)
_experiment(
    "loop in measure",
    "for l in 0..2 { ablate mlp_out layer l at last token with zero "
    "measure cosine(resid_post layer l, clean) at last token as raw }",
    "Uses a loop variable in the sites and positions of a measure (`at token l`). The measure "
    "is read in the cells of that value. `cosine(resid_post layer *, clean)` sweeps "
    "independently.",
    "tests/execute/test_measured_positions.py",
)
_experiment(
    "stats",
    "stats bootstrap(2000) test flips confidence 90% correct bh verdicts holm by count",
    "Overrides the statistics: resampling, the test for intervals and p, the confidence level and "
    "the correction. Tests are `t` (Student's t corrected for skewness, the default), `flips` "
    "(sign flips) and `bootstrap`. Corrections are `holm`, `bh`, `max` (max-statistic) and "
    "`none`. Cells whose values must be equal count as one test. With `verdicts holm`, the "
    "`expect` lines of an experiment share one significance level. `by` treats all rows of one "
    "value as one sampling unit, so intervals and p generalise to new values, not to new rows. "
    "W0722 reports a value that explains most of the variance between rows. `docs/statistics.md` "
    "lists all values.",
    "tests/results/test_statistics.py",
)
_experiment(
    "report",
    "report table top 10",
    "Shows the results in one of the formats [below](#reports). `top n` ranks by absolute "
    "value and notes that rows were selected by effect size.",
    "tests/results/test_reports.py",
)
_experiment(
    "report width",
    'report heatmap layer by head to "heads.pdf" width 1 column',
    "The width of one column of a paper (`width 1 column`, 3.25 inches) or of two "
    "(`width 2 columns`, 6.75 inches), with labels of 7 points. The file ends in `.pdf` (fonts "
    "embedded), `.svg` or `.png` (300 dpi). A picture that needs more room is scaled down.",
    "tests/results/test_paper_pictures.py",
)

# --- classifiers ----------------------------------------------------------------------------------

_class(
    "class of the answer",
    "measure prob(class answer) as raw",
    "The label that the answer names, as in the config (`id2label`). In a classifier, texts "
    "are label names, not tokens. If labels have no names of their own (`LABEL_0`), a numeric "
    "text is the index of an output; an answer `token_id(column)` always is. Token classifiers "
    "are read at a position. Sequence classifiers have one output, from token 0 (encoders) or "
    "from the last token that isn't padding (decoders).",
)
_class(
    "class by its name",
    'measure logit(class "positive") - logit(class "negative") as raw',
    "Labels by name.",
)
_class(
    "class by its number",
    "measure logit(class 2) as raw",
    "An output by index, from 0. This also applies to a language model from Python whose "
    "outputs aren't tokens and whose config doesn't say so.",
)
_class(
    "correct of a label",
    "measure correct as raw",
    "Whether the answer is the most likely label. For independent labels "
    "(`multi_label_classification`): whether its probability is above 0.5.",
)

# --- expectations ---------------------------------------------------------------------------------

_expectation(
    "expect",
    "expect max(delta) > 0.3",
    "An expectation that must hold for the bound of the confidence interval nearer to the "
    "threshold. The exit status shows whether all expectations hold.",
)
_expectation(
    "expect on mean", "expect max(delta) > 0.3 on mean", "An expectation on the mean alone."
)
_expectation(
    "expect of a cell", "expect delta(L1H2) < 0.1", "The effect of the cell with these coordinates."
)
_expectation(
    "expect mean",
    "expect mean(delta, layer 0..1) < 0.05",
    "The mean over cells, or with `participation` in its place the effective number of cells with "
    "an effect: the participation ratio (Σ e²)² / Σ e⁴ of the effects e. It is 1 if one cell has "
    "all of the effect, and the number of cells if all effects are equal in size; its interval is "
    "cut to this range.",
)
_expectation(
    "expect argmax",
    "expect argmax(delta) = L1H2",
    "The cell with the largest effect. A value of a `for` is written as a cell of the measure: "
    "`argmax(delta) = delta(c: 3)`.",
)
_expectation(
    "expect top n contains",
    "expect top 5 contains L1H2, L0H1",
    "Whether these sites are among the cells with the largest absolute effects.",
)
_expectation(
    "expect accuracy",
    "expect accuracy(clean) > 0.9",
    "The share of rows whose answer is the most likely token in an unpatched run. It includes "
    "rows that `keep` drops.",
    "tests/execute/test_accuracies.py",
)
_expectation(
    "expect accuracy of a model",
    "expect accuracy(clean, model: toy) > 0.9",
    "The same for one model of an experiment on several models. Each model has its own accuracy.",
    "tests/execute/test_accuracies.py",
    context="model toy, twin",
)
_expectation(
    "expect pearson",
    "expect pearson(delta, cie) > 0.5",
    "The correlation of the true effects with those of another experiment, over the cells that "
    "both have. It is corrected for the noise of the rows. `spearman` uses ranks, has no "
    "interval and needs `on mean`.",
)
_expectation(
    "expect of another experiment",
    "expect max(delta) - max(delta of cie) < 1",
    "A measure of another experiment of the file, which may follow this one. If several "
    "measures match, write `delta of ld of cie`. Axes of that experiment select its cells "
    "(`mean(delta of cie, layer 2)`). If a measure and an experiment have the same name, the "
    "name refers to the measure.",
    "tests/results/test_expectation_names.py",
)
_expectation(
    "expect auroc",
    "expect auroc(delta, [L1H2, L0H1]) > 0.5",
    "How well an effect separates positive from negative cells: the share of pairs in which "
    "the positive cell has the larger effect. The positive cells are a `group` of sites, a "
    'site, or a list of sites or of quoted positions (`["last token"]`); all other cells '
    "that further arguments select (`layer 0..1`) are "
    "negative. With a prompt variable that is 0 or 1, as in `auroc(delta, large, L1H2)`, the "
    "rows of one cell are ranked. With `auroc(delta, accuracy(clean), L1H2)`, the positive rows "
    "are those whose answer is right in this run.",
    "tests/results/test_expectation_names.py",
)
_expectation(
    "expect near",
    'expect delta(L1H2) near -0.67 within 0.5 citing "a paper"',
    "Within a given distance of a published value.",
)
_expectation(
    "expect auc",
    "expect auc(prob, k) < 0.4",
    "The area under the curve of a measure over a numeric axis (trapezoidal rule), divided by "
    "the range of the axis. Counts and percentages on one axis are E0606.",
    "tests/onward/test_curves.py",
    DELETION,
    context="for k in 0%..100% step 25% { ablate embed at top k of places tokens with zero } "
    "measure prob(answer) as raw",
)

# --- images ---------------------------------------------------------------------------------------

_image(
    "images block",
    'images circles { kind in ["circle"] image shapes(n: 1, kind: kind) answer "{kind}" }',
    "Rows that are images, for vision transformers. Values, `rows`, `rename`, `where`, "
    "`split`, `answer` and other texts, and corruptions of values work as in a `prompts` "
    "block. Texts are label names. The model's image processor (`preprocessor_config.json`) "
    "prepares each image.",
)
_image(
    "image file",
    'image "{kind}.png"',
    "A PNG, JPEG, WebP or BMP file; its path is relative to the `.mech` file. mechdsl applies "
    "the EXIF orientation, converts to RGB and puts transparent parts on white. A record may "
    'name several files. With `"{file}"` as the image, `corrupt other { file = second }` '
    "selects another, so you can patch from one image into the other.",
    "tests/images/test_pixels.py",
)
_image(
    "image shapes",
    "image shapes(n: 1, kind: kind, size: 32)",
    "`n` shapes (1 by default) of a `kind` at random positions on a texture, in a square of "
    "`size` pixels (32 by default). `colour:` and `texture:` fix values that are otherwise "
    "random. Each row is drawn separately, so a `limit` can exceed the number of combinations. "
    "A corruption of a value keeps the other draws.",
)
_image(
    "image grid",
    'image grid(rows: "red {kind}, - / -, blue cross", marks: "@ #", cell: 8)',
    "Shapes in the cells of a grid of squares of `cell` pixels (8 by default): `/` separates rows, "
    "`,` separates cells, and `-` is an empty cell. `marks:` draws one of `@ # $ & % *` before "
    "each row, and lines between the rows; with an empty text, this column is empty, and without "
    "`marks:`, the image lacks it. Sizes, positions within the cells, background and noise are "
    "random. A corruption of one cell leaves the pixels of all others equal. `red circle 30%` is "
    "faint: its colour replaces 30 % of the background. `noise:` is the largest change of a "
    "channel, of 255 (14 by default). `region object = mask` is the pixels of all shapes.",
    "tests/images/test_shapes.py",
)
_image(
    "image gray",
    "image gray",
    "An image with all pixels at 128 of 255; `gray(100)` is darker.",
    "tests/images/test_pixels.py",
)
_image(
    "image noise",
    "image noise",
    "An image at the model's input size with an independent random value for each channel of "
    "each pixel.",
    "tests/images/test_pixels.py",
)
_image(
    "image mean",
    "image mean of scenes",
    "The mean of the images of another block, or of `scenes.train`, for each pixel and "
    "channel. It uses all rows before any `limit` (1,000 for generated images), after the "
    "image processor.",
    "tests/images/test_means.py",
)
_image(
    "region",
    "region object = mask",
    "A part of each image as a span. `object tokens` are the patches with at least one pixel, "
    "as the model receives it, of which half or more lies in the region. For generated shapes, "
    "`mask` is the area of the shapes. Otherwise, a column contains a box `[left, top, right, "
    "bottom]` in pixels of the file, a list of boxes, or the path of a mask. A mask is an "
    "image of the same size that is black outside the region. Regions are resized and cropped "
    "with the image.",
    "tests/images/test_regions.py",
)
_image(
    "inserted tokens of images",
    "corrupt longer { insert 4 tokens after last token }",
    "Adds vectors of 0 after the patches. Rules write others at `inserted tokens`, as in visual "
    "prompt tuning. Models whose attention depends on the order of tokens are an error.",
    "tests/images/test_inserted_tokens.py",
    "Jia et al. 2022, arXiv 2203.12119",
)
_image(
    "tiles",
    "tiles 2 by 3 and whole",
    "Cuts each image into two rows and three columns of tiles. Each tile is a row of the "
    "block, with the values and texts of its image; `and whole` adds the uncut image. The cut "
    "precedes resizing and cropping but follows corruptions: a blur crosses edges, and noise "
    "and shapes are drawn once per image. A cut between pixels is rounded to the left and to "
    'the top. Each row has the values `tile` (`"row 1 col 2"`, `"whole"`) and `image`: `where '
    'tile != "whole"`, `corrupt seen { tile = "whole" }` (another tile of the same image), '
    "`report table by tile`. A tile has the part of a region that lies in it, and cells at "
    "`object tokens` contain only tiles with such a part. Tiles of one image aren't "
    "independent: the default is `stats by image`, they share a part of a split and a fold of "
    "a probe, and `limit` takes complete images in order. Rows of another block with the same "
    "tiles are paired by tile and image. A block of one image is paired with every tile. "
    "`gray`, `noise` and `mean` images have no tiles.",
    "tests/images/test_tiles.py",
)
_image(
    "transplants of images",
    "from scenes into neutral",
    "Pairs a block of one row with every row: the vectors of each image are written into the "
    "one gray image. If that image has no regions, `object tokens` are the positions in each "
    "source image.",
    "tests/images/test_rules.py",
)
_image(
    "label of an answer",
    "measure logit(answer) as delta",
    "For images, a text names a label (`id2label`). `logit(class answer)` is the same.",
)
_image(
    "scores of texts",
    'measure score("a photo of a {kind}") as delta',
    "For a model with an image encoder and a text encoder (CLIP, SigLIP, MetaCLIP 2): the "
    "model's logit of the image and a text. It is the cosine of the two embeddings times the "
    "model's scale, plus its bias if it has one. `score(answer)` uses the row's text; "
    "`logit(…)` is the same. Rules act in the image encoder, whose layers can be written "
    "`vision layer 3`. Each text is encoded once, without rules, with the padding of the "
    "model's processor.",
    "tests/images/test_towers.py",
    "Radford et al. 2021, arXiv 2103.00020; Zhai et al. 2023, arXiv 2303.15343",
)
_image(
    "zero-shot classes",
    'classes "a photo of a {kind}"',
    "The texts from which such a model chooses: all values of the names in the text, declared "
    "or from columns, independent of the rows that run. `correct`, `rank` and `accuracy` "
    "compare these texts. `prob` is their softmax; for SigLIP, it is the sigmoid of one text "
    "and needs no classes.",
    "tests/images/test_towers.py",
)
_image(
    "images for texts",
    "image from scenes",
    "Use in a `prompts` block for such a model: the text encoder reads the rows, and rules act "
    "there (optionally `text layer 3`). Each text is scored with the image of the same row of "
    "`scenes`, or with its only image. `score` refers to that image; `rank(image)`, "
    "`prob(image)` and `correct` compare all images of the block.",
    "tests/images/test_text_towers.py",
)
_in_prompt(
    "image in a prompt",
    'image photo = "{kind}.png"',
    "An image in each prompt of a vision-language model; `{photo}` in the template is its place. "
    "All images of an `images` block are possible. `mean of scenes` is the pixelwise mean before "
    "preparation, rounded to whole levels. Images of several sizes are resized and cropped first, "
    "as the model's image processor does with every image, if it has one size for all (E0207 for "
    "others, such as those that cut images into tiles). The model's transformers processor "
    "prepares the image, and its image tokens are positions of the prompt. "
    "Several images need several names. Each distinct image passes through the vision encoder "
    "once.",
    context='kind in ["circle", "square"] template "{photo} What is this?"',
    test="test_rules.py",
)
_in_prompt(
    "video in a prompt",
    'video clip = ["{kind}.png", gray]',
    "Frames in each prompt, in the order of the list or of the file names in a folder (`video "
    'clip = "{folder}"`); `{clip}` in the template is their place. The model reads them as '
    "images in a row, prepared by its image processor. If a model has a video processor (`pip "
    'install "mechdsl[video]"`), it prepares all frames, in one size; the processors of Qwen '
    "merge two frames, and `frame 1` is the first two. `frame 2 tokens`, `each frame tokens` and "
    "`frame 2 row 3 col 4 token` are positions, also with a `for` variable (`frame k + 1 row 3 "
    "col 4 token`); with several videos, add `of clip`. `clip tokens` is the tokens of all frames. "
    "If the processor needs the same number of frames in all videos of a prompt, videos of "
    "different numbers have the tokens and vectors that each has alone.",
    context='kind in ["circle", "square"] template "{clip} What moves?"',
    test="test_video_processors.py",
)
_in_prompt(
    "inserted tokens in a prompt with an image",
    'corrupt longer { insert 4 tokens before photo tokens with " the" }',
    "Adds placeholders before or after an image, or at any position of the text, as in "
    "[Corruptions](#corruptions). Next to an image, they are outside the tokens that the "
    "processor adds around the image; a position between the tokens of an image is E0207. Rules "
    "write vectors at `inserted tokens`, also during generation, and `fit(soft_prompt(tokens: 4), "
    "…)` trains them.",
    context='image photo = shapes(n: 1, kind: "circle") template "{photo} What is this?"',
    test="test_inserted_tokens.py",
)
_in_prompt(
    "images of a block",
    "image from circles",
    "With `{image}` in the template, the prompts contain the images of a block. They have its "
    "rows, values, regions and corruptions, combined with their own.",
    context='template "{image} What is this?"',
)
_in_prompt(
    "region of an image in a prompt",
    "region object of photo = mask",
    "Defines a region as in an `images` block, for images in prompts. `object tokens` are the "
    "tokens that read part of it: if a token's part of the image is divided into 8 x 8 squares, "
    "at least one square is at least half in the region. `of photo` is needed only for prompts "
    "with several images; an equal image of another name doesn't have the region. "
    "With `from scenes into blank`, where `blank` has one row, and its image "
    "no regions, `object tokens` are the positions in the image of each row of `scenes`; the "
    "images have the same name and the same rows and columns of tokens.",
    context='image photo = shapes(n: 1, kind: "circle") template "{photo} What is this?"',
)
_in_prompt(
    "tile of an image in a prompt",
    "photo tile 2 row 1 col 3 token",
    "A token of a tile, with rows and columns from 1 within the tile. `photo tile 2 tokens`, "
    "`each token of photo tile 2` and `photo tile * tokens` (all tiles) are positions too, and "
    "`photo thumbnail tokens` those of the whole image that some processors add. Tiles count "
    "from 1 in reading order; an image that isn't cut is `tile 1`. With a region, "
    "`object tile 2 tokens` are its tokens in that tile. In `for t in 1..4`, images with fewer "
    "tiles leave the cell.",
    context='image photo = shapes(n: 1, kind: "circle") template "{photo} What is this?"',
    test="test_families.py",
)
_in_prompt(
    "loss of a prompt with an image",
    "measure loss as raw",
    "The mean over the prompt's own tokens of text; tokens of images don't count, and `loss at` "
    "one of them is an error (E0612). The first token of text after an image is predicted from the "
    "image. In PaliGemma, whose prompts see their later tokens, no prompt has a loss (E0612).",
    context='image photo = shapes(n: 1, kind: "circle") template "{photo} What is this?"',
    test="test_prompt_loss.py",
)
_in_prompt(
    "image in a chat",
    'chat { user "{photo} What is this?" }',
    "An image in a turn. If the model's chat template takes lists of texts and images, mechdsl "
    "passes such a list. The template then writes the tokens around images and the white space "
    "next to them; some templates write all images of a turn first. Other templates get one text. "
    "The span of the turn (`user tokens`) contains its images.",
    context='image photo = shapes(n: 1, kind: "circle")',
    test="test_chats.py",
)
_in_prompt(
    "mismatched image in a prompt",
    "corrupt other { kind = other(kind) }",
    "Uses the image of another row, by choosing a different value of the column or list that the "
    "`image` line names, drawn with the seed. The texts of the row don't change.",
    context='kind in ["circle", "square"] image photo = "{kind}.png" '
    'template "{photo} What is this?"',
)
_in_prompt(
    "changed image in a prompt",
    "corrupt hidden { mask photo }",
    "Changes an image as in an `images` block, except that patches can't be changed alone. "
    "`mask` makes it gray; `blur photo radius 8`, `noise photo by 40`, regions and `swap` work "
    "too. `swap photo_1, photo_2` exchanges two images.",
    context='image photo = shapes(n: 1, kind: "circle") template "{photo} What is this?"',
)
_in_prompt(
    "site of the vision encoder",
    "patch z vision layer 4 at photo row 2 col 3 token",
    "A rule in the vision encoder, at all patches that an image token is computed from, also in "
    "tiles: one patch, or 2 x 2 or 4 x 4 in models that merge or pool patches "
    "([Models](models.md#image-tokens)). The changed image's projected vectors replace `embed` of "
    "all its tokens, and each row is a full forward pass. `embed vision` is the output of the "
    "patch projection, before position embeddings. The rules `patch`, `swap`, `freeze`, `ablate`, "
    "`add`, `set`, `scale`, `clamp`, `project out` and `project onto`, also with `dims`, `in "
    "basis` and `feature`, `observe norm` and `value` (means over the patches), and `observe "
    "similarity`, "
    "`cka`, `rank`, `effective_rank` and `clusters` (of the means "
    "over the patches of tokens, `test_encoder_observations.py`) are available, also before "
    "generated text. So are `path`, `replace block vision layer 4 with …`, `observe probe`, "
    "`observe prediction`, `observe random`, `observe features of b`, trained probes, "
    "dictionaries and "
    "transcoders (of single patches, `test_vision_dictionaries.py`), and trainings on a measure "
    "(`das`, `boundless_das`, `vector`, `reft`, `scales`, and groups of `mask`, `atp`, "
    "`integrated_gradients` and `forward_selection`), which edit single patches "
    "(`test_encoder_effects.py`); others are E0108. Both ends of a `path` are in the "
    "encoder: `path z vision layer 2 head 0 -> q vision layer 4 head * at photo tokens`. A "
    "probe's row is the mean over the patches, and rows with the same image are in one fold. "
    "In Idefics2, whose resampler mixes patches, positions in the encoder are single patches, "
    "also of tiles and the thumbnail (`tests/image_prompts/test_resampled_patches.py`), as in "
    "LLaVA-OneVision, which interpolates patches of frames and of large images "
    "(`tests/image_prompts/test_interpolated_patches.py`). "
    "`block attention vision layer 4 from photo tokens to photo row 2 col 3 token`, `reweight`, "
    "`allow`, `set` and `observe attention vision` are about attention between patches "
    "([Models](models.md#image-tokens), `tests/image_prompts/test_encoder_attention.py`), as are "
    "rules at `scores`, `pattern`, `q_rot` and `k_rot`, and `observe entropy`, `distance` and "
    "`received` (`tests/image_prompts/test_encoder_attention_sites.py`). "
    "Circuits have edges in the encoder (`tests/image_prompts/test_vision_circuits.py`). "
    "`using gradient_input` and other estimators estimate cells "
    "of `patch`, `ablate` and `path` ([Estimators](estimators.md#sites-that-can-be-estimated), "
    "`tests/image_prompts/test_vision_estimates.py`). "
    "`save` writes the vectors of patches and their gradients "
    "(`tests/image_prompts/test_encoder_saves.py`), and `against random` draws other heads, layers "
    "or image tokens (`tests/image_prompts/test_encoder_controls.py`). "
    "Class tokens, row ends and tile tags have no patch. At frames of a video, rules change "
    "Video-LLaVA's video encoder. In Llama 3.2 Vision, blocks of `cross` read the changed image.",
    context='image photo = shapes(n: 1, kind: "circle") template "{photo} What is this?" '
    "corrupt hidden { mask photo }",
    test="test_token_patches.py",
)
_in_prompt(
    "sound in a prompt",
    "audio a = tone(440)",
    "A sound in each prompt of a speech model such as Whisper: a WAV file with 16-bit samples "
    '(`audio a = "{file}"`), a sine of this frequency in hertz, `silence`, or uniform `noise`. '
    "Channels are averaged. The model's own feature extractor prepares the sound; both must have "
    "the same sampling rate. Generated sounds have the model's input length and half the "
    "full-scale amplitude.",
    context='template "{a}"',
    test="test_sounds.py",
)
_in_prompt(
    "frames of a sound",
    "patch z encoder layer 4 at a frame 2 token",
    "Whisper's encoder reads one sound, without text, and its decoder writes the answer, so the "
    'template is `"{a}"`. At sites of `encoder`, and at `k cross` and `v cross`, positions are '
    "frames: `a frame 2..4 tokens`, `a tokens`, `each token of a`. They count from 1 and include "
    "the silence that the model pads the sound with. Other sites are in the decoder, whose text "
    "begins with the tokens for the language and the task in the generation config (English and "
    "transcription by default). Rules, `generate` and edges work as in other encoder-decoders.",
    context='audio a = tone(440) template "{a}" corrupt hidden { silence a }',
    test="test_sounds.py",
)
_in_prompt(
    "image of an encoder-decoder",
    "patch z encoder layer 4 at photo row 2 col 3 token",
    "TrOCR's encoder reads one image, without text, and its decoder writes the answer, so the "
    'template is `"{photo}"`. At sites of `encoder`, and at `k cross` and `v cross`, positions '
    "are patches; other sites are in the decoder. Rules, `generate` and edges work as in other "
    "encoder-decoders.",
    context='image photo = shapes(n: 1, kind: "circle") template "{photo}" '
    "corrupt hidden { mask photo }",
    test="test_encoded_images.py",
)
_in_prompt(
    "image that blocks attend to",
    "patch v cross layer 13 heads * at photo tokens",
    "Some blocks of Llama 3.2 Vision attend to an image instead of earlier tokens. `k cross` and "
    "`v cross` of these blocks, and sites of `vision`, are at its patches, and other sites at "
    "tokens of the text. With several images in a prompt, text attends to the last one before it "
    "(`tests/image_prompts/test_several_attended_images.py`).",
    context='image photo = shapes(n: 1, kind: "circle") template "{photo} What is this?" '
    "corrupt hidden { mask photo }",
    test="test_attended_images.py",
)
_in_image(
    "a patch",
    "image row 3 col 4 token",
    "The token of a patch. Rows and columns count from 1 at the top left.",
)
_on_image(
    "a patch in an expectation",
    'expect delta(position: "image row 3 col 4") < 1',
    "The effect at a patch, with its name from the table.",
    OWN,
    "tests/images/test_blocks.py",
)
_in_image(
    "several patches",
    "image row 1..2 col * tokens",
    "A rectangle of patches, joined; with `token`, one run for each patch.",
)
_on_image(
    "windows of patches",
    "for r in 1..3 { ablate embed at image row r..r + 1 col 2 tokens with zero }",
    "A sliding window. Both bounds of a range can be a `for` variable plus or minus a number.",
    OWN,
    "tests/images/test_rules.py",
)
_in_image(
    "all patches",
    "image tokens",
    "All patches, joined.",
)
_in_image(
    "each patch",
    "each token of image",
    "One run per patch, labelled by row and column.",
)
_in_image(
    "class token",
    "cls token",
    "The class token, which precedes the patches. A `distillation token` and registers "
    "(`register 2 token`, `each register token`) may follow it. `tokens *` includes them all, "
    "and `first token` is the first patch.",
)

# --- experiments on images ------------------------------------------------------------------------

_MAPS = "tests/images/test_maps.py"
_on_image(
    "observe pointing",
    "observe pointing of caap, deleted in object",
    "The pointing game: whether a map has its maximum in the region, in a patch of which at "
    "least half lies in it. For tied maxima, it is the share of them in the region. Maps are "
    "experiments of the file that sweep patches (`at each token of image`); the value of a map "
    "is its signed first measure in the same row. Several maps form an axis `map`. For one "
    "map, its other axes become axes here (`for a in … { for b in … }`: one value per range of "
    "layers). The region is that of the block, in pixels as the model receives them. Rows "
    "without the region are excluded and reported. `pointing chance` is the share of patches "
    "in the region.",
    "Zhang et al. 2018, Top-down neural attention by excitation backprop",
    _MAPS,
)
_on_image(
    "observe mass",
    "observe mass of caap in object as inside",
    "The share of a map's positive values in the region. A patch partly in the region counts "
    "by its share of pixels. The table also shows the region's share of the image.",
    "Arras et al. 2022, arXiv 2003.07258",
    _MAPS,
)
_on_image(
    "observe iou",
    "observe iou of caap in object top 25%",
    "Intersection over union of the region and the highest patches, in pixels. Without `top`, "
    "the number of patches matches the region's share of the image. `f1` is the F1 score of the "
    "same patches.",
    OWN,
    _MAPS,
)
_on_image(
    "observe auroc",
    "observe auroc of caap in object",
    "The probability that a random patch in the region has a larger value than a random patch "
    "outside it, in each row; ties count half. A patch is in the region if at least half of it "
    "is. `auroc chance` is 0.5. Maps are signed: `observe magnitude of` ranks by size.",
    "Hanley and McNeil 1982, Radiology 143(1)",
    "tests/fits/test_against_masks.py",
)
_on_image(
    "map of windows",
    "for r in 1..3 { replace image row r..r + 1 col * tokens with gray }",
    "A sliding window of several patches is also a map, wherever an experiment is used as one. "
    "Each window's value is divided equally among its patches, and a patch in several windows "
    "gets the mean of its shares.",
    OWN,
    "tests/images/test_sum_of_maps.py",
)
_on_image(
    "observe sum",
    "observe sum of caap, 0.5 * deleted at each token of image as both",
    "A weighted sum of maps, patch by patch, for example of windows of several sizes or of "
    "layers. A weight can be an expression of a `param` or a `for` variable: `(1 - c) * "
    "deleted`. If an experiment has several maps, such as one per layer, all are added. The "
    "result is a map: `observe pointing of both in object`, `top 25% of both tokens`. A patch "
    "without a value in one map has none in the sum. Rows that are missing in one map are "
    "excluded and reported. `observe magnitude of deleted at each token of image` is the absolute "
    "value of the sum, and `observe product of caap, deleted at each token of image` multiplies "
    "maps, so that one weights the other (`tests/onward/test_text_maps.py`).",
    OWN,
    "tests/images/test_sum_of_maps.py",
)
_on_image(
    "observe random",
    "observe random embed at each token of image as chance",
    "A uniform random number between 0 and 1 per row and position: an uninformative map and a "
    "random order of tokens. It depends on the seed, the observed image or text, and the "
    "position. Therefore, observe the images themselves, not a baseline image that all rows "
    "share. `random(20)` draws twenty along an axis `draw`, for random sets of patches: `for d "
    "in 1..20 { replace top 8 of chance(draw: d) tokens with gray }`.",
    OWN,
    _MAPS,
)
_AGAINST = "tests/images/test_map_fidelity.py"
_on_image(
    "observe infidelity",
    "observe infidelity of caap, deleted to taken as wrong",
    "The mean squared difference between the sum of a map over a set of patches and the "
    "decrease of the output without these patches. The sets and decreases come from `taken`, "
    "an experiment that removes patches (`replace`, `ablate`, `patch`) and measures `as "
    "delta`; each cell is a set. Maps have no scale of their own, so each row uses the "
    "non-negative factor that minimises the value: a map with the opposite sign is no better "
    "than zeros. `wrong chance` is the value of a constant map, which for sets of equal size "
    "predicts the average decrease.",
    "Yeh et al. 2019, arXiv 1901.09392, definition 2.1 and the optimal scaling of its section 2",
    _AGAINST,
)
_on_image(
    "observe sensitivity",
    "observe sensitivity of caap to near_caap as moves",
    "The largest relative change of a map under small changes of its image: ‖map of a nearby "
    "image − map‖ / ‖map‖. `near_caap` is the same experiment on one or several other runs "
    "(`from near_1, near_2 into neutral`, with `corrupt near_1 { noise image by 4 }` in the "
    "block; each run has independent noise). For several maps, list the same number of "
    "experiments after `to`, in the same order.",
    "Yeh et al. 2019, arXiv 1901.09392, max-sensitivity, which isn't divided there",
    _AGAINST,
)
_on_image(
    "replace patches",
    "replace each token of image with gray",
    "Occlusion: replaces patches in the image as the model receives it, before normalisation. "
    "Fills are `gray` (128 of 255), `blur(4)` (a Gaussian of this radius in pixels) and "
    "`noise(40)` (normal noise with this standard deviation of 255, drawn per row). Rectangles "
    "and regions are replaced as a whole: `replace image row 3..5 col 2..4 tokens with gray`, "
    "`replace object tokens with blur(4)`. To paste a patch of the other image, use `patch "
    "embed at each token of image`, which copies the patch embedding before position "
    "embeddings.",
    "Zeiler and Fergus 2014, arXiv 1311.2901",
    "tests/images/test_replace.py",
)
