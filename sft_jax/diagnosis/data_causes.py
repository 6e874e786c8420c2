"""Causes that lie in what was trained on."""

import math

from sft_jax.diagnosis.finding import Evidence, Finding
from sft_jax.diagnosis.run_files import RunFiles
from sft_jax.training.metrics import TRAIN

# A model that knows nothing of its tokens has a loss of ln(vocabulary). Sound ones are far below, whatever their size; one whose
# weights, tokenizer or template do not belong together is near it or above.
UNIFORM = 0.95
# Answers of one label behind long documents are 1 % of the tokens or more; below it is hardly anything to learn from.
LEAST_SHARE = 0.005
# Of all targets. The longest reasoning has some hundred tokens of answer for one of prompt; above it prompts are trained on, too.
MOST_SHARE = 0.999
UNSUPERVISED = 0.1  # share of documents without a token that is trained on; hardly any should be
# Providers of fine-tuning ask for 50 to 100 examples at least; LIMA (arXiv:2305.11206) has 1,000 long ones.
FEWEST_DOCUMENTS = 50
FEWEST_TOKENS = 2_000  # that many documents, of 40 tokens each
# Rows that share 13 words are taken for a leak, as those of one kind of request do: 7 % in the data of the quickstart, where every phrase
# comes from one grammar. Below a tenth of the held-out rows a leak explains no result; `data` of --json has them all.
LEAKED = 0.1  # training rows that hold held-out ones, by held-out rows
REPEATED = 0.05  # of the training rows: duplicates of so many weigh as much as a twentieth of an epoch
CUT = 0.05  # share of documents, or of supervised tokens, that were cut off at the end
_WHOLE = ("text", "tokens", "segments")  # formats of which all is trained on, or what the rows say


def first_loss(evidence: Evidence) -> Finding | None:
    """The loss before training is that of a model that knows nothing of its tokens."""
    run = evidence.run
    if run.vocabulary is None:
        return None
    uniform, found = math.log(run.vocabulary), {}
    for name in run.evals:
        curve = run.eval_curve(name)
        if curve and curve.steps[0] == 0:
            found[name] = float(curve.values[0])
    if not run.evals and (curve := run.curve("loss")):
        found[TRAIN] = float(curve.values[0])
    over = {name: loss for name, loss in found.items() if loss > UNIFORM * uniform}
    if not over:
        return None
    name, loss = max(over.items(), key=lambda item: item[1])
    drawn = run.config.model.init == "random"
    return Finding(
        f"Before training the loss on '{name}' was {loss:.3f}; guessing among {run.vocabulary:,} tokens has {uniform:.3f}.",
        {"first_loss": loss, "uniform_loss": uniform, "vocabulary": run.vocabulary, "model.init": run.config.model.init},
        "The base knows nothing of these tokens, so tuning has to teach a language beside the task."
        + (" It was drawn at random." if drawn
           else " Weights, tokenizer and template do not belong together, or the data are in none of its languages."),
        "model.init=checkpoint, with a pre-trained model in model.path." if drawn else
        "Check that model.path has its own tokenizer and whole weights (python -m sft_jax.chat --model BASE), and look at what is trained on "
        "with python -m sft_jax.inspect_data; data.chat_template names another template.",
    )  # fmt: skip


def mask_share(evidence: Evidence) -> Finding | None:
    """Nearly nothing is supervised, or the prompts are, too."""
    run = evidence.run
    for name, report in run.training_sets.items():
        targets = report.get("tokens", 0) - report.get("examples", 0)  # the first token of an example is never one
        if targets <= 0:
            continue
        share, whole = report.get("supervised_tokens", 0) / targets, report.get("format") in _WHOLE
        if LEAST_SHARE <= share <= (1.0 if whole else MOST_SHARE):
            continue
        given = next((item.supervise for item in run.config.data.train if item.name == name), run.config.data.supervise)
        found = {"set": name, "supervised_share": share, "data.supervise": given, "data.format": report.get("format", "")}
        seen = f"{share:.1%} of the targets of '{name}' are supervised (data.supervise={given})."
        look = "look at the weights with python -m sft_jax.inspect_data --config ... --ids."
        if share > MOST_SHARE:
            return Finding(seen, found, "The model is taught to write prompts as well as answers.", f"data.supervise=assistant; {look}")
        return Finding(
            seen, found, "Almost all of the computing goes into tokens that nothing is learnt from.",
            f"Check data.columns and the weights of rows, or shorten prompts; {look}",
        )  # fmt: skip
    if run.documents is not None and len(run.documents) and not cut_at_right(run):  # that is told by what it does to answers
        without = float((run.documents.supervised == 0).mean())
        if without > UNSUPERVISED:
            return Finding(
                f"{without:.1%} of {len(run.documents):,} documents have no token that is trained on.",
                {"unsupervised_documents": without, "documents": len(run.documents)},
                "They take part in no loss, so the run has seen less than it seems.",
                "python -m sft_jax.inspect_data --config ... --zero_weight names them; check data.supervise, data.columns and data.overlength.",
            )  # fmt: skip
    return None


