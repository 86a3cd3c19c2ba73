"""Graph and policy to `Plan`: every decision, before a weight is touched."""

from kqat.planning.end_types import end_types
from kqat.planning.expansion import check_computes, tell_asides
from kqat.planning.plan import Group, LayerPlan, Plan, Role, Rounding
from kqat.planning.planner import make_plan
from kqat.planning.target_fit import activation_of, misfits, replacements, with_replacements

__all__ = [
    "Group",
    "LayerPlan",
    "Plan",
    "Role",
    "Rounding",
    "activation_of",
    "check_computes",
    "end_types",
    "make_plan",
    "misfits",
    "replacements",
    "tell_asides",
    "with_replacements",
]
