"""One training step as few launches that wait for nothing: the guard, the update, and numbers that arrive later.

It knows tasks and settings, not epochs or files; `engine.loop` calls it.
"""

from .arrivals import Arrivals
from .muon import batched
from .optimizers import fused_arguments
from .recorded import RecordedStep, why_not
from .regions import compile_task
from .update import Update

__all__ = ['Arrivals', 'RecordedStep', 'Update', 'batched', 'compile_task', 'fused_arguments', 'why_not']