def few_tokens(evidence: Evidence) -> Finding | None:
    """There is too little to learn from."""
    sets = evidence.run.training_sets.values()
    if not sets:
        return None
    documents = sum(report.get("documents", 0) for report in sets)
    tokens = sum(report.get("used_supervised_tokens", 0) for report in sets)
    if documents >= FEWEST_DOCUMENTS and tokens >= FEWEST_TOKENS:
        return None
    left_out = sum(report.get("rows_left_out", {}).get("total", 0) + report.get("over_length", {}).get("dropped", 0) for report in sets)
    return Finding(
        f"One pass over the data has {documents:,} documents with {tokens:,} supervised tokens"
        + (f"; {left_out:,} rows were left out." if left_out else "."),
        {"documents": documents, "supervised_tokens": tokens, "left_out": left_out},
        f"Below {FEWEST_DOCUMENTS} documents or {FEWEST_TOKENS:,} tokens a run learns these answers and little else.",
        "More rows in data.train" + ("; data_report.json says why rows were left out (data.bad_rows, data.overlength)." if left_out else "."),
    )  # fmt: skip


def duplicates_or_leakage(evidence: Evidence) -> Finding | None:
    """Held-out rows are in the training data, or training rows are there several times."""
    data = evidence.data
    if data is None:
        return None
    rows = {split: sum(count for key, count in data.sets.items() if key.startswith(f"data.{split}")) for split in ("train", "eval")}
    count = {kind: result.rows for kind, result in data.kinds.items()}
    leaked, repeated = count.get("overlap", 0), count.get("duplicate", 0) + count.get("near_duplicate", 0)
    found = {
        "overlap": leaked, "duplicates": count.get("duplicate", 0), "near_duplicates": count.get("near_duplicate", 0),
        "train_rows": rows["train"], "held_out_rows": rows["eval"],
    }  # fmt: skip
    remedy = "python -m sft_jax.inspect_data --config ... --check --fix DIR names these rows and writes the data without them."
    if rows["eval"] and leaked >= LEAKED * rows["eval"] and leaked:
        first = next((f"{one.file}:{one.line}" for one in data.kinds["overlap"].findings), "")
        return Finding(
            f"{leaked:,} training rows hold what {rows['eval']:,} held-out rows ask, the first in {first}.", {**found, "first": first},
            "Held-out numbers are those of rows that were trained on; with new prompts the model does worse.", remedy,
        )  # fmt: skip
    if repeated > REPEATED * max(rows["train"], 1):
        return Finding(
            f"{repeated:,} of {rows['train']:,} training rows are the same as an earlier one, or nearly.", found,
            "What is there several times is learnt by heart, and an epoch is shorter than it seems.", remedy,
        )  # fmt: skip
    return None


def cut_at_right(run: RunFiles) -> dict[str, int]:
    """Returns how many documents were cut at their end, and the supervised tokens lost by it; nothing where that is little."""
    documents = cut = lost = supervised = 0
    for report in run.training_sets.values():
        length = report.get("over_length", {})
        documents += report.get("documents", 0)
        supervised += report.get("supervised_tokens", 0)
        if length.get("policy") == "truncate_right":
            cut, lost = cut + length.get("cut", 0), lost + length.get("supervised_tokens_lost", 0)
    much = cut > CUT * max(documents, 1) or lost > CUT * max(supervised, 1)
    return {"cut_documents": cut, "supervised_tokens_lost": lost} if much else {}
