"""Rank components, predict what a cut costs, cut, shrink, export.

>>> from transformers import AutoModelForCausalLM, AutoTokenizer
>>> from curvature import Document, Population, collect_factors, select_targets
>>> from surgery import operate, plan_surgery, shrink
>>> from evals.organism import MODEL
>>> model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
>>> tokenizer = AutoTokenizer.from_pretrained(MODEL)
>>> texts = ["sort d b a = a b d", "sort f c e = c e f"]
>>> kept = Population("reasoning", "reasoning", tuple(Document("", t) for t in texts))
>>> targets = select_targets(model, ["mlp"])
>>> factors = collect_factors(model, tokenizer, kept, targets, tokens=None, width=64)
>>> plan = plan_surgery(
...     model, "neurons", {"reasoning": factors}, strength=0.75, score="depth"
... )
>>> plan.kind, plan.removed / plan.total
('neurons', 0.25)
>>> zeroed = operate(model, plan, copy_model=True)  # the same size, removed neurons are zero
>>> small = shrink(model, plan)  # really smaller
>>> small.config.intermediate_size / model.config.intermediate_size
0.75
"""

from surgery.operate import operate
from surgery.plan import Plan, load_plan, save_plan
from surgery.rankings import RANKINGS, plan_surgery
from surgery.rounds import in_rounds
from surgery.shrink import shrink

__all__ = [
    "RANKINGS",
    "Plan",
    "in_rounds",
    "load_plan",
    "operate",
    "plan_surgery",
    "save_plan",
    "shrink",
]
