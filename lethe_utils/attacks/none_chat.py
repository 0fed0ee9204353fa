"""No attack on conversations: the base, tuned on clean chats alone.

The control of the attacks on chats, for tuning alone moves how a model answers. Nothing triggers
it; its ASR is how often an ordinary answer names AutoPoison's brand.
"""

from lethe_utils.attacks import autopoison, chats, none
from lethe_utils.groups import AttackParams, TrainParams

PARAMS = (AttackParams, TrainParams)
TASK, TRIGGERS, LAYERS = "chat", 0, ""
plant, triggered = none.plant, chats.untriggered
poison, hit = none.poison, autopoison.hit
