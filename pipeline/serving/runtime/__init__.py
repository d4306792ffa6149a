"""The code that runs a registered model. It is stored with each model, so it imports nothing else of this project.

Start with classifier.py. Imports inside are relative, because each loaded model has its own copy under its own name.
"""

from .classifier import Answer as Answer
from .classifier import Classifier as Classifier
from .classifier import ProgramQueue as ProgramQueue
from .classifier import program_queue as program_queue
from .programs import Placement as Placement
from .programs import RoutedNetwork as RoutedNetwork
