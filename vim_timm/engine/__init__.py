"""Training and evaluation: settings, data, loop, checkpoints and logs on top of timm's library.

`train(args, hooks)` and `validate(args)` are what the command lines call; `Hooks` is where your own code enters.
"""

from ..errors import UserError
from .checkpoint import load_weights
from .evaluate import evaluate, predictions
from .loop import Hooks, Trainer

__all__ = ['Hooks', 'Trainer', 'UserError', 'evaluate', 'load_weights', 'predictions']
