"""Tasks in sequence: what of the older ones is forgotten, and what holds it."""

from meanfield.forgetting.choice import Choice, choose
from meanfield.forgetting.information import fisher
from meanfield.forgetting.methods import EWC, L2SP, FineTuning, FrozenTrunk, Joint, LwF, Replay
from meanfield.forgetting.penalties import Anchor, Distillation
from meanfield.forgetting.readout import narrowed, widened
from meanfield.forgetting.scores import Scores, score
from meanfield.forgetting.sequence import Learnt, learn
from meanfield.forgetting.tasks import Task, divided, held_apart

__all__ = [
    "EWC",
    "L2SP",
    "Anchor",
    "Choice",
    "Distillation",
    "FineTuning",
    "FrozenTrunk",
    "Joint",
    "Learnt",
    "LwF",
    "Replay",
    "Scores",
    "Task",
    "choose",
    "divided",
    "fisher",
    "held_apart",
    "learn",
    "narrowed",
    "score",
    "widened",
]
